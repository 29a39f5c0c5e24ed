"""SQUAREM: leap along the line through two EM steps, so that a fit needs fewer passes.

Varadhan & Roland, "Simple and globally convergent methods for accelerating the convergence of
any EM algorithm", Scandinavian Journal of Statistics 35 (2008), scheme S3 with their adaptive
bound on the step. Only parameters move; no shard knows of it. A leap whose likelihood turns
out lower than that of the last parameters scored is taken back for the EM step that it
replaced, so the likelihoods that count never fall.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from gmm_dist.model.parameters import Parameters

_GROW = 4.0  # of the bound on the step: up when a step reaches it, down when a leap fails
_DEAD = 1e-8  # a mixing weight below it says nothing of where to leap


@dataclass(slots=True, eq=False, kw_only=True)
class Squarem:
    """One lane's extrapolation: what it remembers between two passes.

    `scale` (d,) is the spread of each feature, so that units do not matter. `trail` holds the
    parameters scored in this cycle, `fallback` the EM step that a leap under way replaces.
    `saved` counts the passes that plain EM would at least have needed more: a leap that gained
    as much as m of the EM steps before it (whose gains shrink) stands for m of them.
    """

    scale: Float64[Tensor, " d"]
    trail: list[Parameters] = field(default_factory=list)
    fallback: Parameters | None = None
    max_step: float = _GROW
    n_leaps: int = 0
    n_failed: int = 0
    saved: float = 0.0
    last_gain: float = 0.0

    @property
    def is_leaping(self) -> bool:
        """Whether the parameters being scored are a leap, not an EM step."""
        return self.fallback is not None

    def take_back(self) -> Parameters:
        """Return the EM step instead of a leap that failed, and be more careful from here."""
        assert self.fallback is not None
        stepped, self.fallback = self.fallback, None
        self.max_step = max(1.0, self.max_step / _GROW)
        self.n_failed += 1
        self.saved -= 1
        return stepped

    def credit(self, gain: float) -> None:
        """Note the gain in mean log-likelihood of what has just been scored."""
        if self.is_leaping:
            self.n_leaps += 1
            if self.last_gain > 0:
                self.saved += max(gain / self.last_gain - 1, 0)
        elif gain > 0:
            self.last_gain = gain

    def follow(self, scored: Parameters, stepped: Parameters) -> Parameters:
        """Return what the next pass scores after `scored`, whose EM step is `stepped`.

        An EM step follows each leap, two more draw the line of the next one.
        """
        if self.is_leaping:
            self.fallback = None
            return stepped
        self.trail.append(scored)
        if len(self.trail) < 2:
            return stepped
        leap = self._leap(self.trail[0], self.trail[1], stepped)
        self.trail = []
        if leap is None:
            return stepped
        self.fallback = stepped
        return leap

    def forget(self) -> None:
        """Start anew from the next EM step: what was scored is not a line any more."""
        self.trail, self.fallback = [], None

    def _leap(self, first: Parameters, second: Parameters, third: Parameters) -> Parameters | None:
        if float(third.weights.min()) < _DEAD or float(first.weights.min()) < _DEAD:
            return None
        device = third.means.device  # where a fit starts on the host, that of the later ones
        x0, x1, x2 = (coordinates(p, self.scale).to(device) for p in (first, second, third))
        r, v = x1 - x0, (x2 - x1) - (x1 - x0)
        step = float(r.norm() / v.norm()) if bool(v.norm() > 0) else 1.0
        if step >= self.max_step:
            step, self.max_step = self.max_step, self.max_step * _GROW
        if not 1.0 < step < float("inf"):  # an EM step is what it would come to
            return None
        return parameters_at(x0 + 2 * step * r + step**2 * v, third, self.scale)


def coordinates(parameters: Parameters, scale: Float64[Tensor, " d"]) -> Float64[Tensor, " p"]:
    """Return parameters as a vector of which every value is valid.

    Logarithms of the weights, means, and the coordinates of the covariances, all in units of
    `scale` (d,).
    """
    scale = scale.to(parameters.means.device)
    weights, means = parameters.weights.log(), (parameters.means / scale).flatten()
    spread = parameters.type.coordinates(parameters.covariances, scale)
    return torch.cat([weights, means, spread])


def parameters_at(
    x: Float64[Tensor, " p"], like: Parameters, scale: Float64[Tensor, " d"]
) -> Parameters:
    """Return the parameters at coordinates `x`, of the shapes of `like`."""
    k, d = like.n_components, like.n_features
    scale = scale.to(x.device)
    weights, means, spread = x.split([k, k * d, len(x) - k - k * d])
    return Parameters(
        weights=torch.softmax(weights, 0),
        means=means.view(k, d) * scale,
        covariances=like.type.at(spread, scale).view_as(like.covariances),
        covariance_type=like.covariance_type,
    )
