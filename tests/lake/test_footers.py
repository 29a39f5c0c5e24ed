"""What footers tell before a row is read: nulls, indices of pandas; and that asking is cheap."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmm_dist.errors import SchemaError, UserError
from gmm_dist.lake.filters.text import parse
from gmm_dist.lake.parquet import footers
from gmm_dist.lake.plan import plan_lake

FLOATS = [0.5, 1.5, 2.5]


def frame(index: Any) -> pd.DataFrame:
    return pd.DataFrame({"x": [1.0, 2.0, 4.0]}, index=index)


@pytest.mark.parametrize(
    "index",
    [
        FLOATS,
        pd.Index(FLOATS, name="when"),
        pd.MultiIndex.from_arrays([FLOATS, FLOATS], names=["a", None]),
        pd.MultiIndex.from_arrays([FLOATS, [1, 2, 3]], names=["gr\u00f6\u00dfe", "b"]),
        pd.RangeIndex(3),
        pd.RangeIndex(3, name="i"),
    ],
)
def test_an_index_of_pandas_is_no_default_feature(tmp_path: Path, index: Any) -> None:
    frame(index).to_parquet(tmp_path / "a.parquet")
    assert plan_lake(str(tmp_path)).columns == ("x",)


def test_an_index_is_a_feature_for_those_who_name_it(tmp_path: Path) -> None:
    frame(pd.Index(FLOATS, name="when")).to_parquet(tmp_path / "a.parquet")
    assert plan_lake(str(tmp_path), columns=["when", "x"]).columns == ("when", "x")
    assert plan_lake(str(tmp_path), columns=["x"], weight_column="when").weight_column == "when"


def test_a_copy_of_such_a_file_is_known_by_the_name(tmp_path: Path) -> None:
    columns = {"x": FLOATS, "__index_level_0__": FLOATS, "__index_level_x__": FLOATS}
    lakes.write(tmp_path / "a.parquet", columns)
    assert plan_lake(str(tmp_path)).columns == ("x", "__index_level_x__")


def test_an_index_in_one_file_is_one_in_all(tmp_path: Path) -> None:
    frame(pd.Index(FLOATS, name="when")).to_parquet(tmp_path / "a.parquet")
    lakes.write(tmp_path / "b.parquet", {"x": FLOATS, "when": FLOATS})
    assert plan_lake(str(tmp_path)).columns == ("x",)


def test_nothing_but_indices_is_told(tmp_path: Path) -> None:
    pd.DataFrame({"i": [1, 2, 3]}, index=FLOATS).to_parquet(tmp_path / "a.parquet")
    message = r"no floating-point column .* \('__index_level_0__': an index of pandas\); name the"
    with pytest.raises(SchemaError, match=message):
        plan_lake(str(tmp_path))


@pytest.mark.parametrize("said", [b"no json", b"[]", b'{"index_columns": 5}', b"{}", b'"x"'])
def test_what_is_not_pandas_word_is_passed_over(said: bytes) -> None:
    schema = pa.schema([("x", pa.float64())], metadata={b"pandas": said})
    assert footers.index_columns(schema) == frozenset()


def test_a_line_says_which_columns_are_used_and_which_could_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {
        "x": FLOATS,
        "y\n": FLOATS,
        "w": FLOATS,
        "id": [1, 2, 3],
        "name": ["a", "b", "c"],
        "emb": [[1.0, 2.0]] * 3,
    }
    pd.DataFrame(columns, index=FLOATS).to_parquet(tmp_path / "k=1.parquet")
    with caplog.at_level(logging.INFO, "gmm_dist.lake.plan"):
        plan_lake(str(tmp_path), weight_column="w")
    assert caplog.messages[-1] == (
        "2 features: x, 'y\\n'; weights: w; numeric columns left out: id (int64), "
        "emb (list<element: double>), __index_level_0__ (an index of pandas)"
    )


def test_the_line_is_short_for_a_wide_lake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {f"{'c' * 300}{i}": [1.0] for i in range(500)}
    wide |= {f"{'i' * 300}{i}": [1] for i in range(500)}
    lakes.write(tmp_path / "a.parquet", wide)
    with caplog.at_level(logging.INFO, "gmm_dist.lake.plan"):
        plan_lake(str(tmp_path))
    assert len(caplog.messages[-1]) < 2500
    assert "and 488 more" in caplog.messages[-1]
    with pytest.raises(UserError) as caught:
        plan_lake(str(tmp_path), columns=["nope"])
    assert len(str(caught.value)) < 3000


# --- nulls


def holed(path: Path, **options: Any) -> Path:
    columns = {"x": [1.0, 2.0, 3.0, 4.0], "y": [1.0, 2.0, None, None], "i": [1, 2, 3, 4]}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2, **options)
    return path


def test_nulls_are_told_from_the_footer(tmp_path: Path) -> None:
    holed(tmp_path / "a.parquet")
    message = (
        f"^{tmp_path}/a.parquet, row group 1: column 'y' has 2 nulls; pass missing=.drop. or "
        "impute such rows first$"
    )
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path))
    assert plan_lake(str(tmp_path), columns=["x"]).n_rows == 4
    for missing in ("drop", "mean"):
        assert plan_lake(str(tmp_path), missing=missing).n_rows == 4


def test_a_filter_by_row_may_leave_nulls_out_and_one_by_file_too(tmp_path: Path) -> None:
    holed(tmp_path / "k=1" / "a.parquet")
    lakes.write(tmp_path / "k=2" / "a.parquet", {"x": [5.0], "y": [6.0], "i": [5]})
    assert len(lakes.read_all(plan_lake(str(tmp_path), where="i != 3 and i != 4"))[0]) == 3
    with pytest.raises(UserError, match="row 0: column 'y' is null"):
        lakes.read_all(plan_lake(str(tmp_path), where="i > 2"))
    assert len(lakes.read_all(plan_lake(str(tmp_path), where="k == 2"))[0]) == 1
    with pytest.raises(UserError, match=r"k=1/a\.parquet, row group 1: column 'y' has 2 nulls"):
        plan_lake(str(tmp_path), where="k == 1")


def test_where_footers_do_not_tell_the_load_does(tmp_path: Path) -> None:
    holed(tmp_path / "a.parquet", write_statistics=False)
    plan = plan_lake(str(tmp_path))
    with pytest.raises(UserError, match="row group 1, row 0: column 'y' is null; pass missing="):
        lakes.read_all(plan)


def test_a_lists_nulls_are_told_and_those_of_other_columns_are_not(tmp_path: Path) -> None:
    columns = {
        "a": pa.array([{"y": None}], pa.struct([("y", pa.float64()), ("z", pa.float64())])),
        "a.y": pa.array([None], pa.string()),
        "m": pa.array([[("k", None)]], pa.map_(pa.string(), pa.float64())),
        "t": pa.array([[1.0, None]]),
        "x": [1.0],
    }
    lakes.write(tmp_path / "a.parquet", columns)
    assert plan_lake(str(tmp_path)).columns == ("x",)
    message = "column 't' has 1 null, lists or elements of them; pass missing=.drop."
    for names in (["t"], ["t[0]", "t[1]"]):
        with pytest.raises(UserError, match=message):
            plan_lake(str(tmp_path), columns=names)


# --- wide lakes, many files


def test_planning_takes_time_in_line_with_the_columns(tmp_path: Path) -> None:
    def seconds(n: int) -> float:
        path = tmp_path / str(n)
        path.mkdir()
        for name in "ab":
            lakes.write(path / f"{name}.parquet", {f"c{i}": [0.5, 1.5] for i in range(n)})

        def once() -> float:
            began = time.process_time()
            plan = plan_lake(str(path))
            assert plan.n_features == n
            assert lakes.read_all(plan)[0].shape == (4, n)
            return time.process_time() - began

        return min(once() for _ in range(3))  # other work on the machine costs time, too

    seconds(100)  # what is loaded once
    # A search in each schema for each column took sixteen times as long for four times as many.
    assert seconds(4000) < 8 * seconds(1000) + 0.5


def test_a_filter_of_thousands_of_comparisons_is_planned(tmp_path: Path) -> None:
    n = 2000
    lakes.write(
        tmp_path / "a.parquet", {"x": np.arange(n) / 2, "id": np.arange(n)}, rows_per_group=20
    )
    text = " and ".join(f"id != {i}" for i in range(9000) if i % 100 > 90 or i < 100)
    plan = plan_lake(str(tmp_path), columns=["id"], where=text)
    expected = [i for i in range(n) if not (i % 100 > 90 or i < 100)]
    assert lakes.read_all(plan)[0][:, 0].tolist() == expected
    text = " and ".join(f"id > {i}" for i in range(9000))
    with pytest.raises(
        UserError, match=r"no rows match the filter id > 0 and id > 1 and .*; widen"
    ) as caught:
        plan_lake(str(tmp_path), columns=["id"], where=text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.b",
        "dep delay",
        "gr\u00f6\u00dfe",
        "x" * 300,
        "\x1b[31m",
        "component",
        "X",
        "class",
        "a`b",
    ],
)
def test_columns_of_any_name_are_read_and_filtered(tmp_path: Path, name: str) -> None:
    columns = {"x": [1.0, 2.0], name: [3.0, 4.0], "a": [{"b": 1}, {"b": 2}]}
    lakes.write(tmp_path / "a.parquet", columns)
    plan = plan_lake(str(tmp_path), where=f"col({name!r}) > 3")
    assert plan.columns == ("x", name)
    assert lakes.read_all(plan)[0].tolist() == [[2, 4]]
    assert parse(plan.where.text) == plan.where
    with pytest.raises(UserError) as caught:
        plan_lake(str(tmp_path), columns=["nope"], where=f"col({name!r}) > 'u'")
    assert str(caught.value).isprintable()
    with pytest.raises(UserError) as caught:
        plan_lake(str(tmp_path), where=f"col({name!r}) > 'u'")
    assert str(caught.value).isprintable()
