"""The spellings of a night that are understood, and the line about the others."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from urllib.parse import quote

import lakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server

from gmm_dist.errors import NoRows, UserError
from gmm_dist.lake import nights
from gmm_dist.lake.filters.where import Where
from gmm_dist.lake.plan import plan_lake

DAYS = [date(2025, 12, 30) + timedelta(i) for i in range(400)]  # two turns of the year


def write(root: Path, folder: str, n: int = 1, **columns: object) -> None:
    path = root / folder / "part.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": [0.5] * n, **columns}), path)


def n_rows(url: str, key: nights.NightKey, first: date, last: date) -> int:
    where = Where(tuple(sorted(key.clauses(first, last), key=repr)))
    try:
        plan = plan_lake(url, columns=["x"], where=where.text)
    except NoRows:
        return 0
    if plan.row_filter is None:
        return plan.n_rows
    table = pq.ParquetDataset(url).read()
    return int(where.restricted(table.column_names).mask(table).sum())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "spelling"),
    [
        ("ds", "%Y-%m-%d"),
        ("dt", "%Y%m%d"),
        ("dt", "%Y%m%d05"),
        ("date", "%Y/%m/%d"),
        ("p", "%Y_%m_%d"),
        ("p", "%Y.%m.%d"),
        ("ds", "%Y-%m-%dT00:00:00"),
        ("ds", "%Y-%m-%d 00:00:00"),
        ("hour", "%Y-%m-%d-23"),
        ("dt", "%Y%m%dT23"),
    ],
)
def test_a_hive_key_may_spell_the_night_so(tmp_path: Path, key: str, spelling: str) -> None:
    days = [date(2026, 11, 30), date(2026, 12, 1), date(2026, 12, 31), date(2027, 1, 1)]
    for i, day in enumerate(days):
        value = spelling.replace("%Y", f"{day:%Y}").replace("%m", f"{day:%m}")
        value = value.replace("%d", f"{day:%d}")
        write(tmp_path, f"{key}={quote(value, safe='')}", n=10**i)
    found = nights.find(str(tmp_path), [key])
    assert [n_rows(str(tmp_path), found, day, day) for day in days] == [1, 10, 100, 1000]
    assert n_rows(str(tmp_path), found, date(2026, 11, 24), days[1]) == 11
    assert n_rows(str(tmp_path), found, days[1], days[3]) == 1110
    assert n_rows(str(tmp_path), found, date(2026, 11, 21), date(2026, 11, 21)) == 0


def test_hours_of_a_night_are_all_of_it(tmp_path: Path) -> None:
    for hour in range(0, 24, 5):
        write(tmp_path, f"dt=20261121{hour:02d}")
    write(tmp_path, "dt=2026112200")
    found = nights.find(str(tmp_path), ["dt"])
    assert found.digits == 10
    assert n_rows(str(tmp_path), found, date(2026, 11, 21), date(2026, 11, 21)) == 5


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (("year", "month", "day"), ["day"]),
        (("year", "month", "day"), ["year", "month", "day"]),
        (("Year", "Month", "Day"), ["Year"]),
        (("yyyy", "mm", "dd"), ["dd"]),
        (("jahr", "monat", "tag"), ["jahr", "monat", "tag"]),
    ],
)
def test_three_hive_keys_tell_a_night_over_months_and_years(
    tmp_path: Path, names: tuple[str, ...], asked: list[str], padded: bool
) -> None:
    days = [date(2026, 11, 30), date(2026, 12, 1), date(2026, 12, 31), date(2027, 1, 1)]
    for i, day in enumerate(days):
        parts = f"{day:%Y %m %d}".split() if padded else [str(p) for p in day.timetuple()[:3]]
        folder = "/".join(f"{name}={part}" for name, part in zip(names, parts, strict=True))
        write(tmp_path, f"{folder}/hour=0{i}", n=10**i)
    found = nights.find(str(tmp_path), asked)
    assert [n_rows(str(tmp_path), found, day, day) for day in days] == [1, 10, 100, 1000]
    assert n_rows(str(tmp_path), found, days[0], days[1]) == 11
    assert n_rows(str(tmp_path), found, days[2], days[3]) == 1100
    assert n_rows(str(tmp_path), found, days[0], days[3]) == 1111
    assert n_rows(str(tmp_path), found, date(2026, 12, 30), date(2026, 12, 30)) == 0


def test_three_hive_keys_on_s3(tmp_path: Path, s3_lake: S3Server) -> None:
    for day in (20, 21, 22):
        write(tmp_path, f"year=2026/month=11/day={day}", n=day)
    url = f"{s3_lake.url}/lake"
    lakes.upload(tmp_path, s3_lake.file_system(), url)
    found = nights.find(url, ["day"])
    clauses = found.clauses(date(2026, 11, 21), date(2026, 11, 21))
    plan = plan_lake(url, where=Where(clauses).text)
    assert plan.n_rows == 21


@pytest.mark.parametrize(
    "type_",
    [
        *(pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())),
        *(pa.date32(), pa.date64(), pa.timestamp("us"), pa.timestamp("ns", tz="UTC")),
    ],
)
def test_a_column_of_texts_dates_or_times(tmp_path: Path, type_: pa.DataType) -> None:
    values = pa.array([day for day in DAYS for _ in range(2)])
    texts = values.cast(pa.string())
    if pa.types.is_timestamp(type_):
        times = [
            datetime.datetime.combine(day, datetime.time(hour)) for day in DAYS for hour in (0, 23)
        ]
        column = pa.array(times, pa.timestamp("us")).cast(pa.timestamp(type_.unit)).cast(type_)
    elif pa.types.is_date(type_):
        column = values.cast(type_)
    else:
        column = (
            texts.cast(type_) if not pa.types.is_dictionary(type_) else texts.dictionary_encode()
        )
    write(tmp_path, "", n=len(column), at=column)
    found = nights.find(str(tmp_path), ["at"])
    assert n_rows(str(tmp_path), found, date(2026, 1, 1), date(2026, 1, 1)) == 2
    assert n_rows(str(tmp_path), found, date(2026, 2, 27), date(2026, 3, 2)) == 8


@pytest.mark.parametrize(
    ("spelling", "type_"),
    [
        *(("%Y%m%d", pa.int32()), ("%Y%m%d", pa.int64()), ("%Y%m%d07", pa.int64())),
        *(("%Y%m%d", pa.string()), ("%Y/%m/%d", pa.string())),
        ("%Y-%m-%dT12:00:00Z", pa.string()),
    ],
)
def test_a_column_of_integers_or_of_other_texts(
    tmp_path: Path, spelling: str, type_: pa.DataType
) -> None:
    texts = pa.array([day.strftime(spelling) for day in DAYS])
    column = texts.cast(pa.int64()).cast(type_) if pa.types.is_integer(type_) else texts
    write(tmp_path, "", n=len(DAYS), at=column)
    found = nights.find(str(tmp_path), ["at"])
    for first, last in ((DAYS[40], DAYS[40]), (DAYS[0], DAYS[62])):
        assert n_rows(str(tmp_path), found, first, last) == (last - first).days + 1


def test_three_integer_columns_tell_the_days_of_a_month(tmp_path: Path) -> None:
    parts: Mapping[str, list[int]] = {
        name: [getattr(day, name) for day in DAYS] for name in ("year", "month", "day")
    }
    write(tmp_path, "", n=len(DAYS), **parts)
    found = nights.find(str(tmp_path), ["day"])
    assert n_rows(str(tmp_path), found, date(2026, 11, 21), date(2026, 11, 21)) == 1
    assert n_rows(str(tmp_path), found, date(2026, 11, 20), date(2026, 11, 22)) == 3
    with pytest.raises(UserError, match=r"2026-10-31 to 2026-11-01 are of several months"):
        found.clauses(date(2026, 10, 31), date(2026, 11, 1))


@pytest.mark.parametrize(
    "values",
    [
        ["2026-1-5", "2026-11-21"],
        ["21.11.2026"],
        ["11/21/2026"],
        ["20261121", "2026-11-22"],
        ["tonight"],
        ["20413", "20414"],
        ["20269999"],
        ["1763683200"],
        ["20261121", "2026112205"],
        ["261121"],
    ],
)
def test_other_spellings_are_one_line_that_names_those_that_are_understood(
    tmp_path: Path, values: list[str]
) -> None:
    for value in values:
        write(tmp_path, f"dt={quote(value, safe='')}")
    with pytest.raises(UserError, match=r"such as '.*'; understood are 2026-11-21 \(also") as told:
        nights.find(str(tmp_path), ["dt"])
    assert "\n" not in str(told.value)


def test_a_folder_that_is_no_night_is_passed_over_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for value in ("2026-11-21", "backup", "__HIVE_DEFAULT_PARTITION__"):
        write(tmp_path, f"ds={value}")
    with caplog.at_level(logging.WARNING):
        found = nights.find(str(tmp_path), ["ds"])
    assert "partition ds: 1 values are no nights, such as 'backup'" in caplog.text
    assert n_rows(str(tmp_path), found, date(2026, 11, 21), date(2026, 11, 21)) == 1


@pytest.mark.parametrize(
    ("folder", "names", "message"),
    [
        ("dt=1", ["ds"], "partition 'ds' is no column; columns are dt, x; name the one"),
        ("year=2026/month=11", ["month"], "its values are such as '11'"),
        ("year=2026/month=Nov/day=21", ["day"], "no numbers of a year, a month and a day"),
        ("day=21/month=11/year=2026", ["day", "month", "year"], "in this order"),
        ("a=1/b=2", ["a", "b"], "give one column, or those of year, month and day"),
        ("a=1", ["x"], "its type is double"),
    ],
)
def test_what_is_wrong_with_partition_is_one_line(
    tmp_path: Path, folder: str, names: list[str], message: str
) -> None:
    write(tmp_path, folder)
    with pytest.raises(UserError, match=message):
        nights.find(str(tmp_path), names)


def test_files_without_rows_or_columns_say_nothing(tmp_path: Path) -> None:
    for name in ("a", "z"):
        pq.write_table(pa.table({}), tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"x": pa.array([], pa.float64())}), tmp_path / f"{name}1.parquet")
    table = pa.table({"at": pa.array(["2026/11/21"]), "x": [0.5]})
    pq.write_table(table, tmp_path / "m.parquet")
    assert nights.find(str(tmp_path), ["at"]).separator == "/"


def test_a_file_of_another_night_need_not_be_sound(tmp_path: Path) -> None:
    for day in (20, 21):
        write(tmp_path, f"year=2026/month=11/day={day}")
        write(tmp_path, f"dt=202611{day}")
    for folder in ("year=2026/month=11/day=20", "dt=20261120"):
        lakes.truncate(tmp_path / folder / "part.parquet", 100)
    for names in (["dt"], ["day"]):
        found = nights.find(str(tmp_path), names)
        assert n_rows(str(tmp_path), found, date(2026, 11, 21), date(2026, 11, 21)) == 1
