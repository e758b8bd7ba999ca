"""Convert a tree of CSV files to Parquet.

    python examples/csv_to_parquet.py [DIRECTORY]      without it: in a temporary directory; needs pyarrow

    DIRECTORY/csv/STATION/MONTH.csv  --convert-->  DIRECTORY/parquet/STATION/MONTH.parquet

A Parquet file has its footer at its end: half of one is no table at all. Here none is ever seen, whatever is killed.
The second run asks for another compression, and does all of it again: a parameter is a part of what was done.
Exits with 1 if a table does not have the rows of its CSV file, or is not compressed as it was asked for.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet

from ringpool import Job, Report

STATIONS, MONTHS, ROWS = 5, 12, 500
COLUMNS = ("hour", "temperature", "weather")


def convert(src: Path, dst: Path, *, compression: str = "snappy") -> int:
    """The table of ``src`` as Parquet; how many rows it has."""
    options = pyarrow.csv.ReadOptions(use_threads=False)  # the workers are as many as there are cores
    table = pyarrow.csv.read_csv(src, read_options=options)
    pyarrow.parquet.write_table(table, dst, compression=compression)
    return table.num_rows


def make_tables(tables: Path) -> None:
    """Measurements of some stations, the same each time."""
    chance = random.Random(1)
    for station in range(STATIONS):
        (tables / f"station{station}").mkdir(parents=True, exist_ok=True)
        for month in range(MONTHS):
            with (tables / f"station{station}/{month + 1:02}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for hour in range(ROWS):
                    writer.writerow((hour, round(chance.gauss(10, 8), 1), chance.choice(["sun", "rain", "snow, wind"])))


def wrong_tables(tables: Path, parquet: Path, compression: str) -> list[Path]:
    """The CSV files whose Parquet file has other rows, or another compression."""
    wrong: list[Path] = []
    for path in sorted(tables.rglob("*.csv")):
        converted = (parquet / path.relative_to(tables)).with_suffix(".parquet")
        with path.open(newline="") as file:
            expected = [(int(row["hour"]), float(row["temperature"]), row["weather"]) for row in csv.DictReader(file)]
        rows = [tuple(row[name] for name in COLUMNS) for row in pyarrow.parquet.read_table(converted).to_pylist()]
        codec = pyarrow.parquet.read_metadata(converted).row_group(0).column(0).compression
        if rows != expected or codec.lower() != compression:
            wrong.append(path)
    return wrong


def run(tables: Path, parquet: Path, compression: str) -> Report:
    report = Job(convert, tables, f"{parquet}/{{parent}}/{{stem}}.parquet", params={"compression": compression}).run()
    progress = report.progress
    print(f"{compression}: {progress.done} tables converted, {progress.skipped} done before, {progress.failed} failed")
    return report


def demonstrate(place: Path) -> int:
    tables, parquet = place / "csv", place / "parquet"
    make_tables(tables)
    wrong: list[Path] = []
    is_as_expected = True
    for compression, n_expected in (("snappy", STATIONS * MONTHS), ("zstd", STATIONS * MONTHS), ("zstd", 0)):
        report = run(tables, parquet, compression)
        is_as_expected &= report.ok and report.progress.done == n_expected
        wrong += wrong_tables(tables, parquet, compression)
    print(f"{len(wrong)} tables differ from their CSV files")
    return 0 if is_as_expected and not wrong else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place)
    with tempfile.TemporaryDirectory(prefix="csv-to-parquet-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":  # worker processes import this module, too
    sys.exit(main())
