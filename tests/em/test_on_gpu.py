"""Passes on a pretended CUDA device: the CPU's results, few waits, no sum in chance's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mixtures
import pytest
import torch
from pretended_cuda import PretendCuda, Tally, pretended_cuda, tallied, to_cuda
from torch import Tensor

from gmm_dist import chunks
from gmm_dist.config import EMConfig
from gmm_dist.em import evaluate, loop
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.forms.product_form import ProductForm
from gmm_dist.em.gpu import residence
from gmm_dist.em.gpu.product_form import GpuProductForm
from gmm_dist.em.lane import Lane, grouped, task_of
from gmm_dist.em.lane_batch import KEPT, LaneBatch, Precision
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.lake.load import SumColumns
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import ParameterStack
from gmm_dist.selection import kmeans, merging, spikes
from gmm_dist.selection.coreset import DrawCoreset, whitening
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, HeldOut, ShardRows
from gmm_dist.shards.tree_sum import TreeSum, run_on
from gmm_dist.streams import Stream

N, D = 300, 6
SIZES = (4, 2, 5)


def values(result: Any) -> Iterator[Tensor]:
    """Yield all numbers in a result, which must lie on the host."""
    assert not isinstance(result, PretendCuda), "left on the device"
    if isinstance(result, Tensor):
        yield result.double()
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield torch.tensor(float(result), dtype=torch.float64)
    elif isinstance(result, tuple | list):
        for part in result:
            yield from values(part)
    elif dataclasses.is_dataclass(result):
        for part in dataclasses.fields(result):
            yield from values(getattr(result, part.name))


def shard(n: int = N, *, weighted: bool = False, seed: int = 0, number: int = 0) -> ShardRows:
    X = mixtures.normal_rows(n, D, seed=seed).T.float().contiguous()
    weight = mixtures.row_weights(n, seed=seed) if weighted else None
    return ShardRows(shard=number, blocks=[Block(X, weight)])


def moved(rows: ShardRows) -> ShardRows:
    """Return a shard on the pretended device."""
    blocks = [
        Block(to_cuda(b.X), None if b.sample_weight is None else to_cuda(b.sample_weight))
        for b in rows.blocks
    ]
    held = [Block(to_cuda(b.X)) for b in rows.held_out]
    return ShardRows(shard=rows.shard, blocks=blocks, counts=rows.counts, held_out=held)


def on_gpu(task: Any, *shards: ShardRows) -> tuple[Any, Tally]:
    """Return the sum of some shards there, and what one pass over them took."""
    there = [moved(rows) for rows in shards]
    with pretended_cuda():
        run_on(task, there, len(there))  # buffers are made
        with tallied() as tally:
            (partial,) = run_on(task, there, len(there))
    return partial.summary, tally


def on_cpu(task: Any, *shards: ShardRows) -> Any:
    (partial,) = run_on(task, shards, len(shards))
    return partial.summary


def pass_of(kind: str, precision: str, sizes: tuple[int, ...] = SIZES, d: int = D) -> EStep:
    """Return the pass of lanes with random parameters."""
    lanes = [mixtures.parameters(kind, k, d, seed=k) for k in sizes]
    if precision == "centred":
        thetas = [natural(ParameterStack.of([lane])).theta for lane in lanes]
        return EStep((LaneBatch.of(lanes, thetas, Precision.CENTRED),), d)
    started = [Lane.start(lane, EMConfig(precision=precision)) for lane in lanes]
    return task_of(grouped(started), N)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float64", "auto"])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_pass_has_the_cpus_results_and_no_float_atomics(
    kind: str, precision: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GpuProductForm, "kept", KEPT)  # to count the survivors that a CPU counts
    task, rows = pass_of(kind, precision), shard(weighted=weighted)
    there, tally = on_gpu(task, rows)
    # Of float32 the softmax rounds otherwise than the CPU's.
    agree(there, on_cpu(task, rows), 1e-12 if precision == "float64" else 3e-6)
    assert not tally.atomics, tally


def agree(there: Any, here: Any, tol: float = 1e-12) -> None:
    """Hold numbers against others, relative to the largest of a tensor."""
    for a, b in zip(values(there), values(here), strict=True):
        atol = tol * max(float(b.abs().max()), 1.0) if b.numel() else tol
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut chunks on the device at 64 rows."""
    monkeypatch.setattr(chunks, "_CUDA", chunks._Limits(1, 64, 64))


def cost_of_chunks(task: EStep) -> tuple[float, Tally]:
    """Return the waits for each further chunk of a shard, and the tally of a shard of many."""
    _, one = on_gpu(task, shard(64))
    _, many = on_gpu(task, shard(64 * 9))
    return (many.n_syncs - one.n_syncs) / 8, many


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("precision", ["float32", "float64", "auto"])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_dense_forms_wait_for_no_chunk(kind: str, precision: str) -> None:
    waits, tally = cost_of_chunks(pass_of(kind, precision))
    assert waits == 0, tally
    assert tally.n_syncs <= 3, tally


def _reads_each_chunk(add: Any) -> Any:
    def mutant(self: ProductForm, chunk: Block) -> None:
        add(self, chunk)
        assert self._log_likelihood[0].item() < 0

    return mutant


def _copies_each_chunk(add: Any) -> Any:
    def mutant(self: ProductForm, chunk: Block) -> None:
        add(self, chunk)
        assert self._log_likelihood.cpu().isfinite().all()

    return mutant


def _adds_by_atomics(add: Any) -> Any:
    def mutant(self: ProductForm, chunk: Block) -> None:
        add(self, chunk)
        zeros = self._log_likelihood.new_zeros(len(self._log_likelihood))
        where = torch.arange(len(zeros), device=zeros.device)
        self._log_likelihood.index_add_(0, where, zeros)

    return mutant


def _mixes_devices(add: Any) -> Any:
    def mutant(self: ProductForm, chunk: Block) -> None:
        add(self, chunk)
        self._log_likelihood.add_(torch.zeros(len(self._log_likelihood), dtype=torch.float64))

    return mutant


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("mutate", [_reads_each_chunk, _copies_each_chunk])
def test_a_form_that_waits_is_caught(
    mutate: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProductForm, "add", mutate(ProductForm.add))
    waits, _ = cost_of_chunks(pass_of("full", "float64"))
    assert waits >= 1


def test_atomics_and_operands_on_two_devices_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    task = pass_of("full", "float64")
    with monkeypatch.context() as patched:
        patched.setattr(ProductForm, "add", _adds_by_atomics(ProductForm.add))
        _, tally = on_gpu(task, shard())
        assert tally.atomics, tally
    monkeypatch.setattr(ProductForm, "add", _mixes_devices(ProductForm.add))
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        on_gpu(task, shard())


def _task(name: str) -> Any:
    total = on_cpu(SumMoments(D), shard(weighted=True))
    mixture = mixtures.parameters("full", 3, D, seed=1)
    whiten = whitening(total)
    centres = whiten(mixtures.normal_rows(5, D, seed=9))
    merges = ((0, 1), (0, 2))
    makers: dict[str, Callable[[], Any]] = {
        "SumMoments": lambda: SumMoments(D),
        "SumMoments, variances": lambda: SumMoments(D, whole=False),
        "Score": lambda: HeldOut(evaluate.Score((mixture,))),
        "SumScores": lambda: evaluate.SumScores(mixture),
        "Tally": lambda: evaluate.Tally((mixture,)),
        "DrawCoreset": lambda: DrawCoreset.of(total, 50, Stream.SAMPLE, 0),
        "DrawOne": lambda: kmeans._DrawOne(0, D),
        "DrawFar": lambda: kmeans._DrawFar(
            whitening=whiten, centres=centres, oversampling=10, random_state=0, round=1
        ),
        "CountNearest": lambda: kmeans._CountNearest(whiten, centres),
        "Draw": lambda: spikes._Draw(50, D),
        "SumPairs": lambda: merging.SumPairs(
            mixture=mixture, by_entropy=(0, 1, 2), by_misclassification=(0, 1, 2)
        ),
        "SumTrees": lambda: merging.SumTrees(mixture, (merges,)),
        "SumColumns": lambda: SumColumns(D),
    }
    return makers[name]()


TASKS = (
    "SumMoments, SumMoments: variances, Score, SumScores, Tally, DrawCoreset, DrawOne, DrawFar, "
    "CountNearest, Draw, SumPairs, SumTrees, SumColumns"
)


@pytest.mark.parametrize("name", [part.replace(":", ",") for part in TASKS.split(", ")])
def test_a_task_has_the_cpus_results(name: str) -> None:
    task, rows = _task(name), shard(weighted=True)
    rows = ShardRows(shard=0, blocks=rows.blocks, held_out=shard(seed=3).blocks)
    there, tally = on_gpu(task, rows)
    if isinstance(there, TotalMoments):
        there = dataclasses.replace(there, float64_price=0.0)
    agree(there, on_cpu(task, rows))
    assert not tally.atomics, tally


@pytest.mark.parametrize("on_card", [False, True], ids=["M-step here", "M-step there"])
@pytest.mark.parametrize("precision", ["float64", "auto"])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_fit_in_memory_has_the_cpus_results(
    kind: str, precision: str, on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_card:
        monkeypatch.setattr(residence, "_LARGE", 0)
    X = torch.cat([mixtures.normal_rows(150, 3) - 3, mixtures.normal_rows(150, 3, seed=1) + 3])
    starts = [mixtures.parameters(kind, 2, 3, seed=seed) for seed in (0, 1)]
    config = EMConfig(max_iter=8, tol=0.0, precision=precision)
    here = LocalShards.of(X, n_shards=2, n_threads=0)
    # On the card that is pretended, auto has no use for float32.
    exactly = dataclasses.replace(config, precision="float64")
    reference = loop.fit(here, starts, exactly, here.run(SumMoments(3)))
    with pretended_cuda():
        there = LocalShards([moved(rows) for rows in here._shards], n_threads=0)
        results = loop.fit(there, starts, config, there.run(SumMoments(3)))
    for result, expected in zip(results, reference, strict=True):
        agree(result.parameters, expected.parameters, 1e-9)
        assert result.n_iter == expected.n_iter


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_subtrees_are_added_there_with_the_bits_of_sums_here(kind: str) -> None:
    """Seven shards: three complete subtrees, and no other bytes of moments come to the host."""
    task = pass_of(kind, "float64", sizes=(3,))
    shards = [shard(40 + i, seed=i, number=i) for i in range(7)]
    there = [moved(rows) for rows in shards]
    with pretended_cuda():
        run_on(task, there, 8)
        with tallied() as tally:
            partials = run_on(task, there, 8)
        each = [run_on(task, [rows], 8)[0] for rows in there]
    here: TreeSum[Any] = TreeSum(8)
    for partial in each:  # landed one by one, and added on the host
        here.push(partial)
    assert [(p.level, p.index) for p in partials] == [(2, 0), (1, 2), (0, 6)]
    for a, b in zip(partials, here.partials, strict=True):
        agree(a.summary, b.summary, tol=0.0)
    of_one = sum(value.nbytes for value in values(partials[0].summary))
    assert tally.host_bytes <= 3 * of_one + 7 * 8, tally
    assert tally.n_syncs <= 7 * 1 + 3, tally
