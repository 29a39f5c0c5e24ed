"""The loops of the pruned form, compiled by Numba: when they pay, and their signatures.

Numba compiles them once for each machine, in seconds, and keeps the code in a cache. They are plain
Python too, for tests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from gmm_dist.em.forms import pair_loops, screening_loops
from gmm_dist.model.covariance import TYPE_OF

# Passes over fewer rows take less time than it takes to load Numba, half a second.
_LEAST_ROWS = 50_000
_MOST_FEATURES = 128  # with more of them, torch's products of a component's rows take less time


def pays(n_rows: int, covariance_type: str, n_features: int) -> bool:
    """Say whether a lane's centred passes over `n_rows` rows take compiled loops."""
    is_small = n_features <= _MOST_FEATURES or not TYPE_OF[covariance_type].has_products
    return n_rows >= _LEAST_ROWS and is_small and can_compile()


@functools.cache
def can_compile() -> bool:
    """Say whether Numba is there, goes with the NumPy that is, and has not been switched off."""
    try:
        import numba
    except ImportError:
        return False
    config: Any = numba.config
    return not config.DISABLE_JIT


@dataclass(frozen=True, slots=True)
class Loops:
    """The loops for one layout of moments and one type of rows."""

    transpose: Callable[..., None]
    limits: Callable[..., None]
    depth_limits: Callable[..., None]
    select: Callable[..., int]
    arrange: Callable[..., None]
    merge: Callable[..., None]
    distances: Callable[..., None]
    unsure: Callable[..., None]
    highest: Callable[..., None]
    stale: Callable[..., int]
    shares: Callable[..., None]
    moments: Callable[..., None]


_SIGNATURES = {
    "transpose": "void({x}[:,:], f8[:,::1])",
    "limits": "void(f4[:,::1], i8, i8, i8[::1], f8[::1], f8[::1], f8[::1], i2[:,::1], f4[:,::1])",
    "depth_limits": "void(i8, f8[::1], f8[::1], i2[:,::1], f4[:,::1])",
    "select": "i8(f4[:,::1], i8, i8, i8[::1], i8[::1], b1[::1], f8[::1], f8[::1], f4[:,::1], "
    "i4[::1], i4[::1], f4[::1], i8)",
    "arrange": "void(i8, i4[::1], i4[::1], f4[::1], i8[::1], i4[::1], f4[::1])",
    "merge": "void(i8[::1], i4[::1], f8[::1], b1[::1], i8[::1], i4[::1], f8[::1], i8[::1], "
    "i4[::1], f8[::1])",
    "distances": "void(f8[:,::1], f8[:,::1], f8[:,:,::1], f8[::1], i8[::1], i4[::1], f8[::1])",
    "distances_apart": "void(f8[:,::1], f8[:,::1], f8[:,::1], f8[::1], i8[::1], i4[::1], f8[::1])",
    "unsure": "void(f8[::1], f4[::1], b1[::1], f8, i8[::1], i4[::1], b1[::1])",
    "highest": "void(i8[::1], i8[::1], i4[::1], f8[::1], f8[:,::1])",
    "stale": "i8(f8[:,::1], i2[:,::1], f8[:,::1], f8[::1], b1[::1])",
    "shares": "void(i8[::1], f8[::1], f8[:,::1], i8[::1], i4[::1], f8[::1], f8[::1], f8[::1], "
    "i8[::1], i4[::1], f8[:,::1], f8[:,::1])",
    "moments": "void(f8[:,::1], f8[:,::1], i8[::1], i4[::1], f8[::1], f8[:,::1], f8[:,:,::1])",
    "moments_apart": "void(f8[:,::1], f8[:,::1], i8[::1], i4[::1], f8[::1], f8[:,::1], f8[:,::1])",
}


@functools.cache
def loops_for(has_products: bool, dtype: str) -> Loops:
    """Return the compiled loops for rows of a dtype, "f" or "d"."""
    import numba

    def compile_(loop: Callable[..., Any]) -> Any:
        signature = _SIGNATURES[loop.__name__].format(x={"f": "f4", "d": "f8"}[dtype])
        # Sums may be taken in any order, which vector instructions need, but not where it could
        # depend on pairs that are skipped.
        fast = {"contract", "reassoc", "nsz"} if loop.__module__ == pair_loops.__name__ else set()
        options: dict[str, Any] = {"fastmath": fast, "nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(loop)
        except RuntimeError:  # no folder to keep it in
            return numba.njit(signature, **options)(loop)

    return plain(has_products, compile_)


def plain(has_products: bool, wrapped: Callable[..., Any] = lambda loop: loop) -> Loops:
    """Return the loops as they stand in their modules, each `wrapped`."""
    loops = vars(screening_loops) | vars(pair_loops)
    apart = [] if has_products else ["distances", "moments"]
    names = [f"{part.name}_apart" if part.name in apart else part.name for part in fields(Loops)]
    # Without what tests wrap functions in to check annotations.
    return Loops(*(wrapped(inspect.unwrap(loops[name])) for name in names))
