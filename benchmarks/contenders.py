"""The contenders: ours and the peers, each told the same start and the same iterations.

Run by `race` as a process of its own: `python contenders.py NAME FOLDER`. It loads the problem in
FOLDER, then answers each line of stdin (a number of iterations) with a line of JSON, and leaves
the fitted mixtures in FOLDER/NAME.npz.

Every contender does the same M-steps. Their E-steps differ, and are counted: scikit-learn scores
once more at the end; torchgmm, as shipped, goes over the rows twice per iteration.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from machine import n_cores
from problems import Mixture, Problem, save_mixtures

FLOAT64_TOLERANCE, FLOAT32_TOLERANCE = 1e-6, 1e-4
"""How far the mean log-likelihood per row may be from the reference's, nats."""


@dataclass(frozen=True)
class Run:
    """One timed fit: its mixtures, `seconds`, and the E-steps and iterations it did per mixture.

    `details` are contender-specific: seconds within the passes, precisions used, ...
    """

    fitted: list[Mixture]
    seconds: float
    e_steps: int
    iterations: int
    details: dict[str, Any] = field(default_factory=dict)


class UnsupportedError(Exception):
    """The contender has no such mixture."""


class Contender(Protocol):
    """A fit that is ready to run: the data are in memory, in its own type."""

    def fit(self, iterations: int) -> Run:
        """Do exactly `iterations` EM iterations from the start(s)."""


class Ours:
    """gmm_dist's loop: pass, M-step, pass, ...; every iteration, none of the stopping.

    `together`: all starts are lanes of the same passes; otherwise one after another.
    """

    def __init__(
        self, problem: Problem, folder: Path, precision: str, *, together: bool, ray: bool = False
    ) -> None:
        import torch

        from gmm_dist.config import EMConfig
        from gmm_dist.em.estep import SumMoments
        from gmm_dist.model.parameters import Parameters

        torch.set_num_threads(1)  # as the jobs' driver does
        self._shards = _ray_shards(problem, folder) if ray else _process_shards(problem, folder)
        kind = problem.shape.covariance_type
        self._starts = [
            Parameters(
                weights=torch.from_numpy(start.weights),
                means=torch.from_numpy(start.means),
                covariances=torch.from_numpy(start.covariances),
                covariance_type=kind,
            )
            for start in problem.starts
        ]
        self._config = EMConfig(
            max_iter=10**9, reg_covar=0.0, precision=precision, accelerate=False
        )
        self._total = self._shards.run(SumMoments(problem.shape.d))
        self._together = together

    def fit(self, iterations: int) -> Run:
        cohorts = [self._starts] if self._together else [[start] for start in self._starts]
        details: dict[str, Any] = {"pass_seconds": 0.0, "passes": 0, "float64_passes": 0}
        began = time.perf_counter()
        parameters = [p for starts in cohorts for p in self._iterate(starts, iterations, details)]
        seconds = time.perf_counter() - began
        fitted = [
            Mixture(p.weights.numpy(), p.means.numpy(), p.covariances.numpy()) for p in parameters
        ]
        # A pass that auto repeats in float64 is no E-step of its own: it is what auto costs.
        return Run(fitted, seconds, iterations, iterations, details)

    def _iterate(self, starts: list[Any], iterations: int, details: dict[str, Any]) -> list[Any]:
        from gmm_dist.em.estep import Precision
        from gmm_dist.em.lane import Lane, grouped, task_of
        from gmm_dist.em.mstep import advance

        lanes = [Lane.start(parameters, self._config, self._total) for parameters in starts]
        while running := [lane for lane in lanes if lane.n_iter < iterations]:
            assert all(lane.is_running for lane in running), "a lane has failed"
            groups = grouped(running)
            began = time.perf_counter()
            statistics = self._shards.run(task_of(groups, self._total.n_rows))
            details["pass_seconds"] += time.perf_counter() - began
            details["passes"] += 1
            exact = any(group[0].precision is not Precision.FLOAT32 for group in groups)
            details["float64_passes"] += exact
            for group, sums in zip(groups, statistics.groups, strict=True):
                advance(group, sums, statistics, self._total, self._config)
            for lane in running:
                lane.last_bound = None  # so that none converges
        return [lane.parameters for lane in lanes]


def _process_shards(problem: Problem, folder: Path) -> Any:
    from processes import Loader, ProcessShards

    n_shards = _n_shards(problem)
    return ProcessShards(Loader(folder / "X.npy", n_shards), min(n_cores(), n_shards))


def _ray_shards(problem: Problem, folder: Path) -> Any:
    import ray
    from processes import Loader

    from gmm_dist.config import Cluster
    from gmm_dist.shards.ray_shards import RayShards

    here = {"PYTHONPATH": str(Path(__file__).parent)}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        "local",
        num_cpus=n_cores(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": here},
    )
    n_shards = _n_shards(problem)
    cluster = Cluster(num_workers=n_cores(), use_gpu=False)
    shards = RayShards(Loader(folder / "X.npy", n_shards), n_shards, cluster)
    shards.__enter__()  # they end with the process
    shards.load()
    return shards


def _n_shards(problem: Problem) -> int:
    from gmm_dist.lake.deal import default_shards

    return default_shards(problem.shape.n)


class ScikitLearn:
    """scikit-learn's GaussianMixture, on rows of float64 (its default) or float32."""

    def __init__(self, problem: Problem, dtype: type) -> None:
        from sklearn.mixture import GaussianMixture

        self._problem, self._X = problem, np.asarray(problem.X, dtype=dtype)
        self._make: Callable[..., Any] = GaussianMixture

    def fit(self, iterations: int) -> Run:
        fitted, seconds = [], 0.0
        for start in self._problem.starts:
            kind = self._problem.shape.covariance_type
            inverse = np.linalg.inv if kind == "full" else np.reciprocal
            model = self._make(
                len(start.weights),
                covariance_type=kind,
                weights_init=start.weights.astype(self._X.dtype),
                means_init=start.means.astype(self._X.dtype),
                precisions_init=inverse(start.covariances).astype(self._X.dtype),
                reg_covar=0.0,
                max_iter=iterations,
                tol=0.0,
            )
            began = time.perf_counter()
            model.fit(self._X)
            seconds += time.perf_counter() - began
            fitted.append(Mixture(model.weights_, model.means_, model.covariances_))
        return Run(fitted, seconds, iterations + 1, iterations)


class OneDal:
    """oneDAL's em_gmm through daal4py (scikit-learn-intelex)."""

    def __init__(self, problem: Problem, dtype: type) -> None:
        import daal4py

        daal4py.daalinit(n_cores())
        self._make, self._problem = daal4py.em_gmm, problem
        self._X = np.asarray(problem.X, dtype=dtype)

    def fit(self, iterations: int) -> Run:
        fitted, seconds, most = [], 0.0, 0
        full, dtype = self._problem.shape.covariance_type == "full", self._X.dtype
        for start in self._problem.starts:
            covariances = [c if full else c[None] for c in start.covariances.astype(dtype)]
            algorithm = self._make(
                nComponents=len(start.weights),
                fptype="float" if dtype == np.float32 else "double",
                maxIterations=iterations,
                accuracyThreshold=0.0,
                covarianceStorage="full" if full else "diagonal",
            )
            arguments = start.weights.astype(dtype)[None], start.means.astype(dtype), covariances
            began = time.perf_counter()
            result = algorithm.compute(self._X, *arguments)
            seconds += time.perf_counter() - began
            # It stops where the likelihood no longer changes, whatever the threshold.
            done = int(result.nIterations[0, 0])
            assert 0 < done <= iterations, f"{done} iterations instead of {iterations}"
            most = max(most, done)
            stacked = np.stack([c if full else c[0] for c in result.covariances])
            fitted.append(Mixture(result.weights[0], result.means, stacked))
        return Run(fitted, seconds, most, most)


class TorchGmm:
    """torchgmm: the EM part of its `fit`, float32, the data as one batch (its default)."""

    def __init__(self, problem: Problem) -> None:
        import torch

        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._problem, self._X = problem, torch.from_numpy(problem.X)

    def fit(self, iterations: int) -> Run:
        fitted, seconds = [], 0.0
        for start in self._problem.starts:
            mixture, elapsed = self._fit_one(start, iterations)
            fitted.append(mixture)
            seconds += elapsed
        return Run(fitted, seconds, 2 * iterations, iterations)

    def _fit_one(self, start: Mixture, iterations: int) -> tuple[Mixture, float]:
        import torch
        from torchgmm.base.data import DataLoader, collate_tensor, dataset_from_tensors
        from torchgmm.bayes import GaussianMixture
        from torchgmm.bayes.core import cholesky_precision
        from torchgmm.bayes.gmm.lightning_module import GaussianMixtureLightningModule
        from torchgmm.bayes.gmm.model import GaussianMixtureModel, GaussianMixtureModelConfig

        kind, (n, d) = self._problem.shape.covariance_type, self._X.shape
        model = GaussianMixtureModel(GaussianMixtureModelConfig(len(start.weights), d, kind))
        weights, means, covariances = (torch.from_numpy(v).float() for v in vars(start).values())
        model.component_probs.copy_(weights)
        model.means.copy_(means)
        model.precisions_cholesky.copy_(cholesky_precision(covariances, kind))
        loader = DataLoader(dataset_from_tensors(self._X), batch_size=n, collate_fn=collate_tensor)
        # What `GaussianMixture.fit` does after its initialisation. One batch is what it takes for
        # "batch training", with an epoch for the means and another for the covariances.
        module = GaussianMixtureLightningModule(
            model, convergence_tolerance=0, covariance_regularization=0, is_batch_training=True
        )
        trainer = GaussianMixture(len(start.weights), covariance_type=kind).trainer(
            max_epochs=2 * iterations, enable_progress_bar=False
        )
        began = time.perf_counter()
        trainer.fit(module, loader)
        seconds = time.perf_counter() - began
        parts = model.component_probs, model.means, model.covariances
        return Mixture(*(part.double().numpy() for part in parts)), seconds


class Spark:
    """Spark's GaussianMixture (org.apache.spark.mllib: the RDD API alone takes a start), float64.

    The rows are vectors in the JVM, cached and counted. They are rescaled by one factor so that
    densities at the start are about e^60: Spark adds 2.2e-16 to every density, and without this
    a mixture of many features becomes one blob. The work is the same.
    """

    def __init__(self, problem: Problem) -> None:
        from problems import mean_log_likelihood
        from pyspark.mllib.common import _py2java
        from pyspark.mllib.linalg import Vectors
        from pyspark.sql import SparkSession

        if problem.shape.covariance_type != "full":
            raise UnsupportedError("Spark fits full covariances alone")
        os.environ["PYSPARK_PYTHON"] = sys.executable
        session = SparkSession.builder.master(f"local[{n_cores()}]")
        options = {"ui.enabled": "false", "driver.memory": "6g", "driver.host": "127.0.0.1"}
        for name, value in options.items():
            session = session.config(f"spark.{name}", value)
        context = session.getOrCreate().sparkContext
        context.setLogLevel("ERROR")
        first = mean_log_likelihood(problem.starts[0], problem.X, rows=1000)
        self._scale, self._problem = float(np.exp((first - 60) / problem.shape.d)), problem
        rows = context.parallelize((problem.X * self._scale).astype(np.float64), n_cores())
        self._rows = _py2java(context, rows.map(Vectors.dense)).cache()
        assert self._rows.count() == problem.shape.n
        self._gateway, self._mllib = context._gateway, context._jvm.org.apache.spark.mllib

    def fit(self, iterations: int) -> Run:
        fitted, seconds = [], 0.0
        for start in self._problem.starts:
            algorithm = self._mllib.clustering.GaussianMixture()
            algorithm.setK(len(start.weights)).setInitialModel(self._model(start))
            algorithm.setConvergenceTol(0.0).setMaxIterations(iterations)
            began = time.perf_counter()
            model = algorithm.run(self._rows)
            seconds += time.perf_counter() - began
            fitted.append(self._mixture(model))
        return Run(fitted, seconds, iterations, iterations, {"rescaled_by": self._scale})

    def _model(self, start: Mixture) -> Any:
        linalg, s, (k, d) = self._mllib.linalg, self._scale, start.means.shape
        gaussian = self._mllib.stat.distribution.MultivariateGaussian
        gaussians, doubles = self._gateway.new_array(gaussian, k), self._doubles
        for i in range(k):
            mean = linalg.Vectors.dense(doubles(start.means[i] * s))
            covariance = linalg.Matrices.dense(d, d, doubles(start.covariances[i].ravel() * s * s))
            gaussians[i] = gaussian(mean, covariance)
        return self._mllib.clustering.GaussianMixtureModel(doubles(start.weights), gaussians)

    def _doubles(self, values: Any) -> Any:
        array = self._gateway.new_array(self._gateway.jvm.double, len(values))
        for i, value in enumerate(values):
            array[i] = float(value)
        return array

    def _mixture(self, model: Any) -> Mixture:
        s, gaussians, d = self._scale, list(model.gaussians()), self._problem.shape.d
        means = np.array([list(g.mu().toArray()) for g in gaussians]) / s
        covariances = np.array([list(g.sigma().toArray()) for g in gaussians])
        return Mixture(
            np.array(list(model.weights())), means, covariances.reshape(-1, d, d) / (s * s)
        )


Maker = Callable[[Problem, Path], Contender]

CONTENDERS: dict[str, tuple[Maker, float]] = {
    # Each with how far its log-likelihood per row may lie from the reference's.
    "ours-f32": (lambda p, f: Ours(p, f, "float32", together=True), FLOAT32_TOLERANCE),
    "ours-auto": (lambda p, f: Ours(p, f, "auto", together=True), FLOAT32_TOLERANCE),
    "ours-f64": (lambda p, f: Ours(p, f, "float64", together=True), FLOAT64_TOLERANCE),
    "ours-ray-f32": (
        lambda p, f: Ours(p, f, "float32", together=True, ray=True),
        FLOAT32_TOLERANCE,
    ),
    "ours-separate-f32": (lambda p, f: Ours(p, f, "float32", together=False), FLOAT32_TOLERANCE),
    "onedal-f32": (lambda p, _: OneDal(p, np.float32), FLOAT32_TOLERANCE),
    "onedal-f64": (lambda p, _: OneDal(p, np.float64), FLOAT64_TOLERANCE),
    "sklearn-f64": (lambda p, _: ScikitLearn(p, np.float64), FLOAT64_TOLERANCE),
    "sklearn-f32": (lambda p, _: ScikitLearn(p, np.float32), FLOAT32_TOLERANCE),
    "torchgmm-f32": (lambda p, _: TorchGmm(p), FLOAT32_TOLERANCE),
    "spark-f64": (lambda p, _: Spark(p), FLOAT64_TOLERANCE),
}


def main(name: str, folder: Path) -> None:
    """Serve one contender: readiness first, then one answer per line of stdin."""
    # Libraries print; what they say goes to stderr, and stdout is ours alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # none converges in so few iterations

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        contender = CONTENDERS[name][0](Problem.load(folder), folder)
        answer(ready=True)
        for line in sys.stdin:
            run = contender.fit(int(line))
            save_mixtures(run.fitted, folder / f"{name}.npz")
            answer(**{key: value for key, value in asdict(run).items() if key != "fitted"})
    except ImportError as error:
        answer(skipped=f"skipped: {error.name} is not installed: pip install -e '.[bench]'")
    except UnsupportedError as error:
        answer(skipped=f"skipped: {error}")
    except Exception as error:
        # A peer that fails is a row of the table, not the end of the race.
        logging.exception("%s failed", name)
        what = (str(error).strip() or "no message").splitlines()[0]
        answer(failed=f"failed, {type(error).__name__}: {what[:200]}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
