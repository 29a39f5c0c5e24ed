"""Chunks of rows: where they are cut, how long they are, and that one rule serves all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretended_cuda import pretended_cuda

import gmm_dist
from gmm_dist.chunks import chunk_rows, cuts
from gmm_dist.shards.local import one_thread
from gmm_dist.shards.protocol import Block, ShardRows

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@given(n=st.integers(0, 20_000), most=st.integers(16, 3000))
def test_cuts_are_equal_aligned_and_cover_all_rows_once(n, most):
    parts = list(cuts(n, most))
    assert [row for part in parts for row in range(n)[part]] == list(range(n))
    lengths = [part.stop - part.start for part in parts]
    assert all(0 < length <= most for length in lengths)
    assert all(part.start % 16 == 0 for part in parts)
    assert not lengths or max(lengths[:-1] or lengths) - min(lengths[:-1] or lengths) <= 16


@pytest.mark.parametrize(
    ("width", "device", "expected"),
    [(1, CPU, 2048), (1024, CPU, 1024), (10**6, CPU, 256), (1, GPU, 131_072), (10**6, GPU, 2048)],
)
def test_a_chunk_has_so_many_rows(width, device, expected):
    with one_thread(), pretended_cuda():
        assert chunk_rows(width, device) == expected


def test_several_threads_share_longer_chunks():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert chunk_rows(64, CPU) == 65_536
    finally:
        torch.set_num_threads(before)


def test_a_shards_chunks_are_those_of_its_blocks_with_their_weights():
    first, second = torch.arange(5000.0).expand(2, -1), -torch.arange(40.0).expand(2, -1)
    weight = torch.arange(40.0, dtype=torch.float64)
    rows = ShardRows(shard=3, blocks=[Block(first), Block(second, weight)])
    with one_thread():
        chunks = list(rows.chunks(1))
    assert [chunk.X.shape[1] for chunk in chunks] == [1664, 1664, 1672, 40]
    assert torch.equal(torch.cat([chunk.X for chunk in chunks[:3]], 1), first)
    assert torch.equal(torch.cat([chunk.weights for chunk in chunks[3:]]), weight)
    every = rows.every(7)
    assert (every.shard, every.n_rows) == (3, 715 + 6)
    assert torch.equal(every.blocks[1].weights, weight[::7])


def test_rows_say_where_they_are():
    on_meta = ShardRows(shard=0, blocks=[Block(torch.empty(2, 3, device="meta"))])
    assert on_meta.device.type == "meta"
    assert ShardRows(shard=0, blocks=[]).device == CPU
    assert list(ShardRows(shard=0, blocks=[]).chunks(1)) == []


def test_no_module_has_a_chunk_length_of_its_own():
    package = Path(gmm_dist.__file__).parent
    for path in sorted({*package.rglob("*.py")} - {package / "chunks.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                # Parquet's column chunks are something else.
                assert "CHUNK" not in node.id or path.name == "survey.py", (path, node.id)
