"""The checkpoints of a fit: where it goes on from, and what it keeps on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gmm_dist.em.lane import Snapshot
from gmm_dist.runs.checkpoint import Checkpoint, RunIdentity
from gmm_dist.runs.claim import Run

_RESAMPLED = "resampled."  # begins the names of its tensors


class FitCheckpoints:
    """Snapshots of a fit, one after each pass; `latest` is the one to go on from, if any.

    `number` is that of the pass after which `latest` was taken; `resampled` is its part that
    `keep_resampled` has added, if it did.
    """

    def __init__(
        self, run: Run, identity: RunIdentity, *, resume: bool, seconds: float = 0.0
    ) -> None:
        self._run = run
        self._store = run.checkpoints(identity, seconds=seconds)
        saved = self._store.latest() if resume else None
        self.number = 0 if saved is None else saved.number
        self.latest: Snapshot | None = None
        self.resampled: Snapshot | None = None
        if saved is not None:
            self.latest, self.resampled = _parted(saved.tensors, saved.state)
        self._sweep: Callable[[], Snapshot] | None = None

    def keep(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep what `snapshot` returns after a pass, if one is due.

        Raises LeaseLost when another driver has taken the run over.
        """
        self._sweep = snapshot
        self._put(number, snapshot)

    def keep_resampled(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep, after the fits, what `snapshot` returns of the resampling beside them.

        Raises LeaseLost as `keep` does.
        """

        def joined() -> Snapshot:
            fits = self.latest if self._sweep is None else self._sweep()
            assert fits is not None, "fits are kept, or have been, before they are resampled"
            more = snapshot()
            tensors = {_RESAMPLED + name: tensor for name, tensor in more.tensors.items()}
            return Snapshot(fits.tensors | tensors, fits.state | {_RESAMPLED: more.state})

        self._put(number, joined)

    def _put(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        self._run.check()
        if self._store.is_due:
            taken = snapshot()
            self._store.put(Checkpoint(number, taken.tensors, taken.state))


def _parted(
    tensors: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Snapshot, Snapshot | None]:
    """Return the snapshot of the fits, and that of what was resampled after them, if any."""
    fits, more = dict[str, Any](), dict[str, Any]()
    for name, tensor in tensors.items():
        part = more if name.startswith(_RESAMPLED) else fits
        part[name.removeprefix(_RESAMPLED)] = tensor
    of_fits = {key: value for key, value in state.items() if key != _RESAMPLED}
    resampled = Snapshot(more, dict(state[_RESAMPLED])) if _RESAMPLED in state else None
    return Snapshot(fits, of_fits), resampled
