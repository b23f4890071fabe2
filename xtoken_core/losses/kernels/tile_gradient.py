"""What the terms leave of a tile for the pass that writes its gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from xtoken_core.losses.kernels.common import CommonGradient
from xtoken_core.losses.kernels.gradient_parts import Sparse
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.touched import Placed, Touched
from xtoken_core.losses.kernels.whole import WholeGradient


@dataclass(frozen=True)
class TileGradient:
    """The gradients that the terms left for a tile, each with the term's number among the teachers."""

    sparse: list[tuple[int, SparseGradient, Placed, bool]] = field(default_factory=list)
    """The last: p_kl (projected by W) or same vocabulary."""
    whole: list[tuple[int, WholeGradient]] = field(default_factory=list)
    common: list[tuple[int, CommonGradient]] = field(default_factory=list)
    touched: Touched | None = None
    """The columns of `sparse`."""

    def sparse_arguments(self) -> tuple[Sparse, ...]:
        """The sparse ones as the kernel takes them."""
        return tuple(
            Sparse(s.values, s.owner, s.share, s.slope, s.active, s.values.shape[1], p.number, p.position, p.weight)
            for _, s, p, _ in self.sparse
        )

    def touched_or(self, spare: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Lists of touched columns, ranks, and their sizes; without sparse ones nothing reads them, and `spare` stands there."""
        if self.touched is None:
            return spare, spare, 1, 1
        return self.touched.token, self.touched.rank, *self.touched.token.shape

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Of the kernel's constants those that tell of the teachers, in its order."""
        return {
            "SLOTS": tuple(p.position.shape[1] for _, _, p, _ in self.sparse),
            "PROJECTED": tuple(x for *_, x in self.sparse),
            "SPARSE": tuple(i for i, *_ in self.sparse),
            "WHOLE": tuple(i for i, _ in self.whole),
            "COMMON": tuple(i for i, _ in self.common),
        }
