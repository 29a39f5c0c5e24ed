"""Fits compared: who wins, who is shown without a rank, and what the reader is told."""

from __future__ import annotations

import math
from dataclasses import replace

import mixtures
import pytest

from gmm_dist.config import EMConfig
from gmm_dist.em import Status
from gmm_dist.mixture import Mixture
from gmm_dist.selection import Candidate, Elbow, Outcome, Scored, SweepResult, elbow
from gmm_dist.statistics import TotalMoments

X = mixtures.normal_rows(300, 2)


def total(n: int = 300) -> TotalMoments:
    """Return the moments of n rows, spread like X."""
    share = n / len(X)
    return TotalMoments(n, n, share * X.sum(0), share * X.T @ X)


TOTAL = total()


def made(example: Scored, k, kind, value, n_parameters, status=Status.CONVERGED) -> Scored:
    """Return a candidate with figures of our own."""
    outcome = Outcome.of(replace(example.fit, status=status), 0.0)
    return replace(
        example, candidate=Candidate(k, kind), outcome=outcome, bic=value, n_parameters=n_parameters
    )


@pytest.fixture(scope="module")
def example() -> Scored:
    (fit,) = mixtures.fit(X, [mixtures.parameters("diag", 1, 2)], EMConfig())
    return Scored.of(Candidate(1, "diag"), Outcome.of(fit, 0.0))


def test_ties_go_to_fewer_parameters_then_to_smaller_k(example):
    table = (
        made(example, 4, "full", 10.0, 9),
        made(example, 3, "diag", 10.0, 7),
        made(example, 2, "tied", 10.0, 7),
        made(example, 1, "full", 10.0, 8),
        made(example, 9, "full", 9.0, 99),
    )
    ranked = SweepResult(table, "bic", TOTAL).ranked
    assert [scored.candidate.k for scored in ranked] == [9, 2, 3, 1, 4]


def test_a_failed_candidate_comes_last_however_good_it_looks(example):
    nan = float("nan")
    for status, value in (
        (Status.DEGENERATE, -1e9),
        (Status.COLLAPSED, nan),
        (Status.COLLAPSED, -1e9),
    ):
        table = (
            made(example, 5, "full", value, 9, status),
            made(example, 2, "full", 10.0, 9),
            made(example, 3, "full", 11.0, 9, Status.MAX_ITER),
        )
        result = SweepResult(table, "bic", TOTAL)
        assert [scored.candidate.k for scored in result.ranked] == [2, 3, 5]
        assert result.best is table[1]
        (warning,) = result.warnings(["x", "y"])
        assert warning == "the best k is the smallest tried: run again with --k 1..2"


def test_when_all_fail_there_is_no_best(example):
    table = tuple(made(example, k, "full", 1.0, 9, Status.DEGENERATE) for k in (2, 3))
    result = SweepResult(table, "bic", TOTAL)
    assert result.best is None
    assert result.warnings(["x", "y"]) == []


@pytest.mark.parametrize(
    ("ks", "best", "edge"),
    [
        ((2, 3, 4), 4, ["the best k is the largest tried: run again with --k 4..8"]),
        ((2, 3, 4), 2, ["the best k is the smallest tried: run again with --k 1..2"]),
        ((2, 3, 4), 3, []),
        ((1, 2, 3), 1, []),  # there is nothing below one
        ((3,), 3, []),
    ],
)
def test_a_best_k_at_the_edge_of_the_grid_is_a_warning(example, ks, best, edge):
    table = tuple(made(example, k, "full", float(k != best), k) for k in ks)
    assert SweepResult(table, "bic", TOTAL).warnings(["x", "y"]) == edge


def test_the_next_grid_never_has_more_components_than_rows_nor_too_many(example):
    def next_grid(k, n):
        table = tuple(made(example, i, "full", -float(i), i) for i in (2, k))
        told = SweepResult(table, "bic", total(n)).warnings(["x", "y"], "{}".format)
        return [line.removeprefix("the best k is the largest tried: ") for line in told]

    assert next_grid(20, 300) == ["20..40"]
    assert next_grid(20, 25) == ["20..25"]
    assert next_grid(20, 20) == []
    assert next_grid(64, 300) == ["64,70,77,83,90,96,102,109,115,122,128"]


def test_the_caller_spells_what_to_do_about_the_next_grid(example):
    table = tuple(made(example, k, "full", -float(k), k) for k in (2, 3))
    (line,) = SweepResult(table, "bic", TOTAL).warnings(["x", "y"], "sweep.py --k {}".format)
    assert line == "the best k is the largest tried: sweep.py --k 3..6"


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_the_criteria_are_those_of_the_mixture(kind):
    (fit,) = mixtures.fit(X, [mixtures.parameters(kind, 2, 2)], EMConfig(precision="float64"))
    scored = Scored.of(Candidate(2, kind), Outcome.of(fit, 1.5), -3.25)
    mixture = Mixture(fit.parameters)
    for criterion in ("bic", "aic", "icl"):
        expected = getattr(mixture, criterion)(X)
        assert scored.value(criterion) == getattr(scored, criterion)
        assert scored.value(criterion) == pytest.approx(expected, rel=1e-9)
    assert scored.value("holdout") == 3.25  # lower is better, as of the others
    assert math.isnan(replace(scored, holdout=None).value("holdout"))
    assert scored.mean_log_likelihood == pytest.approx(mixture.score(X), rel=1e-9)


def test_held_out_likelihood_ranks_highest_first_and_ties_as_the_others_do(example):
    figures = [(2, -3.0, 9), (5, -2.5, 20), (3, -2.5, 12), (4, -2.5, 12)]
    table = tuple(
        replace(made(example, k, "full", 0.0, p), holdout=holdout) for k, holdout, p in figures
    )
    ranked = SweepResult(table, "holdout", TOTAL).ranked
    assert [scored.candidate.k for scored in ranked] == [3, 4, 5, 2]


# --- the elbow


def test_the_elbow_is_where_the_curve_is_farthest_from_its_chord():
    bounds = [-10.0, -6.0, -4.0, -3.5, -3.1, -3.0]
    points = list(zip((1, 2, 3, 5, 7, 8), bounds, strict=True))
    # Distances from the chord (rise 7 over a run of 7): 0, 3, 4, 2.5, .9, 0 of 7.
    assert elbow(points) == Elbow(3, pytest.approx(0.25))


def test_scale_and_offset_do_not_move_the_elbow():
    points = [(k, -1 / k) for k in range(1, 17)]
    scaled = [(10 * k, 1e6 * value - 5e8) for k, value in points]
    found, other = elbow(points), elbow(scaled)
    # 1 - 1/k lies farthest above its chord at k = sqrt(16).
    assert found.k == 4
    assert other.k == 40
    assert other.gain == pytest.approx(1e5 * found.gain)


def test_a_fit_in_a_poor_optimum_is_no_elbow():
    values = [-10.0, -6.0, -4.0, -3.5, -3.0, -9.0]
    assert elbow(list(enumerate(values, start=1))) == Elbow(3, 0.5)


@pytest.mark.parametrize(
    "values", [[], [1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.1, 3.0], [3.0, 2.0, 1.0]]
)
def test_a_curve_that_does_not_bend_has_no_elbow(values):
    assert elbow(list(enumerate(values, start=1))) is None


def falling(example, n: int, values: list[float]) -> tuple[Scored, ...]:
    """Return candidates k = 1, 2, ... of these mean log-likelihoods among n rows."""
    return tuple(
        Scored.of(
            Candidate(k, "diag"),
            Outcome.of(
                replace(
                    example.fit,
                    parameters=mixtures.parameters("diag", k, 2),
                    n_samples=n,
                    log_likelihood=n * value,
                ),
                0.0,
            ),
        )
        for k, value in enumerate(values, start=1)
    )


CURVE = [-9.0, -7.0, -6.0, -5.9, -5.81, -5.75]


def test_at_huge_n_a_bic_that_keeps_falling_comes_with_an_elbow_and_what_to_do(example):
    n = 1_000_000
    result = SweepResult(falling(example, n, CURVE), "bic", total(n))
    edge, note = result.warnings(["x", "y"])
    assert edge.startswith("the best k is the largest tried")
    # Of a diagonal component in two dimensions 5 parameters: 5 ln(1e6) / 2 / 1e6 = 3.5e-5.
    assert note == (
        "BIC still falls at k=6: with 1,000,000 rows a component costs it only 3e-05 nats per row, "
        "so it may never rise; the mean log-likelihood bends at k=3, after which a component gains "
        "at most 0.1 nats per row: consider --k 3, --criterion icl or --holdout 0.1 --criterion "
        "holdout"
    )


def test_the_elbow_is_of_the_winners_family(example):
    n = 1_000_000
    others = [
        replace(s, candidate=Candidate(s.candidate.k, "full"), bic=1e9)
        for s in falling(example, n, [-9.0, -8.9, -8.8, -8.7, -6.0, -5.9])
    ]
    table = (*falling(example, n, CURVE), *others)
    (_, note) = SweepResult(table, "bic", total(n)).warnings(["x", "y"])
    assert "bends at k=3" in note


def test_without_a_bend_the_note_names_the_criteria_alone(example):
    n = 1_000_000
    table = falling(example, n, [-9.0, -8.0, -7.0, -6.0])
    (_, note) = SweepResult(table, "bic", total(n)).warnings(["x", "y"])
    assert note.endswith(
        "never rise; consider --criterion icl or --holdout 0.1 --criterion holdout"
    )


@pytest.mark.parametrize(
    ("criterion", "n", "values"),
    [
        ("bic", 2000, CURVE),  # few rows: a falling BIC still means structure
        ("icl", 1_000_000, CURVE),  # not what ranks
        ("bic", 1_000_000, CURVE[:3]),  # too few to see a bend
        ("bic", 1_000_000, [*CURVE, -5.76]),  # BIC has turned
    ],
)
def test_elsewhere_there_is_no_elbow_note(example, criterion, n, values):
    told = SweepResult(falling(example, n, values), criterion, total(n)).warnings(["x", "y"])
    assert not any("falls" in line for line in told)
