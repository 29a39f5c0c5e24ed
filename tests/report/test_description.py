"""Clusters are described by what sets them apart from their nearest, whatever the units."""

from __future__ import annotations

from dataclasses import replace

import mixtures
import numpy as np
import pytest

from gmm_dist.model.mixture import Mixture
from gmm_dist.report.description import arrays_of, described
from gmm_dist.report.projection import Clusters


def components(means, spreads, groups=None, weights=None) -> Clusters:
    means = np.array(means, dtype=float)
    k = len(means)
    return Clusters(
        weights=np.full(k, 1 / k) if weights is None else np.array(weights),
        means=means,
        covariances=np.array(spreads, dtype=float) ** 2,
        feature_names=tuple(f"f{j}" for j in range(means.shape[1])),
        numbers=tuple(map(str, range(k))),
        groups=groups,
    )


def test_a_cluster_is_unlike_its_nearest_and_not_unlike_all_rows():
    # The middle one lies at the mean of all rows.
    found = described(components([[-9, 0], [0, 0], [4, 0]], np.ones((3, 2))))
    assert [one.nearest for one in found] == [1, 2, 1]
    assert found[1].words == "f0 0 (4.00)"
    assert found[0].words == "f0 \u22129.00 (0)"


def test_the_nearest_is_so_in_standard_deviations():
    # In feature 0, 3 is 3 standard deviations; in feature 1, 40 is 0.4.
    found = described(components([[0, 0], [3, 0], [0, 40]], [[1, 100]] * 3))
    assert found[0].nearest == 2
    assert found[0].words == "how the features go together"


def test_spreads_tell_apart_where_means_do_not():
    found = described(components([[1, 2], [1, 2]], [[1, 5], [3, 5]]))
    assert found[1].words == "spread of f0 3.0 (1.0)"


def test_moments_of_a_cluster_are_those_of_its_components():
    rng = np.random.default_rng(0)
    means, spreads = rng.normal(size=(5, 3)), rng.uniform(0.5, 2, size=(5, 3))
    weights = rng.dirichlet(np.ones(5))
    groups = (0, 1, 0, 1, 1)
    found = described(components(means, spreads, groups, weights))
    for c, one in enumerate(found):
        own = [i for i, group in enumerate(groups) if group == c]
        share = weights[own].sum()
        each = weights[own] / share
        second = each @ (means[own] ** 2 + spreads[own] ** 2)
        mean = each @ means[own]
        assert one.share == pytest.approx(share)
        np.testing.assert_allclose(one.mean, mean)
        np.testing.assert_allclose(one.spread, np.sqrt(second - mean**2))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e150])
def test_units_do_not_matter(scale):
    one = components([[0, 0], [3, 1], [9, 9]], np.ones((3, 2)), (0, 1, 1))
    # Standard deviations are kept as variances, whose range ends sooner.
    scaled = replace(one, means=one.means * scale, covariances=one.covariances * scale * scale)
    expected = [1, 0]
    assert [d.nearest for d in described(one)] == expected
    if scale * scale > 0:
        assert [d.nearest for d in described(scaled)] == expected


def test_constant_features_and_one_cluster():
    assert described(components([[1, 1]], [[1, 0]]))[0].nearest is None
    found = described(components([[0, 5], [3, 5]], [[1, 0], [1, 0]]))
    assert found[0].words == "f0 0 (3.00)"
    found = described(components([[0, 5], [0, 6]], [[1, 0], [1, 0]]))
    assert found[0].words == "f1 5.00 (6.00)"


def test_a_mixture_without_names_has_numbered_features():
    mixture = Mixture(parameters=mixtures.parameters("tied", 2, 2))
    assert arrays_of(mixture).feature_names == ("x0", "x1")
    assert len(described(arrays_of(mixture))) == 2
