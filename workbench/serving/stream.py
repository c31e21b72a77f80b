"""Rows from a file to a file, predicted a few hundred at a time."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

from workbench.errors import DataError

from .predictor import Predictor

CHUNK = 256  # rows that are predicted before any of them is written
STDIN = "-"
FORMATS = (".csv", ".jsonl")

Row = dict[str, Any]


def predict(
    version: Path,
    source: str,
    target: Path | None,
    on_rows: Callable[[int], None],
    *,
    base: str | None = None,
    device: str = "auto",
    probabilities: bool = False,
    max_new_tokens: int | None = None,
) -> int:
    """Predict the rows of a file.

    Args:
        version: folder, see `Predictor.open`.
        source: a .csv or .jsonl file, or "-" for JSON lines from standard input.
        target: a .csv or .jsonl file; None writes JSON lines to standard output.
        on_rows: hears how many rows are done.

    Returns:
        the number of rows.

    Raises:
        DataError: a file cannot be read or written, or a row lacks what it takes.
        CheckpointError, ModelError: the version or its base model cannot be loaded.
    """
    check(source, target)
    done = 0
    with ExitStack() as files:
        rows = reading(source, files)
        rows = chain([next(rows)], rows)  # a file that cannot be read is found before the model is loaded
        predictor = Predictor.open(version, base, device)
        write = writing(target, files)
        while chunk := list(islice(rows, CHUNK)):
            columns = {name: [row.get(name) for row in chunk] for name in chunk[0]}
            try:
                found = predictor.predict(columns, max_new_tokens, probabilities)
            except DataError as error:
                raise DataError(f"{source}, after {done:,} rows: {error}") from error
            for i, row in enumerate(chunk):
                write(row | {name: values[i] for name, values in found.items()})
            done += len(chunk)
            on_rows(done)
    return done


def check(source: str, target: Path | None) -> None:
    """Refuse files of other formats, and to write over the input.

    Raises:
        DataError: see above.
    """
    for file in (Path(source), target):
        if file and str(file) != STDIN and file.suffix not in FORMATS:
            raise DataError(f"{file} is neither .csv nor .jsonl.")
    if target and target.exists() and Path(source).exists() and target.samefile(source):
        raise DataError(f"{target} is the input; name another file for the output.")


def reading(source: str, files: ExitStack) -> Iterator[Row]:
    """The rows of a file, one by one.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        lines, count = sys.stdin, 0
        if source != STDIN:
            lines = files.enter_context(Path(source).open(newline="", encoding="utf-8-sig"))  # noqa: SIM115
        if source.endswith(".csv"):
            for row in csv.DictReader(lines):
                count += 1
                yield {name: cell for name, cell in row.items() if name is not None}
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    count += 1
                    yield _row(line, f"{source}:{number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not count:
        raise DataError(f"{source} holds no rows.")


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: this is no JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: a row must be an object such as {{"text": "..."}}.')
    return row


def writing(target: Path | None, files: ExitStack) -> Callable[[Row], None]:
    """What writes a row.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        file = files.enter_context(target.open("w", newline="", encoding="utf-8")) if target else sys.stdout
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror}.") from error
    if target is None or target.suffix == ".jsonl":

        def write(row: Row) -> None:
            print(json.dumps(row, ensure_ascii=False), file=file)

        return write
    table: list[csv.DictWriter[str]] = []

    def write_cells(row: Row) -> None:
        if not table:
            table.append(csv.DictWriter(file, row, extrasaction="ignore"))
            table[0].writeheader()
        table[0].writerow({name: _cell(value) for name, value in row.items()})

    return write_cells


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else value
