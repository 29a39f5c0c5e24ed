"""Rows on their way from the lake to resident blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gmm_dist.lake.load import LakeLoader, SumColumns, column_means, count_rows, loader_for
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.read import RowCounts
from gmm_dist.shards.local import LocalShards


def write(folder: Path, **columns: object) -> Plan:
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=70)
    return plan_lake(str(folder), n_shards=3, missing="mean")


def local(loader: LakeLoader) -> LocalShards:
    return LocalShards([loader(shard) for shard in range(loader.plan.n_shards)])


def test_rows_are_centred_in_float64_before_they_are_cast(tmp_path: Path) -> None:
    x = 1e9 + np.random.default_rng(0).normal(size=200)
    plan = write(tmp_path, x=x)
    loader = LakeLoader(plan=plan, centre=np.array([1e9]), dtype=torch.float32)
    held = torch.cat([loader(shard).blocks[0].X[0] for shard in range(3)])
    assert held.dtype == torch.float32
    np.testing.assert_array_equal(held.numpy(), (x - 1e9).astype(np.float32))


def test_the_centre_is_in_the_rows_whatever_an_outlier_does(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(50.0, 1.0, size=200)
    x[3] = 1e9
    loader = loader_for(write(tmp_path, x=x, y=x.astype(np.float32)))
    assert abs(loader.centre[0] - 50) < 1


def test_float64_sources_stay_float64_while_they_are_small_or_rounding_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    near = rng.normal(size=1000)
    far = np.where(np.arange(1000) % 2, 1e7, -1e7) + rng.normal(size=1000)
    cases = {"near": (near, torch.float32), "far": (far, torch.float64)}
    for name, (x, dtype) in cases.items():
        (tmp_path / name).mkdir()
        plan = write(tmp_path / name, x=x)
        assert loader_for(plan).dtype == torch.float64
        monkeypatch.setattr("gmm_dist.lake.load._SMALL_BYTES", 0)
        assert loader_for(plan).dtype == dtype
        monkeypatch.undo()
    (tmp_path / "single").mkdir()
    assert loader_for(write(tmp_path / "single", x=far.astype(np.float32))).dtype == torch.float32


def test_missing_values_become_the_mean_of_all_rows_that_have_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 1, size=200), rng.normal(-3, 2, size=200)
    x[[3, 150]], y[42] = np.nan, np.nan
    loader = loader_for(write(tmp_path, x=x, y=y))
    means = column_means(local(loader), loader)
    np.testing.assert_allclose(means, [np.nanmean(x), np.nanmean(y)], rtol=1e-12)
    filled = LakeLoader(plan=loader.plan, centre=loader.centre, dtype=loader.dtype, fill=means)
    rows = torch.cat([filled(shard).blocks[0].X for shard in range(3)], dim=1)
    assert rows[0, 150].item() + loader.centre[0] == pytest.approx(np.nanmean(x), rel=1e-12)
    counted = local(filled).run(count_rows)
    assert (counted.n_rows, counted.counts) == (200, RowCounts(read=200, imputed=3))


def test_a_column_without_any_value_has_a_mean_of_its_centre(tmp_path: Path) -> None:
    loader = loader_for(write(tmp_path, x=np.full(10, np.nan), y=np.arange(10.0)))
    total = local(loader).run(SumColumns(2))
    assert total.counts.tolist() == [0, 10]
    assert np.isfinite(column_means(local(loader), loader)).all()


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.arange(2.0)}), tmp_path / "a.parquet")
    plan = plan_lake(str(tmp_path), n_shards=5)
    loaded = [
        LakeLoader(plan=plan, centre=np.zeros(1), dtype=torch.float32)(shard) for shard in range(5)
    ]
    assert sum(rows.n_rows for rows in loaded) == 2
    assert LocalShards(loaded).run(count_rows).n_rows == 2


def parts(loader: LakeLoader) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows to be fitted, the held-out ones, and the latter's weights."""
    loaded = [loader(shard) for shard in range(loader.plan.n_shards)]
    fitted = torch.cat([block.X for rows in loaded for block in rows.blocks], 1)
    held = [block for rows in loaded for block in rows.held_out]
    weight = torch.cat([block.sample_weight for block in held])
    return fitted, torch.cat([block.X for block in held], 1), weight


def test_held_out_rows_lie_beside_the_others_with_their_weights(tmp_path: Path) -> None:
    x = np.arange(200.0)
    pq.write_table(pa.table({"x": x, "w": 2 * x + 1}), tmp_path / "a.parquet", row_group_size=70)
    plan = plan_lake(str(tmp_path), weight_column="w", columns=["x"], n_shards=3, holdout=0.25)
    loader = LakeLoader(plan=plan, centre=np.array([100.0]), dtype=torch.float64)
    fitted, held, weight = parts(loader)
    assert 30 < held.shape[1] < 70
    assert torch.equal(torch.cat([fitted, held], 1).sort()[0][0] + 100, torch.from_numpy(x))
    assert torch.equal(weight, 2 * (held[0] + 100) + 1)
    counted = local(loader).run(count_rows)
    assert counted.n_rows == fitted.shape[1] == 200 - held.shape[1]
    assert counted.counts == RowCounts(read=200, held_out=held.shape[1])
    assert (
        LakeLoader(plan=plan_lake(str(tmp_path)), centre=loader.centre, dtype=loader.dtype)(
            0
        ).held_out
        == []
    )


def test_held_out_rows_are_filled_with_the_means_of_the_others(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(5, 1, size=200)
    missing = np.arange(0, 200, 9)
    x[missing] = np.nan
    pq.write_table(pa.table({"x": x, "i": np.arange(200.0)}), tmp_path / "a.parquet")
    plan = plan_lake(str(tmp_path), n_shards=3, missing="mean", weight_column="i", holdout=0.25)
    loader = loader_for(plan)
    means = column_means(local(loader), loader)
    held = np.zeros(200, dtype=bool)
    held[parts(loader)[2].long().numpy()] = True
    assert held[missing].any()
    assert not held[missing].all()
    assert means[0] == pytest.approx(np.nanmean(x[~held]), rel=1e-12)
    assert abs(means[0] - np.nanmean(x)) > 1e-3
    _, rows, number = parts(
        LakeLoader(plan=plan, centre=loader.centre, dtype=loader.dtype, fill=means)
    )
    filled = rows[0, np.isnan(x[number.long().numpy()])] + loader.centre[0]
    np.testing.assert_allclose(filled, means[0], rtol=1e-12)
