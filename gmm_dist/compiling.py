"""Loops over rows that Numba compiles, where it is there: in seconds, once for each machine."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any


def may_compile() -> bool:
    """Say whether Numba is there and has not been switched off, without loading it."""
    is_off = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return not is_off and importlib.util.find_spec("numba") is not None


@functools.cache
def can_compile() -> bool:
    """Say whether Numba is there, goes with the NumPy that is, and has not been switched off."""
    try:
        import numba
    except ImportError:
        return False
    config: Any = numba.config
    return not config.DISABLE_JIT


def compiled(loop: Callable[..., Any], signature: str, *, reorders: bool) -> Any:
    """Compile a loop, and keep its code in Numba's cache where there is a folder for it.

    With `reorders` sums may be taken in any order, which vector instructions need.
    """
    import numba

    loop = inspect.unwrap(loop)  # without what tests wrap functions in to check annotations
    options: dict[str, Any] = {
        "fastmath": {"contract", "reassoc", "nsz"} if reorders else set(),
        "nogil": True,
        "error_model": "numpy",
    }
    try:
        return numba.njit(signature, cache=True, **options)(loop)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(signature, **options)(loop)
