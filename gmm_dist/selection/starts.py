"""Search for starts: many short runs on a sample, moves where they stall; keep the best few.

The search works on samples that those who hold the shards share, each of them doing jobs for one
or another candidate; so it costs about as much as a few passes over a lake. The starts for a k
depend on the rows, the random state and k alone, not on the other candidates. Each k is searched
separately, with its lanes in separate passes, so that even the bits are the same in any grid:

1. `n_init` seeded starts run a few steps of EM each on a small sample; beside them the mixture of
   k components on the trail, which always begins at one component;
2. rounds of moves from the best, each a split and a merge at once, while they gain;
3. the best few run on a larger sample until they stand still, and are moved again.

The trail lets a k begin where a smaller one ended: from size to size the best mixture is split, in
the most promising ways, and runs on the small sample beside two fresh starts.
It ends at k = 32; a larger k has only its seeded starts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gmm_dist.config import EMConfig, StartConfig
from gmm_dist.em import loop
from gmm_dist.em.lane import Status
from gmm_dist.em.statistics import TotalMoments
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.ranking import Candidate
from gmm_dist.selection.samples import Sampler
from gmm_dist.selection.search import (
    LONG,
    TRAIL,
    Repair,
    Search,
    Steps,
    as_type,
    candidate_of,
    stand_in,
)
from gmm_dist.shards.protocol import Jobs, WorkingShards

# Rows from which on a search takes seconds, and to load Numba half of one.
_COMPILE_FROM = 10_000
_KNOWN_FROM = 0.05  # of the work done, before its pace tells how long the rest takes
# What a candidate's seeded starts, and the rest of its search, take beside a step of the trail.
_SEEDED, _REST = 2, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProgress:
    """How far a search is: candidates done, of how many; passes over samples; seconds left.

    `seconds_left` is None until there is something to go by.
    """

    n_done: int
    n_candidates: int
    n_passes: int
    seconds_left: float | None


Watch = Callable[[SearchProgress], None]
Done = Callable[[int, Sequence[Parameters]], None]
"""Gets a candidate's number and its starts."""


def find_starts(
    shards: WorkingShards,
    candidates: Sequence[Candidate],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
    *,
    warm: Sequence[Parameters] = (),
    done: Done = lambda i, starts: None,
    watch: Watch = lambda progress: None,
) -> list[list[Parameters]]:
    """Return for each candidate the starts worth full passes, the best first.

    Args:
        shards: All rows, about their shared centre.
        candidates: (k, covariance type) each.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
        warm: Mixtures about the centre that join the search for a candidate of their shape.
        done: Gets each candidate's starts as soon as there are any, in whatever order.
        watch: Gets the progress after each job.

    Starts are about the rows' shared centre.
    """
    config = _on_samples(config, total)
    sampler = Sampler(shards, start, total)
    searches = {
        candidate: Search(
            candidate=stand_in(candidate, sampler.samples(candidate.k)),
            samples=sampler.samples(candidate.k),
            seeds=sampler.seeds(candidate.k),
            config=config,
            start=start,
            warm=warm,
        )
        for candidate in _with_trail(candidates)
    }
    progress = _Progress(watch, [c.k for c in candidates])
    trail = _Trail(searches, progress)
    starts: dict[int, list[Parameters]] = {}

    def keep(i: int, finalists: list[Parameters]) -> None:
        starts[i] = finalists
        progress.finish()
        done(i, finalists)

    with shards.jobs() as jobs:
        errands = [
            _Errand((0, k), trail.steps(k, kind)) for kind, k in trail.ends(candidates).items()
        ]
        for i, candidate in enumerate(candidates):
            steps = _candidate(candidate, searches[candidate], trail, progress)
            errands.append(_Errand((1, candidate.k, i), steps, functools.partial(keep, i)))
        _work_off(jobs, errands, progress)
    return [starts[i] for i in range(len(candidates))]


def repair_degenerate(
    shards: WorkingShards,
    fits: Sequence[loop.FitResult],
    config: EMConfig,
    start: StartConfig,
    total: TotalMoments,
) -> list[list[Parameters]]:
    """Return for each fit a list with a start to replace it if it is degenerate, else no start.

    The start drops the fit's useless components, splits those that gain most, and has run EM on a
    coreset. There is none where too few components can be split.

    Args:
        shards: All rows, about their shared centre.
        fits: Fits on all rows.
        config: Settings of the loop.
        start: Settings of the search.
        total: Moments of all rows.
    """
    starts: list[list[Parameters]] = [[] for _ in fits]
    degenerate = [i for i, fit in enumerate(fits) if fit.status is Status.DEGENERATE]
    if not degenerate:
        return starts
    long = replace(_on_samples(config, total), max_iter=LONG)
    sampler = Sampler(shards, start, total)

    def repaired(i: int) -> Steps[list[Parameters]]:
        fit = fits[i]
        repair = Repair(
            parameters=fit.parameters,
            degenerate=fit.degenerate,
            config=long,
            random_state=start.random_state,
        )
        (found,) = yield sampler.samples(fit.parameters.n_components), [repair]
        return list(found)

    errands = [
        _Errand((i,), repaired(i), functools.partial(starts.__setitem__, i)) for i in degenerate
    ]
    for i in degenerate:
        sampler.samples(fits[i].parameters.n_components)  # passes over the rows, before the jobs
    with shards.jobs() as jobs:
        _work_off(jobs, errands, _Progress(lambda progress: None, []))
    return starts


def _on_samples(config: EMConfig, total: TotalMoments) -> EMConfig:
    """Return the settings of EM on samples: there are so many passes that compiled loops pay."""
    return replace(config, compile_from=0 if total.n_rows >= _COMPILE_FROM else config.compile_from)


def _with_trail(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates and the smaller sizes on their trails, in the order of k."""
    ends = [candidate for candidate in candidates if candidate.k <= TRAIL]
    smaller = {Candidate(k, end.covariance_type) for end in ends for k in range(1, end.k)}
    return sorted(smaller.union(candidates))


class _Trail:
    """The mixtures of each covariance type that lead from one component to the largest k."""

    def __init__(self, searches: Mapping[Candidate, Search], progress: _Progress) -> None:
        self._searches, self._progress = searches, progress
        self._mixtures: dict[Candidate, Parameters] = {}

    def ends(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """Return the largest k on the trail of each covariance type."""
        ends: dict[str, int] = {}
        for candidate in candidates:
            if candidate.k <= TRAIL:
                kind = candidate.covariance_type
                ends[kind] = max(candidate.k, ends.get(kind, 0))
        for k in ends.values():
            self._progress.plan(sum(range(1, k + 1)))
        return ends

    def steps(self, end: int, kind: str) -> Steps[None]:
        """Go the trail of a covariance type from one component to `end`."""
        mixture = None
        for k in range(1, end + 1):
            at = Candidate(k, kind)
            mixture = self._mixtures[at] = yield from self._searches[at].grown(mixture)
            self._progress.advance(k)

    def mixtures(self, candidate: Candidate) -> list[Parameters] | None:
        """Return the mixture of a candidate, none beyond the trail; None: it is not there yet."""
        if candidate.k > TRAIL:
            return []
        mixture = self._mixtures.get(candidate)
        return None if mixture is None else [mixture]


def _candidate(
    candidate: Candidate, search: Search, trail: _Trail, progress: _Progress
) -> Steps[list[Parameters]]:
    seeded = yield from search.seeded()
    progress.advance(_SEEDED * search.candidate.k)
    while (on_trail := trail.mixtures(search.candidate)) is None:
        yield search.samples, []
    finalists = yield from search.finalists(seeded, on_trail)
    progress.advance(_REST * search.candidate.k)
    if search.candidate == candidate:
        return finalists
    # Those of the candidate's own type, which did not join the search, are as good as finalists.
    kind = candidate.covariance_type
    own = [mixture for mixture in search.warm if candidate_of(mixture) == candidate]
    return [*(as_type(mixture, kind) for mixture in finalists), *own]


class _Progress:
    """Counts what a search has done, in units of what a component takes on the trail."""

    def __init__(self, watch: Watch, sizes: Sequence[int]) -> None:
        self._watch, self._n_candidates = watch, len(sizes)
        self._whole, self._part = (_SEEDED + _REST) * sum(sizes), 0
        self._n_done = self._n_passes = 0
        self._began = time.monotonic()

    def plan(self, units: int) -> None:
        self._whole += units

    def advance(self, units: int) -> None:
        self._part += units

    def finish(self) -> None:
        self._n_done += 1

    def add(self, result: object) -> None:
        """Count the passes of a job's result, if it ran EM."""
        fits = result if isinstance(result, list) else []
        runs = [len(fit.lower_bounds) for fit in fits if isinstance(fit, loop.FitResult)]
        self._n_passes += max(runs, default=0)
        spent = time.monotonic() - self._began
        # The first jobs wait for workers: their pace tells nothing of the others'.
        is_known = self._part > _KNOWN_FROM * self._whole
        left = spent * (self._whole / self._part - 1) if is_known else None
        self._watch(
            SearchProgress(
                n_done=self._n_done,
                n_candidates=self._n_candidates,
                n_passes=self._n_passes,
                seconds_left=left,
            )
        )


@dataclass(slots=True, eq=False)
class _Errand:
    """Steps under way: the jobs whose results they wait for, and who gets what they lead to."""

    order: tuple[int, ...]
    steps: Steps[Any]
    then: Callable[[Any], None] = lambda found: None
    expected: list[int] = field(default_factory=list)
    results: dict[int, Any] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        return len(self.results) == len(self.expected)


def _work_off(jobs: Jobs, errands: Sequence[_Errand], progress: _Progress) -> None:
    """Go all steps to their ends, with as many jobs at a time as there are."""
    handles: dict[int, Any] = {}
    owner: dict[int, _Errand] = {}
    left = list(errands)

    def go_on(errand: _Errand, *, first: bool = False) -> None:
        """Give steps the results that they wait for, and submit the jobs that they ask for."""
        results = [errand.results[number] for number in errand.expected]
        try:
            samples, asked = next(errand.steps) if first else errand.steps.send(results)
        except StopIteration as end:
            left.remove(errand)
            errand.then(end.value)
            return
        if id(samples) not in handles:
            handles[id(samples)] = jobs.share(samples)
        handle = handles[id(samples)]
        errand.expected = [jobs.submit(job, handle, order=errand.order) for job in asked]
        errand.results = {}
        owner.update(dict.fromkeys(errand.expected, errand))

    for errand in errands:
        go_on(errand, first=True)
    while left:
        number, result = jobs.next()
        errand = owner.pop(number)
        errand.results[number] = result
        if errand.is_ready:
            go_on(errand)
            # Steps that wait for the trail look whether it has reached them.
            for waiting in [e for e in left if not e.expected]:
                go_on(waiting)
        progress.add(result)
