"""Jobs on a Ray cluster: each is done by whichever worker is free, and again where one is lost."""

from __future__ import annotations

import heapq
import itertools
import pickle
import time
from typing import Any

import ray

from gmm_dist.formats import counted
from gmm_dist.shards.crew import Crew
from gmm_dist.shards.protocol import Job
from gmm_dist.shards.workers import Call, Shared, State, Worker


class JobQueue:
    """Jobs for a crew's workers; a job is a pure function, so who does it changes no bit.

    A job whose worker is lost goes back to those that wait. One that lasts far longer than all
    others is given to an idle worker too, and the first result counts.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._numbers, self._shared = itertools.count(), list[Shared]()
        self._pending: dict[int, tuple[Job[Any], Shared, tuple[int, ...]]] = {}  # no result yet
        self._waiting: list[tuple[tuple[int, ...], int]] = []  # a heap
        self._job_of: dict[int, int] = {}  # by the attempt of a call
        self._longest = 0.0  # seconds that a job has taken
        crew.begin()

    def share(self, value: Any) -> Shared:
        """Put a value into the object store, once for all jobs that refer to it."""
        self._shared.append(Shared((self._crew.iteration, len(self._shared)), [ray.put(value)]))
        return self._shared[-1]

    def close(self) -> None:
        """Let go of what lies in the object store; replies that are still to come are dropped."""
        for shared in self._shared:
            shared.value.clear()

    def submit(self, job: Job[Any], shared: Shared, *, order: tuple[int, ...]) -> int:
        """Add a job for a shared value, and return its number; the least order comes first."""
        number = next(self._numbers)
        self._pending[number] = job, shared, order
        heapq.heappush(self._waiting, (order, number))
        return number

    def next(self) -> tuple[int, Any]:
        """Wait for a job to be done, and return its number and its result.

        Raises RunFailed after too many failures.
        """
        assert self._pending, "no job is left"
        while True:
            self._hand_out(time.monotonic())
            for worker, ref in self._crew.ready():
                answer = self._crew.receive(worker, ref)
                if answer is None or answer.call is None:
                    continue
                number = self._job_of.pop(answer.call.ticket.attempt, None)
                self._longest = max(self._longest, time.monotonic() - answer.call.sent)
                # None: a call of an earlier pass; not pending: another worker was faster.
                if number is not None and self._pending.pop(number, None) is not None:
                    return number, answer.value.value
            self._look_around()

    def _hand_out(self, now: float) -> None:
        self._crew.start_rested(now)
        self._take_back()
        for worker in self._crew.free(now):
            if self._waiting:
                self._send(worker, heapq.heappop(self._waiting)[1], now)
            elif (number := self._straggling(now)) is not None:
                self._send(worker, number, now)

    def _send(self, worker: Worker, number: int, now: float) -> None:
        job, shared, _ = self._pending[number]
        ticket = self._crew.ticket()
        self._job_of[ticket.attempt] = number
        ref = worker.actor.do.remote(pickle.dumps((ticket, job)), shared)
        worker.call = Call(ref=ref, ticket=ticket, is_load=False, sent=now)
        worker.heard = now

    def _take_back(self) -> None:
        """Have jobs whose workers were lost wait again."""
        under_way = {number for number, _ in self._under_way()}
        waiting = {number for _, number in self._waiting}
        for number in sorted(self._pending.keys() - under_way - waiting):
            heapq.heappush(self._waiting, (self._pending[number][2], number))

    def _straggling(self, now: float) -> int | None:
        """Return a job that one worker alone works on, for far longer than any other took."""
        faults, calls = self._crew.faults, self._under_way()
        patience = max(faults.straggling, faults.straggling_factor * self._longest)
        for number, call in calls:
            alone = sum(other == number for other, _ in calls) == 1
            if alone and self._longest and now - call.sent > patience:
                return number
        return None

    def _under_way(self) -> list[tuple[int, Call]]:
        calls = [worker.call for worker in self._crew.workers if worker.call is not None]
        numbered = [(self._job_of.get(call.ticket.attempt), call) for call in calls]
        return [(number, call) for number, call in numbered if number in self._pending]

    def _look_around(self) -> None:
        """Check, once per tick, which workers are silent or away."""
        now = time.monotonic()
        if not self._crew.is_time_to_look(now):
            return
        for worker in self._crew.workers:
            if worker.call is not None:
                self._crew.is_alive(worker, worker.call, now, self._crew.faults.longest)
            elif worker.state is not State.UP:
                self._crew.has_hope(worker, now)
        self._crew.report(now, counted(len(self._pending), "job"))
