"""Lists of one length, however they are written, are embeddings; anything else is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server

from gmm_dist.errors import SchemaError, TooFewRows, UserError
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.probe import probe
from gmm_dist.lake.read import RowCounts
from gmm_dist.lake.stream import row_groups, stream
from gmm_dist.nightly import gate

ROWS = [[float(i), i + 0.5] for i in range(12)]


def tensors(rows: list[Any], shape: list[int]) -> pa.Array:
    size = int(np.prod(shape))
    type_ = pa.fixed_shape_tensor(pa.float32(), shape)
    return pa.ExtensionArray.from_storage(type_, pa.array(rows, pa.list_(pa.float32(), size)))


KINDS = {
    "list": pa.list_(pa.float32()),
    "large list": pa.large_list(pa.float64()),
    "list view": pa.list_view(pa.float32()),
    "large list view": pa.large_list_view(pa.float64()),
    "fixed size": pa.list_(pa.float64(), 2),
}


def written(rows: list[Any], kind: str) -> pa.Array:
    return tensors(rows, [2]) if kind == "tensor" else pa.array(rows, KINDS[kind])


@pytest.mark.parametrize("kind", [*KINDS, "tensor"])
def test_lists_of_any_kind_keep_their_rows_over_nulls_and_cuts(tmp_path: Path, kind: str) -> None:
    rows: list[Any] = [list(row) for row in ROWS]
    rows[0] = rows[7] = None
    rows[4] = [None, 4.5]
    lakes.write(tmp_path / "a.parquet", {"emb": written(rows, kind)}, rows_per_group=9)
    for n_shards in (1, 5):
        plan = plan_lake(str(tmp_path), missing="mean", n_shards=n_shards)
        assert (plan.columns, plan.feature_names) == (("emb",), ("emb[0]", "emb[1]"))
        X, _, counts = lakes.read_all(plan)
        assert counts == RowCounts(read=12, imputed=5)
        assert np.flatnonzero(np.isnan(X).any(axis=1)).tolist() == [0, 4, 7]
        good = [i for i in range(12) if i not in (0, 4, 7)]
        assert X[good].tolist() == [ROWS[i] for i in good]
        assert X[4, 1] == 4.5
    assert len(lakes.read_all(plan_lake(str(tmp_path), missing="drop", n_shards=5))[0]) == 9
    assert len(probe(plan)) == 9


@pytest.mark.parametrize("kind", [*KINDS, "tensor"])
def test_the_model_finds_them_by_the_names_of_its_features(tmp_path: Path, kind: str) -> None:
    path = lakes.write(tmp_path / "a.parquet", {"emb": written(ROWS, kind), "id": range(12)})
    options = {"columns": ["emb[0]", "emb[1]"], "missing": "mean", "keep": ["id", "emb"]}
    plan = plan_lake(str(path), where="id > 2", **options)
    assert plan.feature_names == ("emb[0]", "emb[1]")
    parts = list(stream(plan, 0, row_groups(plan)[0]))
    assert np.concatenate([X for _, X in parts], axis=1).T.tolist() == ROWS[3:]
    assert [row for kept, _ in parts for row in kept["emb"].to_pylist()] == ROWS[3:]


def test_files_of_all_kinds_are_one_lake(tmp_path: Path) -> None:
    for number, kind in enumerate([*KINDS, "tensor"]):
        lakes.write(tmp_path / f"{number}.parquet", {"emb": written(ROWS, kind)})
    lakes.write(tmp_path / "z.parquet", {"emb": pa.nulls(1)})
    plan = plan_lake(str(tmp_path), missing="drop")
    assert plan.float64_source
    assert plan.first_list is None  # a type tells the length
    X, _, counts = lakes.read_all(plan)
    assert X.tolist() == ROWS * 6
    assert counts.dropped == 1


@pytest.mark.parametrize("kind", list(KINDS)[:4])
def test_a_list_of_another_length_is_named(tmp_path: Path, kind: str) -> None:
    lakes.write(tmp_path / "a.parquet", {"emb": written([None, *ROWS], kind)})
    rows = [ROWS[0], None, [1.0, 2.0, 3.0], []]
    lakes.write(tmp_path / "b.parquet", {"i": range(4), "emb": written(rows, kind)})
    message = (
        r"b.parquet, row group 0, row 2: the list in column 'emb' has 3 numbers, but 2 in "
        r".*a.parquet, row group 0, row 1; write lists of one length, or leave out such rows with"
    )
    plan = plan_lake(str(tmp_path), missing="drop")
    assert len(probe(plan)) == 13
    with pytest.raises(UserError, match=message) as caught:
        lakes.read_all(plan)
    assert "\n" not in str(caught.value)
    scored = plan_lake(str(tmp_path), columns=["emb[0]", "emb[1]"], missing="mean")
    with pytest.raises(UserError, match=r"b.parquet, .*row 2: .* has 3 numbers, but 2; write"):
        list(stream(scored, 1, row_groups(scored)[1]))
    assert len(lakes.read_all(plan_lake(str(tmp_path), missing="drop", where="i < 2"))[0]) == 1


def test_the_first_list_that_matches_tells_the_length(tmp_path: Path) -> None:
    rows = [[1.0], None, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    columns = {"emb": pa.array(rows, pa.list_(pa.float32())), "model": ["a", "b", "b", "b"]}
    lakes.write(tmp_path / "a.parquet", columns, rows_per_group=2)
    plan = plan_lake(str(tmp_path), where="model == 'b'", missing="drop")
    assert plan.first_list == f"{tmp_path}/a.parquet, row group 1, row 0"
    assert lakes.read_all(plan)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(
        TooFewRows, match="no list that is not null or empty in rows that match, in 1 Par"
    ):
        plan_lake(str(tmp_path), where="model == 'ab'", missing="drop", columns=["emb"])


def test_a_tensor_has_as_many_features_as_numbers(tmp_path: Path) -> None:
    rows = np.arange(12.0).reshape(2, 6).tolist()
    lakes.write(tmp_path / "a.parquet", {"t": tensors(rows, [2, 3])})
    plan = plan_lake(str(tmp_path))
    assert plan.n_features == 6
    assert lakes.read_all(plan)[0].tolist() == rows


@pytest.mark.parametrize(
    "values", [pa.float16(), pa.int32(), pa.int64(), pa.uint8(), pa.decimal128(25, 1)]
)
def test_numbers_of_any_type_make_a_list(tmp_path: Path, values: pa.DataType) -> None:
    rows = pa.array([[1, 2], [3, 4]], pa.list_(pa.int8()))
    column = pa.ListArray.from_arrays(rows.offsets, rows.values.cast(pa.int64()).cast(values))
    lakes.write(tmp_path / "a.parquet", {"e": column})
    plan = plan_lake(str(tmp_path), columns=["e"])
    assert lakes.read_all(plan)[0].tolist() == [[1, 2], [3, 4]]


def test_what_is_chosen_among_lists(tmp_path: Path) -> None:
    lists = {
        "tokens": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
        "emb": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
    }
    lakes.write(tmp_path / "a.parquet", {"id": [1, 2], **lists})
    assert plan_lake(str(tmp_path)).columns == ("emb",)
    lakes.write(tmp_path / "a.parquet", {"fixed": lakes.embeddings([[1], [2]]), **lists})
    assert plan_lake(str(tmp_path)).columns == ("fixed",)
    lakes.write(tmp_path / "a.parquet", {"x": [1.0, 2.0], **lists})
    assert plan_lake(str(tmp_path)).columns == ("x",)
    lakes.write(tmp_path / "a.parquet", {"other": lists["emb"], **lists})
    with pytest.raises(SchemaError, match="no floating-point column and 2 columns of lists of"):
        plan_lake(str(tmp_path))
    lakes.write(tmp_path / "a.parquet", {"e": pa.array([None, None], pa.list_(pa.float32()))})
    with pytest.raises(
        UserError, match="column 'e' has no list that is not null or empty, in 1 Parquet"
    ):
        plan_lake(str(tmp_path), missing="drop")


def test_the_gate_sees_no_difference_between_kinds_of_lists(tmp_path: Path) -> None:
    kinds = []
    for kind in ("list", "fixed size"):
        path = lakes.write(tmp_path / f"{kind}.parquet", {"emb": written(ROWS, kind)})
        plan = plan_lake(str(path))
        kinds.append(gate.kinds(plan.schema, plan.columns))
    assert kinds == [{"emb": "list of 2 floating"}] * 2


def test_on_s3_one_list_is_read_and_not_the_file(tmp_path: Path, s3_lake: S3Server) -> None:
    wide = pa.array(np.random.default_rng(0).normal(size=(4000, 100)).tolist())
    table = pa.table({"emb": wide.cast(pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    url = lakes.upload(tmp_path, s3_lake.file_system(), s3_lake.url)
    plan = plan_lake(url)
    assert plan.n_features == 100
    np.testing.assert_array_equal(
        lakes.read_all(plan)[0], lakes.read_all(plan_lake(str(tmp_path)))[0]
    )


def test_empty_lists_are_no_features(tmp_path: Path) -> None:
    columns = {"emb": pa.array([[], [1.0], [2.0]], pa.list_(pa.float32()))}
    lakes.write(tmp_path / "a.parquet", columns)
    plan = plan_lake(str(tmp_path), missing="drop")
    assert plan.n_features == 1
    with pytest.raises(UserError, match="row 0: the list in column 'emb' has 0 numbers, but 1 in"):
        lakes.read_all(plan)
    nothing = {"emb": pa.array([[]], pa.list_(pa.float32(), 0)), "row": [1]}
    lakes.write(tmp_path / "a.parquet", nothing)
    with pytest.raises(SchemaError, match=r"column 'emb' has type fixed_size_list.*; name numeric"):
        plan_lake(str(tmp_path), columns=["emb"], missing="drop")


@pytest.mark.parametrize("columns", [None, ["e"], ["e[0]", "e[1]"]])
def test_what_a_model_could_not_find_again_is_refused(
    tmp_path: Path, columns: list[str] | None
) -> None:
    # It would be fitted to the columns of these names, and score the lists.
    numbers = {"e[0]": [1.0, 2.0], "e[1]": [3.0, 4.0], "e": [[5.0, 6.0], [7.0, 8.0]]}
    path = lakes.write(tmp_path / "a.parquet", numbers)
    message = rf"^{path}: 'e\[0\]' is a column and the first feature of the lists in column 'e'; re"
    with pytest.raises(UserError, match=message):
        plan_lake(str(tmp_path), columns=columns)
