"""The log-likelihood of held-out rows: one float64 pass for mixtures of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.kernel import chunks
from gmm_dist.model.covariance import FAMILIES
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters, Stack
from gmm_dist.shards.protocol import HeldOut, ShardRows, Shards

_CHUNK, _CUDA_CHUNK = 2048, 1 << 14


@dataclass(frozen=True, slots=True, eq=False)
class LogLikelihoods:
    """Sums of w log p (L,), nats, one per mixture, and of the weights w."""

    sums: Float64[Tensor, " L"]
    n_samples: float

    def __add__(self, other: LogLikelihoods) -> LogLikelihoods:
        return LogLikelihoods(self.sums + other.sums, self.n_samples + other.n_samples)


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The task that sums the rows' log-likelihood under each mixture.

    In the centred form, which is right for any mixture of positive definite covariances, and
    without the moments, which take most of an E-step's time. Peak memory beside the rows: the
    log-densities (k, b) of a chunk of b rows under one mixture.
    """

    mixtures: tuple[Parameters, ...]

    def __call__(self, rows: ShardRows) -> LogLikelihoods:
        device = rows.blocks[0].X.device if rows.blocks else torch.device("cpu")
        densities = [Densities(Stack.of([mixture]), device) for mixture in self.mixtures]
        sums = torch.zeros(len(densities), dtype=torch.float64, device=device)
        n_samples = torch.zeros((), dtype=torch.float64, device=device)
        for chunk in chunks(rows.blocks, _CUDA_CHUNK if device.type == "cuda" else _CHUNK):
            x = chunk.X.double()
            weight = chunk.weights
            log_norm = torch.stack([density(x).logsumexp(0) for density in densities])
            sums += log_norm @ weight
            n_samples += weight.sum()
        return LogLikelihoods(sums.cpu(), float(n_samples))


def mean_log_likelihoods(shards: Shards, mixtures: Sequence[Parameters]) -> list[float | None]:
    """Return each mixture's mean log-likelihood of the held-out rows: Σ w log p / Σ w, nats.

    The mixtures are about the rows' shared centre. None for one whose covariance is singular,
    and for all where no row of positive weight is held out.
    """
    sound = [i for i, mixture in enumerate(mixtures) if _has_density(mixture)]
    means: list[float | None] = [None] * len(mixtures)
    if not sound:
        return means
    found = shards.run(HeldOut(Score(tuple(mixtures[i] for i in sound))))
    if found.n_samples > 0:
        for i, value in zip(sound, (found.sums / found.n_samples).tolist(), strict=True):
            means[i] = value
    return means


def _has_density(mixture: Parameters) -> bool:
    stack = Stack.of([mixture])
    _, failed = FAMILIES[mixture.covariance_type].precisions_cholesky(stack.covariances)
    return not bool(failed.any()) and math.isfinite(float(mixture.means.sum()))
