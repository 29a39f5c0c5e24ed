"""deploy/nightly.yaml parses, refers to what it defines, and runs a command that our job takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from gmm_dist.commands import nightly

ROOT = Path(__file__).parents[2]
MANIFESTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((ROOT / "deploy" / "nightly.yaml").read_text())
)


def named(kind: str) -> dict[str, Any]:
    return {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == kind}


def ray_job() -> dict[str, Any]:
    text: str = named("ConfigMap")["gmm-nightly"]["data"]["rayjob.yaml"]
    night = text.replace("NIGHT", "2026-11-21").replace("NAME", "gmm-nightly-2026-11-21-023000")
    job: dict[str, Any] = yaml.safe_load(night)
    return job


def test_one_run_at_a_time_and_it_waits_for_its_end() -> None:
    spec = named("CronJob")["gmm-nightly"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert "while true" in container["args"][0]
    assert pod["serviceAccountName"] in named("ServiceAccount")
    (volume,) = pod["volumes"]
    assert volume["configMap"]["name"] in named("ConfigMap")
    (rule,) = named("Role")["gmm-nightly"]["rules"]
    assert set(rule["verbs"]) == {"create", "get"}


def test_the_ray_job_is_of_the_tested_ray_and_does_not_run_twice() -> None:
    job = ray_job()
    spec = job["spec"]
    assert len(job["metadata"]["name"]) <= 47  # KubeRay makes longer names of it
    assert spec["backoffLimit"] == 0
    cluster = spec["rayClusterSpec"]
    pinned = re.search(r"^ray(?:\[\w+\])?==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] in named("ServiceAccount")
        assert pod["containers"][0]["image"] == "gmm-dist:0.1.0"


def test_the_job_takes_the_command() -> None:
    python, script, *argv = shlex.split(ray_job()["spec"]["entrypoint"])
    assert (python, script) == ("python", "/home/ray/gmm_dist/jobs/nightly.py")
    options = nightly._parse(argv)
    assert options.night == "2026-11-21"
    assert options.output == "s3://models/points/models/2026-11-21"
    assert options.resume
    assert options.partition == ("ds",)


def test_the_image_holds_what_it_needs_and_the_ray_that_the_tests_run_with() -> None:
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert f"ray=={arguments['RAY']}" in (ROOT / "constraints.txt").read_text().split()
    assert arguments["DEVICE"] == "cpu"
    copied = [
        source
        for line in re.findall(r"^COPY --chown=\S+ (.*)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert kept == set(copied)
