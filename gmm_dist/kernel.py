"""One pass over blocks of rows for many lanes: the E-step, in two matrix products.

For a chunk of rows: build the features Φ once; `logits = Θ Φ` for the components of all lanes;
softmax over each lane's components; `G += Φ Rᵀ`. Nothing of size n × K or n × d² ever exists:
the buffers hold one chunk, whose length follows from the shapes alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.families import FAMILIES, NEVER, Densities, n_feature_rows
from gmm_dist.parameters import Stack
from gmm_dist.shards import Block, ShardRows
from gmm_dist.statistics import PassStatistics, SufficientStatistics, TotalMoments

N_CHECKED = 64
"""Rows per shard whose float32 log-density is held against float64."""

_CHUNK_ELEMENTS = 1 << 20  # of Φ, logits and R together: a few MB, so that they stay in cache
_MIN_CHUNK, _MAX_CHUNK = 256, 2048
_CUDA_CHUNK_ELEMENTS, _CUDA_MAX_CHUNK = 1 << 28, 1 << 17


class Precision(Enum):
    """How a lane's pass is computed, from fast to last resort."""

    FLOAT32 = "float32 matrix products"
    FLOAT64 = "float64 matrix products"
    CENTRED = "float64, each component about its own mean, by its Cholesky factor"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self is Precision.FLOAT32 else torch.float64


@dataclass(frozen=True, slots=True, eq=False)
class LaneGroup:
    """Lanes of one covariance type and precision, as a worker needs them.

    `theta` (K, P) are the natural parameters of all their components; the centred form reads
    `stack` instead.
    """

    covariance_type: str
    precision: Precision
    sizes: tuple[int, ...]
    theta: Float64[Tensor, "K P"] | None = None
    stack: Stack | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EStep:
    """The task of one pass: sufficient statistics of every lane, in float64.

    Peak memory beside the rows: Φ (P, b), logits and responsibilities (K, b) of one chunk of b
    rows in the working precision, and the statistics (P, K) in float64.
    """

    groups: tuple[LaneGroup, ...]
    n_features: int

    def __call__(self, rows: ShardRows) -> PassStatistics:
        # Far components have responsibilities below the smallest normal number. As zeros they
        # cost nothing; as denormals they made softmax 8 and the second product 3 times slower.
        torch.set_flush_denormal(True)
        device = rows.blocks[0].X.device if rows.blocks else torch.device("cpu")
        features = self._features(device)
        passes = [_make_pass(group, features, device) for group in self.groups]
        n_samples = torch.zeros((), dtype=torch.float64, device=device)
        for chunk in _chunks(rows.blocks, self._chunk_rows(device)):
            for phi in features.values():
                phi.fill(chunk.X)
            for lanes in passes:
                lanes.add(chunk)
            weight = chunk.sample_weight
            n_samples += chunk.X.shape[1] if weight is None else weight.sum()
        errors, n_checked = self._float32_errors(rows, device)
        groups = [lanes.statistics(error) for lanes, error in zip(passes, errors, strict=True)]
        return PassStatistics(tuple(groups), float(n_samples), n_checked)

    def _matrix_groups(self) -> list[LaneGroup]:
        return [group for group in self.groups if group.precision is not Precision.CENTRED]

    def _features(self, device: torch.device) -> dict[torch.dtype, _Features]:
        """Return one buffer of features per working precision, as long as its lanes need."""
        types: dict[torch.dtype, set[str]] = {}
        for group in self._matrix_groups():
            types.setdefault(group.precision.dtype, set()).add(group.covariance_type)
        return {
            dtype: _Features(self.n_features, self._chunk_rows(device), names, dtype, device)
            for dtype, names in types.items()
        }

    def _chunk_rows(self, device: torch.device) -> int:
        last = [FAMILIES[g.covariance_type].rows(self.n_features).stop for g in self.groups]
        components = sum(sum(group.sizes) for group in self.groups)
        width: int = max(last) + 2 * components
        if device.type == "cuda":
            return max(_MAX_CHUNK, min(_CUDA_CHUNK_ELEMENTS // width, _CUDA_MAX_CHUNK))
        return max(_MIN_CHUNK, min(_CHUNK_ELEMENTS // width, _MAX_CHUNK))

    def _float32_errors(
        self, rows: ShardRows, device: torch.device
    ) -> tuple[list[Float64[Tensor, " L"]], int]:
        """Return Σ |log p in float32 - in float64| per lane over the shard's first rows."""
        head = next(_chunks(rows.blocks, N_CHECKED), None)
        errors = [torch.zeros(len(group.sizes), dtype=torch.float64) for group in self.groups]
        if head is None:
            return errors, 0
        x = head.X[:, :N_CHECKED]
        for error, group in zip(errors, self.groups, strict=True):
            if group.precision is Precision.FLOAT32:
                single = _log_norm(group, x, torch.float32).double()
                error += (single - _log_norm(group, x, torch.float64)).abs().sum(1).cpu()
        return errors, x.shape[1]


def _log_norm(group: LaneGroup, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log p (L, n) of a few rows, as the pass in `dtype` computes it."""
    names = {group.covariance_type}
    phi = _Features(x.shape[0], x.shape[1], names, dtype, x.device)
    phi.fill(x)
    lanes = _MatrixPass(group, phi, x.device)
    return lanes.log_norm()


class _Features:
    """Φ of one chunk, (P, n): a buffer that is filled again for each chunk.

    The views that a fill multiplies into are made once for each chunk length; chunks of a
    shard are of two lengths at most, so there are few.
    """

    def __init__(
        self, d: int, n_max: int, names: set[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.d = d
        self.dtype = dtype
        self.length = max(FAMILIES[name].rows(d).stop for name in names)
        self.has_norm = "spherical" in names
        self._squares = self.has_norm or self.length > 2 + d
        self._buffer = torch.empty(n_feature_rows(d) * n_max, dtype=dtype, device=device)
        self._views: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]] = {}
        self.phi = self._buffer[:0]

    def fill(self, X: Tensor) -> None:
        d, n = X.shape
        if n not in self._views:
            self._views[n] = self._make_views(n)
        self.phi, products = self._views[n]
        x = self.phi[2 : 2 + d]
        x.copy_(X)
        if self._squares:
            squares = self.phi[2 + d : 2 + 2 * d]
            torch.mul(x, x, out=squares)
            if self.has_norm:
                torch.sum(squares, 0, out=self.phi[0])
        for left, right, out in products:
            torch.mul(left, right, out=out)
        self.phi[1].fill_(1)

    def _make_views(self, n: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        d = self.d
        phi = self._buffer[: n_feature_rows(d) * n].view(n_feature_rows(d), n)
        products = []
        if self.length > 2 + 2 * d:
            x, first = phi[2 : 2 + d], 2 + 2 * d
            for i in range(d - 1):
                products.append((x[i], x[i + 1 :], phi[first : first + d - 1 - i]))
                first += d - 1 - i
        return phi, products


class _MatrixPass:
    """The lanes of a group through one pass, as two matrix products per chunk.

    Components are laid out in buckets of lanes of like size, padded to the largest, so that
    one softmax serves a whole bucket.
    """

    def __init__(self, group: LaneGroup, features: _Features, device: torch.device) -> None:
        assert group.theta is not None
        self._features = features
        self._rows = FAMILIES[group.covariance_type].rows(features.d)
        self._buckets, self._places = _lay_out(group.sizes)
        self._lanes = [lane for bucket in self._buckets for lane in bucket.lanes]
        n_places = sum(len(bucket.lanes) * bucket.size for bucket in self._buckets)
        theta = group.theta.new_zeros(n_places, group.theta.shape[1])
        theta[:, 1 if group.covariance_type == "spherical" else 0] = NEVER
        theta[self._places] = group.theta
        self._theta = theta.to(device, features.dtype)
        self._work: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._sums = torch.zeros(len(group.theta.T), n_places, dtype=torch.float64, device=device)
        zeros = torch.zeros(len(group.sizes), dtype=torch.float64, device=device)
        self._log_likelihood, self._entropy = zeros, zeros.clone()

    def add(self, chunk: Block) -> None:
        phi = self._features.phi[self._rows]
        logits, resp, product = self._buffers(phi.shape[1])
        torch.mm(self._theta, phi, out=logits)
        log_norm = self._softmax(logits, resp)
        if resp.dtype == torch.float64:
            self._add_entropy(chunk, logits, resp, log_norm)
        if chunk.sample_weight is not None:
            weight = chunk.sample_weight.to(resp.dtype)
            resp *= weight
            log_norm = log_norm * weight
        self._log_likelihood += log_norm.sum(1, dtype=torch.float64)
        torch.mm(phi, resp.T, out=product)
        self._sums += product

    def log_norm(self) -> Tensor:
        """Return log p (L, n) of the rows that the features now hold."""
        phi = self._features.phi[self._rows]
        logits, resp, _ = self._buffers(phi.shape[1])
        torch.mm(self._theta, phi, out=logits)
        return self._in_order(self._softmax(logits, resp))

    def statistics(self, float32_error: Float64[Tensor, " L"]) -> SufficientStatistics:
        return SufficientStatistics(
            self._sums[:, self._places].cpu(),
            self._in_order(self._log_likelihood).cpu(),
            self._in_order(self._entropy).cpu(),
            float32_error,
        )

    def _in_order(self, values: Tensor) -> Tensor:
        ordered = torch.empty_like(values)
        ordered[self._lanes] = values
        return ordered

    def _buffers(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        if n not in self._work:
            shape, like = (len(self._theta), n), self._theta
            product = like.new_empty(like.shape[1], like.shape[0])
            self._work[n] = like.new_empty(shape), like.new_empty(shape), product
        return self._work[n]

    def _softmax(self, logits: Tensor, resp: Tensor) -> Tensor:
        """Turn logits into responsibilities, lane by lane; return log p (L, n)."""
        log_norms, first = [], 0
        for bucket in self._buckets:
            last = first + len(bucket.lanes) * bucket.size
            lanes = (len(bucket.lanes), bucket.size, logits.shape[1])
            logit, r = logits[first:last].view(lanes), resp[first:last].view(lanes)
            torch.softmax(logit, 1, out=r)
            # The largest responsibility is exp(its logit - log p), and at least 1 / size.
            log_norms.append(logit.amax(1) - r.amax(1).log_())
            first = last
        return log_norms[0] if len(log_norms) == 1 else torch.cat(log_norms)

    def _add_entropy(self, chunk: Block, logits: Tensor, resp: Tensor, log_norm: Tensor) -> None:
        expected, first = [], 0
        for bucket in self._buckets:
            last = first + len(bucket.lanes) * bucket.size
            lanes = (len(bucket.lanes), bucket.size, logits.shape[1])
            expected.append((resp[first:last] * logits[first:last]).view(lanes).sum(1))
            first = last
        entropy = log_norm - torch.cat(expected)
        if chunk.sample_weight is not None:
            entropy = entropy * chunk.sample_weight
        self._entropy += entropy.sum(1)


class _CentredPass:
    """The lanes of a group through one pass, the textbook way: each component on its own.

    Right where the matrix form has lost its digits to cancellation, and several times slower.
    Its moments are taken about the components' means, in the layout of Full, Diag or
    Spherical; tied lanes use Full's.
    """

    def __init__(self, group: LaneGroup, device: torch.device) -> None:
        assert group.stack is not None
        layout = "full" if group.covariance_type == "tied" else group.covariance_type
        d = group.stack.means.shape[1]
        self._layout, self._rows = {layout}, FAMILIES[layout].rows(d)
        self._densities, self._sizes = Densities(group.stack, device), list(group.sizes)
        self._means = group.stack.means.to(device)
        shape = (self._rows.stop - self._rows.start, len(self._means))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        zeros = torch.zeros(len(group.sizes), dtype=torch.float64, device=device)
        self._log_likelihood, self._entropy = zeros, zeros.clone()
        self._features: dict[int, _Features] = {}

    def add(self, chunk: Block) -> None:
        x = chunk.X.double()
        weight = 1.0 if chunk.sample_weight is None else chunk.sample_weight
        parts = []
        for lane, logit in enumerate(self._densities(x).split(self._sizes)):
            log_norm = logit.logsumexp(0)
            r = (logit - log_norm).exp()
            self._log_likelihood[lane] += (log_norm * weight).sum()
            self._entropy[lane] += ((log_norm - (r * logit).sum(0)) * weight).sum()
            parts.append(r * weight)
        phi = self._phi(x)
        for k, (mean, r) in enumerate(zip(self._means, torch.cat(parts), strict=True)):
            phi.fill(x - mean[:, None])
            self._sums[:, k] += phi.phi[self._rows] @ r

    def _phi(self, x: Tensor) -> _Features:
        d, n = x.shape
        if n not in self._features:
            self._features[n] = _Features(d, n, self._layout, x.dtype, x.device)
        return self._features[n]

    def statistics(self, float32_error: Float64[Tensor, " L"]) -> SufficientStatistics:
        return SufficientStatistics(
            self._sums.cpu(), self._log_likelihood.cpu(), self._entropy.cpu(), float32_error
        )


_Pass = _MatrixPass | _CentredPass


def _make_pass(
    group: LaneGroup, features: dict[torch.dtype, _Features], device: torch.device
) -> _Pass:
    if group.precision is Precision.CENTRED:
        return _CentredPass(group, device)
    return _MatrixPass(group, features[group.precision.dtype], device)


@dataclass(frozen=True, slots=True)
class Total:
    """The task that sums the first two moments of all rows, in float64."""

    n_features: int

    def __call__(self, rows: ShardRows) -> TotalMoments:
        d = self.n_features
        sums, n_samples, n_rows = torch.zeros(d + 1, d, dtype=torch.float64), 0.0, 0
        for chunk in _chunks(rows.blocks, _MAX_CHUNK):
            x = chunk.X.double()
            weight = chunk.sample_weight
            weighted = x if weight is None else x * weight
            sums += torch.cat([weighted.sum(1)[None], weighted @ x.T]).cpu()
            n_samples += x.shape[1] if weight is None else float(weight.sum())
            n_rows += x.shape[1] if weight is None else int((weight > 0).sum())
        return TotalMoments(n_samples, n_rows, sums[0], sums[1:])


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Lanes that share one softmax: each has `size` places, the last ones maybe empty."""

    size: int
    lanes: tuple[int, ...]


def _lay_out(sizes: Sequence[int]) -> tuple[list[_Bucket], Tensor]:
    """Group lanes of like size; return the buckets and each component's place, in lane order."""
    buckets: list[tuple[int, list[int]]] = []
    for lane in sorted(range(len(sizes)), key=lambda lane: -sizes[lane]):
        # Padding costs its share of both products, one more softmax costs its dispatch.
        if not buckets or sizes[lane] < 0.75 * buckets[-1][0]:
            buckets.append((sizes[lane], []))
        buckets[-1][1].append(lane)
    places: dict[int, range] = {}
    first = 0
    for size, lanes in buckets:
        for lane in lanes:
            places[lane] = range(first, first + sizes[lane])
            first += size
    order = [place for lane in range(len(sizes)) for place in places[lane]]
    return [_Bucket(size, tuple(lanes)) for size, lanes in buckets], torch.tensor(order)


def _chunks(blocks: Sequence[Block], n_max: int) -> Iterator[Block]:
    """Cut blocks into chunks of at most `n_max` rows, as equal as can be."""
    for block in blocks:
        n = block.X.shape[1]
        n_chunks = -(-n // n_max)
        edges = [n * i // n_chunks for i in range(n_chunks + 1)] if n else [0]
        for a, b in itertools.pairwise(edges):
            weight = None if block.sample_weight is None else block.sample_weight[a:b]
            yield Block(block.X[:, a:b], weight)
