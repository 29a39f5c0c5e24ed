"""What a committed fit was made of, kept beside it, so that it can be fitted again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from gmm_dist.fitting.options import FitOptions
from gmm_dist.lake.tables import iceberg
from gmm_dist.runs.checkpoint import RunIdentity
from gmm_dist.runs.json_files import FORMAT_VERSION, parse, whole
from gmm_dist.storage import absolute

RECIPE = "recipe.json"
_STARTS = ("start_model", "warm_start")  # of a run's settings
_SETTINGS = (
    *("k", "covariance_type", "criterion", "columns", "weight_column", "where", "missing"),
    *("holdout", "init", "n_init", "tol", "max_iter", "accelerate", "reg_covar", "random_state"),
    "precision",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Say what a fit was made of.

    `options` are those of `FitOptions` that decide the model, `run` is the content of the run's
    identity, `made_by` are versions and the processor; `warm` is the model of the night before
    that competed with the starts, None for none.
    """

    options: Mapping[str, Any]
    run: Mapping[str, Any]
    made_by: Mapping[str, str | None]
    warm: str | None = None

    @classmethod
    def of(
        cls,
        options: FitOptions,
        identity: RunIdentity,
        versions: Mapping[str, str | None],
        warm: str | None = None,
    ) -> Self:
        """Take it from a run that is about to commit."""
        settings = {name: getattr(options, name) for name in _SETTINGS}
        data = options.data if iceberg.is_in_catalog(options.data) else absolute(options.data)
        start = None if options.start is None else absolute(options.start)
        return cls(
            options={**settings, "data": data, "start": start},
            run=json.loads(identity.canonical),
            made_by={**versions, **identity.environment},
            warm=None if warm is None else absolute(warm),
        )

    @classmethod
    def read(cls, data: bytes, url: str) -> Self:
        """Read it; raises UserError where it is damaged, or a newer gmm_dist wrote it."""
        content = parse(data, RECIPE, url)
        with whole(RECIPE, url):
            return cls(**{name: content[name] for name in ("options", "run", "made_by", "warm")})

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in ("options", "run", "made_by", "warm")},
        }

    @property
    def snapshot(self) -> Mapping[str, Any] | None:
        """The version of the table that was fitted, None for no table."""
        snapshot: Mapping[str, Any] | None = self.run.get("snapshot")
        return snapshot

    def differences(
        self, identity: RunIdentity, *, starts: bool = True
    ) -> tuple[list[str], list[str]]:
        """Return how the input of a run of these options differs, and what is but worth a note.

        Files of which only the time or the ETag is another are such a note. What the model was
        resampled for plays no part, nor, without `starts`, what it started from.
        """
        ignored = {"bootstrap", *(() if starts else _STARTS)}
        run = {**self.run, "settings": _without(ignored, self.run["settings"])}
        identity = replace(identity, settings=_without(ignored, identity.settings))
        saved = json.dumps(run, sort_keys=True).encode()
        key = hashlib.sha256(saved).hexdigest()
        if identity.key == key:
            return [], []
        then = [(path, size) for path, size, _ in self.run["files"]]
        now = [(path, size) for path, size, _ in identity.files]
        is_same = (run["settings"], self.snapshot) == (
            json.loads(json.dumps(identity.settings)),
            identity.snapshot,
        )
        if then == now and is_same:
            was = {path: version for path, _, version in self.run["files"]}
            other = [path for path, _, version in identity.files if was[path] != version]
            what = f"{other[0]} and {len(other) - 1:,} more" if len(other) > 1 else (*other, "")[0]
            if other:
                return [], [f"of the same size, but with another time or ETag: {what}"]
        return [identity.difference(saved, key)], []


def _without(names: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which versions or processors are others than they were."""
    return [
        f"{name} was {was.get(name) or 'none'}, is {now.get(name) or 'none'}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
