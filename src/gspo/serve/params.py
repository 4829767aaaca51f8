"""How completions are drawn: the parameters of a request, with their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gspo.core.errors import RequestError, shown
from gspo.core.options import TEMPERATURES

MOST_COMPLETIONS = 4096
"""Most completions of one request, over all its prompts."""


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Attributes:
        n: completions of the prompt, 1 to 4096.
        max_tokens: most tokens of one completion; None: up to the model's context.
        temperature: of the distribution, 0.001 to 100; 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens that holds this much probability.
        stop: at most 64 texts, at whose first occurrence a completion ends; they are cut from the
            text, but their tokens were sampled and stay in `token_ids`.
        seed: completion i of a seeded request depends on (seed, i) only, not on other requests.
        purpose: what a request without a seed is drawn for, such as ("train", 3, 0): the split, the
            number of the prompt and that of the rollout. Its draws depend on the engine's seed, on
            purpose and prompt, and on how often these two were asked for before; on no other
            request. See `gspo.core.draws.purpose`.
        expert_choices: return the experts that each token went through (MoE models only).
        ignore_eos: go on after an end token, up to `max_tokens`: for measurements.
        stop_token_ids: tokens that end a completion as an end token does, whatever `ignore_eos`.
        min_tokens: end tokens are not drawn, and stop texts not looked for, among this many first
            tokens.
        skip_special_tokens: leave special tokens out of the text.
        top_k: sample from this many likeliest tokens; 0: from all.
        min_p: sample from the tokens at least this share as likely as the likeliest.
        repetition_penalty: logits of the prompt's and the completion's tokens are divided by it
            where they are positive, and multiplied where they are negative (vLLM).
        presence_penalty, frequency_penalty: taken off the logits of the completion's tokens, once
            and as often as they occur (OpenAI).
        logit_bias: (token id, what is added to its logit).
        top_logprobs: return the log-probs of this many likeliest tokens at each place, 0 to 20.
        grammar: what the text must be, a JSON schema or a grammar (see `gspo.serve.grammar`); "":
            anything.

    A token is drawn so: bias, then penalties, change the logits; what may not be drawn is barred;
    the temperature divides; of that distribution top_k, min_p and top_p each leave a part. The
    returned `logprobs` and `top_logprobs` are those of softmax(logits / temperature) of the
    unchanged logits all the same: that is what the trainer scores. See `altered_by`.

    Raises:
        RequestError: a value out of range.
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    purpose: tuple[int | str, ...] = ()
    expert_choices: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    grammar: str = ""

    def __post_init__(self) -> None:
        limit = 1 if self.max_tokens is None else self.max_tokens
        low, high = TEMPERATURES
        warm = self.temperature == 0 or low <= self.temperature <= high
        repeats = 0.01 <= self.repetition_penalty <= 100
        presence, frequency = abs(self.presence_penalty) <= 2, abs(self.frequency_penalty) <= 2
        stops = len(self.stop) <= 64 and all(0 < len(text) <= 1024 for text in self.stop)
        biased = all(abs(bias) <= 100 for _, bias in self.logit_bias)
        for name, value, fine, rule in (
            ("n", self.n, 1 <= self.n <= MOST_COMPLETIONS, f"in 1..{MOST_COMPLETIONS}"),
            ("max_tokens", self.max_tokens, limit >= 1, "at least 1"),
            ("temperature", self.temperature, warm, f"0, or in [{low:g}, {high:g}]"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("stop", self.stop, stops, "at most 64 texts of 1 to 1024 characters"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 1, or 0 for all tokens"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            # Further out, logits would leave float32.
            ("repetition_penalty", self.repetition_penalty, repeats, "in [0.01, 100]"),
            ("presence_penalty", self.presence_penalty, presence, "in [-2, 2]"),
            ("frequency_penalty", self.frequency_penalty, frequency, "in [-2, 2]"),
            ("logit_bias", self.logit_bias, biased, "from token ids to numbers in [-100, 100]"),
            ("top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= 20, "in 0..20"),
        ):
            if not fine:
                raise RequestError(f"{name} = {shown(value)}: must be {rule}", param=name)

    @cached_property
    def altered_by(self) -> tuple[str, ...]:
        """Names of the parameters because of which tokens are drawn from another distribution than
        softmax(logits / temperature), which is what the trainer scores.

        >>> SamplingParams(top_p=0.9, top_k=50).altered_by
        ('top_p', 'top_k')
        """
        greedy = self.temperature == 0
        barring = not self.ignore_eos or bool(self.stop or self.stop_token_ids)
        reasons = {
            "temperature": greedy,
            "top_p": self.top_p < 1 and not greedy,
            "top_k": self.top_k > 0 and not greedy,
            "min_p": self.min_p > 0 and not greedy,
            "min_tokens": self.min_tokens > 0 and barring,
            "repetition_penalty": self.repetition_penalty != 1,
            "presence_penalty": self.presence_penalty != 0,
            "frequency_penalty": self.frequency_penalty != 0,
            "logit_bias": any(bias for _, bias in self.logit_bias),
            "grammar": bool(self.grammar),
        }
        return tuple(name for name, applies in reasons.items() if applies)
