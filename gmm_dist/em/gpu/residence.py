"""Where lanes' parameters lie while they are fitted: on the GPU whose rows they fit, if large.

Sums come to the host where workers made them. Where the rows lie on a GPU of this process, large
ones stay there, and so do the parameters that the M-step makes of them: at K = 1,024 and d = 128 it
takes 2.6 ms there and 298 on the host (an H200, docs/gpu-measured.md), and Θ need not travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gmm_dist.devices import to_host
from gmm_dist.em.lane import Lane, MaximumLikelihood
from gmm_dist.em.statistics import PassStatistics
from gmm_dist.model.parameters import Parameters

_LARGE = 1 << 16  # moments; fewer take the host less time than a GPU takes to be told what to do


def landed(statistics: PassStatistics, groups: Sequence[Sequence[Lane]]) -> PassStatistics:
    """Return a pass's sums on the host, but for the large moments that lie on a GPU.

    Covariances that components share are sums over these, which only the host makes in one order.
    """
    if all(sums.moments.device.type == "cpu" for sums in statistics.groups):
        return statistics  # most calls at small shapes
    return statistics.landed(
        stay=[
            sums.moments.numel() >= _LARGE and all(_may_stay(lane) for lane in group)
            for sums, group in zip(statistics.groups, groups, strict=True)
        ]
    )


def _may_stay(lane: Lane) -> bool:
    return isinstance(lane.model, MaximumLikelihood) and not lane.parameters.type.is_shared


def bring_home(lanes: Sequence[Lane]) -> None:
    """Move all that lanes hold to the host; changed in place."""
    for lane in lanes:
        if isinstance(lane.model, MaximumLikelihood):
            lane.model = replace(lane.model, parameters=on_host(lane.parameters))
        (lane.theta,) = to_host([lane.theta])
        if lane.squarem is not None:
            lane.squarem.trail = [on_host(scored) for scored in lane.squarem.trail]
            if lane.squarem.fallback is not None:
                lane.squarem.fallback = on_host(lane.squarem.fallback)


def on_host(parameters: Parameters) -> Parameters:
    """Return a mixture's parameters on the host."""
    if parameters.means.device.type == "cpu":
        return parameters
    weights, means, covariances = to_host(
        [parameters.weights, parameters.means, parameters.covariances]
    )
    return replace(parameters, weights=weights, means=means, covariances=covariances)
