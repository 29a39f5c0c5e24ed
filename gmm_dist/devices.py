"""What is known of the device that rows lie on: its float64, its memory, its settings."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# How much longer than a float32 product one of float64 takes, by compute capability. 9.0 was
# measured (an H200: 850 against 800 ms a pass, docs/gpu-measured.md); the others are NVIDIA's
# figures, for products that use tensor cores where they take float64.
_FLOAT64_PRICES = {
    (6, 0): 2.0,
    (7, 0): 2.0,
    (7, 5): 32.0,
    (8, 0): 1.0,
    (8, 6): 64.0,
    (8, 9): 64.0,
    (9, 0): 1.0,
    (10, 0): 2.0,
    (10, 3): 64.0,
    (12, 0): 64.0,
}
_OTHERS = 32.0  # a card that is not listed is most likely made for graphics

_MOSTLY_FREE, _PATIENCE = 0.9, 5  # seconds that a process before us may take to let go of memory


_DRIVER = Path("/proc/driver/nvidia/version")
_CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")


def card_name(device: torch.device) -> str | None:
    """Return the model of a GPU; None for a CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def libraries() -> dict[str, str | None]:
    """Return what, beside its model, decides a GPU's bits: its driver's version and cuBLAS's."""
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text() if _DRIVER.exists() else "")
    cublas = None
    for name in _CUBLAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            cublas = cublas or importlib.metadata.version(name)
    return {"driver": match[0] if match else None, "cublas": cublas or torch.version.cuda}


def float64_price(device: torch.device) -> float:
    """Return how much longer than in float32 a product takes in float64 on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    return _FLOAT64_PRICES.get(torch.cuda.get_device_capability(device), _OTHERS)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that nobody uses; waits while that number grows."""
    free, total = torch.cuda.mem_get_info(device)
    for _ in range(_PATIENCE):
        if free >= _MOSTLY_FREE * total:
            break
        time.sleep(1.0)
        before, (free, total) = free, torch.cuda.mem_get_info(device)
        if free <= before:
            break
    return int(free)


def total_memory(device: torch.device) -> int:
    """Return the bytes of a GPU, used or not: the same for all cards of a kind."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the host, those on a GPU through pinned memory, with one wait for all.

    Pageable memory takes 69 MB in 42 ms, pinned memory in 1.3 (an H200, docs/gpu-measured.md).
    """
    copies, waits = [], None
    for tensor in tensors:
        if tensor.device.type == "cpu":
            copies.append(tensor)
            continue
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(copy.copy_(tensor, non_blocking=True))
        waits = tensor.device
    if waits is not None:
        torch.cuda.synchronize(waits)
    return copies


def rounds_to_tf32() -> bool:
    """Say whether this process has float32 products on GPUs round their operands to TF32."""
    matmul = torch.backends.cuda.matmul
    # Newer versions of torch refuse to be asked in the words of older ones once set by the new.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(precision == "tf32" if precision is not None else matmul.allow_tf32)
