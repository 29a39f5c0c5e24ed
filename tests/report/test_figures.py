"""Drawings say what they are, adapt to their page, and place things where they belong."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import mixtures
import naive
import numpy as np
import pages
import pytest

from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.report import figures
from gmm_dist.report.figures import Point
from gmm_dist.report.projection import Clusters, plane

SERIES = {"full": [Point(1, 100.0), Point(2, 0.0), Point(3, 4.0, False)], "diag": [Point(2, 25.0)]}


def numbers_of(svg: str) -> dict[str, tuple[float, float]]:
    """Return where each bold text stands."""
    texts = [e for e in ET.fromstring(svg).iter("text") if "700" in e.attrib["style"]]
    return {str(e.text): (float(e.attrib["x"]), float(e.attrib["y"])) for e in texts}


def test_colours_and_fonts_are_the_pages():
    svg = figures.criterion("c", "BIC above its lowest, nats", SERIES, (2, "full")).svg
    assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|font-family|white|black", svg)
    variables = {"--ink", "--muted", "--grid", "--accent", "--c0", "--c1"}
    assert variables <= set(re.findall(r"var\((--\w+)\)", svg))
    root = ET.fromstring(svg)
    assert "width" not in root.attrib
    assert root.find("title").text.endswith("chosen K = 2")
    assert "full: K 1: 100.000, K 2: 0" in root.find("desc").text


def test_one_drawing_has_the_same_bytes_again_and_its_own_ids():
    first, again, other = (
        figures.criterion(name, "BIC", SERIES, (2, "full")).svg for name in ("a", "a", "b")
    )
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0].isdisjoint(ids[1])


def test_only_unranked_values_are_crosses_and_none_is_lost_to_the_scale():
    svg = figures.criterion(
        "c", "BIC", {"full": [Point(1, 1.0), Point(2, -1e9, False)]}, (1, "full")
    )
    assert "nan" not in svg.svg
    assert "−1" not in svg.svg


def test_a_heat_map_lets_the_page_through_at_the_mean():
    tinted = figures._tinted(np.array([[-1.0, 0.0, 1.0, 9.0]]))
    assert tinted[0, 1, 3] == 0
    assert tinted[0, 0, 3] == tinted[0, 2, 3] == tinted[0, 3, 3] > 200
    assert (tinted[0, 0, :3] != tinted[0, 2, :3]).any()
    svg = figures.heat_map("h", pages.clusters(60, 60), range(60)).svg
    assert "data:image/png;base64," in svg
    assert len(svg) < 100_000
    assert svg.count("<text") >= 120


def test_no_number_of_a_picture_hides_another():
    clusters, sample = pages.clusters(60, 5), pages.sample(60, 5)
    order = list(np.argsort(-clusters.weights))
    drawing = figures.scatter("s", clusters, plane(clusters), sample.X, sample.labels, order)
    places = numbers_of(drawing.svg)
    assert set(places) == set(clusters.numbers)
    for (one, at), (other, there) in itertools.combinations(places.items(), 2):
        wide = 3.2 * (len(one) + len(other))
        assert abs(at[0] - there[0]) > wide or abs(at[1] - there[1]) > 8, f"{one} hides {other}"


def test_a_component_far_off_does_not_squeeze_the_rest():
    clusters, sample = pages.clusters(3, 2), pages.sample(3, 2)
    means = np.vstack([clusters.means[:2], [[1e9, 1e9]]])
    far = replace(clusters, means=means)
    points = sample.X[sample.labels < 2]
    (x0, x1), _ = figures._frame(points, means)
    assert points[:, 0].min() - 10 < x0 < x1 < points[:, 0].max() + 10
    assert figures.n_outside(far, plane(far), np.vstack([points, [[1e9, 1e9]]])) > 0


@pytest.mark.parametrize(
    ("x", "means", "low", "high"),
    [
        ([5.0] * 400, [5.0, 5.0], 4.0, 6.0),
        ([5.0] * 400, [7.0], 4.0, 6.0),
        ([0.0] * 400, [1e-12, 3.0], -1.0, 1.0),
        ([1e17] * 400, [1e17], 0.999e17, 1.001e17),
        ([0.0] * 399 + [5.0], [0.0, 5.0], -0.3, 5.3),
        ([0.0] * 399 + [5.0], [0.0125], -0.3, 5.3),
        ([-2.0], [9.0], -3.0, -1.0),
    ],
)
def test_an_axis_on_which_rows_are_equal_has_a_width(x, means, low, high):
    """Whether or not a mean lies there, to the last bit."""
    frame, same = figures._frame(np.array([x, x]).T, np.array([means, means]).T)
    assert frame == same == pytest.approx((low, high), rel=1e-12)


def test_spreads_of_any_unit_are_told():
    """Squares of the features' units need not be numbers."""
    one = pages.clusters(3, 2, "diag")
    units = np.array([1e150, 1e-150])
    far = replace(one, means=one.means * units, covariances=one.covariances * units**2)
    np.testing.assert_allclose(far.standardised, one.standardised, rtol=1e-12)
    np.testing.assert_allclose(far.scale, one.scale * units, rtol=1e-12)
    flat = replace(one, means=np.full((3, 2), 1e300), covariances=np.zeros((3, 2)))
    assert flat.scale.tolist() == [1.0, 1.0]
    assert not flat.standardised.any()


def test_colours_go_with_the_number_from_night_to_night():
    clusters = replace(pages.clusters(3, 2), numbers=("7", "15", "new"))
    assert figures.colours(clusters) == [7, 15, 2]


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-9, 3e-4, 1.0, 8e9])
def test_any_distance_from_the_best_can_be_drawn(value):
    points = {"full": [Point(1, 0.0), Point(2, value)]}
    assert "nan" not in figures.criterion("c", "BIC", points, (1, "full")).svg


def test_discriminants_find_the_direction_that_parts_the_means():
    """Means differ along one oblique direction of little variance, which variance alone hides."""
    covariance = np.diag([1.0, 1.0, 1e6])
    means = np.array([[0.0, 0, 0], [6, 6, 0], [0, 12, 0]])
    one = Clusters(
        weights=np.full(3, 1 / 3),
        means=means,
        covariances=np.stack([covariance] * 3),
        feature_names=("x", "y", "z"),
        numbers=("0", "1", "2"),
    )
    seen = plane(one)
    assert seen.kind == "the discriminant plane"
    np.testing.assert_allclose(np.abs(seen.axes[2]), 0, atol=1e-6)
    projected = seen(means)
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(projected, 2)]
    spread = np.sqrt(one.projected(seen.axes)[0].diagonal().max())
    assert min(gaps) > 3 * spread
    assert {name for name, _ in seen.made_of[0][:2]} == {"x", "y"}


@pytest.mark.parametrize(
    ("k", "words"), [(1, "principal plane"), (2, "discriminant and the first")]
)
def test_what_the_means_do_not_span_is_filled_with_principal_directions(k, words):
    clusters = pages.clusters(k, 5)
    seen = plane(clusters)
    assert words in seen.kind
    apart = clusters.means - clusters.weights @ clusters.means
    total = clusters.within + apart.T @ np.diag(clusters.weights) @ apart
    a, b = seen.axes.T
    assert abs(a @ total @ b) < 1e-8 * np.sqrt((a @ total @ a) * (b @ total @ b))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_projected_covariances_are_those_of_the_matrices(kind):
    clusters = pages.clusters(4, 3, kind)
    axes = np.arange(6.0).reshape(3, 2)
    matrices = naive.covariance_matrices(mixtures.parameters(kind, 4, 3, spread=4.0))
    for c, own in enumerate(matrices):
        np.testing.assert_allclose(clusters.projected(axes)[c], axes.T @ own @ axes)
        np.testing.assert_allclose(clusters.variances[c], own.diagonal())
    np.testing.assert_allclose(clusters.within, np.tensordot(clusters.weights, matrices, 1))
