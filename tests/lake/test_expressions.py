"""Filters that are expressions of pyarrow's: which are taken, what they leave out, their text."""

from __future__ import annotations

import datetime as dt
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gmm_dist import Lake, UserError
from gmm_dist.errors import NoRows
from gmm_dist.lake.filters.expressions import ArrowFilter
from gmm_dist.lake.plan import Plan, plan_lake
from gmm_dist.lake.read import read

NAN = float("nan")


def write(path: Path, columns: dict[str, object], rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)


def plan(path: Path, where: pc.Expression) -> Plan:
    return plan_lake(str(path), columns=["id"], where=where)


def ids(path: Path, where: pc.Expression) -> list[float]:
    found = plan(path, where)
    return [
        float(x) for i in range(found.n_shards) for rows in read(found, i) for x in rows.X[:, 0]
    ]


def groups(path: Path, where: pc.Expression) -> list[int]:
    """Return the row groups that a plan reads of a lake's one file."""
    return sorted({part.row_group for shard in plan(path, where).shards for part in shard})


@pytest.fixture
def table(tmp_path):
    write(
        tmp_path / "x.parquet",
        {
            "id": [0.0, 1, 2, 3, 4, 5],
            "n": pa.array([1, 2, 3, None, None, None], pa.int32()),
            "v": [1.0, NAN, 5.0, 5.0, None, 9.0],
            "s": ["a", "b", "c", "d", None, "ä"],
            "day": pa.array([dt.date(2026, 11, i) for i in (1, 2, 3, 4, 5, 6)]),
            "money": pa.array([1, 2, 3, 4, 5, 6], pa.decimal128(8, 2)),
            "it's\na": [1, 2, 3, 4, 5, 6],
            "point": [{"x": i} for i in range(6)],
        },
    )
    return tmp_path


@pytest.mark.parametrize(
    ("where", "expected", "read_of"),
    [
        (pc.field("n") >= 3, [2], [1]),
        (pc.field("n").is_null(), [3, 4, 5], [1, 2]),
        (~(pc.field("n") < 2), [1, 2], [0, 1]),
        (pc.field("v") > 6, [5], [2]),
        (pc.field("v") == 1, [0], [0]),
        (~(pc.field("v") == 1), [1, 2, 3, 5], [0, 1, 2]),  # 1 and NaN alone, by the footer 1
        (~(pc.field("v") >= 1), [1], [0, 1, 2]),
        (pc.field("v") < pa.scalar(NAN), [], [0, 1, 2]),
        # Arrow takes a number for less than NaN where it looks at ranges, and nowhere else.
        (~((pc.field("v") < pa.scalar(NAN)) | pc.field("v").is_nan()), [0, 2, 3, 5], [0, 1, 2]),
        (pc.field("s").isin(["d", "ä"]), [3, 5], [1, 2]),
        ((pc.field("n") == 1) | (pc.field("v") == 9), [0, 5], [0, 2]),
        (pc.field("day") >= dt.date(2026, 11, 5), [4, 5], [2]),
        (pc.field("money") == pa.scalar(3, pa.decimal128(8, 2)), [2], [1]),
        (pc.field("it's\na") == 4, [3], [1]),
        (pc.field("point", "x") == 4, [4], [0, 1, 2]),
        (pc.field("n") / 2 == 1, [1, 2], [0, 1]),
        (pc.field("v").cast("int8") == 1, UserError, [0, 1, 2]),
    ],
    ids=str,
)
def test_row_groups_are_left_out_where_none_of_their_rows_can_pass(table, where, expected, read_of):
    assert groups(table, where) == read_of
    if expected is UserError:
        with pytest.raises(UserError, match=r"filter .* cannot be taken: .*nan.*; correct the"):
            ids(table, where)
    else:
        assert ids(table, where) == expected


def test_no_row_can_match(table):
    with pytest.raises(NoRows, match=r"no rows match the filter \(n > 9\), by the row groups' st"):
        plan(table, pc.field("n") > 9)


def test_files_are_left_out_by_their_path_and_other_columns_are_asked_in_those_left(tmp_path):
    for i, (key, values) in enumerate({"1": [1, 2], "2": [3, 4], "3": [5, 6]}.items()):
        write(tmp_path / f"k={key}" / "x.parquet", {"id": [2.0 * i, 2.0 * i + 1], "n": values})
    (tmp_path / "k=3" / "x.parquet").write_bytes(b"PAR1 damaged PAR1")
    assert ids(tmp_path, pc.field("k") < 2) == [0, 1]
    assert ids(tmp_path, (pc.field("k") < 3) & (pc.field("n") > 3)) == [3]
    either = ((pc.field("k") == 1) & (pc.field("n") == 1)) | (
        (pc.field("k") == 2) & (pc.field("n") == 4)
    )
    assert ids(tmp_path, either) == [0, 3]
    with pytest.raises(NoRows, match="by any of 3 files' hive keys"):
        plan(tmp_path, (pc.field("k") > 3) & (pc.field("n") > 3))


def test_a_column_means_the_same_in_all_files(tmp_path):
    """What 1 / 2 is depends on its type; and a column that a file lacks is null there."""
    nulls = pa.nulls(2, pa.int32())
    write(tmp_path / "a.parquet", {"id": [0.0, 1], "n": [1, 1], "more": [1, None], "half": nulls})
    write(tmp_path / "b.parquet", {"id": [2.0, 3], "n": [1.5, 0.5], "half": [7, 0.5]})
    write(tmp_path / "c.parquet", {"id": [4.0], "n": [0.5]})
    assert ids(tmp_path, pc.field("n") / 2 > 0.4) == [0, 1, 2]
    assert ids(tmp_path, pc.field("more").is_null()) == [1, 2, 3, 4]
    assert ids(tmp_path, pc.coalesce(pc.field("more"), 7) == 7) == [1, 2, 3, 4]
    assert ids(tmp_path, pc.coalesce(pc.field("half"), 7) / 2 == 3.5) == [0, 1, 2, 4]


def own_function() -> pc.Expression:
    name = "a_function_of_my_own"
    types = {"x": pa.int32()}
    if name not in pc.list_functions():
        pc.register_scalar_function(
            lambda context, x: x, name, {"summary": "", "description": ""}, types, pa.int32()
        )
    return pc.Expression._call(name, [pc.field("n")]) > 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda: pc.field(0) > 1, r"sent to workers: .*field_refs; name columns by pc.field\('na"),
        (own_function, "it calls 'a_function_of_my_own', which workers do not have; use pyarrow's"),
        (lambda: pc.scalar(True), "it names no column; name one by pc.field"),
        (lambda: pc.field("n") + 1, "its values are int32, not true or false; correct the filter"),
        (lambda: pc.field("n") > "x", r"no kernel matching input types \(int32, string\)"),
        (lambda: pc.cumulative_sum(pc.field("n")) > 1, "cannot Execute non-scalar expression"),
        (lambda: pc.field("nope") > 1, "no column 'nope'; columns are id, n, v, .*; correct"),
        (lambda: pc.field("point", "y") > 1, "No match for FieldRef"),
        (lambda: ["n > 1"], "a filter of type list cannot be taken; write it as text, or as an"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_a_line(table, where, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(table, where())
    assert "\n" not in str(caught.value)


EXPRESSIONS = """
import pyarrow as pa, pyarrow.compute as pc

found = [
    pc.field("a") == pa.scalar(1, pa.int8()),
    pc.field("a") == pa.scalar(1, pa.int64()),
    pc.field("a").isin(list(range(100))),
    pc.field("a").isin([*range(50), 49, *range(51, 100)]),
    pc.field("a").isin(pa.array([9, 1, None, 2])[1:3]) & (pc.field("b") != "x"),
    ~pc.is_null(pc.field("a"), nan_is_null=True),
]
"""


def test_texts_are_the_same_in_every_process_and_differ_where_filters_do():
    program = (
        f"{EXPRESSIONS}\nfrom gmm_dist.lake.filters.expressions import ArrowFilter\n"
        "print([ArrowFilter.of(one).text for one in found])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    names: dict[str, list[pc.Expression]] = {}
    exec(EXPRESSIONS, names)
    texts = [ArrowFilter.of(one).text for one in names["found"]]
    assert told == f"{texts}\n"
    assert len(set(texts)) == len(texts)
    assert all("\n" not in text for text in texts)


def test_a_plan_and_a_lake_with_an_expression_are_values(table):
    first, other = plan(table, pc.field("n") > 1), plan(table, pc.field("n") > 2)
    again = pickle.loads(pickle.dumps(first))
    assert again == plan(table, pc.field("n") > 1)
    assert again.hash == first.hash != other.hash
    assert [rows.X.tolist() for rows in read(again, 0)] == [[[1.0]], [[2.0]]]
    lake = Lake(url="x", where=pc.field("n") > 1)
    assert pickle.loads(pickle.dumps(lake)) == lake == Lake(url="x", where=pc.field("n") > 1)
    assert lake != Lake(url="x", where=pc.field("n") > 2)
    assert "where=<(n > 1)>" in repr(lake)
    with pytest.raises(UserError, match="name columns by"):
        Lake(url="x", where=pc.field(0) > 1)
