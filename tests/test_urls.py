"""Credentials of a URL are shown nowhere, and get to where the URL is opened."""

from __future__ import annotations

import copy
import json
import pickle
import time
from dataclasses import asdict, dataclass

import pytest

from gmm_dist import storage
from gmm_dist.errors import RunFailed, UserError
from gmm_dist.lake.lake import Lake
from gmm_dist.runs.folder import Folder
from gmm_dist.urls import Url, redacted, reveal, without_secrets

SHOWN = [
    ("/data/a@b?c", "/data/a@b?c"),
    ("/data/x?token=1", "/data/x?token=1"),  # a local name
    ("s3://lake/a?b#c@d", "s3://lake/a?b#c@d"),
    ("s3://lake/a@b:c/x@y", "s3://lake/a@b:c/x@y"),
    ("s3://lake/dt=1?monkey=1/x", "s3://lake/dt=1?monkey=1/x"),
    ("s3://arn:aws:s3:eu:1:accesspoint/n/k@x", "s3://arn:aws:s3:eu:1:accesspoint/n/k@x"),
    ("https://host:8080/a@b/x", "https://host:8080/a@b/x"),
    ("file:///a:b@c", "file:///a:b@c"),
    ("abfs://container@account/x", "abfs://container@account/x"),
    ("s3://key:secret@lake/x", "s3://lake/x"),
    ("s3://AKIA:ab/c+d?e@lake/x", "s3://lake/x"),
    ("s3://lake/x?X-Amz-Signature=12", "s3://lake/x"),
    ("s3://lake/x?a=1&secret=12", "s3://lake/x"),
    ("ftp://user:secret@host:21/x", "ftp://host:21/x"),
    ("sftp://token@host/x", "sftp://host/x"),
    ("https://user:secret@host/x.parquet?X-Amz-Signature=1", "https://host/x.parquet"),
    ("https://us%3Aer:se%40cret@host/x", "https://host/x"),
    ("https://host/x?key=1&secret=2", "https://host/x"),
    ("https://host/x%3Ftoken%3Dabc", "https://host/x"),
    ("https://host/x#access_token=1", "https://host/x"),
    ("HTTPS://user:secret@host/x?sig=1", "HTTPS://host/x"),
    ("simplecache::https://u:pw@h/x?sig=1", "simplecache::https://h/x"),
    ("zip://a.parquet::s3://k:s@b/z", "zip://a.parquet::s3://b/z"),
    ("https://[broken?sig=1", "https://[broken"),
    ("http://u:p@[::1]:80/x?sig=1", "http://[::1]:80/x"),
    ("https://h/a::b?sig=1", "https://h/a::b"),
    ("https://user:p@ss@h/x", "https://h/x"),
    ("https://user:p/w@ss@h/x", "https://h/x"),
    ("https://h/x?next=http://y", "https://h/x"),
    ("https://h/x;token=abcdef", "https://h/x"),
    ("jdbc:postgresql://u:p@h/db?password=x", "jdbc:postgresql://h/db"),
]


@pytest.mark.parametrize(("url", "shown"), SHOWN)
def test_a_url_shows_itself_without_credentials(url, shown):
    assert Url(url) == redacted(url) == shown
    assert reveal(Url(url)) == url
    assert Url(url).is_secret == (url != shown)


def test_whatever_is_made_of_a_url_shows_none():
    @dataclass(frozen=True)
    class Holder:
        url: Url

    url = Url("https://user:hidden@host/x?sig=hidden")
    shown = "https://host/x"
    for text in (f"{url}", str(url), "".join([url]), url + "", url[:], repr(url)):
        assert text.strip("'") == shown
    assert json.loads(json.dumps({url: url})) == {shown: shown}
    assert "hidden" not in repr(Holder(url)) + json.dumps(asdict(Holder(url)))
    assert url == Url("https://host/x?sig=another")
    assert hash(url) == hash(shown)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, Url, lambda url: pickle.loads(pickle.dumps(url))]
)
def test_copies_still_open(again):
    url = Url("https://user:hidden@host/x?sig=hidden")
    assert reveal(again(url)) == "https://user:hidden@host/x?sig=hidden"


def test_parts_go_before_the_query():
    url = Url("https://user:a?b@host/x?sig=1")
    joined = storage.join(url, "y", "z.parquet")
    assert joined == "https://host/x/y/z.parquet"
    assert reveal(joined) == "https://user:a?b@host/x/y/z.parquet?sig=1"
    parent, name = storage.parent_and_name(Url("https://user:pw@host/x/y.parquet?sig=1"))
    assert (parent, name) == ("https://host/x", "y.parquet")
    for query in (";token=abc", "%3Ftoken%3Dabc", "#token=abc"):
        assert storage.parent_and_name(Url(f"https://host/y.parquet{query}"))[1] == "y.parquet"
    assert reveal(parent) == "https://user:pw@host/x?sig=1"
    for whole in ("http://u:p@[::1]:80/x?sig=1", "https://h/x?next=http://y", "https://h/a::x#b"):
        head, mark, query = whole.partition("#" if "#" in whole else "?")
        assert reveal(storage.join(Url(whole), "z")) == f"{head}/z{mark}{query}"
    assert reveal(storage.absolute("https://host/x/?sig=1")) == "https://host/x?sig=1"


def test_what_holds_a_url_shows_none():
    url = "https://user:hidden@host/x?sig=hidden"
    assert "hidden" not in repr(Lake(url=url))
    place = Folder.of(url)
    assert place.url == "https://host/x"
    assert place.at("a") == "https://user:hidden@host/x/a?sig=hidden"
    assert place.below("a").url == "https://host/x"


@pytest.mark.parametrize("error", [UserError, RunFailed])
def test_no_message_of_ours_holds_credentials(error):
    assert str(error("https://u:pw@h/x?sig=1: gone")) == "https://h/x: gone"
    assert str(pickle.loads(pickle.dumps(error("https://u:pw@h/x: gone")))) == "https://h/x: gone"


def test_the_texts_of_others_lose_credentials():
    Url("https://user:hid%2Fden-one@host/x?sig=hidden+two")
    text = "403, url='https://host/x?sig=hidden%2Btwo', s3://k:s@b/y, (https://h?a=1). hid/den-one"
    assert without_secrets(text) == "403, url='https://host/x', s3://b/y, (https://h). ***"


@pytest.mark.parametrize(
    ("url", "text", "shown"),
    [
        ("https://me:data@h/x", "data: the test data", "data: the test data"),
        (
            "https://me:data@h/x",
            "auth(login='me', password='data')",
            "auth(login='me', password='***')",
        ),
        ("https://me:data@h/x", "no route to me:data@h", "no route to ***@h"),
        ("https://h/x?token=income", "column 'income' is NaN", "column 'income' is NaN"),
        ("https://h/x?token=income", '{"Token": "income"}, income', '{"Token": "***"}, income'),
        ("https://h/x?sig=2026", "ds=2026-11-01, sig%3D2026", "ds=2026-11-01, sig%3D***"),
        ("s3://k:part-7@b/x", "part-7.parquet, part-70, apart-7", "***.parquet, part-70, apart-7"),
        ("s3://k:ab/cd+ef@b/x", "ab%2Fcd%2Bef=%3Dab/cd+ef", "***=%3D***"),
        ("s3://k:aVeryLongSecretKey@b/x", "x=yaVeryLongSecretKeyz", "x=y***z"),
    ],
)
def test_a_secret_that_is_a_word_is_left_out_where_it_is_called_one(url, text, shown):
    assert without_secrets(text) == text
    Url(url)
    assert without_secrets(text) == shown


def test_no_name_takes_long_to_be_found_harmless():
    started = time.process_time()
    assert redacted(f"https://h/x?{'_' * 2000}!") == "https://h/x"
    Url("https://me:data@h/x")
    assert without_secrets(f"{'_' * 1000}!") == f"{'_' * 1000}!"
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "url", ["s3://key:hidden@lake/x", "s3a://lake/x?token=hidden", "zip://a::s3://key:hidden@b/x"]
)
def test_s3_takes_its_credentials_from_elsewhere(url):
    with pytest.raises(UserError, match="holds a bucket and a key, and no credentials") as raised:
        storage.open_url(url)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["a::b", "a?b", "a#b", "a b", "a%20b", "{a,b}", "a[1]*", "file::x"]
)
def test_a_name_is_a_name(tmp_path, name):
    assert storage.open_url(f"{tmp_path}/{name}")[1] == f"{tmp_path}/{name}"
    assert storage.open_url(f"s3://lake/{name}")[1] == f"lake/{name}"
