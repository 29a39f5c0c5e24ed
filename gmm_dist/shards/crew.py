"""The workers of a run: started, listened to, and replaced when they fail.

A crew knows nothing of what its workers do: `dispatch` deals shards to them, `job_queue` jobs.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray

from gmm_dist.config import FailureConfig
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.formats import counted
from gmm_dist.shards.failures import Budget, Verdict, is_full, judge, reason
from gmm_dist.shards.workers import Call, State, Ticket, Worker, machines

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds between two lines that say what we wait for
_REPEATS = 3  # failed calls in a row after which a worker that seems to be there is replaced
_PULSES = 6  # per time of silence


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker has sent: the value of a call, or (`call` is None) that it has come up."""

    worker: Worker
    call: Call | None
    value: Any


class Crew:
    """Workers, of which each has at most one call under way.

    `iteration` numbers what the crew was made to do: passes, loadings, queues of jobs. A reply to a
    call of an earlier one comes too late.
    """

    def __init__(self, workers: Sequence[Worker], faults: FailureConfig) -> None:
        self.workers, self.faults, self.iteration = workers, faults, 0
        self._budget = Budget(faults)
        self._knows_card = False
        self._run, self._attempts = uuid.uuid4().hex, itertools.count()
        self.joined = time.monotonic()  # when a worker came up last
        self._listened = self.replied = self._reported = self.joined

    def begin(self) -> None:
        """Begin another iteration."""
        self.iteration += 1
        self._listened = self.replied = self._reported = time.monotonic()
        for worker in self.workers:
            worker.heard = self._listened  # the driver has not listened since the last one

    def close(self) -> None:
        """End the actors, with all that they hold."""
        with ExitStack() as stack:  # all of them, even where a signal breaks one off
            for worker in self.workers:
                stack.callback(worker.abandon, time.monotonic())

    def ticket(self, source: int = -1, shards: Sequence[int] = ()) -> Ticket:
        """Return the ticket of a new call."""
        return Ticket(
            run=self._run,
            attempt=next(self._attempts),
            iteration=self.iteration,
            source=source,
            shards=tuple(shards),
        )

    def start_rested(self, now: float) -> None:
        """Start the workers that are down and have rested."""
        for worker in self.workers:
            if worker.state is State.DOWN and now >= worker.rested:
                worker.restart()

    def free(self, now: float) -> list[Worker]:
        """Return the workers that may get a call."""
        up = [worker for worker in self.workers if worker.state is State.UP]
        return [worker for worker in up if worker.call is None and now >= worker.rested]

    # Listening.

    def ready(self) -> list[tuple[Worker, Any]]:
        """Wait for a moment, and return the replies that are ready, with their workers."""
        worker_of: dict[Any, Worker] = {}
        for worker in self.workers:
            refs = (worker.call and worker.call.ref, worker.hello, worker.pulse)
            worker_of |= {ref: worker for ref in refs if ref is not None}
        now = time.monotonic()
        waits = [worker.rested - now for worker in self.workers if worker.rested > now]
        timeout = min([self.faults.tick, *waits])
        if not worker_of:
            time.sleep(timeout)
            return []
        # Replies may be large: they are fetched one at a time.
        ready, rest = ray.wait(list(worker_of), timeout=timeout, fetch_local=False)
        if ready and rest:  # take all that are ready, to wait less often
            ready += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return [(worker_of[ref], ref) for ref in ready]

    def receive(self, worker: Worker, ref: Any) -> Answer | None:
        """Fetch a reply that is ready; None where it says nothing new, or is a failure."""
        if not worker.expects(ref):  # given up since
            return None
        try:
            value = ray.get(ref, timeout=self.faults.silence)
        except Exception as error:
            self._failed(worker, ref, error)
            return None
        now = time.monotonic()
        if ref is worker.hello:
            worker.hello, worker.introduction, worker.state = None, value, State.UP
            self.joined = now
            self._note_card(worker, value.card)
            if worker.failures:
                logger.info("%s is up", worker.name)
            return Answer(worker, None, value)
        if ref is worker.pulse:
            worker.pulse = None
            if worker.call is not None and value == worker.call.ticket.attempt:
                worker.heard = now
            return None
        call, worker.call, worker.failures = worker.call, None, 0
        assert call is not None
        self.replied = now
        return Answer(worker, call, value) if value.ticket == call.ticket else None

    def _note_card(self, worker: Worker, card: str | None) -> None:
        """Remember a worker's GPU, and say where it changes what the sums' last bits depend on."""
        before, worker.card = worker.card, card
        if card is None:
            return
        others = {other.card for other in self.workers if other.card is not None}
        if before is None and len(others) == 1 and not self._knows_card:
            self._knows_card = True
            logger.info("workers have a %s each", card)
        elif before is not None and before != card:
            text = "%s has a %s where it had a %s: the last bits may differ"
            logger.warning(text, worker.name, card, before)
        elif before is None and len(others) > 1:
            text = "%s has a %s, others have a %s: the last bits depend on who holds which shards"
            logger.warning(text, worker.name, card, " and a ".join(sorted(others - {card})))

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
        self.lost(worker, reason(error), verdict, counts=counts)

    def lost(
        self, worker: Worker, why: str, verdict: Verdict = Verdict.REPLACE, *, counts: bool = True
    ) -> None:
        """Record a failure, log it, and prepare the remedy."""
        now = time.monotonic()
        what, n_held = f"{worker.name}: {why}", len(worker.held)
        if verdict in (Verdict.REPLACE, Verdict.PREEMPTED):
            worker.abandon(now)
        worker.call = None
        worker.failures += 1
        worker.rested = now + self.faults.rest(worker.failures)
        which = self._budget.charge(what, now) if counts else "not counted"
        lost = f" and loads its {counted(n_held, 'shard')}" if not worker.actor and n_held else ""
        logger.info("%s; %s%s (%s)", what, verdict.value, lost, which)

    def is_time_to_look(self, now: float) -> bool:
        """Say, once per tick, whether to look which workers are silent, slow or away."""
        elapsed = now - self._listened
        if elapsed < self.faults.tick / 2:
            return False
        self._listened = now
        if elapsed > 4 * self.faults.tick:  # the driver was busy with a reply, and did not listen
            for worker in self.workers:
                worker.heard += elapsed
            return False
        return True

    def is_late(self, call: Call) -> bool:
        """Say whether a call belongs to an iteration that ended without it."""
        return not call.is_load and call.ticket.iteration != self.iteration

    def is_alive(self, worker: Worker, call: Call, now: float, longest: float) -> bool:
        """Say whether a worker shows signs of work on its call; else give it up.

        `longest`: seconds that the call may take.
        """
        faults, lasted, silent = self.faults, now - call.sent, now - worker.heard
        if silent > faults.silence:
            self.lost(worker, f"no sign of work for {silent:.0f} s")
        elif self.is_late(call) and lasted > faults.deadline:
            self.lost(worker, f"no reply for {lasted:.0f} s, while others replied", counts=False)
        elif lasted > longest:
            self.lost(worker, f"no reply for {lasted:.0f} s")
        else:
            if worker.pulse is None and silent > faults.silence / _PULSES:
                pulse = worker.actor.pulse.options(concurrency_group="pulse")
                worker.pulse = pulse.remote()
            return True
        return False

    def has_hope(self, worker: Worker, now: float) -> bool:
        """Say whether a worker may still come up in time; raise RunFailed where none will."""
        away = now - max(worker.since, self.joined)
        if worker.state is State.UP or away <= self.faults.forsaken:
            return True
        if not any(other.state is State.UP for other in self.workers):
            raise RunFailed(f"no worker has come up for {away:.0f} s; {machines()}: add machines")
        return False

    def report(self, now: float, waiting_for: str) -> None:
        """Log, from time to time, what we wait for."""
        if now - max(self.replied, self._reported) <= _PATIENCE:
            return
        self._reported = now
        logger.info(
            "waiting for %s, %.0f s so far (%d of %s up; %s)",
            waiting_for,
            now - self.replied,
            sum(w.state is State.UP for w in self.workers),
            counted(len(self.workers), "worker"),
            machines(),
        )

    def await_worker(self) -> Worker:
        """Wait until a worker is up, and return it."""
        while True:
            for worker in self.workers:
                if worker.state is State.UP:
                    return worker
            now = time.monotonic()
            self.start_rested(now)
            for worker, ref in self.ready():
                self.receive(worker, ref)
            for worker in self.workers:
                self.has_hope(worker, now)
            if now - self._reported > _PATIENCE:
                self._reported = now
                logger.info("waiting for a worker for %.0f s; %s", now - self.joined, machines())
