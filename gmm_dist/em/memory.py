"""How much memory the mixtures of a sweep need, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from gmm_dist.chunks import SHORTEST, most_bytes_on_gpu
from gmm_dist.errors import Option, Text, UserError
from gmm_dist.formats import gigabytes
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF

# Parameters, their padded copy, those that pairs were last tried with, sums in the working
# precision and in float64, the summary that is sent and the partial sums that it meets on the way:
# so many float64 copies at once.
_COPIES = 12
# On a GPU all subtrees of a worker's shards, one for each level at most.
_GPU_COPIES = 20
_BESIDE = 2 << 30  # on a GPU, of temporary results; at most 1 GiB of them are rows about means


def lane_bytes(lanes: Sequence[tuple[int, str]], n_features: int, *, on_gpu: bool = False) -> int:
    """Return the bytes that a worker needs for lanes (k, covariance type), beside its rows."""
    widths = {kind: TYPE_OF[kind].n_rows(n_features) for _, kind in lanes}
    statistics = sum(k * widths[kind] for k, kind in lanes)
    width = max(widths.values()) + 2 * sum(k for k, _ in lanes)
    if on_gpu:
        # Of a pass in float64, and of its check in both precisions.
        chunks = 5 * most_bytes_on_gpu(width) // 2
        return 8 * _GPU_COPIES * statistics + chunks + _BESIDE
    chunk = SHORTEST * width
    return 8 * (_COPIES * statistics + chunk)


def require_memory(
    lanes: Sequence[tuple[int, str]], n_features: int, available: int, *, on_gpu: bool = False
) -> None:
    """Raise UserError when the lanes need more than the `available` bytes of a worker."""
    needed = lane_bytes(lanes, n_features, on_gpu=on_gpu)
    if needed <= available:
        return
    cheaper = {
        kind: lane_bytes([(k, kind) for k, _ in lanes], n_features, on_gpu=on_gpu)
        for kind in _by_width()
    }
    fitting = [kind for kind, size in cheaper.items() if size <= available]
    families = Option("covariance_type", fitting[-1]) + ", " if fitting else ""
    raise UserError(
        f"the statistics of {sum(k for k, _ in lanes):,} components with {n_features:,} features "
        f"need {gigabytes(needed)} in every worker, which has at most {gigabytes(available)}",
        remedy="use "
        + Text.of(families)
        + ("smaller " + Option("n_components") + ", fewer " + Option("columns"))
        + ", or fewer workers per machine",
    )


def _by_width() -> list[str]:
    """Return the covariance types from the cheapest to the richest."""
    return sorted(
        COVARIANCE_TYPES, key=lambda kind: (TYPE_OF[kind].n_rows(100), TYPE_OF[kind].n_values(100))
    )
