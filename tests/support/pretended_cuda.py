"""A pretended CUDA device: real values, computed on the CPU, under CUDA's rules.

`to_cuda` makes a tensor that says it is on `cuda:0`. Every operator on it goes through
`__torch_dispatch__`, which refuses what CUDA refuses (operands of different devices, but for CPU
numbers, CPU indices and copies), and counts what costs time or is not reproducible there: kernels
that are launched, waits of the host for the device, copies either way, float atomics. Values are
real, so data decide as they would, and results can be held against the CPU's. What it cannot show:
how fast anything is, another order of a sum, a kernel's own faults.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_PACKAGE = Path(__file__).parents[2] / "gmm_dist"

# Operators that make the host wait for the device.
_SYNCS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten.unique_dim",
    "aten._unique2",
    "aten.bincount",
    "aten.linalg_eigh",
    "aten._linalg_eigh",
    "aten.repeat_interleave",
    "aten.is_nonzero",
    "aten.multinomial",
    "aten._linalg_check_errors",
}
# Sums of floats in the order of arrival (what torch.use_deterministic_algorithms lists).
_ATOMICS = {
    "aten.index_add",
    "aten.index_add_",
    "aten.scatter_add",
    "aten.scatter_add_",
    "aten.scatter_reduce",
    "aten.scatter_reduce_",
    "aten.bincount",
    "aten.histc",
    "aten.cumsum",
    "aten.put_",
}
_CPU_INDEX_OK = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
_COPIES = {"aten._to_copy", "aten.copy_", "aten.copy"}
_VIEWS = {
    "aten.view",
    "aten.slice",
    "aten.select",
    "aten.t",
    "aten.transpose",
    "aten.expand",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.alias",
    "aten.detach",
    "aten.split",
    "aten.diagonal",
    "aten.permute",
    "aten.split_with_sizes",
    "aten.unbind",
    "aten._unsafe_view",
    "aten.as_strided",
    "aten._reshape_alias",
    "aten.lift_fresh",
}


@dataclass
class Tally:
    """What ran on the pretended device: operators by name, waits and atomics by where."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    syncs: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    atomics: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    host_bytes: int = 0

    @property
    def n_syncs(self) -> int:
        return sum(self.syncs.values())

    def __str__(self) -> str:
        return (
            f"{sum(self.launches.values())} launches, {self.n_syncs} waits {dict(self.syncs)}, "
            f"{self.host_bytes} bytes to the host, atomics {dict(self.atomics)}"
        )


@dataclass(frozen=True)
class Card:
    """What torch.cuda says of the pretended card."""

    capability: tuple[int, int] = (9, 0)
    free: int = 60 << 30
    total: int = 80 << 30
    name: str = "Pretended H100"


_tally = Tally()


@contextlib.contextmanager
def tallied() -> Iterator[Tally]:
    """Count anew while the block lasts."""
    global _tally
    before, _tally = _tally, Tally()
    try:
        yield _tally
    finally:
        _tally = before


def _site() -> str:
    """Name the line of the package that asked, or of the test."""
    frames = [f for f in traceback.extract_stack(limit=60) if f.filename != __file__]
    ours = [f for f in frames if Path(f.filename).is_relative_to(_PACKAGE)]
    tests = [f for f in frames if "/tests/" in f.filename]
    for frame in (*reversed(ours), *reversed(tests)):
        return f"{Path(frame.filename).name}:{frame.lineno}"
    return "?"


class PretendCuda(torch.Tensor):
    """A tensor that says it is on `cuda:0`; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendCuda:
        assert not isinstance(inner, PretendCuda)
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendCuda({self.inner})"

    def tolist(self) -> Any:  # which C++ refuses for subclasses
        _tally.syncs["tolist", _site()] += 1
        _tally.host_bytes += self.inner.nbytes
        return self.inner.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> PretendCuda:  # made without a dispatch
        return PretendCuda(self.inner.new_tensor(data, **kwargs))

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy: copy it to the CPU first"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def to_cuda(tensor: torch.Tensor) -> PretendCuda:
    """Return a copy of a tensor on the pretended device."""
    return PretendCuda(tensor.detach().clone())


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func.overloadpacket)
    flat, _ = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, PretendCuda)]
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, PretendCuda)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    on_cuda = wanted.type == "cuda" if wanted is not None else bool(there)
    if there and here and name not in _COPIES:
        _refuse_mixed(name, args, here)
    if there or on_cuda:
        _note(name, args, there, here, on_cuda, wanted)
    back = {id(t.inner): t for t in there}
    a, k = tree_map(_plain, args), tree_map(_plain, kwargs)
    if wanted is not None and wanted.type == "cuda":
        k = k | {"device": torch.device("cpu")}
    pinned = k.get("pin_memory")
    if pinned:
        k = k | {"pin_memory": False}
    out = _wide_product(func, a) if name == "aten.mm" and len(a) == 3 else func(*a, **k)
    if name == "aten._to_copy" and wanted is not None and there and not on_cuda:
        out = out.clone()  # a real copy, as from a device
    if name == "aten._local_scalar_dense":
        return out
    if pinned:
        out.is_pinned_here = True
    cuda = isinstance(args[0], PretendCuda) if name == "aten.copy_" else on_cuda

    def wrap(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or isinstance(t, PretendCuda):
            return t
        if id(t) in back:
            return back[id(t)]
        return PretendCuda(t) if cuda else t

    return tree_map(wrap, out)


def _plain(value: Any) -> Any:
    return value.inner if isinstance(value, PretendCuda) else value


def _wide_product(func: Any, args: Any) -> torch.Tensor:
    """Multiply halves as tensor cores do, summing in the wider type; no CPU kernel does."""
    left, right, dtype = args
    return left.to(dtype) @ right.to(dtype)


def _refuse_mixed(name: str, args: Any, here: list[torch.Tensor]) -> None:
    refused = [t for t in here if t.ndim > 0]
    if name in _CPU_INDEX_OK:  # indices may lie on the CPU, at the price of a copy and a wait
        values = [t for t in args if isinstance(t, torch.Tensor)]
        refused = [t for t in values if not isinstance(t, PretendCuda) and t.ndim > 0]
        if not isinstance(args[0], PretendCuda):
            raise RuntimeError(f"{name}: a CPU tensor indexed by CUDA indices, at {_site()}")
        _tally.syncs[name + " with CPU indices", _site()] += 1
    if refused:
        shapes = [tuple(t.shape) for t in refused]
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found CPU operands of "
            f"shapes {shapes} beside cuda:0, at {_site()}"
        )


def _note(
    name: str, args: Any, there: list[Any], here: list[Any], on_cuda: bool, wanted: Any
) -> None:
    if name in _VIEWS:
        return
    to_host = name == "aten._to_copy" and there and not on_cuda and wanted is not None
    to_host = to_host or (name == "aten.copy_" and here and not isinstance(args[0], PretendCuda))
    if to_host:
        _tally.host_bytes += args[0].nbytes
        if not getattr(args[0], "is_pinned_here", False):  # such copies go on by themselves
            _tally.syncs["copy to host", _site()] += 1
        return
    if (name == "aten._to_copy" and not there) or (name == "aten.copy_" and here):
        return  # to the device
    _tally.launches[name] += 1
    if name in _SYNCS:
        _tally.syncs[name, _site()] += 1
    if name == "aten._local_scalar_dense":
        _tally.host_bytes += args[0].nbytes
    if name in {"aten.index", "aten.index_put_", "aten.index_put"}:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype == torch.bool for i in indices):
            _tally.syncs[name + " by bool", _site()] += 1
    sums = not {"amax", "amin"}.intersection(a for a in args if isinstance(a, str))
    if name in _ATOMICS and sums and there and there[0].is_floating_point():
        _tally.atomics[name, _site()] += 1


class _Pretending(TorchDispatchMode):
    """Make `device="cuda"` work in factories and copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _allow_cuda_guards() -> None:
    """Let indexing name a CUDA device in a build without CUDA, which has no guard for it.

    `x[1:]` takes a device guard before it dispatches. In CPU wheels the registry's entry is null,
    so the CPU's guard, which does nothing, is put there.
    """
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if registry[1] is None:
        registry[1] = registry[0]


@contextlib.contextmanager
def pretended_cuda(card: Card | None = None) -> Iterator[None]:
    """Pretend, in this thread, that there is a CUDA device."""
    card = card or Card()
    _allow_cuda_guards()
    properties = mock.Mock(total_memory=card.total, name=card.name)
    said = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "synchronize": _synchronize,
        "mem_get_info": lambda device=None: (card.free, card.total),
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: card.name,
    }
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # x[[1, 2]] and torch.tensor(..., device="cuda")
    try:
        with contextlib.ExitStack() as stack:
            for function, answer in said.items():
                stack.enter_context(mock.patch.object(torch.cuda, function, answer))
            stack.enter_context(mock.patch.object(torch.Tensor, "to", _to))
            stack.enter_context(_Pretending())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)


_to_of_torch = torch.Tensor.to


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Name the device: of one without a number torch asks the guard, which is the CPU's here."""
    args = tuple(_named(value) for value in args)
    return _to_of_torch(tensor, *args, **{key: _named(value) for key, value in kwargs.items()})


def _named(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and torch.device(value).type == "cuda"
    return CUDA if is_cuda else value


def _synchronize(device: Any = None) -> None:
    _tally.syncs["synchronize", _site()] += 1
