"""A snapshot between any two passes: going on from it gives the same bits."""

from __future__ import annotations

import json

import mixtures
import pytest
import safetensors.torch
import torch

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.lane import Snapshot, restore_lanes
from gmm_dist.em.lane_batch import Precision
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import sweep


def rows():
    """Return rows on which lanes leap, fall behind, and change their precision."""
    X = mixtures.rows(mixtures.parameters("full", 5, 3, spread=2), 1500, seed=3)
    return (X - X.mean(0)) * torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)


def through_files(snapshot: Snapshot) -> Snapshot:
    """Return what is left of a snapshot that has been written and read."""
    tensors = {name: t.contiguous().clone() for name, t in snapshot.tensors.items()}
    return Snapshot(
        safetensors.torch.load(safetensors.torch.save(tensors)),
        json.loads(json.dumps(snapshot.state)),
    )


def swept(X, candidates, config, **options) -> SweepResult:
    start = StartConfig(n_init=2, moves=0)
    return sweep(mixtures.shards(X, [400, 900]), candidates, config, start, n_features=3, **options)


def assert_same_bits(one: SweepResult, other: SweepResult) -> None:
    assert one.n_passes == other.n_passes
    for mine, theirs in zip(one.scored, other.scored, strict=True):
        mixtures.assert_same(mine.fit.parameters, theirs.fit.parameters, rtol=0, atol=0)
        assert mine.fit.lower_bounds == theirs.fit.lower_bounds
        assert mine.fit.status is theirs.fit.status
        assert (mine.bic, mine.icl) == (theirs.bic, theirs.icl)
        assert mine.outcome.passes_saved == theirs.outcome.passes_saved
        assert mine.outcome.n_dropped == theirs.outcome.n_dropped


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_sweep_goes_on_from_any_pass_to_the_same_bits(accelerate, precision):
    X = rows()
    candidates = [Candidate(k, kind) for kind in COVARIANCE_TYPES for k in (2, 7)]
    config = EMConfig(tol=1e-7, max_iter=40, precision=precision, accelerate=accelerate)
    kept = {}
    whole = swept(X, candidates, config, keep=lambda n, take: kept.update({n: take()}))
    # The first holds the starts that the search has found.
    assert sorted(kept) == list(range(whole.n_passes + 1))
    lanes = [lane for snapshot in kept.values() for lane in restore_lanes(snapshot)]
    if accelerate:
        assert any(lane.is_leaping for lane in lanes)
    if precision == "auto":
        assert {lane.precision for lane in lanes} >= {Precision.FLOAT32, Precision.FLOAT64}
    for number in sorted({0, 1, 3, whole.n_passes // 2, whole.n_passes}):
        again = swept(X, candidates, config, resume=through_files(kept[number]))
        assert_same_bits(again, whole)


def test_a_race_resumed_before_its_mending_is_mended():
    """Two rows far off take a component for themselves; what replaces it comes after the race."""
    X = rows()
    X[:2] += torch.tensor([40.0, 4e4, 0.04], dtype=torch.float64)
    config, candidates = EMConfig(max_iter=30), [Candidate(3, "full")]
    kept = {}
    whole = swept(X, candidates, config, keep=lambda n, take: kept.update({n: take()}))
    for snapshot in kept.values():
        assert_same_bits(swept(X, candidates, config, resume=through_files(snapshot)), whole)
