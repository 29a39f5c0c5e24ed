"""The jobs through their main, and once as a user starts them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import here
import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import S3Server, forget_connections

import gmm_dist
from gmm_dist.commands import fit as fit_job
from gmm_dist.commands import nightly as nightly_job
from gmm_dist.commands import score as score_job
from gmm_dist.commands import sweep as sweep_job
from gmm_dist.commands.options import CommandLine, parse_k
from gmm_dist.fitting import fit
from gmm_dist.lake.plan import plan_lake
from gmm_dist.lake.read import read
from gmm_dist.model.covariance import COVARIANCE_TYPES

ROOT = Path(__file__).parents[2]
Errors = pytest.CaptureFixture[str]

pytestmark = pytest.mark.unchecked  # whole jobs


def table(n: int = 600, *, seed: int = 0) -> pa.Table:
    """Return rows of three clusters, in two float columns, with a day and a weight."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    X = rng.normal(size=(n, 2)) + centres[np.arange(n) % 3]
    return pa.table(
        {
            "x": X[:, 0],
            "y": X[:, 1],
            "day": np.arange(n) % 5,
            "w": rng.integers(0, 3, size=n).astype(float),
            "name": [f"row {i}" for i in range(n)],
        }
    )


def lake(folder: Path, rows: pa.Table | None = None) -> str:
    folder.mkdir()
    rows = table() if rows is None else rows
    half = len(rows) // 2
    pq.write_table(rows.slice(0, half), folder / "a.parquet", row_group_size=100)
    pq.write_table(rows.slice(half), folder / "b.parquet", row_group_size=100)
    return str(folder)


def replaced(column: str, row: int, value: float | None) -> pa.Table:
    rows = table()
    values = rows[column].to_pylist()
    values[row] = value
    return rows.set_column(rows.column_names.index(column), column, pa.array(values, pa.float64()))


def refused(capfd: Errors, *argv: str, job: Callable[..., int] = sweep_job.main) -> str:
    """Run a job that must end with status 2 and one line; return the line."""
    assert job(argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


def model_hash(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_sweep_leaves_a_model_a_report_and_a_manifest(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "--k", "1..4", "--output", str(out)]
    assert sweep_job.main([*argv, "--address", ray_address]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best by BIC: k=3 full, ")
    report = json.loads((out / "sweep.json").read_text())
    assert report["best"] == {"k": 3, "covariance_type": "full"}
    assert report["n_rows"] == report["rows"]["read"] == 600
    assert [c["k"] for c in report["candidates"]] == [1, 2, 3, 4]
    wanted = "k covariance_type status converged n_iter log_likelihood n_parameters bic aic icl"
    assert {*wanted.split(), "seconds"} <= report["candidates"][0].keys()
    model = gmm_dist.load(str(out))
    X = np.stack([table()["x"], table()["y"]], axis=1)
    best = report["candidates"][2]
    assert model.score_samples(X).sum() == pytest.approx(best["log_likelihood"], rel=1e-9)
    assert model.bic(X) == pytest.approx(best["bic"], rel=1e-9)
    assert model.log_density_quantiles is not None
    median = np.median(model.score_samples(X))
    assert model.log_density_quantiles.at(0.5) == pytest.approx(median, abs=0.02)
    assert (out / "manifest.json").exists()


def test_rows_columns_weights_and_missing_values_are_what_was_asked_for(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lake(tmp_path / "lake", replaced("x", 7, None))
    told = {
        "drop": "--missing drop left out 1 of 360 rows",
        "mean": "--missing mean filled 1 value in 360 rows",
    }
    for missing, n_rows, counted in (("drop", 359, "dropped"), ("mean", 360, "imputed")):
        out = tmp_path / missing
        argv = [data, "--columns", "y", "x", "--k", "3", "--output", str(out)]
        argv += ["--where", "day >= 1 and day < 4", "--weight-column", "w", "--missing", missing]
        assert fit_job.main(argv) == 0
        report = json.loads((out / "sweep.json").read_text())
        assert report["feature_names"] == ["y", "x"]
        weight, day = table()["w"].to_numpy(), table()["day"].to_numpy()
        weightless = (weight == 0) & (day >= 1) & (day < 4)
        weightless[7] &= missing == "mean"
        assert report["rows"]["absent"] == weightless.sum() > 0
        assert report["n_rows"] == n_rows - weightless.sum()
        assert report["rows"]["filtered"] == 240
        assert report["rows"][counted] == 1
        assert report["warnings"][0] == told[missing]
        assert f"warning: {told[missing]}" in capsys.readouterr().out
        assert report["n_samples"] != n_rows


def test_nulls_are_told_before_ray_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lake(tmp_path / "lake", replaced("x", 7, None))
    argv = [data, "--columns", "x", "y", "--k", "2", "--output", str(tmp_path / "out")]
    assert fit_job.main([*argv, "--address", "127.0.0.1:1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*, row group 0: column 'x' has 1 null; pass --missing drop or", said)


def test_held_out_rows_rank_and_are_told_of(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lake(tmp_path / "lake", replaced("x", 7, None)), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "--k", "1..4", "--output", str(out)]
    argv += ["--holdout", "0.2", "--criterion", "holdout", "--missing", "drop"]
    assert sweep_job.main(argv) == 0
    report = json.loads((out / "sweep.json").read_text())
    said = capsys.readouterr().out
    best = max(report["candidates"], key=lambda candidate: candidate["holdout"])
    assert (best["k"], best["rank"]) == (3, 1)
    assert f"{best['holdout']:.6f}" in said
    assert "best by held-out log-likelihood: k=3 full, -" in said.splitlines()[-1]
    plan = plan_lake(data, columns=["x", "y"], missing="drop", holdout=0.2)
    rows = [part for shard in range(plan.n_shards) for part in read(plan, shard)]
    X = np.concatenate([part.X for part in rows])
    held = np.concatenate([part.held_out for part in rows])
    counts = report["rows"]
    assert 80 < report["n_held_out"] == counts["held_out"] == held.sum() < 160
    assert report["n_rows"] == report["n_samples"] == 599 - held.sum()
    assert counts["read"] == counts["dropped"] + counts["held_out"] + report["n_rows"]
    model = gmm_dist.load(str(out))
    assert model.score(X[held]) == pytest.approx(best["holdout"], rel=1e-9)
    assert model.bic(X[~held]) == pytest.approx(best["bic"], rel=1e-9)
    described = json.loads((out / "model" / "model.json").read_text())
    assert described["criteria"]["holdout"] == best["holdout"]


def test_without_held_out_rows_there_is_no_such_column(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "--k", "3", "--output", str(out)]
    assert fit_job.main(argv) == 0
    report = json.loads((out / "sweep.json").read_text())
    assert report["n_held_out"] == 0
    assert report["candidates"][0]["holdout"] is None
    assert "held-out" not in capsys.readouterr().out


def test_the_next_command_runs_as_it_is_printed(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lake(tmp_path / "a [b] lake")
    argv = [data, "--columns", "x", "y", "--k=1,2", "--outp", str(tmp_path / "my out")]
    argv += ["--where", "day != 4 and x < 1e3", "--max-iter", "9"]
    assert sweep_job.main(argv) == 0
    said = capsys.readouterr().out
    warned = re.search(r"warning: the best k is the largest tried: next run: (.*)", said)
    assert warned is not None
    program, job, *command_line = shlex.split(warned[1])
    assert (program, job) == ("gmm-dist", "sweep")
    new = [*argv]
    new[4], new[6] = "--k=2..4", str(tmp_path / "my out-k2-4")
    assert command_line == new
    assert sweep_job.main(command_line) == 0
    assert gmm_dist.load(str(tmp_path / "my out-k2-4")).n_components == 3


LEFT_OUT = " (with the credentials, which are left out here)"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("D --k 2..4 --output O", "D --k 4..8 --output O-k4-8"),
        ("--columns x y --output=O/ D --k=4", "--columns x y --output=O-k4-8 D --k=4..8"),
        ("D --output O-k2-4 --k 4", "D --output O-k4-8 --k 4..8"),
        ("s3://key:secret@b/d --k 4 --output m", "s3://b/d --k 4..8 --output m-k4-8" + LEFT_OUT),
        ("D --k 4 --output=s3://k:s@b/m", "D --k 4..8 --output=s3://b/m-k4-8" + LEFT_OUT),
    ],
)
def test_the_next_command_differs_in_k_and_output_alone(argv: str, expected: str) -> None:
    command = CommandLine(("gmm-dist", "sweep"), argv.split()).for_k("4..8")
    assert command == f"gmm-dist sweep {expected}"
    assert (
        CommandLine(("gmm-dist", "sweep"), ["--k", "1", "--o", "O"]).for_k("2,4,9")
        == "gmm-dist sweep --k 2,4,9 --o O-k2-9"
    )


def test_a_fit_goes_on_from_a_model(tmp_path: Path, in_process: None) -> None:
    data, first, second = lake(tmp_path / "lake"), tmp_path / "one", tmp_path / "two"
    common = ["--columns", "x", "y"]
    assert fit_job.main([data, "--k", "3", "--output", str(first), *common]) == 0
    argv = [data, "--start", str(first / "model"), "--output", str(second), *common]
    assert fit_job.main(argv) == 0
    one, two = gmm_dist.load(str(first)), gmm_dist.load(str(second))
    # Both have converged: what is left between them is rounding, either way.
    assert two.log_likelihood >= one.log_likelihood * (1 + 1e-9)
    np.testing.assert_allclose(two.parameters.means, one.parameters.means, atol=0.05)


def test_workers_do_not_change_a_bit_and_neither_does_s3(
    tmp_path: Path, ray_address: str, s3_lake: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards in this process, and with two and three workers."""
    monkeypatch.setattr("gmm_dist.lake.deal._MIN_ROWS_PER_SHARD", 150)
    data = lake(tmp_path / "lake")
    lakes.upload(Path(data), s3_lake.file_system(), s3_lake.url)
    hashes, common = set(), ["--columns", "x", "y", "--k", "2..3", "--holdout", "0.2"]
    common += ["--address", ray_address, "--output"]
    for workers, place in (("2", data), ("3", s3_lake.url)):
        out = tmp_path / workers
        assert sweep_job.main([place, *common, str(out), "--num-workers", workers]) == 0
        hashes.add(model_hash(out))
    monkeypatch.setattr(fit.Job, "resident", here.resident)
    assert sweep_job.main([data, *common, str(tmp_path / "here")]) == 0
    reports = [json.loads((tmp_path / i / "sweep.json").read_text()) for i in ("2", "3", "here")]
    assert plan_lake(data, columns=["x", "y"]).n_shards == 4
    for name in ("best", "rows"):
        assert reports[0][name] == reports[1][name] == reports[2][name]
    assert hashes == {model_hash(tmp_path / "here")}


def test_a_model_is_committed_to_s3(tmp_path: Path, in_process: None, s3_lake: S3Server) -> None:
    data, out = lake(tmp_path / "lake"), f"{s3_lake.url}/model"
    argv = [data, "--columns", "x", "y", "--k", "3", "--output", out]
    assert fit_job.main(argv) == 0
    assert gmm_dist.load(out).n_components == 3
    assert gmm_dist.load(f"{out}/model").n_components == 3


def test_as_a_user_starts_it_with_ray_embedded(tmp_path: Path, capfd: Errors) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    command = [sys.executable, "jobs/sweep.py", data, "--columns", "x", "y", "--k", "2,3"]
    done = subprocess.run(
        [*command, "--output", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("best by BIC: k=3 full, ")
    assert "loaded 1 of 1 shard, 600 rows" in done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert refused(capfd, *command[2:], "--output", str(out)).startswith(
        f"error: {out} already holds"
    )


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--k", "three"],
            r"--k: 'three' is not like 8, 4,8,16 or 2\.\.20; see gmm-dist sweep --help",
        ),
        (["--k", "5..2"], r"'5\.\.2' is not a range"),
        (["--k", "0"], r"'0' is not a range of whole numbers from 1 up"),
        (["--k", "9" * 5000], r"--k: '9{50}' is not like 8, 4,8,16 or 2\.\.20; see"),
        (["--k", "2..601"], r"--k asks for 601 components, but there are 600 rows: give at"),
        (["--k", "2", "--tol", "-1"], r"--tol is -1\.0: give a number >= 0"),
        (["--k", "2", "--n-init", "0"], r"--n-init is 0: give a whole number >= 1"),
        (["--k", "2", "--num-workers", "0"], r"--num-workers is 0"),
        (["--k", "2", "--tol", "nan"], r"--tol is nan: give a number >= 0"),
        (["--k", "2", "--reg-covar", "inf"], r"--reg-covar is inf: give a number >= 0"),
        (["--k", "2", "--max-iter", "0"], r"--max-iter is 0: give a whole number >= 1"),
        (["--k", "2", "--random-state", "-1"], r"--random-state is -1: give a whole number from 0"),
        (["--k", "2", "--grace", "nan"], r"--grace is nan: give seconds >= 0"),
        (["--k", "2", "--grace", "inf"], r"--grace is inf: give seconds >= 0"),
        (["--k", "2", "--grace", "-1"], r"--grace is -1\.0: give seconds >= 0"),
        (["--k", "2", "--max-failures", "-1"], r"--max-failures is -1: give a whole number >= 0"),
        (["--k", "2", "--checkpoint-seconds", "nan"], r"checkpoint-seconds is nan: give seconds"),
        (["--k", "2", "--checkpoint-seconds", "-1"], r"checkpoint-seconds is -1: give seconds"),
        (["--k", "2", "--holdout", "nan"], r"--holdout is nan: give a share of the rows, 0 <="),
        (["--k", "2", "--columns", "x", "nope"], r"'nope'"),
        (["--k", "2", "--columns", "x", "name"], r"'name'.*"),
        (["--k", "2", "--columns", "x", "x"], r"'x'"),
        (["--k", "2", "--where", "day = 3"], r"=="),
        (["--k", "2", "--where", "day > 77"], r"day > 77"),
        (["--k", "2", "--holdout", "1"], r"--holdout is 1: give a share of the rows, 0 <= share <"),
        (["--k", "2", "--criterion", "holdout"], r"needs rows to rank by: add --holdout 0\.1; see"),
        (["--k", "2", "--criterion", "best"], r"--criterion: invalid choice: 'best'"),
        (["--k", "2", "--max-iter", "many"], r"--max-iter: invalid int value: 'many'; see"),
    ],
)
def test_a_bad_option_is_one_line(
    tmp_path: Path, capfd: Errors, argv: list[str], message: str
) -> None:
    out = tmp_path / "out"
    line = refused(capfd, lake(tmp_path / "lake"), "--output", str(out), *argv)
    assert re.search(message, line), line
    assert not out.exists()


def test_options_out_of_range_are_refused_before_the_output_is_looked_at(
    tmp_path: Path, capfd: Errors
) -> None:
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "manifest.json").write_text("{}")
    nowhere = [str(tmp_path / "nowhere"), "--output", str(taken)]
    assert "grace is nan" in refused(capfd, *nowhere, "--k", "2", "--grace", "nan")
    scores = [*nowhere, "--model", str(tmp_path / "nowhere")]
    for share in ("nan", "0", "1", "-1"):
        line = refused(capfd, *scores, "--outliers", share, job=score_job.main)
        assert "give a share from 1e-06 to below 1" in line
    line = refused(capfd, *scores, "--num-workers", "0", job=score_job.main)
    assert "--num-workers is 0" in line


def test_help_tells_which_columns_are_taken_and_what_each_option_is_about(capfd: Errors) -> None:
    with pytest.raises(SystemExit):
        sweep_job.main(["--help"])
    shown = " ".join(capfd.readouterr().out.split())
    assert "all float columns but pandas' indices, else the one column of lists)" in shown
    for about in ("what ranks the fits", "iterations over all rows at most", "drop the row"):
        assert about in shown


@pytest.mark.parametrize("empty", ["", " "])
def test_a_place_that_is_empty_is_not_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Errors, empty: str
) -> None:
    """As of a shell's variable that is not set."""
    monkeypatch.chdir(tmp_path)
    for option, argv in (
        ("DATA", [empty, "--output", "out", "--k", "2"]),
        ("--output", ["data", "--output", empty, "--k", "2"]),
    ):
        line = refused(capfd, *argv)
        assert f"argument {option}: it is empty: give a path or URL, . for this folder" in line
    score = ["data", "--output", "out", "--model", empty]
    assert "argument --model: it is empty" in refused(capfd, *score, job=score_job.main)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_holdout_that_a_job_has(capfd: Errors) -> None:
    for job, default in ((sweep_job.main, "0"), (nightly_job.main, "0.1")):
        with pytest.raises(SystemExit):
            job(["--help"])
        words = " ".join(capfd.readouterr().out.split())
        assert (
            f"score the fits on this share of the rows, kept out of them (default: {default})"
            in words
        )


def test_a_missing_path_and_a_folder_without_parquet_are_one_line(
    tmp_path: Path, capfd: Errors
) -> None:
    out = ["--k", "2", "--output", str(tmp_path / "out")]
    assert str(tmp_path / "nowhere") in refused(capfd, str(tmp_path / "nowhere"), *out)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capfd, str(tmp_path / "empty"), *out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: lakes.truncate(path, 500), r"b\.parquet: cannot be read as Parquet"),
        (lambda path: lakes.corrupt(path, start=8, length=3000), r"b\.parquet: cannot be read"),
    ],
)
def test_a_truncated_and_a_corrupt_file_are_one_line(
    tmp_path: Path,
    capfd: Errors,
    in_process: None,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    damage(Path(data) / "b.parquet")
    argv = [data, "--columns", "x", "y", "--k", "2", "--output", str(out)]
    assert re.search(message, refused(capfd, *argv))
    assert not out.exists()


def test_an_embedding_whose_width_differs_between_files_is_one_line(
    tmp_path: Path, capfd: Errors
) -> None:
    for width in (3, 4):
        column = lakes.embeddings(np.zeros((5, width)))
        lakes.write(tmp_path / "lake" / f"{width}.parquet", {"e": column})
    line = refused(capfd, str(tmp_path / "lake"), "--k", "2", "--output", str(tmp_path / "out"))
    assert "4.parquet: column 'e' has embedding width 4, but 3 in" in line


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "row group 1: column 'x' has 1 null"),  # told by the footer, which names no row
        (np.nan, "row group 1, row 17: column 'x' is NaN"),
        (np.inf, "row group 1, row 17: column 'x' is inf"),
    ],
)
def test_a_value_that_is_no_number_is_named_by_file_row_group_row_and_column(
    tmp_path: Path, capfd: Errors, in_process: None, value: float | None, said: str
) -> None:
    data, out = lake(tmp_path / "lake", replaced("x", 417, value)), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "--k", "2", "--output", str(out)]
    line = refused(capfd, *argv)
    assert f"b.parquet, {said}" in line
    assert not out.exists()


def test_holding_out_none_or_all_of_few_rows_is_one_line(
    tmp_path: Path, capfd: Errors, in_process: None
) -> None:
    argv = [lake(tmp_path / "lake", table(4)), "--columns", "x", "y", "--k", "1"]
    argv += ["--output", str(tmp_path / "out")]
    line = refused(capfd, *argv, "--holdout", "0.001", "--criterion", "holdout")
    assert "no held-out row of positive weight: give a larger --holdout" in line
    line = refused(capfd, *argv, "--holdout", "0.999")
    assert "no rows are left of 4" in line
    assert "give a smaller --holdout" in line
    assert not (tmp_path / "out").exists()


def test_no_rows_after_where_is_one_line(tmp_path: Path, capfd: Errors, in_process: None) -> None:
    out = tmp_path / "out"
    argv = [lake(tmp_path / "lake"), "--columns", "x", "y", "--k", "2", "--output", str(out)]
    line = refused(capfd, *argv, "--where", "x > 0 and x < 1e-9")
    assert "no rows are left of" in line
    assert not out.exists()


def test_an_output_that_exists_is_one_line(tmp_path: Path, capfd: Errors) -> None:
    data = lake(tmp_path / "lake")
    line = refused(capfd, data, "--columns", "x", "--k", "2", "--output", data)
    assert "is not empty" in line
    assert "--output" in line


def test_a_start_that_does_not_fit_is_one_line(
    tmp_path: Path, capfd: Errors, in_process: None
) -> None:
    data, first = lake(tmp_path / "lake"), str(tmp_path / "one")
    argv = [data, "--columns", "x", "y", "--k", "3", "--output", first]
    assert fit_job.main(argv) == 0
    capfd.readouterr()
    second = [data, "--start", first, "--output", str(tmp_path / "two")]
    line = refused(capfd, *second, "--columns", "y", "x", job=fit_job.main)
    assert "features x, y, the data y, x" in line
    line = refused(capfd, *second, "--columns", "x", "y", "--k", "4", job=fit_job.main)
    assert "--k is 4 but the model of --start has 3 components" in line
    line = refused(capfd, data, "--output", str(tmp_path / "two"), job=fit_job.main)
    assert "one of --k and --start is required" in line


def test_what_a_reader_of_the_table_should_know_is_said_with_a_remedy(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table()
    rows = rows.append_column("same", rows["x"]).append_column("flat", pa.array([7.5] * 600))
    data, out = lake(tmp_path / "lake", rows), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "same", "flat", "--k", "2,3", "--output", str(out)]
    assert sweep_job.main(argv) == 0
    said = capsys.readouterr().out
    assert "warning: column 'flat' is constant: leave it out with --columns" in said
    assert "warning: 1 of 4 columns are duplicates or sums of others" in said
    assert "warning: the best k is the largest tried: next run: gmm-dist " in said
    report = json.loads((out / "sweep.json").read_text())
    assert len(report["warnings"]) == 3
    assert report["best"]["k"] == 3
    assert "NaN" not in (out / "sweep.json").read_text()
    assert np.isfinite(gmm_dist.load(str(out)).parameters.covariances.numpy()).all()


def test_a_spike_and_weights_that_are_no_counts_are_said_by_a_job(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table()
    amount = np.where(np.arange(600) % 2, 0.0, np.exp(rows["x"].to_numpy() / 5))
    rows = rows.append_column("amount", pa.array(amount))
    rows = rows.append_column("share", pa.array(rows["w"].to_numpy() / rows["w"].to_numpy().sum()))
    data, out = lake(tmp_path / "lake", rows), tmp_path / "out"
    argv = [data, "--columns", "amount", "y", "--weight-column", "share", "--k", "1..2"]
    assert sweep_job.main([*argv, "--output", str(out), "--address", ray_address]) == 0
    said = capsys.readouterr().out
    warned = json.loads((out / "sweep.json").read_text())["warnings"]
    weight = rows["share"].to_numpy()
    zeros = weight[amount == 0].sum()
    (spike,) = [line for line in warned if line.startswith("column 'amount': of its rows")]
    assert f"{zeros:.0%} are exactly 0" in spike
    assert "filter such rows with --where, raise --reg-covar" in spike
    (unit,) = [line for line in warned if line.startswith("the weights sum to 1 over ")]
    n = 1 / (weight**2).sum()  # Kish's number
    assert f"{np.count_nonzero(weight):,} rows" in unit
    assert f"n = (Σw)²/Σw² = {n:,.1f}; weights of mean 1 would count each row" in unit
    assert all(f"warning: {line}" in said for line in (spike, unit))


def test_rows_many_times_over_a_flat_column_and_an_outlier_still_give_a_table(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Candidates that mean nothing are rows with their sentence; the sweep ends all the same."""
    twice = pa.concat_tables([table()] * 3).append_column("flat", pa.array([7.5] * 1800))
    far = pa.table({name: pa.array([1e9 if name == "x" else 0.0]) for name in ("x", "y")})
    far = far.append_column("flat", pa.array([7.5]))
    rows = pa.concat_tables([twice.select(far.column_names), far])
    data, out = lake(tmp_path / "lake", rows), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "flat", "--k", "1,3,6", "--output", str(out)]
    argv += ["--covariance-type", *COVARIANCE_TYPES]
    assert sweep_job.main(argv) == 0
    report = json.loads((out / "sweep.json").read_text())
    assert len(report["candidates"]) == 18
    for candidate in report["candidates"]:
        degenerate = candidate["status"].startswith(("degenerate", "collapsed"))
        assert (candidate["rank"] is None) is degenerate
        assert degenerate or math.isfinite(candidate["bic"])
    said = capsys.readouterr().out
    assert "degenerate" in said
    assert sum(line.split()[1:2] == ["6"] for line in said.splitlines()) == 6


@pytest.mark.parametrize("ray_is_here", [False, True])
def test_statistics_beyond_memory_are_one_line_with_the_numbers(
    tmp_path: Path,
    capfd: Errors,
    ray_address: str,
    ray_is_here: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where Ray would start on this machine, it need not: no cluster has to say what is here."""
    wide = pa.table({"e": pa.FixedSizeListArray.from_arrays(np.zeros(4000 * 20), 4000)})
    argv = [lake(tmp_path / "lake", wide), "--k", "2..20", "--output", str(tmp_path / "out")]
    if ray_is_here:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "init", lambda *asked, **options: pytest.fail("Ray was started"))
    else:
        argv += ["--address", ray_address]
    line = refused(capfd, *argv)
    assert "the statistics of 209 components with 4,000 features need " in line
    assert "GiB in every worker, which has at most" in line
    assert "use --covariance-type diag" in line


def test_fewer_rows_than_features_end_with_a_table_and_a_line(
    tmp_path: Path, capfd: Errors, in_process: None
) -> None:
    wide = pa.table({f"x{i}": np.random.default_rng(i).normal(size=12) for i in range(30)})
    data, out = lake(tmp_path / "lake", wide), tmp_path / "out"
    argv = [data, "--k", "1,2", "--output", str(out)]
    assert sweep_job.main(argv) == 2
    said = capfd.readouterr()
    assert "degenerate: a component has fewer rows" in said.out
    assert "error: none of the 2 candidates could be ranked" in said.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "ks"), [("8", [8]), ("4,8,16", [4, 8, 16]), ("2..5", [2, 3, 4, 5]), ("1,1..2", [1, 2])]
)
def test_k_is_read_as_written(text: str, ks: list[int]) -> None:
    assert parse_k(text) == ks


def test_wrong_credentials_and_a_missing_bucket_are_one_line(
    capfd: Errors, s3_lake: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--k", "2", "--output", str(tmp_path / "out")]
    assert "no-such-bucket" in refused(capfd, "s3://no-such-bucket/points", *out)
    data = lake(tmp_path / "lake")
    line = refused(capfd, data, "--columns", "x", "--k", "2", "--output", "s3://no-such-bucket/m")
    assert "no-such-bucket" in line
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_connections()
    assert "check the permissions and the credentials" in refused(capfd, s3_lake.url, *out)


def test_components_are_merged_into_clusters_which_rows_are_scored_by(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    argv = [data, "--columns", "x", "y", "--k", "4", "--n-init", "2"]
    assert sweep_job.main([*argv, "--output", str(out), "--json"]) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    assert "; 3 clusters (4 components); model in " in said
    assert json.loads(last)["n_clusters"] == 3
    model = gmm_dist.load(str(out))
    assert model.clusters is not None
    assert model.clusters.n_clusters == 3
    report, card = (
        json.loads((out / name).read_text()) for name in ("sweep.json", "model/model.json")
    )
    assert report["clusters"] == card["clusters"]
    assert [len(tree["merges"]) for tree in card["clusters"]["trees"].values()] == [3, 3]
    assert "<h1>3 clusters (4 components)</h1>" in (out / "report.html").read_text()
    X = np.stack([table()["x"], table()["y"]], axis=1)
    found = model.predict(X, clusters=True)
    assert len(set(zip(found.tolist(), (np.arange(600) % 3).tolist(), strict=True))) == 3
    # Asked for, they are as many, and no more than there are components.
    wanted = {"2": 2, "none": None}
    for i, (option, expected) in enumerate(wanted.items()):
        place = tmp_path / str(i)
        assert fit_job.main([*argv, "--clusters", option, "--output", str(place)]) == 0
        clusters = gmm_dist.load(str(place)).clusters
        assert (clusters and clusters.n_clusters) == expected
        assert model_hash(place) == model_hash(out)
    few = [data, "--columns", "x", "y", "--k", "3,4", "--clusters", "4", "--output"]
    assert sweep_job.main([*few, str(tmp_path / "few")]) == 0
    expected_line = "warning: --clusters 4: the best model has 3 components, so there are no more"
    assert expected_line in capsys.readouterr().out


@pytest.mark.parametrize("option", ["0", "some", "-1", ""])
def test_clusters_that_are_no_number_are_refused(
    tmp_path: Path, capfd: Errors, option: str
) -> None:
    argv = [str(tmp_path), "--k", "2", "--output", str(tmp_path / "out")]
    line = refused(capfd, *argv, f"--clusters={option}")
    assert "is not auto, none or a number from 1 up" in line
