"""Rows that a user hands in: arrays, tensors, tables; and results of the same kind."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _get_feature_names, check_array, validate_data
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gmm_dist.errors import UserError
from gmm_dist.formats import first_few

Array = npt.NDArray[Any]
Rows = Array | Tensor

_TIME = re.compile(r"[<>=]?(date|time|duration|[mM]8)", re.IGNORECASE)
# Stands for a loaded model, under the name Mixture, where scikit-learn checks rows.
_Loaded: type[BaseEstimator] = type("Mixture", (BaseEstimator,), {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Where results belong: NumPy (`device` None), torch on a device, or another namespace.

    `elsewhere` is that namespace's name for the rows' device, which torch need not know.
    """

    dtype: torch.dtype
    device: torch.device | None = None
    namespace: Any = None
    elsewhere: Any = None

    def of(self, value: Tensor) -> Any:
        """Return a tensor as an array of this kind; real numbers take the rows' dtype."""
        if value.is_floating_point():
            value = value.to(self.dtype)
        if self.device is None:
            return value.cpu().numpy()[()]  # one number is a scalar, as scikit-learn has them
        value = value.to(self.device)
        if self.namespace is None:
            return value
        array = self.namespace.from_dlpack(value)
        return array if self.elsewhere is None else array.to_device(self.elsewhere)


def checked(estimator: BaseEstimator, X: Any, *, reset: bool, n_min: int = 1) -> Rows:
    """Return rows (n, d), finite, float32 or float64; note (`reset`) or check features and names.

    Tensors stay tensors, on their device, and so do arrays that only DLPack can hand over;
    everything else becomes a NumPy array. Raises ValueError and TypeError as scikit-learn does;
    a value that is missing or masked or not finite is named by its row and column.
    """
    rows = _shaped(estimator, _readable(X), reset, n_min)
    _require_finite(rows, getattr(estimator, "feature_names_in_", ()))
    return rows


def checked_for_model(X: Any, n_features: int, names: Sequence[str]) -> Rows:
    """Return rows as `checked` does, for a model that was loaded; there may be none.

    A table's columns must be the model's features, by name and in their order; arrays, tensors
    and tables whose columns have no names of text are taken by position.

    Raises:
        UserError: X is not such rows; one line says why.
        TypeError: X is a path, a lake, sparse, or not of numbers.
    """
    require_rows_in_memory(X)
    try:
        readable, model = _readable(X), _Loaded()
        model.n_features_in_ = n_features
        if names and not isinstance(readable, Tensor) and _get_feature_names(readable) is not None:
            model.feature_names_in_ = np.array(names, dtype=object)
        rows = _shaped(model, readable, reset=False, n_min=0)
        _require_finite(rows, names)
    except (ValueError, OverflowError) as error:
        raise UserError(_one_line(error, n_features, names)) from error
    return rows


class NotFinite(ValueError):  # noqa: N818 - it says what is wrong
    """Report a value among rows that is missing, masked, infinite or not a number."""


def require_rows_or_lake(X: Any) -> None:
    """Raise TypeError for a path: it is neither rows nor a lake."""
    if isinstance(X, str | os.PathLike):
        raise TypeError(
            f"X is {str(X)!r}, a place and no rows: gmm_dist.Lake(...) names those that lie there, "
            "for fit and select"
        )


def require_rows_in_memory(X: Any) -> None:
    """Raise TypeError for a lake, and for a path."""
    # A lake brings its own message: this box does not import `lake`.
    elsewhere = getattr(X, "not_in_memory", None)
    if isinstance(elsewhere, str):
        raise TypeError(elsewhere)
    require_rows_or_lake(X)


def is_foreign(X: Any) -> bool:
    """Say whether X is an array of a namespace that is neither NumPy's nor torch's."""
    return hasattr(X, "__array_namespace__") and not isinstance(X, np.ndarray | np.generic)


def unmasked(values: Any, name: str) -> Any:
    """Return a masked array's values; raise NotFinite where the mask hides any."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    _require_none(np.ma.getmaskarray(values), f"{name} contains a masked value", ())
    return values.data


def space_of(X: Any, rows: Rows) -> Space:
    """Return where results belong: the kind of X, from which `rows` were made."""
    if isinstance(rows, Tensor):
        if isinstance(X, Tensor):
            return Space(dtype=rows.dtype, device=rows.device)
        elsewhere = getattr(X, "device", None)
        return Space(
            dtype=rows.dtype,
            device=rows.device,
            namespace=X.__array_namespace__(),
            elsewhere=elsewhere,
        )
    return Space(dtype=torch.float32 if rows.dtype == np.float32 else torch.float64)


def tensor_of(value: Any) -> Tensor:
    """Return an array or tensor as a float64 tensor on the CPU; never shares an array's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    if is_foreign(value):
        return from_dlpack(value).to("cpu", torch.float64)
    return torch.from_numpy(np.array(value, dtype=np.float64, order="C"))


def viewed(rows: Rows) -> Tensor:
    """Return checked rows as a read-only tensor, without a copy where they are C-contiguous."""
    if isinstance(rows, Tensor):
        return rows
    in_order = rows.flags.c_contiguous and rows.flags.writeable
    return torch.from_numpy(rows) if in_order else tensor_of(rows)


def mean_of(values: Any) -> float:
    """Return the mean of one of our results, of whichever kind it is."""
    return float(from_dlpack(values).mean() if is_foreign(values) else values.mean())


def device_of(setting: str | torch.device) -> torch.device:
    """Return the device that a user names; raise ValueError if it cannot hold float64 rows."""
    try:
        device = torch.device(setting)
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device is {str(setting)!r}, where torch can work on no float64 rows ({reason}): "
            "give another, or None for where the rows are"
        ) from None
    return device


def array_of(value: Any) -> Array:
    """Return an array or tensor as a NumPy array of the same dtype."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return from_dlpack(value).cpu().numpy() if is_foreign(value) else np.asarray(value)


def checked_start(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Return a user's start of that shape in float64; one number may stand in an array of one.

    Raises ValueError in scikit-learn's words.
    """
    array = array_of(value)
    got = array.shape
    # check_array takes no scalars.
    array = np.atleast_1d(array)
    array = check_array(array, dtype=[np.float64, np.float32], ensure_2d=False, allow_nd=True)
    if got != shape and not (shape == () and got == (1,)):
        raise ValueError(f"The parameter '{name}' should have the shape of {shape}, but got {got}")
    return tensor_of(array.reshape(shape))


def _checked_tensor(estimator: BaseEstimator, X: Tensor, reset: bool, n_min: int) -> Tensor:
    kind = next(
        (kind for kind in ("nested", "quantized", "meta") if getattr(X, f"is_{kind}")), None
    )
    if kind is not None:
        raise ValueError(f"X is a {kind} tensor: give a dense one of numbers")
    if X.layout is not torch.strided:
        raise ValueError(f"X is a sparse tensor ({X.layout}): give a dense one, X.to_dense()")
    if X.ndim != 2:
        raise ValueError(f"Expected 2D array, got {X.ndim}D array instead")
    if X.is_complex():
        raise ValueError("Complex data not supported")
    if X.dtype not in (torch.float32, torch.float64):
        X = X.to(torch.float32 if X.is_floating_point() else torch.float64)
    for axis, what, least in ((0, "sample", n_min), (1, "feature", 1)):
        if X.shape[axis] < least:
            raise ValueError(
                f"Found array with {X.shape[axis]} {what}(s) (shape={tuple(X.shape)}) while a "
                f"minimum of {least} is required by {type(estimator).__name__}."
            )
    validate_data(estimator, X, reset=reset, skip_check_array=True)
    return X.detach()


def _readable(X: Any) -> Any:
    """Return X in a form that scikit-learn or torch reads; refuse masked values."""
    if not isinstance(X, Tensor) and is_foreign(X):
        return from_dlpack(X)
    X = unmasked(X, "X")
    _refuse_no_numbers(X)
    pa = sys.modules.get("pyarrow")
    if pa is not None and isinstance(X, pa.RecordBatch):
        return pa.Table.from_batches([X])  # whose names scikit-learn reads
    return X


def _refuse_no_numbers(X: Any) -> None:
    """Raise ValueError for kinds of X that NumPy would misread or not explain."""
    if type(X).__name__ == "LazyFrame":
        raise ValueError("X is a LazyFrame, whose rows are not there yet: give X.collect()")
    if isinstance(X, np.ndarray) and X.dtype.names:
        raise ValueError(
            "X is a structured array: give a table of its columns, or rows of numbers "
            "(numpy.lib.recfunctions.structured_to_unstructured)"
        )
    schema = getattr(X, "schema", None)  # of pyarrow and polars; pandas and NumPy have dtypes
    dtypes = getattr(schema, "types", getattr(X, "dtypes", [getattr(X, "dtype", "")]))
    types = dtypes if hasattr(dtypes, "__iter__") else [dtypes]  # a series has one
    # A missing instant would become the number -9.2e18.
    times = [str(type_) for type_ in types if _TIME.match(str(type_))]
    if times:
        raise ValueError(
            f"X holds dates, times or durations ({times[0]}): give numbers, in a unit of your own"
        )


def _shaped(estimator: BaseEstimator, X: Any, reset: bool, n_min: int) -> Rows:
    """Return rows of numbers (n, d), of the features that the estimator knows."""
    if isinstance(X, Tensor):
        return _checked_tensor(estimator, X, reset, n_min)
    rows: Array = validate_data(
        estimator,
        X,
        reset=reset,
        dtype=[np.float64, np.float32],
        ensure_all_finite=False,  # we say where
        ensure_min_samples=n_min,
    )
    return rows


def _require_finite(rows: Rows, names: Sequence[str] | Array) -> None:
    if get_config()["assume_finite"]:
        return
    with np.errstate(all="ignore"):
        # A sum is finite only if all values are, and takes no memory.
        if bool(np.isfinite(float(rows.sum()))):
            return
    if isinstance(rows, Tensor):
        nan, infinite = rows.isnan().cpu().numpy(), rows.isinf().cpu().numpy()
    else:
        nan, infinite = np.isnan(rows), np.isinf(rows)
    _require_none(nan, "X contains NaN", names)
    _require_none(infinite, f"X contains infinity or a value too large for {rows.dtype}", names)


def _require_none(wrong: Array, what: str, names: Sequence[str] | Array) -> None:
    """Raise NotFinite if any value is wrong; name the place of the first."""
    if wrong.any():
        place = [int(i) for i in np.unravel_index(np.argmax(wrong), wrong.shape)]
        row, *column = place
        where = f"row {row}" + "".join(
            f", column {str(names[j])!r}" if len(names) else f", column {j}" for j in column
        )
        raise NotFinite(f"Input {what}: {where}; drop or impute such rows first")


def _one_line(error: Exception, n_features: int, names: Sequence[str]) -> str:
    """Return scikit-learn's message in one line, followed by the remedy."""
    first, *others = re.sub(r"\n- ", ", ", re.sub(r":\n- ", ": ", str(error).strip())).splitlines()
    # Where names differ every line matters; otherwise only the first does.
    lines = [first, *others] if first.startswith("The feature names") else [first]
    if isinstance(error, NotFinite) or ": give " in first:
        return first
    name_list = f" ({first_few(names)})" if names else ""
    return (
        f"{'; '.join(line.rstrip('.:') for line in lines)}: give rows (n, {n_features}), one "
        f"column per feature of the mixture, in their order{name_list}"
    )
