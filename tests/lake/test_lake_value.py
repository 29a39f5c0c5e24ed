"""A lake and a cluster as values: they are checked, compared, printed and sent."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

import gmm_dist
from gmm_dist import Cluster, Lake, UserError
from gmm_dist.urls import Url, reveal


def test_lakes_of_the_same_rows_are_equal_and_hash_alike():
    one = Lake(url="s3://lake/x", columns=["a", "b"], where="c > 1", holdout=0.1)
    same = Lake(url=Url("s3://lake/x"), columns=("a", "b"), where="c > 1", holdout=0.1)
    assert one == same
    assert {one: 1}[same] == 1
    assert one != dataclasses.replace(one, missing="drop")
    assert pickle.loads(pickle.dumps(one)) == one
    some = [Lake(url="x", where=(pc.field("a") > 1) & pc.field("b").is_valid()) for _ in range(2)]
    assert len({*some, pickle.loads(pickle.dumps(some[0]))}) == 1
    assert some[0] != Lake(url="x", where=pc.field("a") > 1)
    assert Lake(url=Path("a") / "b") == Lake(url="a/b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.url = "s3://other"  # type: ignore[misc]


def test_columns_are_names_of_any_collection_in_order():
    names = pd.DataFrame({"y": [0.0], "x": [1.0]}).columns
    for columns in (["y", "x"], ("y", "x"), names, np.array(["y", "x"]), iter(["y", "x"])):
        lake = Lake(url="x", columns=columns)
        assert lake.columns == ("y", "x")
        assert [type(name) for name in lake.columns] == [str, str]


def test_a_lake_that_travels_keeps_its_credentials_and_shows_none():
    lake = pickle.loads(pickle.dumps(Lake(url="https://me:hidden@host/x?sig=hidden")))
    assert "hidden" not in f"{lake} {lake!r} {lake.url}"
    assert reveal(lake.url) == "https://me:hidden@host/x?sig=hidden"
    assert reveal(dataclasses.replace(lake, missing="drop").url) == reveal(lake.url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": ""}, "url is empty"),
        ({"url": b"x"}, "url is b'x': give the path or URL"),
        ({"url": None}, "url is None: give the path or URL"),
        ({"columns": "income"}, r"columns is 'income': give a list of names"),
        ({"columns": 3}, "columns is 3: give a list of names"),
        ({"columns": []}, "columns is empty: name one at least"),
        ({"columns": ["x", 3]}, "columns has 3: give the name of a column"),
        ({"columns": ["x", ""]}, "columns has '': give the name of a column"),
        ({"columns": ["x", "y", "x"]}, "columns has 'x' twice"),
        ({"where": "x >"}, "x >"),
        ({"where": ""}, "--where|filter|where"),
        ({"where": 3}, "a filter of type int"),
        ({"where": pc.field(0) > 1}, "cannot be taken"),
        ({"weight_column": ""}, "weight_column has ''"),
        ({"weight_column": ["w"]}, r"weight_column has \['w'\]"),
        ({"columns": ["x", "w"], "weight_column": "w"}, "'w' is among columns too"),
        ({"missing": "skip"}, "missing is 'skip': give one of error, drop, mean"),
        ({"holdout": 1}, "holdout is 1: give a share of the rows, 0 <= share < 1"),
        ({"holdout": -0.1}, "holdout is -0.1"),
        ({"holdout": math.nan}, "holdout is nan"),
        ({"holdout": "0.1"}, "holdout is 0.1: give a share"),
        ({"holdout": True}, "holdout is True"),
    ],
)
def test_a_lake_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^[^\\n]*({message})[^\\n]*$"):
        Lake(**{"url": "nowhere"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0: give a whole number >= 1"),
        ({"num_workers": 1.5}, "num_workers is 1.5"),
        ({"num_workers": True}, "num_workers is True"),
        ({"use_gpu": 1}, "use_gpu is 1: give True, False or None"),
        ({"address": ""}, "address is '': give HOST:PORT"),
        ({"address": 6379}, "address is 6379: give HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{message}[^\\n]*$"):
        Cluster(**options)


def test_a_cluster_is_a_value():
    cluster = Cluster("10.0.0.1:6379", num_workers=2)
    assert pickle.loads(pickle.dumps(cluster)) == cluster
    assert len({cluster, Cluster("10.0.0.1:6379", 2)}) == 1


def test_the_function_that_named_lakes_is_gone_and_says_what_came():
    with pytest.raises(
        AttributeError, match=r"'open_lake': gmm_dist\.Lake\(url, \.\.\.\) .*Cluster"
    ):
        _ = gmm_dist.open_lake
    with pytest.raises(ImportError):
        from gmm_dist import open_lake  # noqa: F401
