"""A mixture as the two files of a model folder, and back."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch

from gmm_dist.errors import UserError
from gmm_dist.mixture import Mixture
from gmm_dist.parameters import COVARIANCE_TYPES, Parameters
from gmm_dist.quantiles import Quantiles
from gmm_dist.records import FORMAT_VERSION, FileEntry, parse, to_json, whole

TENSORS = "model.safetensors"
CARD = "model.json"


@dataclass(frozen=True)
class Provenance:
    """Say how a model came about: all of model.json that is not the mixture itself.

    `criteria` are `bic`, `aic`, `icl` and, where rows were held out, `holdout`; `status` is the
    sentence that says why EM stopped; `config` is the run's settings as plain JSON values;
    `plan_hash` names the rows that were read; `versions` are those of `library_versions`.
    """

    criteria: Mapping[str, float]
    status: str
    converged: bool
    n_iter: int
    config: Mapping[str, Any]
    plan_hash: str
    versions: Mapping[str, str | None]


def library_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python and of installed `packages`; None for one not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def dump(mixture: Mixture, provenance: Provenance) -> dict[str, bytes]:
    """Return the files of a model folder; equal parameters give an equal model.safetensors.

    Raises UserError for a posterior's mixture, whose `log_weights` have no place there.
    """
    tensors = _tensor_bytes(mixture.parameters)
    card = to_json(_card(mixture, provenance, FileEntry.of(tensors)))
    return {TENSORS: tensors, CARD: card}


def model_sha256(parameters: Parameters) -> str:
    """Return the sha256 of the parameters' model.safetensors, which names the mixture."""
    return FileEntry.of(_tensor_bytes(parameters)).sha256


def parse_model(card: bytes, tensors: bytes, url: str) -> Mixture:
    """Return the mixture that a folder's two files hold, verified; `url` is for messages.

    Raises:
        UserError: a file is damaged, they do not belong together, or a newer gmm_dist wrote them.
    """
    content = parse(card, CARD, url)
    with whole(CARD, url):
        expected = FileEntry(**content["files"][TENSORS])
        if not expected.fits(tensors):
            raise UserError(
                f"{url}: {TENSORS} is damaged: {len(tensors)} bytes where {CARD} says "
                f"{expected.size}, or another sha256: copy the model folder again"
            )
        return _mixture(content, tensors, url)


def _tensor_bytes(parameters: Parameters) -> bytes:
    if parameters.log_weights is not None:
        raise UserError(
            f"a posterior's mixture of {parameters.n_components} components has expected "
            "log-weights, which model.safetensors does not hold: save a plain mixture of its "
            "weights, means and covariances"
        )
    tensors = {
        "weights": parameters.weights,
        "means": parameters.means,
        "covariances": parameters.covariances,
    }
    # Contiguous copies: safetensors refuses views that share memory. No metadata: equal models are
    # equal bytes.
    return safetensors.torch.save(
        {
            name: tensor.detach()
            .to("cpu", torch.float64)
            .clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )


def _card(mixture: Mixture, provenance: Provenance, tensors: FileEntry) -> dict[str, Any]:
    parameters, quantiles = mixture.parameters, mixture.log_density_quantiles
    return {
        "format_version": FORMAT_VERSION,
        "covariance_type": parameters.covariance_type,
        "n_components": parameters.n_components,
        "n_features": parameters.n_features,
        "feature_names": list(mixture.feature_names),
        "n_samples": mixture.n_samples,
        "log_likelihood": mixture.log_likelihood,
        "log_density_quantiles": None if quantiles is None else asdict(quantiles),
        "component_ids": None if mixture.ids is None else list(mixture.ids),
        **asdict(provenance),
        "files": {TENSORS: asdict(tensors)},
    }


def _mixture(card: Mapping[str, Any], tensors: bytes, url: str) -> Mixture:
    covariance_type, k, d = card["covariance_type"], card["n_components"], card["n_features"]
    parts = safetensors.torch.load(tensors)
    shapes = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}
    expected = {"weights": (k,), "means": (k, d), "covariances": shapes.get(covariance_type)}
    found = {name: tuple(part.shape) for name, part in parts.items()}
    if covariance_type not in COVARIANCE_TYPES or found != expected:
        raise UserError(
            f"{url}: {TENSORS} holds {found}, and {CARD} says {covariance_type!r}, "
            f"{k} components, {d} features: copy the model folder again"
        )
    return Mixture(
        parameters=Parameters(**parts, covariance_type=covariance_type),
        feature_names=tuple(card["feature_names"]),
        n_samples=_number(card["n_samples"]),
        log_likelihood=_number(card["log_likelihood"]),
        log_density_quantiles=_quantiles(card.get("log_density_quantiles")),
        ids=None if card.get("component_ids") is None else tuple(card["component_ids"]),
    )


def _quantiles(kept: Mapping[str, Any] | None) -> Quantiles | None:
    if kept is None:
        return None
    return Quantiles(tuple(kept["levels"]), tuple(map(_number, kept["values"])))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
