"""Charts that are nothing but curves of metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A metric of one run's chart. Of several runs, only the first is drawn."""

    key: str
    label: str
    color: str = "@blue"
    dash: str = "solid"


@dataclass(frozen=True)
class Plain:
    """A chart that is nothing but curves of metrics.

    Attributes:
        kind: of its axis.
        smooth: long runs are shown as moving means.
        unless_zero: a run in which it is 0 throughout did not measure it.
    """

    id: str
    title: str
    note: str
    curves: tuple[Curve, ...]
    kind: str = ""
    smooth: bool = False
    from_zero: bool = False
    unless_zero: bool = False


CLIPPED = Plain(
    "clip",
    "Share clipped",
    "Sequences whose gradient is 0 because of the clip, by the sign of their advantage; "
    "and what noise between engine and trainer alone would clip.",
    (
        Curve("ratio/clip_fraction", "sequences"),
        Curve("ratio/clip_fraction_positive", "of A > 0", "@orange"),
        Curve("ratio/clip_fraction_negative", "of A < 0", "@green"),
        Curve("ratio/clip_fraction_tokens", "tokens", "@grey", "dot"),
        Curve("mismatch/clip_fraction", "by noise alone", "@red", "dash"),
    ),
    kind="share",
    smooth=True,
)
ENTROPY = Plain(
    "entropy",
    "Entropy",
    "Nats per trained token. Near 0, the rollouts of a group are all alike.",
    (Curve("loss/entropy", "entropy"),),
    from_zero=True,
)
KL = Plain(
    "kl",
    "KL to the base model",
    "k3 estimate, mean over sequences, as it stands in the loss.",
    (Curve("loss/kl", "KL"),),
    from_zero=True,
    unless_zero=True,
)
FLAT = Plain(
    "flat",
    "Groups without a signal",
    "Groups whose rewards are all equal: they give no gradient.",
    (Curve("train/groups_zero_advantage", "groups"),),
    kind="count",
)
RATE = Plain(
    "rate",
    "Learning rate",
    "Mean over the optimizer steps of a step.",
    (Curve("optim/learning_rate", "learning rate"),),
    from_zero=True,
)
EXPERTS = Plain(
    "experts",
    "Experts",
    "Changed: slots whose expert is another one after the step. Agreement: slots in which the "
    "engine used an expert that the trainer uses too.",
    (
        Curve("moe/experts_changed", "slots changed"),
        Curve("moe/tokens_changed", "tokens with a change", "@orange"),
        Curve("moe/routing_agreement", "agreement, engine and trainer", "@green", "dash"),
    ),
    kind="share",
)
LOAD = Plain(
    "load",
    "Load of the experts",
    "Standard deviation over mean of the tokens that each expert computed. 0 is even.",
    (Curve("moe/load_cv", "load_cv"),),
    from_zero=True,
)
LENGTH = Plain(
    "length",
    "Length of completions",
    "Sampled tokens per trajectory, mean over the batch.",
    (Curve("tokens/completion_mean", "tokens"),),
    kind="count",
)
SPEED = Plain(
    "speed",
    "Throughput",
    "Tokens a second: sampled over the rollouts' time, trained over the trainer's, and sampled "
    "over the whole step.",
    (
        Curve("throughput/tokens_per_second", "whole step"),
        Curve("throughput/sampled_tokens_per_second", "sampled", "@orange"),
        Curve("throughput/trained_tokens_per_second", "trained", "@green"),
    ),
    kind="count",
)
