"""Random streams: all keys of a run, and who asks for them."""

from __future__ import annotations

import ast
import collections
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch

import gmm_dist
from gmm_dist import streams
from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.lane import Status
from gmm_dist.fitting.results import sample_of
from gmm_dist.nightly.column_drift import draw_rows
from gmm_dist.selection.certainty.bootstrap import Resampling, bootstrap
from gmm_dist.selection.clustering import find_clusters
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.starts import repair_degenerate
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.local import LocalShards
from gmm_dist.streams import Stream, keyed_generator

PACKAGE = Path(gmm_dist.__file__).parent


def uses_of_streams() -> list[tuple[str, str]]:
    """Return each stream that the package names, with its file."""
    return [
        (node.attr, str(path.relative_to(PACKAGE)))
        for path in sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "streams.py"})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Stream"
    ]


def test_each_stream_has_one_place_that_draws_from_it():
    names = [name for name, _ in uses_of_streams()]
    assert sorted(names) == sorted(stream.name for stream in Stream)


def test_the_numbers_of_streams_differ_and_so_do_their_names():
    assert len({stream.value for stream in Stream}) == len(Stream.__members__) == len(Stream)


def test_nothing_else_makes_generators():
    """scikit-learn's random states, for scikit-learn's contract, are the estimators' affair."""
    for path in sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "streams.py"}):
        text = path.read_text()
        assert "torch.Generator()" not in text, path
        assert "manual_seed" not in text, path


@pytest.fixture
def asked(monkeypatch):
    """Return a dict of every key that is asked for, with the functions that ask."""
    keys = collections.defaultdict(set)
    seeds = {}
    original = streams.SeedSequence

    def recorded(random_state, *, spawn_key):
        code = sys._getframe(2).f_code  # the caller of keyed_generator
        keys[random_state, *spawn_key].add((code.co_filename, code.co_qualname))
        sequence = original(random_state, spawn_key=spawn_key)
        seeds[random_state, *spawn_key] = int(sequence.generate_state(1)[0])
        return sequence

    monkeypatch.setattr(streams, "SeedSequence", recorded)
    keys["seeds"] = seeds
    return keys


def shards_with_held_out_rows(n_shards: int) -> LocalShards:
    X = mixtures.rows(mixtures.parameters("full", 4, 2, spread=4.0), 1200)
    held = mixtures.rows(mixtures.parameters("full", 4, 2, spread=4.0), 200, seed=1)
    fitted, kept = (LocalShards.of(rows, n_shards=n_shards)._shards for rows in (X, held))
    both = [replace(a, held_out=b.blocks) for a, b in zip(fitted, kept, strict=True)]
    return LocalShards(both)


def test_no_two_uses_share_a_key_in_a_whole_run(asked, monkeypatch):
    """All that draws: k-means||, the trail, moves, repairs, picture, night, resamples."""
    seeds, shards = asked.pop("seeds"), shards_with_held_out_rows(7)
    start = StartConfig(init="k-means||", n_init=3, moves=4, n_sample=300)
    candidates = [Candidate(k, kind) for k in (3, 9) for kind in ("full", "diag")]
    result = sweep(shards, candidates, EMConfig(), start, n_features=2, holdout=True)
    assert result.best.holdout is not None
    fit = result.best.fit
    (lone,) = loop.fit(shards, [fit.parameters], EMConfig(), result.total)
    lone.degenerate[0] = True
    broken = replace(lone, status=Status.DEGENERATE)
    ((_,),) = repair_degenerate(shards, [broken], EMConfig(), start, result.total)
    assert sample_of(shards, result, start.random_state) is not None
    shards.run(draw_rows(fit.parameters, result.total, start.random_state))

    monkeypatch.setattr("gmm_dist.selection.certainty.bootstrap.N_AFRESH", 1)
    resampling = Resampling(
        mixture=fit.parameters,
        n_resamples=2,
        config=EMConfig(),
        start=start,
        clusters=find_clusters(shards, fit.parameters, start=start),
    )
    bootstrap(shards, resampling)

    assert {Stream(key[1]) for key in asked} == set(Stream)  # nothing is left out
    assert all(len(places) == 1 for places in asked.values())
    by_shard = [Stream.PROFILE, Stream.POOL, Stream.FIRST_CENTRE, Stream.PICTURE_ROWS, Stream.NIGHT]
    for stream in by_shard:
        assert {key[2:] for key in asked if key[1] == stream.value} == {(i,) for i in range(7)}
    rounds = {key[2:] for key in asked if key[1] == Stream.MORE_CENTRES.value}
    assert rounds == set(itertools.product(range(7), range(1, 6)))
    assert len(set(seeds.values())) == len(seeds)


def test_a_key_has_its_seed_sequences_numbers_whatever_was_drawn_before():
    seed = np.random.SeedSequence(2**62 + 5, spawn_key=(8, 3, 2)).generate_state(1)[0]
    expected = torch.rand(3, generator=torch.Generator().manual_seed(int(seed)))
    for _ in range(2):
        drawn = torch.rand(3, generator=keyed_generator(Stream.MOVES, 2**62 + 5, 3, 2))
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((Stream.MOVES, 0, 2), (Stream.POOL, 0, 8)),
        ((Stream.STARTS, 0, 0), (Stream.STARTS, 0)),
        ((Stream.STARTS, 0, 1), (Stream.STARTS, 1, 0)),
        ((Stream.STARTS, 5 << 32), (Stream.STARTS, 5)),
        ((Stream.PROFILE, 1), (Stream.FIRST_CENTRE, 0)),
    ],
)
def test_other_keys_give_other_numbers(one, other):
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in (one, other)]
    assert not torch.equal(*draws)
