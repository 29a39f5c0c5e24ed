"""Folders behind a web server: what their index pages name, and nothing else.

fsspec's own parser of such pages skips names that begin with `http`, and takes `./a`, `&amp;` and
`javascript:` for parts of names.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urlsplit

from fsspec.implementations.http import HTTPFileSystem

_ELSEWHERE = re.compile(r"(javascript|mailto|data|tel|ftp|about|blob):", re.IGNORECASE)
_WHOLE = re.compile(r"https?://", re.IGNORECASE)


class WebFolders(HTTPFileSystem):  # type: ignore[misc]
    """fsspec's web file system with another parser of index pages."""

    async def _ls_real(self, url: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        session = await self.set_session()
        async with session.get(self.encode_url(url), **self.kwargs) as answer:
            self._raise_not_found_for_status(answer, url)
            kind = answer.headers.get("Content-Type", "text/html").partition(";")[0]
            page = await answer.text(errors="ignore") if kind.strip() == "text/html" else ""
        entries = sorted(named(page, url))
        if not entries and url.endswith("/"):
            return list(await self._ls_real(url.rstrip("/"), detail))
        if not detail:
            return entries
        return [
            {"name": name, "size": None, "type": "directory" if name.endswith("/") else "file"}
            for name in entries
        ]


def named(page: str, url: str) -> set[str]:
    """Return the URLs below `url` to which its index page links, spelt as there."""
    links = _Links()
    links.feed(page)
    base = f"{url.rstrip('/')}/"
    below = (_below(link.strip().partition("#")[0], base) for link in links.targets)
    return {base + name for name in below if name}


def _below(link: str, base: str) -> str:
    """Return the name that a link has below `base`; "" where it leads elsewhere."""
    if _ELSEWHERE.match(link):
        return ""
    if _WHOLE.match(link) or link.startswith("/"):
        here, there = urlsplit(base), urlsplit(link)
        if there.netloc not in ("", here.netloc):
            return ""
        # One may spell `=` where the other has `%3D`.
        above = here.path.split("/")[:-1]
        parts = (link.partition(there.netloc)[2] if there.netloc else link).split("/")
        is_below = [*map(unquote, parts[: len(above)])] == [*map(unquote, above)]
        return "/".join(parts[len(above) :]) if is_below else ""
    name = re.sub(r"^(\./+)+", "", link)
    return "" if name in (".", "..") or name.startswith("../") else name


class _Links(HTMLParser):
    """Collects the targets of the links in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if (tag, name) == ("a", "href") and value]
