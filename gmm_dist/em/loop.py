"""The EM loop: each pass over the rows serves all mixtures (lanes) that still run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float64
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em.degenerate import degenerate_components, drop_laggards
from gmm_dist.em.estep import release
from gmm_dist.em.gpu.residence import bring_home, landed
from gmm_dist.em.lane import Lane, Status, grouped, task_of
from gmm_dist.em.mstep import SingularCovarianceError, advance
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.protocol import Shards


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FitResult:
    """One lane's outcome. `log_likelihood` (sum, nats) and `entropy` belong to `parameters`.

    `lower_bounds` are the mean log-likelihoods per row, one for each set of parameters that
    counts; `nk` (k,) the weight that each component answers for, and `rows` (k,) how many rows
    of equal weight that is worth (without weights the same); `degenerate` (k,) marks those that
    mean nothing; `left_out` bounds what the last pass left out of the mean log-likelihood (nats per
    row); `passes_saved` the passes that plain EM would at least have needed more
    (`acceleration.Squarem`).
    """

    parameters: Parameters
    status: Status
    converged: bool
    n_iter: int
    n_samples: float
    log_likelihood: float
    entropy: float
    lower_bounds: tuple[float, ...]
    nk: Float64[Tensor, " k"]
    rows: Float64[Tensor, " k"]
    degenerate: Bool[Tensor, " k"]
    left_out: float = 0.0
    passes_saved: float = 0.0

    @property
    def is_ranked(self) -> bool:
        """Whether the likelihood means something: the lane neither collapsed nor degenerated."""
        return self.status in (Status.CONVERGED, Status.MAX_ITER)

    def counted(self, n_samples: float) -> FitResult:
        """Return the fit of the same rows, whose weights sum to `n_samples`."""
        if n_samples == self.n_samples:
            return self
        factor = n_samples / self.n_samples
        return replace(
            self,
            n_samples=n_samples,
            log_likelihood=self.log_likelihood * factor,
            entropy=self.entropy * factor,
            nk=self.nk * factor,
        )


Watch = Callable[[Sequence[Lane]], None]


def fit(
    shards: Shards,
    starts: Sequence[Parameters],
    config: EMConfig,
    total: TotalMoments,
    *,
    watch: Watch = lambda lanes: None,
) -> list[FitResult]:
    """Run EM from every start until a `Status` says stop, all lanes in the same passes.

    A lane that fails never ends its siblings.

    Args:
        shards: The rows, about their shared centre.
        starts: One mixture for each lane, about that centre.
        config: Settings of the loop.
        total: Moments of all rows.
        watch: Sees the lanes after each pass.

    Returns one result per start, in their order.
    """
    lanes = [Lane.start(parameters, config, total) for parameters in starts]
    run(shards, lanes, config, total, watch=watch)
    return [result_of(lane, total) for lane in lanes]


def run(
    shards: Shards,
    lanes: Sequence[Lane],
    config: EMConfig,
    total: TotalMoments,
    *,
    rivals: Sequence[int] | None = None,
    watch: Watch = lambda lanes: None,
) -> None:
    """Pass over the rows until no lane goes on.

    Args:
        shards: The rows, about their shared centre.
        lanes: What is fitted; changed in place.
        config: Settings of the loop.
        total: Moments of all rows.
        rivals: A number for each lane; of lanes with one number those that fall behind are dropped.
        watch: Sees the lanes after each pass.

    Raises SingularCovarianceError, where `config` says so.
    """
    if config.on_singular == "raise":
        require_definite(lanes)
    try:
        while running := [lane for lane in lanes if lane.is_running]:
            groups = grouped(running)
            statistics = landed(shards.run(task_of(groups, total.n_rows)), groups)
            for group, sums in zip(groups, statistics.groups, strict=True):
                advance(group, sums, statistics, total, config)
            if rivals is not None:
                drop_laggards(lanes, rivals, total)
            watch(lanes)
    finally:
        release()
        bring_home(lanes)


def require_definite(lanes: Sequence[Lane]) -> None:
    """Raise SingularCovarianceError where a lane's covariances are not positive definite."""
    if any(lane.status is Status.COLLAPSED for lane in lanes):
        raise SingularCovarianceError


def result_of(lane: Lane, total: TotalMoments) -> FitResult:
    """Return what a lane has come to."""
    degenerate = degenerate_components(lane, total)
    return FitResult(
        # The parameters returned are those that were scored.
        parameters=lane.parameters,
        status=_status(lane, degenerate),
        converged=lane.converged,
        n_iter=lane.n_iter,
        n_samples=total.n_samples,
        log_likelihood=lane.log_likelihood,
        entropy=lane.entropy,
        lower_bounds=tuple(lane.lower_bounds),
        nk=lane.nk,
        rows=lane.rows,
        degenerate=degenerate,
        left_out=lane.left_out,
        passes_saved=0.0 if lane.squarem is None else lane.squarem.saved,
    )


def _status(lane: Lane, degenerate: Bool[Tensor, " k"]) -> Status:
    assert lane.status is not None, "the lane still runs"
    if lane.status is Status.DROPPED:
        return Status.DROPPED
    if lane.status is Status.COLLAPSED or not math.isfinite(lane.log_likelihood):
        return Status.COLLAPSED
    return Status.DEGENERATE if bool(degenerate.any()) else lane.status
