"""What a projection matrix looks like: counts, a density of the whole, and the entries of tokens that people know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtoken_core.projection import Projection
from xtoken_core.results.vocabulary import Block, Example, ProjectionStats
from xtoken_core.tokenization import TokenTable

SHOWN = tuple(
    text.encode()
    for text in (
        *("201", "2024", "100", "42", "00", "3.14", "1000"),
        *(" return", "def", "():\n", "    ", "!=", "_name", "://", "\n\n"),
        *(" the", " information", "tion", " tokenizer", " don", " naïve", "中", "こんにちは", " привет"),
    )
)
"""Numbers, code and words that show how one vocabulary reads in another; those that the student lacks are left out."""

BINS = (48, 64)
"""Of `ProjectionStats.picture`: student ids down, teacher ids across."""


def projection_summary(projection: Projection, student: TokenTable, teacher: TokenTable, **about: Any) -> ProjectionStats:
    """Figures of W: counts of rows by kind, `picture` (density), `block` and `examples` (known tokens); `about`: the other fields."""
    weights, indices = projection.weights.detach().float().cpu().numpy(), projection.indices.cpu().numpy()
    per_row = (indices >= 0).sum(1)
    exact = np.zeros(len(indices), bool) if projection.exact is None else projection.exact.cpu().numpy()
    ids = [student.ids_by_bytes[token] for token in SHOWN if token in student.ids_by_bytes]
    multi = np.flatnonzero(per_row > 1)
    spread = multi[np.linspace(0, len(multi) - 1, min(8, len(multi))).astype(int)].tolist()
    return ProjectionStats(
        rows=len(indices),
        columns=len(teacher),
        entries=int(per_row.sum()),
        exact=int(exact.sum()),
        multi=len(multi),
        single_inexact=int(((per_row == 1) & ~exact).sum()),
        empty=int((per_row == 0).sum()),
        entries_per_row={str(n): int((per_row == n).sum()) for n in range(indices.shape[1] + 1)},
        picture=_density(indices, weights, len(teacher)),
        block=projection_block(projection, student, teacher, [*ids, *spread]),
        examples=[
            Example(
                student=show_token(student[i]),
                pieces=[(show_token(teacher[j]), round(float(w), 4)) for j, w in zip(indices[i], weights[i]) if j >= 0],
            )
            for i in [*ids, *spread]
        ],
        **about,
    )


def projection_block(projection: Projection, student: TokenTable, teacher: TokenTable, ids: Sequence[int]) -> Block:
    """The rows of the given student ids, over the teacher tokens that occur in them, in order of first use."""
    indices, weights = projection.indices[list(ids)].tolist(), projection.weights[list(ids)].detach().tolist()
    columns = {j: None for row in indices for j in row if j >= 0}
    position = {j: c for c, j in enumerate(columns)}
    dense = np.zeros((len(ids), len(columns)))
    for r, (row, row_weights) in enumerate(zip(indices, weights)):
        for j, weight in zip(row, row_weights):
            if j >= 0:
                dense[r, position[j]] = weight
    return Block(
        rows=[show_token(student[i]) for i in ids],
        columns=[show_token(teacher[j]) for j in columns],
        weights=dense.round(4).tolist(),
    )


def show_token(token: bytes) -> str:
    """A token as people read it: a leading space as a low line, control characters and partial ones escaped."""
    text = token.decode(errors="backslashreplace")
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return visible.replace(" ", "␣")


def _density(indices: np.ndarray, weights: np.ndarray, columns: int) -> list[list[float]]:
    """Sums of weight over equal bins of student ids (down) and teacher ids (across)."""
    row, slot = np.nonzero(indices >= 0)
    if not len(row):
        return np.zeros(BINS).tolist()
    sums, _, _ = np.histogram2d(
        row, indices[row, slot], bins=BINS, range=[(0, len(indices)), (0, columns)], weights=weights[row, slot]
    )
    return sums.round(4).tolist()


SHADES = 8


@dataclass(frozen=True)
class Density:
    """A matrix of bins in shades: one SVG path of unit squares for each, darkest last, with its opacity."""

    width: int
    height: int
    paths: list[tuple[float, str]]


def density_picture(bins: Sequence[Sequence[float]]) -> Density:
    """The picture of a matrix of non-negative sums, shaded by the logarithm of each."""
    grid = np.log1p(np.asarray(bins, dtype=float))
    shade = np.ceil(SHADES * grid / (grid.max() or 1)).astype(int)
    paths = []
    for level in range(1, SHADES + 1):
        rows, columns = np.nonzero(shade == level)
        path = "".join(f"M{x} {y}h1v1h-1z" for y, x in zip(rows.tolist(), columns.tolist()))
        if path:
            paths.append((round(level / SHADES, 3), path))
    return Density(grid.shape[1], grid.shape[0], paths)
