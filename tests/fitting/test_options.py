"""Options given from Python: one form for equal settings, and one line for what is none."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from gmm_dist.commands.night_options import NightlyOptions
from gmm_dist.commands.nightly import run_night
from gmm_dist.commands.options import CommandLine
from gmm_dist.errors import UserError
from gmm_dist.fitting.fit import fit_lake
from gmm_dist.fitting.options import FitOptions
from gmm_dist.scoring.options import ScoreOptions
from gmm_dist.urls import reveal

FIT: dict[str, Any] = {"data": "lake", "output": "out", "k": (2,)}
SCORE: dict[str, Any] = {"data": "lake", "model": "model", "output": "out"}
NIGHT: dict[str, Any] = {
    "data": "lake",
    "registry": "reg",
    "k": (2,),
    "night": "2026-11-21",
    "partition": ("ds",),
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("k", 4, (4,)),
        ("k", [2, 3], (2, 3)),
        ("k", range(2, 4), (2, 3)),
        ("k", np.arange(2, 4), (2, 3)),
        ("covariance_type", "tied", ("tied",)),
        ("covariance_type", ["full", "diag"], ("full", "diag")),
        ("columns", "x", ("x",)),
        ("columns", ["x", "y"], ("x", "y")),
        ("data", Path("a/lake"), "a/lake"),
        ("start", Path("model"), "model"),
        ("holdout", np.float32(0.5), 0.5),
        ("tol", 0, 0.0),
        ("max_iter", np.int64(7), 7),
        ("clusters", np.int64(2), 2),
        ("clusters", None, None),
    ],
)
def test_equal_settings_are_equal_options(name: str, value: Any, expected: Any) -> None:
    options = FitOptions(**{**FIT, name: value})
    assert options == FitOptions(**{**FIT, name: expected})
    assert type(getattr(options, name)) is type(getattr(replace(options), name))
    # What a run is known by is JSON: neither NumPy's numbers nor paths, and 0 is spelt as 0.0.
    assert json.dumps(getattr(options, name)) == json.dumps(expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("k", "2..4", "k is '2..4': give a whole number"),
        ("k", (), r"k is \(\): give 1 value at least"),
        ("k", (2, 0), "k is 0: give whole numbers >= 1"),
        ("k", (2.5,), "k is 2.5: give a whole number"),
        ("covariance_type", "round", "covariance_type is 'round': give one of full, tied"),
        ("criterion", "BIC", "criterion is 'BIC': give one of bic, aic"),
        ("criterion", "holdout", "needs rows to rank by"),
        ("clusters", "none", "clusters is 'none': give \"auto\", a whole number or None"),
        ("clusters", 0, "clusters is 0: give a whole number >= 1"),
        ("clusters", True, "clusters is True: give a whole number"),
        ("clusters", 3, "clusters is 3, but no candidate has more than 2 components: give larger"),
        ("columns", [1], "columns is 1: give a text"),
        ("columns", [], r"columns is \[\]: give 1 value at least"),
        ("data", None, "data is None: give a path or URL"),
        ("output", " ", "output is ' ': give a path or URL"),
        ("output", b"out", "output is b'out': give a path or URL"),
        ("weight_column", 3, "weight_column is 3: give a text"),
        ("where", pc.field("x") > 3, r"where is <pyarrow.compute.Expression \(x > 3\)>: give a te"),
        ("missing", "fill", "missing is 'fill': give one of error, drop, mean"),
        ("holdout", "0.1", "holdout is '0.1': give a number"),
        ("tol", None, "tol is None: give a number"),
        ("max_iter", 2.0, "max_iter is 2.0: give a whole number"),
        ("max_iter", True, "max_iter is True: give a whole number"),
        ("accelerate", "no", "accelerate is 'no': give True or False"),
        ("resume", 1, "resume is 1: give True or False"),
        ("checkpoint_seconds", None, "checkpoint_seconds is None: give a number"),
        ("max_failures", "3", "max_failures is 3: give a whole number >= 0"),
    ],
)
def test_what_is_none_of_a_fit_is_one_line(name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FitOptions(**{**FIT, name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "", "model is '': give a path or URL"),
        ("keep", [1], "keep is 1: give a text"),
        ("outliers", "0.1", "outliers is '0.1': give a number"),
        ("probabilities", "yes", "probabilities is 'yes': give True or False"),
        ("max_failures", None, "max_failures is None: give a whole number >= 0"),
    ],
)
def test_what_is_none_of_a_scoring_is_one_line(name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ScoreOptions(**{**SCORE, name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("night", 20261121, "night is 20261121: give a text"),
        ("night", "2026-02-30", "'2026-02-30' is not a night: give a date"),
        ("partition", (), r"partition is \(\): give 1 value at least"),
        ("days", "2", "days is '2': give a whole number"),
        ("keep_models", None, "keep_models is None: give a whole number"),
        ("max_drop", None, "max_drop is None: give a number"),
        ("max_drift", -1, "max_drift is -1: give a number of nats >= 0"),
        ("min_rows", 1.5, "min_rows is 1.5: give a whole number"),
        ("registry", "", "registry is '': give a path or URL"),
        ("where", 3, "where is 3: give a text"),
    ],
)
def test_what_is_none_of_a_night_is_one_line(name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        NightlyOptions(**{**NIGHT, name: value})


def test_one_name_and_a_date_are_as_good_as_a_list_and_a_text() -> None:
    night = date(2026, 11, 21)
    given = {**NIGHT, "partition": "ds", "night": night, "registry": Path("reg"), "scores": "s"}
    options = NightlyOptions(**given, keep="id")
    assert options == NightlyOptions(**NIGHT, scores="s", keep=("id",))
    assert (options.partition, options.night) == (("ds",), "2026-11-21")
    assert options.output == "reg/models/2026-11-21"
    # No letters of a name, which a lake may well have columns of.
    assert ScoreOptions(**SCORE, keep="id").keep == ("id",)


@pytest.mark.parametrize(
    ("kind", "base", "names"),
    [
        (FitOptions, FIT, ("data", "output", "start")),
        (ScoreOptions, SCORE, ("data", "model", "output")),
        (NightlyOptions, NIGHT, ("data", "scores", "start")),
    ],
)
def test_no_credentials_are_shown(kind: Any, base: dict[str, Any], names: tuple[str, ...]) -> None:
    url = "https://lake.example/x?token=s3cr3ts3cr3ts3cr3t"
    options = kind(**{**base, **dict.fromkeys(names, url)})
    assert "s3cr3t" not in repr(options)
    assert all(reveal(getattr(options, name)) == url for name in names)


def test_torch_has_the_threads_that_it_had(tmp_path: Path) -> None:
    torch.set_num_threads(3)
    try:
        with pytest.raises(UserError, match="no such file"):
            fit_lake(FitOptions(data=str(tmp_path / "no"), output=str(tmp_path / "out"), k=2))
        assert torch.get_num_threads() == 3
        given = {**NIGHT, "registry": tmp_path / "reg", "data": tmp_path / "no"}
        with pytest.raises(UserError, match="no such file"):
            run_night(NightlyOptions(**given), CommandLine((), ()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
