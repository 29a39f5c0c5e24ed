"""The checkpoints of a fit: where it goes on from, and what it keeps on the way."""

from __future__ import annotations

from collections.abc import Callable

from gmm_dist.em.lane import Snapshot
from gmm_dist.runs.checkpoint import Checkpoint, RunIdentity
from gmm_dist.runs.claim import Run


class FitCheckpoints:
    """Snapshots of a fit, one after each pass; `latest` is the one to go on from, if any.

    `number` is that of the pass after which `latest` was taken.
    """

    def __init__(
        self, run: Run, identity: RunIdentity, *, resume: bool, seconds: float = 0.0
    ) -> None:
        self._run = run
        self._store = run.checkpoints(identity, seconds=seconds)
        saved = self._store.latest() if resume else None
        self.number = 0 if saved is None else saved.number
        self.latest = None if saved is None else Snapshot(dict(saved.tensors), dict(saved.state))

    def keep(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep what `snapshot` returns after a pass, if one is due.

        Raises LeaseLost when another driver has taken the run over.
        """
        self._run.check()
        if self._store.is_due:
            taken = snapshot()
            self._store.put(Checkpoint(number, taken.tensors, taken.state))
