"""A mixture as the two files of a model folder, and back."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from gmm_dist.errors import UserError
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.model.quantiles import Quantiles
from gmm_dist.model.soundness import flaw
from gmm_dist.runs.bootstrap_json import parse_bootstrap, plain_bootstrap
from gmm_dist.runs.cluster_json import parse_clusters, plain
from gmm_dist.runs.json_files import FORMAT_VERSION, FileEntry, parse, to_json, whole

TENSORS = "model.safetensors"
CARD = "model.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Say how a model came about: all of model.json that is not the mixture itself.

    `criteria` are `bic`, `aic`, `icl` and, where rows were held out, `holdout`; `status` is the
    sentence that says why EM stopped; `config` is the run's settings as plain JSON values;
    `plan_hash` names the rows that were read; `versions` are those of `library_versions`;
    `snapshot` says which version of a table was read, None for none.
    """

    criteria: Mapping[str, float]
    status: str
    converged: bool
    n_iter: int
    config: Mapping[str, Any]
    plan_hash: str
    versions: Mapping[str, str | None]
    snapshot: Mapping[str, Any] | None = None


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
        UserError: a file is damaged, they do not belong together, a newer gmm_dist wrote them, or
            their numbers are no mixture's.
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
    facts = asdict(provenance)
    if provenance.snapshot is None:
        del facts["snapshot"]
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
        "clusters": plain(mixture.clusters),
        "bootstrap": plain_bootstrap(mixture.bootstrap),
        **facts,
        "files": {TENSORS: asdict(tensors)},
    }


def _mixture(card: Mapping[str, Any], tensors: bytes, url: str) -> Mixture:
    parameters = _parameters(card, tensors, url)
    return Mixture(
        parameters=parameters,
        feature_names=_feature_names(card, parameters.n_features, url),
        n_samples=_number(card, "n_samples", url),
        log_likelihood=_number(card, "log_likelihood", url),
        log_density_quantiles=_quantiles(card, url),
        ids=_component_ids(card, parameters.n_components, url),
        clusters=parse_clusters(card.get("clusters"), parameters.n_components),
        bootstrap=parse_bootstrap(card.get("bootstrap"), *parameters.means.shape),
    )


def _parameters(card: Mapping[str, Any], tensors: bytes, url: str) -> Parameters:
    covariance_type, k, d = card["covariance_type"], card["n_components"], card["n_features"]
    try:
        parts = safetensors.torch.load(tensors)
    except safetensors.SafetensorError as error:
        raise _wrong(f"is no such file ({error})", url, TENSORS) from error
    tensor_shapes = {name: tuple(part.shape) for name, part in parts.items()}
    is_known = isinstance(covariance_type, str) and covariance_type in TYPE_OF
    is_known &= isinstance(k, int) and isinstance(d, int)
    if not is_known or tensor_shapes != {
        "weights": (k,),
        "means": (k, d),
        "covariances": TYPE_OF[covariance_type].shape(k, d),
    }:
        raise UserError(
            f"{url}: {TENSORS} holds {tensor_shapes}, and {CARD} says {covariance_type!r}, "
            f"{k} components, {d} features: copy the model folder again"
        )
    if k < 1 or d < 1:
        raise _wrong(f"has {k} components, {d} features", url)
    for name, part in parts.items():
        if part.dtype != torch.float64:
            raise _wrong(f"holds {name} of {part.dtype}, not of float64", url, TENSORS)
    parameters = Parameters(**parts, covariance_type=covariance_type)
    if (what := flaw(parameters)) is not None:
        raise _wrong(f"holds no mixture: {what}", url, TENSORS)
    return parameters


def _feature_names(card: Mapping[str, Any], d: int, url: str) -> tuple[str, ...]:
    names = card["feature_names"]
    if not _are(names, str):
        raise _wrong("has feature_names that are no list of names", url)
    if len(names) not in (0, d):
        raise _wrong(f"names {len(names)} features of {d}", url)
    if twice := _twice(names):
        raise _wrong(f"names the feature {twice[0]!r} twice", url)
    return tuple(names)


def _component_ids(card: Mapping[str, Any], k: int, url: str) -> tuple[int, ...] | None:
    ids = card.get("component_ids")
    if ids is None:
        return None
    if not _are(ids, int) or len(ids) != k or min(ids) < 0:
        raise _wrong(f"has component_ids that are not {k} whole numbers from 0 up", url)
    if twice := _twice(ids):
        raise _wrong(f"gives the id {twice[0]} to two components", url)
    return tuple(ids)


def _quantiles(card: Mapping[str, Any], url: str) -> Quantiles | None:
    """Return the table of quantiles; a value that was not finite is NaN."""
    kept = card.get("log_density_quantiles")
    if kept is None:
        return None
    levels, values = kept["levels"], kept["values"]
    if not _are(levels, float | int) or not _are(values, float | int | None):
        raise _wrong("has log_density_quantiles that are no numbers", url)
    finite = [float(value) for value in values if value is not None]
    if len(levels) != len(values) or not levels or min(levels) < 0 or max(levels) > 1:
        raise _wrong(f"has {len(values)} quantiles for {len(levels)} levels from 0 to 1", url)
    # Values within one bin of the histogram ascend but for rounding.
    steps = itertools.pairwise(finite)
    if list(levels) != sorted(set(levels)) or any(a - b > 1e-9 * max(1, abs(a)) for a, b in steps):
        raise _wrong("has log_density_quantiles that do not ascend", url)
    return Quantiles(tuple(levels), tuple(math.nan if v is None else float(v) for v in values))


def _number(card: Mapping[str, Any], key: str, url: str) -> float:
    """Return a number; None stands for one that was not finite."""
    value = card[key]
    if value is None:
        return math.nan
    if not _are([value], float | int) or (key == "n_samples" and value < 0):
        raise _wrong(f"has the {key} {value!r}", url)
    return float(value)


def _are(values: object, kind: Any) -> bool:
    """Say whether `values` is a list of values of a kind: finite numbers, and no bools."""
    return isinstance(values, list) and all(
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (not isinstance(value, float | int) or abs(value) <= sys.float_info.max)
        for value in values
    )


def _twice(values: Sequence[Any]) -> list[Any]:
    return [value for value, n in Counter(values).items() if n > 1]


def _wrong(what: str, url: str, name: str = CARD) -> UserError:
    return UserError(f"{url}: {name} {what}: copy the model folder again, or fit the model anew")
