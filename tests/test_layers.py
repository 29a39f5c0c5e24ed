"""Which module may import which: a diagram that cannot lie."""

from __future__ import annotations

import ast
import os
import sys
import tomllib
from pathlib import Path

import pytest

import gmm_dist

PACKAGE = Path(gmm_dist.__file__).parent
TENSORS = {"torch", "jaxtyping"}

MAY_IMPORT = {
    # Errors a user can cause; frozen, validated settings.
    "urls": set(),
    "formats": set(),
    "errors": {"formats", "urls"},
    "config": {"errors"},
    # The mathematics: neither where rows are, nor Ray, nor files.
    "parameters": TENSORS,
    "statistics": TENSORS,
    "families": TENSORS | {"parameters", "statistics"},
    "soundness": {"torch", "families", "parameters"},
    "shards": {"torch"},
    "lanes": TENSORS | {"parameters"},
    "features": {"torch", "families"},
    "products": TENSORS | {"families", "features", "lanes", "shards", "statistics"},
    "centred": TENSORS | {"families", "features", "lanes", "shards", "statistics"},
    "kernel": TENSORS
    | {"centred", "families", "features", "lanes", "products", "shards", "statistics"},
    "acceleration": TENSORS | {"parameters"},
    "cohort": TENSORS
    | {"acceleration", "config", "families", "kernel", "lanes", "parameters", "statistics"},
    "snapshot": {"torch", "acceleration", "cohort", "lanes", "parameters"},
    "em": TENSORS | {"cohort", "config", "parameters", "shards", "statistics"},
    "variational": TENSORS | {"families", "parameters"},
    "limits": {"errors", "families", "parameters"},
    "sample": TENSORS | {"kernel", "shards", "statistics"},
    "seeding": TENSORS | {"families", "kernel", "parameters", "sample", "shards", "statistics"},
    "moves": TENSORS | {"families", "parameters", "seeding"},
    "search": TENSORS
    | {"config", "em", "families", "kernel", "limits", "moves", "parameters", "sample"}
    | {"seeding", "shards", "statistics"},
    "quantiles": {"errors"},
    # Rows that a user hands in; a lake as a value, which they are not.
    "opened": {"urls"},
    "inputs": {"numpy", "sklearn", "torch", "errors", "opened"},
    "mixture": TENSORS | {"numpy", "errors", "families", "inputs", "parameters", "quantiles"},
    "holdout": TENSORS | {"families", "kernel", "parameters", "shards"},
    "histogram": TENSORS | {"families", "kernel", "parameters", "quantiles", "shards"},
    "spikes": TENSORS | {"sample", "shards", "statistics"},
    "weighting": {"shards", "statistics"},
    "selection": {"torch", "em", "families", "formats", "mixture", "spikes", "statistics"}
    | {"weighting"},
    "matching": TENSORS | {"scipy", "parameters"},
    "column_drift": TENSORS | {"scipy", "mixture", "parameters"},
    "drift": TENSORS | {"column_drift", "histogram", "holdout", "matching", "parameters", "shards"},
    "sweep": {
        "cohort",
        "config",
        "em",
        "errors",
        "formats",
        "holdout",
        "kernel",
        "lanes",
        "moves",
        "parameters",
        "search",
        "selection",
        "shards",
        "snapshot",
        "spikes",
        "statistics",
        "torch",
        "weighting",
    },
    # The lake: neither EM, nor torch, nor Ray.
    "web_folders": {"fsspec"},
    "storage": {"fsspec", "errors", "urls", "web_folders"},
    "comparing": {"numpy", "pyarrow"},
    "where": {"numpy", "pyarrow", "comparing", "errors"},
    "decoding": {"pyarrow", "errors"},
    "table_formats": {"fsspec", "errors", "storage"},
    "data_files": {"fsspec", "errors", "storage"},
    "listing": {"fsspec", "pyarrow", "data_files", "errors", "storage", "table_formats"} | {"urls"},
    "column_types": {"pyarrow", "comparing"},
    "columns": {"pyarrow", "column_types", "errors", "listing", "storage", "where"},
    "footers": {"pyarrow", "column_types", "comparing"},
    "nights": {"pyarrow", "decoding", "errors", "listing", "storage", "urls", "where"},
    "lake": {"numpy", "pyarrow", "columns", "comparing", "decoding", "errors", "footers"}
    | {"formats", "listing", "nights", "storage", "urls", "where"},
    "reading": {"numpy", "pyarrow", "column_types", "comparing", "decoding", "errors", "lake"}
    | {"listing", "storage"},
    "streaming": {"numpy", "pyarrow", "comparing", "decoding", "errors", "footers", "lake"}
    | {"listing", "reading", "storage"},
    # A lake's rows become resident blocks: the one place where the two meet.
    "loading": {"numpy", "torch", "lake", "reading", "shards"},
    # The cluster: neither files, nor EM.
    "failures": {"ray", "errors", "formats"},
    "placement": set(),
    "workers": {"ray", "torch", "shards"},
    "dispatch": {"ray", "errors", "failures", "formats", "placement", "workers"},
    "cluster": {"grpc", "ray", "dispatch", "errors", "failures", "formats", "placement", "shards"}
    | {"torch", "workers"},  # torch tells whether this machine has a GPU
    # What is left behind.
    "places": {"fsspec", "errors", "storage", "urls"},
    "records": {"errors"},
    "model_files": {"safetensors", "torch", "errors", "mixture", "parameters"}
    | {"quantiles", "records", "soundness"},
    "conditional": {"fsspec", "errors", "places", "storage"},
    "lease": {"fsspec", "conditional", "errors", "places", "storage"},
    "commit": {"errors", "lease", "mixture", "model_files", "places", "records", "storage"},
    "checkpoint": {"safetensors", "torch", "errors", "model_files", "places", "records"}
    | {"storage"},
    "scoring": {"numpy", "pyarrow", "torch", "errors", "families", "parameters"},
    "scored": {"numpy", "pyarrow", "torch", "checkpoint", "commit", "lake", "places"}
    | {"errors", "listing", "records", "scoring", "shards", "storage", "streaming"},
    "runs": {"checkpoint", "commit", "errors", "lease", "places", "storage"},
    "score_runs": {"checkpoint", "commit", "errors", "lake", "places", "records", "runs"}
    | {"lease", "scored", "storage"},
    "artifacts": {"commit", "errors", "mixture", "model_files", "places", "records", "storage"}
    | {"urls"},
    "gate": {"pyarrow", "errors"},
    "registry": {"artifacts", "checkpoint", "commit", "conditional", "errors", "lease", "mixture"}
    | {"places", "records", "storage", "urls"},
    # What people look at: neither torch, nor Ray, nor files.
    "planes": {"numpy"},
    "svg": {"matplotlib"},
    "figures": {"matplotlib", "numpy", "formats", "planes", "svg"},
    "report": {"jinja2", "markupsafe", "numpy", "figures", "formats", "planes", "svg"},
    # scikit-learn's face; a lake's rows are fitted where the cluster is.
    "trials": TENSORS
    | {"cohort", "families", "kernel", "lanes", "parameters", "shards", "statistics"},
    "resident": TENSORS | {"kernel", "shards", "statistics"},
    "shares": TENSORS | {"inputs", "numpy", "sklearn"},
    "assembly": TENSORS
    | {"cluster", "config", "errors", "failures", "lake", "limits", "loading", "opened"}
    | {"parameters", "selection", "sweep"},
    "estimator": {"numpy", "sklearn", "torch"}
    | {"assembly", "config", "em", "errors", "families", "inputs", "mixture", "opened"}
    | {"parameters", "resident", "selection", "shards", "shares", "soundness", "statistics"}
    | {"trials", "weighting"},
    "grid": {"matplotlib", "pandas", "torch"}
    | {"assembly", "config", "errors", "estimator", "families", "formats", "inputs", "opened"}
    | {"resident", "selection", "sweep"},
    "bayesian": {"numpy", "sklearn", "torch"}
    | {"assembly", "config", "estimator", "families", "inputs", "kernel", "opened", "parameters"}
    | {"resident", "search", "selection", "shards", "statistics", "sweep", "trials"}
    | {"variational"},
    "__init__": {"artifacts", "bayesian", "errors", "estimator", "grid", "mixture", "opened"}
    | {"parameters"},
}


def imports_of(path: Path) -> set[str]:
    """Return what a module imports: modules of ours by their names, other packages by theirs."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            if node.module == "gmm_dist":
                found |= {f"gmm_dist.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    parts = [name.split(".") for name in found if name.split(".")[0] not in sys.stdlib_module_names]
    return {name[1] if name[0] == "gmm_dist" else name[0] for name in parts}


MODULES = {path.stem: imports_of(path) for path in sorted(PACKAGE.glob("*.py"))}


def test_every_module_has_a_row_and_no_row_is_left_over():
    assert set(MODULES) == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_it_may(module):
    assert MODULES[module] <= MAY_IMPORT[module]


def test_imports_run_one_way():
    """The table's order is one in which each module needs only those above it."""
    above: set[str] = set()
    for module, allowed in MAY_IMPORT.items():
        ours = allowed & set(MAY_IMPORT)
        assert ours <= above, f"{module} may import {ours - above}, which come later"
        above.add(module)


def test_the_library_neither_reads_arguments_nor_configures_logging():
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        for word in ("sys.argv", "basicConfig"):
            assert word not in text, f"{path.name}: {word}"


def test_shapes_are_checked_of_every_module_that_tells_them():
    """Each is named to jaxtyping, which else passes over its annotations without a word."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    options = settings["tool"]["pytest"]["ini_options"]["addopts"].split()
    (option,) = (option for option in options if option.startswith("--jaxtyping-packages="))
    named = {name.removeprefix("gmm_dist.") for name in option.partition("=")[2].split(",")}
    assert {name for name, found in MODULES.items() if "jaxtyping" in found} <= named


def test_a_files_tests_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """Where a version of pytest-xdist loses the groups, each process has a cluster of its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_layers.py")
