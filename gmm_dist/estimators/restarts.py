"""Choose the best of several restarts, and report how they go."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from gmm_dist.em.lane import Lane

_ROUNDING = 1e-10  # relative, of a lower bound: the rounding that a fit's iterations accumulate


def ranked(lanes: Sequence[Lane]) -> list[Lane]:
    """Return the lanes, of the largest lower bound first; NaN comes last.

    Trials that differ by rounding alone keep their order: which of two mirrored starts wins must
    not depend on the processor.
    """
    left = sorted(lanes, key=lambda lane: _or_least(lane.lower_bound), reverse=True)
    order: list[Lane] = []
    while left:
        most = _or_least(left[0].lower_bound)
        level = most - _ROUNDING * max(1.0, abs(most)) if math.isfinite(most) else most
        level_with = [lane for lane in left if _or_least(lane.lower_bound) >= level]
        order += sorted(level_with, key=lanes.index)
        left = left[len(level_with) :]
    return order


class Reporter:
    """Prints what scikit-learn prints of a fit, where `verbose` asks for it."""

    def __init__(self, lanes: Sequence[Lane], verbose: int, interval: int) -> None:
        self._lanes, self._verbose, self._interval = lanes, verbose, interval
        self._n_iter = [0] * len(lanes)
        self._bounds = [lane.last_bound for lane in lanes]
        self._began = self._last = time.monotonic()

    def passed(self, lanes: Sequence[Lane]) -> None:
        """Tell of the lanes that a pass has stepped."""
        if not self._verbose:
            return
        for i, lane in enumerate(self._lanes):
            if lane.n_iter > self._n_iter[i]:
                before = self._bounds[i]
                self._n_iter[i], self._bounds[i] = lane.n_iter, lane.lower_bound
                self._tell(i, lane, math.inf if before is None else lane.lower_bound - before)

    def _tell(self, i: int, lane: Lane, change: float) -> None:
        if lane.n_iter % self._interval:
            return
        line = f"Initialization {i}  Iteration {lane.n_iter}"
        if self._verbose > 1:
            now = time.monotonic()
            line += f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}"
            self._last = now
        print(line)  # noqa: T201 - what `verbose` is for

    def ended(self) -> None:
        if not self._verbose:
            return
        for number, lane in enumerate(self._lanes):
            line = f"Initialization {number} "
            line += "converged." if lane.converged else "did not converge."
            if self._verbose > 1:
                line += f" time lapse {time.monotonic() - self._began:.5f}s"
                line += f"\t lower bound {lane.lower_bound:.5f}."
            print(line)  # noqa: T201 - what `verbose` is for


def _or_least(bound: float) -> float:
    return -math.inf if math.isnan(bound) else bound
