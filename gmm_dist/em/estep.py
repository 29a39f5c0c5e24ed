"""The E-step: one pass over blocks of rows, for many mixtures (lanes) at once.

For a chunk of rows: build the features Φ once; `logits = Θ Φ` for the components of all lanes;
softmax over each lane's components; `G += Φ Rᵀ`. Nothing of size n × K or n × d² ever exists:
the buffers hold one chunk, whose length follows from the shapes alone.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.chunks import chunk_rows
from gmm_dist.compiling import can_compile, may_compile
from gmm_dist.devices import float64_price, rounds_to_tf32
from gmm_dist.em.forms.centred_form import CentredForm
from gmm_dist.em.forms.dense_form import DenseForm
from gmm_dist.em.forms.features import Features
from gmm_dist.em.forms.product_form import ProductForm
from gmm_dist.em.forms.pruned_form import PrunedForm
from gmm_dist.em.gpu.product_form import GpuProductForm
from gmm_dist.em.gpu.screened_form import ScreenedForm
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.statistics import PassStatistics, TotalMoments
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.shards.protocol import ShardRows

logger = logging.getLogger(__name__)

_COMPILED = (PrunedForm, DenseForm)
Form = ProductForm | CentredForm | PrunedForm | DenseForm | ScreenedForm


@dataclass(frozen=True, slots=True, eq=False)
class EStep:
    """The task of one pass: sufficient statistics of every lane, in float64.

    Peak memory beside the rows: Φ (P, b), logits and responsibilities (K, b) of one chunk of b
    rows in the working precision, and the statistics (P, K) in float64.
    """

    groups: tuple[LaneBatch, ...]
    n_features: int
    # Of so many rows, groups that check hold one's float32 log-density against float64.
    check_every: int = 16

    def __call__(self, rows: ShardRows) -> PassStatistics:
        with _denormals_as_zeros():
            return _workspace(self, rows.device).run(rows)

    def width(self, device: torch.device) -> int:
        """Return the numbers that each row of a chunk needs: of Φ, logits and R together."""
        rows = (TYPE_OF[group.features[0]].rows(self.n_features) for group in self.groups)
        last: int = max(part.stop for part in rows)
        components = sum(sum(group.sizes) for group in self.groups)
        if device.type != "cpu" and all(g.precision is Precision.CENTRED for g in self.groups):
            # Φ of halves; logits of float32, what is made of them, and masks.
            return last // 4 + 2 * components
        return last + 2 * components


class _Workspace:
    """The buffers of one layout of lanes, kept from shard to shard and from pass to pass."""

    def __init__(self, task: EStep, n_max: int, device: torch.device) -> None:
        d = task.n_features
        self.task: EStep | None = None
        self._d, self._n_max, self.device = d, n_max, device
        by_features = [group for group in task.groups if not self._is_by_itself(group)]
        self._n_samples = torch.zeros((), dtype=torch.float64, device=device)
        self._features = {
            dtype: Features(d, n_max, _kinds(by_features, dtype), dtype, device)
            for dtype in {group.features[1] for group in by_features}
        }
        self._passes = [self._form(group) for group in task.groups]
        self._checks: dict[int, _Float32Check] = {}

    def begin(self, task: EStep) -> None:
        """Take the parameters of a pass."""
        if self.device.type == "cuda" and torch.float32 in self._features:
            _say_if_tf32()
        for lanes, group in zip(self._passes, task.groups, strict=True):
            lanes.begin(group)
        for i, group in enumerate(task.groups):
            if group.checks and i in self._checks:
                self._checks[i].begin(group)
        self.task = task

    def run(self, rows: ShardRows) -> PassStatistics:
        task = self.task
        assert task is not None
        by_chunks = [form for form in self._passes if not isinstance(form, _COMPILED)]
        for form in by_chunks:
            form.clear()
        self._n_samples.zero_()
        for chunk in rows.chunks(task.width(self.device)):
            for features in self._features.values():
                features.fill(chunk.X)
            for form in by_chunks:
                form.add(chunk)
            weight = chunk.sample_weight
            self._n_samples += chunk.X.shape[1] if weight is None else weight.sum()
        checks, checked = self._check_float32(task, rows)
        pairs = zip(self._passes, checks, strict=True)
        groups = tuple(
            lanes.statistics(rows, of_group)
            if isinstance(lanes, _COMPILED)
            else lanes.statistics(of_group)
            for lanes, of_group in pairs
        )
        return PassStatistics(groups, float(self._n_samples), checked)

    def _is_by_itself(self, group: LaneBatch) -> bool:
        """Say whether a group's form makes its own features, if any."""
        is_screened = group.precision is Precision.CENTRED and self.device.type != "cpu"
        return is_screened or _is_compiled(group, self.device)

    def _form(self, group: LaneBatch) -> Form:
        if _is_compiled(group, self._n_samples.device):
            return (DenseForm if group.all_pairs else PrunedForm)(group, self._d)
        if self._is_by_itself(group):
            return ScreenedForm(group, self._d, self._n_max, self.device)
        form = CentredForm if group.precision is Precision.CENTRED else _products(self.device)
        return form(group, self._features[group.features[1]], self._n_max)

    def _check_float32(
        self, task: EStep, rows: ShardRows
    ) -> tuple[list[Float64[Tensor, "3 _"]], float]:
        """Hold float32 against float64 on every so-manieth row, where groups check.

        Return, per group and lane, Σ w e, Σ (w e)² and Σ w s: e is the error of log p in float32, s
        the number of components that matter to a row; and Σ w.
        """
        sums = [self._n_samples.new_zeros(3, len(group.sizes)) for group in task.groups]
        checking = [i for i, group in enumerate(task.groups) if group.checks]
        checked = torch.zeros_like(self._n_samples)
        some = rows.every(task.check_every).chunks(task.width(self.device))
        for chunk in some if checking else ():
            weights = chunk.weights
            checked += weights.sum()
            for i in checking:
                error, survivors = self._check(i, task.groups[i])(chunk.X)
                weighted = error * weights
                parts = (weighted.sum(1), weighted.square().sum(1), survivors @ weights)
                sums[i] += torch.stack(parts)
        return sums, float(checked) if checking else 0.0

    def _check(self, i: int, group: LaneBatch) -> _Float32Check:
        if i not in self._checks:
            self._checks[i] = _Float32Check(group, self._d, self._n_max, self._n_samples.device)
            self._checks[i].begin(group)
        return self._checks[i]


class _Float32Check:
    """Holds float32 log-densities of a few rows against float64 ones."""

    def __init__(self, group: LaneBatch, d: int, n_max: int, device: torch.device) -> None:
        kinds, products = {group.covariance_type}, _products(device)
        self._passes = [
            products(group, Features(d, n_max, kinds, dtype, device), n_max)
            for dtype in (torch.float32, torch.float64)
        ]

    def begin(self, group: LaneBatch) -> None:
        """Take the parameters of a pass."""
        for lanes in self._passes:
            lanes.begin(group)

    def __call__(self, X: Tensor) -> tuple[Float64[Tensor, "L n"], Float64[Tensor, "L n"]]:
        """Return the errors of log p, nats, of rows X (d, n), and how many components matter."""
        for lanes in self._passes:
            lanes.features.fill(X)
        single, double = (lanes.log_norm() for lanes in self._passes)
        return single.double() - double, self._passes[-1].survivors(X.shape[1])


@contextmanager
def _denormals_as_zeros() -> Iterator[None]:
    """Have this thread take numbers below the smallest normal one for zero, while we compute.

    Far components have such responsibilities. As zeros they cost nothing; as denormals they
    made softmax 8 times and the second product 3 times slower.
    """
    were_zeros = 5e-324 * 1.0 == 0.0  # no one else in the process may notice that we changed it
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_zeros)


@functools.cache
def _said_tf32() -> None:
    logger.warning(
        "this process rounds float32 products on GPUs to TF32: log-densities of float32 passes are "
        "off by 0.007 nats on average; switch it off: torch.set_float32_matmul_precision('highest')"
    )


def _say_if_tf32() -> None:
    if rounds_to_tf32():
        _said_tf32()


_local = threading.local()


def _workspace(task: EStep, device: torch.device) -> _Workspace:
    """Return this thread's buffers for the task; only those of the last layout are kept."""
    n_max = chunk_rows(task.width(device), device)
    key = (task.n_features, device, n_max, tuple(group.layout for group in task.groups))
    if getattr(_local, "key", None) != key:
        _local.key = _local.workspace = None  # freed before the next is made
        _local.key, _local.workspace = key, _Workspace(task, n_max, device)
    workspace: _Workspace = _local.workspace
    if workspace.task is not task:
        workspace.begin(task)
    return workspace


def release() -> None:
    """Let go of this thread's buffers on a GPU; those on the CPU are small, and kept."""
    workspace: _Workspace | None = getattr(_local, "workspace", None)
    if workspace is not None and workspace.device.type != "cpu":
        _local.key = _local.workspace = None


def _is_compiled(group: LaneBatch, device: torch.device) -> bool:
    centred = group.precision is Precision.CENTRED
    return centred and group.compiled and device.type == "cpu" and can_compile()


def _products(device: torch.device) -> type[ProductForm]:
    return ProductForm if device.type == "cpu" else GpuProductForm


def _kinds(groups: Sequence[LaneBatch], dtype: torch.dtype) -> set[str]:
    return {group.features[0] for group in groups if group.features[1] == dtype}


@dataclass(frozen=True, slots=True)
class SumMoments:
    """The task that sums the first two moments of all rows, in float64.

    Not `whole`: of the second ones only the squares.
    """

    n_features: int
    whole: bool = True

    def __call__(self, rows: ShardRows) -> TotalMoments:
        device, d = rows.device, self.n_features
        sums = torch.zeros((d if self.whole else 1) + 1, d, dtype=torch.float64, device=device)
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        largest = 0.0
        for chunk in rows.chunks(d):
            x = chunk.X.double()
            weight = chunk.weights
            weighted = x * weight
            sums[0] += weighted.sum(1)
            if self.whole:
                sums[1:].addmm_(weighted, x.T)
            else:
                sums[1] += (weighted * x).sum(1)
            counts += torch.stack([weight.sum(), (weight > 0).sum(), weight.square().sum()])
            largest = max(largest, float(weight.max()))
        n_samples, n_rows, sum_ww = counts.tolist()
        sum_x, sum_xx = sums[0].cpu(), (sums[1:] if self.whole else sums[1]).cpu()
        return TotalMoments(
            n_samples=n_samples,
            n_rows=int(n_rows),
            sum_x=sum_x,
            sum_xx=sum_xx,
            sum_ww=sum_ww,
            max_weight=largest,
            compiles=device.type == "cpu" and may_compile(),
            float64_price=float64_price(device),
        )
