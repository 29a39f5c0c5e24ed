"""Which files of a folder are Parquet: by their names, or by their first and last bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec import AbstractFileSystem

from gmm_dist import storage
from gmm_dist.errors import UserError

_SUFFIXES = (".parquet", ".parq", ".pq")
# Endings of files that are never data here, and so are not opened.
_FOREIGN = {
    # other data, and what describes it
    *("arrow", "avro", "csv", "db", "duckdb", "feather", "h5", "hdf5", "ipc", "json", "jsonl"),
    *("lance", "nc", "ndjson", "npy", "npz", "orc", "pickle", "pkl", "psv", "pt", "pth"),
    *("safetensors", "sqlite", "tsv", "xls", "xlsx", "xml"),
    # texts, programs, pictures, archives
    *("bat", "bmp", "cfg", "conf", "css", "doc", "docx", "gif", "htm", "html", "ini", "ipynb"),
    *("jar", "jpeg", "jpg", "js", "log", "md", "pdf", "png", "ppt", "pptx", "py", "pyc", "r"),
    *("rst", "sh", "sql", "svg", "tar", "text", "tgz", "tif", "tiff", "toml", "txt", "webp"),
    *("whl", "yaml", "yml", "zip", "7z"),
    # checksums and signatures
    *("asc", "crc", "md5", "sha1", "sha256", "sig"),
    # copies that editors and downloads leave, whole or not: their rows would count twice
    *("bak", "copying", "crdownload", "download", "filepart", "inprogress", "lock", "old"),
    *("orig", "part", "partial", "pending", "save", "swo", "swp", "swx", "temp", "tmp"),
}
_MAGIC = (b"PAR1", b"PARE")  # the latter with an encrypted footer, which reading will refuse
_LOOKS_AT_ONCE = 32
_FEW_LOOKS = 1024
_MOST_FOREIGN = 10_000


def is_hidden(name: str) -> bool:
    """Say whether a part of the path begins with `_` or `.`, as Spark does.

    A hive key may begin with `_`: the rows below `_day=1/` count.
    """
    *folders, base = name.split("/")
    parts = (*(folder for folder in folders if "=" not in folder[1:] or folder[0] == "."), base)
    return any(part.startswith(("_", ".")) for part in parts)


def is_named_parquet(name: str) -> bool:
    """Say whether the name ends like that of a Parquet file."""
    return name.lower().endswith(_SUFFIXES)


def is_foreign(name: str) -> bool:
    """Say whether the name is that of another kind of file, or of a leftover copy."""
    base = name.rpartition("/")[2].lower()
    ending = base.rpartition(".")[2].strip("_") if "." in base else ""
    return ending in _FOREIGN or base.endswith(("~", "#"))


def of(
    fs: AbstractFileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Return which files are Parquet and which are not, sorted.

    `infos` has fsspec's details of files that are neither hidden nor empty, by name. Files named
    `*.parquet`, `*.parq` or `*.pq` are Parquet. Where a name says nothing, the first or last
    bytes decide; so a torn file is accepted here, and refused when it is read.

    Raises:
        UserError: too many files were opened that are not Parquet.
    """
    unsure = [name for name in sorted(infos) if not (is_named_parquet(name) or is_foreign(name))]
    parquet = {name for name in infos if is_named_parquet(name)}
    foreign = 0
    for first in range(0, len(unsure), _FEW_LOOKS):
        few = unsure[first : first + _FEW_LOOKS]
        for name, is_parquet in zip(few, _looked_into(fs, [infos[n] for n in few]), strict=True):
            parquet.update((name,) if is_parquet else ())
            foreign += not is_parquet
        if foreign > _MOST_FOREIGN:
            raise UserError(
                f"{storage.redacted(root)}: more than {_MOST_FOREIGN:,} files that are not "
                f"Parquet, such as {unsure[0]}; give a folder of Parquet files"
            )
    return sorted(parquet), sorted(infos.keys() - parquet)


def _looked_into(fs: AbstractFileSystem, infos: Sequence[Mapping[str, Any]]) -> list[bool]:
    def look(info: Mapping[str, Any]) -> bool:
        return storage.patiently(lambda: _has_magic(fs, info["name"], info["size"]), info["name"])

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        try:
            return list(pool.map(look, infos))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _has_magic(fs: AbstractFileSystem, path: str, size: int) -> bool:
    if size < 4:
        return False
    options = {"headers": storage.UNCOMPRESSED} if storage.is_http(fs) else {}
    # A server that knows no ranges sends the whole file.
    if fs.cat_file(path, start=0, end=4, **options).startswith(_MAGIC):
        return True
    last: bytes = fs.cat_file(path, start=size - 4, end=size, **options)
    return last.endswith(_MAGIC)
