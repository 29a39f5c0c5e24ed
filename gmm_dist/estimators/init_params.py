"""How rows are shared out among components before the first M-step, by scikit-learn's seeds."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor

from gmm_dist.model.arrays import Rows, array_of

INIT_PARAMS = ("kmeans", "k-means++", "random", "random_from_data")


def shares_of(
    method: str,
    X: Rows,
    sample_weight: Float64[Tensor, " n"] | None,
    k: int,
    random_state: np.random.RandomState,
) -> Float64[Tensor, "n k"]:
    """Return each row's weight times its responsibilities (n, k).

    Weights are the rows' probabilities as seeds, and their weights in k-means.

    Args:
        method: One of `INIT_PARAMS`.
        X: Rows (n, d).
        sample_weight: Weights (n,); None for ones.
        k: Number of components.
        random_state: Source of the same draws as in scikit-learn, so the shares are the same.
    """
    n = len(X)
    weight = None if sample_weight is None else sample_weight.numpy()
    if method == "random":
        share = torch.from_numpy(random_state.uniform(size=(n, k)))
        share /= share.sum(1, keepdim=True)
    elif method == "random_from_data":
        likely = None if weight is None else weight / weight.sum()
        share = _seeds(random_state.choice(n, size=k, replace=False, p=likely), n, k)
    elif method == "k-means++":
        _, seeds = kmeans_plusplus(array_of(X), k, sample_weight=weight, random_state=random_state)
        share = _seeds(seeds, n, k)
    else:
        means = KMeans(n_clusters=k, n_init=1, random_state=random_state)
        labels = torch.from_numpy(means.fit(array_of(X), sample_weight=weight).labels_)
        share = torch.nn.functional.one_hot(labels.long(), k).double()
    return share if sample_weight is None else share * sample_weight[:, None]


def _seeds(rows: np.ndarray, n: int, k: int) -> Tensor:
    share = torch.zeros(n, k, dtype=torch.float64)
    share[torch.from_numpy(rows), torch.arange(k)] = 1
    return share
