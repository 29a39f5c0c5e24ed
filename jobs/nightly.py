"""Fit tonight's rows, follow last night's clusters, and publish the model if it is fit for it.

python jobs/nightly.py s3://lake/points --registry s3://models/points --night 2026-11-21 \\
    --partition ds --k 2..12

Exit status 0: published, or published before. 3: kept back, and the latest model stays.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

import early  # noqa: F401 - first: signals while the rest is loaded
import results
import torch
from ending import KEPT_BACK, run, said_how_to_resume
from fitting import Job, none_ranked
from options import Again, Parser, add_common, parse_k, parse_url
from results import Fitted, mixture_of, print_table, spell_best
from score import score_lake
from stopping import holding
from talking import quiet, say

from gmm_dist.errors import NoRows, SchemaError, TooFewRows, UserError
from gmm_dist.lake import nights
from gmm_dist.lake.filters import Where, parse
from gmm_dist.lake.plan import Missing, Plan, plan_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.quantiles import SMALLEST
from gmm_dist.nightly import gate
from gmm_dist.nightly.column_drift import ColumnDrift, column_drift, sample_size
from gmm_dist.nightly.drift import Densities, Drift, Numbered, compare_densities, drift
from gmm_dist.nightly.gate import Gate
from gmm_dist.nightly.lineage import DRIFT, GATE, LINEAGE, Lineage, Published, night_of
from gmm_dist.nightly.matching import Matching, match
from gmm_dist.nightly.registry import Registry
from gmm_dist.report import of_fit
from gmm_dist.runs import claim, commit, load
from gmm_dist.runs.claim import Run
from gmm_dist.runs.json_files import FORMAT_VERSION
from gmm_dist.runs.lease import Lease
from gmm_dist.scoring import files
from gmm_dist.scoring import run as score_runs
from gmm_dist.selection.coreset import Coreset, DrawCoreset
from gmm_dist.selection.ranking import CRITERIA, SweepResult
from gmm_dist.shards.protocol import Shards
from gmm_dist.shards.ray_shards import ScalingConfig, connected
from gmm_dist.storage import absolute, join
from gmm_dist.urls import redacted

logger = logging.getLogger("gmm_dist.nightly")


def nightly(argv: Sequence[str]) -> int:
    """Parse the command line and run the night; return the exit status."""
    options, again = _parse(argv), Again(__file__, argv)
    torch.set_num_threads(1)  # sums have the same bits whatever the machine's cores
    place = Registry(options.registry)
    checks = Gate(options.min_rows, options.max_drop, options.max_drift)
    place.latest()  # a damaged pointer is told of before hours of work, not after
    with ExitStack() as session:
        return _all_of(options, again, place, checks, session)


def _all_of(
    options: argparse.Namespace, again: Again, place: Registry, checks: Gate, session: ExitStack
) -> int:
    """Publish, point, score and prune, with one connection to Ray; return the exit status."""
    night = options.night
    with said_how_to_resume(again):
        if place.is_pruned(night):
            say(f"{options.output}: published and pruned, nothing is left to do")
            return 0
        if place.is_published(night):
            say(f"{options.output}: published before")
        elif not _publish(options, place, checks, session):
            return KEPT_BACK
        place.point_to(night)
        if place.is_pruned(night):
            say(f"{options.output}: published and pruned, nothing is left to do")
            return 0
    if options.scores is not None:
        with _telling_of("--scores"):
            _score(options, again)
    with said_how_to_resume(again):
        if options.keep_models:
            place.prune(options.keep_models, night=night)
        say(f"model of {night} in {options.output}; {_latest(place)}")
    return 0


def _publish(
    options: argparse.Namespace, place: Registry, checks: Gate, session: ExitStack
) -> bool:
    """Do the night's work, if nobody has done it; say whether the gate let it pass."""
    _look_at_nights(options)
    if options.scores is not None:
        _check_scores(options)
    with (
        _telling_of("--registry"),
        claim.claim(options.output, resume=options.resume) as run,
    ):
        if run.committed:
            return True
        if place.is_pruned(options.night):
            raise UserError(
                f"{options.output} was published and pruned while this run waited for it: nothing "
                "is left to do"
            )
        while True:
            place.await_earlier(options.night)
            before = place.newest_before(options.night)
            work = _Night(options, place, checks, before, session)
            if (reasons := work.run(run)) is not None:
                break
            logger.info("a night has been published in between: fitting anew from that")
            run.forget()
        if reasons:
            say(f"what there is of {options.night} is kept in {work.candidate(run)}")
            say(f"kept back {options.night}: {'; '.join(reasons)}; {_latest(place)}")
        return not reasons


@contextmanager
def _telling_of(option: str) -> Iterator[None]:
    """Name the option that says where a run's output is: this job has no --output."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for words in ("another --output", "an --output"):
            text = text.replace(words, words.replace("an --", "a --").replace("--output", option))
        raise UserError(text) from error


def _check_scores(options: argparse.Namespace) -> None:
    """Refuse before any fitting what the scoring would refuse after it."""
    try:
        with quiet():  # the plans of the fit and of the scoring tell the same
            plan = _plan(options, days=1, missing="mean", keep=options.keep)
    except (TooFewRows, SchemaError):
        return  # for the gate to tell
    output = absolute(join(options.scores, options.night))
    if score_runs.lies_inside(plan, output):
        raise UserError(
            f"{redacted(output)} lies inside the lake, whose rows would double: give --scores "
            f"outside {redacted(plan.url)}"
        )


def _score(options: argparse.Namespace, again: Again) -> None:
    """Score the rows of the night alone, whatever --days; what is scored already stays."""
    _look_at_nights(options)
    scoring = argparse.Namespace(
        **{**vars(options), "where": _rows_of(options, days=1).text},
        model=options.output,
        probabilities=False,
    )
    scoring.output, scoring.resume = join(options.scores, options.night), True
    try:
        score_lake(scoring, again)
    except UserError as error:
        if not _is_scored(scoring):
            raise
        logger.info("%s", error)
        say(f"{scoring.output}: scored before; the lake's files have changed since")


def _is_scored(scoring: argparse.Namespace) -> bool:
    """Say whether a run of these very options has committed its scores, of whatever files."""
    try:
        config = load.read_report(join(scoring.output, files.HOME), score_runs.REPORT)["config"]
    except UserError:
        return False
    return all(config.get(name) == getattr(scoring, name) for name in ("keep", "where", "outliers"))


def _latest(place: Registry) -> str:
    return f"the latest is {place.latest() or 'none'}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="nightly.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, output=False)
    _add_own(parser.add_argument_group("night"))
    parser.set_defaults(holdout=0.1)
    options = parser.parse_args(argv)
    if options.holdout == 0:
        parser.error("the gate compares two models on held-out rows: give a --holdout above 0")
    if options.days < 1 or options.keep_models < 0:
        parser.error("--days is 1 or more, --keep-models 0 or more")
    if options.scores is None and (options.keep or options.outliers is not None):
        parser.error("--keep and --outliers are for --scores: give that too, or leave them out")
    if options.outliers is not None and not SMALLEST <= options.outliers < 1:
        parser.error(
            f"--outliers is {options.outliers:g}: give a share from {SMALLEST:g} to below 1"
        )
    options.night = night_of(options.night)
    options.output = Registry(options.registry).model_url(options.night)
    options.own_where, options.partition_key = options.where, None
    if options.where is not None:
        parse(options.where)  # what is wrong with it comes before what is wrong with the lake
    return options


def _look_at_nights(options: argparse.Namespace) -> None:
    """Find out how the lake spells a night, and choose the rows by it."""
    if options.partition_key is None:
        with quiet("gmm_dist.lake.listing"):  # planning lists the same files
            options.partition_key = nights.find(options.data, options.partition)
        options.where = _rows_of(options, days=options.days).text


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
        help="once published, score the night's rows as score.py does, into URL/DATE",
    )
    group.add_argument(
        "--keep", nargs="+", default=[], metavar="COLUMN", help="columns to go along with --scores"
    )
    group.add_argument(
        "--outliers", type=float, metavar="Q", help="mark outliers in --scores, see score.py"
    )
    group.add_argument(
        "--keep-models",
        type=int,
        default=0,
        metavar="N",
        help="remove published models but the newest N (default: keep all)",
    )


def _rows_of(options: argparse.Namespace, *, days: int) -> Where:
    """Return the filter of the rows of so many days, beside the user's own."""
    last = date.fromisoformat(options.night)
    own = parse(options.own_where).clauses if options.own_where is not None else ()
    try:
        clauses = {*own, *options.partition_key.clauses(last - timedelta(days - 1), last)}
    except OverflowError as error:
        raise UserError(
            f"--days {days} up to --night {last}: no calendar has so many; give fewer days"
        ) from error
    return Where(tuple(sorted(clauses, key=lambda c: (c[0], c[1], repr(c[2])))))


def _plan(
    options: argparse.Namespace, *, days: int, missing: Missing, keep: Sequence[str] = ()
) -> Plan:
    """Plan the rows of so many days; say so where there are none yet."""
    try:
        return plan_lake(
            options.data,
            columns=options.columns,
            weight_column=options.weight_column,
            where=_rows_of(options, days=days).text,
            missing=missing,
            holdout=options.holdout,
            keep=keep,
        )
    except NoRows as error:
        also = f" that match --where {options.own_where!r}" if options.own_where else ""
        raise NoRows(
            f"no rows of {options.night} ({', '.join(options.partition_key.names)}){also} yet: run "
            "again when they have arrived"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Night:
    """One night's work, between the claim of its output and its commit."""

    options: argparse.Namespace
    place: Registry
    gate: Gate
    before: Published | None
    session: ExitStack

    def candidate(self, run: Run) -> str:
        """Where the run's results are if the gate keeps them back."""
        return self.place.candidate_url(self.options.night, run.attempt.id)

    @property
    def _night_before(self) -> str | None:
        return None if self.before is None else self.before.night

    def run(self, run: Run) -> list[str] | None:
        """Fit and commit; return why the model was kept back, nothing if it is published.

        None if nothing is committed, for another night has come between this and the one before.
        """
        began = time.monotonic()
        try:
            work = self._fit(run)
        except (TooFewRows, SchemaError) as error:
            if self.before is None and isinstance(error, SchemaError):
                raise  # nothing to differ from: the command line or the lake is wrong
            self._keep_back(run, [str(error)])
            return [str(error)]
        warnings = [*work.warnings, *self._warnings(work.columns)]
        more = {"warnings": warnings, "seconds": time.monotonic() - began}
        self.place.await_earlier(self.options.night)
        if self.place.came_between(self._night_before, self.options.night):
            return None
        if work.reasons:
            self._keep_back(run, work.reasons, work, more)
            print_table(work.fitted.result, warnings)
            return work.reasons
        with self.place.turn() as turn:
            if self.place.came_between(self._night_before, self.options.night):
                return None
            lineage = self._publish(run, work, more, turn)
        # Results are committed before anybody is told: the reader may have gone.
        print_table(work.fitted.result, warnings)
        say(f"best by {work.best}; {_spell(lineage)}")
        return []

    def _fit(self, run: Run) -> _Work:
        plan, reasons = self._plan()
        warm = None if self.before is None or reasons else self.before.mixture
        if warm is not None and self.before is not None:
            logger.info("warm start from %s, %s", self.before.night, _shape(warm, self.options))
        job = Job.of(self.options, plan, warm=warm)
        seen: list[tuple[Densities, Coreset]] = []

        def look(shards: Shards, result: SweepResult) -> None:
            if job.warm and result.best is not None:
                tonight = result.best.fit.parameters
                size, seed = sample_size(job.warm[0]), self.options.random_state
                rows = shards.run(DrawCoreset.of(result.total, size, seed))
                seen.append((compare_densities(shards, job.warm[0], tonight), rows))

        if self.options.scores is not None:  # whose scoring is to find Ray as the fit leaves it
            scaling = ScalingConfig(self.options.num_workers, self.options.use_gpu)
            scaling = scaling.at_most(max(plan.n_shards, len(plan.files)))
            self.session.enter_context(connected(self.options.address, scaling))
        fitted = job.fit(run, look)
        densities, columns = None, None
        if seen and self.before is not None:
            densities, rows = seen[0]
            columns = _columns_against(self.before, mixture_of(fitted, job.loader), job, rows)
        reasons += self._reasons(job, fitted, densities, columns)
        return _Work(job, fitted, densities, columns, reasons)

    def _plan(self) -> tuple[Plan, list[str]]:
        """Plan the rows, their columns in last night's order; say how they differ from them."""
        plan = self._rows()
        if self.before is None:
            return plan, []
        columns = self.before.lineage.columns
        reasons = gate.on_columns(gate.kinds(plan.schema, plan.columns), columns)
        if not reasons and plan.columns != tuple(columns):
            self.options.columns = list(columns)
            with quiet():
                plan = self._rows()
        return plan, reasons

    def _rows(self) -> Plan:
        return _plan(self.options, days=self.options.days, missing=self.options.missing)

    def _warnings(self, columns: ColumnDrift | None) -> list[str]:
        if columns is None:
            return []
        warnings = self.gate.warnings_of_drift(
            columns.drift,
            columns.change,
            divergence=columns.divergence,
            strangers=columns.strangers,
        )
        for warning in warnings:
            logger.warning("%s: %s", self.options.night, warning)
        return warnings

    def _reasons(
        self,
        job: Job,
        fitted: Fitted,
        densities: Densities | None,
        columns: ColumnDrift | None,
    ) -> list[str]:
        before = None if self.before is None else self.before.lineage.n_rows
        reasons = self.gate.on_rows(fitted.n_rows, before)
        if fitted.result.best is None:
            return [*reasons, none_ranked(len(job.candidates))]
        if densities is not None:
            held_out = densities.held_out_tonight, densities.held_out_before
            reasons += self.gate.on_likelihood(*held_out)
        if columns is not None:
            reasons += self.gate.on_drift(
                columns.drift, columns.change, strangers=columns.strangers
            )
        return reasons

    def _publish(self, run: Run, work: _Work, more: dict[str, Any], turn: Lease) -> Lineage:
        mixture, reference = work.mixture, self._reference(work)
        known = () if reference is None else reference.lineage.ids
        matching = _match(reference, mixture)
        first = self.place.new_ids(len(matching.born), above=known)
        lineage = Lineage(
            night=self.options.night,
            night_before=self._night_before,
            ids=(ids := matching.ids(known, first)),
            born=tuple(ids[i] for i in matching.born),
            dead=() if self.before is None else tuple(known[i] for i in matching.dead),
            n_rows=work.fitted.n_rows,
            columns=gate.kinds(work.job.plan.schema, work.job.plan.columns),
        )
        changes = self._drift(work, matching, ids)
        self._write(run.attempt, [], work, more, changes, ids, ids)
        run.attempt.write_json(LINEAGE, lineage.to_json())
        logger.info("committing")
        turn.check()
        with holding():
            run.attempt.commit()
        self.place.point_to(self.options.night)
        return lineage

    def _keep_back(
        self,
        run: Run,
        reasons: list[str],
        work: _Work | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Commit what there is beside the published models, in place of an earlier try's."""
        run.check()
        with commit.claim(self.candidate(run)) as attempt:
            changes, numbers = None, None
            if work is not None and work.densities is not None and self.before is not None:
                matching = _match(self.before, work.mixture)
                known = {j: self.before.lineage.ids[i] for i, j in matching.pairs}
                numbers = tuple(known.get(j) for j in range(work.mixture.n_components))
                changes = self._drift(work, matching, numbers)
            self._write(attempt, reasons, work, more or {}, changes, numbers)
            attempt.commit()
        run.check()  # drawing the report takes time: whoever has taken over keeps theirs
        self.place.forget_candidates(self.options.night, but=run.attempt.id)
        run.forget()

    def _write(
        self,
        attempt: commit.Attempt,
        reasons: list[str],
        work: _Work | None,
        more: dict[str, Any],
        changes: Drift | None,
        numbers: Sequence[int | None] | None = None,
        ids: tuple[int, ...] | None = None,
    ) -> None:
        verdict = {
            "night": self.options.night,
            "night_before": self._night_before,
            "published": not reasons,
            "reasons": reasons,
            "where": self.options.where,
            "n_rows": work and work.fitted.n_rows,
            "column_drift": work and work.columns and asdict(work.columns),
            "warnings": (more or {}).get("warnings", []),
            **asdict(self.gate),
        }
        attempt.write_json(GATE, {"format_version": FORMAT_VERSION, **verdict})
        told = {**verdict, "drift": None}
        if changes is not None:
            told["drift"] = asdict(changes)
            attempt.write_json(DRIFT, {"format_version": FORMAT_VERSION, **told["drift"]})
        if work is None:
            of_fit.write(attempt, None, nightly=told)
            return
        loader, settings = work.job.loader, work.job.settings
        results.write(
            attempt, work.fitted, loader, settings, more, ids=ids, numbers=numbers, nightly=told
        )

    def _reference(self, work: _Work) -> Published | None:
        """Return the night that the components take their numbers from.

        It is the night before. One that has none, but comes late, has the night after it.
        """
        if self.before is not None:
            return self.before
        after = self.place.oldest_after(self.options.night)
        names = work.job.plan.feature_names
        return after if after is not None and after.mixture.feature_names == names else None

    def _drift(self, work: _Work, matching: Matching, ids: Sequence[int | None]) -> Drift | None:
        if self.before is None or work.densities is None:
            return None
        old, mixture = self.before, work.mixture
        return drift(
            Numbered(old.night, old.mixture.parameters, old.lineage.ids),
            Numbered(self.options.night, mixture.parameters, tuple(ids)),
            matching,
            work.densities,
            mixture.feature_names,
            work.columns,
        )


def _match(reference: Published | None, mixture: Mixture) -> Matching:
    if reference is None:
        return Matching((), tuple(range(mixture.n_components)), ())
    return match(reference.mixture.parameters, mixture.parameters)


def _columns_against(before: Published, tonight: Mixture, job: Job, rows: Coreset) -> ColumnDrift:
    """Tell whether whole columns have changed, by rows of tonight about their centre."""
    X = rows.X + torch.from_numpy(job.loader.centre)
    parameters = before.mixture.parameters, tonight.parameters
    return column_drift(*parameters, X, rows.sample_weight, tonight.feature_names)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What a night's fit left: `reasons` to keep it back."""

    job: Job
    fitted: Fitted
    densities: Densities | None
    columns: ColumnDrift | None
    reasons: list[str]

    @property
    def mixture(self) -> Mixture:
        return mixture_of(self.fitted, self.job.loader)

    @property
    def best(self) -> str:
        best, criterion = self.fitted.result.best, self.fitted.result.criterion
        assert best is not None
        return spell_best(best, criterion)

    @property
    def warnings(self) -> list[str]:
        names = self.job.plan.feature_names
        found = self.fitted.result.warnings(names, lambda k: f"give --k {k} from the next night on")
        return [*self.fitted.incomplete, *found]


def _shape(warm: Mixture, options: argparse.Namespace) -> str:
    k, kind = warm.n_components, warm.covariance_type
    if k in options.k and kind in options.covariance_type:
        return f"k={k} {kind}"
    return f"k={k} {kind}, which --k and --covariance-type do not ask for: it takes no part"


def _spell(lineage: Lineage) -> str:
    """Say in a line who was born and who died."""
    if lineage.night_before is None:
        return f"the first night, components {_listed(lineage.ids)}"
    kept = f"against {lineage.night_before}: {len(lineage.ids) - len(lineage.born)} stay"
    return f"{kept}, born {_listed(lineage.born)}, dead {_listed(lineage.dead)}"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def main(argv: Sequence[str] | None = None) -> int:
    return run(nightly, argv)


if __name__ == "__main__":
    sys.exit(main())
