"""The file lineage.json of a night: its components' lasting numbers, and which are new."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

from gmm_dist.errors import UserError
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import load
from gmm_dist.runs.json_files import FORMAT_VERSION, whole

LINEAGE, DRIFT, GATE = "lineage.json", "drift.json", "gate.json"


@dataclass(frozen=True, kw_only=True)
class ClusterLineage:
    """Say who a night's clusters are: `ids` in the model's order, which are new, which are gone.

    `next_id` is above the ids of all clusters that the registry has had so far.
    """

    ids: tuple[int, ...]
    born: tuple[int, ...]
    dead: tuple[int, ...]
    next_id: int

    @classmethod
    def parse(cls, content: Mapping[str, Any] | None) -> ClusterLineage | None:
        """Return what lineage.json says of clusters; None for a night that has none."""
        if content is None:
            return None
        return cls(
            ids=_distinct(content["ids"]),
            born=_distinct(content["born"]),
            dead=_distinct(content["dead"]),
            next_id=_count(content["next_id"]),
        )


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Say who a night's components are, as lineage.json beside the model does.

    `ids` are those of the components, in the model's order; `born` of them are new and `dead`
    ones of `night_before` are gone. `n_rows` were fitted or held out; `columns` are the feature
    columns, each with its kind (`gate.kinds`). `clusters` are those that components are merged
    into, None for none.
    """

    night: str
    night_before: str | None
    ids: tuple[int, ...]
    born: tuple[int, ...]
    dead: tuple[int, ...]
    n_rows: int
    columns: Mapping[str, str]
    clusters: ClusterLineage | None = None

    def to_json(self) -> dict[str, object]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def read(cls, url: str) -> Lineage:
        content = load.read_report(url, LINEAGE)
        with whole(LINEAGE, url):
            return cls(
                night=content["night"],
                night_before=content["night_before"],
                ids=_distinct(content["ids"]),
                born=_distinct(content["born"]),
                dead=_distinct(content["dead"]),
                n_rows=_count(content["n_rows"]),
                columns=dict(content["columns"]),
                clusters=ClusterLineage.parse(content.get("clusters")),
            )


@dataclass(frozen=True, eq=False)
class Published:
    """A night's model, in feature units, and who its components are."""

    mixture: Mixture
    lineage: Lineage

    @classmethod
    def read(cls, url: str) -> Published:
        """Raises UserError where the two do not belong together."""
        mixture, lineage = load.load(url), Lineage.read(url)
        if len(lineage.ids) != mixture.n_components:
            raise UserError(
                f"{url}: {LINEAGE} numbers {len(lineage.ids)} components, the model has "
                f"{mixture.n_components}: restore both from a backup, or remove this night's "
                "folder and run the night again"
            )
        if lineage.clusters is not None:
            mixture = _with_cluster_ids(mixture, lineage.clusters, url)
        return cls(mixture, lineage)

    @property
    def night(self) -> str:
        return self.lineage.night


def _with_cluster_ids(mixture: Mixture, lineage: ClusterLineage, url: str) -> Mixture:
    clusters = mixture.clusters
    if clusters is None or clusters.n_clusters != len(lineage.ids):
        n = 0 if clusters is None else clusters.n_clusters
        raise UserError(
            f"{url}: {LINEAGE} numbers {len(lineage.ids)} clusters, the model has {n}: restore "
            "both from a backup, or remove this night's folder and run the night again"
        )
    return replace(mixture, clusters=replace(clusters, ids=lineage.ids))


def night_of(text: str) -> str:
    """Return the night that `text` names, YYYY-MM-DD.

    Raises:
        UserError: it is no such date.
    """
    if not is_night(text):
        raise UserError(f"{text!r} is not a night: give a date such as 2026-11-21")
    return text


def _distinct(ids: Sequence[object]) -> tuple[int, ...]:
    """Return `ids` as a tuple; raise ValueError unless they are different whole numbers >= 0."""
    valid_ids = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
    if len(valid_ids) != len(ids) or len(set(valid_ids)) != len(valid_ids):
        raise ValueError(f"{_shown(ids)} are not different whole numbers from 0 up")
    return valid_ids


def _count(value: object) -> int:
    """Return a number of rows; raise ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of rows")
    return value


def _shown(ids: Sequence[object]) -> str:
    """Return the first few of them."""
    few = ", ".join(map(str, ids[:8]))
    return f"{few}, ... ({len(ids)} in all)" if len(ids) > 8 else few


def is_night(text: object) -> bool:
    """Say whether `text` is a date of the calendar, written YYYY-MM-DD."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return False
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
