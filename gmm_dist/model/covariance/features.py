"""The feature matrix that serves all covariance types: which row holds which feature."""

from __future__ import annotations

import functools
import itertools

import torch
from jaxtyping import Int64
from torch import Tensor

CONSTANT_ROW = 1
"""The row of the feature that is 1 for every row of the data."""
PRODUCT_BLOCK = 4


def n_feature_rows(n_features: int) -> int:
    """Return the number of rows of the feature matrix that serves all types."""
    return 2 + 2 * n_features + n_features * (n_features - 1) // 2


@functools.cache
def product_pairs(n_features: int) -> tuple[Int64[Tensor, " Q"], Int64[Tensor, " Q"]]:
    """Return i and j (i < j) of the products x_i x_j, in the order of the feature matrix.

    Features come in blocks of four: each block times all features after it, then, for each of
    the six pairs of places within a block, the pairs of all blocks. So a chunk's products are
    d / 4 + 5 multiplications instead of d - 1.
    """
    d, block = n_features, PRODUCT_BLOCK
    pairs = [
        (i, j)
        for first in range(0, d - block, block)
        for i in range(first, first + block)
        for j in range(first + block, d)
    ]
    for a, b in itertools.combinations(range(block), 2):
        pairs += [(j - b + a, j) for j in range(b, d, block)]
    i, j = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return i, j


@functools.cache
def second_moment_rows(n_features: int) -> Int64[Tensor, " dd"]:
    """Return, for each cell of a d × d matrix, its row among the squares and products."""
    i, j = product_pairs(n_features)
    rows = torch.arange(n_features).diag()
    rows[i, j] = rows[j, i] = n_features + torch.arange(len(i))
    return rows.flatten()
