"""A registry of nightly models: each a committed result, and a pointer to the latest.

    REG/models/2026-11-21/        a run's output: model/, sweep.json, drift.json, gate.json,
                                  lineage.json, manifest.json last; there means published
    REG/latest.json               the pointer: a night; it only moves forward
    REG/ids.json                  the counter of component ids: all below it are taken
    REG/pruned.json               nights whose model was published and is removed
    REG/candidates/2026-11-21/    what the gate kept back, of the night's last attempt
    REG/_turn                     the lease of whoever publishes or prunes

The pointer, the counter and the list of the pruned are cells (`compare_and_swap`), so of two
writers neither undoes the other. New ids are above the counter and, in case that is lost or out
of date, above every id in the registry. So they stay unique when a night comes late, is computed
again or is pruned; a run that dies between the counter and its commit leaves a gap.

A night is matched against the newest one published *before* it, by date. Runs of several nights at
once keep the nights' order: each waits for the earlier ones (`await_earlier`), and one at a time
publishes or prunes (`turn`). A night that comes late all the same is matched against those before
it; where there are none, it takes its ids from the night after it. What is published already stays
as it is, and so does the pointer. Its newborns get ids that no later night has, so a cluster that
a later night has published before gets a second id.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from gmm_dist.errors import UserError
from gmm_dist.nightly.lineage import DRIFT, LINEAGE, Lineage, Published, _shown, is_night
from gmm_dist.runs.checkpoint import checkpoint_names
from gmm_dist.runs.commit import ATTEMPTS, LEASE, MANIFEST, MODEL
from gmm_dist.runs.compare_and_swap import Version, cell_at
from gmm_dist.runs.folder import Folder
from gmm_dist.runs.json_files import FORMAT_VERSION, parse, to_json, whole
from gmm_dist.runs.lease import SECONDS, Lease, Terms, acquire, await_end, lease_at
from gmm_dist.runs.load import LATEST
from gmm_dist.storage import explained, join, patiently
from gmm_dist.urls import Url

logger = logging.getLogger(__name__)

MODELS, CANDIDATES = "models", "candidates"
COUNTER, PRUNED = "ids.json", "pruned.json"
TURN = "_turn"
_AT_ONCE = 16  # small files read at a time


@dataclass(frozen=True, slots=True)
class _Pruned:
    """Nights whose models were removed; their components' ids are below `next_id`."""

    nights: frozenset[str]
    next_id: int


class Registry:
    """The registry at `url`, a folder on a local disk or S3. Nights are dates, YYYY-MM-DD."""

    def __init__(self, url: str) -> None:
        self._url, self._folder = Url(url), Folder.of(url)

    def model_url(self, night: str) -> str:
        """Where a night's model is published: the output of its run."""
        return join(self._url, MODELS, night)

    def candidate_url(self, night: str, attempt: str) -> str:
        """Where an attempt's results go if the gate keeps them back."""
        return join(self._url, CANDIDATES, night, attempt)

    def is_published(self, night: str) -> bool:
        """Say whether the night's model is there: not any more once it is pruned."""
        return self._has_manifest(night) and not self.is_pruned(night)

    def is_pruned(self, night: str) -> bool:
        """Say whether the night was published, and its model is removed or about to be."""
        return night in self._pruned(self._seen(PRUNED)).nights

    def nights(self) -> list[str]:
        """Return the nights that are published, in order."""
        pruned = self._pruned(self._seen(PRUNED)).nights
        nights = [n for n in self._folders() if n not in pruned]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            have_manifests = list(pool.map(self._has_manifest, nights))
        return [n for n, is_there in zip(nights, have_manifests, strict=True) if is_there]

    def _has_manifest(self, night: str) -> bool:
        with explained(self._folder.url):
            return self._folder.read(MODELS, night, MANIFEST) is not None

    def newest_before(self, night: str) -> Published | None:
        """Return the newest night published before another, None for none."""
        return self._first_of(lambda: [n for n in reversed(self._folders()) if n < night])

    def oldest_after(self, night: str) -> Published | None:
        """Return the first night published after another, None for none."""
        return self._first_of(lambda: [n for n in self._folders() if n > night])

    def _first_of(self, nights: Callable[[], list[str]]) -> Published | None:
        """Return the first of the nights that is published."""
        while True:
            pruned = self._pruned(self._seen(PRUNED)).nights
            kept = (n for n in nights() if n not in pruned and self._has_manifest(n))
            if (night := next(kept, None)) is None:
                return None
            url = self.model_url(night)
            try:
                published = Published.read(url)
                if published.night != night:  # the folder is a copy of another night's
                    raise UserError(
                        f"{url}: {LINEAGE} is that of {_shown([published.night])}, as in a copied "
                        "or renamed folder: restore this night's own, or remove the folder"
                    )
                return published
            except UserError:
                if self.is_published(night):
                    raise
                # Pruned while it was read: look for the first one again.

    def came_between(self, before: str | None, night: str) -> bool:
        """Say whether a night has been published between two, of which `before` may be none."""
        pruned = self._pruned(self._seen(PRUNED)).nights
        between = [n for n in self._folders() if (before or "") < n < night and n not in pruned]
        return any(map(self._has_manifest, between))

    def await_earlier(self, night: str) -> None:
        """Wait until no run is at work on a night that this one is to be matched against.

        A run that renews its lease no longer is not waited for: its night will come late.
        """
        for earlier in reversed(self._folders()):
            if earlier >= night:
                continue
            if self._has_manifest(earlier):
                return
            if LEASE not in self._folder.below(MODELS, earlier, ATTEMPTS).names():
                continue
            logger.info("%s: waits for %s, a run is at work on it", self._folder.url, earlier)
            await_end(lease_at(self._folder, MODELS, earlier, ATTEMPTS, LEASE), self._folder.url)
            if self._has_manifest(earlier):
                return

    @contextmanager
    def turn(self, *, seconds: float = SECONDS) -> Iterator[Lease]:
        """Hold the registry: one run at a time publishes or prunes, the others wait.

        A holder that no longer renews its lease is waited out. Call `Lease.check` before a step
        that cannot be undone.
        """
        with explained(self._folder.url):
            terms = Terms(url=self._folder.url, seconds=seconds, patience=math.inf)
            cell = lease_at(self._folder, TURN, seconds=seconds)
            lease = acquire(cell, secrets.token_hex(8), terms, finish=lambda attempt: None)
        assert lease is not None, "nobody decides anything by this lease"
        try:
            yield lease
        finally:
            lease.release()

    def latest(self) -> str | None:
        """Return the night that the pointer names, None where there is none yet.

        A pointer that names no night, or one without a model, counts as none, and the next
        `point_to` replaces it; a line in the log says so.
        """
        return self._pointed_to(self._seen(LATEST))

    def new_ids(self, count: int, *, above: Collection[int] = ()) -> int:
        """Take `count` new component ids, and return the first.

        They are also larger than those in `above`, and than those of all nights that are
        published, pruned or kept back, in case the counter was lost or restored.
        """
        free_id = max([-1, *above, self._largest_id()]) + 1
        while True:
            seen = self._seen(COUNTER)
            first = max(free_id, 0 if seen is None else self._next_id(seen, COUNTER))
            if seen is not None and first > self._next_id(seen, COUNTER):
                logger.warning(
                    "%s: %s is older than the nights, which have ids up to %d: goes on above them",
                    *(self._folder.url, COUNTER, first - 1),
                )
            if count == 0 or self._swap(COUNTER, seen, {"next_id": first + count}):
                return first

    def next_cluster_id(self) -> int:
        """Return a number above the ids of all clusters so far; ask within a `turn`."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return max([0, *pool.map(self._next_cluster_id_of, self.nights())])

    def _next_cluster_id_of(self, night: str) -> int:
        lineage = self._lineage(night)
        # One pruned in this moment: later nights have heard of its clusters.
        return 0 if lineage is None or lineage.clusters is None else lineage.clusters.next_id

    def _largest_id(self) -> int:
        """Return the largest id that is found anywhere but in the counter, -1 for none."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            published = list(pool.map(self._ids_of, self.nights()))
            kept_back = list(pool.map(self._ids_kept_back, self._candidates()))
        pruned = self._pruned(self._seen(PRUNED)).next_id - 1
        return max([-1, pruned, *(i for ids in (*published, *kept_back) for i in ids)])

    def _ids_of(self, night: str) -> tuple[int, ...]:
        lineage = self._lineage(night)
        # Of one pruned in this moment they are below what `pruned.json` says.
        return () if lineage is None else (*lineage.ids, *lineage.dead)

    def _lineage(self, night: str) -> Lineage | None:
        """Return a published night's lineage; None where it is pruned in this moment."""
        try:
            return Lineage.read(self.model_url(night))
        except UserError:
            if self.is_published(night):
                raise
            return None

    def _ids_kept_back(self, candidate: tuple[str, str]) -> list[int]:
        data = self._folder.read(CANDIDATES, *candidate, DRIFT)
        try:
            content = json.loads(data or b"{}")
            ids = [c["id"] for key in ("components", "born", "dead") for c in content.get(key, ())]
            return [i for i in ids if isinstance(i, int)]
        except (ValueError, TypeError, KeyError, AttributeError):
            return []  # the file is for people: ids are recorded elsewhere too

    def _candidates(self) -> list[tuple[str, str]]:
        folder = self._folder.below(CANDIDATES)
        nights = sorted(filter(is_night, folder.names()))
        return [(n, a) for n in nights for a in sorted(folder.below(n).names())]

    def _next_id(self, seen: Version, name: str) -> int:
        return _whole_number(parse(seen.data, name, self._folder.url), name, self._folder.url)

    def point_to(self, night: str) -> bool:
        """Move the pointer forward to a published night; say whether it names that night now.

        It does not move to a night that was pruned meanwhile.
        """
        while True:
            seen = self._seen(LATEST)
            now = self._pointed_to(seen)
            if now is not None and now >= night:
                if now > _tomorrow():
                    logger.warning(
                        "%s: %s names %s, a night ahead of the calendar, and stays there until "
                        "then: remove the pointer and that night's model if it is a mistake",
                        *(self._folder.url, LATEST, now),
                    )
                return now == night
            if not self.is_published(night):
                return False
            if self._swap(LATEST, seen, {"night": night, "model": f"{MODELS}/{night}"}):
                logger.info("%s: %s points to %s", self._folder.url, LATEST, night)

    def forget_candidates(self, night: str, *, but: str) -> None:
        """Remove what was kept back of earlier attempts at a night."""
        folder = self._folder.below(CANDIDATES, night)
        for name in sorted(folder.names() - {but}):
            folder.remove(name)

    def prune(self, keep: int, *, night: str) -> list[str]:
        """Remove published models but the newest `keep`, and return their nights.

        Never the one pointed to, `night` itself, or one that a run at work on some night started
        from or can be resumed from. They go on the list of the pruned first, so that nobody takes
        one for a night that is still to come. Candidates older than all models that stay go too.
        """
        with self.turn() as turn:
            return self._prune(keep, night, turn)

    def _prune(self, keep: int, night: str, turn: Lease) -> list[str]:
        nights, pointed = self.nights(), self.latest()
        at_work = [name for name in self._folders() if self._is_at_work(name)]
        starts = {max((n for n in nights if n < name), default="") for name in at_work}
        kept = {*nights[-keep:], night, pointed} | starts
        gone = [n for n in nights if n not in kept]
        turn.check()
        pruned = self._bury(gone)
        for old in self._folders():
            if old in pruned or self._is_rest(old):
                self._remove(old)
        oldest = min((n for n in nights if n in kept), default="")
        for name in sorted(self._folder.below(CANDIDATES).names()):
            if is_night(name) and name < oldest:
                self._folder.remove(CANDIDATES, name)
        return gone

    def _bury(self, nights: Collection[str]) -> frozenset[str]:
        """Put nights on the list of the pruned, and return all that are on it."""
        while True:
            seen = self._seen(PRUNED)
            pruned = self._pruned(seen)
            if pruned.nights.issuperset(nights):
                return pruned.nights
            # Above their ids and all others so far, in case the counter is lost one day.
            next_id = max(pruned.next_id, self.new_ids(0))
            together = pruned.nights.union(nights)
            if self._swap(PRUNED, seen, {"nights": sorted(together), "next_id": next_id}):
                return together

    def _pruned(self, seen: Version | None) -> _Pruned:
        if seen is None:
            return _Pruned(frozenset(), 0)
        content = parse(seen.data, PRUNED, self._folder.url)
        next_id = _whole_number(content, PRUNED, self._folder.url)
        with whole(PRUNED, self._folder.url):
            nights = content["nights"]
            if not isinstance(nights, list) or not all(map(is_night, nights)):
                raise ValueError("nights are no list of dates")
            return _Pruned(frozenset(nights), next_id)

    def _remove(self, night: str) -> None:
        # The manifest first: a reader finds a whole model or none.
        for parts in ((MANIFEST,), (ATTEMPTS,), ()):
            self._folder.remove(MODELS, night, *parts)
        logger.info("%s: removed the model of %s", self._folder.url, night)

    def _is_at_work(self, night: str) -> bool:
        folder = self._folder.below(MODELS, night)
        if MANIFEST in folder.names():
            return False
        return LEASE in folder.below(ATTEMPTS).names() or bool(checkpoint_names(folder))

    def _is_rest(self, night: str) -> bool:
        """Say whether a removal was cut off: copies without a manifest, and nobody at work."""
        folder = self._folder.below(MODELS, night)
        names = folder.names()
        return (
            MANIFEST not in names and MODEL in names and LEASE not in folder.below(ATTEMPTS).names()
        )

    def _folders(self) -> list[str]:
        with explained(self._folder.url):
            names = self._folder.below(MODELS).names()
        return sorted(name for name in names if is_night(name))

    def _seen(self, name: str) -> Version | None:
        with explained(self._folder.url):
            return patiently(cell_at(self._folder, name).read, self._folder.url)

    def _swap(self, name: str, seen: Version | None, content: object) -> bool:
        assert isinstance(content, dict)
        with explained(self._folder.url):
            data = to_json({"format_version": FORMAT_VERSION, **content})
            swap = partial(cell_at(self._folder, name).swap, seen, data)
            return patiently(swap, self._folder.url) is not None

    def _pointed_to(self, seen: Version | None) -> str | None:
        if seen is None:
            return None
        with whole(LATEST, self._folder.url):
            content = parse(seen.data, LATEST, self._folder.url)
            night, model = content["night"], content["model"]
        if is_night(night) and model == f"{MODELS}/{night}" and self.is_published(night):
            return str(night)
        logger.warning(
            "%s: %s names %r in %r, which is no published night: the next night replaces it",
            *(self._folder.url, LATEST, night, model),
        )
        return None


def _whole_number(content: Mapping[str, object], name: str, url: str) -> int:
    """Return `next_id` of one of our files, or refuse it in a line."""
    with whole(name, url):
        value = content["next_id"]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    raise UserError(
        f"{url}: {name} has the next_id {value!r}, which is no whole number >= 0: restore the file"
        ", or remove it, and ids go on above those of all nights"
    )


def _tomorrow() -> str:
    return (datetime.now(UTC).date() + timedelta(1)).isoformat()
