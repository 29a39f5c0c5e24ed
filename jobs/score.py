"""Score every row of a lake under a fitted mixture, and write the lake's files anew.

python jobs/score.py s3://lake/points --model s3://models/points --output s3://lake/scored --keep id
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import early  # noqa: F401 - first: signals while the rest is loaded
import pyarrow as pa
import torch
from ending import run, said_how_to_resume
from options import Again, Parser, add_cluster, parse_url
from progress import Progress
from stopping import finish
from talking import say, screen

from gmm_dist.errors import UserError
from gmm_dist.formats import counted
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import load
from gmm_dist.runs.checkpoint import RunIdentity, environment
from gmm_dist.runs.claim import Run
from gmm_dist.runs.model_folder import model_sha256
from gmm_dist.scoring import run as score_runs
from gmm_dist.scoring.files import Scored, ScoreFiles, collect
from gmm_dist.scoring.scorer import Scoring
from gmm_dist.shards.failures import FaultConfig
from gmm_dist.shards.ray_shards import RayShards, ScalingConfig, connected
from gmm_dist.urls import redacted

logger = logging.getLogger("gmm_dist.score")


def score(argv: Sequence[str]) -> None:
    """Parse the command line and score the lake."""
    parser = Parser(
        prog="score.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_score(parser)
    score_lake(parser.parse_args(argv), Again(__file__, argv))


def add_score(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring."""
    parser.add_argument(
        "data", type=parse_url, metavar="DATA", help="folder or file of Parquet, local or any URL"
    )
    parser.add_argument(
        "--model", required=True, type=parse_url, help="a fit's output, or its model folder"
    )
    parser.add_argument(
        "--output", required=True, type=parse_url, metavar="OUT", help="a new folder or URL"
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns to go along (default: none)",
    )
    rows.add_argument("--where", metavar="TEXT", help="score and write only rows where this holds")
    rows.add_argument(
        "--probabilities",
        action="store_true",
        help="write the probabilities of all components too, as a fixed-size list",
    )
    rows.add_argument(
        "--outliers",
        type=float,
        metavar="Q",
        help="mark rows of a lower log-density than this share of the training rows, e.g. 0.001",
    )
    add_cluster(parser.add_argument_group("cluster"))
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run of the same rows, model and options"
    )


def score_lake(options: argparse.Namespace, again: Again) -> None:
    """Plan, claim the output, score what is not scored yet, and commit; say what was done."""
    began = time.monotonic()
    with said_how_to_resume(again):
        job = _Job.of(options)
        claim = score_runs.claim(options.output, job.plan, job.identity, resume=options.resume)
        with claim as run:
            if run.committed:
                say(f"{options.output}: the run has committed before, nothing is left to do")
                return
            scored = job.score(run)
            more = {**job.facts, "seconds": time.monotonic() - began}
            finish()  # what is left takes a moment, and is not to be told of as broken off
            score_runs.commit(options.output, run, job.identity, scored, more)
    say(job.sentence(scored))


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What is scored, and with what."""

    options: argparse.Namespace
    mixture: Mixture
    plan: Plan
    scoring: Scoring

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        mixture = load.load(options.model)
        if not mixture.feature_names:
            raise UserError(
                f"{redacted(options.model)} keeps no names of its features, by which a lake's "
                "columns are found: pass a model that fit.py or sweep.py wrote"
            )
        threshold = _threshold(mixture, options)
        plan = plan_lake(
            options.data,
            columns=mixture.feature_names,
            where=options.where,
            missing="mean",  # a row with a hole keeps its place
            keep=options.keep,
            remedy="the model needs all its features: score files that have them",
        )
        if plan.feature_names != mixture.feature_names:
            raise UserError(
                f"{redacted(plan.url)} has the features {', '.join(plan.feature_names)}, the model "
                f"of --model {', '.join(mixture.feature_names)}: score the columns that it was "
                "fitted to"
            )
        for key in dict.fromkeys(options.keep):
            if key not in plan.kept:
                logger.info("--keep %s: a hive key, which the path has; no column is written", key)
        kept = pa.schema([plan.schema.field(name) for name in plan.kept])
        scoring = Scoring(mixture.parameters, kept, options.probabilities, threshold, mixture.ids)
        return cls(options, mixture, plan, scoring)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of the run beside its counts, as plain JSON values."""
        return {
            "data": redacted(self.plan.url),
            "plan_hash": self.plan.hash,
            "model": redacted(self.options.model),
            "feature_names": self.plan.feature_names,
            "columns": self.scoring.schema.names,
            "config": self._settings,
            "versions": environment(),
        }

    @property
    def identity(self) -> RunIdentity:
        """All that decides the files' bytes."""
        return RunIdentity(self.plan.hash, self.plan.versions, self._settings, environment())

    @property
    def _settings(self) -> dict[str, Any]:
        asked = {name: getattr(self.options, name) for name in ("keep", "where", "probabilities")}
        return {
            **asked,
            "outliers": self.options.outliers,
            "threshold": self.scoring.threshold,
            "component_ids": self.scoring.ids,
            "model_sha256": model_sha256(self.mixture.parameters),
        }

    def score(self, run: Run) -> Scored:
        """Have the workers score all files that are not scored yet."""
        options, n_files = self.options, len(self.plan.files)
        loader = ScoreFiles(self.plan, self.scoring, options.output, self.identity, run.attempt.id)
        progress = Progress(screen(stderr=True))
        scaling = ScalingConfig(options.num_workers, options.use_gpu).at_most(n_files)

        def watch(done: int, n_rows: int) -> None:
            run.check()
            progress.scoring(done, n_files, n_rows)

        with connected(options.address, scaling), progress.shown():
            shards = RayShards(loader, n_files, scaling, self._faults)
            shards.load(watch)
            scored = shards.run(collect)
            shards.close()
        return scored

    @property
    def _faults(self) -> FaultConfig:
        """Be as patient with the largest file as its size asks for."""
        options, usual = self.options, FaultConfig()
        sizes = [file.size for file in self.plan.files]
        skew = max(sizes) / statistics.median(sizes)
        return FaultConfig(
            max_failures=options.max_failures,
            grace=options.grace,
            deadline_factor=usual.deadline_factor * skew,
            straggling_factor=usual.straggling_factor * skew,
        )

    def sentence(self, scored: Scored) -> str:
        """Say in one line what was done."""
        options, k, counts = self.options, self.mixture.n_components, scored.counts
        rows, files = counted(counts.rows, "row"), counted(len(scored.files), "file")
        parts = [f"scored {rows} of {files} by k={k}"]
        if counts.filtered:
            parts.append(f"{counted(counts.filtered, 'other')} in them did not pass --where")
        if counts.missing:
            verb = "misses" if counts.missing == 1 else "miss"
            parts.append(f"{counted(counts.missing, 'row')} {verb} a feature")
        if options.outliers is not None:
            parts.append(counted(counts.outliers, "outlier"))
        return f"{'; '.join(parts)}; in {options.output.rstrip('/')}"


def _threshold(mixture: Mixture, options: argparse.Namespace) -> float | None:
    """Return the log-density (nats) below which a row is an outlier."""
    if options.outliers is None:
        return None
    if mixture.log_density_quantiles is None:
        raise UserError(
            f"--outliers: {redacted(options.model)} keeps no quantiles of its training "
            "log-density, as models of older versions do not: fit it again (fit.py --start "
            "goes on from it), or leave out --outliers"
        )
    try:
        return mixture.log_density_quantiles.at(options.outliers)
    except UserError as error:
        raise UserError(f"--outliers: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    return run(score, argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
