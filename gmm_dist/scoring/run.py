"""A run that scores a lake: claimed once, resumed by the same run alone, committed whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from gmm_dist.errors import Option, RunFailed, UserError
from gmm_dist.lake.plan import Plan
from gmm_dist.runs import claim as runs
from gmm_dist.runs.checkpoint import CHECKPOINTS, RunIdentity, snapshot_in
from gmm_dist.runs.claim import Run
from gmm_dist.runs.commit import ATTEMPTS, OTHER_OUTPUT, RESUME_OR_OTHER, Result, refuse_taken
from gmm_dist.runs.folder import Folder, lies_within, sync
from gmm_dist.runs.json_files import FORMAT_VERSION
from gmm_dist.runs.lease import LeaseLost
from gmm_dist.scoring.delta import LOG, DeltaScores
from gmm_dist.scoring.files import SCRATCH, Scored
from gmm_dist.scoring.target import Target
from gmm_dist.storage import explained, redacted

REPORT = "scored.json"
_RUN = "run.json"
_REMEDY = "give back what it was, or " + OTHER_OUTPUT


@contextmanager
def claim(
    target: Target, plan: Plan, identity: RunIdentity, *, resume: bool = False
) -> Iterator[Run]:
    """Claim an output for a run of scoring, before any work is done.

    If a run of this identity has committed, `Run.committed` is true, with or without `resume`.
    Leaving the block without a commit keeps the files that are finished, and their records.

    Raises:
        UserError: the output lies within the lake, or holds other files, the scores of another
            run, or without `resume` those of an unfinished one; another driver is at work.
    """
    folder = target.folder
    if lies_inside(plan, target.url):
        raise UserError(
            f"{folder.url} lies inside {what_is_spoilt(plan)}",
            remedy="give " + Option("output") + f" outside {redacted(plan.url)}",
        )
    with explained(folder.url):
        committed = _refuse_other(target, identity, resume)
    with runs.claim(target.home_url, resume=resume or committed) as run:
        with explained(folder.url):
            _refuse_other(target, identity, resume)  # who may have been at work while we waited
            if not run.committed:
                target.home.write(identity.canonical, CHECKPOINTS, _RUN, durable=True)
        try:
            yield run
        except LeaseLost:
            raise
        except BaseException:
            if not run.committed:
                _forget_unbegun(target, run)
            raise


def _forget_unbegun(target: Target, run: Run) -> None:
    """Remove the identity of a run that has written no file, if this driver still holds it."""
    with suppress(OSError, UserError, RunFailed):  # never in place of the error that ended the run
        run.check()
        if not target.records.names():
            target.home.remove(CHECKPOINTS)


def begun_with(
    target: Target, settings: Mapping[str, Any], *, is_table: bool
) -> Mapping[str, Any] | None:
    """Return the version of a table that a run of such settings has begun with, None for none.

    Of the unfinished runs that write to a Delta table, several at a time maybe, the last version.
    """
    with explained(target.folder.url):
        if not is_table:
            return snapshot_in(_saved(target.home)[0])
        wanted = json.loads(json.dumps(settings))
        snapshots = []
        for run in target.runs():
            saved, result = _saved(run.home)
            snapshot = snapshot_in(saved)
            if snapshot is not None and result is None and _settings_in(saved) == wanted:
                snapshots.append(snapshot)
        return max(snapshots, key=lambda snapshot: snapshot["version"], default=None)


def _settings_in(saved: bytes | None) -> object:
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return json.loads(saved or b"{}")["settings"]
    return None


def _saved(home: Folder) -> tuple[bytes | None, Result | None]:
    """Return the identity of the run that an output belongs to, and what it has committed."""
    result = Result.find(home)
    return home.read(CHECKPOINTS, _RUN) if result is None else result.read(_RUN), result


def what_is_spoilt(plan: Plan) -> str:
    """Say what scores must not lie in, and why."""
    if plan.snapshot is None:
        return "the lake, whose rows would double"
    return "the table, whose VACUUM would remove the scores"


def lies_inside(plan: Plan, url: str) -> bool:
    """Say whether an output lies within the lake, which would read it as more rows."""
    within = (file for file in plan.files if file.entry is None or not file.entry.is_outside)
    folders = {str(above) for file in within for above in PurePosixPath(file.path).parents}
    return lies_within(url, plan.url, parts=sorted(folders))


def _refuse_other(target: Target, identity: RunIdentity, resume: bool) -> bool:
    """Say whether this very run has committed; refuse an output that holds anything else."""
    folder = target.folder
    saved, result = _saved(target.home)
    if saved is None:
        others = target.others(folder.names())
        if target.run is None or LOG not in others:
            refuse_taken(folder, others)
        return False
    key = hashlib.sha256(saved).hexdigest()
    if key != identity.key:
        what = "an unfinished run" if result is None else "another run"
        difference = identity.difference(saved, key)
        message = f"{folder.url} holds the scores of {what}: {difference}"
        raise UserError(message, remedy=_REMEDY)
    if result is None and not resume:
        raise UserError(
            f"{folder.url} holds the scores of an unfinished run", remedy=RESUME_OR_OTHER
        )
    return result is not None


def commit(
    target: Target,
    run: Run,
    identity: RunIdentity,
    scored: Scored,
    more: Mapping[str, Any],
    table: DeltaScores | None = None,
) -> None:
    """Commit the files that were scored, if all are in their place.

    Args:
        target: The output.
        run: The claimed run.
        identity: What decides the files' bytes.
        scored: The files, each with its size, hash and rows.
        more: What else scored.json says.
        table: The Delta table that they belong to, if any.

    Raises:
        UserError: a file is not where it was written.
        LeaseLost: another driver has taken the run over.
    """
    folder = target.folder
    with explained(folder.url):
        _require_files(folder, scored)
        target.home.remove(ATTEMPTS, run.attempt.id, SCRATCH)
    if table is not None:
        run.check()
        table.commit({path: (file.size, file.counts.rows) for path, file in scored.files.items()})
    files = {path: file.entry for path, file in sorted(scored.files.items())}
    report = {"format_version": FORMAT_VERSION, **asdict(scored.counts), **more, "files": files}
    run.attempt.write(_RUN, identity.canonical)
    run.attempt.write_json(REPORT, report)
    run.attempt.commit()


def _require_files(folder: Folder, scored: Scored) -> None:
    sizes = folder.sizes()
    for path, file in scored.files.items():
        if sizes.get(path) != file.size:
            raise UserError(
                f"{folder.at(path)} has {sizes.get(path, 'no')} bytes where a worker wrote "
                f"{file.size}",
                remedy=OTHER_OUTPUT + ", one that all machines share, such as on S3",
            )
    if folder.is_local:
        for parent in {Path(folder.at(path)).parent for path in scored.files}:
            sync(parent)
