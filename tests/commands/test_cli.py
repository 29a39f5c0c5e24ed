"""The command `gmm-dist`: its jobs, its version, and the line that schedulers read."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_jobs import lake

import gmm_dist
from gmm_dist.commands import cli, fit, sweep
from gmm_dist.commands.options import CommandLine, asks_for_json, program


def test_it_knows_its_version_and_its_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv=["--version"]) == 0
    assert capsys.readouterr().out == f"gmm-dist {gmm_dist.__version__}\n"
    assert cli.main(argv=["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {job} " in said for job in ("fit", "sweep", "score", "nightly"))
    assert cli.main(argv=[]) == 2
    capsys.readouterr()
    assert cli.main(argv=["swep"]) == 2
    assert capsys.readouterr().err.startswith("error: 'swep' is no job: give fit, sweep,")


class _Full(io.StringIO):
    """A stream on a disk without space."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("words", [["--version"], ["--help"], [], ["swep"]])
def test_nothing_that_becomes_of_its_streams_is_a_traceback(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (_Full(), None):  # None: it was closed when the interpreter started
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            patched.setattr(sys, "stderr", stream)
            assert cli.main(argv=words) == (0 if words[:1] in (["--version"], ["--help"]) else 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], True),
        (["--js"], True),
        (["--jsonl"], False),
        (["--"], False),
        (["--k", "2", "--", "--json"], False),  # a folder of that name
    ],
)
def test_an_option_cut_short_is_that_option(words: list[str], expected: bool) -> None:
    assert asks_for_json(words) is expected


def test_commands_that_go_on_heed_names_cut_short_and_the_end_of_options() -> None:
    command_line = CommandLine(
        ("gmm-dist", "sweep"), ["--k=2", "--res", "--out", "O", "--", "--resume"]
    )
    assert command_line.to_resume() == "gmm-dist sweep --k=2 --out O --resume -- --resume"
    assert command_line.for_k("2..4") == "gmm-dist sweep --k=2..4 --out O-k2-4 -- --resume"


@pytest.mark.parametrize("job", cli.JOBS)
def test_each_job_tells_the_version_and_its_options(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, said in (("--version", f"gmm-dist {gmm_dist.__version__}"), ("--help", "--json")):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv=[job, word])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert said in printed
        assert ".py" not in printed, "who has the wheel has no scripts"


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("/venv/bin/gmm-dist", ("gmm-dist", "fit")),
        ("jobs/fit.py", ("python", "jobs/fit.py")),
        ("/x/gmm_dist/__main__.py", ("python", "-m", "gmm_dist", "fit")),
        ("/x/gmm_dist/commands/cli.py", ("python", "-m", "gmm_dist", "fit")),
        ("/x/pytest/__main__.py", ("gmm-dist", "fit")),
    ],
)
def test_the_command_that_goes_on_is_spelt_as_it_was_called(
    called: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program("fit") == expected


def test_the_last_line_tells_a_scheduler_what_came(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = lake(tmp_path / "lake"), tmp_path / "out"
    argv = [data, "--k", "1,2", "--n-init", "2", "--output", str(out), "--json"]
    assert sweep.main([*argv, "--columns", "x", "y"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["exit_status"] == 0
    assert (facts["output"], facts["model"]) == (str(out), f"{out}/model")
    best = json.loads((out / "sweep.json").read_text())["best"]
    assert (facts["k"], facts["covariance_type"]) == (best["k"], best["covariance_type"])
    assert gmm_dist.load(facts["model"]).n_components == facts["k"]


def test_it_tells_of_what_ended_a_job_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(tmp_path / "nowhere"), "--k", "2", "--output", str(tmp_path / "out"), "--json"]
    assert fit.main(argv) == 2
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["exit_status"] == 2
    assert said.err == f"error: {facts['error']}\n"


def test_the_scripts_and_the_modules_are_the_command(tmp_path: Path) -> None:
    root = Path(gmm_dist.__file__).parents[1]
    for words in (
        ["-m", "gmm_dist", "fit"],
        ["-m", "gmm_dist.commands.cli", "fit"],
        [str(root / "jobs" / "fit.py")],
    ):
        done = subprocess.run(
            [sys.executable, *words, "--version"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"gmm-dist {gmm_dist.__version__}\n"
