"""A registry of nightly models: each a committed result, and a pointer to the latest.

    REG/models/2026-11-21/        a run's output: model/, sweep.json, drift.json, gate.json,
                                  lineage.json, manifest.json last; there means published
    REG/latest.json               the pointer: a night; it moves forward alone
    REG/ids.json                  the counter of component ids: what is below it has been given
    REG/pruned.json               nights whose model was published and is removed
    REG/candidates/2026-11-21/    what the gate kept back, of the night's last try

The pointer, the counter and the list of the pruned are compared and swapped, so of two writers
neither undoes the other. Ids come from the counter, and were it lost, from above all that was ever
given: they stay unique when a night comes late, is computed again or is pruned; a run that dies
between the counter and its commit leaves a gap.

A night is matched against the newest one published *before* it, by date. So one that comes late
is matched against its own past; what is published already stays as it is, and so does the
pointer. Its newborns get numbers that no later night has: a cluster that is born on a late night
and was seen by a later one before has two.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Self

from gmm_dist import artifacts, conditional
from gmm_dist.artifacts import LATEST
from gmm_dist.checkpoint import checkpoint_names
from gmm_dist.commit import ATTEMPTS, LEASE, MANIFEST, MODEL
from gmm_dist.errors import UserError
from gmm_dist.mixture import Mixture
from gmm_dist.places import Place
from gmm_dist.records import FORMAT_VERSION, parse, to_json, whole
from gmm_dist.storage import explained, join
from gmm_dist.urls import Url

logger = logging.getLogger(__name__)

MODELS, CANDIDATES = "models", "candidates"
COUNTER, PRUNED = "ids.json", "pruned.json"
LINEAGE, DRIFT, GATE = "lineage.json", "drift.json", "gate.json"


@dataclass(frozen=True)
class Lineage:
    """Say who a night's components are, as lineage.json beside the model does.

    `ids` are those of the components, in the model's order; `born` of them are new and `dead`
    ones of `night_before` are gone. `n_rows` were fitted or held out; `columns` are the feature
    columns, each with its kind (`gate.kinds`).
    """

    night: str
    night_before: str | None
    ids: tuple[int, ...]
    born: tuple[int, ...]
    dead: tuple[int, ...]
    n_rows: int
    columns: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def read(cls, url: str) -> Self:
        content = artifacts.read_report(url, LINEAGE)
        with whole(LINEAGE, url):
            return cls(
                night=content["night"],
                night_before=content["night_before"],
                ids=tuple(content["ids"]),
                born=tuple(content["born"]),
                dead=tuple(content["dead"]),
                n_rows=content["n_rows"],
                columns=dict(content["columns"]),
            )


@dataclass(frozen=True, eq=False)
class Published:
    """A night's model, in feature units, and who its components are."""

    mixture: Mixture
    lineage: Lineage

    @property
    def night(self) -> str:
        return self.lineage.night


@dataclass(frozen=True, slots=True)
class _Pruned:
    """Nights whose models were removed; their components' ids are below `next_id`."""

    nights: frozenset[str]
    next_id: int


def night_of(text: str) -> str:
    """Return the night that `text` names, YYYY-MM-DD.

    Raises:
        UserError: it is no such date.
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise UserError(f"{text!r} is not a night: give a date such as 2026-11-21")


class Registry:
    """The registry at `url`, a folder on a local disk or S3. Nights are dates, YYYY-MM-DD."""

    def __init__(self, url: str) -> None:
        self._url, self._place = Url(url), Place.of(url)

    def model_url(self, night: str) -> str:
        """Where a night's model is published: the output of its run."""
        return join(self._url, MODELS, night)

    def candidate_url(self, night: str, attempt: str) -> str:
        """Where what an attempt left is kept if the gate says no."""
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
        return [n for n in self._folders() if n not in pruned and self._has_manifest(n)]

    def _has_manifest(self, night: str) -> bool:
        with explained(self._place.url):
            return self._place.read(MODELS, night, MANIFEST) is not None

    def newest_before(self, night: str) -> Published | None:
        """Return the newest night published before another, None for none."""
        pruned = self._pruned(self._seen(PRUNED)).nights
        for earlier in reversed(self._folders()):
            if earlier < night and earlier not in pruned and self._has_manifest(earlier):
                url = self.model_url(earlier)
                return Published(artifacts.load(url), Lineage.read(url))
        return None

    def latest(self) -> str | None:
        """Return the night that the pointer names, None where there is none yet."""
        return self._pointed_to(self._seen(LATEST))

    def new_ids(self, count: int, *, above: Collection[int] = ()) -> int:
        """Take `count` component ids that nobody was given before, and return the first.

        They are also larger than those in `above`, and should the counter have been lost, than
        those of all nights that are published or pruned.
        """
        while True:
            seen = self._seen(COUNTER)
            first = max([-1, *above]) + 1
            if seen is None:
                first = max(first, self._next_id_without_counter())
            else:
                with whole(COUNTER, self._place.url):
                    content = parse(seen.data, COUNTER, self._place.url)
                    first = max(first, int(content["next_id"]))
            if count == 0 or self._swap(COUNTER, seen, {"next_id": first + count}):
                return first

    def _next_id_without_counter(self) -> int:
        lineages = [Lineage.read(self.model_url(night)) for night in self.nights()]
        known = [i for lineage in lineages for i in (*lineage.ids, *lineage.dead)]
        return max([-1, *known, self._pruned(self._seen(PRUNED)).next_id - 1]) + 1

    def point_to(self, night: str) -> bool:
        """Move the pointer to a published night, never back; say whether it names it now."""
        assert self.is_published(night)
        while True:
            seen = self._seen(LATEST)
            now = self._pointed_to(seen)
            if now is not None and now >= night:
                return now == night
            if self._swap(LATEST, seen, {"night": night, "model": f"{MODELS}/{night}"}):
                logger.info("%s: %s points to %s", self._place.url, LATEST, night)

    def forget_candidates(self, night: str, *, but: str) -> None:
        """Remove what earlier attempts at a night left for the gate to keep back."""
        folder = self._place.below(CANDIDATES, night)
        for name in sorted(folder.names() - {but}):
            folder.remove(name)

    def prune(self, keep: int, *, night: str) -> list[str]:
        """Remove published models but the newest `keep`, and return their nights.

        Never the one pointed to, `night` itself, or one that a run at work on some night started
        from or can be resumed from. They go on the list of the pruned first, so that nobody takes
        one for a night that is still to come. Candidates older than all models that stay go too.
        """
        nights, pointed = self.nights(), self.latest()
        at_work = [name for name in self._folders() if self._is_at_work(name)]
        starts = {max((n for n in nights if n < name), default="") for name in at_work}
        kept = {*nights[-keep:], night, pointed} | starts
        gone = [n for n in nights if n not in kept]
        pruned = self._bury(gone)
        for old in self._folders():
            if old in pruned or self._is_rest(old):
                self._remove(old)
        oldest = min((n for n in nights if n in kept), default="")
        for name in sorted(self._place.below(CANDIDATES).names()):
            if name < oldest:
                self._place.remove(CANDIDATES, name)
        return gone

    def _bury(self, nights: Collection[str]) -> frozenset[str]:
        """Put nights on the list of the pruned, and return all that are on it."""
        while True:
            seen = self._seen(PRUNED)
            known = self._pruned(seen)
            if known.nights.issuperset(nights):
                return known.nights
            # What has been given by now is above their ids, should the counter be lost one day.
            next_id = max(known.next_id, self.new_ids(0))
            together = known.nights.union(nights)
            if self._swap(PRUNED, seen, {"nights": sorted(together), "next_id": next_id}):
                return together

    def _pruned(self, seen: conditional.Version | None) -> _Pruned:
        if seen is None:
            return _Pruned(frozenset(), 0)
        content = parse(seen.data, PRUNED, self._place.url)
        with whole(PRUNED, self._place.url):
            return _Pruned(frozenset(content["nights"]), int(content["next_id"]))

    def _remove(self, night: str) -> None:
        # The manifest first: a reader finds a whole model or none.
        for parts in ((MANIFEST,), (ATTEMPTS,), ()):
            self._place.remove(MODELS, night, *parts)
        logger.info("%s: removed the model of %s", self._place.url, night)

    def _is_at_work(self, night: str) -> bool:
        folder = self._place.below(MODELS, night)
        if MANIFEST in folder.names():
            return False
        return LEASE in folder.below(ATTEMPTS).names() or bool(checkpoint_names(folder))

    def _is_rest(self, night: str) -> bool:
        """Say whether a removal was cut off: copies without a manifest, and nobody at work."""
        folder = self._place.below(MODELS, night)
        names = folder.names()
        return (
            MANIFEST not in names and MODEL in names and LEASE not in folder.below(ATTEMPTS).names()
        )

    def _folders(self) -> list[str]:
        with explained(self._place.url):
            names = self._place.below(MODELS).names()
        return sorted(name for name in names if re.fullmatch(r"\d{4}-\d{2}-\d{2}", name))

    def _seen(self, name: str) -> conditional.Version | None:
        with explained(self._place.url):
            return conditional.read(self._place, name)

    def _swap(self, name: str, seen: conditional.Version | None, content: object) -> bool:
        assert isinstance(content, dict)
        with explained(self._place.url):
            data = to_json({"format_version": FORMAT_VERSION, **content})
            return conditional.swap(self._place, name, seen, data)

    def _pointed_to(self, seen: conditional.Version | None) -> str | None:
        if seen is None:
            return None
        with whole(LATEST, self._place.url):
            return str(parse(seen.data, LATEST, self._place.url)["night"])
