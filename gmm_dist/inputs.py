"""Rows that a user hands in: arrays, tensors, tables; and results of the same kind."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, validate_data
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Array = npt.NDArray[Any]
Rows = Array | Tensor


@dataclass(frozen=True, slots=True)
class Space:
    """Where results belong: NumPy (`device` None), torch on a device, or another namespace.

    `elsewhere` is that namespace's own name of the rows' device, which torch need not know.
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
            return value.cpu().numpy()
        value = value.to(self.device)
        if self.namespace is None:
            return value
        made = self.namespace.from_dlpack(value)
        return made if self.elsewhere is None else made.to_device(self.elsewhere)


def checked(estimator: BaseEstimator, X: Any, *, reset: bool, n_min: int = 1) -> Rows:
    """Return rows (n, d), finite, float32 or float64; note (`reset`) or check features and names.

    Tensors stay tensors, on their device, and so do arrays that only DLPack can hand over;
    everything else becomes a NumPy array. Raises ValueError and TypeError as scikit-learn does.
    """
    if not isinstance(X, Tensor) and is_foreign(X):
        X = from_dlpack(X)
    if isinstance(X, Tensor):
        return _checked_tensor(estimator, X, reset, n_min)
    pa = sys.modules.get("pyarrow")
    if pa is not None and isinstance(X, pa.RecordBatch):
        X = pa.Table.from_batches([X])  # whose names scikit-learn reads
    rows: Array = validate_data(
        estimator, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=n_min
    )
    return rows


def is_foreign(X: Any) -> bool:
    """Say whether X is an array of a namespace that is neither NumPy's nor torch's."""
    return hasattr(X, "__array_namespace__") and not isinstance(X, np.ndarray | np.generic)


def space_of(X: Any, rows: Rows) -> Space:
    """Return the kind of X, of which `rows` were made."""
    if isinstance(rows, Tensor):
        if isinstance(X, Tensor):
            return Space(rows.dtype, rows.device)
        elsewhere = getattr(X, "device", None)
        return Space(rows.dtype, rows.device, X.__array_namespace__(), elsewhere)
    return Space(torch.float32 if rows.dtype == np.float32 else torch.float64)


def tensor_of(value: Any) -> Tensor:
    """Return an array or tensor as a float64 tensor on the CPU; never shares an array's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    if is_foreign(value):
        return from_dlpack(value).to("cpu", torch.float64)
    return torch.from_numpy(np.array(value, dtype=np.float64, order="C"))


def viewed(rows: Rows) -> Tensor:
    """Return checked rows as a tensor, without a copy where they lie in order; only to be read."""
    if isinstance(rows, Tensor):
        return rows
    in_order = rows.flags.c_contiguous and rows.flags.writeable
    return torch.from_numpy(rows) if in_order else tensor_of(rows)


def mean_of(values: Any) -> float:
    """Return the mean of one of our results, of whichever kind it is."""
    return float(from_dlpack(values).mean() if is_foreign(values) else values.mean())


def device_of(setting: str | torch.device) -> torch.device:
    """Return the device that a user names; raise ValueError where it cannot hold float64 rows."""
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
    """Return what `tensor_of` takes as a NumPy array of its own dtype."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return from_dlpack(value).cpu().numpy() if is_foreign(value) else np.asarray(value)


def checked_start(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Return a user's start of that shape in float64.

    Raises ValueError in scikit-learn's words.
    """
    array = check_array(
        array_of(value), dtype=[np.float64, np.float32], ensure_2d=False, allow_nd=True
    )
    if array.shape != shape:
        raise ValueError(
            f"The parameter '{name}' should have the shape of {shape}, but got {array.shape}"
        )
    return tensor_of(array)


def _checked_tensor(estimator: BaseEstimator, X: Tensor, reset: bool, n_min: int) -> Tensor:
    if X.layout is not torch.strided:
        raise ValueError(f"X is a sparse tensor ({X.layout}): give a dense one, X.to_dense()")
    if X.ndim != 2:
        raise ValueError(f"Expected 2D array, got {X.ndim}D array instead: give rows (n, d)")
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
    if not bool(torch.isfinite(X).all()):
        kind = "NaN" if bool(torch.isnan(X).any()) else "infinity or a value too large"
        raise ValueError(f"Input X contains {kind}: drop or impute such rows first")
    validate_data(estimator, X, reset=reset, skip_check_array=True)
    return X.detach()
