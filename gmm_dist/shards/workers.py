"""Workers: the actor that holds rows, and what the driver knows of each."""

from __future__ import annotations

import bisect
import contextlib
import enum
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from gmm_dist.devices import card_name, free_memory
from gmm_dist.errors import Option, UserError
from gmm_dist.formats import counted
from gmm_dist.shards.protocol import Loader, ShardRows
from gmm_dist.shards.spill import Held, Spill, Store, size_of
from gmm_dist.shards.tree_sum import run_on


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of shards come from: a number that names it, and loaders in the store.

    Each loader has the shards from one of `firsts` to the next. `spill` says where a worker keeps
    those that its memory does not hold; None if it holds all.
    """

    number: int
    loaders: list[Any]  # in a list, so that an actor fetches one only when it has to load
    firsts: tuple[int, ...]
    spill: Spill | None = None

    def rows(self, shard: int) -> ShardRows:
        loader: Loader = ray.get(self.loaders[bisect.bisect(self.firsts, shard) - 1])
        return loader(shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Identify a call, so that its reply counts once, for this call and pass alone.

    `attempt` numbers all calls of a run; `iteration` its passes and loadings.
    """

    run: str
    attempt: int
    iteration: int
    source: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass has all workers do: run a task (None: only load) on rows from a source.

    It is put into the object store once, and every call refers to it there.
    """

    source: Source
    task: Any = None


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call: a ticket with its shards, and the shards to drop first."""

    ticket: Ticket
    forget: tuple[int, ...]

    def packed(self) -> bytes:
        """Return bytes: Ray takes three times as long over an argument that it has to pickle."""
        return pickle.dumps(self)


@dataclass(frozen=True, slots=True)
class Shared:
    """A value in the object store that jobs share, and what names it."""

    key: tuple[int, int]
    value: list[Any]  # in a list, so that an actor fetches it only when it lacks it


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call returned, with the call's ticket."""

    ticket: Ticket
    value: Any


@dataclass(frozen=True, slots=True)
class Loaded:
    """The size of a shard that was loaded: rows, and bytes where they are kept."""

    n_rows: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Introduction:
    """Where an actor runs; `memory` (bytes) was free on its GPU, `card`: None without one."""

    host: str
    pid: int
    memory: int | None
    card: str | None = None


class ShardActor:
    """Holds the rows of some shards, on its GPU where it has one; between passes it does jobs.

    Rows beyond memory lie in files on its disk, where the source says so.

    Every call is a pure function of its arguments and names its shards, so it may be repeated,
    here or elsewhere, even at the same time; the rows and the values held are caches.
    """

    def __init__(self, n_shards: int) -> None:
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._n_shards = n_shards
        self._rows: dict[tuple[int, int], Held] = {}
        self._store = Store(self._device)
        self._shared: dict[tuple[int, int], Any] = {}
        self._under_way: int | None = None

    def introduce(self) -> Introduction:
        """Return where this actor runs."""
        on_gpu = self._device.type == "cuda"
        memory = free_memory(self._device) if on_gpu else None
        return Introduction(socket.gethostname(), os.getpid(), memory, card_name(self._device))

    def pulse(self) -> int | None:
        """Return the attempt under way; Ray answers this while a call runs."""
        return self._under_way

    def load(self, packed: bytes, work: Work) -> Reply:
        """Hold the one shard of the request, and no rows of earlier sources."""
        with self._working(packed, work.source) as ticket:
            (shard,) = ticket.shards
            rows = self._held(work.source, shard)
            return Reply(ticket, Loaded(rows.n_rows, size_of(rows)))

    def run(self, packed: bytes, work: Work) -> Reply:
        """Return the task's sums over the complete subtrees of the request's shards."""
        with self._working(packed, work.source) as ticket:
            held = (self._held(work.source, shard) for shard in ticket.shards)
            return Reply(ticket, run_on(work.task, self._store.each(held), self._n_shards))

    def do(self, packed: bytes, shared: Shared) -> Reply:
        """Return what a job makes of a shared value; `packed` are its ticket and the job."""
        ticket, job = pickle.loads(packed)
        with self._busy(ticket):
            if shared.key not in self._shared:
                self._shared[shared.key] = ray.get(shared.value[0]).to(self._device)
            return Reply(ticket, job(self._shared[shared.key]))

    @contextlib.contextmanager
    def _busy(self, ticket: Ticket) -> Iterator[None]:
        # One thread per process, one process per core; the setting is the calling thread's own.
        torch.set_num_threads(1)
        self._under_way = ticket.attempt
        try:
            yield
        finally:
            self._under_way = None

    @contextlib.contextmanager
    def _working(self, packed: bytes, source: Source) -> Iterator[Ticket]:
        request: Request = pickle.loads(packed)
        self._shared.clear()  # the jobs are over
        self._rows = {
            (number, shard): rows
            for (number, shard), rows in self._rows.items()
            if number == source.number and shard not in request.forget
        }
        with self._busy(request.ticket):
            yield request.ticket

    def _held(self, source: Source, shard: int) -> Held:
        key = source.number, shard
        if key not in self._rows:
            rows = source.rows(shard)
            self._rows[key] = self._store.hold(rows, source.spill, self._rows.values())
        return self._rows[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call under way, and when it was sent."""

    ref: Any
    ticket: Ticket
    is_load: bool
    sent: float


class State(enum.Enum):
    """Where a worker stands."""

    DOWN = "down"  # until it has rested
    STARTING = "starting"  # its actor waits for a place, or for its process
    UP = "up"


@dataclass(slots=True, eq=False, kw_only=True)
class Worker:
    """The driver's view of a worker, whose actor may be replaced.

    `start` makes an actor. At most one call is under way at a time: a worker begins it at once,
    so a long silence means a fault.
    """

    index: int
    start: Callable[[], Any]
    since: float  # when it went down without any success since, or was created
    state: State = State.DOWN
    actor: Any = None
    introduction: Introduction | None = None
    card: str | None = None  # the model of its GPU, kept while it is away
    hello: Any = None
    call: Call | None = None
    held: set[int] = field(default_factory=set)
    failures: int = 0  # in a row
    rested: float = 0.0  # when it may get a call again
    heard: float = 0.0  # its last sign of work on its call
    pulse: Any = None
    strikes: int = 0  # how often siblings had to do its shards
    barred: int = 0  # before this iteration it gets no shards back

    @property
    def name(self) -> str:
        who = self.introduction
        return f"worker {self.index}" + (f" ({who.host}, pid {who.pid})" if who else "")

    def expects(self, ref: Any) -> bool:
        """Say whether a reply is still expected."""
        pending = (self.hello, self.pulse, self.call and self.call.ref)
        return any(ref is each for each in pending)

    def restart(self) -> None:
        """Start an actor."""
        self.actor = self.start()
        self.hello = self.actor.introduce.remote()
        self.state = State.STARTING

    def abandon(self, now: float) -> None:
        """Kill the actor and forget its calls: later replies are ignored."""
        if self.actor is not None:
            # Even if it is cut off: it ends once it can be reached again.
            with contextlib.suppress(Exception):
                ray.kill(self.actor)
        if self.state is State.UP and not self.failures:
            self.since = now
        self.state = State.DOWN
        self.actor = self.hello = self.call = self.pulse = self.introduction = None
        self.held = set()


def machines() -> str:
    """Say which CPUs and GPUs the cluster has, and how many are free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    has = [f"{counted(total.get(k, 0), k)} ({free.get(k, 0):g} free)" for k in ("CPU", "GPU")]
    n_machines = sum(node["Alive"] for node in ray.nodes())
    return f"the cluster has {' and '.join(has)} on {counted(n_machines, 'machine')}"


def no_room(worker: Worker, n_shards: int, used: int, capacity: int) -> UserError:
    """Say that a worker's `n_shards` shards take `used` bytes, of which it has `capacity`."""
    return UserError(
        f"{worker.name} holds {len(worker.held)} of its {counted(n_shards, 'shard')}, "
        f"{used / 2**30:,.1f} GiB of rows, and has {capacity / 2**30:,.1f} GiB for them",
        remedy="use more workers on more machines, fewer "
        + Option("columns")
        + " or a narrower "
        + Option("where"),
    )
