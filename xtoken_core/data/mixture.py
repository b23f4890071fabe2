"""Rows drawn by the weights of the parts they are from: the same on every rank, whatever was drawn before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xtoken_core.errors import InputError


class Mixture:
    """A map-style dataset whose epochs hold as many items of each part as its weight says.

    An epoch has as many items as the dataset. A part that is drawn more often than it has items begins anew in a new order, and
    one that is drawn less often goes on in the next epoch where it stopped.
    """

    def __init__(self, items: Any, parts: np.ndarray, weights: Sequence[float]):
        """parts: int [N], which part each item is from. weights: of each part. Raises InputError for a part without items."""
        self.items, self.parts, self.weights = items, parts, np.asarray(weights, np.float64)
        self._members = [np.flatnonzero(parts == part) for part in range(len(weights))]
        for part, members in enumerate(self._members):
            if not len(members):
                raise InputError(f"data.train.{part}: no rows to draw by its weight")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: the items of an epoch, in its order."""
        before, here = draws(self.weights, len(self), epoch)
        drawn = []
        for part, members in enumerate(self._members):
            passes, places = np.divmod(before[part] + np.arange(here[part]), len(members))
            for number in np.unique(passes):
                shuffled = np.random.default_rng([seed, part, int(number)]).permutation(members)
                drawn.append(shuffled[places[passes == number]])
        return np.random.default_rng([seed, len(self._members), epoch]).permutation(np.concatenate(drawn))


def draws(weights: np.ndarray, size: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """How many items of each part the epochs before this one, of `size` items each, have drawn, and how many it draws itself.

    What is drawn in all of them keeps to the weights within two items.
    """
    share = weights / weights.sum()
    before = here = np.zeros(len(weights), np.int64)
    for number in range(epoch + 1):
        before = before + here
        owed = np.maximum((number + 1) * size * share - before, 0)
        here = np.floor(owed).astype(np.int64)
        latest = np.argsort(here - owed, kind="stable")  # the largest remainders first
        if (missing := size - here.sum()) >= 0:
            here[latest[:missing]] += 1
        else:  # a part that had been rounded up is owed nothing, and the others are owed more than an epoch
            here[latest[here[latest] > 0][missing:]] -= 1
    return before, here
