"""`Lake`: which rows, and where they are, as a value for estimators; it reads nothing yet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from gmm_dist.errors import Option, UserError
from gmm_dist.lake.tables.snapshot import At, parse_at
from gmm_dist.urls import Url

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from gmm_dist.lake.filters.where import Filter

Missing = Literal["error", "drop", "mean"]


@dataclass(frozen=True, slots=True)
class Lake:
    """Rows of a Parquet file or folder, by name: what `fit` and `select` take in place of rows.

    Reads nothing: Ray's workers do that, when it is fitted. Can be hashed, pickled and printed;
    the credentials in a URL are not shown.

    >>> Lake("s3://lake/points", columns=["x", "y"], where="ds >= '2026-11-01'").columns
    ('x', 'y')

    Args:
        url: a local path, or any URL that fsspec opens: a Parquet file, a folder of them, or the
            root of a Delta table (on a local disk or S3); or an Iceberg table, by its catalog
            (`iceberg://CATALOG/NAMESPACE.TABLE`) or its metadata file.
        columns: numeric columns, or one column of lists of one length. None: every floating-point
            column but pandas' indices, else the one column of lists.
        where: which rows, by any columns and hive partitions: text in the syntax of `--where`, or
            an expression, such as `(pc.field("a") > 3) & pc.field("b").isin([1, 2])`, which keeps
            the rows that pyarrow's `Table.filter` does: a comparison with NaN is false, `~` of it
            true.
        weight_column: the column of sample weights: 0 is an absent row, 2 a doubled one.
        missing: what becomes of nulls and NaN: "error", "drop" the row, or the column's "mean".
        holdout: the share of the rows, 0 <= share < 1, that nothing is fitted to.
        at: which version of a table: its number, a snapshot's id, or a time (a datetime, or text as
            "2026-11-21T08:30:00+01:00"; UTC without an offset) for the newest version of then.

    Raises UserError for what is wrong whatever the files hold.
    """

    not_in_memory: ClassVar[str] = (
        "X is a lake, whose rows are not in memory: `gmm-dist score` writes the label, probability "
        "and log-density of each; of a GaussianMixture score, bic, aic and icl take a lake"
    )

    url: str
    _: KW_ONLY
    columns: Sequence[str] | None = None
    where: str | pc.Expression | Filter | None = None
    weight_column: str | None = None
    missing: Missing = "error"
    holdout: float = 0.0
    at: At | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _url(self.url))
        object.__setattr__(self, "columns", _columns(self.columns))
        if self.where is not None:
            # Pyarrow, in whose types a filter compares, is imported only where there is one.
            from gmm_dist.lake.filters.expressions import filter_of

            parsed = filter_of(self.where)
            if not isinstance(self.where, str):
                object.__setattr__(self, "where", parsed)
        if self.weight_column is not None:
            _require_name(self.weight_column, "weight_column")
            if self.weight_column in (self.columns or ()):
                raise UserError(
                    f"{self.weight_column!r} is among " + Option("columns") + " too",
                    option="weight_column",
                    remedy="weights are no feature, leave it out of " + Option("columns"),
                )
        if self.missing not in get_args(Missing):
            wanted = "give one of error, drop, mean"
            raise UserError(f"is {self.missing!r}", option="missing", remedy=wanted)
        require_share(self.holdout)
        object.__setattr__(self, "at", parse_at(self.at))


_GIVE_URL = "give the path or URL of a Parquet file, folder or table"


def _url(source: Any) -> Url:
    if not isinstance(source, str | os.PathLike) or isinstance(path := os.fspath(source), bytes):
        raise UserError(f"is {source!r}", option="url", remedy=_GIVE_URL)
    # A Url is left as it is: as text it would lose its credentials.
    url = source if isinstance(source, Url) else Url(path)
    if not url.strip():
        raise UserError("is empty", option="url", remedy=_GIVE_URL)
    return url


def _columns(columns: Any) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        wanted = "give a list of names, such as ['x', 'y']"
        raise UserError(f"is {columns!r}", option="columns", remedy=wanted)
    names = tuple(columns)
    for name in names:
        _require_name(name, "columns")
    if not names:
        wanted = "name one at least, or leave it out for all floats"
        raise UserError("is empty", option="columns", remedy=wanted)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"has {twice[0]!r} twice", option="columns", remedy="name each column once")
    return tuple(str(name) for name in names)


def _require_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name:
        raise UserError(f"has {name!r}", option=what, remedy="give the name of a column")


def require_share(share: Any) -> None:
    """Raise UserError for what is no share of rows to hold out."""
    is_number = isinstance(share, Real) and not isinstance(share, bool)
    if not is_number or not 0 <= float(share) < 1:
        shown = f"{float(share):g}" if is_number else share
        wanted = "give a share of the rows, 0 <= share < 1"
        raise UserError(f"is {shown}", option="holdout", remedy=wanted)
