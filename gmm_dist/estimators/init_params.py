"""How rows are shared out among components before the first M-step, by scikit-learn's seeds.

What an M-step reads of rows that are shared out is here too: without a pass, about the means.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor

from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.arrays import Rows, array_of
from gmm_dist.model.covariance import TYPE_OF, Moments

INIT_PARAMS = ("kmeans", "k-means++", "random", "random_from_data")
SEARCH = "search"
"""The `init_params` of starts that a search on a sample finds, by `selection.starts`."""
_EMPTY = 10 * 2.0**-52  # scikit-learn's, of a row


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


def empty_rows(total: TotalMoments) -> float:
    """Return what scikit-learn adds to each component's rows, so that none has zero."""
    return _EMPTY * total.n_samples / total.n_rows


def moments_of_shares(
    kind: str,
    X: Float64[Tensor, "n d"],
    share: Float64[Tensor, "n k"],
    total: TotalMoments,
    centre: Float64[Tensor, " d"],
) -> Moments:
    """Return what an M-step reads of rows that are shared out among components.

    Where a few rows make a component, as seeds do, a variance is what is left of two numbers
    that are nearly equal; so these moments are about each component's mean. Not those of a
    covariance that all components share.

    Args:
        kind: The covariance type.
        X: Rows (n, d) in feature units.
        share: w_n r_nk (n, k): each row's weight times its responsibilities.
        total: Moments of all rows.
        centre: The rows' shared centre (d,).
    """
    nk = share.sum(0)
    sum_x = share.T @ X
    family = TYPE_OF[kind]
    if family.is_shared:
        sums = torch.cat([nk[:, None], sum_x], 1).T.cpu()
        return family.moments(sums, _scatter_about_origin(sums, total, centre))
    means = sum_x / (nk + empty_rows(total))[:, None]
    second = []
    for mean, part in zip(means, share.T, strict=True):
        x = X - mean  # one component's at a time: each is as large as the rows are
        second.append(family.scatter(x, part))
    sum_xx = family.second(torch.stack(second))
    # What is left of Σ r (x - mean) is rounding.
    return Moments(
        nk=nk.cpu(), sum_x=torch.zeros_like(sum_x).cpu(), sum_xx=sum_xx.cpu(), about=means.cpu()
    )


def _scatter_about_origin(
    sums: Float64[Tensor, "P k"], total: TotalMoments, centre: Float64[Tensor, " d"]
) -> Tensor:
    """Return the scatter of all rows about the origin, less what is shared out of it.

    So it is in scikit-learn, where seeds share out k rows only: their tied start is wider than
    the rows, the more so the farther these lie from the origin. Where all rows are shared out,
    the origin cancels. `sums` are each component's rows and their sums about the centre.
    """
    left_n, left_x = total.n_samples - sums[0].sum(), total.sum_x - sums[1:].T.sum(0)
    if not total.is_whole:
        return total.sum_xx + centre * (left_n * centre + 2 * left_x)
    across = centre[:, None] * left_x
    return total.sum_xx + (left_n * centre[:, None] * centre + across + across.T)
