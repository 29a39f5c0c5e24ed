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
from gmm_dist.runs.folder import Folder
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
    folder = Folder.of(config.url("url", url))
    with explained(folder.url):
        read = _model_reader(folder)
        card = read(CARD)
        return parse_model(card, read(TENSORS), folder.url)


def read_report(url: str, name: str = REPORT) -> dict[str, Any]:
    """Return the JSON file `name` of the result committed at `url`.

    Raises:
        UserError: nothing is committed at `url`, it has no such file, or the file is damaged.
    """
    folder = Folder.of(url)
    with explained(folder.url):
        return parse_plain(Result.at(folder).read(name), name, folder.url)


def _model_reader(folder: Folder, *, follow: bool = True) -> Callable[[str], bytes]:
    """Return a function that reads a model's files by name, through the manifest if there is one.

    With `follow`, a registry's pointer is followed, once.
    """
    if ATTEMPTS in folder.path.split("/"):
        raise UserError(
            f"{folder.url} lies inside {ATTEMPTS}, where nothing is committed",
            remedy="pass the " + Option("output") + " of the run",
        )
    if (result := Result.find(folder)) is not None:
        return lambda name: result.read(f"{MODEL}/{name}")
    head, query = split_query(folder.path)
    parent, _, name = head.rpartition("/")
    above = Result.find(replace(folder, path=parent + query)) if parent else None
    if above is not None and f"{name}/{CARD}" in above.files:
        return lambda file: above.read(f"{name}/{file}")
    if follow and (latest := folder.read(LATEST)) is not None:
        with whole(LATEST, folder.url):
            name = name_within(parse(latest, LATEST, folder.url)["model"], LATEST, folder.url)
        if folder.leads_out(name):
            raise UserError(f"{folder.url}: {name}, which {LATEST} names, is a link out of there")
        return _model_reader(folder.below(name), follow=False)
    return lambda name: _read_alone(folder, name)


def _read_alone(folder: Folder, name: str) -> bytes:
    data = folder.read(name)
    if data is not None:
        return data
    if name == CARD:
        raise UserError(nothing_at(folder))
    raise UserError(f"{folder.url}: {name} is missing beside {CARD}: copy the model folder again")
