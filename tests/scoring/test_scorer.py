"""What is written of a row equals what scikit-learn says of it."""

from __future__ import annotations

import mixtures
import numpy as np
import pyarrow as pa
import pytest
from sklearn.mixture import GaussianMixture

from gmm_dist.errors import UserError
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.parameters import Parameters
from gmm_dist.scoring.scorer import Scorer, Scoring

NONE = pa.schema([])
K, D = 5, 4


def reference(mixture: Parameters) -> GaussianMixture:
    """Return scikit-learn's mixture of the same parameters."""
    mixture = mixtures.in_scikit_learn(mixture)
    model = GaussianMixture(mixture.n_components, covariance_type=mixture.covariance_type)
    model.weights_, model.means_ = mixture.weights.numpy(), mixture.means.numpy()
    model.covariances_ = mixture.covariances.numpy()
    factors, _ = TYPE_OF[mixture.covariance_type].precisions_cholesky(mixture.stacked_covariances)
    model.precisions_cholesky_ = mixture.type.unstacked(factors).numpy()
    return model


def scored(X, mixture: Parameters, kept: pa.Table | None = None, **options) -> pa.Table:
    kept = pa.table({}) if kept is None else kept
    scorer = Scorer(Scoring(mixture=mixture, kept=kept.schema, **options))
    return scorer.table(kept, np.ascontiguousarray(np.asarray(X, dtype=np.float64).T))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_it_says_what_scikit_learn_says(kind, shift):
    mixture = mixtures.parameters(kind, K, D).shifted(shift * mixtures.normal_rows(1, D)[0])
    X = mixtures.normal_rows(5000, D, seed=1).numpy() * 3 + mixture.means.numpy().mean(0)
    found, expected = scored(X, mixture, probabilities=True), reference(mixture)
    resp = expected.predict_proba(X)
    assert found["component"].to_pylist() == expected.predict(X).tolist()
    np.testing.assert_allclose(found["probability"], resp.max(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["log_density"], expected.score_samples(X), atol=1e-6)
    written = np.stack(found["probabilities"].to_numpy())
    np.testing.assert_allclose(written, resp, rtol=0, atol=1e-6)
    assert found.schema.field("component").type == pa.int32()
    assert found.schema.field("probabilities").type == pa.list_(pa.float64(), K)


def test_a_row_with_a_hole_keeps_its_place_with_nulls():
    X = mixtures.normal_rows(3000, D).numpy().copy()
    X[[0, 17, 2999], [1, 0, 3]] = np.nan
    mixture = mixtures.parameters("full", K, D)
    table = scored(X, mixture, probabilities=True, threshold=-7.0)
    whole = np.ones(3000, dtype=bool)
    whole[[0, 17, 2999]] = False
    for column in table.columns:
        assert column.is_valid().to_pylist() == whole.tolist()
    others = scored(X[whole], mixture, probabilities=True, threshold=-7.0)
    left = table.filter(pa.array(whole))
    # Rows lie elsewhere in the batch, so that the last bits may be others.
    for name in others.column_names:
        if name in ("component", "outlier"):
            assert left[name].equals(others[name])
        else:
            mine, expected = (np.array(t[name].to_pylist()) for t in (left, others))
            np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-12)


def test_outliers_lie_below_the_threshold():
    X, mixture = mixtures.normal_rows(1000, D), mixtures.parameters("diag", K, D)
    table = scored(X, mixture, threshold=-8.0)
    low = table["log_density"].to_numpy() < -8
    assert 0 < low.sum() < 1000
    assert table["outlier"].to_pylist() == low.tolist()


def test_kept_columns_come_first_and_dictionaries_are_spelt_out():
    names = pa.array(["a", None, "a"]).dictionary_encode()
    kept = pa.table({"name": names, "id": [3, 1, 2]}).replace_schema_metadata({"pandas": "x"})
    table = scored(mixtures.normal_rows(3, D), mixtures.parameters("full", 2, D), kept)
    assert table.column_names == ["name", "id", "component", "probability", "log_density"]
    assert table.schema.field("name").type == pa.string()
    assert table.schema.metadata is None
    assert table["name"].to_pylist() == ["a", None, "a"]


def test_the_name_of_a_written_column_cannot_be_kept():
    kept = pa.schema([("outlier", pa.bool_())])
    mixture = mixtures.parameters("full", 2, D)
    assert Scoring(mixture=mixture, kept=kept).schema.names[0] == "outlier"
    with pytest.raises(UserError, match="keep outlier would stand beside the column of that nam"):
        Scoring(mixture=mixture, kept=kept, threshold=0.0)


def test_rows_beyond_all_distances_have_finite_scores():
    X = np.array([[1e200] * D, [-1e160] * D, [0.0] * D])
    table = scored(X, mixtures.parameters("full", K, D), probabilities=True)
    assert np.isfinite(table["log_density"]).all()
    assert table["log_density"].to_numpy()[:2].max() < -1e299
    np.testing.assert_allclose(np.stack(table["probabilities"].to_numpy()).sum(1), 1)


def test_any_cut_into_batches_gives_the_same_rows():
    X, mixture = mixtures.normal_rows(5000, D), mixtures.parameters("full", K, D)
    whole = scored(X, mixture)
    parts = pa.concat_tables([scored(X[a : a + 1700], mixture) for a in range(0, 5000, 1700)])
    assert parts["component"].equals(whole["component"])
    np.testing.assert_allclose(parts["log_density"], whole["log_density"], rtol=1e-14)
    assert scored(X[:0], mixture, probabilities=True).num_rows == 0


def test_a_rows_cluster_is_that_of_the_largest_sum_beside_its_component():
    X, mixture = mixtures.normal_rows(3000, D), mixtures.parameters("full", K, D, spread=0.7)
    X[7, 1] = np.nan
    clusters = (0, 1, 1, 0, 1)
    table = scored(X, mixture, probabilities=True, ids=(9, 8, 7, 6, 5), clusters=clusters)
    names = ["component", "cluster", "probability", "log_density", "probabilities"]
    assert table.column_names == names
    assert table.schema.field("cluster").type == pa.int32()
    assert table["cluster"].null_count == 1
    whole = np.arange(3000) != 7
    resp = np.stack(table["probabilities"].filter(pa.array(whole)).to_numpy())
    sums = np.stack([resp[:, [0, 3]].sum(1), resp[:, [1, 2, 4]].sum(1)], 1)
    assert table["cluster"].drop_null().to_pylist() == sums.argmax(1).tolist()
    # A row may belong to another cluster than its component does.
    assert sums.argmax(1).tolist() != np.array(clusters)[resp.argmax(1)].tolist()
    with pytest.raises(UserError, match="keep cluster would stand beside the column of that name"):
        Scoring(mixture=mixture, kept=pa.schema([("cluster", pa.int32())]), clusters=clusters)
