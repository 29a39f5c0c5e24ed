"""What is saved loads again to the bit, or is refused before anything is written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mixtures
import numpy as np
import pandas as pd
import pytest
import sklearn.mixture
import torch
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import gmm_dist
from gmm_dist import BayesianGaussianMixture, GaussianMixture, Mixture, UserError, load, save
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.parameters import Parameters

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
PARTS = ("weights", "means", "covariances")


def rows() -> np.ndarray:
    return mixtures.rows(mixtures.parameters("full", 3, 3), 300).numpy() + 5.0


def assert_same_bits(one: Parameters, other: Parameters) -> None:
    assert one.covariance_type == other.covariance_type
    for name in PARTS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype == torch.float64
        assert torch.equal(mine, theirs)


@every_type
def test_a_mixture_loads_as_it_was_saved(kind, tmp_path):
    mixture = Mixture(
        parameters=mixtures.parameters(kind, 4, 3),
        feature_names=("a", "b", "c"),
        n_samples=300.0,
        log_likelihood=-7.5,
        ids=(3, 1, 0, 9),
    )
    url = save(mixture, tmp_path / "out")
    assert url == str(tmp_path / "out")
    for place in (url, tmp_path / "out" / "model"):
        loaded = load(str(place))
        assert_same_bits(loaded.parameters, mixture.parameters)
        assert (loaded.feature_names, loaded.ids) == (("a", "b", "c"), (3, 1, 0, 9))
        assert (loaded.n_samples, loaded.log_likelihood) == (300.0, -7.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_type
def test_an_estimator_loads_as_it_predicts(kind, dtype, tmp_path):
    X = pd.DataFrame(rows().astype(dtype), columns=list("abc"))
    weight = np.arange(300) % 3
    model = GaussianMixture(3, covariance_type=kind, random_state=0, means_init=X[:3].to_numpy())
    model.fit(X, sample_weight=weight)
    loaded = load(save(model, str(tmp_path / "out")))
    assert_same_bits(loaded.parameters, model._parameters())
    exact = X.astype(np.float64)
    np.testing.assert_array_equal(loaded.score_samples(X), model.score_samples(exact))
    assert loaded.feature_names == ("a", "b", "c")
    assert loaded.n_samples == weight.sum()
    assert loaded.log_likelihood == pytest.approx(model.lower_bound_ * weight.sum(), rel=1e-12)
    card = json.loads((tmp_path / "out" / "model" / "model.json").read_text())
    assert card["config"]["estimator"] == "GaussianMixture"
    assert card["config"]["means_init"] == model.means_init.tolist()
    assert (card["converged"], card["n_iter"]) == (True, model.n_iter_)
    assert card["status"].startswith("converged: the gain in")


def test_what_is_not_known_of_a_fit_is_not_made_up(tmp_path):
    theirs = sklearn.mixture.GaussianMixture(2, random_state=0).fit(rows())
    loaded = load(save(GaussianMixture.from_sklearn(theirs), tmp_path / "theirs"))
    assert math.isnan(loaded.n_samples)
    assert math.isnan(loaded.log_likelihood)
    posterior = BayesianGaussianMixture(n_components=2, random_state=0, tol=1.0).fit(rows())
    plain = posterior.to_mixture()
    assert plain.n_samples == 300
    assert math.isnan(plain.log_likelihood)  # its bound is another one
    again = load(save(plain, tmp_path / "plain"))
    for name in PARTS:
        np.testing.assert_array_equal(
            getattr(again.parameters, name), getattr(posterior, f"{name}_")
        )
    with pytest.raises(
        UserError, match=r"^a Bayes.* posterior .* save\(model\.to_mixture\(\), url\)"
    ):
        save(posterior, tmp_path / "posterior")
    assert not (tmp_path / "posterior").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    one, other = (
        Mixture(parameters=mixtures.parameters("diag", 2, 2, seed=seed)) for seed in (0, 1)
    )
    url = str(tmp_path / "out")
    save(one, url)
    before = {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    save(one, url)  # the very model
    with pytest.raises(UserError, match=r"already holds a committed result .* pass another url"):
        save(other, url)
    assert before == {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"is not empty \(1 entries, first 'a.txt'\): pass another url"
    ):
        save(one, tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="is a file, and results need a folder"):
        save(one, tmp_path / "notes" / "a.txt")


def test_a_model_is_saved_on_s3(s3_lake):
    mixture = Mixture(parameters=mixtures.parameters("tied", 3, 2), feature_names=("x", "y"))
    url = save(mixture, f"{s3_lake.url}/out")
    assert_same_bits(load(url).parameters, mixture.parameters)
    with pytest.raises(UserError, match="already holds a committed result"):
        save(replace(mixture, feature_names=("y", "x")), url)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.4])}, r"weights sum to 0\.9"),
        ({"means": torch.full((2, 2), math.nan)}, r"means\[0, 0\] is nan"),
        ({"covariances": -torch.ones(2, 2)}, "a variance that is not positive"),
        ({"covariances": torch.ones(2)}, "model.json says 'diag'"),
        ({"feature_names": ("x",)}, "names 1 features of 2"),
        ({"feature_names": ("x", "x")}, "names the feature 'x' twice"),
        ({"ids": (1, 1)}, "gives the id 1 to two components"),
    ],
)
def test_what_would_not_load_is_not_saved(changes, message, tmp_path):
    mixture = Mixture(parameters=mixtures.parameters("diag", 2, 2))
    numbers = {name: changes.pop(name).double() for name in PARTS if name in changes}
    wrong = replace(mixture, parameters=replace(mixture.parameters, **numbers), **changes)
    with pytest.raises(UserError, match=f"^the model cannot be saved, .*{message}[^\\n]*anew$"):
        save(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["", "  ", None, 3, b"model"])
def test_what_is_no_place_is_not_this_folder(url, tmp_path, monkeypatch):
    model = GaussianMixture().fit([[0.0], [2.0]])
    save(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load(Path()).n_components == 1
    for verb in (load, lambda place: save(model, place)):
        with pytest.raises(UserError, match=r"^url is .*: give a path or URL$"):
            verb(url)


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(NotFittedError):
        save(GaussianMixture(), tmp_path / "out")
    theirs = sklearn.mixture.GaussianMixture(1).fit(rows())
    for model in (theirs, "model", None, GaussianMixture):
        with pytest.raises(TypeError, match=r"^save takes a Mixture or an estimator of gmm_dist"):
            save(model, tmp_path / "out")


@every_type
def test_an_estimator_of_a_mixture_has_its_bits_and_goes_on_from_it(kind):
    X = rows()
    mixture = Mixture(
        parameters=mixtures.parameters(kind, 3, 3),
        feature_names=("a", "b", "c"),
        n_samples=300.0,
        log_likelihood=-900.0,
    )
    model = GaussianMixture.from_mixture(mixture)
    frame = pd.DataFrame(X, columns=list("abc"))
    np.testing.assert_array_equal(model.score_samples(frame), mixture.score_samples(frame))
    np.testing.assert_array_equal(model.predict(frame), mixture.predict(frame))
    assert model.bic(frame) == pytest.approx(mixture.bic(frame), rel=1e-14)
    back = model.to_mixture()
    assert_same_bits(back.parameters, mixture.parameters)
    assert (back.feature_names, back.n_samples) == (mixture.feature_names, 300.0)
    assert back.log_likelihood == -900.0
    assert (model.lower_bound_, model.n_iter_, model.converged_) == (-3.0, 0, False)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[["b", "a", "c"]])
    model.means_ += 1.0  # their memory is their own
    model.weights_[:] = 0.0
    assert_same_bits(back.parameters, mixture.parameters)
    warm = GaussianMixture.from_mixture(mixture).set_params(warm_start=True, max_iter=1, tol=0)
    with pytest.warns(ConvergenceWarning):
        warm.fit(frame)
    # The pass of the first step scores what the mixture was.
    assert warm.lower_bound_ == pytest.approx(mixture.score(X), rel=1e-9)


def test_a_mixture_without_names_makes_an_estimator_without():
    model = GaussianMixture.from_mixture(Mixture(parameters=mixtures.parameters("full", 2, 3)))
    assert not hasattr(model, "feature_names_in_")
    assert model.n_features_in_ == 3
    assert model.lower_bound_ == -math.inf
    assert type(model.to_sklearn()) is sklearn.mixture.GaussianMixture
    assert model.predict(rows()).shape == (300,)


def test_what_makes_no_estimator():
    good = mixtures.parameters("full", 2, 3)
    with pytest.raises(
        TypeError, match=r"^from_mixture takes a gmm_dist\.Mixture, not a Parameters"
    ):
        GaussianMixture.from_mixture(good)
    with pytest.raises(UserError, match=r"^the mixture's numbers are none: the weights sum to"):
        GaussianMixture.from_mixture(Mixture(parameters=replace(good, weights=good.weights / 2)))
    with pytest.raises(UserError, match=r"^the mixture is a posterior's"):
        GaussianMixture.from_mixture(
            Mixture(parameters=replace(good, log_weights=good.weights.log()))
        )
    assert not hasattr(BayesianGaussianMixture, "from_mixture")


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Refuse())
import numpy as np
import gmm_dist

X = np.load({X!r})
mixture = gmm_dist.load({url!r})
found = mixture.predict(X), mixture.score_samples(X)
model = gmm_dist.GaussianMixture.from_mixture(mixture)
assert (model.predict(X) == found[0]).all()
gmm_dist.GaussianMixture(2, random_state=0).fit(X)
gmm_dist.save(model, {url!r} + "-again")
np.savez({out!r}, *found)
assert not set({missing!r}) & set(sys.modules)
"""


def test_a_loaded_model_needs_neither_ray_nor_s3(tmp_path):
    """What remains: torch, safetensors, fsspec for the files, scikit-learn to check the rows."""
    X, mixture = rows(), Mixture(parameters=mixtures.parameters("full", 2, 3))
    np.save(tmp_path / "X.npy", X)
    url, out = save(mixture, tmp_path / "out"), str(tmp_path / "found.npz")
    missing = ("aiohttp", "boto3", "botocore", "grpc", "jinja2", "matplotlib", "pyarrow", "ray")
    missing += ("rich", "s3fs", "aiobotocore", "pandas")
    code = ALONE.format(missing=missing, X=str(tmp_path / "X.npy"), url=str(url), out=out)
    command, root = [sys.executable, "-c", code], Path(gmm_dist.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(out) as archive:
        found = dict(archive)
    np.testing.assert_array_equal(found["arr_0"], mixture.predict(X))
    np.testing.assert_allclose(found["arr_1"], mixture.score_samples(X), rtol=1e-12)
