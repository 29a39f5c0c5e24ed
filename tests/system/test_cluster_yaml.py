"""cluster.yaml is one that Ray accepts, and it keeps our habits; no network, no cloud."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES: dict[str, Any] = CLUSTER["available_node_types"]
WORKERS = {name: kind for name, kind in TYPES.items() if name != CLUSTER["head_node_type"]}


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Ray's defaults and check the whole against Ray's own schema."""
    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return dict(full)


def test_ray_accepts_it() -> None:
    full = prepared(CLUSTER)
    # What we say comes through the merge with Ray's defaults.
    for name, kind in TYPES.items():
        assert full["available_node_types"][name]["node_config"] == kind["node_config"]
    assert full["head_setup_commands"] == [
        *CLUSTER["setup_commands"],
        *CLUSTER["head_setup_commands"],
    ]
    assert any("--autoscaling-config" in line for line in full["head_start_ray_commands"])


def test_ray_refuses_what_it_does_not_know() -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        prepared(CLUSTER | {"idle_minutes": 5})
    gpu = TYPES["gpu"] | {"resources": {"GPU": "one"}}
    with pytest.raises(jsonschema.ValidationError, match="'one' is not of type 'integer'"):
        prepared(CLUSTER | {"available_node_types": TYPES | {"gpu": gpu}})


def test_no_shard_lands_on_the_head_and_the_head_stays() -> None:
    head = TYPES[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_come_and_go() -> None:
    assert WORKERS
    for kind in WORKERS.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["resources"]["GPU"] >= 1
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= CLUSTER["max_workers"]
    # Launching and setting up a worker takes about ten minutes.
    assert CLUSTER["idle_timeout_minutes"] > 10
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False


def test_images_are_pinned_to_the_tested_ray_and_python() -> None:
    pins = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pins == [ray.__version__]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    tag = f"rayproject/ray:{pins[0]}-{python}"
    docker = CLUSTER["docker"]
    assert (docker["head_image"], docker["worker_image"]) == (f"{tag}-cpu", f"{tag}-gpu")


def test_every_node_asks_for_the_token() -> None:
    assert "-e RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert CLUSTER["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_setup_lists_the_dependencies_and_not_the_package(tmp_path: Path) -> None:
    (command,) = CLUSTER["setup_commands"]
    assert "pip install -c constraints.txt" in command
    # All but pip runs here, with the mounted folder in its place.
    listing, _, _ = command.partition("&& pip")
    target = tmp_path / "requirements.txt"
    listing = listing.replace("/home/ray/gmm_dist", str(ROOT))
    listing = listing.replace("/tmp/requirements.txt", str(target))
    listing = listing.replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-ec", listing], check=True, timeout=30)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert target.read_text().splitlines() == project["dependencies"]
    # rsync must bring both files that the command reads.
    assert CLUSTER["file_mounts"]["/home/ray/gmm_dist"] == "."
    assert not {"pyproject.toml", "constraints.txt"} & set(CLUSTER["rsync_exclude"])
