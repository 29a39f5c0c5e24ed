"""The rows by which a centre is chosen: by their numbers, however they are cut into files."""

from __future__ import annotations

import itertools
from pathlib import Path

import lakes
import numpy as np
import pytest
import torch

from gmm_dist.estimators.local_rows import robust_centre
from gmm_dist.lake import probe as probing
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.probe import probe

NAN, INF = float("nan"), float("inf")


def places(n: int, each: int) -> list[int]:
    """Return the numbers of the rows that are probed among n."""
    firsts = [round(i * (n - each) / 15) for i in range(16)]
    return [first + row for first in firsts for row in range(each)]


@pytest.mark.parametrize("rows_per_group", [40_000, 20_480, 1000, 77])
def test_a_probe_takes_rows_by_their_numbers(tmp_path, rows_per_group):
    x = np.arange(40_000.0)
    lakes.write(tmp_path / "a.parquet", {"x": x, "y": x}, rows_per_group=rows_per_group)
    X = probe(plan_lake(str(tmp_path)), max_rows=160)
    assert X.dtype == np.float64
    assert X[:, 0].tolist() == X[:, 1].tolist() == places(40_000, 10)
    assert probe(plan_lake(str(tmp_path)), max_rows=3)[:, 0].tolist() == [0, 20_000, 39_999]


def test_files_and_shards_play_no_part(tmp_path):
    x = lakes.numbers(30_000)
    cuts = [0, 1, 9_000, 9_001, 17_000, 30_000]
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        lakes.write(tmp_path / f"{i}.parquet", {"x": x[a:b]}, rows_per_group=4096)
    X = probe(plan_lake(str(tmp_path), n_shards=7))
    np.testing.assert_array_equal(X[:, 0], x[places(30_000, 1024)])
    # An array of the same rows has the same centre, to the bit.
    assert np.median(X) == robust_centre(torch.from_numpy(x[:, None])).item()


def test_few_rows_are_all_looked_at(tmp_path):
    x = lakes.numbers(16_384)
    lakes.write(tmp_path / "a.parquet", {"x": x}, rows_per_group=1000)
    np.testing.assert_array_equal(probe(plan_lake(str(tmp_path)))[:, 0], x)


def test_a_place_without_good_rows_is_looked_beyond_up_to_the_next(tmp_path):
    x = np.arange(16_000.0)
    x[[*range(3200, 3260), *range(5_300, 9_000)]] = NAN
    lakes.write(tmp_path / "a.parquet", {"x": x}, rows_per_group=700)
    X = probe(plan_lake(str(tmp_path)), max_rows=160)[:, 0]
    good = [row for row in places(16_000, 10) if not np.isnan(x[row])]
    assert set(good) <= set(X)
    # Of the place at 3198 two rows are good, of the one at 8528 none before 9000; those between
    # have none at all.
    assert [row for row in X if row not in good] == [*range(3260, 3268), *range(9000, 9010)]


def test_a_probe_looks_at_only_so_much_while_it_has_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "_VALUES", 16 * 16)
    x = np.arange(100_000.0)
    x[60_000:] = NAN
    lakes.write(tmp_path / "a.parquet", {"x": x, "y": x})
    X = probe(plan_lake(str(tmp_path)), max_rows=16)
    assert X[:, 0].tolist() == [row for row in places(100_000, 1) if row < 60_000]
    # While there is none, it looks on.
    one = plan_lake(str(tmp_path), where="x == 59_998")
    assert probe(one, max_rows=16)[:, 0].tolist() == [59_998]
    monkeypatch.setattr(probing, "_MOST_VALUES", 16 * 16)
    assert len(probe(one, max_rows=16)) == 0


def bad_rows(folder: Path) -> str:
    x, y = lakes.numbers(10), lakes.numbers(10, 1)
    x[0], y[1] = NAN, INF
    weight = [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    columns = {"x": x, "y": y, "i": range(10), "w": weight}
    return str(lakes.write(folder / "a.parquet", columns, rows_per_group=4))


def test_a_probe_leaves_out_bad_absent_and_filtered_rows(tmp_path):
    options = {"columns": ["x", "y"], "where": "i != 2", "weight_column": "w"}
    plan = plan_lake(bad_rows(tmp_path), **options)
    X = probe(plan)
    np.testing.assert_array_equal(X[:, 0], lakes.numbers(10)[[3, *range(5, 10)]])
    assert probe(plan, max_rows=1).shape == (1, 2)


def test_a_probe_may_find_nothing(tmp_path):
    lakes.write(tmp_path / "a.parquet", {"x": [NAN, 1.0], "i": [1, 3]})
    assert probe(plan_lake(str(tmp_path), where="i <= 2")).shape == (0, 1)
