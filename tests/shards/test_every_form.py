"""Whatever form a pass takes, its bits do not depend on the number of workers, or on a loss."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence

import mixtures
import pytest
import torch
from tasks import pid

from gmm_dist import compiling
from gmm_dist.config import Cluster, EMConfig
from gmm_dist.em import precision
from gmm_dist.em.estep import SumMoments
from gmm_dist.em.lane import Lane
from gmm_dist.em.loop import fit
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows, Shards
from gmm_dist.shards.ray_shards import RayShards, session

N_SHARDS, D = 7, 6
START = [mixtures.parameters(kind, 5, D, spread=4.0) for kind in ("full", "tied", "diag")]

FORMS = {
    # The survivors per row up to which the centred form is taken for float32's products and for
    # float64's, and above which it takes all pairs.
    "float32": (-2.0, -2.0, -1.0),
    "float64": (-2.0, -2.0, -1.0),
    "pruned": (math.inf, math.inf, math.inf),
    "all pairs": (-1.0, -1.0, -1.0),
}


def load(shard: int) -> ShardRows:
    X = mixtures.rows(START[0], 900 + 50 * shard, seed=shard).float()
    return ShardRows(shard=shard, blocks=[Block(X.T.contiguous())])


def fitted(shards: Shards, form: str, kill_after: int = 0) -> tuple[list[bytes], set[str]]:
    """Return the bits of fits, and the forms of their passes; an actor is killed after one pass."""
    forms, n_passes = set(), 0

    def watch(lanes: Sequence[Lane]) -> None:
        nonlocal n_passes
        n_passes += 1
        forms.update(
            "all pairs" if lane.policy.all_pairs else lane.policy.form.name.lower()
            for lane in lanes
            if lane.is_running
        )
        if n_passes == kill_after:
            os.kill(min(shards.run(pid).pids), signal.SIGKILL)

    total = shards.run(SumMoments(D))
    mode = form if form.startswith("float") else "auto"
    config = EMConfig(tol=0.0, max_iter=9, precision=mode, compile_from=0)
    results = fit(shards, START, config, total, watch=watch)
    arrays = [
        part.numpy().tobytes()
        for result in results
        for part in (result.parameters.means, result.parameters.covariances)
    ]
    return arrays, forms


@pytest.mark.faults
@pytest.mark.skipif(not compiling.can_compile(), reason="needs Numba")
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_workers_and_a_killed_one_give_the_same_bits(
    form: str, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "most_survivors", lambda *shape, compiled: FORMS[form])
    torch.set_num_threads(1)
    expected, forms = fitted(LocalShards([load(shard) for shard in range(N_SHARDS)]), form)
    assert {"pruned": "centred"}.get(form, form) in forms
    for n_workers, kill_after in ((1, 0), (2, 4), (4, 0)):
        with session(load, N_SHARDS, Cluster(ray_address, num_workers=n_workers)) as shards:
            shards.load()
            assert isinstance(shards, RayShards)
            assert fitted(shards, form, kill_after)[0] == expected
