"""Sums along the plan's tree have the same bits wherever and whenever shards are summed."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from dataclasses import dataclass

import mixtures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, HeldOut, ShardRows
from gmm_dist.shards.tree_sum import Partial, TreeSum, run_on


@dataclass(frozen=True)
class Number:
    """A float64 whose sum depends on the order of addition."""

    value: float

    def __add__(self, other: Number) -> Number:
        return Number(self.value + other.value)


@dataclass(frozen=True)
class Words:
    """A sum that writes down how it was added."""

    text: str

    def __add__(self, other: Words) -> Words:
        return Words(f"({self.text} {other.text})")


def number_of(rows: ShardRows) -> Number:
    """Return a value of the shard's own, over 18 orders of magnitude (a task)."""
    return Number(random.Random(rows.shard).uniform(-1, 1) * 10 ** (rows.shard * 7 % 19))


def name_of(rows: ShardRows) -> Words:
    return Words(str(rows.shard))


def shard(i: int) -> ShardRows:
    return ShardRows(shard=i, blocks=[Block(torch.zeros(1, i % 3))])


def n_rows(n_shards: int) -> int:
    return sum(i % 3 for i in range(n_shards))


def tree_of(task, assignment: list[list[int]], n_shards: int, order: random.Random):
    """Let each worker sum its shards, and add what they send in random order."""
    sent = []
    for shards in assignment:
        order.shuffle(shards)
        sent += run_on(task, [shard(i) for i in shards], n_shards)
    order.shuffle(sent)
    tree = TreeSum(n_shards)
    for partial in sent:
        tree.push(partial)
    return tree.total(n_rows(n_shards)), sent


@mixtures.FIXED
@given(n_shards=st.integers(1, 40), n_workers=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_any_assignment_and_order_give_the_same_bits(n_shards, n_workers, seed):
    order = random.Random(seed)
    alone, _ = tree_of(number_of, [list(range(n_shards))], n_shards, order)
    scattered: list[list[int]] = [[] for _ in range(n_workers)]
    for i in range(n_shards):
        order.choice(scattered).append(i)
    cuts = sorted(order.randint(0, n_shards) for _ in range(n_workers - 1))
    contiguous = [list(range(a, b)) for a, b in itertools.pairwise([0, *cuts, n_shards])]
    for assignment in (scattered, contiguous):
        total, _ = tree_of(number_of, assignment, n_shards, order)
        assert total == alone  # to the last bit


def test_the_values_of_that_test_would_tell_another_order():
    values = [number_of(shard(i)).value for i in range(40)]
    tree, _ = tree_of(number_of, [list(range(40))], 40, random.Random(0))
    assert len({sum(values), sum(reversed(values)), math.fsum(values), tree.value}) > 1


def test_the_tree_is_the_plans():
    total, _ = tree_of(name_of, [[4, 1, 0], [3, 2]], 5, random.Random(0))
    assert total == Words("(((0 1) (2 3)) 4)")


@mixtures.FIXED
@given(n_shards=st.integers(1, 40), n_workers=st.integers(1, 6))
def test_a_worker_with_a_range_sends_few_sums(n_shards, n_workers):
    edges = [n_shards * i // n_workers for i in range(n_workers + 1)]
    for a, b in itertools.pairwise(edges):
        sent = run_on(number_of, [shard(i) for i in range(a, b)], n_shards)
        assert len(sent) <= 2 * math.log2(max(2, b - a)) + 1


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4, 7, 8])
def test_a_shard_counted_twice_is_our_mistake(n_shards):
    for again in range(n_shards):
        tree = TreeSum(n_shards)
        for i in range(n_shards):
            tree.push(Partial(level=0, index=i, n_rows=1, summary=Number(1.0)))
        with pytest.raises(AssertionError, match="counted twice"):
            tree.push(Partial(level=0, index=again, n_rows=1, summary=Number(1.0)))


def test_a_subtree_that_overlaps_a_shard_is_our_mistake():
    tree = TreeSum(4)
    for partial in (
        Partial(level=0, index=1, n_rows=1, summary=Number(1.0)),
        Partial(level=1, index=1, n_rows=2, summary=Number(2.0)),
    ):
        tree.push(partial)
    with pytest.raises(AssertionError, match="counted twice"):
        _push_and_total(tree, Partial(level=1, index=0, n_rows=2, summary=Number(2.0)))


def _push_and_total(tree, partial):
    tree.push(partial)
    return tree.total()


def test_a_shard_that_is_missing_is_our_mistake():
    tree = TreeSum(3)
    tree.push(Partial(level=0, index=0, n_rows=1, summary=Number(1.0)))
    tree.push(Partial(level=0, index=2, n_rows=1, summary=Number(1.0)))
    with pytest.raises(AssertionError, match="a shard has not been counted"):
        tree.total()


def test_rows_that_are_missing_are_our_mistake():
    tree = TreeSum(2)
    for i in range(2):
        tree.push(Partial(level=0, index=i, n_rows=5, summary=Number(1.0)))
    with pytest.raises(AssertionError, match="10 rows, not 11"):
        tree.total(11)


@dataclass(frozen=True, eq=False)
class Product:
    value: torch.Tensor

    def __add__(self, other: Product) -> Product:
        return Product(self.value + other.value)


def gram(rows: ShardRows) -> Product:
    return Product(sum((b.X @ b.X.T for b in rows.blocks), torch.zeros(8, 8)))


def test_threads_do_not_change_a_bit():
    X = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    one, two = (LocalShards.of(X, n_shards=7, n_threads=n).run(gram).value for n in (1, 2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, X.T @ X, rtol=1e-4, atol=1e-2)


@mixtures.FIXED
@given(n=st.integers(0, 20), n_shards=st.integers(1, 25))
def test_rows_are_dealt_once_in_order(n, n_shards):
    X, weight = torch.arange(2.0 * n).view(n, 2), torch.arange(float(n))
    shards = LocalShards.of(X, weight, n_shards=n_shards)
    assert shards.n_shards == n_shards
    got = shards.run(lambda rows: Rows(tuple(rows.blocks)))
    assert torch.equal(torch.cat([block.X for block in got.blocks], 1), X.T)
    assert torch.equal(torch.cat([block.sample_weight for block in got.blocks]), weight)
    assert all(block.X.is_contiguous() for block in got.blocks)


@dataclass(frozen=True, eq=False)
class Rows:
    blocks: tuple[Block, ...]

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.blocks + other.blocks)


def rows_of(rows: ShardRows) -> Rows:
    return Rows(tuple(rows.blocks))


def test_a_task_sees_held_out_rows_through_their_wrapper_alone():
    fitted, held = Block(torch.ones(2, 5)), Block(torch.zeros(2, 3), torch.ones(3))
    shards = LocalShards(
        [ShardRows(shard=0, blocks=[fitted]), ShardRows(shard=1, blocks=[], held_out=[held])]
    )
    assert [block.X.shape[1] for block in shards.run(rows_of).blocks] == [5]
    assert [block.X.shape[1] for block in shards.run(HeldOut(rows_of)).blocks] == [3]
    assert shards.run(HeldOut(name_of)) == Words("(0 1)")  # a shard keeps its number


def test_the_wrapped_task_counts_shards_once_as_others_do():
    rows = [
        ShardRows(shard=i, blocks=shard(i).blocks, held_out=[Block(torch.zeros(1, 7))])
        for i in range(5)
    ]
    task = pickle.loads(pickle.dumps(HeldOut(name_of)))
    for sent in (run_on(task, rows, 5), run_on(name_of, rows, 5)):
        tree = TreeSum(5)
        for partial in sent:
            tree.push(partial)
        assert tree.total(n_rows(5)) == Words("(((0 1) (2 3)) 4)")


def test_held_out_rows_move_to_a_device_with_the_others():
    block = Block(torch.zeros(1, 4), torch.ones(4))
    moved = ShardRows(shard=3, blocks=[block], counts="counts", held_out=[block]).to(
        torch.device("meta")
    )
    assert (moved.shard, moved.counts) == (3, "counts")
    for (only,) in (moved.blocks, moved.held_out):
        assert {only.X.device.type, only.sample_weight.device.type} == {"meta"}
