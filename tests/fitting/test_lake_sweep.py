"""Workers that hold a lake's rows end with the fit, however it ends."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lakes
import mixtures
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from here import HereShards

from gmm_dist import (
    BayesianGaussianMixture,
    GaussianMixture,
    Lake,
    Mixture,
    UserError,
    save,
    select,
)
from gmm_dist.config import Cluster
from gmm_dist.em import loop
from gmm_dist.fitting.lake_scores import scores_of_lake
from gmm_dist.fitting.lake_sweep import loader_of, resident, with_resamples
from gmm_dist.lake.plan import plan_lake
from gmm_dist.scoring.options import ScoreOptions
from gmm_dist.scoring.score import score_lake
from gmm_dist.selection.ranking import Candidate
from gmm_dist.shards import ray_shards
from gmm_dist.shards.connection import connected

STEPS = ("worker_memory", "load", "the fit", "nothing")


@pytest.mark.parametrize("step", STEPS)
def test_workers_do_not_outlive_a_fit_that_fails(step, tmp_path, monkeypatch):
    done: list[str] = []

    def go_on(name: str) -> None:
        done.append(name)
        if name == step:
            raise RuntimeError(name)

    class Workers(HereShards):
        n_workers, on_gpu = 1, False

        def __init__(self, loader, n_shards, cluster, faults=None, *, reserve=0, gpu_reserve=0):
            super().__init__(loader, n_shards)
            done.append("start")

        def worker_memory(self):
            go_on("worker_memory")
            return 1 << 40

        def load(self, *watch):
            go_on("load")
            return super().load(*watch)

        def close(self):
            done.append("close")

    monkeypatch.setattr(ray_shards, "RayShards", Workers)
    monkeypatch.setattr(ray_shards, "connected", lambda cluster: nullcontext())
    lakes.write(tmp_path / "a.parquet", {"x": np.arange(9.0)})
    candidates = [Candidate(2, "full")]
    loader = loader_of(plan_lake(str(tmp_path)), candidates, Cluster())
    with (
        nullcontext() if step == "nothing" else pytest.raises(RuntimeError, match=step),
        resident(loader, candidates, Cluster()) as (shards, _),
    ):
        assert shards.n_shards == 1
        go_on("the fit")
    assert done[0] == "start"
    assert done[-1] == "close"
    assert done.count("close") == 1


GROUPS, ROWS = 40, 30  # row groups of each of three files, and rows of each group
FAR = 20  # a row group of the file in the middle that the driver does not look into


def three_files(folder: Path) -> Path:
    """Write a lake of two clusters, and return the file in the middle."""
    for part in range(3):
        X = lakes.numbers(2 * GROUPS * ROWS, seed=part).reshape(2, -1)
        X[:, ::2] += 8
        path = folder / f"{part}.parquet"
        lakes.write(path, {"x": X[0], "y": X[1]}, rows_per_group=ROWS)
    return folder / "1.parquet"


def spoil_a_row(path: Path) -> None:
    table = pq.read_table(path)
    x = table["x"].to_numpy().copy()
    x[FAR * ROWS + 7] = np.nan
    lakes.write(path, {"x": x, "y": table["y"]}, rows_per_group=ROWS)


def spoil_a_page(path: Path) -> None:
    chunk = pq.read_metadata(path).row_group(FAR).column(0)
    data = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    data[first : first + 40] = b"\xff" * 40
    path.write_bytes(data)


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, module: object, name: str, after: int):
    """Press Ctrl-C in the driver, between the passes."""
    left = iter(range(after))
    before = getattr(module, name)

    def press(*taken: object, **options: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return before(*taken, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, press)
        yield


def our_actors() -> list[str]:
    names = [str(name) for name in ray.util.list_named_actors()]
    return [name for name in names if name.startswith("gmm_dist ")]


def held_objects() -> list[str]:
    """Return the ids of all objects in Ray's store that this process holds."""
    gc.collect()
    counts = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    return [name.decode() for name in counts]


def put_objects() -> list[str]:
    """Return the ids of those that it has put there: their task is the driver itself."""
    return [name for name in held_objects() if name[2:].startswith("f" * 16)]


def require_clean(n_cpus: float) -> None:
    """Wait a moment for Ray, which ends actors, frees objects and CPUs when it gets to it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        is_free = ray.available_resources().get("CPU", 0) == n_cpus
        if is_free and not our_actors() and not put_objects():
            break
        time.sleep(0.05)
    assert our_actors() == []
    assert ray.available_resources()["CPU"] == n_cpus
    assert put_objects() == []


@pytest.mark.faults
def test_nothing_survives_a_fit_that_fails_in_a_process_that_stays_connected(
    tmp_path, monkeypatch, ray_address
):
    for name, spoil in (("good", None), ("row", spoil_a_row), ("page", spoil_a_page)):
        middle = three_files(tmp_path / name)
        if spoil is not None:
            spoil(middle)
    good, bad_row, bad_page = (Lake(tmp_path / name) for name in ("good", "row", "page"))
    model, cluster = GaussianMixture(2, n_init=1, random_state=0), Cluster(num_workers=1)
    posterior = BayesianGaussianMixture(n_components=2, max_iter=3, n_init=2, tol=1e9)
    start = Mixture(parameters=mixtures.parameters("full", 2, 2), feature_names=("x", "y"))
    scoring = ScoreOptions(
        data=bad_page.url, model=save(start, tmp_path / "model"), output=str(tmp_path / "scores")
    )
    kept = []  # a notebook keeps the last error, and all that its traceback refers to
    with connected(Cluster(ray_address)):
        n_cpus = ray.cluster_resources()["CPU"]
        with pytest.raises(UserError, match=r"1\.parquet, row group 20, row 7: column 'x' is") as e:
            model.fit(bad_row, cluster=cluster)
        kept.append(e)
        require_clean(n_cpus)
        with pytest.raises(UserError, match=r"1\.parquet") as e:
            select(bad_page, 2, "full", n_init=1, cluster=cluster)
        kept.append(e)
        require_clean(n_cpus)
        for estimator in (model, posterior):
            with (
                interrupted(monkeypatch, loop, "task_of", 3),
                pytest.raises(KeyboardInterrupt) as e,
            ):
                estimator.fit(good, cluster=cluster)
            kept.append(e)
            require_clean(n_cpus)
        with pytest.raises(UserError, match=r"1\.parquet") as e:
            scores_of_lake(bad_page, start, cluster=cluster)
        kept.append(e)
        require_clean(n_cpus)
        with pytest.raises(UserError, match=r"1\.parquet") as e:
            score_lake(scoring)
        kept.append(e)
        require_clean(n_cpus)
        model.fit(good, cluster=cluster)
        require_clean(n_cpus)
        assert sorted(np.round(model.means_[:, 0] / 8)) == [0, 1]
        assert len(kept) == 6
        del kept, e
        assert held_objects() == []


def test_memory_is_that_of_the_candidates_or_of_the_resamples() -> None:
    few, many = Candidate(2, "full"), Candidate(30, "full")
    assert with_resamples([few, many], 0, 8) == [few, many]
    assert with_resamples([few, many], 50, 8) == [many] * 50
    assert with_resamples([many] * 40, 5, 8) == [many] * 40
    # They take turns where their statistics are many.
    assert len(with_resamples([Candidate(100, "full")], 50, 64)) == 39
