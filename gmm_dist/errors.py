"""Errors that are one line: those that a user can mend, and failures of machines and storage."""

from __future__ import annotations

from gmm_dist.formats import printable
from gmm_dist.urls import without_secrets


class _Told(Exception):  # noqa: N818 - what the two have in common
    """Is told with control characters escaped, which names of files and columns may hold."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_Told, ValueError):
    """Report bad input in one line: what is wrong with its numbers, where, and the remedy.

    Jobs print the message on stderr and end with status 2. Anything else that is raised is
    either the world's failure or ours. URLs in a message lose their credentials here, whoever
    wrote it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class TooFewRows(UserError):  # noqa: N818 - it says what is wrong
    """Report that no rows are left, or fewer than a fit needs."""


class NoRows(TooFewRows):
    """Report that a filter leaves no rows of a lake, as its files' paths and footers tell."""


class SchemaError(UserError):
    """Report a column to be fitted that some file lacks, or has in a type that is of no use."""


class RunFailed(_Told, RuntimeError):  # noqa: N818 - a run that failed is not an error of ours
    """Report in one line that machines or storage failed too often, or for too long.

    Nothing is wrong with the input: the run can be resumed. Jobs print the message on stderr
    and end with status 1.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))
