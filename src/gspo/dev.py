"""Options for people who know the algorithm: `gspo.dev.TrainConfig` and the model's internals.

The names are OpenPipe ART's where ART has the option; docs/art.md lists every difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gspo import absent
from gspo.core.errors import suggestion
from gspo.core.options import LARGEST_COUNT, Options


def __getattr__(name: str) -> Any:
    raise absent.refusal("gspo.dev", name, "gspo.dev", __all__)


__all__ = ["InternalModelConfig", "LoraConfig", "RolloutDtype", "TrainConfig"]

Level = Literal["token", "sequence", "sequence_token", "average", "geometric_average"]
CorrectionKind = Literal[
    "token_truncate",
    "token_mask",
    "sequence_product_truncate",
    "sequence_product_mask",
    "sequence_geometric_truncate",
    "sequence_geometric_mask",
    "off_policy_sequence_mask",
]
RolloutDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _known_algorithm(value: Any) -> Any:
    """A name or the fields of an objective; of an `Objective` or `Preset` itself, its fields."""
    from gspo.objective import PRESETS  # here: it loads torch, which most errors do not need

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    named = isinstance(value, str) and (":" in value or value in PRESETS)
    if named or value is None or isinstance(value, Mapping):
        return value
    raise ValueError(
        f"there is no such method.{suggestion(str(value), PRESETS)} Known: {', '.join(PRESETS)}. "
        "One of your own: gspo.register_algorithm, 'module:name', an Objective or a Preset"
    )


Algorithm = Annotated[str, BeforeValidator(_known_algorithm)]
"""A name of `gspo.objective.PRESETS`, registered ones included, or `module:name`."""


class TrainConfig(Options):
    """How one call of `model.train` turns trajectory groups into optimizer steps.

    `TrainConfig(importance_sampling_level="sequence")` alone is the paper's GSPO: sequence ratio,
    clipped surrogate, mean over sequences, clip range 3e-4/4e-4, no KL, four minibatches.

    Raises:
        ConfigError: an unknown or misspelt option or value, or a combination with no meaning.
    """

    algorithm: Annotated[Any, BeforeValidator(_known_algorithm)] = None
    """A named preset, or your own: a name given to `gspo.register_algorithm`, `module:name`,
    or an `Objective` or `Preset` itself (kept as its fields). None: the preset that
    `importance_sampling_level` implies, else `gspo`."""
    importance_sampling_level: Level | None = None
    """Over what the importance ratio is taken. None: the preset's."""
    epsilon: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = None
    """Lower clip distance: ratios below 1 - epsilon are clipped. None: the preset's. "auto" steers
    both sides so that `epsilon_target` of the sequences are clipped, in the preset's proportion."""
    epsilon_target: float = Field(default=0.15, gt=0, lt=1)
    """Share of clipped sequences that `epsilon="auto"` steers to (the paper reports 0.15)."""
    epsilon_scale: Literal["constant", "sqrt_length"] | None = None
    """`sqrt_length`: epsilon / sqrt(L_i), so that clip rates don't depend on length (FSPO,
    arXiv 2509.09177). None: the preset's, which is `constant` in gspo's own."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip distance. None: `epsilon` if that was given, else the preset's."""
    scale_rewards: bool | None = None
    """Divide the group's centred rewards by their standard deviation. None: as the preset does."""
    turn_weight: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of a turn's own advantage, made of `Trajectory.turn_rewards`, beside that of its
    trajectory. 0: turn rewards are not read. None: the preset's."""
    turn_discount: float = Field(default=0.95, ge=0, le=1)
    """By how much a turn's reward counts less for the turn before it."""
    sequence_unit: Literal["trajectory", "turn"] = "trajectory"
    """What a sequence is, in the ratio's length and in N: all sampled tokens of a trajectory, or
    each assistant turn by itself."""
    old_logprobs: Literal["rollout", "trainer"] = "rollout"
    """The policy that ratios are taken against: the engine's own likelihoods, as the paper
    proposes, or the trainer's before the first update (one more forward pass)."""
    correction: CorrectionKind | None = None
    """Importance weights pi_old / mu, for tokens that an engine with other log-probs (mu) sampled;
    needs old_logprobs="trainer". None: the preset's; those of gspo have none."""
    correction_low: float | None = Field(default=None, ge=0)
    correction_high: float | None = Field(default=None, gt=0)
    """Bounds of the correction. None: those of the preset's, else `gspo.objective.BOUNDS`."""
    overlong_max_tokens: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """DAPO's soft overlong punishment: rewards fall linearly to -1 over the last
    `overlong_cache` tokens before this many. None: none."""
    overlong_cache: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    kl_penalty_coef: float | None = Field(default=None, ge=0)
    """As in `TrainConfig`, which it overrides if it is given. If neither is given, your own
    `Objective` keeps its `kl_coef`."""
    kl_reference: str | None = Field(default=None, min_length=1)
    """The model that the KL term is against, such as a teacher: a folder, a checkpoint of a run, a
    hub id, with the tokens of the model that is trained. None: the base model."""
    ppo: Literal[True] = True
    """ART's switch between the clipped surrogate and CISPO; here the algorithm says it."""
    normalize_by_length: Literal[True] = True
    """ART's switch to Dr. GRPO; here the algorithm says it."""
    precalculate_logprobs: bool = False
    """ART's name for `old_logprobs="trainer"`."""

    minibatches: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Optimizer steps per rollout batch and epoch. The clip acts from the second one on. None: 4,
    or 1 for `rloo` and `reinforce`, which have no ratio to correct for a policy that has moved."""
    epochs: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    """Passes over the rollout batch."""
    packed_sequence_length: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Tokens of one microbatch, which is packed. None: what fits about 2 GiB of activations.
    The result doesn't depend on it."""
    share_prefixes: bool = True
    """Compute a prompt once for all its completions, and the shared history of a trajectory's turns
    once. The result doesn't depend on it. Models on which that is not exact do without."""
    logprob_calculation_chunk_size: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Tokens of one block of logits, whose other side is 2,048 vocabulary entries (a GPU: 8,192).
    None: 4 MiB (a GPU: 64 MiB) of logits."""
    seed: int = 0
    """Orders the groups into minibatches."""

    routing_replay: Literal["none", "old_policy", "rollout"] = "none"
    """Whose choice of experts an MoE model trains with: its own; the trainer's before the first
    update (R2); the engine's (R3, rollouts need `extra_body={"return_routes": True}`).
    Gate values stay live."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss (Switch Transformer, eq. 4-6), which is 1 when experts are
    evenly loaded. Costs a forward pass more."""
    measure_routing: bool = False
    """Log `moe/experts_changed` over the call of `train`. Costs two forward passes."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient clipping by global norm. None: no clipping; in a file, which has no None, "off".
    Presets that sum a sequence's tokens (`dr_grpo`, `luspo`, `rloo`, `reinforce`) have gradients
    larger by about the length: at 1.0 nearly every step of theirs is cut to this norm."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1e6)
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay after the warmup, to `lr_final` of the peak at `lr_total_steps`."""
    lr_warmup_steps: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    """Calls of `train` over which the learning rate rises in equal steps, one per minibatch: the
    first minibatch has one step and not 0, the last one of these calls has the peak. None: 5 if
    `learning_rate` is left to gspo too, else 0."""
    lr_total_steps: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Calls of `train` at which `cosine` or `linear` ends; needed by those two."""
    lr_final: float = Field(default=0.0, ge=0, le=1)
    """The schedule's end, as a share of the peak. It is reached after the last minibatch of
    `lr_total_steps` calls, so no minibatch within them has a rate of 0; later calls stay at it."""
    on_too_long: Literal["error", "drop"] = "error"
    """A trajectory longer than the context: an error that names it, or dropped and counted."""
    max_staleness: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    """Most versions that the weights may have moved on since the oldest token of a trajectory was
    sampled; an older trajectory is dropped and counted. None: any number."""

    refused: ClassVar[Mapping[str, str]] = absent.of_options("dev.TrainConfig")
    fixed: ClassVar[Mapping[str, str]] = {
        "ppo": "ppo=False is ART's CISPO: use algorithm='cispo'",
        "normalize_by_length": "False is Dr. GRPO: use algorithm='dr_grpo'",
        "adam_betas": "must be two finite numbers from 0 to below 1, such as (0.9, 0.999)",
        "max_grad_norm": "must be a number above 0, or 'off' for no gradient clipping",
    }

    @field_validator("max_grad_norm", mode="before")
    @classmethod
    def _no_limit_has_a_name(cls, limit: Any) -> Any:
        return None if limit in ("off", math.inf) else limit

    @model_validator(mode="before")
    @classmethod
    def _arts_name_sets_ours(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not data.get("precalculate_logprobs"):
            return data
        if data.get("old_logprobs") == "rollout":
            raise ValueError(
                "precalculate_logprobs=True means old_logprobs='trainer': give one of the two"
            )
        return {**data, "old_logprobs": "trainer"}

    @model_validator(mode="after")
    def _options_belong_together(self) -> TrainConfig:
        longest, cache = self.overlong_max_tokens, self.overlong_cache
        schedule, total = self.lr_schedule, self.lr_total_steps
        if (longest is None) != (cache is None):
            raise ValueError("overlong_max_tokens and overlong_cache belong together")
        if cache and longest and cache > longest:
            raise ValueError("overlong_cache must not be larger than overlong_max_tokens")
        if schedule != "constant" and total is None:
            raise ValueError(f"lr_schedule={schedule!r} needs lr_total_steps, a number of calls")
        if total is not None and total <= (self.lr_warmup_steps or 0):
            raise ValueError("lr_total_steps must be larger than lr_warmup_steps")
        # By value and not by what was set: a config that was dumped whole must be readable again.
        unread = [name for name in ("lr_final", "lr_total_steps") if self._differs(name)]
        if schedule == "constant" and unread:
            raise ValueError(f"{unread[0]} means nothing with lr_schedule='constant'")
        return self


class LoraConfig(Options):
    """Low-rank adapters (peft). `target_modules="all-linear"` reaches the experts too."""

    r: int = Field(default=8, ge=1, le=4096)
    alpha: float = Field(default=16.0, gt=0, le=65536)
    target_modules: str | list[str] = Field(default="all-linear", min_length=1)


class InternalModelConfig(Options):
    """How a `TrainableModel` is loaded.

    >>> InternalModelConfig(lora=LoraConfig(r=4)).dtype
    'float32'
    """

    refused: ClassVar[Mapping[str, str]] = absent.of_options("dev.InternalModelConfig")

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that engine and trainer compute in, and of their weights. With `bfloat16` these are the
    rounded copies of float32 ones, which the optimizer updates and a checkpoint holds."""
    rollout_dtype: RolloutDtype | None = None
    """Precision of the engine. None: it samples from the trainer's own weights; else from a copy
    (LoRA merged), made again after each update."""
    exact: bool | None = None
    """The engine's log-probs are those of training, to the bit, and a completion depends on its
    prompt and seed only, whatever is decoded beside it. None: on where this can be proved when the
    model is loaded (on the CPU), and off with a `rollout_dtype`. True: an error where it can't be.
    False: off, which is faster by some per cent."""
    lora: LoraConfig | None = None
    """None: full fine-tuning."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass."""
    max_context: int | None = Field(default=None, ge=2, le=LARGEST_COUNT)
    """Longest prompt + completion. None: the model's own limit, or where its RoPE changes."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU cores to use. None: OMP_NUM_THREADS, else all. Below 20M parameters each core trains
    microbatches of its own, and one of them samples."""
    device: str = "auto"
    """`auto`: cuda if there is one, else cpu."""
    trust_remote_code: bool = False
    """Run Python code of the model's folder, if its config asks for it. Read it first."""

    @model_validator(mode="after")
    def _exact_needs_the_same_weights(self) -> InternalModelConfig:
        if self.exact and self.rollout_dtype is not None:
            raise ValueError(
                f"exact=True and rollout_dtype={self.rollout_dtype!r}: an engine that samples from "
                "a copy of the weights is not exact in any precision. Leave one of the two out"
            )
        return self
