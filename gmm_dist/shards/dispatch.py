"""Send each pass to the workers, and collect exactly one result per shard, despite failures."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray

from gmm_dist.errors import RunFailed
from gmm_dist.formats import counted
from gmm_dist.shards.crew import Crew
from gmm_dist.shards.placement import Placement, shares
from gmm_dist.shards.workers import (
    Call,
    Loaded,
    Reply,
    Request,
    Source,
    State,
    Work,
    Worker,
    no_room,
)

logger = logging.getLogger(__name__)


class Dispatcher:
    """Hands out a pass to the workers, and repeats what failures lose.

    Every worker has at most one call under way: it loads one shard, or runs the task on all its
    shards. A call outlives its pass when siblings have done its shards meanwhile; its reply is
    then dropped, as are the replies of abandoned workers.
    """

    def __init__(self, crew: Crew, placement: Placement, capacity: Callable[[], int]) -> None:
        self._crew, self._placement = crew, placement
        self._workers, self._faults = crew.workers, crew.faults
        self._capacity = capacity  # bytes that a worker has for rows
        self._source: Source | None = None
        self._is_loading = True
        self._work_ref: Any = None  # of the pass's Work, in the object store
        self._todo: set[int] = set()
        self._assigned: list[set[int]] = [set() for _ in crew.workers]  # each one's in this pass
        self._sizes: dict[int, Loaded] = {}
        self._load_seconds: list[float] = []
        self._run_seconds: list[float] = []  # per shard, of this pass

    def gather(self, work: Work) -> Iterator[Reply]:
        """Yield replies that cover every shard exactly once."""
        yield from self._begin(work)
        while self._todo:
            self._hand_out(time.monotonic())
            for worker, ref in self._crew.ready():
                yield from self._settle(worker, ref)
            self._look_around()

    def close(self) -> None:
        """Let go of what lies in the object store."""
        self._source = self._work_ref = None

    def _begin(self, work: Work) -> Iterator[Reply]:
        source, self._is_loading, self._work_ref = work.source, work.task is None, ray.put(work)
        if self._source is None or source.number != self._source.number:
            self._sizes, self._load_seconds = {}, []
            for worker in self._workers:
                worker.held = set()
        self._source, self._run_seconds = source, []
        self._crew.begin()
        self._todo = {shard for w in self._workers for shard in self._placement.owned(w.index)}
        for worker in self._workers:
            self._give_back(worker)
        self._assigned = [set(self._placement.owned(worker.index)) for worker in self._workers]
        for worker in self._workers:
            loaded = worker.held & self._assigned[worker.index] if self._is_loading else ()
            for shard in sorted(loaded):
                self._todo.discard(shard)
                yield Reply(self._crew.ticket(source.number, [shard]), self._sizes[shard])

    def _give_back(self, worker: Worker) -> None:
        """Return its shards to a worker that came back, once it holds them again."""
        away = self._placement.away(worker.index)
        free = worker.state is State.UP and worker.call is None
        if away and free and worker.barred <= self._crew.iteration and worker.held.issuperset(away):
            self._placement.move(away, worker.index)
            logger.info("%s holds its %s again", worker.name, counted(len(away), "shard"))

    # Handing out.

    def _hand_out(self, now: float) -> None:
        self._crew.start_rested(now)
        for worker in self._crew.free(now):
            self._give_call(worker, now)

    def _give_call(self, worker: Worker, now: float) -> None:
        wanted = self._assigned[worker.index] & self._todo
        missing = wanted - worker.held
        if missing:
            self._send(worker, [min(missing)], now, is_load=True)
        elif wanted:
            self._send(worker, sorted(wanted), now, is_load=False)
        elif worker.barred <= self._crew.iteration:
            # Meanwhile it loads the shards that it will get back.
            away = self._placement.away(worker.index)
            missing = set(away) - worker.held
            if missing and not self._is_loading:
                self._send(worker, [min(missing)], now, is_load=True)

    def _send(self, worker: Worker, shards: Sequence[int], now: float, *, is_load: bool) -> None:
        forget = self._spare(worker)
        worker.held.difference_update(forget)
        assert self._source is not None
        ticket = self._crew.ticket(self._source.number, shards)
        method = worker.actor.load if is_load else worker.actor.run
        ref = method.remote(Request(ticket, forget).packed(), self._work_ref)
        worker.call = Call(ref=ref, ticket=ticket, is_load=is_load, sent=now)
        worker.heard = now

    def _spare(self, worker: Worker) -> tuple[int, ...]:
        """Return the shards that a worker holds and no longer needs."""
        owned = self._placement.owned(worker.index)
        if worker.held <= owned:
            return ()
        away = self._placement.away(worker.index)
        return tuple(sorted(worker.held - owned - self._assigned[worker.index] - set(away)))

    # Listening.

    def _settle(self, worker: Worker, ref: Any) -> Iterator[Reply]:
        answer = self._crew.receive(worker, ref)
        if answer is None:
            return
        if answer.call is None:
            self._welcome(worker)
        elif self._is_due(answer.call):
            call = answer.call
            seconds = (time.monotonic() - call.sent) / len(call.ticket.shards)
            (self._load_seconds if call.is_load else self._run_seconds).append(seconds)
            yield from self._count(worker, answer.value)

    def _is_due(self, call: Call) -> bool:
        """Say whether a call belongs to the present pass or loading."""
        assert self._source is not None
        ticket = call.ticket
        if call.is_load:  # a loading may have begun in the pass before
            return ticket.source == self._source.number
        return not self._crew.is_late(call) and self._todo.issuperset(ticket.shards)

    def _count(self, worker: Worker, reply: Reply) -> Iterator[Reply]:
        shards = reply.ticket.shards
        if isinstance(reply.value, Loaded):
            (shard,) = shards
            worker.held.add(shard)
            size = self._sizes.setdefault(shard, reply.value)
            assert size.n_rows == reply.value.n_rows, f"shard {shard} has other rows than before"
            self._require_room(worker)
            if not self._is_loading or shard not in self._todo:
                return
        self._todo.difference_update(shards)
        self._keep(worker, shards)
        yield reply

    def _keep(self, worker: Worker, shards: Sequence[int]) -> None:
        """Let the worker that replied first own the shards from now on."""
        others = [shard for shard in shards if shard not in self._placement.owned(worker.index)]
        if others:
            self._placement.move(others, worker.index)
            worker.strikes = worker.barred = 0

    def _welcome(self, worker: Worker) -> None:
        # It gets back the shards that no other worker holds or has begun to load.
        for shard in self._placement.away(worker.index):
            taker = self._workers[self._placement.owner(shard)]
            begun = taker.call is not None and shard in taker.call.ticket.shards
            if shard not in taker.held and not begun:
                self._assigned[taker.index].discard(shard)
                self._placement.move([shard], worker.index)
                self._assigned[worker.index].add(shard)

    def _look_around(self) -> None:
        """Check, once per tick, which workers are silent, slow or away."""
        now = time.monotonic()
        if not self._crew.is_time_to_look(now):
            return
        for worker in self._workers:
            if worker.call is not None:
                self._watch_call(worker, worker.call, now)
            elif worker.state is not State.UP and self._placement.owned(worker.index):
                self._watch_absence(worker, now)
        n_shards = sum(len(self._placement.owned(w.index)) for w in self._workers)
        self._crew.report(now, f"{len(self._todo)} of {counted(n_shards, 'shard')}")

    def _watch_call(self, worker: Worker, call: Call, now: float) -> None:
        faults, lasted, usual = self._faults, now - call.sent, self._usual(call)
        longest = max(faults.deadline, faults.deadline_factor * usual) if usual else faults.longest
        is_alive = self._crew.is_alive(worker, call, now, longest)
        if is_alive and usual and lasted > max(faults.straggling, faults.straggling_factor * usual):
            self._relieve(worker, call, lasted, usual)

    def _usual(self, call: Call) -> float | None:
        """Return how long siblings took for as many shards; None while that is unknown."""
        seconds = self._load_seconds if call.is_load else self._run_seconds
        if not seconds or self._crew.is_late(call):
            return None
        return statistics.median(seconds) * len(call.ticket.shards)

    def _relieve(self, worker: Worker, call: Call, lasted: float, usual: float) -> None:
        """Have idle workers repeat the shards that a straggler has not done."""
        shards = self._assigned[worker.index] & self._todo
        if not shards or not shards <= self._placement.owned(worker.index):
            return  # done, or under way elsewhere
        idle = [
            w
            for w in self._workers
            if w.state is State.UP
            and w.call is None
            and not self._assigned[w.index] & self._todo
            and _is_alike(w, worker)
        ]
        if not self._take_over(shards, idle):
            return
        if call.is_load:
            self._assigned[worker.index] = set(call.ticket.shards)
        worker.strikes += 1
        worker.barred = self._crew.iteration + 2**worker.strikes
        logger.info(
            "%s works for %.0f s on what takes others %.0f s: %s of it are done by %s too (not "
            "counted)",
            worker.name,
            lasted,
            usual,
            counted(len(shards), "shard"),
            counted(len(idle), "other"),
        )

    def _watch_absence(self, worker: Worker, now: float) -> None:
        # Each worker that comes up gives the absent ones more time.
        if now - max(worker.since, self._crew.joined) <= self._faults.grace:
            return
        shards = set(self._placement.owned(worker.index))
        survivors = [w for w in self._workers if w.state is State.UP and _is_alike(w, worker)]
        if self._take_over(shards, survivors):
            self._assigned[worker.index] = set()
            to = counted(len(shards), "shard"), counted(len(survivors), "other")
            text = "%s has been away for %.0f s: its %s go to %s"
            logger.info(text, worker.name, now - worker.since, *to)
        else:
            self._require_hope(worker, now)

    def _require_hope(self, worker: Worker, now: float) -> None:
        if self._crew.has_hope(worker, now):
            return
        away = now - max(worker.since, self._crew.joined)
        up = [w for w in self._workers if w.state is State.UP]
        shards = counted(len(self._placement.owned(worker.index)), "shard")
        if not any(_is_alike(w, worker) for w in up):
            cards = " and a ".join(sorted({str(w.card) for w in up}))
            raise RunFailed(
                f"no worker for {shards} in {away:.0f} s: they were summed on a {worker.card}, and "
                f"who is up has a {cards}, whose sums have other last bits: add machines of the "
                "same kind, or run again without the others"
            )
        raise RunFailed(
            f"no worker for {shards} in {away:.0f} s, and no room where one is up "
            f"({counted(len(up), 'worker')}): add machines or memory"
        )

    def _take_over(self, shards: set[int], takers: Iterable[Worker]) -> bool:
        capacity = self._capacity()
        room = {w.index: float(capacity - self._bytes_of(w)) for w in takers}
        sizes = {shard: size.n_bytes for shard, size in self._sizes.items()}
        dealt = shares(shards, room, sizes)
        for taker, portion in (dealt or {}).items():
            self._placement.move(portion, taker)
            self._assigned[taker].update(portion)
        return dealt is not None

    def _bytes_of(self, worker: Worker) -> int:
        shards = self._placement.owned(worker.index) | self._assigned[worker.index]
        return sum(self._sizes[shard].n_bytes for shard in shards if shard in self._sizes)

    def _require_room(self, worker: Worker) -> None:
        used, capacity = self._bytes_of(worker), self._capacity()
        if used > capacity:
            raise no_room(worker, len(self._placement.owned(worker.index)), used, capacity)


def _is_alike(taker: Worker, worker: Worker) -> bool:
    """Say whether a worker's sums have the bits of another's: both on CPUs, or on the same card."""
    return worker.card is None or taker.card == worker.card
