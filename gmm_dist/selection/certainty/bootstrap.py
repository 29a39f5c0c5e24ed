"""Resample the rows of a fit: how sure its parameters, its clusters and its K are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.lane import Snapshot
from gmm_dist.em.loop import FitResult
from gmm_dist.em.resampling import Draws, ResampledFits
from gmm_dist.em.statistics import Spike
from gmm_dist.model.bootstrap import Bootstrap
from gmm_dist.model.clusters import Clusters, Stability
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.certainty.stability import (
    N_AFRESH,
    Afresh,
    Found,
    FromFit,
    Job,
    Reference,
    compare,
    recovery,
)
from gmm_dist.selection.certainty.wins import wins
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import Keep, in_unit
from gmm_dist.shards.protocol import WorkingShards
from gmm_dist.streams import Stream

FITTING, COMPARING = "resampled fits", "clusters of resamples"

Watch = Callable[[str, int, int], None]
"""Gets what is being done, how much of it is, and of how much."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Resampling:
    """How a fit is resampled.

    `spikes` are values that many rows share (`TotalMoments.spikes`); `result` is the sweep whose
    best fit this is, if it is one's.
    """

    mixture: Parameters
    n_resamples: int
    config: EMConfig
    start: StartConfig
    clusters: Clusters | None = None
    spikes: tuple[Spike, ...] = ()
    result: SweepResult | None = None

    def draws(self, stream: Stream, n: int) -> tuple[Draws, ...]:
        """Return the draws of the first `n` resamples of a stream."""
        return tuple(Draws(stream, self.start.random_state, i) for i in range(n))


@dataclass(slots=True, eq=False)
class _Progress:
    """What has been done, as a snapshot holds it."""

    fits: ResampledFits
    found: dict[int, Found] = field(default_factory=dict)
    n_steps: int = 0

    def snapshot(self) -> Snapshot:
        lanes = self.fits.snapshot()
        found = [[i, n, list(similar)] for i, (n, similar) in sorted(self.found.items())]
        state: dict[str, Any] = {"found": found, "n_steps": self.n_steps}
        return Snapshot(lanes.tensors, lanes.state | state)

    def restore(self, saved: Snapshot) -> None:
        self.fits.restore(saved)
        self.n_steps = saved.state["n_steps"]
        self.found = {i: (n, tuple(similar)) for i, n, similar in saved.state["found"]}


def bootstrap(
    shards: WorkingShards,
    resampling: Resampling,
    *,
    watch: Watch = lambda what, done, n: None,
    resume: Snapshot | None = None,
    keep: Keep = lambda number, snapshot: None,
) -> tuple[Bootstrap, Clusters | None]:
    """Resample the rows; return the spread of the fits, and the clusters with their stability.

    Args:
        shards: All rows, about their shared centre.
        resampling: What is resampled; its mixture is about the centre.
        watch: Gets the progress.
        resume: A snapshot of the same, which goes on from there to the same bits.
        keep: Gets a number after each pass and each comparison, and what takes a snapshot.
    """
    mixture, of_all = resampling.mixture, resampling.draws
    has_products = mixture.type.has_products
    shards, total, _ = in_unit(shards, mixture.n_features, has_products=has_products)
    fits = ResampledFits(
        shards=shards,
        start=mixture,
        config=resampling.config,
        draws=of_all(Stream.RESAMPLES, resampling.n_resamples),
        total=replace(total, spikes=resampling.spikes),
    )
    progress = _Progress(fits)
    if resume is not None:
        progress.restore(resume)

    def note(what: str, done: int, n: int) -> None:
        progress.n_steps += 1
        keep(progress.n_steps, progress.snapshot)
        watch(what, done, n)

    fitted = fits.run(lambda done, n: note(FITTING, done, n))
    bootstrap = _spread(fitted, resampling)
    if resampling.result is not None and len(resampling.result.scored) > 1:
        won = wins(
            shards,
            resampling.result,
            fits.draws,
            n_samples=total.n_samples,
            compiled=total.loops_pay(),
        )
        bootstrap = replace(bootstrap, wins=won)
    clusters = resampling.clusters
    if clusters is not None:
        reference = Reference.of(shards, mixture, clusters, total, resampling.start.random_state)
        jobs = _jobs(resampling, fitted)
        found = compare(
            shards,
            reference,
            jobs,
            progress.found,
            lambda: note(COMPARING, len(progress.found), len(jobs)),
        )
        n_from_fit = len(jobs) - N_AFRESH
        stability = Stability(
            n_rows=len(reference.sample.X),
            from_fit=recovery(found[:n_from_fit], clusters.n_clusters),
            afresh=recovery(found[n_from_fit:], clusters.n_clusters),
        )
        clusters = replace(clusters, stability=stability)
    return bootstrap, clusters


def _spread(fitted: Sequence[FitResult], resampling: Resampling) -> Bootstrap:
    mixture = resampling.mixture
    return Bootstrap.of(
        [fit.parameters for fit in fitted if fit.is_ranked],
        mixture.n_components,
        mixture.n_features,
        n_resamples=resampling.n_resamples,
        random_state=resampling.start.random_state,
    )


def _jobs(resampling: Resampling, fitted: Sequence[FitResult]) -> list[Job]:
    """Return the comparisons: of the sound fits to all rows, and of searches on the sample."""
    sound = [(i, fit) for i, fit in enumerate(fitted) if fit.is_ranked]
    draws = resampling.draws(Stream.FROM_FIT, len(fitted))
    mixture = resampling.mixture
    candidate = Candidate(mixture.n_components, mixture.covariance_type)
    afresh = [
        Afresh(candidate=candidate, config=resampling.config, start=resampling.start, draws=drawn)
        for drawn in resampling.draws(Stream.AFRESH, N_AFRESH)
    ]
    return [*(FromFit(fit.parameters, draws[i]) for i, fit in sound), *afresh]
