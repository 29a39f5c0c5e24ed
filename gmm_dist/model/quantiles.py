"""Quantiles of the training rows' log-density, kept with a model to mark outliers."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from gmm_dist.errors import UserError

LEVELS = (
    0.0,
    *(k / 10**power for power in range(6, 2, -1) for k in range(1, 10)),
    *(k / 100 for k in range(1, 100)),
    *(1 - k / 10**power for power in range(3, 7) for k in range(9, 0, -1)),
    1.0,
)
"""The levels of a model's table: one digit deep in the tails, every hundredth between."""
SMALLEST = LEVELS[1]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Values (nats) below which a share (`levels`) of the training rows lies; both ascend."""

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, level: float) -> float:
        """Return the quantile at a level, one of the table's or between two of them.

        Between two the value is interpolated over the logarithm of the level, as suits a tail.

        Raises:
            UserError: the level is below a millionth, not below one, or not in the table.
        """
        if not SMALLEST <= level < 1:
            raise UserError(f"the quantile at {level:g}: give a share from {SMALLEST:g} to below 1")
        i = bisect.bisect_left(self.levels, level)
        if i == len(self.levels) or (i == 0 and self.levels[0] != level):
            raise UserError(f"the quantile at {level:g} lies outside of the table: fit anew")
        quantile = self.values[i] if self.levels[i] == level else self._between(i, level)
        if math.isnan(quantile):
            raise UserError(f"the quantile at {level:g} is not known: fit the model anew")
        return quantile

    def _between(self, i: int, level: float) -> float:
        (a, b), (low, high) = self.levels[i - 1 : i + 1], self.values[i - 1 : i + 1]
        part = level / b if a == 0 else math.log(level / a) / math.log(b / a)
        return low + part * (high - low)
