"""Send each pass to the workers, and collect exactly one result per shard, despite failures."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from gmm_dist.config import FailureConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.formats import counted
from gmm_dist.shards.failures import Budget, Verdict, is_full, judge, reason
from gmm_dist.shards.placement import Placement, shares
from gmm_dist.shards.workers import (
    Call,
    Loaded,
    Reply,
    Request,
    Source,
    State,
    Ticket,
    Work,
    Worker,
    machines,
    no_room,
)

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds between two lines that say what we wait for
_REPEATS = 3  # failed calls in a row after which a worker that seems to be there is replaced
_PULSES = 6  # per time of silence


class Dispatcher:
    """Hands out a pass to the workers, and repeats what failures lose.

    Every worker has at most one call under way: it loads one shard, or runs the task on all its
    shards. A call outlives its pass when siblings have done its shards meanwhile; its reply is
    then dropped, as are the replies of abandoned workers.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        placement: Placement,
        faults: FailureConfig,
        capacity: Callable[[], int],
    ) -> None:
        self._workers, self._placement = workers, placement
        self._faults, self._budget = faults, Budget(faults)
        self._capacity = capacity  # bytes that a worker has for rows
        self._run, self._attempts, self._iteration = uuid.uuid4().hex, itertools.count(), 0
        self._source: Source | None = None
        self._is_loading = True
        self._work_ref: Any = None  # of the pass's Work, in the object store
        self._todo: set[int] = set()
        self._assigned: list[set[int]] = [set() for _ in workers]  # each one's shards in this pass
        self._sizes: dict[int, Loaded] = {}
        self._load_seconds: list[float] = []
        self._run_seconds: list[float] = []  # per shard, of this pass
        self._joined = time.monotonic()  # when a worker came up last
        self._listened = self._replied = self._reported = self._joined

    def gather(self, work: Work) -> Iterator[Reply]:
        """Yield replies that cover every shard exactly once."""
        yield from self._begin(work)
        while self._todo:
            self._hand_out(time.monotonic())
            for worker, ref in self._ready():
                yield from self._settle(worker, ref)
            self._look_around()

    def await_worker(self) -> Worker:
        """Wait until a worker is up, and return it."""
        while True:
            for worker in self._workers:
                if worker.state is State.UP:
                    return worker
            now = time.monotonic()
            self._start_rested(now)
            for worker, ref in self._ready():
                for _ in self._settle(worker, ref):
                    raise AssertionError("nothing was asked of the workers yet")
            for worker in self._workers:
                self._require_hope(worker, now)
            if now - self._reported > _PATIENCE:
                self._reported = now
                logger.info("waiting for a worker for %.0f s; %s", now - self._joined, machines())

    def close(self) -> None:
        """End the actors, with their rows, and let go of what lies in the object store."""
        self._source = self._work_ref = None
        with ExitStack() as stack:  # all of them, even where a signal breaks one off
            for worker in self._workers:
                stack.callback(worker.abandon, time.monotonic())

    def _begin(self, work: Work) -> Iterator[Reply]:
        source, self._is_loading, self._work_ref = work.source, work.task is None, ray.put(work)
        if self._source is None or source.number != self._source.number:
            self._sizes, self._load_seconds = {}, []
            for worker in self._workers:
                worker.held = set()
        self._source, self._run_seconds = source, []
        self._iteration += 1
        self._todo = {shard for w in self._workers for shard in self._placement.owned(w.index)}
        for worker in self._workers:
            self._give_back(worker)
        self._assigned = [set(self._placement.owned(worker.index)) for worker in self._workers]
        self._listened = self._replied = self._reported = time.monotonic()
        for worker in self._workers:
            worker.heard = self._listened  # the driver has not listened since the last pass
            loaded = worker.held & self._assigned[worker.index] if self._is_loading else ()
            for shard in sorted(loaded):
                self._todo.discard(shard)
                yield Reply(self._ticket([shard]), self._sizes[shard])

    def _give_back(self, worker: Worker) -> None:
        """Return its shards to a worker that came back, once it holds them again."""
        away = self._placement.away(worker.index)
        free = worker.state is State.UP and worker.call is None
        if away and free and worker.barred <= self._iteration and worker.held.issuperset(away):
            self._placement.move(away, worker.index)
            logger.info("%s holds its %s again", worker.name, counted(len(away), "shard"))

    # Handing out.

    def _start_rested(self, now: float) -> None:
        for worker in self._workers:
            if worker.state is State.DOWN and now >= worker.rested:
                worker.restart()

    def _hand_out(self, now: float) -> None:
        self._start_rested(now)
        for worker in self._workers:
            if worker.state is State.UP and worker.call is None and now >= worker.rested:
                self._give_call(worker, now)

    def _give_call(self, worker: Worker, now: float) -> None:
        wanted = self._assigned[worker.index] & self._todo
        missing = wanted - worker.held
        if missing:
            self._send(worker, [min(missing)], now, is_load=True)
        elif wanted:
            self._send(worker, sorted(wanted), now, is_load=False)
        elif worker.barred <= self._iteration:
            # Meanwhile it loads the shards that it will get back.
            away = self._placement.away(worker.index)
            missing = set(away) - worker.held
            if missing and not self._is_loading:
                self._send(worker, [min(missing)], now, is_load=True)

    def _send(self, worker: Worker, shards: Sequence[int], now: float, *, is_load: bool) -> None:
        forget = self._spare(worker)
        worker.held.difference_update(forget)
        ticket = self._ticket(shards)
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

    def _ticket(self, shards: Sequence[int]) -> Ticket:
        assert self._source is not None
        return Ticket(
            run=self._run,
            attempt=next(self._attempts),
            iteration=self._iteration,
            source=self._source.number,
            shards=tuple(shards),
        )

    # Listening.

    def _ready(self) -> list[tuple[Worker, Any]]:
        """Wait for a moment, and return the replies that are ready, with their workers."""
        worker_of: dict[Any, Worker] = {}
        for worker in self._workers:
            refs = (worker.call and worker.call.ref, worker.hello, worker.pulse)
            worker_of |= {ref: worker for ref in refs if ref is not None}
        now = time.monotonic()
        waits = [worker.rested - now for worker in self._workers if worker.rested > now]
        timeout = min([self._faults.tick, *waits])
        if not worker_of:
            time.sleep(timeout)
            return []
        # Replies may be large: they are fetched one at a time.
        ready, rest = ray.wait(list(worker_of), timeout=timeout, fetch_local=False)
        if ready and rest:  # take all that are ready, to wait less often
            ready += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return [(worker_of[ref], ref) for ref in ready]

    def _settle(self, worker: Worker, ref: Any) -> Iterator[Reply]:
        if not worker.expects(ref):  # given up since
            return
        try:
            value = ray.get(ref, timeout=self._faults.silence)
        except Exception as error:
            self._failed(worker, ref, error)
            return
        now = time.monotonic()
        if ref is worker.hello:
            worker.hello = None
            self._welcome(worker, value, now)
        elif ref is worker.pulse:
            worker.pulse = None
            if worker.call is not None and value == worker.call.ticket.attempt:
                worker.heard = now
        else:
            call, worker.call, worker.failures = worker.call, None, 0
            assert call is not None
            self._replied = now
            if self._is_due(call, value):
                seconds = (now - call.sent) / len(call.ticket.shards)
                (self._load_seconds if call.is_load else self._run_seconds).append(seconds)
                yield from self._count(worker, value)

    def _is_due(self, call: Call, reply: Reply) -> bool:
        """Say whether a reply belongs to a call, and the call to the present pass or loading."""
        assert self._source is not None
        ticket = reply.ticket
        if ticket != call.ticket or ticket.run != self._run:
            return False
        if call.is_load:  # a loading may have begun in the pass before
            return ticket.source == self._source.number
        return ticket.iteration == self._iteration and self._todo.issuperset(ticket.shards)

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

    def _welcome(self, worker: Worker, introduction: Any, now: float) -> None:
        worker.introduction, worker.state = introduction, State.UP
        self._joined = now
        if worker.failures:
            logger.info("%s is up", worker.name)
        # It gets back the shards that no other worker holds or has begun to load.
        for shard in self._placement.away(worker.index):
            taker = self._workers[self._placement.owner(shard)]
            begun = taker.call is not None and shard in taker.call.ticket.shards
            if shard not in taker.held and not begun:
                self._assigned[taker.index].discard(shard)
                self._placement.move([shard], worker.index)
                self._assigned[worker.index].add(shard)

    # Failures.

    def _failed(self, worker: Worker, ref: Any, error: Exception) -> None:
        if ref is worker.pulse:  # the call's own failure says more
            worker.pulse = None
            return
        if (verdict := judge(error)) is Verdict.HOPELESS:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError | RunFailed):
                raise cause from None
            if isinstance(cause, OSError) and is_full(cause):
                raise RunFailed(f"{worker.name}: {reason(error)}: free space there") from error
            raise error
        is_up = worker.state is State.UP
        if verdict is Verdict.REPEAT and (worker.failures + 1 >= _REPEATS or not is_up):
            verdict = Verdict.REPLACE
        counts = verdict in (Verdict.REPLACE, Verdict.OUTSIDE)
        self._lost(worker, reason(error), verdict, counts=counts)

    def _lost(
        self, worker: Worker, why: str, verdict: Verdict = Verdict.REPLACE, *, counts: bool = True
    ) -> None:
        """Record a failure, log it, and prepare the remedy."""
        now = time.monotonic()
        what, n_held = f"{worker.name}: {why}", len(worker.held)
        if verdict in (Verdict.REPLACE, Verdict.PREEMPTED):
            worker.abandon(now)
        worker.call = None
        worker.failures += 1
        worker.rested = now + self._faults.rest(worker.failures)
        which = self._budget.charge(what, now) if counts else "not counted"
        lost = f" and loads its {counted(n_held, 'shard')}" if not worker.actor and n_held else ""
        logger.info("%s; %s%s (%s)", what, verdict.value, lost, which)

    def _look_around(self) -> None:
        """Check, once per tick, which workers are silent, slow or away."""
        now = time.monotonic()
        elapsed = now - self._listened
        if elapsed < self._faults.tick / 2:
            return
        self._listened = now
        if elapsed > 4 * self._faults.tick:  # the driver was busy with a reply, and did not listen
            for worker in self._workers:
                worker.heard += elapsed
            return
        for worker in self._workers:
            if worker.call is not None:
                self._watch_call(worker, worker.call, now)
            elif worker.state is not State.UP and self._placement.owned(worker.index):
                self._watch_absence(worker, now)
        if now - max(self._replied, self._reported) > _PATIENCE:
            self._reported = now
            self._report(now)

    def _watch_call(self, worker: Worker, call: Call, now: float) -> None:
        faults, lasted, silent = self._faults, now - call.sent, now - worker.heard
        usual = self._usual(call)
        longest = max(faults.deadline, faults.deadline_factor * usual) if usual else faults.longest
        if silent > faults.silence:
            self._lost(worker, f"no sign of work for {silent:.0f} s")
        elif self._is_late(call) and lasted > faults.deadline:
            self._lost(worker, f"no reply for {lasted:.0f} s, while others replied", counts=False)
        elif lasted > longest:
            self._lost(worker, f"no reply for {lasted:.0f} s")
        else:
            if worker.pulse is None and silent > faults.silence / _PULSES:
                pulse = worker.actor.pulse.options(concurrency_group="pulse")
                worker.pulse = pulse.remote()
            if usual and lasted > max(faults.straggling, faults.straggling_factor * usual):
                self._relieve(worker, call, lasted, usual)

    def _usual(self, call: Call) -> float | None:
        """Return how long siblings took for as many shards; None while that is unknown."""
        seconds = self._load_seconds if call.is_load else self._run_seconds
        if not seconds or self._is_late(call):
            return None
        return statistics.median(seconds) * len(call.ticket.shards)

    def _is_late(self, call: Call) -> bool:
        """Say whether a call belongs to a pass that ended without it."""
        return not call.is_load and call.ticket.iteration != self._iteration

    def _relieve(self, worker: Worker, call: Call, lasted: float, usual: float) -> None:
        """Have idle workers repeat the shards that a straggler has not done."""
        shards = self._assigned[worker.index] & self._todo
        if not shards or not shards <= self._placement.owned(worker.index):
            return  # done, or under way elsewhere
        idle = [
            w
            for w in self._workers
            if w.state is State.UP and w.call is None and not self._assigned[w.index] & self._todo
        ]
        if not self._take_over(shards, idle):
            return
        if call.is_load:
            self._assigned[worker.index] = set(call.ticket.shards)
        worker.strikes += 1
        worker.barred = self._iteration + 2**worker.strikes
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
        if now - max(worker.since, self._joined) <= self._faults.grace:
            return
        shards = set(self._placement.owned(worker.index))
        survivors = [w for w in self._workers if w.state is State.UP]
        if self._take_over(shards, survivors):
            self._assigned[worker.index] = set()
            to = counted(len(shards), "shard"), counted(len(survivors), "other")
            text = "%s has been away for %.0f s: its %s go to %s"
            logger.info(text, worker.name, now - worker.since, *to)
        else:
            self._require_hope(worker, now)

    def _require_hope(self, worker: Worker, now: float) -> None:
        away = now - max(worker.since, self._joined)
        if worker.state is State.UP or away <= self._faults.forsaken:
            return
        n_up = sum(w.state is State.UP for w in self._workers)
        if not n_up:
            raise RunFailed(f"no worker has come up for {away:.0f} s; {machines()}: add machines")
        shards = counted(len(self._placement.owned(worker.index)), "shard")
        raise RunFailed(
            f"no worker for {shards} in {away:.0f} s, and no room where one is up "
            f"({counted(n_up, 'worker')}): add machines or memory"
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

    def _report(self, now: float) -> None:
        logger.info(
            "waiting for %d of %s, %.0f s so far (%d of %s up; %s)",
            len(self._todo),
            counted(sum(len(self._placement.owned(w.index)) for w in self._workers), "shard"),
            now - self._replied,
            sum(w.state is State.UP for w in self._workers),
            counted(len(self._workers), "worker"),
            machines(),
        )
