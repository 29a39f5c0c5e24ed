"""How deltalake is told to reach a table on S3, and how its failures are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.asyn import get_loop

from gmm_dist.errors import UserError
from gmm_dist.lake.tables import access
from gmm_dist.storage import StorageFailed


def store(endpoint: str, **more: Any) -> Any:
    """Return what is asked of a file system on S3, without one."""
    meta = SimpleNamespace(endpoint_url=endpoint, region_name="eu-west-1")
    headers = {"x-amz-bucket-region": "eu-central-1"}
    options = {"anon": False, "key": "K", "secret": "S", "token": "T"} | more
    return SimpleNamespace(
        connect=lambda: SimpleNamespace(meta=meta),
        call_s3=lambda name, Bucket: {"ResponseMetadata": {"HTTPHeaders": headers}},
        loop=get_loop(),
        **options,
    )


def test_amazons_own_s3_is_asked_where_a_bucket_is() -> None:
    options = access._s3_options(store("https://s3.eu-west-1.amazonaws.com"), "lake")
    keys = {"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S", "AWS_SESSION_TOKEN": "T"}
    assert options == {"AWS_REGION": "eu-central-1", **keys}


def test_other_stores_are_asked_at_their_endpoint() -> None:
    options = access._s3_options(store("http://10.0.0.1:9000", token=None), "lake")
    assert options["AWS_ENDPOINT_URL"] == "http://10.0.0.1:9000"
    assert options["AWS_ALLOW_HTTP"] == "true"
    assert "AWS_SESSION_TOKEN" not in options
    anonymous = access._s3_options(store("https://store.example", anon=True), "lake")
    assert anonymous == {
        "AWS_REGION": "eu-west-1",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_ENDPOINT_URL": "https://store.example",
        "AWS_ALLOW_HTTP": "false",
    }


def test_outages_are_no_errors_of_the_user() -> None:
    outage = "Generic S3 error: error sending request\nfor url (http://10.0.0.1:9000/lake)"
    with pytest.raises(
        StorageFailed,
        match=r"^s3://lake/t: the storage failed as deltalake was to read the table's log",
    ):
        raise_within(OSError(outage))
    with pytest.raises(
        UserError, match=r"^s3://lake/t: deltalake cannot read the table's log .odd"
    ):
        raise_within(RuntimeError("odd"))
    with pytest.raises(UserError, match="asks its readers for 'mystery', which is not known here"):
        raise_within(RuntimeError("Kernel error: Unsupported: Feature 'mystery' is not supported"))


def raise_within(error: Exception) -> None:
    with access.told_in_a_line("s3://lake/t"):
        raise error
