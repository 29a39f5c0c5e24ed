"""The report is one well-formed page that needs nothing else, whatever it is told."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pages
import pytest
from pages import Page, candidate, clusters, content, sample

from gmm_dist.em.lane import Status
from gmm_dist.errors import Option
from gmm_dist.model import clusters as merging
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.nightly import drift as drift_module
from gmm_dist.report.of_components import Intervals
from gmm_dist.report.of_settings import in_words
from gmm_dist.report.page import Sample, render
from gmm_dist.report.projection import Clusters

SWEEP = [candidate(k, rank) for k, rank in ((2, 2), (3, 1), (4, 3))]
ONE = [candidate(3, 1, lower_bounds=[])]
FAILED = candidate(9, None, status=Status.DEGENERATE.value, converged=False, bic=1.0)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def page(*args, **options) -> tuple[str, Page]:
    """Render, and assert what holds of every report."""
    html = render(*args, **options)
    found = Page(html)
    assert found.wrong == []
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    referred = {word for _, a in found.tags for word in (a.get("aria-labelledby") or "").split()}
    referred |= set(re.findall(r"url\(#([^)]+)\)", html)) | set(
        re.findall(r'href="#([^"]+)"', html)
    )
    assert referred <= set(found.ids)
    # Nothing is loaded: no address but pictures within the page, no script, and the page says so.
    addresses = [a[key] for _, a in found.tags for key in ("src", "href", "xlink:href") if key in a]
    assert all(re.match(r"#|data:image/png;base64,", str(a)) for a in addresses)
    assert not re.search(r"https?:|[\"'(]//|@import", html)
    assert found.named("script") == []
    policy = {m.get("http-equiv"): m["content"] for m in found.named("meta") if "content" in m}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'")
    for svg in found.named("svg"):
        assert svg["role"] == "img"
        assert svg["viewbox"]
    assert len(found.named("svg")) == len(found.named("title")) - 1 == len(found.named("desc"))
    return html, found


def test_every_candidate_is_in_the_table_and_the_choice_is_explained():
    html, found = page(content([*SWEEP, FAILED], 4), clusters(3, 4), sample(3, 4))
    ranks = [(row[0], row[1]) for row in found.rows if len(row) == 11][1:]
    assert ranks == [("1", "3"), ("2", "2"), ("3", "4"), ("–", "9")]
    assert "K = 3 full has the lowest BIC of 4 candidates, 1,234 nats ahead of the next" in html
    assert "AIC would choose K = 4 full; ICL would choose K = 2 full." in html
    assert f"K = 9 full: {Status.DEGENERATE.value}." in html
    assert "20,000,000.0" in html
    for drawing in ("by-bic", "by-aic", "by-icl", "heat-map", "picture", "climb", "approach"):
        assert f"{drawing}-title" in found.ids
    assert "by-holdout-title" not in found.ids


def test_counts_settings_and_versions_are_told():
    html, found = page(content(SWEEP, 4), clusters(3, 4), sample(3, 4))
    assert ["rows read", "1,250,000", "100.0\u202f%"] in found.rows
    assert ["dropped for a missing value", "10", "< 0.01\u202f%"] in found.rows
    assert ["fitted", "1,000,000", "80.0\u202f%"] in found.rows
    assert ["missing values filled with the column's mean", "7 values", ""] in found.rows
    assert ["a fit has converged when it gains less, nats per row", "1e-05"] in found.rows
    assert ["s3fs", "–"] in found.rows
    assert "column &#39;flat&#39; is constant" in html
    assert "1 h 2 min" in html


def test_means_are_in_data_units_beside_their_spread():
    found = clusters(3, 4)
    means = found.means * [1, 1e-3, 1e4, 1e7] + [0, 5, 0, 1e8]
    scale = [1, 1e-3, 1e4, 1e7]
    covariances = found.covariances * [[a * b for a in scale] for b in scale]
    _, read = page(content(SWEEP, 4), replace(found, means=means, covariances=covariances))
    table = next(i for i, row in enumerate(read.rows) if row[1:] == list(found.feature_names))
    largest = int(found.weights.argmax())
    cells = read.rows[table + 1]
    assert cells[0] == str(largest)
    for j, cell in enumerate(cells[1:]):
        mean, spread = (
            (float(text.replace(",", "").replace("\u2212", "-")) for text in cell.split("± "))
            if "± " in cell
            else (math.nan, math.nan)
        )
        exact = math.sqrt(covariances[largest, j, j])
        assert spread == pytest.approx(exact, rel=0.05)
        assert mean == pytest.approx(means[largest, j], abs=0.05 * exact)


def test_equal_input_gives_equal_bytes():
    given = content(SWEEP, 4), clusters(3, 4), sample(3, 4)
    assert render(*given) == render(*given)


HOSTILE = [
    "</title><script>alert(1)</script>",
    "\"><img src=x> a & b < c > d ' e",
    "$a_b$ {{ 7 }} 年齢 a\x00\ud800b \n \x1b[31m \u202e \ufffe",
    "👩‍👩‍👧 עברית العربية हिन्दी",
    "x" * 300,
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name):
    names = (name, *(f"x{j}" for j in range(3)))
    told = content(ONE, 4, feature_names=list(names), data=f"/tmp/{name}", warnings=[name])
    nightly = {"night": name, "published": False, "reasons": [name]}
    nightly["drift"] = pages.drift((0, 1), names)
    found = replace(clusters(3, 4), feature_names=names)
    html, read = page(told, found, sample(3, 4), nightly)
    assert read.named("img") == []
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    shown = "".join(escaped)
    shown = shown if len(shown) < 64 else f"{'x' * 42}…{'x' * 21}"
    assert any(row[1:2] == [shown] for row in read.rows)
    assert html.encode()
    for drawing in re.findall("<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(drawing)


@pytest.mark.parametrize(
    ("k", "d", "kind"),
    [
        (1, 1, "full"),
        (3, 1, "diag"),
        (1, 7, "spherical"),
        (2, 3, "tied"),
        (2, 2, "full"),
        (5, 2, "diag"),
    ],
)
def test_few_components_and_features_make_a_page(k, d, kind):
    told = content([candidate(k, 1, covariance_type=kind)], d)
    html, found = page(told, clusters(k, d, kind), sample(k, d))
    assert "One candidate was fitted" in html
    assert "by-bic-title" not in found.ids
    assert "picture-title" in found.ids


def fitted(X: np.ndarray, labels: np.ndarray, reg: float = 1e-12) -> tuple[Clusters, Sample]:
    """Return the mixture that has these rows' own moments, and the rows as a sample."""
    d, k = X.shape[1], int(labels.max()) + 1
    groups = [X[labels == c] for c in range(k)]
    apart = [g - g[0] - (g - g[0]).mean(0) for g in groups]
    made = Clusters(
        weights=np.array([len(g) / len(X) for g in groups]),
        means=np.stack([g[0] + (g - g[0]).mean(0) for g in groups]),
        covariances=np.stack([a.T @ a / len(a) + reg * np.eye(d) for a in apart]),
        feature_names=tuple(f"x{j}" for j in range(d)),
        numbers=tuple(str(c) for c in range(k)),
    )
    return made, Sample(X, labels)


TWO = np.repeat([0, 1], 150)
ALL = np.zeros(300, dtype=np.int64)
Z = np.random.default_rng(0).normal(size=300) + 8 * TWO
RARE = np.where(np.arange(300) == 7, 5.0, 0.0)
ROWS = {
    "an axis is flat": (np.c_[Z, np.ones(300)], TWO),
    "an axis is flat for nearly all": (np.c_[Z, RARE], TWO),
    "all rows are equal": (np.ones((300, 2)), TWO),
    "all rows are equal, one component": (np.full((300, 3), -3e5), ALL),
    "one feature, all rows equal": (np.full((300, 1), 0.1), TWO),
    "one feature, nearly all rows equal": (RARE[:, None], ALL),
    "flat and far from zero": (np.c_[Z, np.full(300, 1e17)], TWO),
    "flat where squares overflow": (np.c_[Z, np.full(300, 1e300), Z], TWO),
    "two features are equal": (np.c_[Z, Z], TWO),
    "three features are one": (np.c_[Z, Z, -Z], TWO),
    "a spread of some ulp": (np.c_[Z, 1 + 2e-16 * Z], TWO),
    "tiny units": (1e-150 * np.c_[Z, Z**2], TWO),
    "huge units": (1e150 * np.c_[Z, Z**2, np.sin(Z)], TWO),
    "units far apart": (np.c_[1e-150 * Z, 1e150 * np.sin(Z), Z], TWO),
    "one row": (np.array([[1.0, 2.0, 3.0]]), ALL[:1]),
}


@pytest.mark.parametrize(("X", "labels"), ROWS.values(), ids=ROWS)
def test_whatever_the_rows_the_report_is_drawn(X, labels):
    found, rows = fitted(X, labels, reg=0.0 if "e-150" in f"{X.max():.0e}" else 1e-12)
    told = content([candidate(len(found.weights), 1, lower_bounds=[])], X.shape[1])
    html, read = page(told, found, rows)
    assert {"picture-title", "heat-map-title"} <= set(read.ids)
    assert not re.search(r"\b(nan|inf)\b", " ".join(read.text))
    assert not re.search(r"[ =\"](nan|inf)[ \"]", html)


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_components_that_no_row_has_are_drawn(kind):
    """Without weight, without a spread, and far from all rows."""
    some, rows = clusters(3, 4, kind), sample(3, 4)
    means = np.vstack([some.means[:2], np.full((1, 4), 1e12)])
    found = replace(
        some, weights=np.array([0.5, 0.5, 0.0]), means=means, covariances=0 * some.covariances
    )
    _, read = page(content(ONE, 4), found, rows)
    empty = next(row for row in read.rows if row[0] == "2" and "%" in row[1])
    assert (empty[1], empty[3]) == ("0.00\u202f%", "0")


def test_rows_far_from_all_components_are_drawn():
    only = replace(clusters(1, 2), means=np.full((1, 2), -1e9))
    page(content([candidate(1, 1)], 2), only, replace(sample(3, 2), labels=np.zeros(2000, int)))


def test_sixty_components_of_sixty_features_stay_small():
    told = content([candidate(k, 61 - k if k > 1 else 60) for k in range(1, 61)], 60)
    html, found = page(told, clusters(60, 60), sample(60, 60, 5000))
    assert len(html.encode()) < 1_500_000
    assert len([row for row in found.rows if len(row) == 61]) == 61
    assert len([a for a in found.named("use") if str(a["href"]).startswith("#picture")]) < 2100


def test_of_very_many_components_and_features_the_telling_ones_are_shown():
    told = content([candidate(150, 1)], 90)
    html, _ = page(told, clusters(150, 90, "diag"), None)
    assert "the 100 largest of 150 components and the 60 of 90 features that tell them best" in html
    assert len(html.encode()) < 1_500_000


def test_numbers_that_are_absent_or_not_finite_are_dashes():
    odd = [
        candidate(2, 2, bic=math.inf, aic=None, icl=math.nan, seconds=None),
        candidate(3, 1),
        candidate(4, None, log_likelihood=math.nan, bic=None, lower_bounds=[], converged=False),
    ]
    _, found = page(content(odd, 4), clusters(3, 4), sample(3, 4))
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(found.text))
    assert next(row for row in found.rows if row[:2] == ["2", "2"])[4:7] == ["–"] * 3


def test_held_out_rows_rank_from_the_highest():
    ranked = [candidate(k, rank, holdout=-9.0 - rank) for k, rank in ((2, 2), (3, 1), (4, 3))]
    html, found = page(content(ranked, 4, criterion="holdout"), clusters(3, 4), sample(3, 4))
    assert "K = 3 full has the highest held-out log-likelihood of 3 candidates, 1.000 nats" in html
    assert "−10.0000 nats per row" in html
    assert "by-holdout-title" in found.ids


def test_nothing_ranked_shows_the_table_alone():
    html, found = page(content([FAILED, FAILED | {"k": 8}], 4))
    assert "None of the 2 candidates could be ranked" in html
    assert found.named("svg") == []


def test_a_night_tells_what_has_changed():
    names = clusters(3, 4).feature_names
    mixture = replace(clusters(3, 4), numbers=("4", "9", "new"))
    nightly = {"night": "2026-11-21", "published": True, "reasons": []}
    html, found = page(content(SWEEP, 4), mixture, sample(3, 4), nightly)
    assert "There is no model of an earlier night" in html
    nightly["drift"] = pages.drift((4, 9), names)
    html, found = page(content(SWEEP, 4), mixture, sample(3, 4), nightly)
    told = "1 cluster stayed, 1 born, 1 died; 2 components stayed, 1 born, 1 died."
    assert f"Published. {told}" in html
    assert ["new", "born", "3.0\u202f%", "4", "0.01"] in found.rows
    assert ["77", "died", "3.0\u202f%", "4", "0.01"] in found.rows
    assert ["rows fitted", "−10.500000", "−10.250000", "+0.250000"] in found.rows
    assert ["rows held out", "–", "–", "–"] in found.rows
    # The cluster; and of the components nine overlaps less than four with what it was.
    changed = [row[0] for row in found.rows if len(row) == 9 and row[5] == "× 1.50"]
    assert changed == ["4", "9", "4"]


def test_the_drift_that_is_shown_has_the_fields_of_the_one_that_is_computed():
    told = pages.drift((1,), ("x",))
    for key, kind in (
        ("components", drift_module.ComponentDrift),
        ("born", drift_module.Unmatched),
    ):
        assert set(told[key][0]) == set(kind.__dataclass_fields__)
    assert set(told) == set(drift_module.Drift.__dataclass_fields__)
    assert set(told["densities"]) == set(drift_module.DensityChange.__dataclass_fields__)
    bins = drift_module.DensityHistogram((0.0, 1.0), (1.0,), (1.0,))
    assert set(told["densities"]["histogram"]) == set(asdict(bins))


@pytest.mark.parametrize("edges", [[None, None], [5.0, 5.0], []])
def test_a_night_of_no_densities_and_no_drift_is_drawn(edges):
    nightly = {"night": "2026-11-21", "published": True, "reasons": []}
    nightly["drift"] = told = pages.drift((0, 1), clusters(3, 4).feature_names)
    shares = [None] * max(0, len(edges) - 1)
    told["densities"]["histogram"] = {"edges": edges, "before": shares, "tonight": shares}
    for component in told["components"]:
        component |= dict.fromkeys(("mahalanobis", "weight_before", "overlap", "volume_ratio"))
    page(content(ONE, 4, n_samples=0.0), clusters(3, 4), sample(3, 4), nightly)


def test_a_night_that_was_not_fitted_says_why():
    nightly = {"night": "2026-11-21", "published": False, "reasons": ["12 rows are too few"]}
    html, _ = page(None, nightly=nightly)
    assert "Night of 2026-11-21: no model" in html
    assert "Kept back: the last published model stays." in html
    assert "12 rows are too few" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_it(tmp_path: Path):
    (tmp_path / "page.html").write_text(render(content(SWEEP, 4), clusters(3, 4), sample(3, 4)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --window-size=390,844"
    where = [f"--user-data-dir={tmp_path / 'user'}", f"--screenshot={tmp_path / 'page.png'}"]
    url = (tmp_path / "page.html").as_uri()
    subprocess.run([CHROMIUM, *flags.split(), *where, url], check=True, capture_output=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def merged(k: int, n_clusters: int, **other) -> merging.Clusters:
    """Return clusters of components that join the first one after another."""
    merges = tuple(
        merging.Merge(
            first=0, second=c, entropy=0.4 * (k - c) / k, misclassification=0.02, share=0.1
        )
        for c in range(k - 1, 0, -1)
    )
    tree = merging.MergeTree(entropy=0.5, merges=tuple(merges))
    trees = dict.fromkeys(merging.TREES, tree)
    values = {"n_clusters": n_clusters, "by": "entropy", "trees": trees, "rule": "merged at once"}
    return merging.Clusters(**(values | other))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 1), (3, 2), (12, 5), (100, 7), (100, 90)])
def test_clusters_are_the_first_line_and_have_their_components_colours(k, n):
    found = merged(k, n)
    mixture = replace(clusters(k, 3), groups=found.of_component)
    rows = sample(k, 3, 300)
    rows = replace(rows, clusters=np.array(found.of_component)[rows.labels])
    told = content([candidate(k, 1, lower_bounds=[])], 3)
    html, page_ = page(told, mixture, rows, None, found)
    title = merging.spell_clusters(found)
    assert f"<h1>{title}</h1>" in html
    first = next(row for row in page_.rows if row and row[0].strip() == "0")
    assert first[-1].startswith("0") or k > 3
    assert ("entropy-title" in page_.ids) == ("tree-title" in page_.ids) == (k > 1)
    if k > 1:
        assert "Components are merged at once." in html
        assert "chosen by all rows and measured by all rows" in html
    assert ("2.0\u202f% of the rows of one" in html) == (n > 1)


def test_the_page_says_what_chose_the_merges_and_what_was_asked_for():
    told = content([candidate(3, 1, lower_bounds=[])], 4)
    html, _ = page(told, clusters(3, 4), None, None, merged(3, 2, n_sampled=65_536))
    assert "chosen by a sample of 65,536 rows and measured by all rows" in html
    html, _ = page(told, clusters(3, 4), None, None, merged(3, 2).at(1))
    assert "One cluster was asked for." in html
    html, found = page(told, clusters(3, 4), None)
    assert "How many clusters" not in html
    assert "entropy-title" not in found.ids


def stability(n: int) -> merging.Stability:
    """Return the stability of clusters, of which the last is found in few searches."""
    one = merging.Recovery(
        n_resamples=50, similarities=(0.97,) * n, n_whole=48, n_clusters=(n,) * 47 + (1,) * 3
    )
    two = replace(
        one,
        n_resamples=20,
        similarities=(0.95,) * (n - 1) + (0.4,),
        n_whole=7,
        n_clusters=(n,) * 9 + (1,) * 11,
    )
    return merging.Stability(n_rows=16_384, from_fit=one, afresh=two)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (12, 5), (60, 9)])
def test_resampled_clusters_and_parameters_have_their_certainty(k, n):
    found = merged(k, n, rule="merged by a rule", stability=stability(n))
    mixture = replace(clusters(k, 3), groups=found.of_component)
    intervals = Intervals(
        shares=(0.9 * mixture.weights, 1.1 * mixture.weights),
        means=(mixture.means - 0.1, mixture.means + 0.1),
        deviations=(0.9 * np.sqrt(mixture.variances), 1.1 * np.sqrt(mixture.variances)),
    )
    wins = [{"k": k, "covariance_type": "full", "n": 45}, {"k": 9, "covariance_type": "full"}]
    wins[1]["n"] = 5
    told = content(
        [candidate(k, 1, lower_bounds=[]), candidate(2, 2)],
        3,
        bootstrap={"n_resamples": 50, "wins": wins},
    )
    html, read = page(told, mixture, sample(k, 3, 300), None, found, intervals)
    assert f"<h1>{n} clusters ({k} components): each was found again in 48 of 50 resamples" in html
    assert "and in 7 of 20 that were searched afresh</h1>" in html
    assert f"best would have been K = {k} full in 45, K = 9 full in 5" in html
    assert "on a sample of 16,384 rows" in html
    assert "were found in 47 of 50 and in 9 of 20 of them" in html
    stable = {row[0].strip(): row for row in read.rows if len(row) == 9}
    assert stable[str(n - 1)][4:7] == ["no", "0.97", "0.40"]
    assert stable["0"][4:7] == ["yes", "0.97", "0.95"]
    assert re.match(r"\d+: feature|\d+: spread|\d+: how", stable["0"][7])
    (line,) = [row for row in read.rows if len(row) == 8 and row[0].strip() == "0"]
    assert re.fullmatch(r"[\d.]+ to [\d.]+\u202f%", line[5])
    assert "the interval of each" in html


def test_settings_are_told_in_words():
    told = content(
        SWEEP,
        4,
        date="2026-11-28 12:00+00:00",
        asked={"where": "a > 0", "missing": "drop", "clusters": None, "bootstrap": 0},
        warnings=["leave it out with --columns"],
        notes=["leave it out with another choice of columns"],
    )
    command = "gmm-dist sweep ./points --k 2..4 --output out"
    html, found = page(told, clusters(3, 4), sample(3, 4), title="Points & more", command=command)
    assert "<h1>Points &amp; more</h1>" in html
    assert '<p class="answer">Gaussian mixture of 3 components</p>' in html
    for line in (
        ["date", "2026-11-28 12:00+00:00"],
        ["command", command],
        ["data", "s3://lake/points"],
        ["columns", "4 columns: feature 0, feature 1, feature 2, feature 3"],
        ["numbers of components K", "2 to 4"],
        ["ranked by", "BIC"],
        ["rows where", "a > 0"],
        ["missing values", "their rows are left out"],
        ["number of clusters", "not asked for"],
        ["resamples", "none"],
    ):
        assert line in found.rows
    # Nobody types while reading, but for the command that is quoted.
    words = [text for text in found.text if "--c0" not in text and text != command]
    assert not any("--" in text for text in words)
    assert "near the mean of all rows" not in html


def test_options_in_words():
    for option, words in {
        Option("reg_covar"): "the regularisation",
        Option("n_components"): "K",
        Option("criterion", "icl"): "ranking by ICL",
        Option("holdout", 0.1): "a held-out share of 0.1",
        Option("missing", "drop"): "\u201cleave out rows with missing values\u201d",
        Option("init_params"): "init params",
    }.items():
        assert in_words(option) == words
