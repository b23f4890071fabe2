"""Heat map of vocabulary overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overlap_figure(names: Sequence[str], matrix: np.ndarray) -> Figure:
    """Heat map of `overlap_matrix`, one row and column per tokenizer."""
    from matplotlib.figure import Figure

    side = 1.6 + 0.62 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(matrix):
        axes.text(j, i, f"{value:.3f}".lstrip("0"), ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    axes.set_title("Shared byte strings / the smaller vocabulary")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
