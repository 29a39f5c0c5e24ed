"""Trees of merges: which of a mixture's components are one cluster, asked of all its rows.

Two trees, each by a number for every pair of clusters j and k, of responsibilities r:

- by entropy (Baudry et al., JCGS 19, 2010), the pair whose merge lowers the labels' entropy most:

      B_jk = Σ w [φ(r_j + r_k) - φ(r_j) - φ(r_k)],  φ(t) = t ln t

- by misclassification (Hennig, ADAC 4, 2010: DEMP), the pair of the largest

      max(M_jk, M_kj),  M_jk = Σ w r_j 1(argmax r = k) / Σ w r_j

After a merge the responsibilities of the two are added in each row, and the largest is looked for
anew; what changes of the numbers is summed in another pass. Nothing as large as the rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.clusters import ENTROPY, MISCLASSIFICATION, Merge, MergeTree, merged
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters
from gmm_dist.shards.protocol import ShardRows, Shards

_TINY = torch.finfo(torch.float64).tiny
_NEGLIGIBLE = 1e-20  # of a responsibility: with it a pair gains less than 1e-18 nats in a row

Pair = tuple[int, int]
Passed = Callable[[int, int], None]
"""Gets the number of passes done, and that of all."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PairSums:
    """What the next merges of the two trees are chosen by; a Summary.

    `gains` are B_jk, (c, c) above the diagonal, or (c,) of one cluster with each; `mislabelled`
    (c, c) are Σ w r_j 1(argmax = k), whose rows sum to the clusters' weights.
    """

    gains: Float64[Tensor, "*c1 c"]
    mislabelled: Float64[Tensor, "c2 c2"]

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(
            gains=self.gains + other.gains, mislabelled=self.mislabelled + other.mislabelled
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SumPairs:
    """The task that sums what the next merges are chosen by.

    `by_entropy` and `by_misclassification` are each component's cluster, from 0 up, in the two
    trees; `changed` is the cluster of the first whose gains are asked for, None for all pairs.
    With `keeps` the rows keep their responsibilities for the next pass: (k, n) float64. `compiled`,
    log-densities are those of compiled loops where these suit.

    Peak memory beside the rows: responsibilities (k, b) of a chunk of b rows, three times.
    """

    mixture: Parameters
    by_entropy: tuple[int, ...]
    by_misclassification: tuple[int, ...]
    changed: int | None = None
    keeps: bool = False
    compiled: bool = False

    def __call__(self, rows: ShardRows) -> PairSums:
        n = max(self.by_entropy) + 1
        gains = torch.zeros(
            (n, n) if self.changed is None else (n,), dtype=torch.float64, device=rows.device
        )
        m = max(self.by_misclassification) + 1
        mislabelled = torch.zeros((m, m), dtype=torch.float64, device=rows.device)
        for resp, weight in _responsibilities(
            rows, self.mixture, keeps=self.keeps, compiled=self.compiled
        ):
            gains += self._gains(merged(resp, self.by_entropy), weight)
            clusters = merged(resp, self.by_misclassification)
            mislabelled += (clusters * weight) @ _labels(clusters).T
        return PairSums(gains=gains.cpu(), mislabelled=mislabelled.cpu())

    def _gains(self, r: Tensor, weight: Tensor) -> Tensor:
        if self.changed is not None:
            one = r[self.changed]
            near = one > _NEGLIGIBLE
            gains = _gain(one[near], r[:, near]) @ weight[near]
            gains[self.changed] = 0.0
            return gains
        gains = r.new_zeros(len(r), len(r))
        for j, one in enumerate(r[:-1]):
            near = one > _NEGLIGIBLE
            gains[j, j + 1 :] = _gain(one[near], r[j + 1 :, near]) @ weight[near]
        return gains


def _labels(resp: Float64[Tensor, "c b"]) -> Float64[Tensor, "c b"]:
    """Return 1 for each row's largest responsibility, the first of equal ones, and 0 elsewhere."""
    labels = (resp == resp.amax(0)).double()
    if float(labels.sum()) != resp.shape[1]:  # some are equal: rare, and slow to tell apart
        labels = torch.nn.functional.one_hot(resp.argmax(0), len(resp)).double().T
    return labels


def _gain(one: Tensor, others: Tensor) -> Tensor:
    """Return φ(r_j + r_k) - φ(r_j) - φ(r_k), which is never negative but for rounding."""
    gain = _phi(one + others)
    gain -= _phi(others)
    gain -= _phi(one)
    return gain.clamp_min_(0.0)


def _phi(t: Tensor) -> Tensor:
    """Return t ln t; in a third of the time of xlogy."""
    return t * t.clamp_min(_TINY).log_()


def _responsibilities(
    rows: ShardRows, mixture: Parameters, *, compiled: bool, keeps: bool = False
) -> Iterator[tuple[Float64[Tensor, "k b"], Float64[Tensor, " b"]]]:
    """Yield the responsibilities and the weights of some rows at a time."""
    key = "responsibilities"
    if key in rows.kept:
        yield from rows.kept[key]  # type: ignore[misc]
        return
    densities = Densities.of(mixture, rows.device, compiled=compiled)
    kept = []
    for chunk in rows.chunks(densities.width):
        logits, weight = densities(chunk.X.double()), chunk.weights
        resp = (logits - logits.amax(0)).exp_()  # softmax over lines takes twice the time
        resp /= resp.sum(0)
        if keeps:
            kept.append((resp, weight))
        yield resp, weight
    if keeps:
        rows.kept[key] = kept


def merge_orders(
    shards: Shards,
    mixture: Parameters,
    *,
    keeps: bool = False,
    compiled: bool = False,
    watch: Passed = lambda done, total: None,
) -> dict[str, list[Pair]]:
    """Return the merges of both trees, by all rows, in k - 1 passes over them.

    Each merge is a pair of clusters, named by their first components, the lower first. Of equal
    pairs the first is merged.

    Args:
        shards: The rows.
        mixture: The mixture, about their shared centre.
        keeps: Whether the rows' responsibilities stay in memory: k float64 numbers a row.
        compiled: Whether compiled loops may evaluate them.
        watch: Gets the number of passes done, and that of all.
    """
    k = mixture.n_components
    entropy, misclassification = _EntropyOrder(k), _MisclassificationOrder(k)
    for done in range(k - 1):
        task = SumPairs(
            mixture=mixture,
            by_entropy=entropy.clusters,
            by_misclassification=misclassification.clusters,
            changed=entropy.changed,
            keeps=keeps,
            compiled=compiled,
        )
        sums = shards.run(task)
        entropy.merge(sums.gains)
        misclassification.merge(sums.mislabelled)
        watch(done + 1, k - 1)
    return {ENTROPY: entropy.pairs, MISCLASSIFICATION: misclassification.pairs}


class _Order:
    """Merges so far: `pairs` of first components; clusters are numbered by first components."""

    def __init__(self, k: int) -> None:
        self.pairs: list[Pair] = []
        self._members = [[c] for c in range(k)]

    @property
    def clusters(self) -> tuple[int, ...]:
        """Each component's cluster."""
        places = {c: i for i, members in enumerate(self._members) for c in members}
        return tuple(places[c] for c in range(len(places)))

    def _join(self, j: int, k: int) -> None:
        self.pairs.append((min(self._members[j]), min(self._members[k])))
        self._members[j] += self._members.pop(k)


class _EntropyOrder(_Order):
    """Merges by entropy; `changed` is the cluster whose gains the next pass is to sum."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.changed: int | None = None
        self._gains = torch.zeros(k, k, dtype=torch.float64)

    def merge(self, gains: Tensor) -> None:
        if self.changed is None:
            self._gains = gains + gains.T
        else:
            self._gains[self.changed] = self._gains[:, self.changed] = gains
        j, k = _largest(self._gains)
        self._join(j, k)
        kept = [i for i in range(len(self._gains)) if i != k]
        self._gains, self.changed = self._gains[kept][:, kept], j


class _MisclassificationOrder(_Order):
    """Merges by misclassification, all of whose numbers each pass sums."""

    def merge(self, mislabelled: Tensor) -> None:
        weights = mislabelled.sum(1, keepdim=True)
        chances = mislabelled / weights.clamp_min(_TINY)
        self._join(*_largest(torch.maximum(chances, chances.T)))


def _largest(values: Float64[Tensor, "c c"]) -> Pair:
    """Return the pair of the largest value, the first of equal ones."""
    n = len(values)
    rows, columns = torch.triu_indices(n, n, offset=1)
    place = int(values[rows, columns].argmax())
    return int(rows[place]), int(columns[place])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TreeSums:
    """What is known of each merge of T trees of k components; a Summary.

    `gains` (T, k - 1) are what each merge takes from the entropy (sums, nats); `weights`
    (T, k - 1, 2) are Σ w r of the two clusters, `mislabelled` what of it has the other's label,
    and `labelled` (T, k - 1) Σ w over the rows labelled with either.
    """

    n_samples: float
    gains: Float64[Tensor, "T m"]
    weights: Float64[Tensor, "T m 2"]
    mislabelled: Float64[Tensor, "T m 2"]
    labelled: Float64[Tensor, "T m"]

    def __add__(self, other: TreeSums) -> TreeSums:
        return TreeSums(
            n_samples=self.n_samples + other.n_samples,
            gains=self.gains + other.gains,
            weights=self.weights + other.weights,
            mislabelled=self.mislabelled + other.mislabelled,
            labelled=self.labelled + other.labelled,
        )

    def trees(self, orders: Sequence[Sequence[Pair]]) -> list[MergeTree]:
        """Return the trees; `orders` are their merges."""
        return [self._tree(t, pairs) for t, pairs in enumerate(orders)]

    def _tree(self, t: int, pairs: Sequence[Pair]) -> MergeTree:
        # Summed from the last merge, after which there is one cluster: it never rises by rounding.
        left = (self.gains[t].flip(0).cumsum(0).flip(0) / self.n_samples).tolist()
        chances = (self.mislabelled[t] / self.weights[t].clamp_min(_TINY)).amax(1).tolist()
        shares = (self.labelled[t] / self.n_samples).tolist()
        return MergeTree(
            entropy=left[0] if left else 0.0,
            merges=tuple(
                Merge(first=j, second=k, entropy=entropy, misclassification=chance, share=share)
                for (j, k), entropy, chance, share in zip(
                    pairs, [*left, 0.0][1:], chances, shares, strict=True
                )
            ),
        )


@dataclass(frozen=True, slots=True, eq=False)
class SumTrees:
    """The task that sums what is known of each merge of some trees, in one pass.

    Peak memory beside the rows: responsibilities (k, b) of a chunk of b rows, twice.
    """

    mixture: Parameters
    orders: tuple[tuple[Pair, ...], ...]
    compiled: bool = False

    def __call__(self, rows: ShardRows) -> TreeSums:
        shape = (len(self.orders), self.mixture.n_components - 1)
        of_two = torch.zeros((2, *shape, 2), dtype=torch.float64, device=rows.device)
        of_merge = torch.zeros((2, *shape), dtype=torch.float64, device=rows.device)
        n_samples = torch.zeros((), dtype=torch.float64, device=rows.device)
        for resp, weight in _responsibilities(rows, self.mixture, compiled=self.compiled):
            n_samples += weight.sum()
            for t, pairs in enumerate(self.orders):
                _sum_tree(resp.clone(), weight, pairs, of_two[:, t], of_merge[:, t])
        of_two, of_merge = of_two.cpu(), of_merge.cpu()
        return TreeSums(
            n_samples=float(n_samples),
            gains=of_merge[0],
            labelled=of_merge[1],
            weights=of_two[0],
            mislabelled=of_two[1],
        )


def _sum_tree(
    r: Tensor, weight: Tensor, pairs: Sequence[Pair], of_two: Tensor, of_merge: Tensor
) -> None:
    """Merge the rows of `r` (k, b) one pair after another, and add up what each merge is."""
    top, label = r.max(0)
    for i, (j, k) in enumerate(pairs):
        ours, theirs = r[j], r[k]
        in_j, in_k = label == j, label == k
        of_merge[0, i] += _gain(ours, theirs) @ weight
        of_merge[1, i] += (in_j | in_k).double() @ weight
        of_two[0, i] += torch.stack([ours @ weight, theirs @ weight])
        of_two[1, i] += torch.stack([(ours * in_k) @ weight, (theirs * in_j) @ weight])
        r[j] = ours + theirs
        label[in_k | (r[j] > top)] = j
        top = torch.maximum(top, r[j])
