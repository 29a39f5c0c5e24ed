"""A fitted model as a model folder that `load` and the commands read: complete or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from gmm_dist import config
from gmm_dist.em.lane import Status
from gmm_dist.errors import UserError, renaming
from gmm_dist.model.arrays import array_of, is_foreign
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs.commit import MODEL, Result, claim
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import FileEntry
from gmm_dist.runs.model_folder import (
    CARD,
    TENSORS,
    Provenance,
    dump,
    library_versions,
    parse_model,
)
from gmm_dist.storage import explained
from gmm_dist.urls import Url

_PACKAGES = ("gmm_dist", "torch", "numpy", "scikit-learn", "safetensors")
_UNKNOWN = "how the fit ended is not known: the model was saved as a mixture"


@runtime_checkable
class Estimator(Protocol):
    """What `save` needs from an estimator."""

    def to_mixture(self) -> Mixture: ...

    def get_params(self, deep: bool = True) -> dict[str, Any]: ...


def save(model: Mixture | Estimator, url: str | os.PathLike[str]) -> Url:
    """Write a model to a new folder, which `load` and the commands' `--model` read; return its url.

    The folder is what a fit's output is, with the model alone: a manifest that is created last
    names the files with their sha256, so that a model is complete or absent. `load(save(model,
    url))` has the same weights, means and covariances to the bit; names of features, the number
    of rows and the log-likelihood go along, as far as they are known (`to_mixture`). To save the
    same model again does nothing.

    >>> import tempfile
    >>> import numpy as np
    >>> from gmm_dist import GaussianMixture, load
    >>> model = GaussianMixture(2, random_state=0).fit([[0.0], [1.0], [8.0], [9.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = load(save(model, f"{folder}/model"))
    >>> bool((loaded.predict_proba([[5.0]]) == model.predict_proba([[5.0]])).all())
    True

    Raises UserError for what is no path or URL, where the folder holds anything else or cannot be
    written to, for numbers that are no mixture's, and for a posterior, which model files do not
    hold; TypeError for what is no model of ours; scikit-learn's NotFittedError.
    """
    target = config.url("url", url)
    mixture = _mixture_of(model)
    with renaming(output="url"):
        files = {f"{MODEL}/{name}": data for name, data in _files(model, mixture, target).items()}
        if not _holds(target, files):
            with claim(target) as attempt:
                for name, data in files.items():
                    attempt.write(name, data)
                attempt.commit()
    return target


def _mixture_of(model: Any) -> Mixture:
    if isinstance(model, Mixture):
        return model
    if isinstance(model, type) or not isinstance(model, Estimator):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"save takes a Mixture or an estimator of gmm_dist, not a {kind}: "
            "GaussianMixture.from_sklearn takes scikit-learn's"
        )
    if hasattr(model, "weight_concentration_prior_type"):
        raise UserError(
            f"a {type(model).__name__} is a posterior over mixtures, which a model folder does not "
            "hold: save(model.to_mixture(), url) keeps its expected weights, means and covariances"
        )
    return model.to_mixture()


def _files(model: Mixture | Estimator, mixture: Mixture, url: Url) -> dict[str, bytes]:
    """Return the files of the model folder; raise UserError where they would not load again."""
    files = dump(mixture, provenance_of(model))
    try:
        parse_model(files[CARD], files[TENSORS], url)
    except UserError as error:
        reason = str(error).removeprefix(f"{url}: ").partition(": copy the model")[0]
        raise UserError(
            f"the model cannot be saved, for it would not load again: {reason}; fit it anew"
        ) from error
    return files


def settings_of(estimator: Estimator) -> dict[str, Any]:
    """Return an estimator's class and parameters as plain JSON values."""
    settings = {name: _plain(value) for name, value in estimator.get_params(deep=False).items()}
    return {"estimator": type(estimator).__name__, **settings}


def provenance_of(model: Mixture | Estimator) -> Provenance:
    """Say how a model came about, as far as the model knows it."""
    config: dict[str, Any] = {}
    status, converged, n_iter = _UNKNOWN, False, 0
    if isinstance(model, Estimator):
        config = settings_of(model)
        converged = bool(getattr(model, "converged_", False))
        n_iter = int(getattr(model, "n_iter_", 0))
        # An estimator made from a mixture has no iterations.
        ended = Status.CONVERGED if converged else Status.MAX_ITER
        status = ended.value if n_iter else _UNKNOWN
    return Provenance(
        criteria={},
        status=status,
        converged=converged,
        n_iter=n_iter,
        config=config,
        plan_hash="",
        versions=library_versions(_PACKAGES),
    )


def _plain(value: Any) -> Any:
    """Return a parameter as a value that JSON knows."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor | np.ndarray | list | tuple) or is_foreign(value):
        return array_of(value).tolist()
    return str(value)


def _holds(url: Url, files: Mapping[str, bytes]) -> bool:
    """Say whether these very files, and no others, are committed there."""
    folder = Folder.of(url)
    with explained(folder.url):
        result = Result.find(folder)
    return result is not None and result.files == {n: FileEntry.of(d) for n, d in files.items()}
