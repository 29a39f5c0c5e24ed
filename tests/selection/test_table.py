"""The table of a sweep: one list of columns, behind every face that shows candidates."""

from __future__ import annotations

import ast
from pathlib import Path

import mixtures
import pytest

import gmm_dist
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em.lane import Status
from gmm_dist.selection.ranking import CRITERIA, Candidate
from gmm_dist.selection.sweep import sweep
from gmm_dist.selection.table import COLUMNS, label, listed, ranks, saved

PACKAGE = Path(gmm_dist.__file__).parent


@pytest.fixture(scope="module")
def result():
    """A sweep of three candidates, the last of which cannot be ranked: too few rows."""
    shards = mixtures.shards(mixtures.normal_rows(40, 2))
    candidates = [Candidate(3, "diag"), Candidate(1, "full"), Candidate(12, "full")]
    start = StartConfig(n_init=1, moves=0)
    return sweep(shards, candidates, EMConfig(max_iter=2), start, n_features=2)


def test_all_tables_say_the_same_of_a_candidate(result):
    by_call, by_rank = saved(result), listed(result)
    assert [row["k"] for row in by_call] == [3, 1, 12]
    assert [row["rank"] for row in by_rank] == [rank for rank, _ in ranks(result)]
    assert by_rank[0]["k"] == result.best.candidate.k
    both = set(by_call[0]) & set(by_rank[0]) - {"status"}
    assert {"rank", "bic", "aic", "icl", "log_likelihood", "n_parameters", "n_iter"} <= both
    for row in by_rank:
        (other,) = (one for one in by_call if one["k"] == row["k"])
        assert all(row[name] == other[name] for name in both)
        assert Status(other["status"]).name.lower() == row["status"]


def test_names_in_files_and_in_python_stay(result):
    common = (
        "rank k covariance_type bic aic icl log_likelihood n_parameters n_iter converged status"
    )
    more = "holdout n_starts n_dropped passes_saved left_out seconds lower_bounds"
    assert set(saved(result)[0]) == {*common.split(), *more.split()}
    assert set(listed(result)[0]) == {*common.split(), "mean_log_likelihood"}


def test_numbers_read_as_their_column_says():
    assert COLUMNS["bic"].text(-12345.678) == "-12,345.7"
    assert COLUMNS["holdout"].text(None) == "-"
    assert COLUMNS["status"].text(Status.MAX_ITER) == "max_iter"
    assert COLUMNS["holdout"].head_with_unit == "held-out, nats/row"
    assert [label(name) for name in CRITERIA] == ["BIC", "AIC", "ICL", "held-out log-likelihood"]


def test_no_other_module_lists_the_columns():
    """A second list would name the criteria as keys of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert not {"icl", "holdout"} <= keys or path.name == "table.py", path
