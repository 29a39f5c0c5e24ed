"""What sweep.py and fit.py assemble: lake, cluster, sweep, artifacts."""

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
from options import Again
from progress import Progress
from results import print_table, spell_best
from rich.console import Console

from gmm_dist import artifacts, lake, runs
from gmm_dist.assembly import load_rows, start_workers
from gmm_dist.checkpoint import Checkpoint, RunIdentity, environment
from gmm_dist.cluster import ScalingConfig, connected
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.failures import FaultConfig
from gmm_dist.lake import Plan
from gmm_dist.lease import LeaseLost
from gmm_dist.loading import Counted, LakeLoader, loader_for
from gmm_dist.mixture import Mixture
from gmm_dist.parameters import Parameters
from gmm_dist.runs import Run
from gmm_dist.selection import Candidate, SweepResult
from gmm_dist.snapshot import Snapshot
from gmm_dist.sweep import require_rows, sweep

logger = logging.getLogger("gmm_dist.fitting")


def fit_lake(options: argparse.Namespace, again: Again) -> None:
    """Claim the output, plan, load, fit, rank and commit; print the table and where the model is.

    With `options.resume` the fit goes on from the output's last checkpoint, and a run that has
    committed is left as it is.
    """
    torch.set_num_threads(1)  # sums have the same bits whatever the machine's cores
    began = time.monotonic()
    with _said_how_to_resume(again), runs.claim(options.output, resume=options.resume) as run:
        if run.committed:
            print(f"{options.output}: the run has committed before, nothing is left to do")
            return
        job = _Job.of(options)
        result, counted = job.fit(run)
        warnings = result.warnings(job.plan.feature_names, lambda k: f"next run: {again.for_k(k)}")
        print_table(result, warnings)
        if result.best is None:
            run.forget()
            raise UserError(
                f"none of the {len(job.candidates)} candidates could be ranked, see the table: "
                "use smaller --k, more rows, or leave out constant and duplicated columns"
            )
        more = {"warnings": warnings, "seconds": time.monotonic() - began}
        results.write(run.attempt, result, job.loader, counted, job.settings, more)
        logger.info("committing")
        run.attempt.commit()
    best = spell_best(result.best, result.criterion)
    print(f"best by {best}; model in {options.output.rstrip('/')}/model")


@contextmanager
def _said_how_to_resume(again: Again) -> Iterator[None]:
    """Add to what the world did to a run the command that goes on with it."""
    try:
        yield
    except LeaseLost:
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; go on with: {again.to_resume()}") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What is fitted, to which rows, and how."""

    options: argparse.Namespace
    em: EMConfig
    start: StartConfig
    candidates: list[Candidate]
    loader: LakeLoader
    given: list[Parameters] | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        em = EMConfig(
            options.tol, options.max_iter, options.reg_covar, options.precision, options.accelerate
        )
        start = StartConfig(options.n_init, options.init, random_state=options.random_state)
        model = _given(options)
        candidates = _candidates(options, model)
        plan = lake.plan(
            options.data,
            columns=options.columns,
            weight_column=options.weight_column,
            where=options.where,
            missing=options.missing,
            holdout=options.holdout,
        )
        require_rows(candidates, plan.n_rows)
        loader = loader_for(plan)
        given = None if model is None else [_about_centre(model, plan, loader)]
        return cls(options, em, start, candidates, loader, given)

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
        files = tuple((file.path, file.size, file.version) for file in self.plan.files)
        return RunIdentity(self.plan.hash, files, settings, environment())

    def fit(self, run: Run) -> tuple[SweepResult, Counted]:
        """Load the rows and fit, from the last checkpoint where there is one."""
        options = self.options
        checkpoints = run.checkpoints(self.identity, seconds=options.checkpoint_seconds)
        latest = checkpoints.latest() if options.resume else None
        progress = Progress(Console(stderr=True))

        def keep(number: int, snapshot: Callable[[], Snapshot]) -> None:
            run.check()
            if checkpoints.is_due:
                taken = snapshot()
                checkpoints.put(Checkpoint(number, taken.tensors, taken.state))

        scaling = ScalingConfig(options.num_workers, options.use_gpu)
        with connected(options.address, scaling), progress.shown():
            faults = FaultConfig(max_failures=options.max_failures, grace=options.grace)
            shards = start_workers(self.loader, self.candidates, scaling, faults)

            def loaded(done: int, n_rows: int) -> None:
                progress.loading(done, self.plan.n_shards, n_rows)

            counted = load_rows(shards, self.loader, loaded)
            resume = None
            if latest is not None:
                resume = Snapshot(dict(latest.tensors), dict(latest.state))
                progress.resuming(latest.number)
            elif self.given is None:
                progress.starting(self.start.n_init)
            result = sweep(
                shards,
                self.candidates,
                self.em,
                self.start,
                n_features=self.plan.n_features,
                criterion=options.criterion,
                holdout=self.plan.holdout > 0,
                given=self.given,
                watch=progress.standings,
                resume=resume,
                keep=keep,
            )
            shards.close()
        return result, counted


def _digest(given: Sequence[Parameters]) -> str:
    digest = hashlib.sha256()
    for parameters in given:
        for part in (parameters.weights, parameters.means, parameters.covariances):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _given(options: argparse.Namespace) -> Mixture | None:
    start = getattr(options, "start", None)
    return None if start is None else artifacts.load(start)


def _candidates(options: argparse.Namespace, given: Mixture | None) -> list[Candidate]:
    if given is None:
        pairs = itertools.product(options.covariance_type, options.k)
        return [Candidate(k, kind) for kind, k in pairs]
    if options.k not in (None, [given.n_components]):
        raise UserError(
            f"--k is {options.k[0]} but the model of --start has {given.n_components} components: "
            "leave out --k"
        )
    return [Candidate(given.n_components, given.covariance_type)]


def _about_centre(given: Mixture, plan: Plan, loader: LakeLoader) -> Parameters:
    if given.feature_names != plan.feature_names:
        raise UserError(
            f"the model of --start has the features {', '.join(given.feature_names)}, the data "
            f"{', '.join(plan.feature_names)}: name the model's with --columns, in its order"
        )
    return given.parameters.shifted(-torch.from_numpy(loader.centre))
