"""A fitted mixture scores rows as scikit-learn's does."""

from __future__ import annotations

import json
from pathlib import Path

import mixtures
import naive
import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from gmm_dist import Mixture, UserError
from gmm_dist.model import criteria, densities
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.parameters import Parameters

every_type = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
FORMS = {
    "float64": lambda X: X.numpy(),
    "float32": lambda X: X.float().numpy(),
    "tensor": lambda X: X,
    "float32 tensor": lambda X: X.float(),
    "whole numbers": lambda X: X.round().long().numpy(),
    "column-major": lambda X: np.asfortranarray(X.numpy()),
    "reversed": lambda X: X.numpy()[::-1, ::-1],
    "big-endian": lambda X: X.numpy().astype(">f8"),
    "every other": lambda X: torch.cat([X, X], 1).numpy()[::2, ::2],
}


def scikit_learns(parameters: Parameters) -> GaussianMixture:
    """Return scikit-learn's mixture of these parameters."""
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    parameters = mixtures.in_scikit_learn(parameters)
    kind, covariances = parameters.covariance_type, parameters.covariances.numpy()
    model = GaussianMixture(parameters.n_components, covariance_type=kind)
    model.weights_ = parameters.weights.numpy()
    model.means_ = parameters.means.numpy()
    model.covariances_ = covariances
    model.precisions_cholesky_ = _compute_precision_cholesky(covariances, kind)
    model.n_features_in_ = parameters.n_features
    return model


def example(kind):
    return mixtures.parameters(kind, 3, 4), mixtures.rows(mixtures.parameters("full", 3, 4), 200)


@every_type
@pytest.mark.parametrize("form", FORMS)
def test_equals_scikit_learn(kind, form):
    parameters, X = example(kind)
    rows = FORMS[form](X)
    ours, theirs = Mixture(parameters=parameters), scikit_learns(parameters)
    # scikit-learn computes in the rows' precision; ours is float64 of the same values.
    exact = np.asarray(rows).astype(np.float64)
    for verb in ("predict", "predict_proba", "score_samples"):
        found, expected = getattr(ours, verb)(rows), getattr(theirs, verb)(exact)
        assert type(found) is type(rows)
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=1e-12)
    # Where scikit-learn lacks the type, it counts each component's variances.
    for verb in ("score", "bic", "aic") if kind in mixtures.SCIKIT_LEARNS else ("score",):
        assert getattr(ours, verb)(rows) == pytest.approx(getattr(theirs, verb)(exact), rel=1e-10)


def test_results_are_float64_and_labels_int64():
    parameters, X = example("full")
    for rows, whole, real in (
        (X.float(), torch.int64, torch.float64),
        (X.float().numpy(), np.int64, np.float64),
    ):
        model = Mixture(parameters=parameters)
        assert model.predict(rows).dtype == whole
        assert model.predict_proba(rows).dtype == real
        assert model.score_samples(rows).dtype == real


def test_rows_that_cannot_be_written_to_are_read():
    """As they come from Parquet and from other processes."""
    parameters, X = example("full")
    rows = X.numpy().copy()
    rows.flags.writeable = False
    expected = Mixture(parameters=parameters).score_samples(X.numpy())
    np.testing.assert_array_equal(Mixture(parameters=parameters).score_samples(rows), expected)


@every_type
def test_chunks_do_not_show(kind, monkeypatch):
    parameters, X = example(kind)
    model = Mixture(parameters=parameters)
    whole = model.predict_proba(X), model.score_samples(X), model.predict(X)
    monkeypatch.setattr(densities, "chunk_rows", lambda *_: 48)
    pieces = model.predict_proba(X), model.score_samples(X), model.predict(X)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@every_type
def test_far_from_the_origin_and_far_from_everything(kind):
    parameters, X = example(kind)
    offset = torch.full((4,), 2.0**30, dtype=torch.float64)
    X = (X * 2**20).round() / 2**20
    means = (parameters.means * 2**20).round() / 2**20
    here = Parameters(
        weights=parameters.weights,
        means=means,
        covariances=parameters.covariances,
        covariance_type=kind,
    )
    there = Mixture(parameters=here.shifted(offset))
    torch.testing.assert_close(
        there.score_samples(X + offset),
        Mixture(parameters=here).score_samples(X),
        rtol=1e-12,
        atol=0,
    )
    far = Mixture(parameters=here).predict_proba(X + offset)
    assert torch.isfinite(far).all()
    torch.testing.assert_close(far.sum(1), torch.ones(len(X), dtype=torch.float64))


@every_type
def test_icl_adds_twice_the_soft_entropy(kind):
    parameters, X = example(kind)
    model, entropy = Mixture(parameters=parameters), naive.e_step(X, parameters).entropy
    assert model.icl(X.numpy()) == pytest.approx(model.bic(X) + 2 * entropy, rel=1e-12)


def test_criteria_are_those_of_the_reference():
    text = (Path(__file__).parents[1] / "reference" / "gmm_cases.json").read_text()
    for case in json.loads(text)["cases"]:
        bic = criteria.bic(case["ll"], case["df"], case["n"])
        assert bic == pytest.approx(case["bic"], abs=2e-6)
        assert criteria.aic(case["ll"], case["df"]) == pytest.approx(case["aic"], abs=2e-6)
        assert criteria.icl(bic, case["entropy"]) == pytest.approx(case["icl_soft"], abs=4e-6)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 5), (2, 5, 4)])
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_rows_of_another_width_are_refused(shape, make):
    parameters, _ = example("diag")
    model = Mixture(parameters=parameters, feature_names=("a", "b", "c", "d"))
    with pytest.raises(UserError) as error:
        model.predict(make(shape))
    assert str(error.value).endswith(
        ": give rows (n, 4), one column per feature of the mixture, in their order (a, b, c, d)"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_no_rows_have_no_labels_and_no_criteria(make):
    parameters, _ = example("diag")
    model, none = Mixture(parameters=parameters), make((0, 4))
    assert model.predict(none).shape == (0,)
    assert model.predict_proba(none).shape == (0, 3)
    assert model.score_samples(none).shape == (0,)
    for verb in (model.score, model.bic, model.aic, model.icl):
        with pytest.raises(UserError, match="give one or more"):
            verb(none)


def test_a_mixture_says_what_it_is():
    for kind in mixtures.SCIKIT_LEARNS:
        model = Mixture(parameters=mixtures.parameters(kind, 3, 4))
        assert (model.n_components, model.n_features) == (3, 4)
        assert model.covariance_type == kind
        assert model.n_parameters == scikit_learns(model.parameters)._n_parameters()


def test_a_component_without_weight_gets_no_rows():
    parameters, X = example("full")
    weights = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64)
    empty = Parameters(
        weights=weights,
        means=parameters.means,
        covariances=parameters.covariances,
        covariance_type="full",
    )
    resp = Mixture(parameters=empty).predict_proba(X)
    assert not resp[:, 1].any()
    torch.testing.assert_close(resp.sum(1), torch.ones(len(X), dtype=torch.float64))


def test_its_repr_is_one_short_line():
    parameters, _ = example("full")
    said = "Mixture(n_components=3, n_features=4, covariance_type='full', feature_names="
    assert repr(Mixture(parameters=parameters)) == f"{said}())"
    assert (
        repr(Mixture(parameters=parameters, feature_names=("a", "b\n", "c", "d")))
        == f"{said}('a', 'b\\n', 'c', 'd'))"
    )
    wide = Mixture(
        parameters=mixtures.parameters("diag", 2, 300),
        feature_names=tuple(f"{j}" * 300 for j in range(300)),
    )
    assert repr(wide).count("\n") == 0
    assert len(repr(wide)) < 500


@every_type
@pytest.mark.parametrize("far", [1e20, 1e160, -1.7e308])
def test_rows_beyond_every_component_have_one_component(kind, far):
    """Distances that overflow, or have no digits left for what sets components apart."""
    mixture = Mixture(parameters=mixtures.parameters(kind, 3, 2, seed=2))
    X = torch.full((2, 2), far, dtype=torch.float64)
    X[1] = 0.0
    resp = mixture.predict_proba(X)
    assert resp[0].max() == 1
    assert resp[0].sum() == 1
    assert int(mixture.predict(X)[0]) == int(resp[0].argmax())
    torch.testing.assert_close(resp[1:], mixture.predict_proba(X[1:]))
    assert not bool(mixture.score_samples(X).isnan().any())
