"""A URL that prints without its credentials, and texts from which credentials are removed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote, unquote

# `::` stands in IPv6 addresses and in names too.
_CHAIN = re.compile(r"::(?=[A-Za-z][\w+.-]*://)")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][\w+.:-]*)://(?P<rest>.*)", re.DOTALL)
# Whatever stands before `@`: a password may hold slashes and question marks (AWS's secret keys do).
_PASSWORD = re.compile(r"(?!arn:)([^/@:?]*:(?!\d+(?:[/?#]|$))[^@]*)@")
_USER = re.compile(r"([^/@?#]*)@(?=[^/@]*(?:/|$))")
# abfs://container@account: two names. They hold no password, or the pattern above has taken it.
_NAMED = frozenset({"abfs", "abfss", "wasb", "wasbs"})
# Names in a query that may hold a credential: `sig`, `X-Amz-Signature`, `access_token`, `apikey`.
_SECRET_WORD = (
    r"(?:token|sig|signature|secret|passw(?:or)?d|pwd|credentials?|key|auth|sas|"
    r"access_?key|secret_?key|secret_?access_?key|api_?key|(?:aws_?access_?)?key_?id)"
)
_SECRET_NAME = rf"(?:[\w.-]*[-_.])?{_SECRET_WORD}"
_SECRET_QUERY = re.compile(
    rf"(?:\?|;|%3f|%3b)(?:[^/?#]*?(?:[&;]|%26|%3b))?{_SECRET_NAME}(?:=|%3d)", re.IGNORECASE
)
_PAIR = re.compile(rf"(?:^|[?#&;]|%26|%3f){_SECRET_NAME}(?:=|%3d)(?P<value>[^&;#]+)", re.IGNORECASE)
# What marks the word after it as a secret: `password='`, `"token": "`, `sig%3D`.
_NAMING = rf"""{_SECRET_WORD}['"]?\s*(?:=|:|%3d|%3a)\s*[bu]?['"]?"""
_IN_TEXT = re.compile(r"""(?:\w+::)*[A-Za-z][\w+.-]*://[^\s'"<>|]+""")
_ENDS = ".,;:!)]}"  # of a sentence rather than of a URL
_WORD = re.compile(r"[^\W\d_]+|\d+")
_FEW, _MANY = 6, 16  # characters: a shorter secret may be any word, one so long is none


@dataclass(slots=True)
class _Secrets:
    """The secrets in URLs of this process, by where in other texts they are masked.

    A password may be any word, such as `data` or `2026`. `named` has such words and short
    secrets, masked only after a name such as `password=`. `apart` has those that are no word,
    masked where they stand by themselves; `anywhere` long ones, masked even within other words.
    """

    anywhere: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)

    def add(self, secret: str) -> None:
        """Remember a secret in all its spellings."""
        for spelt in _spellings(secret):
            if len(spelt) >= _MANY:
                self.anywhere.add(spelt)
            elif len(spelt) >= _FEW and not _WORD.fullmatch(spelt):
                self.apart.add(spelt)
            else:
                self.named.add(spelt)

    def without(self, text: str) -> str:
        """Return a text with stars in place of secrets."""
        if self.named:
            words = _any_of(self.named)
            text = re.sub(rf"(?i:({_NAMING}))(?:{words})(?!\w)", r"\1***", text)
        if self.apart:
            words = _any_of(self.apart)
            text = re.sub(rf"(?:(?<!\w)|(?<=%[\dA-Fa-f]{{2}}))(?:{words})(?!\w)", "***", text)
        return re.sub(_any_of(self.anywhere), "***", text) if self.anywhere else text


def _any_of(secrets: set[str]) -> str:
    # The longest first: one may be part of another.
    return "|".join(map(re.escape, sorted(secrets, key=len, reverse=True)))


_known = _Secrets()


class Url(str):
    """A path or URL whose text has no credentials; `reveal` returns the whole, to open it.

    Messages, JSON, names, reprs and parts made of the text have none either. They leave
    out user and password, http's query and fragment, and what follows `?token=` and its like.
    URLs of the same text are equal: one with a new signature names the same file. A pickle holds
    the whole, for workers to open. `storage.join` and `storage.absolute` keep what is not shown;
    other operations of strings return the text alone.
    """

    _whole: str

    def __new__(cls, url: str) -> Self:
        if isinstance(url, Url):
            url = url._whole
        shown, secrets = _parted(url)
        self = super().__new__(cls, shown)
        self._whole = url
        for secret in secrets:
            _known.add(secret)
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self._whole,)

    @property
    def is_secret(self) -> bool:
        """Say whether the URL has parts that its text does not show."""
        return self._whole != str(self)


def reveal(url: str) -> str:
    """Return the whole of a URL, credentials and all: for what opens it, and nothing else."""
    return url._whole if isinstance(url, Url) else url


def redacted(url: str) -> str:
    """Return `url` without user, password, query and tokens, fit for messages and reports."""
    return str(Url(url))


def without_secrets(text: str) -> str:
    """Return a text from elsewhere (a library's error, a command line) without credentials.

    URLs in it are redacted. Secrets of every `Url` of this process are masked where they stand by
    themselves; ordinary words only where the text calls them a secret.
    """
    return _known.without(_IN_TEXT.sub(_shown, text))


def split_query(url: str) -> tuple[str, str]:
    """Split an http URL before its query or fragment; without one the second part is ""."""
    *_, start = (0, *(match.end() for match in _CHAIN.finditer(url)))
    if not re.match("https?://", url[start:], re.IGNORECASE):
        return url, ""
    # A question mark in a password does not begin the query.
    after = url.index("://", start) + 3
    password = _PASSWORD.match(url, after)
    after = after if password is None else password.end()
    query = _earlier(re.compile(r"[?#]").search(url, after), _SECRET_QUERY.search(url, after))
    return (url, "") if query is None else (url[: query.start()], url[query.start() :])


def links_of(url: str) -> list[str]:
    """Return the URLs of a chain such as zip://a.parquet::s3://bucket/x.zip."""
    return _CHAIN.split(url)


def _shown(match: re.Match[str]) -> str:
    whole = match[0]
    url = whole.rstrip(_ENDS)
    return _parted(url)[0] + whole[len(url) :]


def _parted(url: str) -> tuple[str, list[str]]:
    """Return the text of a URL, or of a chain, without secrets, and the secrets."""
    links = [_link(link) for link in links_of(url)]
    return "::".join(shown for shown, _ in links), [s for _, secrets in links for s in secrets]


def _link(url: str) -> tuple[str, list[str]]:
    match = _SCHEME.fullmatch(url)
    if match is None:
        return url, []
    scheme, rest = match["scheme"], match["rest"]
    secrets: list[str] = []
    if password_match := _PASSWORD.match(rest):
        user, _, password = password_match[1].partition(":")
        secrets += [password_match[1], password, *([user] if len(user) >= 16 else [])]
        rest = rest[password_match.end() :]
    # A password that holds `@` itself leaves some of it.
    while scheme.lower() not in _NAMED and (user_match := _USER.match(rest)):
        # A short one is more likely a user's name, which may be any word of a text.
        secrets += [user_match[1]] if len(user_match[1]) >= 16 else []
        rest = rest[user_match.end() :]
    is_http = scheme.lower() in ("http", "https")
    query_match = _earlier(
        re.search(r"[?#]", rest) if is_http else None, _SECRET_QUERY.search(rest)
    )
    if query_match is not None:
        query = rest[query_match.start() :]
        secrets += [query[1:], *(pair["value"] for pair in _PAIR.finditer(query))]
        rest = rest[: query_match.start()]
    return f"{scheme}://{rest}", secrets


def _earlier(one: re.Match[str] | None, other: re.Match[str] | None) -> re.Match[str] | None:
    matches = [match for match in (one, other) if match is not None]
    return min(matches, key=lambda match: match.start(), default=None)


def _spellings(secret: str) -> set[str]:
    plain = unquote(secret)
    spelt = {secret, plain, quote(plain, safe=""), quote(plain)}
    return {text for text in spelt if text}
