"""Gaussian mixtures over data lakes: EM on a Ray cluster, many k in the same passes."""

from gmm_dist.artifacts import load
from gmm_dist.errors import UserError
from gmm_dist.mixture import Mixture
from gmm_dist.parameters import Parameters

__version__ = "0.1.0"

__all__ = ["Mixture", "Parameters", "UserError", "load"]
