"""Read a committed result back: the model, and the report beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gmm_dist import config
from gmm_dist.errors import Option, UserError
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs.commit import ATTEMPTS, MODEL, Result, nothing_at
from gmm_dist.runs.commit import Attempt as Attempt
from gmm_dist.runs.commit import claim as claim
from gmm_dist.runs.commit import repair as repair
from gmm_dist.runs.folder import Place
from gmm_dist.runs.json_files import name_within, parse, parse_plain, whole
from gmm_dist.runs.model_folder import CARD, TENSORS, parse_model
from gmm_dist.runs.model_folder import Provenance as Provenance
from gmm_dist.runs.model_folder import library_versions as library_versions
from gmm_dist.storage import explained
from gmm_dist.urls import split_query

REPORT = "sweep.json"
LATEST = "latest.json"


def load(url: str | os.PathLike[str]) -> Mixture:
    """Return the model in `url`: a run's output, its `model` folder, or a copy of that folder.

    Of a registry of nightly models it is the latest.

    Raises:
        UserError: there is no committed model, it is damaged, or a newer gmm_dist wrote it; `url`
            is no path or URL.
    """
    place = Place.of(config.url("url", url))
    with explained(place.url):
        read = _model_reader(place)
        card = read(CARD)
        return parse_model(card, read(TENSORS), place.url)


def read_report(url: str, name: str = REPORT) -> dict[str, Any]:
    """Return the JSON file `name` of the result committed at `url`.

    Raises:
        UserError: nothing is committed at `url`, it has no such file, or the file is damaged.
    """
    place = Place.of(url)
    with explained(place.url):
        return parse_plain(Result.at(place).read(name), name, place.url)


def _model_reader(place: Place, *, follow: bool = True) -> Callable[[str], bytes]:
    """Return what reads a model's files by name, through the manifest if there is one.

    `follow` the pointer of a registry, which leads to a model and no further.
    """
    if ATTEMPTS in place.path.split("/"):
        raise UserError(
            f"{place.url} lies inside {ATTEMPTS}, where nothing is committed",
            remedy="pass the " + Option("output") + " of the run",
        )
    if (result := Result.find(place)) is not None:
        return lambda name: result.read(f"{MODEL}/{name}")
    head, query = split_query(place.path)
    parent, _, folder = head.rpartition("/")
    above = Result.find(replace(place, path=parent + query)) if parent else None
    if above is not None and f"{folder}/{CARD}" in above.files:
        return lambda name: above.read(f"{folder}/{name}")
    if follow and (latest := place.read(LATEST)) is not None:
        with whole(LATEST, place.url):
            name = name_within(parse(latest, LATEST, place.url)["model"], LATEST, place.url)
        if place.leads_out(name):
            raise UserError(f"{place.url}: {name}, which {LATEST} names, is a link out of there")
        return _model_reader(place.below(name), follow=False)
    return lambda name: _read_alone(place, name)


def _read_alone(place: Place, name: str) -> bytes:
    data = place.read(name)
    if data is not None:
        return data
    if name == CARD:
        raise UserError(nothing_at(place))
    raise UserError(f"{place.url}: {name} is missing beside {CARD}: copy the model folder again")
