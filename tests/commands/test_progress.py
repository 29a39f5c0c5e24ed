"""What a user sees while a job runs, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gmm_dist.commands.progress import Progress
from gmm_dist.commands.tables import clusters_table, notes, on_resamples, ranking
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.model.bootstrap import Bootstrap, Win
from gmm_dist.model.clusters import Recovery, Stability
from gmm_dist.model.mixture import Mixture
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate, SweepResult
from gmm_dist.selection.starts import SearchProgress
from gmm_dist.selection.sweep import Standing, sweep
from gmm_dist.shards.local import LocalShards

STANDINGS = [
    Standing(
        candidate=Candidate(2, "full"),
        is_running=True,
        n_iter=7,
        lower_bound=-12.5,
        precision="float32",
    ),
    Standing(
        candidate=Candidate(3, "diag"),
        is_running=False,
        n_iter=4,
        lower_bound=-11.25,
        precision="float64",
    ),
    Standing(
        candidate=Candidate(4, "full"),
        is_running=True,
        n_iter=0,
        lower_bound=float("nan"),
        precision="float64",
    ),
]

SEARCHED = SearchProgress(n_done=3, n_candidates=13, n_passes=1234, seconds_left=41.7)


def test_a_search_says_what_is_done_and_how_long_it_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = Progress(Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, "gmm_dist.commands.progress"):
        progress.searching(SEARCHED)
    line = "searched 3 of 13 candidates in 1,234 passes over samples, about 42 s left"
    assert caplog.messages == [line]


def test_a_terminal_shows_each_candidates_state_iteration_and_likelihood() -> None:
    screen = io.StringIO()
    progress = Progress(Console(file=screen, force_terminal=True, width=100))
    with progress.shown():
        progress.loading(3, 8, 1_234_567)
        progress.starting(8)
        progress.searching(SEARCHED)
        progress.standings(STANDINGS)
    seen = screen.getvalue()
    for part in (
        "running, float32",
        "-12.500000",
        "done",
        "-11.250000",
        "full",
        "diag",
        "...",
    ):
        assert part in seen


def test_elsewhere_there_are_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, "gmm_dist.commands.progress"), progress.shown():
        progress.loading(8, 8, 1_234_567)
        progress.searching(replace(SEARCHED, n_done=13))
        progress.standings(STANDINGS)
    assert "searched 13 of 13 candidates in 1,234 passes over samples\n" in caplog.text
    assert "loaded 8 of 8 shards, 1,234,567 rows" in caplog.text
    assert "pass 1: 2 of 3 running; mean log-likelihood: k=2 full -12.500000" in caplog.text


def test_the_ranking_shows_best_first_and_failures_last() -> None:
    X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shards = LocalShards.of(X)
    candidates = [Candidate(k, "full") for k in (20, 1)]
    result = sweep(shards, candidates, EMConfig(), StartConfig(n_init=1), n_features=2)
    for width, has_aic in ((80, False), (160, True)):
        screen = io.StringIO()
        Console(file=screen, width=width).print(ranking(result, width))
        above, head, *rows = screen.getvalue().splitlines()
        assert above.strip() == "mean log-likelihood,"
        assert head.index("nats per row") + len("nats per row") == len(above.rstrip())
        assert ("AIC" in head) is has_aic
        assert "…" not in screen.getvalue()
        assert [row.split()[:2] for row in rows] == [["1", "1"], ["-", "20"]]
        assert [row.split()[-1] for row in rows] == ["converged", "degenerate"]
    note, passes = notes(result)
    assert passes.startswith(f"{result.n_passes} passes over all rows")
    assert note.startswith("k=20 full: degenerate: a component has fewer rows")


def test_where_the_table_does_not_fit_it_is_a_list_with_every_number() -> None:
    X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidates = [Candidate(k, "spherical") for k in (1, 2)]
    result = sweep(LocalShards.of(X), candidates, EMConfig(), StartConfig(n_init=1), n_features=2)
    screen = io.StringIO()
    Console(file=screen, width=30).print(ranking(result, 30))
    seen = screen.getvalue()
    assert "…" not in seen
    assert max(map(len, seen.splitlines())) <= 30
    assert seen.splitlines()[0].startswith("1. k=")
    assert "  mean log-likelihood,\n  nats per row -" in seen
    for scored in result.scored:
        values = (scored.bic, scored.aic, scored.icl)
        assert all(f"{value:,.1f}" in seen for value in values)
        assert f"{scored.fit.log_likelihood / result.n_samples:.6f}" in seen


def test_the_ranking_shows_held_out_likelihood_where_there_is_one() -> None:
    X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidates, settings = [Candidate(1, "full")], (EMConfig(), StartConfig(n_init=1))
    result = sweep(LocalShards.of(X), candidates, *settings, n_features=2)
    for holdout in (None, -2.3456789):
        scored = tuple(replace(s, holdout=holdout) for s in result.scored)
        screen = io.StringIO()
        Console(file=screen, width=80).print(ranking(replace(result, scored=scored), 80))
        assert ("held-out" in screen.getvalue()) is (holdout is not None)
        assert ("-2.345679" in screen.getvalue()) is (holdout is not None)


def _fitted(k: int, *, stable: bool) -> tuple[SweepResult, Mixture]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    X += 20 * (torch.arange(300) % k)[:, None]
    shards, candidates = LocalShards.of(X), [Candidate(n, "full") for n in (1, k)]
    result = sweep(shards, candidates, EMConfig(), StartConfig(n_init=2), n_features=2)
    assert result.best is not None
    parameters = result.best.fit.parameters
    clusters = find_clusters(shards, parameters, parameters.n_components)
    if stable:
        one = Recovery(n_resamples=50, similarities=(0.9, 0.6), n_whole=40, n_clusters=(k,) * 50)
        stability = Stability(n_rows=300, from_fit=one, afresh=replace(one, n_whole=9))
        clusters = replace(clusters, stability=stability)
    return result, Mixture(parameters=parameters, feature_names=("x", "y"), clusters=clusters)


def test_clusters_are_a_line_each_with_what_sets_them_apart() -> None:
    for width in (60, 120):
        result, mixture = _fitted(2, stable=True)
        screen = io.StringIO()
        table = clusters_table(mixture, result.n_samples, width)
        Console(file=screen, width=width).print(table)
        seen = screen.getvalue()
        assert max(map(len, seen.splitlines())) <= width
        lines = " ".join(seen.split())
        assert "50.0\u202f%" in seen
        assert "yes, 0.90" in seen
        assert "no, 0.60" in seen
        assert re.search(r"[01]: x [−\d.]+ \([−\d.]+\), y", lines)
    assert on_resamples(mixture) == [
        "2 clusters (2 components): each was found again in 40 of 50 resamples, and in 9 of 50 "
        "that were searched afresh"
    ]


def test_many_clusters_are_some_lines_and_one_has_no_nearest() -> None:
    result, mixture = _fitted(17, stable=False)
    assert on_resamples(mixture) == []
    screen = io.StringIO()
    Console(file=screen, width=120).print(clusters_table(mixture, result.n_samples, 120))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 1 + 15 + 1
    assert lines[-1].strip() == "and 2 smaller clusters"
    assert mixture.clusters is not None
    alone = replace(mixture, clusters=mixture.clusters.at(1))
    screen = io.StringIO()
    Console(file=screen, width=120).print(clusters_table(alone, result.n_samples, 120))
    assert screen.getvalue().splitlines()[1].split() == ["0", "100.0", "%", "300", "-"]


def test_resamples_won_are_a_column() -> None:
    result, mixture = _fitted(2, stable=False)
    wins = (Win(k=2, covariance_type="full", n=47), Win(k=1, covariance_type="full", n=3))
    screen = io.StringIO()
    Console(file=screen, width=160).print(ranking(result, 160, wins))
    *_, first, second = screen.getvalue().splitlines()
    assert first.split()[7] == "47"
    assert second.split()[7] == "3"
    fits = [mixture.parameters] * 47
    lost = replace(mixture, bootstrap=Bootstrap.of(fits, 2, 2, n_resamples=50, random_state=0))
    assert on_resamples(lost)[-1].startswith("3 of 50 resamples had a component with too few rows")
