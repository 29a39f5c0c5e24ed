"""Numbers and names as people read them: few digits, units, nothing that cannot be printed."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

ABSENT = "–"
_MINUS = "\u2212"
_LARGE, _SMALL = 1e9, 1e-4  # beyond these, powers of ten
_MOST_DECIMALS = 9
_FEW = 8  # names in a message


def number(value: float | None, digits: int = 4) -> str:
    """Spell a number with `digits` significant digits; whole digits are never cut off."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    if not _SMALL <= abs(value) < _LARGE:
        return _signed(f"{value:.{digits - 1}e}")
    return fixed(value, max(0, digits - 1 - _exponent(value)))


def fixed(value: float | None, decimals: int) -> str:
    """Spell a number with so many decimals and thousands separators."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:,.{decimals}f}"
    return _signed(text if text.strip("-0.,") else text.lstrip("-"))


def count(value: float | None) -> str:
    """Spell a number of rows: whole, or a sum of weights with one decimal."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return fixed(value, 0 if float(value).is_integer() else 1)


def share(value: float | None) -> str:
    """Spell a share of one as a percentage."""
    if value is None or not math.isfinite(value):
        return ABSENT
    percent = 100 * value
    if 0 < percent < 0.01:
        return "< 0.01\u202f%"
    return f"{fixed(percent, 1 if percent >= 1 else 2)}\u202f%"


def measured(mean: float, spread: float) -> tuple[str, str]:
    """Spell a mean and its spread, the mean to the second digit of the spread."""
    sizes = [abs(x) for x in (mean, spread) if math.isfinite(x) and x]
    if not math.isfinite(spread) or spread <= 0 or max(sizes) >= _LARGE or max(sizes) < _SMALL:
        return number(mean), number(spread, 2)
    decimals = max(0, 1 - _exponent(spread))
    if decimals > _MOST_DECIMALS:
        return number(mean), number(spread, 2)
    return fixed(mean, decimals), fixed(spread, decimals)


def signed(value: float | None, decimals: int = 1) -> str:
    """Spell a change with its sign."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def duration(seconds: float | None) -> str:
    """Spell seconds as people say them."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{fixed(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shortened(text: str, longest: int) -> str:
    """Cut the middle out of a long name: beginnings and ends tell names apart."""
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def counted(number: float, noun: str) -> str:
    """Spell a number of things, one of them in the singular."""
    text = f"{number:,.0f}"
    if text == "1":
        return f"1 {noun}"
    return f"{text} {noun}es" if noun.endswith(("s", "x", "ch")) else f"{text} {noun}s"


def printable(text: str) -> str:
    """Escape control characters, marks that turn the direction of writing, lone surrogates.

    What is left moves no cursor, begins no line, and may stand in HTML and SVG.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or _is_space(c) else _escaped(c) for c in text)


def _is_space(c: str) -> bool:
    return unicodedata.category(c) == "Zs"


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode()


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)


def first_few(names: Sequence[str]) -> str:
    """Return names, of which many are cut to the first eight: "a, b, ..."."""
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")


def one_line(error: BaseException) -> str:
    """Return an error's kind and words in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def gigabytes(n_bytes: int) -> str:
    """Return e.g. "1.5 GiB"."""
    return f"{n_bytes / 2**30:,.1f} GiB"
