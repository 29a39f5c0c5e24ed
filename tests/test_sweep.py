"""A sweep picks what it should, and a failed candidate is a row in its table."""

from __future__ import annotations

from dataclasses import replace

import mixtures
import pytest
import torch
from sklearn.mixture import GaussianMixture

from gmm_dist import UserError
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import Status
from gmm_dist.kernel import Total
from gmm_dist.parameters import COVARIANCE_TYPES
from gmm_dist.shards import LocalShards
from gmm_dist.sweep import CRITERIA, Candidate, Scored, SweepResult, require_rows, sweep

TIGHT = EMConfig(tol=1e-9, max_iter=2000)


def classic() -> torch.Tensor:
    """Return 300 points of unit variance, 100 each around three centres."""
    generator = torch.Generator().manual_seed(42)  # the numbers of torch.manual_seed(42)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 3.5]])
    X = torch.cat([torch.randn(100, 2, generator=generator) + centre for centre in centres])
    return X.double()


def run(X, candidates, config=TIGHT, n_init=10, **options) -> SweepResult:
    centred = LocalShards.of(X - X.mean(0), n_shards=3)
    n_features = X.shape[1]
    return sweep(
        centred, candidates, config, StartConfig(n_init=n_init), n_features=n_features, **options
    )


TOTAL = LocalShards.of(classic()).run(Total(2))


def scikit_learns_bic(X, k, kind) -> float:
    model = GaussianMixture(
        k, covariance_type=kind, n_init=10, tol=1e-9, max_iter=2000, random_state=0
    )
    return model.fit(X.numpy()).bic(X.numpy())


def test_bic_finds_the_three_clusters():
    X = classic()
    result = run(X, [Candidate(k, "full") for k in range(1, 7)])
    assert result.best is not None
    assert result.best.candidate == Candidate(3, "full")
    assert result.warnings(["x", "y"]) == []
    assert result.best.bic == pytest.approx(scikit_learns_bic(X, 3, "full"), rel=1e-6)
    assert result.best.bic == pytest.approx(2353.8, abs=0.05)
    assert all(scored.fit.is_ranked for scored in result.scored[:3])


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_equals_scikit_learns_best_of_ten_starts(kind):
    X = classic()
    result = run(X, [Candidate(3, kind)])
    assert result.scored[0].bic == pytest.approx(scikit_learns_bic(X, 3, kind), rel=1e-6)


def test_types_compete_and_share_the_passes():
    result = run(classic(), [Candidate(k, kind) for kind in COVARIANCE_TYPES for k in (2, 3, 4)])
    assert result.best is not None
    # The points were drawn from three unit balls: fewest parameters that describe them.
    assert result.best.candidate in (Candidate(3, "spherical"), Candidate(3, "tied"))
    values = [scored.bic for scored in result.ranked if scored.fit.is_ranked]
    assert values == sorted(values)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_criterion_asked_for_ranks(criterion):
    result = run(classic(), [Candidate(k, "diag") for k in (1, 2, 3)], criterion=criterion)
    best = min(result.scored, key=lambda scored: getattr(scored, criterion))
    assert result.best is best


def test_a_scored_candidate_is_consistent():
    result = run(classic(), [Candidate(2, "tied"), Candidate(1, "full")])
    for scored in result.scored:
        fit = scored.fit
        assert scored.bic == pytest.approx(
            -2 * fit.log_likelihood + scored.n_parameters * torch.log(torch.tensor(300.0)).item()
        )
        assert scored.aic == pytest.approx(-2 * fit.log_likelihood + 2 * scored.n_parameters)
        assert scored.icl == pytest.approx(scored.bic + 2 * fit.entropy)
        assert scored.seconds >= 0
    assert [scored.n_parameters for scored in result.scored] == [1 + 4 + 3, 2 + 3]
    assert [scored.candidate.k for scored in result.scored] == [2, 1]
    assert result.n_samples == 300


def made(example: Scored, k, kind, value, n_parameters, status=Status.CONVERGED) -> Scored:
    """Return a candidate with figures of our own."""
    fit = replace(example.fit, status=status)
    return replace(
        example, candidate=Candidate(k, kind), fit=fit, bic=value, n_parameters=n_parameters
    )


@pytest.fixture(scope="module")
def example() -> Scored:
    return run(classic(), [Candidate(1, "diag")], n_init=1).scored[0]


def test_ties_go_to_fewer_parameters_then_to_smaller_k(example):
    table = (
        made(example, 4, "full", 10.0, 9),
        made(example, 3, "diag", 10.0, 7),
        made(example, 2, "tied", 10.0, 7),
        made(example, 9, "full", 9.0, 99),
    )
    ranked = SweepResult(table, "bic", TOTAL).ranked
    assert [scored.candidate.k for scored in ranked] == [9, 2, 3, 4]


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


def test_columns_that_are_constant_or_dependent_are_a_warning():
    X = classic()
    X = torch.cat([X, torch.full((300, 1), 7.1, dtype=torch.float64), X.sum(1)[:, None]], 1)
    result = run(X, [Candidate(1, "diag")], n_init=1)
    assert result.warnings(["a", "b", "c", "d"]) == [
        "column 'c' is constant: leave it out with --columns",
        "1 of 4 columns are duplicates or sums of others, so full covariances rest on "
        "--reg-covar: leave them out with --columns",
    ]


def test_more_components_than_rows_are_refused():
    with pytest.raises(UserError) as error:
        run(classic()[:5], [Candidate(2, "diag"), Candidate(6, "diag")])
    assert str(error.value) == (
        "--k asks for 6 components, but there are 5 rows: give k of at most 5"
    )
    require_rows([Candidate(5, "full")], 5)


def test_rows_without_weight_are_no_rows():
    X = classic()[:10]
    weight = torch.ones(10, dtype=torch.float64)
    weight[3:] = 0
    shards = LocalShards.of(X - X[:3].mean(0), weight)
    with pytest.raises(UserError, match="asks for 4 components, but there are 3 rows"):
        sweep(shards, [Candidate(4, "diag")], TIGHT, StartConfig(), n_features=2)


def test_as_many_components_as_rows_end_with_a_sentence():
    result = run(classic()[:6], [Candidate(6, kind) for kind in COVARIANCE_TYPES], EMConfig())
    assert all(scored.fit.status is Status.DEGENERATE for scored in result.scored)
    assert result.best is None


def test_starts_that_are_given_are_used():
    X = classic()
    centre = X.mean(0)
    given = [mixtures.parameters("diag", 2, 2).shifted(-centre)]
    config = replace(TIGHT, max_iter=1, precision="float64")
    result = run(X, [Candidate(2, "diag")], config, given=given)
    shifted = [start.shifted(centre) for start in given]
    (expected,) = mixtures.fit(X, shifted, config)
    found = result.scored[0].fit.parameters.shifted(centre)
    mixtures.assert_same(found, expected.parameters, rtol=1e-9)


def test_progress_is_told_after_every_pass():
    told = []
    result = run(classic(), [Candidate(k, "full") for k in (1, 3)], EMConfig(), watch=told.append)
    assert all([s.candidate.k for s in standings] == [1, 3] for standings in told)
    assert not any(standing.is_running for standing in told[-1])
    for scored, last in zip(result.scored, told[-1], strict=True):
        assert last.n_iter == scored.fit.n_iter
        assert last.lower_bound == scored.fit.lower_bounds[-1]
        assert last.precision == "float64"
