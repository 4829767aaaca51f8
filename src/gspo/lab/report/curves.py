"""The charts of a run; of several runs, one curve each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gspo.lab.pictures import plain_text, styled
from gspo.lab.report.page import Section
from gspo.lab.report.run_data import RunData, Values

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MARKED = 60
"""Up to this many points, each one is marked."""

REWARD, CLIPPED = "Reward", "Share clipped"
RATIOS = "Log-ratios of sequences, l_i = mean of d_t, in nats"
NOISE = "Engine against trainer on unchanged weights, in nats"
EXPERTS = "Experts' slots and tokens that changed; agreement of engine and trainer"
NORM = "Gradient norm before clipping"
CHARTS = {
    "Learning": {
        REWARD: "train/reward",
        "Entropy, in nats per trained token": "loss/entropy",
        "KL to the base model, as it stands in the loss": "loss/kl",
        "Groups without a signal: rewards are all equal": "train/groups_zero_advantage",
    },
    "The clip": {
        CLIPPED: "ratio/clip_fraction ratio/clip_fraction_positive ratio/clip_fraction_negative "
        "ratio/clip_fraction_tokens mismatch/clip_fraction",
        RATIOS: "ratio/log_p50 ratio/log_p01 ratio/log_p99",
        NOISE: "mismatch/sequence_log_ratio_abs_max mismatch/log_ratio_abs_max "
        "mismatch/log_ratio_mean ratio/epsilon_low",
    },
    "Optimizer": {
        NORM: "optim/grad_norm",
        "Learning rate": "optim/learning_rate",
    },
    "Experts": {
        EXPERTS: "moe/experts_changed moe/tokens_changed moe/routing_agreement",
        "Load of the experts: std / mean of their tokens": "moe/load_cv",
    },
    "Cost": {
        "Seconds per step, without evaluations": "time/step time/rollout time/train "
        "time/publish time/checkpoint",
        "Tokens per step; each completion with its own prompt": "tokens/completion tokens/prompt",
        "Sampled tokens per trajectory": "tokens/completion_mean",
        "Tokens per second": "throughput/tokens_per_second "
        "throughput/sampled_tokens_per_second throughput/trained_tokens_per_second",
    },
}
"""Section -> title -> metrics. Of several runs, only the first metric is drawn."""


def sections(runs: Sequence[RunData]) -> list[Section]:
    """The charts of `CHARTS`; one without data is left out, and so is a section without charts."""
    out = []
    for section, charts in CHARTS.items():
        figures = {title: draw(title, keys.split(), runs) for title, keys in charts.items()}
        drawn = {title: figure for title, figure in figures.items() if figure is not None}
        out += [Section(section, charts=drawn)] if drawn else []
    return out


def draw(title: str, metrics: Sequence[str], runs: Sequence[RunData]) -> go.Figure | None:
    """One chart of `CHARTS`; None if no run has logged any of its metrics."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    if len(runs) == 1:
        curves = [(key, runs[0], key) for key in metrics]
    else:
        curves = [(plain_text(run.label), run, metrics[0]) for run in runs]
    figure = go.Figure()
    for number, (label, run, key) in enumerate(curves):
        steps, values = _curve(title, run, key)
        if steps:
            color = qualitative.D3[number % len(qualitative.D3)]
            mode = "lines" if len(steps) > _MARKED else "lines+markers"
            figure.add_scatter(x=steps, y=values, name=label, mode=mode, line_color=color)
            if title == REWARD:
                _add_heldout(figure, run, label, color)
    if not figure.data:
        return None
    styled(figure, hovermode="x unified", xaxis_title="step", showlegend=True)
    if title == NOISE:
        figure.update_yaxes(type="log", exponentformat="power")
    else:
        share = title in (CLIPPED, EXPERTS)
        figure.update_yaxes(rangemode="tozero", tickformat=".0%" if share else None)
    if len(runs) == 1:
        _add_limits(figure, title, runs[0])
    return figure


def _curve(title: str, run: RunData, key: str) -> tuple[list[int], Values]:
    steps, values = run.series(key)
    if key == "loss/kl" and not any(values):
        return [], []  # logged as 0 if the loss has no KL term
    if title == NOISE:
        values = [abs(value) if value else None for value in values]
    return steps, values


def _add_heldout(figure: go.Figure, run: RunData, label: str, color: str) -> None:
    heldout = run.heldout()
    above = [high - mean for _, mean, _, high in heldout]
    below = [mean - low for _, mean, low, _ in heldout]
    error = {"type": "data", "array": above, "arrayminus": below}
    steps, rewards = [step for step, *_ in heldout], [mean for _, mean, *_ in heldout]
    look: dict[str, Any] = {"mode": "markers", "marker_size": 9, "marker_color": color}
    name = f"{label.replace('train/reward', 'val/reward')}, held-out, 95 % interval"
    figure.add_scatter(x=steps, y=rewards, error_y=error, name=name, **look)


def _add_limits(figure: go.Figure, title: str, run: RunData) -> None:
    """Dashed lines: the clip range of sequences, and the limit of the gradient's norm."""
    look: dict[str, Any] = {"line_dash": "dash", "line_color": "black", "mode": "lines"}
    limit = run.settings.max_grad_norm if run.settings else None
    if title == RATIOS and run.by_sequence:
        for end, sign in (("low", -1), ("high", 1)):
            steps, values = run.series(f"ratio/epsilon_{end}")
            edges = [math.log1p(sign * v) if v and sign * v > -1 else None for v in values]
            figure.add_scatter(x=steps, y=edges, name=f"clip range, {end}", **look)
    elif title == NORM and limit is not None:
        figure.add_hline(limit, line_dash="dash", annotation_text="clipped above")
