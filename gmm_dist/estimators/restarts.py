"""Choose the best of several restarts, and report how they go."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from gmm_dist.em.trials import (
    Trial,
)

_ROUNDING = 1e-10  # relative, of a lower bound: the rounding that a fit's iterations accumulate


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, of the largest lower bound first; NaN comes last.

    Trials that differ by rounding alone keep their order: which of two mirrored starts wins must
    not depend on the processor.
    """
    left = sorted(trials, key=lambda trial: _or_least(trial.lower_bound), reverse=True)
    order: list[Trial] = []
    while left:
        most = _or_least(left[0].lower_bound)
        level = most - _ROUNDING * max(1.0, abs(most)) if math.isfinite(most) else most
        tied = [trial for trial in left if _or_least(trial.lower_bound) >= level]
        order += sorted(tied, key=trials.index)
        left = left[len(tied) :]
    return order


class Reporter:
    """Prints what scikit-learn prints of a fit, where `verbose` asks for it."""

    def __init__(self, trials: Sequence[Trial], verbose: int, interval: int) -> None:
        self._trials, self._verbose, self._interval = trials, verbose, interval
        self._began = self._last = time.monotonic()

    def stepped(self, trial: Trial, change: float) -> None:
        if not self._verbose or trial.n_iter % self._interval:
            return
        line = f"Initialization {self._trials.index(trial)}  Iteration {trial.n_iter}"
        if self._verbose > 1:
            now = time.monotonic()
            line += f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}"
            self._last = now
        print(line)  # noqa: T201 - what `verbose` is for

    def ended(self) -> None:
        if not self._verbose:
            return
        for number, trial in enumerate(self._trials):
            line = f"Initialization {number} "
            line += "converged." if trial.converged else "did not converge."
            if self._verbose > 1:
                line += f" time lapse {time.monotonic() - self._began:.5f}s"
                line += f"\t lower bound {trial.lower_bound:.5f}."
            print(line)  # noqa: T201 - what `verbose` is for


def _or_least(bound: float) -> float:
    return -math.inf if math.isnan(bound) else bound
