"""An inspection as a picture: the cosines of all pairs of gradients, one panel a set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gspo.core.files import explained, replacing
from gspo.lab.inspect_report import AtWeights, Inspection
from gspo.lab.picture import require_plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_inspection(found: Inspection, path: Path) -> Path:
    """Write the picture of an inspection.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting()
    from matplotlib.figure import Figure

    size = 2.2 + 0.42 * len(found.at[0].methods)
    figure = Figure(figsize=(size * len(found.at) + 0.6, size + 0.3), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(found.at), squeeze=False)[0]
    images = [_panel(axis, at) for axis, at in zip(axes, found.at, strict=True)]
    figure.colorbar(images[-1], ax=list(axes), label="cosine of the gradients", shrink=0.8)
    figure.suptitle(
        f"{found.run}, step {found.step}: {found.trained} trajectories with an advantage"
    )
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as building:
        figure.savefig(building, format=path.suffix[1:] or "png")
    return path


def _panel(axis: Axes, at: AtWeights) -> AxesImage:
    values = np.array([[np.nan if v is None else v for v in row] for row in at.cosines], float)
    image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    names = [method.name for method in at.methods]
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 else "black"
            text = f"{value:.2f}".replace("0.", ".", 1)
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_title(f"weights {at.weights} the step ({at.source})", fontsize=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image
