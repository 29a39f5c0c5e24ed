"""Errors that are one line: those that a user can mend, and failures of machines and storage.

They name a setting by an `Option`, which each face spells in its own way: Python as an argument,
commands as an option of their command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gmm_dist.formats import printable
from gmm_dist.urls import without_secrets

Value = str | bool | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """A setting that a sentence names, with a value where one is advised.

    `name` is that of the argument in Python.
    """

    name: str
    value: Value | None = None

    def __add__(self, other: Words) -> Text:
        return Text((self,)) + other

    def __radd__(self, other: str) -> Text:
        return other + Text((self,))

    def __str__(self) -> str:
        return in_python(self)

    def renamed(self, names: Mapping[str, str]) -> Option:
        """Return the option under its new name, if `names` has one."""
        return Option(names.get(self.name, self.name), self.value)


@dataclass(frozen=True, slots=True)
class Text:
    """A sentence that names options: `"use fewer " + Option("columns")` makes one.

    As a `str` it names them as Python does.
    """

    parts: tuple[str | Option, ...] = ()

    @classmethod
    def of(cls, words: Words) -> Text:
        """Return words as a text."""
        return words if isinstance(words, Text) else cls((words,))

    def __add__(self, other: Words) -> Text:
        return Text((*self.parts, *Text.of(other).parts))

    def __radd__(self, other: str) -> Text:
        return Text((other, *self.parts))

    def __str__(self) -> str:
        return spelt(self)

    def masked(self) -> Text:
        """Return the text without the credentials of URLs in it."""
        return Text(tuple(without_secrets(p) if isinstance(p, str) else p for p in self.parts))

    def renamed(self, names: Mapping[str, str]) -> Text:
        """Return the text with its options renamed."""
        parts = (p.renamed(names) if isinstance(p, Option) else p for p in self.parts)
        return Text(tuple(parts))


Words = str | Option | Text
Spelling = Callable[[Option], str]
"""Spells an option as one of the faces does."""


def in_python(option: Option) -> str:
    """Spell an option as an argument in Python: `missing`, or `missing="drop"` with a value."""
    if option.value is None:
        return option.name
    return f"{option.name}={_literal(option.value)}"


def _literal(value: Value) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def spelt(words: Words, spelling: Spelling = in_python) -> str:
    """Return words with each option as `spelling` has it."""
    parts = Text.of(words).parts
    return "".join(spelling(part) if isinstance(part, Option) else part for part in parts)


def joined(separator: str, words: Sequence[Words]) -> Text:
    """Return texts as one, with a separator between them."""
    parts: list[str | Option] = []
    for i, each in enumerate(words):
        parts += [separator] if i else []
        parts += Text.of(each).parts
    return Text(tuple(parts))


class _Told(Exception):  # noqa: N818 - the base of the two
    """An error of one line, made of the parts that it has: `where: option what; remedy`.

    Control characters, which names of files and columns may hold, are escaped, and URLs lose
    their credentials.

    Args:
        what: What is wrong, with its numbers; alone it is the whole line.
        where: The place: a file, row group and row.
        remedy: What to do about it.
        option: The option that `what` is about.
    """

    def __init__(
        self,
        what: Words = "",
        *,
        where: str | None = None,
        remedy: Words | None = None,
        option: str | Option | None = None,
    ) -> None:
        self.what = Text.of(what).masked()
        self.where = None if where is None else without_secrets(where)
        self.remedy = None if remedy is None else Text.of(remedy).masked()
        self.option = Option(option) if isinstance(option, str) else option
        super().__init__(spelt(self._text))

    def spelt(self, spelling: Spelling) -> str:
        """Return the line with each option as a face spells it."""
        return printable(without_secrets(spelt(self._text, spelling)))

    def __str__(self) -> str:
        return self.spelt(in_python)

    def rename_options(self, **names: str) -> None:
        """Name options otherwise from now on, such as `registry` for `output`."""
        self.what = self.what.renamed(names)
        self.remedy = None if self.remedy is None else self.remedy.renamed(names)
        self.option = None if self.option is None else self.option.renamed(names)

    @property
    def _text(self) -> Text:
        text = Text() if self.option is None else self.option + " "
        text += self.what
        if self.where is not None:
            text = f"{self.where}: " + text
        if self.remedy is None:
            return text
        return text + (": " if self.where is None else "; ") + self.remedy


class UserError(_Told, ValueError):
    """Report bad input in one line: what is wrong with its numbers, where, and the remedy.

    Commands print the line on stderr and end with status 2. Any other exception is a failure of
    machines or storage, or a bug.
    """


class TooFewRows(UserError):  # noqa: N818 - it says what is wrong
    """Report that no rows are left, or fewer than a fit needs."""


class NoRows(TooFewRows):
    """Report that a filter leaves no rows of a lake, by its files' paths and footers."""


class SchemaError(UserError):
    """Report a column to be fitted that some file lacks, or has in a type that cannot be used."""


class RunFailed(_Told, RuntimeError):  # noqa: N818 - a run that failed is not an error of ours
    """Report in one line that machines or storage failed too often, or for too long.

    Nothing is wrong with the input: the run can be resumed. Commands print the line on stderr
    and end with status 1.
    """


@contextmanager
def renaming(**names: str) -> Iterator[None]:
    """Have errors of the block name options otherwise, such as `registry` for `output`."""
    try:
        yield
    except UserError as error:
        error.rename_options(**names)
        raise
