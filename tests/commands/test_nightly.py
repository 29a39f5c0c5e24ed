"""Night after night: ids, drift, the gate and the pointer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import lakes
import mixtures
import nights
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import S3Server
from nights import Cluster

import gmm_dist
from gmm_dist.commands import night as night_module
from gmm_dist.commands import nightly
from gmm_dist.commands.night_options import NightlyOptions, NightRows
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.fitting import fit as fitting
from gmm_dist.lake.nights import NightKey
from gmm_dist.nightly.lineage import DRIFT, GATE, Lineage
from gmm_dist.nightly.registry import Registry
from gmm_dist.runs import claim, load
from gmm_dist.runs.lease import LeaseLost
from gmm_dist.scoring import files as scored
from gmm_dist.scoring.scorer import Scorer, Scoring
from gmm_dist.storage import open_url

Errors = pytest.CaptureFixture[str]
A, B, C = (0.0, 0.0, 1.0), (12.0, 0.0, 1.0), (0.0, 12.0, 1.0)
FIRST: dict[str, Cluster] = {"a": A, "b": B, "c": C}

pytestmark = pytest.mark.unchecked  # whole jobs


def night(day: int) -> str:
    return f"2026-11-{day:02d}"


RESIDENT = fitting.Job.resident


class Nights:
    """A lake and a registry, and the job that goes from one to the other."""

    def __init__(self, lake: Path, registry: str, *common: str) -> None:
        self.lake, self.url, self.common = lake, registry, common
        self.registry = Registry(registry)
        self.data = str(lake)

    def write(self, day: int, clusters: Mapping[str, Cluster], n: int = 400) -> None:
        nights.write_night(self.lake, night(day), nights.rows(clusters, n, seed=day))

    def run(self, day: int, *options: str) -> int:
        argv = [self.data, "--registry", self.url, "--night", night(day), "--partition", "ds"]
        argv += ["--k", "3..5", "--n-init", "2", *self.common, *options]
        return nightly.main(argv)

    def lineage(self, day: int) -> Lineage:
        return Lineage.read(self.registry.model_url(night(day)))

    def drift(self, day: int) -> dict[str, Any]:
        return load.read_report(self.registry.model_url(night(day)), DRIFT)

    def gate(self, day: int) -> dict[str, Any]:
        """What is said of the one candidate that was kept back."""
        fs, path = open_url(f"{self.url}/candidates/{night(day)}")
        (folder,) = [f for f in fs.ls(path, detail=False) if fs.find(f)]
        url = self.registry.candidate_url(night(day), folder.rpartition("/")[2])
        return load.read_report(url, GATE)

    def named(self, day: int, clusters: Mapping[str, Cluster]) -> dict[str, int]:
        """The id of the component that lies at each cluster's mean."""
        model = gmm_dist.load(self.registry.model_url(night(day)))
        ids = {}
        for name, (x, y, _) in clusters.items():
            distances = np.linalg.norm(model.parameters.means.numpy() - [x, y], axis=1)
            assert distances.min() < 0.6, (name, model.parameters.means)
            ids[name] = model.component_ids[int(distances.argmin())]
        assert sorted(ids.values()) == sorted(model.component_ids)
        return ids


@pytest.fixture
def local(tmp_path: Path, in_process: None) -> Nights:
    return Nights(tmp_path / "lake", str(tmp_path / "reg"), "--columns", "x", "y")


# ------------------------------------------------------------------------- ten nights


def ten_nights(on: Nights) -> None:
    """A component moves, one splits, one dies, one is born; one night is corrupt and comes late."""
    on.write(1, FIRST)
    assert on.run(1) == 0
    ids = on.named(1, FIRST)
    assert set(ids.values()) == {0, 1, 2}

    moved = {**FIRST, "a": (0.8, 0.0, 1.0)}
    on.write(2, moved)
    assert on.run(2) == 0
    assert on.named(2, moved) == ids
    shifts = {c["id"]: c for c in on.drift(2)["components"]}
    assert shifts[ids["a"]]["mean_shift"] == pytest.approx([0.8, 0.0], abs=0.2)
    assert shifts[ids["a"]]["mahalanobis"] == pytest.approx(0.8, abs=0.2)
    assert shifts[ids["b"]]["mahalanobis"] < 0.2
    for component in shifts.values():
        assert component["volume_ratio"] == pytest.approx(1, abs=0.2)
        assert abs(component["weight"] - component["weight_before"]) < 0.05

    split = {**moved, "c": (-2.6, 12.0, 1.0), "d": (2.6, 12.0, 1.0)}
    on.write(3, split)
    assert on.run(3) == 0
    third = on.named(3, split)
    assert {third["c"], third["d"]} == {ids["c"], 3}
    (born,) = on.drift(3)["born"]
    assert (born["id"], born["nearest"]) == (3, ids["c"])

    without = {name: split[name] for name in "acd"}
    on.write(4, without)
    assert on.run(4) == 0
    assert on.named(4, without) == {name: third[name] for name in "acd"}
    assert [dead["id"] for dead in on.drift(4)["dead"]] == [ids["b"]]

    wide = {**without, "a": (0.8, 0.0, 2.0), "e": B}
    on.write(5, wide)
    assert on.run(5) == 0
    fifth = on.named(5, wide)
    assert fifth == {**on.named(4, without), "e": 4}  # where b was, but b is dead
    (spread,) = [c for c in on.drift(5)["components"] if c["id"] == ids["a"]]
    assert spread["volume_ratio"] == pytest.approx(4, abs=0.6)
    assert spread["shape_change"] < 0.2
    densities = on.drift(5)["densities"]
    assert densities["mean_tonight"] > densities["mean_before"] + 1
    assert sum(densities["histogram"]["tonight"]) == pytest.approx(1, abs=0.01)

    table = nights.rows(wide, 400, seed=6)
    texts = pa.array([str(y) for y in table["y"].to_pylist()])
    nights.write_night(on.lake, night(6), table.set_column(1, "y", texts))
    assert on.run(6) == 3
    assert on.registry.latest() == night(5)
    assert "'y' is gone" in on.gate(6)["reasons"][0]

    on.write(7, {**wide, "f": (-12.0, 0.0, 1.0)})
    assert on.run(7, "--k", "4..6") == 0
    assert on.lineage(7).night_before == night(5)
    assert on.lineage(7).born == (5,)
    before = on.lineage(7)
    assert on.run(7, "--k", "4..6") == 0  # again: nothing happens
    assert on.lineage(7) == before

    on.write(6, {**wide, "g": (-12.0, 12.0, 1.0)})  # mended, and late
    assert on.run(6, "--k", "4..6") == 0
    assert on.registry.latest() == night(7)
    assert on.lineage(6).night_before == night(5)
    assert on.lineage(6).born == (6,)

    on.write(8, {"a": wide["a"]}, n=300)
    assert on.run(8, "--k", "1..2") == 3
    (reason,) = on.gate(8)["reasons"]
    assert "300 rows are too few, at least 1,000" in reason
    assert on.run(9) == 3  # no rows at all
    assert on.gate(9)["reasons"][0].startswith(f"no rows of {night(9)} (ds) yet: run again")
    assert on.registry.latest() == night(7)

    on.write(10, {**wide, "f": (-12.0, 0.0, 1.0), "h": (12.0, 12.0, 1.0)})
    assert on.run(10, "--k", "5..7", "--keep-models", "3") == 0
    assert on.lineage(10).night_before == night(7)
    assert on.lineage(10).born == (7,)  # not 6, which the late night was given
    assert on.registry.latest() == night(10)
    assert on.registry.nights() == [night(6), night(7), night(10)]


def test_ids_over_four_nights_of_which_one_comes_late(local: Nights) -> None:
    """The short form of `ten_nights`, whose reports take half a minute to draw."""
    second = {"a": (0.8, 0.0, 1.0), "c": C, "e": (12.0, 12.0, 1.0)}
    for day, clusters in ((1, FIRST), (2, second), (4, {**second, "f": (-12.0, 0.0, 1.0)})):
        local.write(day, clusters)
        assert local.run(day, "--k", str(len(clusters))) == 0
    ids = local.named(1, FIRST)
    local.write(3, {**second, "g": (-12.0, 12.0, 1.0)})
    assert local.run(3, "--k", "4", "--keep-models", "3") == 0
    assert local.named(2, second) == {"a": ids["a"], "c": ids["c"], "e": 3}
    assert (local.lineage(4).born, local.lineage(4).night_before) == ((4,), night(2))
    assert (local.lineage(3).born, local.lineage(3).night_before) == ((5,), night(2))
    assert (local.registry.latest(), local.registry.new_ids(0)) == (night(4), 6)
    (shifted,) = [c for c in local.drift(2)["components"] if c["id"] == ids["a"]]
    assert shifted["mean_shift"] == pytest.approx([0.8, 0.0], abs=0.2)
    assert [dead["id"] for dead in local.drift(2)["dead"]] == [ids["b"]]
    assert local.registry.nights() == [night(2), night(3), night(4)]


@pytest.mark.faults
def test_ten_nights(tmp_path: Path, in_process: None) -> None:
    ten_nights(Nights(tmp_path / "lake", str(tmp_path / "reg")))


@pytest.mark.faults  # ten times Ray's workers: a minute
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_ten_nights_on_a_cluster(
    kind: str, tmp_path: Path, ray_address: str, s3_lake: S3Server
) -> None:
    url = f"{s3_lake.url}/reg" if kind == "s3" else str(tmp_path / "reg")
    common = ["--address", ray_address, "--num-workers", "2"]
    on = Nights(tmp_path / "lake", url, *common)
    if kind == "s3":
        on = _Uploaded(tmp_path / "lake", url, f"{s3_lake.url}/lake", s3_lake, *common)
    ten_nights(on)


class _Uploaded(Nights):
    """Nights whose lake is a copy on S3."""

    def __init__(self, lake: Path, registry: str, data: str, s3: S3Server, *common: str) -> None:
        super().__init__(lake, registry, *common)
        self.data, self._s3 = data, s3

    def run(self, day: int, *options: str) -> int:
        lakes.upload(self.lake, self._s3.file_system(), self.data)
        return super().run(day, *options)


def test_a_night_on_a_cluster_with_the_registry_on_s3(
    tmp_path: Path, ray_address: str, s3_lake: S3Server, capsys: Errors
) -> None:
    on = Nights(tmp_path / "lake", f"{s3_lake.url}/reg", "--address", ray_address)
    on.write(1, FIRST)
    one_worker = ["--num-workers", "1", "--columns", "y", "x", "--k", "3"]
    one_worker += ["--scores", f"{s3_lake.url}/scores", "--keep", "id"]
    assert on.run(1, *one_worker) == 0
    assert "scored 1,200 rows of 1 file by k=3" in capsys.readouterr().out
    assert on.run(1, *one_worker) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3].endswith("published before")
    assert "has committed before" in said[-2]
    assert (
        said[-1] == f"model of {night(1)} in {on.url}/models/{night(1)}; the latest is {night(1)}"
    )
    model = gmm_dist.load(f"{on.url}/models/{night(1)}")
    assert (model.component_ids, model.feature_names) == ((0, 1, 2), ("y", "x"))
    assert on.lineage(1).ids == (0, 1, 2)


def test_scored_rows_carry_the_ids() -> None:
    model = mixtures.parameters("full", 3, 2, spread=30)
    scoring = Scoring(mixture=model, kept=pa.schema([]), ids=(7, 2, 11))
    X = model.means.numpy()[[2, 0, 1, 0]].T.copy()
    X[0, 3] = np.nan
    table = Scorer(scoring).table(pa.table({"n": range(4)}).select([]), X)
    assert table["component"].to_pylist() == [11, 7, 2, None]
    counts = scored._Counts((7, 2, 11))
    counts.add(table)
    assert counts.components.tolist() == [1, 1, 1]
    counts.add(table.slice(0, 1))
    assert counts.components.tolist() == [1, 1, 2]


# ------------------------------------------------------------------------- the warm start


def test_last_nights_model_takes_part_and_the_order_of_columns_is_its(
    local: Nights, capsys: Errors, caplog: pytest.LogCaptureFixture
) -> None:
    local.write(1, FIRST)
    local.write(2, FIRST)
    assert local.run(1, "--k", "3") == 0
    local.common = ("--columns", "y", "x")
    caplog.clear()
    assert local.run(2, "--k", "3") == 0
    assert f"warm start from {night(1)}, k=3 full" in caplog.text
    assert gmm_dist.load(local.registry.model_url(night(2))).feature_names == ("x", "y")
    assert local.lineage(2).born == local.lineage(2).dead == ()


def test_days_and_the_users_filter_choose_the_rows(local: Nights) -> None:
    for day in (1, 2, 3):
        local.write(day, FIRST)
    assert local.run(3, "--days", "2", "--where", "id < 1000", "--k", "3") == 0
    report = load.read_report(local.registry.model_url(night(3)))
    assert report["n_rows"] + report["n_held_out"] == 2000
    assert report["n_held_out"] > 100


@pytest.mark.parametrize("type_", [pa.date32(), pa.timestamp("us", tz="UTC"), pa.string()])
def test_the_night_may_be_a_column_of_dates_times_or_texts(
    tmp_path: Path, in_process: None, type_: pa.DataType
) -> None:
    table = nights.rows(FIRST, 500, seed=1)
    days = [f"2026-11-{20 + i % 3}" for i in range(len(table))]
    column = pa.array(days).cast(pa.timestamp("us")).cast(type_)
    if pa.types.is_timestamp(type_):
        column = pa.array(days).cast(pa.timestamp("us")).cast(type_)
    nights.write_night(tmp_path / "lake", "x", table.append_column("at", column))
    on = Nights(tmp_path / "lake", str(tmp_path / "reg"), "--columns", "x", "y")
    on.run(21, "--partition", "at", "--k", "3", "--min-rows", "500")
    assert on.lineage(21).n_rows == 500


# ------------------------------------------------------------------------- the gate


def test_a_model_that_scores_held_out_rows_far_worse_is_kept_back(
    local: Nights, capsys: Errors
) -> None:
    local.write(1, FIRST)
    local.write(2, FIRST)
    assert local.run(1, "--k", "3") == 0
    assert local.run(2, "--k", "2") == 3
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"kept back {night(2)}: tonight's model scores the held-out rows 0.")
    assert said.endswith(f"the latest is {night(1)}")
    verdict = local.gate(2)
    assert (verdict["published"], verdict["night_before"]) == (False, night(1))
    assert not (Path(local.url) / "models" / night(2)).exists()
    assert local.registry.new_ids(0) == 3  # none was given to it
    (candidate,) = (Path(local.url) / "candidates" / night(2)).iterdir()
    drift = json.loads((candidate / "drift.json").read_text())
    assert drift["format_version"] == 1
    assert all(born["id"] is None for born in drift["born"])
    assert gmm_dist.load(str(candidate)).n_components == 2
    assert local.run(2, "--k", "2", "--max-drop", "5") == 0
    assert local.registry.latest() == night(2)


UNITS = {"x": (5.0, 3.0, 1.0), "y": (17.0, 3.0, 1.0), "z": (5.0, 15.0, 1.0)}


@pytest.mark.parametrize(
    "change",
    [lambda x: 1.6 * x, lambda x: 1000 * x, lambda x: x + 4, lambda x: 1.8 * x + 32],
    ids=["1.6", "1000", "shifted", "fahrenheit"],
)
def test_a_feature_in_another_unit_is_kept_back_until_it_is_accepted(
    local: Nights, capsys: Errors, change: Callable[[Any], Any]
) -> None:
    one = ("--k", "3", "--n-init", "1")
    local.write(1, UNITS)
    assert local.run(1, *one) == 0
    for day in (2, 3):
        table = nights.rows(UNITS, 400, seed=day)
        x = pa.array(change(table["x"].to_numpy()))
        nights.write_night(local.lake, night(day), table.set_column(0, "x", x))
    assert local.run(2, *one) == 3
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith(f"kept back {night(2)}: whole columns or most rows have changed since ")
    assert "(--max-drift): 'x' is " in out
    assert "more than 0.2 (--max-drift)" in out
    assert "accept it, if it is meant, by --max-drift inf for this night alone" in out
    verdict = local.gate(2)
    assert verdict["max_drift"] == 0.2
    assert verdict["column_drift"]["drift"] > 0.2
    assert verdict["column_drift"]["columns"] == ["x"]
    assert verdict["reasons"][0] in out
    (candidate,) = (Path(local.url) / "candidates" / night(2)).iterdir()
    drift = json.loads((candidate / "drift.json").read_text())
    assert drift["columns"] == verdict["column_drift"]
    assert "whole columns or most rows have changed" in (candidate / "report.html").read_text()
    assert local.registry.latest() == night(1)
    assert local.run(2, *one, "--max-drift", "inf") == 0  # once:
    assert local.run(3, *one) == 0
    assert local.drift(3)["columns"]["drift"] < 0.1


def test_many_strangers_are_told_of_and_published(
    local: Nights, capsys: Errors, caplog: pytest.LogCaptureFixture
) -> None:
    local.write(1, FIRST)
    assert local.run(1, "--k", "3", "--n-init", "1") == 0
    local.write(2, {**FIRST, "d": (90.0, 90.0, 1.0)})
    capsys.readouterr()
    assert local.run(2, "--k", "4", "--n-init", "1") == 0
    warning = "25% of tonight's rows are strange to last night's model"
    assert f"warning: {warning}" in capsys.readouterr().out.replace("\n", " ")
    assert warning in caplog.text
    url = local.registry.model_url(night(2))
    assert warning in load.read_report(url, GATE)["warnings"][0]
    assert warning in load.read_report(url)["warnings"][0]
    assert local.drift(2)["columns"]["strangers"] == pytest.approx(0.25, abs=0.03)


def test_another_try_takes_the_place_of_the_candidate(local: Nights) -> None:
    local.write(1, {"a": A}, n=100)
    for _ in range(2):
        assert local.run(1, "--k", "1") == 3
    assert len(list((Path(local.url) / "candidates" / night(1)).iterdir())) == 1
    assert local.run(1, "--k", "1", "--min-rows", "50") == 0


def test_fewer_rows_than_components_and_candidates_of_no_rank_are_kept_back(
    local: Nights, capsys: Errors
) -> None:
    local.write(1, {"a": A}, n=3)
    assert local.run(1, "--k", "4", "--min-rows", "1") == 3
    assert "--k asks for 4 components, but there are 3 rows" in capsys.readouterr().out
    local.write(2, {"a": A}, n=6)
    assert local.run(2, "--k", "4", "--min-rows", "1") == 3
    assert "the one candidate could not be ranked" in capsys.readouterr().out
    assert local.registry.latest() is None


@pytest.mark.parametrize("columns", [("--columns", "x", "y"), ()])
@pytest.mark.parametrize("spoilt", ["text", "missing"])
@pytest.mark.parametrize("files", ["one", "all"])
def test_a_feature_that_is_text_or_missing_is_kept_back(
    tmp_path: Path, in_process: None, columns: tuple[str, ...], spoilt: str, files: str
) -> None:
    on = Nights(tmp_path / "lake", str(tmp_path / "reg"), *columns)
    on.write(1, FIRST)
    assert on.run(1, "--k", "3", "--n-init", "1") == 0
    table = nights.rows(FIRST, 400, seed=2)
    bad = table.drop_columns("y")
    if spoilt == "text":
        bad = bad.append_column("y", table["y"].cast(pa.string()))
    for name, part in (("a", bad), ("b", table if files == "one" else bad)):
        nights.write_night(on.lake, night(2), part).rename(
            on.lake / f"ds={night(2)}" / f"{name}.parquet"
        )
    assert on.run(2, "--k", "3", "--n-init", "1") == 3
    assert "'y'" in on.gate(2)["reasons"][0]
    assert on.registry.latest() == night(1)


def test_a_feature_that_is_missing_on_the_first_night_is_the_users_to_mend(
    local: Nights, capsys: Errors
) -> None:
    nights.write_night(local.lake, night(1), nights.rows(FIRST, 9, seed=1).drop_columns("y"))
    assert local.run(1) == 2
    assert "no column 'y' among" in capsys.readouterr().err


def test_a_night_that_has_not_arrived_is_kept_back(local: Nights, capsys: Errors) -> None:
    local.write(1, FIRST)
    assert local.run(9) == 3
    assert local.run(9, "--where", "x > 0") == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "kept back" in line]
    assert f"no rows of {night(9)} (ds) yet: run again when they have arrived" in said[0]
    assert f"no rows of {night(9)} (ds) that match --where 'x > 0' yet" in said[1]
    assert local.gate(9)["format_version"] == 1


# ------------------------------------------------------------------------- pruned, scored


def test_a_pruned_night_is_not_fitted_again(local: Nights, capsys: Errors) -> None:
    for day in (1, 2):
        local.write(day, FIRST)
        assert local.run(day, "--k", "3", "--n-init", "1", "--keep-models", "1") == 0
    assert local.registry.nights() == [night(2)]
    capsys.readouterr()
    assert local.run(1, "--k", "3") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"models/{night(1)}: published and pruned, nothing is left to do")
    assert not (Path(local.url) / "models" / night(1)).exists()
    assert local.registry.new_ids(0) == 3
    argv = [local.data, "--registry", local.url, "--night", night(1), "--partition", "ds"]
    options = nightly._parse([*argv, "--k", "3"])
    with pytest.raises(UserError, match=r"was published and pruned while this run waited"):
        nightly._publish(options, NightRows(options), local.registry, ExitStack())


def test_scores_inside_the_lake_are_refused_before_any_fitting(
    local: Nights, capsys: Errors
) -> None:
    local.write(1, FIRST)
    assert local.run(1, "--scores", str(local.lake / "scores")) == 2
    assert "lies inside the lake, whose rows would double: give --scores" in capsys.readouterr().err
    assert not Path(local.url).exists()


def test_a_plan_that_is_made_twice_is_told_of_once(
    local: Nights, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly, "score_and_tell", lambda *asked: None)
    monkeypatch.setattr(night_module, "connected", lambda *asked: nullcontext())
    local.write(1, FIRST)
    (local.lake / "notes.txt").write_text("no rows")
    with caplog.at_level("INFO", "gmm_dist"):
        assert local.run(1, "--scores", str(tmp_path / "scores")) == 0
    for words in ("1 file, 1,200 rows", "2 features: x, y", "passed over 1 of 2 files"):
        assert sum(words in line for line in caplog.messages) == 1, words


def test_scores_of_files_that_have_changed_since_stay(
    local: Nights, tmp_path: Path, ray_address: str, capsys: Errors
) -> None:
    scores = ["--scores", str(tmp_path / "scores"), "--address", ray_address, "--num-workers", "1"]
    local.write(1, FIRST)
    assert local.run(1, "--k", "3", "--n-init", "1", *scores) == 0
    local.write(1, FIRST, n=401)
    capsys.readouterr()
    assert local.run(1, "--k", "3", *scores) == 0
    said = capsys.readouterr().out
    assert f"{night(1)}: scored before; the lake's files have changed since" in said
    assert local.run(1, "--k", "3", *scores, "--keep", "id") == 2
    assert "or pass another --scores" in capsys.readouterr().err


# ------------------------------------------------------------------------- in their order


def test_a_night_that_another_one_came_before_while_it_was_fitted_is_fitted_anew(
    local: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = ("--k", "3", "--n-init", "1")
    for day in (1, 2):
        local.write(day, FIRST)
    fit, began = fitting.Job.fit, []

    def fit_the_first_one_first(self: fitting.Job, *args: Any) -> Any:
        fitted = fit(self, *args)
        began.append(self.options.night)
        if began == [night(2)]:
            assert local.run(1, *one) == 0
        return fitted

    monkeypatch.setattr(fitting.Job, "fit", fit_the_first_one_first)
    assert local.run(2, *one) == 0
    assert began == [night(2), night(1), night(2)]
    assert "a night has been published in between: fitting anew" in caplog.text
    assert (local.lineage(1).night_before, local.lineage(2).night_before) == (None, night(1))
    assert local.named(1, FIRST) == local.named(2, FIRST)
    assert f"warm start from {night(1)}" in caplog.text
    assert local.registry.latest() == night(2)
    # As if the nights had come one after the other.
    command_line = Nights(local.lake, f"{local.url}-again", *local.common)
    assert [command_line.run(day, *one) for day in (1, 2)] == [0, 0]
    assert command_line.lineage(2) == local.lineage(2)
    assert command_line.drift(2) == local.drift(2)


def test_a_night_before_all_others_takes_its_numbers_from_the_one_after_it(local: Nights) -> None:
    second = {**FIRST, "d": (12.0, 12.0, 1.0)}
    local.write(2, FIRST)
    local.write(1, second)
    assert local.run(2, "--k", "3", "--n-init", "1") == 0
    assert local.run(1, "--k", "4", "--n-init", "1") == 0
    assert local.named(1, second) == {**local.named(2, FIRST), "d": 3}
    lineage = local.lineage(1)
    assert (lineage.night_before, lineage.born, lineage.dead) == (None, (3,), ())
    assert local.registry.latest() == night(2)


def test_a_night_whose_past_is_pruned_while_it_is_fitted_is_matched_against_it(
    local: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ("--k", "3", "--n-init", "1")
    for day in (1, 2, 3):
        local.write(day, FIRST)
    for day in (1, 3):
        assert local.run(day, *one) == 0
    ids, fit = local.named(1, FIRST), fitting.Job.fit

    def pruned_meanwhile(self: fitting.Job, *args: Any) -> Any:
        local.registry._bury([night(1)])
        local.registry._remove(night(1))
        return fit(self, *args)

    monkeypatch.setattr(fitting.Job, "fit", pruned_meanwhile)
    assert local.run(2, *one) == 0
    assert local.named(2, FIRST) == ids
    assert local.lineage(2).night_before == night(1)


def test_a_night_that_is_pruned_between_its_commit_and_the_pointer_says_so(
    local: Nights, monkeypatch: pytest.MonkeyPatch, capsys: Errors
) -> None:
    one = ("--k", "3", "--n-init", "1")
    for day in (1, 2):
        local.write(day, FIRST)
    assert local.run(2, *one) == 0
    point_to = Registry.point_to

    def pruned_meanwhile(self: Registry, night: str) -> bool:
        self._bury([night])
        self._remove(night)
        return point_to(self, night)

    monkeypatch.setattr(Registry, "point_to", pruned_meanwhile)
    assert local.run(1, *one) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f"{night(1)}: published and pruned, nothing is left to do")
    assert local.registry.latest() == night(2)


def test_a_damaged_pointer_is_told_of_before_the_work(local: Nights, capsys: Errors) -> None:
    local.write(1, FIRST)
    Path(local.url).mkdir()
    (Path(local.url) / "latest.json").write_text("{")
    assert local.run(1) == 2
    assert "latest.json is damaged or not ours" in capsys.readouterr().err
    assert not (Path(local.url) / "models").exists()


@pytest.mark.faults  # three jobs, each with Ray of its own
def test_three_nights_at_once_keep_their_clusters_numbers(tmp_path: Path) -> None:
    on = Nights(tmp_path / "lake", str(tmp_path / "reg"))
    for day in (1, 2, 3):
        on.write(day, FIRST)

    def run(day: int) -> int:
        job = [sys.executable, "-m", "gmm_dist", "nightly", str(on.lake), "--registry", on.url]
        job += ["--night", night(day), "--partition", "ds", "--k", "3", "--num-workers", "1"]
        return subprocess.run(job, check=False, timeout=600).returncode

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, (3, 2, 1))) == [0, 0, 0]
    assert [on.lineage(d).night_before for d in (1, 2, 3)] == [None, night(1), night(2)]
    assert on.named(1, FIRST) == on.named(2, FIRST) == on.named(3, FIRST)
    assert on.registry.new_ids(0) == 3


# ------------------------------------------------------------------------- spellings of a night


@pytest.mark.parametrize(
    ("folder", "partition"),
    [
        ("dt={0:%Y%m%d}", ["dt"]),
        ("year={0.year}/month={0.month}/day={0.day}", ["day"]),
        ("year={0:%Y}/month={0:%m}/day={0:%d}/hour=00", ["year", "month", "day"]),
        ("ds={0:%Y-%m-%d}T00%3A00%3A00", ["ds"]),
    ],
)
def test_partitions_that_spell_a_night_otherwise(
    local: Nights, capsys: Errors, folder: str, partition: list[str]
) -> None:
    for i, day in enumerate((date(2026, 10, 31), date(2026, 11, 1), date(2026, 11, 2))):
        path = local.lake / folder.format(day) / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(nights.rows(FIRST, 100 * (i + 4), seed=i), path)
    options = ["--partition", *partition, "--k", "3", "--n-init", "1", "--days", "2"]
    assert local.run(1, *options) == 0
    assert local.lineage(1).n_rows == 3 * (400 + 500)
    assert local.run(2, *options) == 0
    assert local.lineage(2).n_rows == 3 * (500 + 600)
    assert local.run(9, *options) == 3
    assert "no rows of 2026-11-09 (" in capsys.readouterr().out


def test_scores_are_of_the_night_alone_however_it_is_spelt_and_ray_starts_once(
    local: Nights, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, day in enumerate((30, 31, 1)):
        path = local.lake / f"year=2026/month={10 if day > 1 else 11}/day={day}/part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(nights.rows(FIRST, 100 * (i + 4), seed=i), path)
    started, init = [], ray.init

    def counted(*args: Any, **options: Any) -> Any:
        started.append(args)
        return init(*args, **options)

    monkeypatch.setattr(ray, "init", counted)
    monkeypatch.setattr(fitting.Job, "resident", RESIDENT)
    options = ["--partition", "day", "--k", "3", "--n-init", "1", "--days", "3"]
    options += ["--scores", str(tmp_path / "scores"), "--address", ray_address]
    assert local.run(1, *options, "--num-workers", "1") == 0
    assert len(started) == 1
    assert not ray.is_initialized()
    scores = pq.read_table(tmp_path / "scores" / night(1), partitioning=None)
    assert len(scores) == 3 * 600
    assert local.lineage(1).n_rows == 3 * (400 + 500 + 600)


# ------------------------------------------------------------------------- interrupted


def test_nobody_is_told_of_a_night_before_it_is_committed(
    local: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write(1, FIRST)
    local.write(2, FIRST, n=20)
    there = []

    def look(*_: object) -> None:
        kept = list(Path(local.url).glob("candidates/*/*/manifest.json"))
        there.append((local.registry.nights(), local.registry.latest(), len(kept)))

    monkeypatch.setattr(night_module, "print_table", look)
    assert local.run(1, "--k", "3", "--n-init", "1") == 0
    assert local.run(2, "--k", "3", "--n-init", "1") == 3
    assert there == [([night(1)], night(1), 0), ([night(1)], night(1), 1)]


def test_a_crash_between_the_commit_and_the_pointer_is_mended_by_the_next_run(
    local: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write(1, FIRST)
    with monkeypatch.context() as crash:

        def fall(self: Registry, night: str) -> bool:
            raise KeyboardInterrupt

        crash.setattr(Registry, "point_to", fall)
        assert local.run(1, "--k", "3") == 130
    assert local.registry.latest() is None
    lineage = local.lineage(1)
    assert local.run(1, "--k", "3") == 0
    assert local.registry.latest() == night(1)
    assert local.lineage(1) == lineage


def test_a_night_that_died_goes_on_with_resume(
    local: Nights, capsys: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write(1, FIRST)
    whole = Nights(local.lake, f"{local.url}-whole", *local.common)
    assert whole.run(1, "--k", "4") == 0
    with monkeypatch.context() as crash:

        def fall(*_: object) -> None:
            raise KeyboardInterrupt

        crash.setattr(fitting, "training_quantiles", fall)
        assert local.run(1, "--k", "4") == 130
    assert local.run(1, "--k", "4") == 2
    assert "pass --resume to go on with it" in capsys.readouterr().err
    assert local.run(1, "--k", "4", "--resume") == 0
    one, other = (
        (Path(on.url) / "models" / night(1) / "model" / "model.safetensors").read_bytes()
        for on in (local, whole)
    )
    assert one == other


def test_what_the_world_does_to_the_pointer_and_to_pruning_tells_how_to_go_on(
    local: Nights, capsys: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write(1, FIRST)

    def fall(*_: object, **__: object) -> None:
        raise RunFailed("the store is out of order")

    for name in ("point_to", "prune"):
        with monkeypatch.context() as crash:
            crash.setattr(Registry, name, fall)
            assert local.run(1, "--k", "3", "--n-init", "1", "--keep-models", "1") == 1
        assert "out of order; go on with: gmm-dist" in capsys.readouterr().err


def test_who_has_lost_the_night_removes_no_candidate_of_others(
    local: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write(1, {"a": A}, n=20)
    assert local.run(1, "--k", "1") == 3
    candidates, check = Path(local.url) / "candidates" / night(1), claim.Run.check
    (first,) = candidates.iterdir()

    def lost(self: claim.Run) -> None:
        check(self)
        if len(list(candidates.glob("*/manifest.json"))) == 2:
            raise LeaseLost("another driver has taken over")

    monkeypatch.setattr(claim.Run, "check", lost)
    assert local.run(1, "--k", "1") == 1
    assert first.exists()


def test_an_output_that_is_taken_is_told_of_the_registry(local: Nights, capsys: Errors) -> None:
    local.write(1, FIRST)
    taken = Path(local.registry.model_url(night(1)))
    taken.mkdir(parents=True)
    (taken / "mine").touch()
    assert local.run(1) == 2
    assert "pass another --registry, or delete it first" in capsys.readouterr().err


def test_two_at_once_one_is_at_work(local: Nights, capsys: Errors) -> None:
    local.write(1, FIRST)
    with claim.claim(local.registry.model_url(night(1)), lease_seconds=0.5):
        assert local.run(1, "--k", "3") == 2
    assert "another driver is at work on this run" in capsys.readouterr().err
    assert local.run(1, "--k", "3") == 0


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--night", "today"], "'today' is not a night: give a date such as 2026-11-21"),
        (["--holdout", "0"], "give a --holdout above 0"),
        (["--days", "0"], "--days is 1 or more"),
        (
            ["--days", "9" * 20],
            "up to --night 2026-11-01: no calendar has so many; give fewer",
        ),
        (
            ["--days", "999999"],
            "up to --night 2026-11-01: no calendar has so many; give fewer",
        ),
        (["--night", "9999-12-31"], "--night 9999-12-31: no calendar has so many"),
        (["--max-drop", "-1"], "--max-drop is -1: give a number of nats >= 0"),
        (["--min-rows", "-1"], "--min-rows is -1: give a whole number >= 0"),
        (["--where", "x > 1 or"], "cannot be read to its end"),
        (["--partition", "dt"], "--partition 'dt' is no column; columns are ds, x, y"),
        (["--keep", "id"], "--keep and --outliers are for --scores"),
        (["--outliers", "0.1"], "--keep and --outliers are for --scores"),
        (["--scores", "s", "--outliers", "2"], "--outliers is 2: give a share from 1e-06 to"),
        (["--scores", "s", "--keep", "idd"], "--keep 'idd' is no column among 'x', 'y', 'id'"),
        (["--partition", "id"], "'id' does not tell the night in one spelling"),
        (["--partition", "x"], "its type is double; understood are 2026-11-21 (also with"),
        (["--partition", "x", "y"], "give one column, or those of year, month and day"),
        (["--partition", "x", "y", "id"], "no numbers of a year, a month and a day"),
        (["--max-drift", "nan"], "--max-drift is nan: give a number of nats >= 0, or inf for any"),
        (["--columns", "x", "z"], "'z'"),
    ],
)
def test_a_bad_option_is_one_line(
    local: Nights, capfd: Errors, options: list[str], message: str
) -> None:
    local.write(1, FIRST)
    assert local.run(1, *options) == 2
    (line,) = [text for text in capfd.readouterr().err.splitlines() if "error: " in text]
    assert message in line
    assert not Path(local.url).exists()


def test_a_damaged_file_is_one_line_and_the_pointer_stays(local: Nights, capfd: Errors) -> None:
    local.write(1, FIRST)
    local.write(2, FIRST)
    assert local.run(1, "--k", "3") == 0
    lakes.truncate(local.lake / f"ds={night(2)}" / "part.parquet", 500)
    assert local.run(2, "--k", "3") == 2
    assert "part.parquet: cannot be read as Parquet" in capfd.readouterr().err
    assert local.registry.latest() == night(1)


def test_help_tells_this_jobs_own_default(capsys: Errors) -> None:
    with pytest.raises(SystemExit):
        nightly.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "kept out of them (default: 0.1)" in text
    assert "inf accepts any (default: 0.2)" in text


def test_the_filter_is_a_half_open_range_beside_the_users() -> None:
    key = NightKey(names=("the day",))
    options = NightlyOptions(
        data="lake",
        registry="models",
        night="2026-03-01",
        partition=("the day",),
        k=(2,),
        where="0 < x <= 5",
    )
    rows = NightRows(options)
    rows._key = key  # as found in the lake
    assert rows.where(days=2).text == (
        "col('the day') < '2026-03-02' and col('the day') >= '2026-02-28' and x <= 5 and x > 0"
    )
    other = replace(options, where="x is null or not x in (1, 2)")
    rows = NightRows(other)  # of these days too, and of no others
    rows._key = key
    assert rows.where(days=1).text == (
        "col('the day') < '2026-03-02' and col('the day') >= '2026-03-01' and "
        "(x != 1 and x != 2 or x is null)"
    )
