"""How often each candidate of a sweep would have been the best, had other rows been drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.em.resampling import Draws
from gmm_dist.model.bootstrap import Win
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.ranking import Candidate, RankedCandidate, SweepResult
from gmm_dist.shards.protocol import HeldOut, ShardRows, Shards


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ResampledScores:
    """Sums over the rows of B resamples, for L mixtures; a Summary.

    `log_likelihoods` (L, B) are Σ w log p and `entropies` (L, B) -Σ w Σ_k r_k ln r_k, nats;
    `n_samples` (B,) are Σ w.
    """

    log_likelihoods: Float64[Tensor, "L B"]
    entropies: Float64[Tensor, "L B"]
    n_samples: Float64[Tensor, " B"]

    def __add__(self, other: ResampledScores) -> ResampledScores:
        return ResampledScores(
            log_likelihoods=self.log_likelihoods + other.log_likelihoods,
            entropies=self.entropies + other.entropies,
            n_samples=self.n_samples + other.n_samples,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResamples:
    """The task that scores mixtures on resamples of the rows, all at once.

    `compiled`, log-densities are those of compiled loops where these suit.

    Peak memory beside the rows: log-densities (k, b) of a chunk of b rows under one mixture, and
    how often each resample draws each of them.
    """

    mixtures: tuple[Parameters, ...]
    draws: tuple[Draws, ...]
    compiled: bool = False

    def __call__(self, rows: ShardRows) -> ResampledScores:
        device = rows.device
        densities = [Densities.of(m, device, compiled=self.compiled) for m in self.mixtures]
        shape = (len(densities), len(self.draws))
        sums = torch.zeros((2, *shape), dtype=torch.float64, device=device)
        n_samples = torch.zeros(len(self.draws), dtype=torch.float64, device=device)
        first = 0
        for chunk in rows.chunks(max(density.width for density in densities) + len(self.draws)):
            n, x = chunk.X.shape[1], chunk.X.double()
            drawn = torch.stack(
                [draws.weights(rows.shard, n, device, first=first) for draws in self.draws]
            )
            weights = drawn * chunk.weights
            for i, density in enumerate(densities):
                logits = density(x)
                resp = logits.softmax(0)
                sums[0, i] += weights @ logits.logsumexp(0)
                sums[1, i] -= weights @ torch.special.xlogy(resp, resp).sum(0)
            n_samples += weights.sum(1)
            first += n
        log_likelihoods, entropies = sums.cpu()
        return ResampledScores(
            log_likelihoods=log_likelihoods, entropies=entropies, n_samples=n_samples.cpu()
        )


def wins(
    shards: Shards,
    result: SweepResult,
    draws: Sequence[Draws],
    *,
    n_samples: float,
    compiled: bool = False,
) -> tuple[Win, ...]:
    """Return how often each ranked candidate has the best criterion, the most frequent first.

    The fits stay as they are, and the likelihood of each resample is the sum of its rows' (Kishino,
    Miyata & Hasegawa, J. Mol. Evol. 31, 1990). So no fit gains from rows that are drawn twice,
    which would favour large K.

    Args:
        shards: All rows, about their shared centre, the largest weight from 1 to 2.
        result: The sweep.
        draws: How often each resample draws the rows.
        n_samples: The sum of the weights of these rows.
        compiled: Whether compiled loops may evaluate them.
    """
    ranked = [scored for scored in result.scored if scored.fit.is_ranked]
    mixtures = tuple(scored.fit.parameters for scored in ranked)
    task = ScoreResamples(mixtures, tuple(draws), compiled)
    scores = shards.run(HeldOut(task) if result.criterion == "holdout" else task)
    factor = result.n_samples / n_samples  # the criteria's n may be another than the weights' sum
    best: Counter[Candidate] = Counter()
    for b in range(len(draws)):
        if not float(scores.n_samples[b]) > 0:  # it has drawn no row that could tell
            continue
        of_resample = [_scored(scored, scores, i, b, factor) for i, scored in enumerate(ranked)]
        chosen = replace(result, scored=tuple(of_resample)).best
        assert chosen is not None
        best[chosen.candidate] += 1
    order = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(
        Win(k=candidate.k, covariance_type=candidate.covariance_type, n=n) for candidate, n in order
    )


def _scored(
    scored: RankedCandidate, scores: ResampledScores, i: int, b: int, factor: float
) -> RankedCandidate:
    """Return a candidate with the criteria of a resample."""
    n, sums = float(scores.n_samples[b]), float(scores.log_likelihoods[i, b])
    fit = replace(
        scored.fit,
        n_samples=n * factor,
        log_likelihood=sums * factor,
        entropy=float(scores.entropies[i, b]) * factor,
    )
    outcome = replace(scored.outcome, fit=fit)
    return RankedCandidate.of(scored.candidate, outcome, sums / n if n > 0 else None)
