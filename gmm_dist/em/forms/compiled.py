"""The loops of the pruned and the dense form, and their signatures for Numba.

They are plain Python too, for tests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from gmm_dist.compiling import compiled
from gmm_dist.em.forms import dense_loops, pair_loops, screening_loops


@dataclass(frozen=True, slots=True)
class Loops:
    """The loops of the pruned form for one layout of moments and one type of rows."""

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


@dataclass(frozen=True, slots=True)
class DenseLoops:
    """The loops of the dense form for one layout of moments."""

    all_shares: Callable[..., int]
    all_moments: Callable[..., None]


_L = TypeVar("_L", Loops, DenseLoops)
_SUMMING = (pair_loops.__name__, dense_loops.__name__)
_SIGNATURES = {
    "all_shares": "i8(i8[::1], f8[::1], f8, f8[:,::1], f8[:,::1], f8[::1], b1[::1], f8[:,::1], "
    "f8[:,::1])",
    "all_moments": "void(i8, f8[:,::1], f8[:,::1], f8[:,::1], f8[:,::1], f8[:,:,::1])",
    "all_moments_apart": "void(i8, f8[:,::1], f8[:,::1], f8[:,::1], f8[:,::1], f8[:,::1])",
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
    """Return the compiled loops of the pruned form for rows of a dtype, "f" or "d"."""
    return plain(Loops, has_products, _compiler(dtype))


@functools.cache
def dense_loops_for(has_products: bool) -> DenseLoops:
    """Return the compiled loops of the dense form."""
    return plain(DenseLoops, has_products, _compiler())


def _compiler(dtype: str = "d") -> Callable[[Callable[..., Any]], Any]:
    def compile_(loop: Callable[..., Any]) -> Any:
        signature = _SIGNATURES[loop.__name__].format(x={"f": "f4", "d": "f8"}[dtype])
        # Not where the order of a sum could depend on pairs that are skipped.
        return compiled(loop, signature, reorders=loop.__module__ in _SUMMING)

    return compile_


def plain(
    loops: type[_L],
    has_products: bool,
    wrapped: Callable[[Callable[..., Any]], Any] = lambda loop: loop,
) -> _L:
    """Return the loops as they stand in their modules, each `wrapped`."""
    written = vars(screening_loops) | vars(pair_loops) | vars(dense_loops)

    def of(name: str) -> Callable[..., Any]:
        apart = f"{name}_apart"
        loop = written[name if has_products or apart not in written else apart]
        wrapped_: Callable[..., Any] = wrapped(inspect.unwrap(loop))
        return wrapped_

    return loops(*(of(part.name) for part in fields(loops)))
