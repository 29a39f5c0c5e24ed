"""Fit tonight's rows, follow last night's clusters, and publish the model if it is fit for it.

gmm-dist nightly s3://lake/points --registry s3://models/points --night 2026-11-21 \\
    --partition ds --k 2..12

Exit status 0: published, or published before. 3: kept back, and the latest model stays.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields

from gmm_dist.commands.ending import KEPT_BACK, note, run, said_how_to_resume
from gmm_dist.commands.night import Night
from gmm_dist.commands.night_options import NightlyOptions, NightRows
from gmm_dist.commands.options import (
    CommandLine,
    Parser,
    add_clusters,
    add_common,
    options_of,
    parse_k,
    parse_url,
    program,
)
from gmm_dist.commands.score import score_and_tell
from gmm_dist.commands.talking import quiet, say
from gmm_dist.errors import SchemaError, TooFewRows, UserError, renaming
from gmm_dist.nightly.gate import Gate
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import claim, load
from gmm_dist.runs.checkpoint import begun_with
from gmm_dist.runs.folder import Folder
from gmm_dist.scoring import run as score_runs
from gmm_dist.scoring.options import ScoreOptions
from gmm_dist.scoring.target import HOME
from gmm_dist.selection.ranking import CRITERIA
from gmm_dist.shards.local import one_thread
from gmm_dist.storage import absolute, join
from gmm_dist.urls import redacted

logger = logging.getLogger(__name__)


def nightly(argv: Sequence[str]) -> int:
    """Parse the command line and run the night; return the exit status."""
    options, command_line = _parse(argv), CommandLine(program("nightly"), argv)
    return run_night(options, command_line)


def run_night(options: NightlyOptions, command_line: CommandLine) -> int:
    """Fit, gate, publish, score and prune a night; return the exit status."""
    note(night=options.night, registry=options.registry)
    registry = Registry(options.registry)
    rows = NightRows(options)
    # Sums have the same bits whatever the cores of this machine, whose setting is not ours.
    with one_thread(), renaming(output="registry"), ExitStack() as session:
        registry.latest()  # a damaged pointer is reported before hours of work, not after
        return _all_of(options, rows, command_line, registry, session)


def _all_of(
    options: NightlyOptions,
    rows: NightRows,
    command_line: CommandLine,
    registry: Registry,
    session: ExitStack,
) -> int:
    """Publish, point, score and prune, with one connection to Ray; return the exit status."""
    night = options.night
    with said_how_to_resume(command_line):
        if registry.is_pruned(night):
            say(f"{options.output}: published and pruned, nothing is left to do")
            return 0
        if registry.is_published(night):
            say(f"{options.output}: published before")
        elif not _publish(options, rows, registry, session):
            note(published=False)
            return KEPT_BACK
        note(published=True)
        registry.point_to(night)
        if registry.is_pruned(night):
            say(f"{options.output}: published and pruned, nothing is left to do")
            return 0
    if options.scores is not None:
        with renaming(output="scores"):
            _score(options, rows, command_line)
    with said_how_to_resume(command_line):
        if options.keep_models:
            registry.prune(options.keep_models, night=night)
        note(model=f"{options.output}/model", latest=registry.latest())
        say(f"model of {night} in {options.output}; {_latest(registry)}")
    return 0


def _publish(
    options: NightlyOptions,
    rows: NightRows,
    registry: Registry,
    session: ExitStack,
) -> bool:
    """Do the night's work, if nobody has done it; say whether the gate let it pass."""
    if options.resume:
        rows.pin(begun_with(Folder.of(options.output)))
    rows.where(days=options.days)  # errors in the nights' key come before any claim
    if options.scores is not None:
        _check_scores(options, rows)
    with claim.claim(options.output, resume=options.resume) as run:
        if run.committed:
            return True
        rows.pin(run.begun_with())  # another driver may have begun while we waited
        if registry.is_pruned(options.night):
            raise UserError(
                f"{options.output} was published and pruned while this run waited for it: nothing "
                "is left to do"
            )
        while True:
            registry.await_earlier(options.night)
            before = registry.newest_before(options.night)
            work = Night(
                options=options, rows=rows, registry=registry, before=before, session=session
            )
            if (reasons := work.run(run)) is not None:
                break
            logger.info("a night has been published in between: fitting anew from that")
            run.forget()
        if reasons:
            say(f"what there is of {options.night} is kept in {work.candidate(run)}")
            note(reasons=reasons)
            say(f"kept back {options.night}: {'; '.join(reasons)}; {_latest(registry)}")
        return not reasons


def _check_scores(options: NightlyOptions, rows: NightRows) -> None:
    """Refuse before any fitting what the scoring would refuse after it."""
    assert options.scores is not None
    try:
        with quiet():  # the plans of the fit and of the scoring log the same
            plan = rows.plan(days=1, missing="mean", columns=options.columns, keep=options.keep)
    except (TooFewRows, SchemaError):
        return  # the gate reports it
    output = absolute(join(options.scores, options.night))
    if score_runs.lies_inside(plan, output):
        raise UserError(
            f"{redacted(output)} lies inside {score_runs.what_is_spoilt(plan)}: give --scores "
            f"outside {redacted(plan.url)}"
        )


def _score(options: NightlyOptions, rows: NightRows, command_line: CommandLine) -> None:
    """Score the rows of the night alone, whatever --days; what is scored already stays."""
    assert options.scores is not None
    rows.pin(load.read_report(options.output).get("snapshot"))
    shared = {f.name for f in fields(ScoreOptions)} & {f.name for f in fields(NightlyOptions)}
    scoring = ScoreOptions(
        **{name: getattr(options, name) for name in shared}
        | {
            "model": options.output,
            "output": join(options.scores, options.night),
            "where": rows.where(days=1).text,
            "at": rows.at,
            "resume": True,
        }
    )
    try:
        score_and_tell(scoring, command_line)
    except UserError as error:
        if not _is_scored(scoring):
            raise
        logger.info("%s", error)
        say(f"{scoring.output}: scored before; the lake's files have changed since")


def _is_scored(scoring: ScoreOptions) -> bool:
    """Say whether a run of these very options has committed its scores, of whatever files."""
    try:
        config = load.read_report(join(scoring.output, HOME), score_runs.REPORT)["config"]
    except UserError:
        return False
    requested_settings = {
        "keep": list(scoring.keep),
        "where": scoring.where,
        "outliers": scoring.outliers,
    }
    return all(config.get(name) == value for name, value in requested_settings.items())


def _latest(registry: Registry) -> str:
    return f"the latest is {registry.latest() or 'none'}"


def _parse(argv: Sequence[str]) -> NightlyOptions:
    parser = Parser(
        prog="gmm-dist nightly",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, output=False)
    add_clusters(parser)
    _add_own(parser.add_argument_group("night"))
    parser.set_defaults(holdout=0.1)
    return options_of(NightlyOptions, parser.parse_args(argv))


def _add_own(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--k", required=True, type=parse_k, help="8, 4,8,16 or 2..20 (inclusive)")
    group.add_argument(
        "--criterion", choices=CRITERIA, default="bic", help="what ranks the fits (default: bic)"
    )
    group.add_argument(
        "--registry",
        required=True,
        type=parse_url,
        metavar="REG",
        help="folder or URL of the nights' models",
    )
    group.add_argument("--night", required=True, metavar="DATE", help="e.g. 2026-11-21")
    group.add_argument(
        "--partition",
        required=True,
        nargs="+",
        metavar="COLUMN",
        help="hive key or column that tells the night (2026-11-21, 20261121, a date or timestamp), "
        "or the three of year, month and day",
    )
    group.add_argument(
        "--days", type=int, default=1, help="fit so many days up to the night (default: 1)"
    )
    group.add_argument(
        "--min-rows",
        type=int,
        metavar="ROWS",
        help="publish nothing fitted to fewer (default: 1,000, and a tenth of last night's)",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        default=Gate().max_drop,
        metavar="NATS",
        help="publish nothing that scores held-out rows so much worse than last night's model, "
        "in nats per row (default: %(default)s)",
    )
    group.add_argument(
        "--max-drift",
        type=float,
        default=Gate().max_drift,
        metavar="NATS",
        help="publish nothing whose columns have changed as a whole by more since last night, as a "
        "change of units does, in nats per row; inf accepts any (default: %(default)s)",
    )
    group.add_argument(
        "--scores",
        type=parse_url,
        metavar="URL",
        help="once published, score the night's rows as gmm-dist score does, into URL/DATE",
    )
    group.add_argument(
        "--keep", nargs="+", default=[], metavar="COLUMN", help="columns to go along with --scores"
    )
    group.add_argument(
        "--outliers", type=float, metavar="Q", help="mark outliers, as gmm-dist score does"
    )
    group.add_argument(
        "--keep-models",
        type=int,
        default=0,
        metavar="N",
        help="remove published models but the newest N (default: keep all)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status."""
    return run(nightly, argv)
