"""Rows that users hand in: a loaded model and the estimators take and refuse the same ones."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch

from gmm_dist import GaussianMixture, Lake, Mixture, Parameters, UserError
from gmm_dist.model.arrays import NotFinite

NAN = float("nan")
EYES = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
MEANS = torch.tensor([[0.0, 9.0], [9.0, 0.0]], dtype=torch.float64)
MODEL = Mixture(
    parameters=Parameters(
        weights=torch.full((2,), 0.5, dtype=torch.float64),
        means=MEANS,
        covariances=EYES,
        covariance_type="full",
    ),
    feature_names=("x", "y"),
)
BARE = Mixture(parameters=MODEL.parameters)
ROWS = [[0.0, 9.0], [9.0, 0.0]]


def frame(rows=ROWS, names="xy") -> pd.DataFrame:
    return pd.DataFrame(np.array(rows), columns=list(names))


def holed(kind: str) -> pd.DataFrame:
    """Return a frame of a nullable kind, with NA in the second row's second column."""
    return frame().astype(kind).mask(np.array([[False, False], [False, True]]))


@pytest.fixture
def estimator() -> GaussianMixture:
    """The face of scikit-learn on the same mixture, of columns x and y."""
    start = {"weights_init": [0.5, 0.5], "means_init": MEANS, "precisions_init": EYES}
    return GaussianMixture(2, max_iter=0, **start).fit(frame())


TABLES = {
    "a frame": frame(),
    "whole numbers": frame([[0, 9], [9, 0]]),
    "nullable": frame().astype("Int64"),
    "of arrow": frame().astype("double[pyarrow]"),
    "a table": pa.table({"x": [0.0, 9.0], "y": [9.0, 0.0]}),
    "a record batch": pa.record_batch({"x": [0.0, 9.0], "y": [9.0, 0.0]}),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_of_the_models_features_are_taken(table, estimator):
    assert MODEL.predict(table).tolist() == estimator.predict(table).tolist() == [0, 1]
    assert MODEL.score_samples(table).dtype == np.float64
    assert MODEL.bic(table) == MODEL.bic(np.array(ROWS))


def test_a_polars_frame_is_taken_by_name():
    polars = pytest.importorskip("polars")
    assert MODEL.predict(polars.DataFrame({"x": [0.0, 9.0], "y": [9.0, 0.0]})).tolist() == [0, 1]
    with pytest.raises(UserError, match="must be in the same order"):
        MODEL.predict(polars.DataFrame({"y": [9.0], "x": [0.0]}))


OTHER_COLUMNS = {
    "swapped": (frame()[["y", "x"]], "must be in the same order as they were in fit"),
    "foreign": (frame(names="ab"), "unseen at fit time: a, b; .*yet now missing: x, y"),
    "one missing": (frame()[["y"]], "yet now missing: x"),
    "one more": (frame().assign(z=1.0), "unseen at fit time: z"),
    "twice the same": (pd.concat([frame(), frame()], axis=1), "unique column names"),
    "a table": (pa.table({"y": [9.0], "x": [0.0]}), "must be in the same order"),
    "a batch": (pa.record_batch({"y": [9.0], "x": [0.0]}), "must be in the same order"),
}


@pytest.mark.parametrize(("table", "message"), OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_tables_of_other_columns_are_refused(table, message, estimator):
    for verb in (MODEL.predict, MODEL.predict_proba, MODEL.score_samples, MODEL.score):
        with pytest.raises(UserError, match=f"{message}.*: give rows .n, 2., .*order .x, y.$"):
            verb(table)
    for verb in (MODEL.bic, MODEL.aic, MODEL.icl):
        with pytest.raises(UserError, match=message):
            verb(table)
    with pytest.raises(ValueError):  # noqa: PT011 - in the words of scikit-learn
        estimator.predict(table)


def test_a_model_without_names_takes_columns_by_position():
    with pytest.warns(UserWarning, match="X has feature names, but Mixture was fitted without"):
        assert BARE.predict(frame()).tolist() == [0, 1]
    assert BARE.predict(ROWS).tolist() == [0, 1]


BY_POSITION = {
    "a list": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "objects": np.array(ROWS, object),
    "text that spells numbers": np.array([["0", "9"], ["9", "0"]]),
    "columns without names": pd.DataFrame(ROWS),
    "float16": np.array(ROWS, np.float16),
    "int8": np.array(ROWS, np.int8),
    "uint64": np.array(ROWS, np.uint64),
    "bool": np.array(ROWS, bool),
    "long double": np.array(ROWS, np.longdouble),
    "big-endian": np.array(ROWS, ">f4"),
    "column-major": np.asfortranarray(ROWS),
    "every other": np.repeat(np.array(ROWS), 2, axis=0)[::2],
    "read-only": np.frombuffer(np.array(ROWS).tobytes()).reshape(2, 2),
    "nothing masked": np.ma.array(ROWS, mask=False),
    "with a gradient": torch.tensor(ROWS, requires_grad=True),
    "bfloat16": torch.tensor(ROWS, dtype=torch.bfloat16),
    "integer tensor": torch.tensor(ROWS).int(),
    "boolean tensor": torch.tensor(ROWS).bool(),
    "turned tensor": torch.tensor(ROWS).T,
}


@pytest.mark.parametrize("rows", BY_POSITION.values(), ids=BY_POSITION)
def test_rows_without_names_are_taken_in_the_features_order(rows, estimator):
    labels = MODEL.predict(rows)
    assert labels.tolist() == [0, 1]
    assert isinstance(labels, torch.Tensor if isinstance(rows, torch.Tensor) else np.ndarray)
    assert MODEL.icl(rows) == pytest.approx(MODEL.bic(rows), abs=1e-2)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        assert estimator.predict(rows).tolist() == [0, 1]


NO_NUMBERS = {
    "NaN": ([[0.0, 9.0], [1.0, NAN]], "NaN: row 1, column 'y'"),
    "None": ([[0.0, 9.0], [1.0, None]], "NaN: row 1, column 'y'"),
    "-inf": (np.array([[1.0, 2.0], [3.0, -np.inf]]), "infinity .* row 1, column 'y'"),
    "beyond float64": ([[1, 2], [3, 10**400]], "too large"),
    "float32": (np.array([[1, 2], [3, NAN]], np.float32), "NaN: row 1, column 'y'"),
    "opposite infinities": (np.array([[0, np.inf], [0, -np.inf]]), "infinity .* row 0, column 'y'"),
    "a frame": (frame([[0.0, 9.0], [1.0, NAN]]), "NaN: row 1, column 'y'"),
    "NA of Int64": (holed("Int64"), "NaN: row 1, column 'y'"),
    "NA of Float64": (holed("Float64"), "NaN: row 1, column 'y'"),
    "NA of arrow": (holed("double[pyarrow]"), "NaN: row 1, column 'y'"),
    "null of a table": (pa.table({"x": [0, 1], "y": [0, None]}), "NaN: row 1, column 'y'"),
    "masked": (np.ma.array(ROWS, mask=[[0, 0], [0, 1]]), "a masked value: row 1, column 1"),
    "a tensor": (torch.tensor([[0.0, 9.0], [1.0, NAN]]), "NaN: row 1, column 'y'"),
    "float16 tensor": (torch.tensor([[0, 9], [1, float("inf")]]).half(), "infinity"),
}


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize(("rows", "message"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_missing_or_not_finite_is_refused_by_row_and_column(rows, message, estimator):
    with pytest.raises(UserError, match=f"^[^\\n]*{message}[^\\n]*$"):
        MODEL.predict(rows)
    for verb in (estimator.predict, GaussianMixture().fit):
        with pytest.raises((ValueError, OverflowError), match=re.split("[ :]", message)[0]):
            verb(rows)


NO_ROWS = {
    "complex": (np.array(ROWS) + 0j, "Complex data not supported"),
    "a complex frame": (frame(np.array(ROWS) + 0j), "Complex data not supported"),
    "a complex tensor": (torch.tensor(ROWS) + 0j, "Complex data not supported"),
    "complex objects": (np.array([[1j, 2]], object), "not 'complex'"),
    "words": (frame([["a", "b"]]), "could not convert string to float: 'a'"),
    "sparse": (scipy.sparse.csr_matrix(ROWS), "Sparse data was passed"),
    "a sparse tensor": (torch.tensor(ROWS).to_sparse(), "sparse tensor"),
    "one row": (np.zeros(2), "Expected 2D array, got 1D array instead"),
    "a column": (pd.Series([0.0, 9.0]), "Expected a 2-dimensional container"),
    "three axes": (np.zeros((2, 2, 2)), "dim 3"),
    "three axes of a tensor": (torch.zeros(2, 2, 2), "got 3D array"),
    "ragged": ([[1.0], [2.0, 3.0]], "inhomogeneous"),
    "instants": (
        np.array([[0, "NaT"]], "M8[s]"),
        r"X holds dates, times or durations \(datetime64",
    ),
    "durations": (np.zeros((2, 2), "m8[D]"), r"X holds dates, times or durations \(timedelta64"),
    "a frame of dates": (
        frame().astype("int32").astype("date32[day][pyarrow]"),
        r"dates, .* \(date32\[day\]",
    ),
    "a table with a time": (
        pa.table({"x": [0.0], "y": pa.array([0], pa.timestamp("us"))}),
        r"dates, times or durations \(timestamp\[us\]\)",
    ),
    "structured": (
        np.zeros(2, [("x", "f8"), ("y", "f8")]),
        "X is a structured array: give a table",
    ),
    "a meta tensor": (torch.empty(2, 2, device="meta"), "X is a meta tensor: give a dense one"),
    "lazy": (type("LazyFrame", (), {})(), r"X is a LazyFrame, .*: give X.collect\(\)"),
    "a number": (3.0, "scalar"),
    "nothing": (None, "scalar"),
    "a mapping": ({"x": [0.0]}, "not 'dict'"),
    "a path": ("s3://lake/points", "a place and no rows"),
    "a lake": (Lake(url="s3://lake/points"), "`gmm-dist score` writes the label"),
}


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize(("rows", "message"), NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_rows_is_refused_in_one_line(rows, message, estimator):
    with pytest.raises((UserError, TypeError), match=f"^[^\\n]*{message}[^\\n]*$"):
        MODEL.predict(rows)
    with pytest.raises((ValueError, TypeError)):
        estimator.predict(rows)


def test_that_a_value_is_missing_is_told_of_unnamed_columns_by_number():
    with pytest.raises(NotFinite, match="Input X contains NaN: row 2, column 1; drop or impute"):
        GaussianMixture().fit(np.array([[0, 1], [2, 3], [4, NAN]]))
    with pytest.raises(UserError, match="Input X contains NaN: row 0, column 0; "):
        BARE.predict([[NAN, NAN]])


def test_sums_that_overflow_are_no_infinity():
    rows = np.full((3, 2), 1.7e308)
    assert (MODEL.score_samples(rows) < -1e300).all()


def test_masked_weights_are_no_weights():
    weight = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])
    with pytest.raises(NotFinite, match="Input sample_weight contains a masked value: row 1;"):
        GaussianMixture().fit(np.eye(3), sample_weight=weight)
