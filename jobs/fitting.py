"""What the fitting jobs assemble: lake, cluster, sweep, artifacts."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import results
import torch
from ending import said_how_to_resume
from options import Again
from progress import Progress
from results import Fitted, print_table, spell_best
from stopping import finish
from talking import say, screen

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.evaluate import training_quantiles
from gmm_dist.em.lane import Snapshot
from gmm_dist.errors import UserError
from gmm_dist.fitting.lake_sweep import require_means, start_workers
from gmm_dist.formats import counted
from gmm_dist.lake.load import Counted, LakeLoader, loader_for
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.session import load_rows
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.report import of_fit
from gmm_dist.runs import claim, load
from gmm_dist.runs.checkpoint import Checkpoint, RunIdentity, environment
from gmm_dist.runs.claim import Run
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import Keep, Watch, sweep
from gmm_dist.shards.failures import FaultConfig
from gmm_dist.shards.protocol import Shards
from gmm_dist.shards.ray_shards import ScalingConfig, connected

logger = logging.getLogger("gmm_dist.fitting")


def fit_lake(options: argparse.Namespace, again: Again) -> None:
    """Claim the output, plan, load, fit, rank and commit; then say what came of it.

    With `options.resume` the fit goes on from the output's last checkpoint, and a run that has
    committed is left as it is.
    """
    torch.set_num_threads(1)  # sums have the same bits whatever the machine's cores
    began = time.monotonic()
    with said_how_to_resume(again), claim.claim(options.output, resume=options.resume) as run:
        if run.committed:
            say(f"{options.output}: the run has committed before, nothing is left to do")
            return
        job = Job.of(options, given=_given(options))
        fitted = job.fit(run)
        result = fitted.result
        warnings = result.warnings(job.plan.feature_names, lambda k: f"next run: {again.for_k(k)}")
        warnings = [*fitted.incomplete, *warnings]
        if result.best is None:
            print_table(result, warnings)
            run.forget()
            raise UserError(none_ranked(len(job.candidates)))
        more = {"warnings": warnings, "seconds": time.monotonic() - began}
        has_report = results.write(run.attempt, fitted, job.loader, job.settings, more)
        logger.info("committing")
        finish()  # what is left takes a moment, and is not to be told of as broken off
        run.attempt.commit()
    # Results are committed before anybody is told: the reader may have gone.
    print_table(result, warnings)
    best = spell_best(result.best, result.criterion)
    output = options.output.rstrip("/")
    report = f", report in {output}/{of_fit.NAME}" if has_report else ""
    say(f"best by {best}; model in {output}/model{report}")


def none_ranked(n_candidates: int) -> str:
    """Say that there is no model, and what to do."""
    none = f"none of the {n_candidates:,} candidates" if n_candidates > 1 else "the one candidate"
    return (
        f"{none} could{'' if n_candidates > 1 else ' not'} be ranked, see the table: "
        "use smaller --k, more rows, or leave out constant and duplicated columns"
    )


Look = Callable[[Shards, SweepResult], None]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is fitted, to which rows, and how; `given` and `warm` are about the rows' centre."""

    options: argparse.Namespace
    em: EMConfig
    start: StartConfig
    candidates: list[Candidate]
    loader: LakeLoader
    given: list[Parameters] | None
    warm: list[Parameters]

    @classmethod
    def of(
        cls,
        options: argparse.Namespace,
        plan: Plan | None = None,
        *,
        given: Mixture | None = None,
        warm: Mixture | None = None,
    ) -> Self:
        """Take the settings, and plan the rows unless that was done before.

        A fit goes on from `given`; in a sweep, `warm` competes with other starts of its shape.
        """
        em = EMConfig(
            options.tol, options.max_iter, options.reg_covar, options.precision, options.accelerate
        )
        start = StartConfig(options.n_init, options.init, random_state=options.random_state)
        candidates = _candidates(options, given)
        plan = plan or plan_rows(options)
        scaling = ScalingConfig(options.num_workers, options.use_gpu)
        require_means(plan, candidates, scaling, options.address)
        loader = loader_for(plan)
        starts, guests = (
            None if model is None else [about_centre(model, loader)] for model in (given, warm)
        )
        return cls(options, em, start, candidates, loader, starts, guests or [])

    @property
    def plan(self) -> Plan:
        return self.loader.plan

    @property
    def settings(self) -> dict[str, Any]:
        return {"em": asdict(self.em), "start": asdict(self.start)}

    @property
    def identity(self) -> RunIdentity:
        """All that decides the model's bits."""
        options = self.options
        asked = ("columns", "weight_column", "where", "missing", "holdout", "criterion")
        settings = {
            **self.settings,
            **{name: getattr(options, name) for name in asked},
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "start_model": None if self.given is None else _digest(self.given),
        }
        if self.warm:
            settings["warm_start"] = _digest(self.warm)
        return RunIdentity(self.plan.hash, self.plan.versions, settings, environment())

    def fit(self, run: Run, look: Look = lambda shards, result: None) -> Fitted:
        """Load the rows and fit, from the last checkpoint where there is one.

        `look` sees the rows once more, while they are resident.
        """
        checkpoints = run.checkpoints(self.identity, seconds=self.options.checkpoint_seconds)
        latest = checkpoints.latest() if self.options.resume else None
        progress = Progress(screen(stderr=True))

        def keep(number: int, snapshot: Callable[[], Snapshot]) -> None:
            run.check()
            if checkpoints.is_due:
                taken = snapshot()
                checkpoints.put(Checkpoint(number, taken.tensors, taken.state))

        with progress.shown(), self.resident(progress) as (shards, counted):
            resume = None
            if latest is not None:
                resume = Snapshot(dict(latest.tensors), dict(latest.state))
                progress.resuming(latest.number)
            elif self.given is None:
                progress.starting(self.start.n_init)
            result = self._sweep(shards, watch=progress.standings, resume=resume, keep=keep)
            quantiles = None
            if result.best is not None:
                quantiles = training_quantiles(shards, result.best.fit.parameters)
            sample = of_fit.draw(shards, result, self.start.random_state)
            look(shards, result)
        return Fitted(result, counted, quantiles, sample)

    @contextmanager
    def resident(self, progress: Progress) -> Iterator[tuple[Shards, Counted]]:
        """Keep the rows in the memory of a cluster's workers, and count them."""
        options = self.options
        scaling = ScalingConfig(options.num_workers, options.use_gpu).at_most(self.plan.n_shards)
        with connected(options.address, scaling):
            faults = FaultConfig(max_failures=options.max_failures, grace=options.grace)
            shards = start_workers(self.loader, self.candidates, scaling, faults)

            def loaded(done: int, n_rows: int) -> None:
                progress.loading(done, self.plan.n_shards, n_rows)

            yield shards, load_rows(shards, self.loader, loaded)
            shards.close()

    def _sweep(
        self, shards: Shards, *, watch: Watch, resume: Snapshot | None, keep: Keep
    ) -> SweepResult:
        return sweep(
            shards,
            self.candidates,
            self.em,
            self.start,
            n_features=self.plan.n_features,
            feature_names=self.plan.feature_names,
            centre=torch.from_numpy(self.loader.centre),
            criterion=self.options.criterion,
            holdout=self.plan.holdout > 0,
            given=self.given,
            warm=self.warm,
            watch=watch,
            resume=resume,
            keep=keep,
        )


def _digest(given: Sequence[Parameters]) -> str:
    digest = hashlib.sha256()
    for parameters in given:
        for part in (parameters.weights, parameters.means, parameters.covariances):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _given(options: argparse.Namespace) -> Mixture | None:
    start = getattr(options, "start", None)
    return None if start is None else load.load(start)


def _candidates(options: argparse.Namespace, given: Mixture | None) -> list[Candidate]:
    if given is None:
        pairs = itertools.product(options.covariance_type, options.k)
        return [Candidate(k, kind) for kind, k in pairs]
    if options.k not in (None, [given.n_components]):
        components = counted(given.n_components, "component")
        raise UserError(
            f"--k is {options.k[0]} but the model of --start has {components}: leave out --k"
        )
    return [Candidate(given.n_components, given.covariance_type)]


def plan_rows(options: argparse.Namespace) -> Plan:
    """Plan the rows that the command line asks for."""
    return plan_lake(
        options.data,
        columns=options.columns,
        weight_column=options.weight_column,
        where=options.where,
        missing=options.missing,
        holdout=options.holdout,
    )


def about_centre(given: Mixture, loader: LakeLoader) -> Parameters:
    """Return a model's parameters about the rows' shared centre; refuse other features."""
    plan = loader.plan
    if given.feature_names != plan.feature_names:
        raise UserError(
            f"the model of --start has the features {', '.join(given.feature_names)}, the data "
            f"{', '.join(plan.feature_names)}: name the model's with --columns, in its order"
        )
    return given.parameters.shifted(-torch.from_numpy(loader.centre))
