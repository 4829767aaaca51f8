"""Metrics of a loop that no trajectory has, and what judges cost: `model.metrics_builder()`.

    with model.metrics_builder().measure("time/step_actor_s"):
        groups = await art.gather_trajectory_groups(...)
    await model.log(groups, split="train")          # writes them

Prices are what you give: none is built in, since they change.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from gspo.core.errors import ConfigError, DataError, shown
from gspo.core.variables import holding

__all__ = ["MetricsBuilder", "track_api_cost"]

F = TypeVar("F", bound=Callable[..., Any])
CONTEXTS = ("train", "eval")


class Price(NamedTuple):
    """Dollars per million tokens."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class MetricsBuilder:
    """Collects metrics until the next `model.log` writes them. Values of one name add up.

    >>> builder = MetricsBuilder()
    >>> builder.add_metric("data/tools", 2); builder.add_metric("data/tools", 3)
    >>> builder.take()
    {'data/tools': 5.0}

    Attributes:
        context: `train` or `eval`: what costs belong to, see `activate_context`.
    """

    context: str = "train"
    _values: dict[str, float] = field(default_factory=dict)
    _prices: dict[str, Price] = field(default_factory=dict)

    def of(self, context: str) -> MetricsBuilder:
        """The same collection, whose costs belong to another context.

        Raises:
            ConfigError: no context.
        """
        if context not in CONTEXTS:
            raise ConfigError(f"metrics_builder({context!r}): give one of {CONTEXTS}")
        return replace(self, context=context)

    def add_metric(self, name: str, value: float) -> None:
        """Add a value.

        Raises:
            DataError: the value is no number.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"metric {name!r} is {shown(value)}; give a number")
        self._values[name] = self._values.get(name, 0.0) + value

    def _add_given(self, section: str, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.add_metric(f"{section}/step_{name}", value)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a metric."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add_metric(name, time.monotonic() - began)

    def add_data(
        self, step_num_scenarios: int | None = None, step_actor_tokens: int | None = None
    ) -> None:
        """Add counts of the step, as `data/...`."""
        self._add_given("data", num_scenarios=step_num_scenarios, actor_tokens=step_actor_tokens)

    def add_idle_times(
        self, step_trainer_idle_s: float | None = None, step_actor_idle_s: float | None = None
    ) -> None:
        """Add seconds in which nothing was done, as `time/...`."""
        self._add_given("time", trainer_idle_s=step_trainer_idle_s, actor_idle_s=step_actor_idle_s)

    def register_model_pricing(
        self, model_name: str, *, prompt_per_million: float, completion_per_million: float
    ) -> None:
        """Say what a model's tokens cost, in dollars."""
        self._prices[model_name] = Price(prompt_per_million, completion_per_million)

    def price(self, model_name: str) -> Price:
        """What a model's tokens cost.

        Raises:
            ConfigError: nobody has said it.
        """
        if model_name not in self._prices:
            raise ConfigError(
                f"what does {model_name!r} cost? gspo has no prices built in: "
                "model.metrics_builder().register_model_pricing(name, prompt_per_million=, "
                "completion_per_million=), or the prices in @track_api_cost"
            )
        return self._prices[model_name]

    def add_response_cost(self, source: str, response: Any, price: Price) -> None:
        """Add what an answer cost, by its `usage` as OpenAI or Anthropic name it.

        Raises:
            DataError: it has none.
        """
        usage = _item(response, "usage")
        prompt = _item(usage, "prompt_tokens", "input_tokens")
        completion = _item(usage, "completion_tokens", "output_tokens")
        if prompt is None or completion is None:
            raise DataError(
                f"what {source!r} returned has no usage with prompt and completion tokens: "
                f"{shown(response)}; give response_getter= to find it"
            )
        cost = (prompt * price.prompt + completion * price.completion) / 1e6
        whole = f"costs/{self.context}"
        for name in (f"{whole}/{source}", whole, "costs/all"):
            self.add_metric(name, cost)

    def activate_context(self) -> AbstractContextManager[MetricsBuilder | None]:
        """Inside the block, what `track_api_cost` decorates adds its costs here."""
        return holding(_active, self)

    def take(self) -> dict[str, float]:
        """Return what was collected, and begin again."""
        values = dict(self._values)
        self._values.clear()
        return values


_active: contextvars.ContextVar[MetricsBuilder | None] = contextvars.ContextVar(
    "gspo_metrics", default=None
)


def track_api_cost(
    *,
    source: str,
    model_name: str,
    provider: str | None = None,
    response_getter: Callable[[Any], Any] = lambda result: result,
    prompt_price_per_million: float | None = None,
    completion_price_per_million: float | None = None,
) -> Callable[[F], F]:
    """Decorate a function that asks a model for money, such as a judge, async or not.

    Its cost stands as `costs/<context>/<source>` in the next logged line, if it is called inside
    `metrics_builder(context).activate_context()`; elsewhere it is not counted.

    Args:
        source: names the cost.
        model_name: whose price is meant.
        provider: ART's; a price is looked up by `provider/model_name` too.
        response_getter: finds the answer, with its `usage`, in what the function returns.
        prompt_price_per_million, completion_price_per_million: in dollars; None: those that
            `register_model_pricing` was given.

    Raises:
        ConfigError: at the call, before anything is asked: the price is not known.
    """

    def price_in(builder: MetricsBuilder) -> Price:
        if prompt_price_per_million is not None and completion_price_per_million is not None:
            return Price(prompt_price_per_million, completion_price_per_million)
        full = f"{provider}/{model_name}"
        return builder.price(full if full in builder._prices else model_name)

    def charging() -> Callable[[Any], Any]:
        """What takes a result, and counts it. The price is looked up first: before it is asked."""
        if (builder := _active.get()) is None:
            return lambda result: result
        price = price_in(builder)

        def charge(result: Any) -> Any:
            builder.add_response_cost(source.strip("/"), response_getter(result), price)
            return result

        return charge

    def decorate(function: Any) -> Any:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def asks(*args: Any, **kwargs: Any) -> Any:
                return charging()(await function(*args, **kwargs))

            return asks

        @functools.wraps(function)
        def asks_and_waits(*args: Any, **kwargs: Any) -> Any:
            return charging()(function(*args, **kwargs))

        return asks_and_waits

    return decorate


def _item(holder: Any, *names: str) -> Any:
    """The first of these attributes, or items of a dict, that is there."""
    for name in names:
        value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if value is not None:
            return value
    return None
