"""Find the files of a lake: by the log or metadata of a table, or else by listing a folder."""

from __future__ import annotations

from gmm_dist import storage
from gmm_dist.errors import Option, UserError
from gmm_dist.lake import listing
from gmm_dist.lake.listing import Listing
from gmm_dist.lake.tables import formats, iceberg
from gmm_dist.lake.tables.snapshot import At
from gmm_dist.urls import Url


def find(url: str, at: At | None = None) -> Listing:
    """List the data files at `url`: those of a table by its log, others as `listing.find` does.

    `at` names a version of a table; None is the newest.

    Raises:
        UserError: as `listing.find` does, or the table cannot be read; `at` is given for no table.
    """
    listing.check_name(url, url)
    if iceberg.names_table(url):
        return iceberg.find(Url(url), at)
    root = storage.absolute(url)
    fs, path = storage.open_url(root)
    with storage.explained(root):
        is_delta = formats.is_delta(fs, path, root)
    if is_delta:
        from gmm_dist.lake.tables import delta  # most lakes need neither it nor its library

        return delta.find(root, at)
    if at is not None:
        raise UserError(
            f"{root}: no table, but Parquet files, which have no versions: leave out "
            + Option("at")
            + f", which is {at}"
        )
    return listing.find(url)
