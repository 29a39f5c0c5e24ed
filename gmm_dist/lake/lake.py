"""A lake as a value to hand to an estimator: where its rows are, and which; nothing is read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from gmm_dist.urls import Url

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from gmm_dist.lake.filters.where import Filter


@dataclass(frozen=True, slots=True)
class Lake:
    """Name the rows of a Parquet file or folder, and the Ray cluster that is to hold them."""

    not_in_memory: ClassVar[str] = (
        "give rows in memory: a lake can be fitted only (`gmm-dist score` writes the scores of its "
        "rows)"
    )

    url: str
    columns: tuple[str, ...] | None = None
    where: str | pc.Expression | Filter | None = None
    weight_column: str | None = None
    missing: Literal["error", "drop", "mean"] = "error"
    holdout: float = 0.0
    address: str | None = None
    num_workers: int | None = None
    use_gpu: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", Url(self.url))
        if self.where is not None and not isinstance(self.where, str):
            # Pyarrow is imported for those who have it at hand.
            from gmm_dist.lake.filters.expressions import filter_of

            object.__setattr__(self, "where", filter_of(self.where))


def open_lake(
    url: str,
    *,
    columns: Sequence[str] | None = None,
    where: str | pc.Expression | Filter | None = None,
    weight_column: str | None = None,
    missing: Literal["error", "drop", "mean"] = "error",
    holdout: float = 0.0,
    address: str | None = None,
    num_workers: int | None = None,
    use_gpu: bool | None = None,
) -> Lake:
    """Name a lake for the estimators' `fit` and for `select`; its rows are read by Ray's workers.

    `url` is a local path or any fsspec URL. `columns`: numeric columns, or one column of lists of
    one length (default: every floating-point column but pandas' indices). `where`: which rows, by
    any column or hive partition, as text in the syntax of `--where` or as an expression, such as
    `(pc.field("a") > 3) & pc.field("b").isin([1, 2])`, which keeps the rows that pyarrow's
    `Table.filter` does: a comparison with NaN is false, and `~` of that true. `missing`: what
    becomes of nulls and NaN. `holdout`: the share of rows that nothing is fitted to. `address` of
    a Ray cluster (default: RAY_ADDRESS, else one is started here), with `num_workers` actors, each
    on a GPU where `use_gpu` says so (default: if the cluster has any).
    """
    chosen = None if columns is None else tuple(columns)
    return Lake(
        url,
        chosen,
        where,
        weight_column,
        missing,
        holdout,
        address,
        num_workers,
        use_gpu,
    )
