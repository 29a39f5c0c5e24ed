"""A run that scores a lake: claimed once, resumed by the same run alone, committed whole."""

from __future__ import annotations

import hashlib
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
from gmm_dist.scoring.files import HOME, SCRATCH, Scored, home_of
from gmm_dist.storage import absolute, explained, join, redacted

REPORT = "scored.json"
_RUN = "run.json"
_REMEDY = "give back what it was, or " + OTHER_OUTPUT


@contextmanager
def claim(url: str, plan: Plan, identity: RunIdentity, *, resume: bool = False) -> Iterator[Run]:
    """Claim the output `url` for a run of scoring, before any work is done.

    If a run of this identity has committed, `Run.committed` is true, with or without `resume`.
    Leaving the block without a commit keeps the files that are finished, and their records.

    Raises:
        UserError: the output lies within the lake, or holds other files, the scores of another
            run, or without `resume` those of an unfinished one; another driver is at work.
    """
    folder = Folder.of(url)
    if lies_inside(plan, url):
        raise UserError(
            f"{folder.url} lies inside {what_is_spoilt(plan)}",
            remedy="give " + Option("output") + f" outside {redacted(plan.url)}",
        )
    with explained(folder.url):
        committed = _refuse_other(folder, identity, resume)
    with runs.claim(join(absolute(url), HOME), resume=resume or committed) as run:
        with explained(folder.url):
            _refuse_other(folder, identity, resume)  # who may have been at work while we waited
            if not run.committed:
                home_of(folder).write(identity.canonical, CHECKPOINTS, _RUN, durable=True)
        try:
            yield run
        except LeaseLost:
            raise
        except BaseException:
            if not run.committed:
                _forget_unbegun(folder, run)
            raise


def _forget_unbegun(folder: Folder, run: Run) -> None:
    """Remove the identity of a run that has written no file, if this driver still holds it."""
    with suppress(OSError, UserError, RunFailed):  # never in place of the error that ended the run
        run.check()
        if folder.names() <= {HOME}:
            home_of(folder).remove(CHECKPOINTS)


def begun_with(url: str) -> Mapping[str, Any] | None:
    """Return the version of a table that the scores at `url` are of, None for none, or no table."""
    folder = Folder.of(url)
    with explained(folder.url):
        return snapshot_in(_saved(home_of(folder))[0])


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


def _refuse_other(folder: Folder, identity: RunIdentity, resume: bool) -> bool:
    """Say whether this very run has committed; refuse an output that holds anything else."""
    saved, result = _saved(home_of(folder))
    if saved is None:
        refuse_taken(folder, folder.names() - {HOME})
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
    url: str, run: Run, identity: RunIdentity, scored: Scored, more: Mapping[str, Any]
) -> None:
    """Commit the files that were scored, if all are in their place.

    Args:
        url: The output.
        run: The claimed run.
        identity: What decides the files' bytes.
        scored: The files, each with its size, hash and rows.
        more: What else scored.json says.

    Raises:
        UserError: a file is not where it was written.
        LeaseLost: another driver has taken the run over.
    """
    folder = Folder.of(url)
    with explained(folder.url):
        _require_files(folder, scored)
        home_of(folder).remove(ATTEMPTS, run.attempt.id, SCRATCH)
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
