"""A lake is scored file by file, and what is left behind is what the model says of its rows."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lakes
import mixtures
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server, forget_connections, free_ports
from test_commit import PROVENANCE
from test_scorer import reference

from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import score as score_job
from gmm_dist.em.evaluate import training_quantiles
from gmm_dist.lake.plan import plan_lake
from gmm_dist.model.mixture import Mixture
from gmm_dist.runs import load
from gmm_dist.runs.load import read_report
from gmm_dist.scoring.files import Counts
from gmm_dist.scoring.score import _Job
from gmm_dist.shards.local import LocalShards
from gmm_dist.storage import Patience, open_url

ROOT = Path(__file__).parents[2]
MIXTURE = mixtures.parameters("full", 4, 2)
TRAINING = mixtures.rows(MIXTURE, 20_000)
Errors = pytest.CaptureFixture[str]

pytestmark = pytest.mark.unchecked  # whole jobs


def model_at(url: str, **changes: object) -> str:
    """Commit a model of the features x and y, and return where."""
    quantiles = training_quantiles(LocalShards.of(TRAINING), MIXTURE)
    model = Mixture(
        parameters=MIXTURE,
        feature_names=("x", "y"),
        n_samples=2e4,
        log_likelihood=-5e4,
        log_density_quantiles=quantiles,
    )
    with load.claim(url) as attempt:
        attempt.write_model(replace(model, **changes), PROVENANCE)
        attempt.commit()
    return url


def days(folder: Path, n_files: int = 3, n: int = 400) -> Path:
    """Write files under hive keys, their columns in another order than the model's; some holes."""
    X = mixtures.rows(MIXTURE, n_files * n, seed=1).numpy()
    for i in range(n_files):
        own = X[i * n : (i + 1) * n].copy()
        own[: 2 * i, 0] = np.nan
        rows = {"y": own[:, 1], "id": np.arange(n) + i * n, "x": own[:, 0]}
        lakes.write(folder / f"ds=2026-11-{i + 1:02}" / "part-0.parquet", rows, rows_per_group=150)
    return folder


def score(*argv: object, address: str) -> int:
    return score_job.main([*map(str, argv), "--address", address])


def refused(capfd: Errors, *argv: object) -> str:
    """Run a job that must end with status 2 and one line; return the line."""
    assert score_job.main([*map(str, argv)]) == 2
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("error: ")]
    return line


def hashes(out: Path) -> dict[str, str]:
    found = [path for path in out.rglob("*.parquet") if "_scored" not in path.parts]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def report_of(out: object) -> dict[str, object]:
    return read_report(f"{out}/_scored", "scored.json")


def test_every_row_is_scored_in_its_place_and_a_second_time_there_is_nothing_to_do(
    tmp_path: Path, ray_address: str, capfd: Errors, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    argv = [data, "--model", model_at(str(tmp_path / "model")), "--output", out]
    argv += ["--num-workers", "2", "--keep", "id", "ds", "--probabilities", "--outliers", "0.05"]
    assert score(*argv, address=ray_address) == 0
    said = capfd.readouterr()
    report = report_of(out)
    assert said.out.splitlines()[-1] == (
        f"scored 1,200 rows of 3 files by k=4; 6 rows miss a feature; "
        f"{report['outliers']} outliers; in {out}"
    )
    assert "scored 3 of 3 files, 1,200 rows" in caplog.text
    assert "keep ds: a hive key, which the path has; no column is written" in caplog.text
    assert "keep id" not in caplog.text
    assert {path: entry["sha256"] for path, entry in report["files"].items()} == hashes(out)
    assert hashes(out).keys() == hashes(data).keys()

    table, before = pd.read_parquet(out), pd.read_parquet(data)
    wanted = "id component probability log_density probabilities outlier ds"
    assert list(table.columns) == wanted.split()
    assert table["id"].tolist() == before["id"].tolist()
    assert table["ds"].tolist() == before["ds"].tolist()
    whole = before["x"].notna()
    assert (table["component"].notna() == whole).all()
    X = before.loc[whole, ["x", "y"]].to_numpy()
    expected, found = reference(MIXTURE), table[whole]
    resp = expected.predict_proba(X)
    assert (found["component"] == expected.predict(X)).all()
    np.testing.assert_allclose(found["probability"], resp.max(1), atol=1e-6)
    np.testing.assert_allclose(np.stack(found["probabilities"]), resp, atol=1e-6)
    np.testing.assert_allclose(found["log_density"], expected.score_samples(X), atol=1e-6)
    assert 0.02 < found["outlier"].mean() < 0.09
    assert report["outliers"] == found["outlier"].sum()
    assert report["components"] == np.bincount(expected.predict(X), minlength=4).tolist()

    assert (
        plan_lake(str(out), columns=["log_density"], missing="drop").n_rows == 1200
    )  # our readers take it too
    assert not list(out.rglob("*.part"))
    assert not (out / "_scored" / "_checkpoints").exists()
    stamp = (out / "_scored" / "manifest.json").stat().st_mtime_ns
    for more in ([], ["--resume"]):
        assert score_job.main([*map(str, argv), *more]) == 0  # without a cluster
        assert "committed before, nothing is left to do" in capfd.readouterr().out
    assert (out / "_scored" / "manifest.json").stat().st_mtime_ns == stamp
    line = refused(capfd, *argv[:-1], "0.01")
    assert (
        "holds the scores of another run: the settings differ: outliers was 0.05, is 0.01" in line
    )


@pytest.mark.parametrize(
    ("filtered", "said"), [(0, ""), (1, "; 1 other in them did not pass the filter")]
)
def test_a_filter_is_told_of_only_where_it_left_rows_out(filtered: int, said: str) -> None:
    # A night's own filter is one that the user did not give.
    options = SimpleNamespace(where="ds == '2026-11-21'", outliers=None, output="out/")
    job = SimpleNamespace(
        options=options,
        mixture=SimpleNamespace(n_components=4, clusters=None),
        plan=SimpleNamespace(snapshot=None),
    )
    scored = SimpleNamespace(
        files={"a": None},
        counts=Counts(rows=600, filtered=filtered, missing=0, outliers=0, components=(600,)),
    )
    line = _Job.sentence(job, scored)
    assert line == f"scored 600 rows of 1 file by k=4{said}; in out"


def test_on_s3_with_a_filter_it_is_the_same(
    tmp_path: Path, ray_address: str, s3_lake: S3Server, capfd: Errors
) -> None:
    data = days(tmp_path / "lake")
    there = lakes.upload(data, s3_lake.file_system(), f"{s3_lake.url}/lake")
    model = model_at(f"{s3_lake.url}/model")
    where = ["--where", "ds >= '2026-11-02' and id < 1000", "--keep", "id"]
    for source, out in ((data, str(tmp_path / "out")), (there, f"{s3_lake.url}/out")):
        argv = [source, "--model", model, "--output", out, *where]
        assert score(*argv, "--num-workers", 1, address=ray_address) == 0
        said = (
            "scored 600 rows of 2 files by k=4; 200 others in them did not pass the filter; 6 rows"
        )
        assert said in capfd.readouterr().out
    here, away = report_of(tmp_path / "out"), report_of(f"{s3_lake.url}/out")
    assert here["files"] == away["files"]
    assert (here["rows"], here["filtered"], here["missing"]) == (600, 200, 6)
    fs, root = open_url(f"{s3_lake.url}/out")
    for path, sha256 in hashes(tmp_path / "out").items():
        assert hashlib.sha256(fs.cat_file(f"{root}/{path}")).hexdigest() == sha256
    assert list(here["files"]) == [f"ds=2026-11-0{i}/part-0.parquet" for i in (2, 3)]


def without(column: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        pq.write_table(pq.ParquetFile(path).read().drop_columns([column]), path)

    return edit


def of_text(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    lakes.write(path, {**table.to_pydict(), "x": ["a"] * len(table)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("x"), "ds=2026-11-02/part-0.parquet: no column 'x' among 'y', 'id'; the model n"),
        (of_text, "ds=2026-11-02/part-0.parquet: column 'x' has type string, but double in "),
    ],
)
def test_a_feature_that_is_missing_or_no_number_is_one_line(
    tmp_path: Path, capfd: Errors, edit: Callable[[Path], None], message: str
) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    edit(data / "ds=2026-11-02" / "part-0.parquet")
    model = model_at(str(tmp_path / "model"))
    assert message in refused(capfd, data, "--model", model, "--output", out)
    assert not out.exists()


def test_what_cannot_be_is_one_line(tmp_path: Path, capfd: Errors) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    model = model_at(str(tmp_path / "model"))
    argv = [data, "--model", model, "--output", out]
    for more, message in (
        (
            ["--outliers", "1.5"],
            "error: --outliers is 1.5: give a share from 1e-06 to below 1",
        ),
        (["--keep", "idd"], "--keep 'idd' is no column among 'y', 'id', 'x'; name one of them"),
        (["--where", "ds > '2027-01-01'"], "no rows match the filter ds > '2027-01-01'"),
        (["--model", data], "holds no result, neither manifest.json nor model.json"),
        (["--output", data / "scored"], "lies inside the lake, whose rows would double"),
        (["--output", model], "already holds a committed result (manifest.json): pass another"),
        (["--output", tmp_path], "is not empty (2 entries, first 'lake'): pass another --output"),
    ):
        assert message in refused(capfd, *argv, *more)
    old = model_at(str(tmp_path / "old"), log_density_quantiles=None)
    line = refused(capfd, *argv, "--model", old, "--outliers", "0.01")
    assert "keeps no quantiles of its training log-density" in line
    named = model_at(str(tmp_path / "named"), feature_names=())
    assert "keeps no names of its features" in refused(capfd, *argv, "--model", named)
    assert not out.exists()


def test_a_lake_that_is_out_of_reach_is_one_line_with_the_command_that_goes_on(
    tmp_path: Path, s3_lake: S3Server, capfd: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_at(str(tmp_path / "model"))
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("gmm_dist.storage.PATIENCE", Patience(0.05, first_pause=0.01))
    forget_connections()
    argv = [f"{s3_lake.url}/lake", "--model", model, "--output", str(tmp_path / "out")]
    assert score_job.main(argv) == 1
    forget_connections()
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("error: ")]
    assert "the storage failed for 0 s" in line
    assert line.endswith("/out --resume")
    assert "; go on with: gmm-dist " in line


def test_an_infinite_value_ends_the_run_and_another_model_cannot_go_on_with_it(
    tmp_path: Path, ray_address: str, capfd: Errors
) -> None:
    data, out = days(tmp_path / "lake"), tmp_path / "out"
    path = data / "ds=2026-11-03" / "part-0.parquet"
    sound = path.read_bytes()
    table = pq.ParquetFile(path).read().to_pydict()
    table["x"][311] = -np.inf
    lakes.write(path, table, rows_per_group=150)
    argv = [data, "--model", model_at(str(tmp_path / "model")), "--output", out]
    argv += ["--num-workers", 1]
    line = refused(capfd, *argv, "--address", ray_address)
    assert "ds=2026-11-03/part-0.parquet, row group 2, row 11: column 'x' is -inf" in line
    assert not (out / "_scored" / "manifest.json").exists()
    finished = hashes(out)
    assert refused(capfd, *argv).endswith("--resume to go on with it, or another --output")
    other = model_at(str(tmp_path / "other"), parameters=mixtures.parameters("full", 4, 2, seed=9))
    line = refused(capfd, *argv, "--model", other, "--resume")
    assert "an unfinished run: the settings differ: model_sha256 was" in line
    path.write_bytes(sound)
    line = refused(capfd, *argv, "--resume")
    assert "an unfinished run: the lake's files have changed: ds=2026-11-03/part-0.parq" in line
    assert hashes(out) == finished


@pytest.mark.faults
def test_killed_half_way_and_resumed_it_gives_the_same_files(
    tmp_path: Path, ray_address: str, capfd: Errors
) -> None:
    data, model = days(tmp_path / "lake", 24, 20_000), model_at(str(tmp_path / "model"))
    argv = [data, "--model", model, "--keep", "id", "--num-workers", "2", "--address", ray_address]
    assert score_job.main([*map(str, argv), "--output", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "jobs" / "score.py", *argv, "--output", out]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE)
    assert process.stderr is not None
    records = out / "_scored" / "_checkpoints" / "files"
    while process.poll() is None and len(list(records.rglob("*.json"))) < 5:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    finished = {p.relative_to(records) for p in records.rglob("*.json")}
    assert 5 <= len(finished) < 24
    stamps = {path: (out / path.with_suffix("")).stat().st_mtime_ns for path in finished}
    assert score_job.main([*map(str, argv), "--output", str(out), "--resume"]) == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    for path, stamp in stamps.items():
        assert (out / path.with_suffix("")).stat().st_mtime_ns == stamp
    reports = [report_of(tmp_path / name) for name in ("whole", "out")]
    assert reports[0]["files"] == reports[1]["files"]
    assert not list(out.rglob("*.part"))
    assert json.loads((out / "_scored" / "manifest.json").read_text())["format_version"] == 1


def test_lists_are_fitted_and_scored_whatever_their_kind(
    tmp_path: Path, in_process: None, ray_address: str
) -> None:
    X = mixtures.rows(MIXTURE, 600, seed=2).numpy()
    kinds = [pa.list_(pa.float64()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 2)]
    ids = [pa.array(np.arange(200)), pa.array([2**64 - 1] * 200, pa.uint64()), pa.nulls(200)]
    for i, (kind, own) in enumerate(zip(kinds, ids, strict=True)):
        emb = pa.array(X[200 * i : 200 * i + 200].tolist(), kind)
        lakes.write(tmp_path / "lake" / f"{i}.parquet", {"id": own, "emb": emb})
    data, out = str(tmp_path / "lake"), str(tmp_path / "fit")
    assert fit_job.main([data, "--k", "2", "--output", out]) == 0
    model = load.load(out)
    assert model.feature_names == ("emb[0]", "emb[1]")
    scores = tmp_path / "scores"
    argv = [data, "--model", out, "--output", str(scores), "--keep", "id", "emb"]
    assert score_job.main([*argv, "--address", ray_address, "--num-workers", "1"]) == 0
    found = [pq.read_table(scores / f"{i}.parquet") for i in range(3)]
    assert {table.schema.field("id").type for table in found} == {pa.decimal128(20, 0)}
    np.testing.assert_array_equal(np.array(found[1]["emb"].to_pylist()), X[200:400])
    assert [table["id"][7].as_py() for table in found] == [7, 2**64 - 1, None]
    densities = np.concatenate([table["log_density"] for table in found])
    np.testing.assert_allclose(densities, model.score_samples(X), rtol=1e-9)
