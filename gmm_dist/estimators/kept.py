"""An estimator's fit to a lake, kept in an output: resumed after a kill, and done only once.

OUT/_checkpoints/          while it runs
OUT/model/                 the mixture that was learned, as `gmm_dist.save` writes it
OUT/learned.safetensors    the attributes that were learned, of a posterior all of them: arrays,
OUT/learned.json           and all else
OUT/run.json               the rows and settings that they belong to
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from gmm_dist.em.lane import Lane, Snapshot, take_snapshot
from gmm_dist.em.loop import Watch
from gmm_dist.errors import UserError
from gmm_dist.estimators.save import provenance_of, settings_of
from gmm_dist.estimators.settings import seed_of
from gmm_dist.fitting.checkpoints import FitCheckpoints
from gmm_dist.lake.lake import Lake
from gmm_dist.lake.plan import Plan
from gmm_dist.lake.tables.snapshot import stay_at
from gmm_dist.runs.checkpoint import RunIdentity, begun_with, environment, snapshot_in
from gmm_dist.runs.claim import claim
from gmm_dist.runs.commit import OTHER_OUTPUT, Result
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import FORMAT_VERSION, require_readable, whole
from gmm_dist.storage import explained
from gmm_dist.urls import Url

if TYPE_CHECKING:
    from gmm_dist.estimators.base import BaseMixture

_ARRAYS, _LEARNED, _RUN = "learned.safetensors", "learned.json", "run.json"
# Of the estimators' parameters, those that no bit depends on.
_IDLE = {"verbose", "verbose_interval", "device", "n_shards", "random_state"}


@dataclass(slots=True, eq=False, kw_only=True)
class KeptFit:
    """How a fit is kept; without `checkpoints` it is not.

    `seed` is what starts are drawn from; a fit that goes on keeps it. `is_finished` says that an
    earlier fit has committed: the estimator has learned what that one had, and need not be fitted.
    """

    seed: int
    checkpoints: FitCheckpoints | None = None
    is_finished: bool = False
    number: int = 0

    @property
    def latest(self) -> Snapshot | None:
        """Where the fit goes on from; None for its start."""
        return None if self.checkpoints is None else self.checkpoints.latest

    def keep(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep a snapshot after pass `number`, if one is due."""
        if self.checkpoints is not None:
            self.checkpoints.keep(number, lambda: _with(snapshot(), seed=self.seed))

    def watch(self, **state: bool) -> Watch:
        """Return what keeps the lanes after each pass, and `state` with them."""

        def after_pass(lanes: Sequence[Lane]) -> None:
            self.number += 1
            self.keep(self.number, lambda: _with(take_snapshot(lanes), **state))

        return after_pass


def _with(snapshot: Snapshot, **state: Any) -> Snapshot:
    return replace(snapshot, state=snapshot.state | state)


@contextmanager
def kept_fit(
    estimator: BaseMixture, plan: Plan, url: Url | None, *, resume: bool
) -> Iterator[KeptFit]:
    """Claim the output `url`, if any, for the fit of the block, and commit what was learned.

    Raises UserError as `claim` does, and where the output keeps a fit of other rows or settings.
    """
    if url is None:
        yield KeptFit(seed=seed_of(estimator.random_state))
        return
    identity = _identity(estimator, plan)
    with claim(url, resume=resume) as run:
        if run.committed:
            _learn_again(estimator, url, identity)
            yield KeptFit(seed=0, is_finished=True)
            return
        checkpoints = FitCheckpoints(run, identity, resume=resume)
        latest = checkpoints.latest
        seed = seed_of(estimator.random_state) if latest is None else int(latest.state["seed"])
        yield KeptFit(seed=seed, checkpoints=checkpoints, number=checkpoints.number)
        provenance = replace(
            provenance_of(estimator),
            plan_hash=plan.hash,
            snapshot=plan.snapshot_content,
        )
        run.attempt.write_model(estimator.to_mixture(), provenance)
        for name, data in _files(estimator).items():
            run.attempt.write(name, data)
        run.attempt.write(_RUN, identity.canonical)
        run.attempt.commit()


def stay(lake: Lake, url: Url | None, *, resume: bool) -> Lake:
    """Return the lake of a fit that goes on: a table at the version that the fit has begun with."""
    if url is None or not resume:
        return lake
    folder = Folder.of(url)
    with explained(folder.url):
        result = Result.find(folder)
        kept = result is not None and _RUN in result.files
        saved = snapshot_in(result.read(_RUN)) if result and kept else begun_with(folder)
    return replace(lake, at=stay_at(lake.at, saved))


def _identity(estimator: BaseMixture, plan: Plan) -> RunIdentity:
    """Return all that decides what is learned: the rows, the settings and where it starts."""
    settings = {k: v for k, v in settings_of(estimator).items() if k not in _IDLE}
    # The seed that anything else draws is kept with the checkpoints.
    is_seed = isinstance(estimator.random_state, Integral)
    settings["random_state"] = seed_of(estimator.random_state) if is_seed else None
    if estimator.warm_start and hasattr(estimator, "converged_"):
        files = _files(estimator)
        settings["start"] = hashlib.sha256(files[_LEARNED] + files[_ARRAYS]).hexdigest()
    rows = {
        "columns": plan.columns,
        "weight_column": plan.weight_column,
        "where": plan.where.text if plan.where else None,
        "missing": plan.missing,
        "holdout": plan.holdout,
    }
    return RunIdentity(
        plan_hash=plan.hash,
        files=plan.versions,
        settings={**rows, **settings},
        environment=environment(),
        snapshot=plan.snapshot_content,
    )


def _learn_again(estimator: BaseMixture, url: Url, identity: RunIdentity) -> None:
    """Set an estimator's learned attributes to those that are kept."""
    folder = Folder.of(url)
    with explained(folder.url):
        result = Result.at(folder)
        saved, text, data = (result.read(name) for name in (_RUN, _LEARNED, _ARRAYS))
    if (key := hashlib.sha256(saved).hexdigest()) != identity.key:
        raise UserError(
            f"{folder.url} keeps another fit: {identity.difference(saved, key)}",
            remedy="give back what it was, or " + OTHER_OUTPUT,
        )
    with whole(_LEARNED, folder.url):
        content = json.loads(text)
        require_readable(content["format_version"], _LEARNED, folder.url)
        arrays = safetensors.numpy.load(data)
        learned = {name: _value(part, arrays) for name, part in content["learned"].items()}
    for name in _learned(estimator):
        delattr(estimator, name)
    for name, value in learned.items():
        setattr(estimator, name, value)


def _learned(estimator: BaseMixture) -> dict[str, Any]:
    names = [name for name in vars(estimator) if name.endswith("_") and not name.startswith("_")]
    names += [name for name in ("_n_samples", "_log_likelihood") if hasattr(estimator, name)]
    return {name: getattr(estimator, name) for name in sorted(names)}


def _files(estimator: BaseMixture) -> dict[str, bytes]:
    """Return the learned attributes as files."""
    arrays: dict[str, Any] = {}
    learned = {name: _plain(value, name, arrays) for name, value in _learned(estimator).items()}
    content = {"format_version": FORMAT_VERSION, "learned": learned}
    return {_ARRAYS: safetensors.numpy.save(arrays), _LEARNED: json.dumps(content).encode()}


def _plain(value: Any, name: str, arrays: dict[str, Any]) -> Any:
    """Return an attribute as JSON has it; its arrays are put among `arrays`, by their names."""
    if isinstance(value, tuple):
        return {"tuple": [_plain(part, f"{name}.{i}", arrays) for i, part in enumerate(value)]}
    if isinstance(value, np.ndarray) and value.dtype == object:  # names of features
        return {"names": value.tolist()}
    if isinstance(value, np.ndarray | np.generic):
        arrays[name] = np.array(value, order="C")
        return {"array": name}
    return value


def _value(plain: Any, arrays: Mapping[str, Any]) -> Any:
    """Return what `_plain` was given."""
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tuple":
        return tuple(_value(part, arrays) for part in content)
    return np.array(content, dtype=object) if kind == "names" else arrays[content][()]
