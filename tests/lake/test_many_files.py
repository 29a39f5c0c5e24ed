"""Many files: planning tells how far it is, and keeps little of each."""

from __future__ import annotations

import gc
import io
import logging
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmm_dist.lake import survey
from gmm_dist.lake.load import loader_for
from gmm_dist.lake.parquet.footers import require_sound
from gmm_dist.lake.plan import plan_lake


def one_file() -> bytes:
    sink = io.BytesIO()
    table = pa.table({f"x{i}": np.arange(32.0) for i in range(8)})
    pq.write_table(table, sink)
    return sink.getvalue()


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_looking_at_a_footer_keeps_nothing() -> None:
    """Arrow keeps what a source raises while it is read ahead: 10 to 40 KB for each file."""
    data, n = one_file(), 1000
    metadata = pq.read_metadata(io.BytesIO(data))

    def look() -> None:
        require_sound(metadata, len(data), range(8))

    for _ in range(100):
        look()
    gc.collect()
    before = resident()
    for _ in range(n):
        look()
    gc.collect()
    assert (resident() - before) / n < 2000


def test_planning_tells_how_many_footers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.parquet").write_bytes(one_file())
    read = survey.opened_first

    def slowly(*args: object, **options: object) -> object:
        time.sleep(0.05)
        return read(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(survey, "opened_first", slowly)
    monkeypatch.setattr(survey, "_TELL_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        assert plan_lake(str(tmp_path)).n_rows == 4 * 32
    told = [m for m in caplog.messages if m.startswith("read the footers of ")]
    assert [line.split(" files")[0] for line in told] == [
        f"read the footers of {done} of 4" for done in (1, 2, 3)
    ]
    assert told[0].endswith("s left")


def test_a_workers_plan_has_its_files_alone_and_reads_the_same_rows(tmp_path: Path) -> None:
    for i in range(50):
        table = pa.table({"x": np.arange(20.0) + 100 * i, "y": np.ones(20)})
        pq.write_table(table, tmp_path / f"{i:02d}.parquet", row_group_size=7)
    loader = loader_for(plan_lake(str(tmp_path), n_shards=8, holdout=0.2, where="x > 4"))
    plan = loader.plan
    for shards in (range(2), range(2, 5), range(5, 8)):
        part = pickle.loads(pickle.dumps(loader.part(shards)))
        assert part.plan.n_shards == 8
        assert len(part.plan.files) < len(plan.files) / 2
        assert len(pickle.dumps(part)) < len(pickle.dumps(loader)) / 2
        for shard in shards:
            for kind in ("blocks", "held_out"):
                found = getattr(part(shard), kind)
                assert [b.X.tolist() for b in found] == [
                    b.X.tolist() for b in getattr(loader(shard), kind)
                ]
