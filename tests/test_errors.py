"""Errors name options by values, which each face spells in its own words."""

from __future__ import annotations

import ast
import logging
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

import gmm_dist
from gmm_dist import Cluster, Lake, select
from gmm_dist.commands import ending, sweep, talking
from gmm_dist.commands.talking import on_command_line
from gmm_dist.errors import (
    NoRows,
    Option,
    RunFailed,
    SchemaError,
    Text,
    TooFewRows,
    UserError,
    joined,
    renaming,
    spelt,
)

PACKAGE = Path(gmm_dist.__file__).parent


# --- no text outside of the commands knows their command line


def command_line() -> set[str]:
    """Return every option that a parser of the commands has."""
    calls = (
        node
        for path in (PACKAGE / "commands").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    )
    words = (word.value for call in calls for word in call.args if isinstance(word, ast.Constant))
    return {word for word in words if word.startswith("--")}


def options_in(source: str, options: set[str]) -> Iterator[str]:
    """Return the options that strings name; what stands in backticks is a command, or code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"`[^`]*`", "", node.value)
            yield from options & set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_no_string_outside_of_the_commands_holds_an_option_of_their_command_line() -> None:
    options = command_line()
    assert {"--k", "--num-workers", "--registry", "--keep", "--start"} <= options
    planted = 'raise UserError(f"{url}: use fewer --columns or `ray start --address`")'
    assert list(options_in(planted, options)) == ["--columns"]
    for path in PACKAGE.rglob("*.py"):
        if "commands" not in path.relative_to(PACKAGE).parts:
            assert not list(options_in(path.read_text(), options)), path


# --- values, texts and errors


@pytest.mark.parametrize(
    ("option", "in_python", "in_commands"),
    [
        (Option("num_workers"), "num_workers", "--num-workers"),
        (Option("num_workers", 12_345_678), "num_workers=12345678", "--num-workers 12345678"),
        (Option("n_components"), "n_components", "--k"),
        (Option("init_params"), "init_params", "--init"),
        (Option("missing", "drop"), 'missing="drop"', "--missing drop"),
        (Option("resume", True), "resume=True", "--resume"),
        (Option("accelerate", False), "accelerate=False", "--no-accelerate"),
        (Option("holdout", 0.1), "holdout=0.1", "--holdout 0.1"),
        (Option("max_drift", math.inf), "max_drift=inf", "--max-drift inf"),
        (
            Option("partition", ("year", "month")),
            'partition=("year", "month")',
            "--partition year month",
        ),
        (Option("columns", ("x",)), 'columns=("x",)', "--columns x"),
    ],
)
def test_each_face_spells_an_option(option: Option, in_python: str, in_commands: str) -> None:
    assert str(option) == str(Text((option,))) == in_python
    assert on_command_line(option) == in_commands


def test_what_a_text_quotes_is_no_option() -> None:
    text = "s3://a--k/--k: fewer " + Option("n_components") + ", or " + Option("holdout", 0.5)
    assert str(text) == "s3://a--k/--k: fewer n_components, or holdout=0.5"
    assert spelt(text, on_command_line) == "s3://a--k/--k: fewer --k, or --holdout 0.5"
    assert spelt(joined(" and ", ["{k}", Option("k"), text + "!"])) == f"{{k}} and k and {text}!"
    assert spelt(joined(", ", [])) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("all is said"), "all is said"),
        (UserError("is 3", option="tol", remedy="give 4"), "--tol is 3: give 4"),
        (UserError("bad", where="a.parquet", remedy="mend it"), "a.parquet: bad; mend it"),
        (
            SchemaError("'z' is none", where="lake", option=Option("keep"), remedy="name one"),
            "lake: --keep 'z' is none; name one",
        ),
        (RunFailed("many (" + Option("max_failures") + ")"), "many (--max-failures)"),
        (UserError("one\nline", where="a\x1b"), r"a\x1b: one\nline"),
    ],
)
def test_an_error_is_one_line_of_what_is_known(error: UserError | RunFailed, line: str) -> None:
    assert error.spelt(on_command_line) == line
    python = re.sub("--([a-z-]+)", lambda found: found[1].replace("-", "_"), line)
    assert str(error) == python


@pytest.mark.parametrize("kind", [UserError, TooFewRows, NoRows, SchemaError, RunFailed])
def test_an_error_comes_out_of_a_worker_as_it_is_and_without_secrets(
    kind: type[UserError] | type[RunFailed],
) -> None:
    url = "https://user:secret@host/a"
    error = kind(
        f"{url} lacks " + Option("columns"), where=url, remedy="see " + Text((url,)), option="tol"
    )
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert isinstance(again, ValueError) is issubclass(kind, UserError)
    assert again.spelt(on_command_line) == error.spelt(on_command_line)
    assert "--tol https" in again.spelt(on_command_line)
    told = f"{error} {again} {error!r} {again!r} {error.what} {error.where} {pickle.dumps(error)!r}"
    assert "secret" not in told
    # Ray raises what a task raised under a type of both.
    both = RayTaskError("task", "trace", error).as_instanceof_cause()
    assert isinstance(both, kind)
    assert both.spelt(on_command_line) == error.spelt(on_command_line)


def test_an_option_that_follows_from_another_is_named_by_that() -> None:
    where, options = (
        "s3://b/output",
        "pass another " + Option("output") + ", or " + Option("columns"),
    )
    error = TooFewRows("is taken", where=where, option="output", remedy=options)
    with pytest.raises(TooFewRows) as raised, renaming(output="registry"), renaming(start="model"):
        raise error
    line = f"{where}: --registry is taken; pass another --registry, or --columns"
    assert raised.value.spelt(on_command_line) == line


# --- the faces


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """20 rows of x and y in two days, one x of them null."""
    for day in (1, 2):
        folder = tmp_path / "lake" / f"day={day}"
        folder.mkdir(parents=True)
        x = [float(day), None, *map(float, range(8))]
        pq.write_table(pa.table({"x": x, "y": [float(i) for i in range(10)]}), folder / "a.parquet")
    return tmp_path / "lake"


@pytest.mark.parametrize(
    ("command", "lake_options", "settings", "said", "told"),
    [
        ("", {}, {}, "pass --missing drop or", 'pass missing="drop" or'),
        (
            "--columns x z",
            {"columns": ["x", "z"]},
            {},
            "; name the feature columns with --columns",
            "; name the feature columns with columns",
        ),
        ("--columns day", {"columns": ["day"]}, {}, "; use it in --where", "; use it in where"),
        ("--holdout 1.5", {"holdout": 1.5}, {}, ": --holdout is 1.5: give", "holdout is 1.5: give"),
        ("--n-init 0", {}, {"n_init": 0}, ": --n-init is 0: give", "n_init is 0: give"),
        (
            "--missing drop --address here",
            {"missing": "drop"},
            {"cluster": Cluster("here")},
            ": --address or RAY_ADDRESS is 'here': give",
            "address or RAY_ADDRESS is 'here': give",
        ),
    ],
)
def test_commands_and_python_spell_the_same_error_in_their_own_words(
    lake: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    lake_options: dict[str, Any],
    settings: dict[str, Any],
    said: str,
    told: str,
) -> None:
    words = [str(lake), "--k", "2", "--output", str(lake.with_name("out")), *command.split()]
    assert sweep.main(words) == ending.USER_CAN_MEND
    assert said in capfd.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError) as raised:
        select(Lake(url=str(lake), **lake_options), n_components=2, **settings)
    assert told in str(raised.value)
    assert "--" not in re.sub(r"`[^`]*`", "", str(raised.value))


def test_the_log_of_a_command_spells_options_as_its_command_line() -> None:
    args = Option("keep"), "--k", UserError("is 3", option="max_iter"), "use " + Option("columns")
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s %s; %s; %s", args, None)
    assert (
        talking._OneLine("%(message)s").format(record)
        == "--keep --k; --max-iter is 3; use --columns"
    )
    assert record.getMessage() == "keep --k; max_iter is 3; use columns"  # other handlers' own
