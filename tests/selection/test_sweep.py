"""A sweep picks what it should, all candidates in the same passes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mixtures
import naive
import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

import gmm_dist.selection.sweep as sweep_module
from gmm_dist import UserError
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.lane import Status
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.model.mixture import Mixture
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.sweep import require_rows, sweep
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows

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


@pytest.mark.parametrize("kind", mixtures.SCIKIT_LEARNS)
def test_equals_scikit_learns_best_of_ten_starts(kind):
    X = classic()
    result = run(X, [Candidate(3, kind)])
    assert result.scored[0].bic == pytest.approx(scikit_learns_bic(X, 3, kind), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "n_parameters"), [("tied-diag", 2 + 6 + 2), ("tied-spherical", 2 + 6 + 1)]
)
def test_other_types_equal_the_naive_loop_from_the_clusters(kind, n_parameters):
    X, resp = classic(), np.repeat(np.eye(3), 100, axis=0)
    start = naive.m_step(X, resp, kind)
    _, log_likelihoods = naive.em(X, start, 60)
    assert log_likelihoods[-1] - log_likelihoods[-2] < 1e-6
    bic = -2 * log_likelihoods[-1] + n_parameters * math.log(300)
    assert run(X, [Candidate(3, kind)]).scored[0].bic == pytest.approx(bic, rel=1e-6)


def test_types_compete_and_share_the_passes():
    result = run(classic(), [Candidate(k, kind) for kind in COVARIANCE_TYPES for k in (2, 3, 4)])
    assert result.best is not None
    # The points were drawn from three unit balls: fewest parameters that describe them.
    assert result.best.candidate == Candidate(3, "tied-spherical")
    values = [scored.bic for scored in result.ranked if scored.fit.is_ranked]
    assert values == sorted(values)


@pytest.mark.parametrize("criterion", ["bic", "aic", "icl"])
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
        assert scored.outcome.seconds >= 0
    assert [scored.n_parameters for scored in result.scored] == [1 + 4 + 3, 2 + 3]
    assert [scored.candidate.k for scored in result.scored] == [2, 1]
    assert result.n_samples == 300


def test_columns_that_are_constant_or_dependent_are_a_warning():
    X = classic()
    X = torch.cat([X, torch.full((300, 1), 7.1, dtype=torch.float64), X.sum(1)[:, None]], 1)
    result = run(X, [Candidate(1, "full")], n_init=1)
    assert result.warnings(["a", "b", "c", "d"]) == [
        "column 'c' is constant: leave it out with columns",
        "1 of 4 columns are duplicates or sums of others, so full covariances rest on "
        "reg_covar: leave them out with columns",
    ]


def test_more_components_than_rows_are_refused():
    with pytest.raises(UserError) as error:
        run(classic()[:5], [Candidate(2, "diag"), Candidate(6, "diag")])
    assert str(error.value) == (
        "n_components asks for 6 components, but there are 5 rows: give at most 5"
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


def partly_held_out(X, held) -> LocalShards:
    parts = zip(X.chunk(3), held.chunk(3), strict=True)
    return LocalShards(
        [
            ShardRows(
                shard=i, blocks=[Block(x[~h].T.contiguous())], held_out=[Block(x[h].T.contiguous())]
            )
            for i, (x, h) in enumerate(parts)
        ]
    )


def test_held_out_rows_rank_and_nothing_is_fitted_to_them():
    X, held = classic(), torch.arange(300) % 5 == 0
    candidates = [Candidate(k, "full") for k in (1, 3, 6)]
    args = (TIGHT, StartConfig(n_init=4))
    shards = partly_held_out(X, held)
    result = sweep(shards, candidates, *args, n_features=2, criterion="holdout", holdout=True)
    assert result.n_samples == 240
    alone = sweep(partly_held_out(X, held & False), candidates, *args, n_features=2)
    fitted = [scored.fit.log_likelihood for scored in result.scored]
    assert fitted != [scored.fit.log_likelihood for scored in alone.scored]
    assert [scored.holdout for scored in alone.scored] == [None, None, None]
    for scored in result.scored:
        mean = Mixture(parameters=scored.fit.parameters).score(X[held])
        assert scored.holdout == pytest.approx(mean, rel=1e-12)
    assert result.best is max(result.scored, key=lambda scored: scored.holdout)
    assert result.best.candidate.k == 3


def test_a_criterion_without_rows_to_rank_by_is_refused_before_anything_is_fitted():
    shards = partly_held_out(classic(), torch.zeros(300, dtype=torch.bool))
    passes = []
    with pytest.raises(UserError, match="no held-out row of positive weight: give a larger hol"):
        sweep(
            shards,
            [Candidate(1, "full")],
            TIGHT,
            StartConfig(),
            n_features=2,
            criterion="holdout",
            watch=passes.append,
        )
    assert passes == []


def test_starts_that_are_given_are_used():
    X = classic()
    centre = X.mean(0)
    given = [mixtures.parameters("diag", 2, 2).shifted(-centre)]
    config = replace(TIGHT, max_iter=1, precision="float64")
    result = run(X, [Candidate(2, "diag")], config, initial=given)
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


# --- larger mixtures, and other grids


def mixed(n: int, k: int, d: int, seed: int) -> torch.Tensor:
    """Return n rows of k overlapping clusters."""
    centres = 3 * mixtures.normal_rows(k, d, seed=seed)
    labels = torch.arange(n) % k
    return mixtures.normal_rows(n, d, seed=seed + 1) + centres[labels]


def drops(result: SweepResult) -> list[float]:
    """Return by how much (nats per row) ranked fits end below smaller ones of their type."""
    found = []
    for kind in COVARIANCE_TYPES:
        own = [s for s in result.scored if s.candidate.covariance_type == kind and s.fit.is_ranked]
        own.sort(key=lambda s: s.candidate.k)
        found += [a.mean_log_likelihood - b.mean_log_likelihood for a, b in itertools.pairwise(own)]
    return found


LIGHT = StartConfig(n_init=1, moves=0, n_sample=100)
"""A poor search on a sample much smaller than the rows, whose optima are not those of the rows."""


def lightly(X, ks, kinds, start=LIGHT) -> SweepResult:
    centred = LocalShards.of(X - X.mean(0), n_shards=3)
    candidates = [Candidate(k, kind) for kind in kinds for k in ks]
    return sweep(centred, candidates, EMConfig(max_iter=30), start, n_features=X.shape[1])


@mixtures.few_types
def test_the_likelihood_never_falls_as_k_grows(kind):
    found = drops(lightly(mixed(600, 2, 2, seed=1), range(1, 6), [kind]))
    assert len(found) >= 3
    assert max(found) < 1e-6


def test_a_k_ends_alike_in_any_grid():
    X = mixed(600, 4, 2, seed=7)

    def at_three(ks, kinds) -> float:
        found = lightly(X, ks, kinds).scored
        (own,) = (s for s in found if s.candidate == Candidate(3, "diag"))
        return own.mean_log_likelihood

    alone = at_three([3], ["diag"])
    for ks, kinds in [((2, 3), ["diag"]), ((3, 4), ["diag"]), ((3,), ["spherical", "diag"])]:
        assert at_three(ks, kinds) == pytest.approx(alone, abs=1e-3)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_many_small_mixtures_neither_fall_nor_depend_on_the_grid(seed):
    d, k, kind = 1 + seed, 3 + seed % 4, COVARIANCE_TYPES[seed % len(COVARIANCE_TYPES)]
    X = mixed(2000, k, d, seed)
    start = StartConfig(n_init=4, moves=1, n_sample=300, random_state=seed)
    whole = lightly(X, range(1, 9), [kind], start)
    assert max(drops(whole)) < 1e-6
    for ks in [(5,), (2, 3, 4, 5), (4, 5, 6, 7, 8)]:
        for scored in lightly(X, ks, [kind], start).scored:
            expected = whole.scored[scored.candidate.k - 1].mean_log_likelihood
            assert scored.mean_log_likelihood == pytest.approx(expected, abs=1e-3)


def badly(monkeypatch, k: int, scale: float) -> None:
    """Have the search come back for one k with components that are all the same, and too wide."""
    searched = sweep_module.find_starts

    def search(shards, candidates, *args, done, **options):
        def changed(i, starts):
            if candidates[i].k == k:
                kind = candidates[i].covariance_type
                one = mixtures.parameters(kind, k, 2, spread=0.0)
                same = one.means[:1].expand(k, 2) * 0
                wide = one.covariances * 0 + torch.eye(2, dtype=torch.float64) * scale
                weights = torch.full((k,), 1 / k).double()
                starts = [
                    Parameters(weights=weights, means=same, covariances=wide, covariance_type=kind)
                ]
            done(i, starts)

        return searched(shards, candidates, *args, done=changed, **options)

    monkeypatch.setattr(sweep_module, "find_starts", search)


class BrokenOffError(Exception):
    """Ends a sweep in its search."""


def test_a_search_that_is_broken_off_goes_on_with_the_candidates_that_are_left(monkeypatch):
    X, candidates = classic(), [Candidate(k, kind) for kind in ("full", "diag") for k in (3, 1)]
    whole = run(X, candidates, EMConfig(), n_init=2)
    kept = []

    def keep(number, take):
        assert number == 0
        kept.append(take())
        if len(kept) == 2:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        run(X, candidates, EMConfig(), n_init=2, keep=keep)
    searched = []
    find_starts = sweep_module.find_starts

    def counted(shards, left, *args, **options):
        searched.extend(left)
        return find_starts(shards, left, *args, **options)

    monkeypatch.setattr(sweep_module, "find_starts", counted)
    again = run(X, candidates, EMConfig(), n_init=2, resume=kept[-1])
    assert len(searched) == 2
    assert again.n_passes == whole.n_passes
    for one, other in zip(again.scored, whole.scored, strict=True):
        mixtures.assert_same(one.fit.parameters, other.fit.parameters, rtol=0, atol=0)


def test_the_search_tells_its_progress_after_every_job():
    told = []
    run(classic(), [Candidate(k, "full") for k in (1, 3)], EMConfig(), searching=told.append)
    done = [progress.n_done for progress in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 2
    assert {progress.n_candidates for progress in told} == {2}
    assert told[-1].seconds_left == pytest.approx(0.0)
    assert all(progress.seconds_left >= 0 for progress in told if progress.seconds_left is not None)
    assert told[-1].n_passes > 20


def test_a_fit_that_ends_below_a_smaller_one_goes_on_from_that(monkeypatch):
    X = classic()
    candidates = [Candidate(k, "full") for k in (4, 2, 3)]
    sound = run(X, candidates, EMConfig(), n_init=2)
    badly(monkeypatch, 3, 50.0)
    three = run(X, [Candidate(3, "full")], EMConfig(), n_init=2).scored[0]
    assert three.mean_log_likelihood < sound.scored[1].mean_log_likelihood - 0.05
    kept = {}
    lifted = run(X, candidates, EMConfig(), n_init=2, keep=lambda n, take: kept.update({n: take()}))
    assert max(drops(lifted)) < 1e-6
    assert lifted.scored[2].outcome.n_starts == 3
    assert lifted.scored[2].fit.is_ranked
    for snapshot in kept.values():
        again = run(X, candidates, EMConfig(), n_init=2, resume=snapshot)
        assert again.n_passes == lifted.n_passes
        for one, other in zip(again.scored, lifted.scored, strict=True):
            mixtures.assert_same(one.fit.parameters, other.fit.parameters, rtol=0, atol=0)
            assert one.fit.log_likelihood == other.fit.log_likelihood


def test_where_em_may_not_step_a_smaller_mixtures_likelihood_is_kept_to_the_digit(monkeypatch):
    """With one step and a large regularisation EM itself would lower it."""
    X, config = classic(), EMConfig(max_iter=1, reg_covar=0.3)
    badly(monkeypatch, 3, 50.0)
    result = run(X, [Candidate(k, "full") for k in (2, 3)], config, n_init=1)
    two, three = result.scored
    assert three.mean_log_likelihood >= two.mean_log_likelihood - 1e-9
