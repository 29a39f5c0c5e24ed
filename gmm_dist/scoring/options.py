"""The options of a scoring, as plain values with the command line's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from gmm_dist import config
from gmm_dist.config import Cluster, FailureConfig, optional
from gmm_dist.errors import Option, UserError
from gmm_dist.lake.tables.snapshot import At, parse_at
from gmm_dist.model.quantiles import SMALLEST

_FAULTS = FailureConfig()
WRITES = ("files", "delta")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The settings of a scoring.

    Args:
        data: Folder or file of Parquet, local or any URL, or a table.
        model: A fit's output, its model folder, or a registry, which gives its latest.
        output: A new folder or URL; with `write="delta"` a Delta table, new or not.
        keep: Columns to go along with the scores.
        where: Filter of rows, see `gmm_dist.lake.filters`.
        at: Version of a table, see `gmm_dist.lake.lake.Lake`.
        write: "files", or "delta" for one commit to a Delta table.
        overwrite: Have the scores take the place of the table's rows; else they are appended.
        probabilities: Write the probabilities of all components too.
        outliers: Mark rows of a lower log-density than this share of the training rows.
        num_workers: Actors that score; None for one per CPU or GPU.
        use_gpu: Whether each has a GPU of its own; None: if the cluster has any.
        max_failures: Failures of workers or their storage that the run bears.
        grace: Seconds until others take over the files of a lost worker.
        address: Ray cluster; None for the one the process runs in, else one started here.
        resume: Go on with a run of the same rows, model and options.

    Raises:
        UserError: a value is out of range.
    """

    data: str
    model: str
    output: str
    keep: tuple[str, ...] = ()
    where: str | None = None
    at: At | None = None
    write: str = WRITES[0]
    overwrite: bool = False
    probabilities: bool = False
    outliers: float | None = None
    num_workers: int | None = None
    use_gpu: bool | None = None
    max_failures: int = _FAULTS.max_failures
    grace: float = _FAULTS.grace
    address: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        config.settle(
            self,
            data=config.url,
            model=config.url,
            output=config.url,
            keep=config.several(config.text, least=0),
            where=optional(config.text),
            at=lambda name, value: parse_at(value),
            write=config.one_of(WRITES),
            overwrite=config.flag,
            probabilities=config.flag,
            outliers=optional(config.number),
            resume=config.flag,
        )
        # Each raises its own errors.
        FailureConfig(max_failures=self.max_failures, grace=self.grace)
        _ = self.cluster
        require_share(self.outliers)
        if self.overwrite and self.write != "delta":
            raise UserError(
                "is about the rows of a table",
                option="overwrite",
                remedy="give " + Option("write", "delta") + " too, or leave it out",
            )

    @property
    def cluster(self) -> Cluster:
        """The Ray cluster, how many workers there are, and whether each has a GPU."""
        return Cluster(self.address, self.num_workers, self.use_gpu)


def require_share(outliers: float | None) -> None:
    """Raise UserError for a share of outliers that a model's table does not reach."""
    if outliers is not None and not SMALLEST <= outliers < 1:
        wanted = f"give a share from {SMALLEST:g} to below 1"
        raise UserError(f"is {outliers:g}", option="outliers", remedy=wanted)
