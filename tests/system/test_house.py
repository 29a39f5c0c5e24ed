"""What the house promises beside the contracts that `lint-imports` checks (pyproject.toml)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gmm_dist

PACKAGE = Path(gmm_dist.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_FILES, MOST_LINES = 15, 450


def imports_of(path: Path) -> set[str]:
    """Return the modules that a module imports, under their full names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            found.add(str(node.module))
    return found


def test_folders_and_files_stay_small() -> None:
    folders = {path.parent for path in MODULES}
    fullest = max(folders, key=lambda folder: len(list(folder.glob("*.py"))))
    assert len(list(fullest.glob("*.py"))) <= MOST_FILES, fullest
    longest = max(MODULES, key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= MOST_LINES, longest


def test_the_contracts_hold_and_a_planted_import_breaks_them(tmp_path: Path) -> None:
    """The contracts as they are, and with Ray imported in em/."""
    linter = Path(sys.executable).with_name("lint-imports")
    for planted in (False, True):
        root = tmp_path / str(planted)
        root.mkdir()
        subprocess.run(["cp", "-r", str(PACKAGE), str(root)], check=True)
        (root / "pyproject.toml").write_text((PACKAGE.parent / "pyproject.toml").read_text())
        if planted:
            loop = root / "gmm_dist" / "em" / "loop.py"
            loop.write_text(loop.read_text() + "\nimport ray\n")
        done = subprocess.run(
            [str(linter), "--no-cache"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) is planted, done.stdout + done.stderr
        assert not planted or "gmm_dist.em.loop -> ray" in done.stdout


def test_who_may_know_ray_is_said_of_every_box_and_file() -> None:
    """`layers` is exhaustive by itself, a list of who is forbidden something is not."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (ray,) = (one for one in contracts if one["name"] == "Only shards knows Ray")
    there = {
        ".".join(("gmm_dist", *p.relative_to(PACKAGE).with_suffix("").parts[:1])) for p in MODULES
    }
    others = {"gmm_dist.shards", "gmm_dist.__init__", "gmm_dist.__main__"}
    assert set(ray["source_modules"]) == there - others


def test_the_library_neither_reads_arguments_nor_configures_logging() -> None:
    for path in MODULES:
        if "commands" in path.parts:
            continue
        text = path.read_text()
        for word in ("sys.argv", "basicConfig"):
            assert word not in text, f"{path.name}: {word}"


def test_shapes_are_checked_of_every_module_that_tells_them() -> None:
    """Each is named to jaxtyping, or its box is; else its annotations are passed over silently."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    options = settings["tool"]["pytest"]["ini_options"]["addopts"].split()
    (option,) = (option for option in options if option.startswith("--jaxtyping-packages="))
    named = set(option.partition("=")[2].split(","))
    for path in MODULES:
        if "jaxtyping" in imports_of(path):
            parts = ("gmm_dist", *path.relative_to(PACKAGE).with_suffix("").parts)
            names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert names & named, path


def test_a_wrong_shape_is_an_error() -> None:
    """That annotations are executed is seen only where one is broken."""
    import torch

    from gmm_dist.model.criteria import n_parameters
    from gmm_dist.model.parameters import Parameters

    with pytest.raises(Exception, match=r"(?i)type-check"):
        Parameters(
            weights=torch.ones(2) / 2,
            means=torch.zeros(3, 2),
            covariances=torch.ones(2, 2),
            covariance_type="diag",
        )  # weights of two components, means of three
    with pytest.raises(Exception, match=r"(?i)type-check"):
        n_parameters("full", "two", 3)  # type: ignore[arg-type]


def test_a_files_tests_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """Where a version of pytest-xdist loses the groups, each process has a cluster of its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_house.py")
