"""The centred form of a GPU, on a pretended one: the CPU's sums, whatever its rough screen says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mixtures
import pytest
import torch
from pretended_cuda import pretended_cuda, to_cuda
from test_on_gpu import agree, cost_of_chunks, on_cpu, on_gpu, pass_of, shard, short_chunks
from torch import Tensor

from gmm_dist.em.estep import EStep
from gmm_dist.em.gpu import half_screen, screened_form
from gmm_dist.em.gpu.half_screen import HalfScreen, half_error
from gmm_dist.em.gpu.screened_form import ScreenedForm
from gmm_dist.em.lane_batch import KEPT, KEPT_ON_GPU, LaneBatch, Precision, left_out
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.protocol import Block, ShardRows

__all__ = ["short_chunks"]


@pytest.fixture
def same_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the GPU count the components that the CPU counts."""
    monkeypatch.setattr(screened_form, "KEPT_ON_GPU", KEPT)


def task_for(*lanes: Parameters) -> EStep:
    thetas = [natural(ParameterStack.of([lane])).theta for lane in lanes]
    return EStep((LaneBatch.of(lanes, thetas, Precision.CENTRED),), lanes[0].n_features)


@pytest.mark.usefixtures("same_cut")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_screened_pass_has_the_cpus_results_and_no_float_atomics(
    kind: str, weighted: bool
) -> None:
    task, rows = pass_of(kind, "centred"), shard(weighted=weighted)
    there, tally = on_gpu(task, rows)
    agree(there, on_cpu(task, rows), 1e-11)
    assert not tally.atomics, tally


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_it_waits_twice_for_a_chunk_and_little_for_a_shard(kind: str) -> None:
    waits, tally = cost_of_chunks(pass_of(kind, "centred"))
    assert waits <= 2, tally
    assert tally.n_syncs - 2 * 9 <= 6, tally


def test_what_is_left_out_is_as_much_as_is_said() -> None:
    task, rows = pass_of("full", "centred", sizes=(40,)), shard(2000)
    there, here = on_gpu(task, rows)[0].groups[0], on_cpu(task, rows).groups[0]
    lacking = float(here.log_likelihood - there.log_likelihood) / 2000
    survivors = float(there.survivors) / 2000
    assert 0 < survivors < 40
    assert -1e-13 < lacking <= left_out(40, survivors, KEPT_ON_GPU) < 1.1e-9


@pytest.mark.usefixtures("same_cut")
@pytest.mark.parametrize("tile", [1, 3, 64])
@pytest.mark.parametrize("at_once", [1, 1 << 25])
def test_tiles_of_any_size(tile: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened_form, "TILE", tile)
    monkeypatch.setattr(screened_form, "_AT_ONCE", at_once)
    task, rows = pass_of("full", "centred", sizes=(3, 9)), shard(100, weighted=True)
    agree(on_gpu(task, rows)[0], on_cpu(task, rows), 1e-11)


def of_columns(X: Tensor, weight: Tensor | None = None) -> ShardRows:
    return ShardRows(shard=0, blocks=[Block(X.contiguous(), weight)])


@pytest.mark.usefixtures("same_cut")
@pytest.mark.parametrize("size", [1e2, 1e5, 1e20, 1e150])
def test_a_row_far_out_spoils_no_other_and_counts_as_on_a_cpu(size: float) -> None:
    """It sets the scale of the halves: the others' logits are all rough then."""
    X = mixtures.normal_rows(60, 6).T.clone()
    X[:, 7] *= size
    task = pass_of("full", "centred", sizes=(5,))
    agree(on_gpu(task, of_columns(X))[0], on_cpu(task, of_columns(X)), 1e-11)


@pytest.mark.usefixtures("same_cut")
def test_rows_of_no_weight_add_nothing() -> None:
    weight = mixtures.row_weights(60)
    weight[::3] = 0.0
    task, X = pass_of("full", "centred", sizes=(5, 3)), mixtures.normal_rows(60, 6).T
    some = on_gpu(task, of_columns(X[:, weight > 0], weight[weight > 0]))[0]
    agree(on_gpu(task, of_columns(X, weight))[0], some, 1e-11)


@pytest.mark.usefixtures("same_cut")
@pytest.mark.parametrize("kind", ["full", "diag"])
@pytest.mark.parametrize(("spread", "width"), [(1e3, 1.0), (3.0, 1e-4), (1e6, 1e-3)])
def test_components_that_are_tight_and_far_from_the_centre(
    kind: str, spread: float, width: float
) -> None:
    """Neither halves nor float32 can tell them; those that float32 cannot count for all rows."""
    lane = mixtures.parameters(kind, 6, 4, spread=spread)
    lane = replace(lane, covariances=lane.covariances * width**2)
    X = lane.means[torch.arange(90) % 6] + width * mixtures.normal_rows(90, 4)
    task = task_for(lane)
    agree(on_gpu(task, of_columns(X.T))[0], on_cpu(task, of_columns(X.T)), 1e-9)


def test_halves_err_as_much_as_is_expected_of_them() -> None:
    d, k = 24, 12
    lane = mixtures.parameters("full", k, d, spread=1.0)
    stack = ParameterStack.of([lane])
    theta, X = natural(stack).theta, mixtures.rows(lane, 400).T.float().contiguous()
    with pretended_cuda():
        screen = HalfScreen(d, 400, to_cuda(X).device)
        screen.begin(to_cuda(theta))
        rough = screen(to_cuda(X)).cpu().double()
    i, j = half_screen.product_pairs(d)
    x = X.double()
    features = torch.cat([torch.ones(1, 400), x, x.square(), x[i] * x[j]])
    exact = (theta @ features).T
    near = exact > exact.amax(1, keepdim=True) - 30
    errors = (rough - exact).abs()[near]
    assert 0 < float(errors.mean()) < 0.05
    assert float(errors.max()) < 5 * float(half_error(stack, theta).max())


def _wrong(screen: Any, by: float) -> Any:
    def mutant(self: HalfScreen, X: Tensor) -> Tensor:
        logits = screen(self, X)
        logits[:, 0] += by
        return logits

    return mutant


@pytest.mark.usefixtures("same_cut")
@pytest.mark.parametrize("by", [-0.6, 0.6, 50.0, float("nan")])
def test_a_screen_that_errs_is_found_out(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pairs that survive: those of a component that a screen denies are missed, as is said."""
    monkeypatch.setattr(HalfScreen, "__call__", _wrong(HalfScreen.__call__, by))
    task, rows = pass_of("full", "centred", sizes=(4,)), shard(weighted=True)
    agree(on_gpu(task, rows)[0], on_cpu(task, rows), 1e-11)


def test_without_that_check_it_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HalfScreen, "__call__", _wrong(HalfScreen.__call__, 50.0))
    monkeypatch.setattr(
        ScreenedForm, "_bad", lambda self, logits, *rest: logits.new_zeros(len(logits)).bool()
    )
    task, rows = pass_of("full", "centred", sizes=(4,)), shard()
    with pytest.raises(AssertionError):
        agree(on_gpu(task, rows)[0], on_cpu(task, rows), 1e-11)


def test_the_same_bits_twice_and_nothing_of_an_empty_shard() -> None:
    task, rows = pass_of("full", "centred"), shard()
    agree(on_gpu(task, rows)[0], on_gpu(task, rows)[0], 0.0)
    none = on_gpu(task, of_columns(torch.empty(6, 0)))[0]
    assert none.n_samples == 0
    assert not none.groups[0].moments.any()
