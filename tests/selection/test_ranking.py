"""Fits compared: who wins, who is shown without a rank, and what the reader is told."""

from __future__ import annotations

import math
from dataclasses import replace

import mixtures
import pytest

from gmm_dist.config import EMConfig
from gmm_dist.em.lane import Status
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.mixture import Mixture
from gmm_dist.selection.ranking import BestFit, Candidate, RankedCandidate, SweepResult

X = mixtures.normal_rows(300, 2)


def total(n: int = 300) -> TotalMoments:
    """Return the moments of n rows, spread like X."""
    share = n / len(X)
    return TotalMoments(n_samples=n, n_rows=n, sum_x=share * X.sum(0), sum_xx=share * X.T @ X)


TOTAL = total()


def made(
    example: RankedCandidate, k, kind, value, n_parameters, status=Status.CONVERGED
) -> RankedCandidate:
    """Return a candidate with figures of our own."""
    outcome = BestFit.of(replace(example.fit, status=status), 0.0)
    return replace(
        example, candidate=Candidate(k, kind), outcome=outcome, bic=value, n_parameters=n_parameters
    )


@pytest.fixture(scope="module")
def example() -> RankedCandidate:
    (fit,) = mixtures.fit(X, [mixtures.parameters("diag", 1, 2)], EMConfig())
    return RankedCandidate.of(Candidate(1, "diag"), BestFit.of(fit, 0.0))


def test_ties_go_to_fewer_parameters_then_to_smaller_k(example):
    table = (
        made(example, 4, "full", 10.0, 9),
        made(example, 3, "diag", 10.0, 7),
        made(example, 2, "tied", 10.0, 7),
        made(example, 1, "full", 10.0, 8),
        made(example, 9, "full", 9.0, 99),
    )
    ranked = SweepResult(scored=table, criterion="bic", total=TOTAL).ranked
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
        result = SweepResult(scored=table, criterion="bic", total=TOTAL)
        assert [scored.candidate.k for scored in result.ranked] == [2, 3, 5]
        assert result.best is table[1]
        (warning,) = result.warnings(["x", "y"])
        assert warning == "the best k is the smallest tried: run again with n_components 1..2"


def test_when_all_fail_there_is_no_best(example):
    table = tuple(made(example, k, "full", 1.0, 9, Status.DEGENERATE) for k in (2, 3))
    result = SweepResult(scored=table, criterion="bic", total=TOTAL)
    assert result.best is None
    assert result.warnings(["x", "y"]) == []


@pytest.mark.parametrize(
    ("ks", "best", "edge"),
    [
        ((2, 3, 4), 4, ["the best k is the largest tried: run again with n_components 4..8"]),
        ((2, 3, 4), 2, ["the best k is the smallest tried: run again with n_components 1..2"]),
        ((2, 3, 4), 3, []),
        ((1, 2, 3), 1, []),  # there is nothing below one
        ((3,), 3, []),
    ],
)
def test_a_best_k_at_the_edge_of_the_grid_is_a_warning(example, ks, best, edge):
    table = tuple(made(example, k, "full", float(k != best), k) for k in ks)
    assert SweepResult(scored=table, criterion="bic", total=TOTAL).warnings(["x", "y"]) == edge


def test_the_next_grid_never_has_more_components_than_rows_nor_too_many(example):
    def next_grid(k, n):
        table = tuple(made(example, i, "full", -float(i), i) for i in (2, k))
        told = SweepResult(scored=table, criterion="bic", total=total(n)).warnings(
            ["x", "y"], "{}".format
        )
        return [line.removeprefix("the best k is the largest tried: ") for line in told]

    assert next_grid(20, 300) == ["20..40"]
    assert next_grid(20, 75) == ["20..25"]
    assert next_grid(20, 60) == []
    assert next_grid(64, 600) == ["64,70,77,83,90,96,102,109,115,122,128"]


def test_the_caller_spells_what_to_do_about_the_next_grid(example):
    table = tuple(made(example, k, "full", -float(k), k) for k in (2, 3))
    (line,) = SweepResult(scored=table, criterion="bic", total=TOTAL).warnings(
        ["x", "y"], "sweep.py --k {}".format
    )
    assert line == "the best k is the largest tried: sweep.py --k 3..6"


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_the_criteria_are_those_of_the_mixture(kind):
    (fit,) = mixtures.fit(X, [mixtures.parameters(kind, 2, 2)], EMConfig(precision="float64"))
    scored = RankedCandidate.of(Candidate(2, kind), BestFit.of(fit, 1.5), -3.25)
    mixture = Mixture(parameters=fit.parameters)
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
    ranked = SweepResult(scored=table, criterion="holdout", total=TOTAL).ranked
    assert [scored.candidate.k for scored in ranked] == [3, 4, 5, 2]


# --- a criterion that never stops falling


def falling(example, n: int, values: list[float]) -> tuple[RankedCandidate, ...]:
    """Return candidates k = 1, 2, ... of these mean log-likelihoods among n rows."""
    return tuple(
        RankedCandidate.of(
            Candidate(k, "diag"),
            BestFit.of(
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
MANY = 1_000_000


def note_of(table, criterion="bic", **options) -> str:
    edge, note = SweepResult(scored=table, criterion=criterion, total=total(MANY)).warnings(
        ["x", "y"], **options
    )
    assert edge.startswith("the best k is the largest tried")
    return note


def with_values(table, name: str, values) -> tuple[RankedCandidate, ...]:
    return tuple(replace(s, **{name: v}) for s, v in zip(table, values, strict=True))


def icl_best_at(table, k: int) -> tuple[RankedCandidate, ...]:
    return with_values(table, "icl", [float(abs(s.candidate.k - k)) for s in table])


def test_at_huge_n_a_bic_that_keeps_falling_says_so_and_what_it_means(example):
    # Of a diagonal component in two dimensions 5 parameters: 5 ln(1e6) / 2 / 1e6 = 3.5e-5.
    assert note_of(icl_best_at(falling(example, MANY, CURVE), 3)) == (
        "BIC still falls at k=6: with 1,000,000 rows a component costs it only 3e-05 nats per row, "
        'and the last one gained 0.06, so it may never rise; consider criterion="icl" (best at '
        'k=3) or holdout=0.1 criterion="holdout"'
    )


def test_nothing_is_advised_that_the_table_refutes(example):
    table = icl_best_at(falling(example, MANY, CURVE), 6)
    assert note_of(table).endswith('rise; consider holdout=0.1 criterion="holdout"')
    assert note_of(table, holds_out=False).endswith(
        "rise; ICL is best there, too: choose as many components as are of use"
    )
    held_out = with_values(table, "holdout", CURVE)
    assert note_of(held_out).endswith(
        "ICL and the held-out log-likelihood are best there, too: choose as many components as are "
        "of use"
    )
    turned = with_values(table, "holdout", [*CURVE[:4], -5.95, -5.96])
    assert note_of(turned).endswith('rise; consider criterion="holdout" (best at k=4)')


def test_aic_that_falls_is_held_to_bic(example):
    table = with_values(icl_best_at(falling(example, MANY, CURVE), 6), "bic", [5, 4, 3, 2, 3, 4])
    assert 'consider criterion="bic" (best at k=4) or hold' in note_of(table, "aic")


def test_what_another_criterion_chooses_is_asked_of_all_families_and_of_ranked_fits_alone(example):
    own = icl_best_at(falling(example, MANY, CURVE), 6)
    others = [
        replace(s, candidate=Candidate(s.candidate.k, "full"), bic=1e9, icl=float(s.candidate.k))
        for s in own
    ]
    others = [replace(s, icl=-s.icl) for s in others]
    assert 'criterion="icl"' not in note_of((*own, *others))  # full is best at k = 6
    turned = [replace(s, icl=-99.0) if s.candidate.k == 2 else s for s in others]
    assert 'criterion="icl" (best at k=2)' in note_of((*own, *turned))
    failed = [
        replace(s, outcome=BestFit.of(replace(s.fit, status=Status.DEGENERATE), 0.0))
        for s in turned
    ]
    assert 'criterion="icl"' not in note_of((*own, *failed))


@pytest.mark.parametrize(
    ("criterion", "n", "values"),
    [
        ("bic", 2000, CURVE),  # few rows: a falling BIC still means structure
        ("icl", MANY, CURVE),  # not what ranks
        ("bic", MANY, CURVE[:3]),  # too few to say that it goes on
        ("bic", MANY, CURVE[:1]),
        ("bic", MANY, [*CURVE, -5.76]),  # BIC has turned
    ],
)
def test_elsewhere_there_is_no_such_note(example, criterion, n, values):
    told = SweepResult(
        scored=falling(example, n, values), criterion=criterion, total=total(n)
    ).warnings(["x", "y"])
    assert not any("falls" in line for line in told)


def test_the_next_grid_ends_where_the_rows_do(example):
    def next_grid(kind: str, n_rows: int) -> list[str]:
        table = (made(example, 3, kind, 20.0, 9), made(example, 4, kind, 10.0, 9))
        return SweepResult(scored=table, criterion="bic", total=total(n_rows)).warnings(["x", "y"])

    # Of two features: 3 rows for each full covariance, 2 for each diagonal one.
    assert next_grid("full", 17) == [
        "the best k is the largest tried: run again with n_components 4..5"
    ]
    assert next_grid("diag", 13) == [
        "the best k is the largest tried: run again with n_components 4..6"
    ]
    assert next_grid("full", 14) == []


def test_a_best_k_below_one_that_failed_is_not_at_the_edge(example):
    *table, last = falling(example, MANY, [*CURVE, -5.7])
    failed = replace(last, outcome=BestFit.of(replace(last.fit, status=Status.DEGENERATE), 0.0))
    result = SweepResult(scored=(*table, failed), criterion="bic", total=total(MANY))
    assert result.best is table[-1]
    assert result.warnings(["x", "y"]) == []


def test_no_note_names_a_k_of_which_the_grid_decides(example):
    """The point of a curve farthest from its chord moves with the chord's ends."""
    values = [-math.sqrt(k) - 9 + 2 * math.log(k) for k in range(1, 17)]
    values = [max(values[: i + 1]) + 1e-3 * i for i in range(16)]
    notes = set()
    for end in (8, 12, 16):
        table = with_values(falling(example, MANY, values[:end]), "icl", [-k for k in range(end)])
        notes.add(note_of(table, holds_out=False).partition("nats per row, ")[2][-60:])
    assert notes == {"ICL is best there, too: choose as many components as are of use"[-60:]}
