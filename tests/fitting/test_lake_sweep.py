"""Workers that hold a lake's rows end with the fit, however it ends."""

from __future__ import annotations

from contextlib import nullcontext

import lakes
import numpy as np
import pytest
from here import HereShards

from gmm_dist.config import Cluster
from gmm_dist.fitting import lake_sweep
from gmm_dist.fitting.lake_sweep import resident_lake
from gmm_dist.lake.plan import plan_lake
from gmm_dist.selection.ranking import Candidate

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

        def __init__(self, loader, n_shards, cluster, faults=None, *, reserve=0):
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

    monkeypatch.setattr(lake_sweep, "RayShards", Workers)
    monkeypatch.setattr(lake_sweep, "connected", lambda cluster: nullcontext())
    lakes.write(tmp_path / "a.parquet", {"x": np.arange(9.0)})
    plan = plan_lake(str(tmp_path))
    with (
        nullcontext() if step == "nothing" else pytest.raises(RuntimeError, match=step),
        resident_lake(plan, [Candidate(2, "full")], Cluster()) as (shards, _),
    ):
        assert shards.n_shards == 1
        go_on("the fit")
    assert done[0] == "start"
    assert done[-1] == "close"
    assert done.count("close") == 1
