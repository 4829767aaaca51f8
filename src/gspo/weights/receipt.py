"""No token is sampled under weights that were not proved.

After each publication the engine scores a fixed probe. The trainer scores it too, with the weights
that the engine must have now, computed again from the trainer's. Tensors of an engine in this
process are also compared with these weights, bit by bit. The scores prove what is computed; the
tensors prove what a probe of a few tokens cannot see, such as one row of an embedding. Without a
receipt the engine refuses to sample. docs/reliability.md lists the faults that were tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gspo.core.errors import ServeError
from gspo.kernels import hf
from gspo.kernels.logprob import full_logits
from gspo.kernels.sharded import inside_forward, reshard
from gspo.policy.lora import merged_weights
from gspo.policy.policy import Policy
from gspo.weights.publisher import Publisher

_TOKENS = 8
"""Fewest tokens of a probe: a pass over fewer takes as long."""
NOISE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far log-probs may differ if sums are taken in another order, in shares of the largest one."""
_MERGED = 0.01
"""Share of what LoRA adapters do to the log-probs that merging them may lose."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Probe:
    """A text that is scored after each publication, the same for as long as a model is loaded.

    Attributes:
        tokens: [T] token ids, drawn from the vocabulary by a fixed seed.
        expert_choices: [T, N, K] experts that compute the tokens, whatever the routers prefer, so
            that each expert of each layer computes at least one; None in a dense model.
    """

    tokens: Int[Tensor, " T"]
    expert_choices: Int[Tensor, "T N K"] | None


class Scorer(Protocol):
    """What a receipt needs of an engine; `gspo.serve.engine.Engine` has it."""

    def score(self, probe: Probe) -> list[float]: ...


class Receipts:
    """Publishes the trainer's weights to one engine, and proves that they have arrived.

    Args:
        policy: the trainer's.
        sampling: what the engine samples from, if that is in this process.
        publisher: gives the engine the weights.
        probe: None: one that `probe_for` makes.

    Attributes:
        version: of the weights that were proved last; -1 before the first receipt.
    """

    def __init__(
        self, policy: Policy, sampling: Policy, publisher: Publisher, probe: Probe | None = None
    ):
        self.version = -1
        self._policy, self._sampling, self._publisher = policy, sampling, publisher
        self._probe = probe or probe_for(sampling)
        self._attention = hf.attention_implementation(sampling.lm)
        self._fault = "they were not proved yet"

    def publish(self, engine: Scorer) -> dict[str, float]:
        """Give the engine the trainer's weights, and prove it; returns and raises as `prove`."""
        self._fault = f"the publication of version {self._policy.version} did not end"
        version = self._publisher.publish(self._policy)
        return self.prove(engine, version)

    @torch.no_grad()
    def prove(self, engine: Scorer, version: int) -> dict[str, float]:
        """Prove that the engine computes with the weights that the trainer has now.

        Returns:
            The metrics `publish/probe_max_diff` and `time/receipt`.

        Raises:
            ServeError: it doesn't. Says which engine and version, and by how much it is off.
        """
        started = time.perf_counter()
        expected, weights = self._publisher.expected(self._policy)
        wanted = _scored_with(weights, expected, self._probe)
        faults, difference = [], float("inf")
        try:
            difference = _distance(torch.tensor(engine.score(self._probe)), wanted)
        except Exception as error:  # of whatever kind: such weights cannot be sampled with
            faults.append(f"it cannot score the probe: {error}")
        allowed = self._publisher.tolerance
        if self._policy.device.type != "cpu":  # a GPU adds up a token's experts in any order
            allowed = max(allowed, _noise(wanted, self._sampling.lm.dtype))
        if weights:
            faults += _wrong_tensors(self._sampling.tensors, weights)
        if (attention := hf.attention_implementation(self._sampling.lm)) != self._attention:
            faults.append(f"its attention is {attention!r}, not {self._attention!r}")
        if not difference <= allowed:
            faults.append(
                f"its log-probs of the probe are off by {difference:.3g} nats "
                f"({allowed:.3g} allowed)"
            )
        if weights and self._policy.peft is not None and expected.peft is None:
            faults += _wrong_merge(self._policy, expected, self._probe)
        self._fault = "; ".join(faults)
        if faults:
            self.require(version, engine)
        self.version = version
        return {"publish/probe_max_diff": difference, "time/receipt": time.perf_counter() - started}

    def require(self, version: int, engine: Scorer) -> None:
        """Refuse to sample with a version of the weights that has no receipt.

        Raises:
            ServeError: says which engine and version, and by how much it is off.
        """
        behind = f"the last receipt is for version {self.version}"
        if fault := self._fault or (behind if version != self.version else ""):
            raise ServeError(
                f"{type(engine).__name__} has no receipt for version {version} of the weights of "
                f"{self._policy.source}: {fault}. Nothing is sampled with them: see "
                "docs/reliability.md. Start the run again: it goes on from its last checkpoint. If "
                "it fails again with a rollout_dtype, leave that out: the weights are shared then"
            )


def probe_for(policy: Policy) -> Probe:
    """Make the probe of a model: every weight but rows of the embedding takes part in its score."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, policy.head.size, _TOKENS))
    layers, experts = len(policy.routers.modules), policy.routers.experts
    if not layers:
        return Probe(tokens, None)
    with torch.no_grad(), policy.routers.watch(strict=False) as natural:
        policy.backbone(input_ids=tokens[None].to(policy.device), use_cache=False)
    if not natural.complete:  # a router whose choice cannot be replayed
        return Probe(tokens, None)
    each = natural.used().shape[-1]
    # The last token has no score, so its experts would not show.
    count = max(_TOKENS, -(-experts // each) + 1)
    tokens = torch.from_numpy(rng.integers(0, policy.head.size, count))
    slots = torch.arange(count * each).view(count, 1, each) + torch.arange(layers)[:, None]
    return Probe(tokens, slots % experts)


@torch.no_grad()
def score(policy: Policy, probe: Probe) -> Float[Tensor, " T-1"]:
    """Compute the log-prob of each token of the probe but the first, without a cache. Ranks that
    have a part of the weights each call it together."""
    tokens = probe.tokens.to(policy.device)

    def run() -> Tensor:
        with ExitStack() as stack:
            if probe.expert_choices is not None:
                stack.enter_context(policy.routers.watch(probe.expert_choices))
            hidden = policy.backbone(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        logprobs = full_logits(hidden[:-1], policy.head).log_softmax(-1)
        return logprobs.gather(-1, tokens[1:, None]).squeeze(-1).cpu()

    if policy.workers.size == 1:
        return run()
    scores = inside_forward(policy.lm, run)
    reshard(policy.lm)
    return scores


class _Scoring(nn.Module):
    """`score` as a module, in which torch can exchange the model's weights for the time of it."""

    def __init__(self, policy: Policy, probe: Probe):
        super().__init__()
        self.lm, self._arguments = policy.lm, (policy, probe)

    def forward(self) -> Tensor:
        return score(*self._arguments)


def _scored_with(weights: Mapping[str, Tensor], policy: Policy, probe: Probe) -> Tensor:
    """Score the probe with these weights in the policy's model; without any, with the model's."""
    if not weights:
        return policy.workers.everywhere(score, policy, probe)
    named = {f"lm.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(_Scoring(policy, probe), named, ())


def _wrong_tensors(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Name the parameters and buffers of an engine whose bits are not those of `weights`."""
    wrong = []
    for name in dict.fromkeys([*weights, *tensors]):
        if name not in tensors or name not in weights:
            wrong.append(f"{name} (only one side has it)")
        elif tensors[name].dtype != weights[name].dtype:
            wrong.append(f"{name} ({tensors[name].dtype}, not {weights[name].dtype})")
        elif not _same_bits(tensors[name], weights[name]):
            wrong.append(f"{name} (off by {_distance(tensors[name], weights[name]):.3g})")
    if wrong:
        others = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        yield f"tensors that are not the trainer's: {', '.join(wrong[:2])}{others}"


def _wrong_merge(policy: Policy, plain: Policy, probe: Probe) -> Iterator[str]:
    """Say if merging the adapters changes what the model computes."""
    merged = {name: weight.float() for name, weight in merged_weights(policy.lm)}
    merged |= dict(policy.lm.named_buffers())
    scores = score(policy, probe)
    difference = _distance(_scored_with(merged, plain, probe), scores)
    if difference <= _noise(scores, policy.lm.dtype):
        return
    with policy.reference():
        effect = _distance(score(policy, probe), scores)
    if not difference <= effect * _MERGED:  # large adapters lose more digits
        yield f"merging the LoRA adapters moves log-probs of the probe by {difference:.3g} nats"


def _noise(scores: Tensor, dtype: torch.dtype) -> float:
    """How far these log-probs may be off, computed in this precision in another order."""
    return NOISE[dtype] * max(1.0, scores.abs().max().item())


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(*(x.view(_INTEGERS[x.element_size()]) for x in (left, right)))


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest difference; infinite if only one is NaN somewhere, or if they differ in shape."""
    if left.shape != right.shape:
        return float("inf")
    one, two = left.double(), right.to(left.device).double()
    same = (one == two) | (one.isnan() & two.isnan())
    return torch.where(same, 0.0, one - two).abs().nan_to_num(nan=torch.inf).max().item()
