"""Make random mixtures, rows and shards for the tests of the mathematics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import naive
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from gmm_dist.config import EMConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import SumMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows

FIXED = settings(derandomize=True, database=None, deadline=None, max_examples=25)
"""The same examples every time, however slow the machine."""
FEW_TYPES = ("full", "diag", "tied-spherical")
"""Covariance types of each sort: matrices and variances, shared and not."""
few_types = pytest.mark.parametrize(
    "kind",
    [
        kind if kind in FEW_TYPES else pytest.param(kind, marks=pytest.mark.long)
        for kind in COVARIANCE_TYPES
    ],
)
"""For tests that take seconds: the other types' run with -m long."""
SCIKIT_LEARNS = ("full", "tied", "diag", "spherical")
"""The covariance types that scikit-learn has too."""


def parameters(
    covariance_type: str, k: int, d: int, *, seed: int = 0, spread: float = 2.0
) -> Parameters:
    """Return a random mixture about the origin, with covariances near the unit matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = (0.5 * normal(k)).softmax(0)
    factors = torch.eye(d, dtype=torch.float64) + 0.3 * normal(k, d, d)
    full = factors @ factors.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    variances = full.diagonal(dim1=-2, dim2=-1)
    covariances = {
        "full": full,
        "tied": full[0],
        "diag": variances.clone(),
        "spherical": variances.mean(-1),
        "tied-diag": variances[0].clone(),
        "tied-spherical": variances[0].mean(),
    }[covariance_type]
    return Parameters(
        weights=weights,
        means=spread * normal(k, d),
        covariances=covariances,
        covariance_type=covariance_type,
    )


def in_scikit_learn(mixture: Parameters) -> Parameters:
    """Return the same mixture, of a covariance type that scikit-learn has."""
    if mixture.covariance_type in SCIKIT_LEARNS:
        return mixture
    variances = naive.covariance_matrices(mixture).diagonal(axis1=1, axis2=2).copy()
    return replace(mixture, covariances=torch.tensor(variances), covariance_type="diag")


def rows(mixture: Parameters, n: int, *, seed: int = 0) -> Tensor:
    """Draw rows (n, d), float64, from a mixture of full covariances."""
    generator = torch.Generator().manual_seed(seed + 1000)
    labels = torch.multinomial(mixture.weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, mixture.n_features, dtype=torch.float64, generator=generator)
    lower = torch.linalg.cholesky(mixture.covariances)[labels]
    return mixture.means[labels] + (lower @ noise[:, :, None])[:, :, 0]


def normal_rows(n: int, d: int, *, seed: int = 0) -> Tensor:
    """Draw rows (n, d) from one standard normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def row_weights(n: int, *, seed: int = 0) -> Tensor:
    """Draw positive sample weights (n,)."""
    generator = torch.Generator().manual_seed(seed + 2000)
    return torch.rand(n, dtype=torch.float64, generator=generator) + 0.1


def blocks(X: Tensor, edges: Sequence[int], sample_weight: Tensor | None = None) -> list[Block]:
    """Cut rows (n, d) at `edges` into blocks, column-major; equal edges make empty blocks."""
    parts = [slice(a, b) for a, b in itertools.pairwise([0, *sorted(edges), len(X)])]
    return [
        Block(X[p].T.contiguous(), None if sample_weight is None else sample_weight[p])
        for p in parts
    ]


def shards(
    X: Tensor, edges: Sequence[int] = (), sample_weight: Tensor | None = None
) -> LocalShards:
    """Deal rows to one shard per piece between `edges`."""
    cut = blocks(X, edges, sample_weight)
    return LocalShards([ShardRows(shard=i, blocks=[block]) for i, block in enumerate(cut)])


def fit(
    X: Tensor,
    starts: Sequence[Parameters],
    config: EMConfig,
    *,
    edges: Sequence[int] = (),
    sample_weight: Tensor | None = None,
    watch: loop.Watch = lambda lanes: None,
) -> list[loop.FitResult]:
    """Centre the rows as the jobs do, run EM, and return the fits in the rows' own place."""
    weight = torch.ones(len(X), dtype=torch.float64) if sample_weight is None else sample_weight
    centre = (weight @ X.double()) / weight.sum()
    local = shards((X.double() - centre).to(X.dtype), edges, sample_weight)
    total = local.run(SumMoments(X.shape[1]))
    moved_starts = [start.shifted(-centre) for start in starts]
    results = loop.fit(local, moved_starts, config, total, watch=watch)
    return [moved(result, centre) for result in results]


def moved(result: loop.FitResult, offset: Tensor) -> loop.FitResult:
    """Return the same fit of rows moved by `offset`."""
    return replace(result, parameters=result.parameters.shifted(offset))


def assert_same(
    one: Parameters, other: Parameters, *, rtol: float = 1e-8, atol: float = 1e-9
) -> None:
    """Assert that two mixtures have the same parameters."""
    assert one.covariance_type == other.covariance_type
    torch.testing.assert_close(one.weights, other.weights, rtol=rtol, atol=atol)
    torch.testing.assert_close(one.means, other.means, rtol=rtol, atol=atol)
    torch.testing.assert_close(one.covariances, other.covariances, rtol=rtol, atol=atol)
