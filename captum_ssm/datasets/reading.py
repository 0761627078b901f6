"""Files of rows, read in blocks: JSON lines, CSV, text, Parquet, standard input."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from captum_ssm.datasets.columns import refuse_missing
from captum_ssm.datasets.packages import needed
from captum_ssm.errors import InvalidInputError

STANDARD_INPUT = "-"
"""The name of standard input in the place of a file."""

FORMS = ("jsonl", "csv", "txt", "parquet")
"""The forms of files."""

BLOCK_ROWS = 512
"""Rows of a block, which is explained and written as a whole."""

Row = tuple[dict[str, Any], str]
"""The columns of a row by name, and the error that the row has already: the empty text for none."""


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a file.

    Attributes:
        number: The number of the block in the file.
        start: The number of its first row in the file.
        rows: The columns of each row by name.
        errors: The errors of rows that could not be read, by their number in the block.
    """

    number: int
    start: int
    rows: list[dict[str, Any]]
    errors: dict[int, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a number, in hexadecimal, that changes with any entry of the rows."""
        return blake2b(
            repr((self.rows, sorted(self.errors.items()))).encode("utf-8", "replace"), digest_size=16
        ).hexdigest()


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        path: The file, or a folder of Parquet files; ``-`` for standard input.
        form: ``"jsonl"``, ``"csv"``, ``"txt"`` or ``"parquet"``; None: by the ending of the name.
        columns: Names of columns that have to be there.
        block_rows: Rows of a block.

    Raises:
        InvalidInputError: If the form or the number of rows is none.
    """

    path: str
    form: str | None = None
    columns: tuple[str, ...] = ()
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in FORMS:
            raise InvalidInputError(f"the form of a file is {', '.join(FORMS)}, not {self.form!r}.")
        if self.block_rows < 1:
            raise InvalidInputError(f"a part has at least one row, not {self.block_rows}.")

    def blocks(self) -> Iterator[Block]:
        """Read the file.

        Yields:
            Its blocks in order. Blocks are the same in every reading of the same file.

        Raises:
            InvalidInputError: If the file cannot be read, its form is not known, or a column is missing: from the first
                block, where only some rows of JSON lines lack it, that is an error of these rows.
        """
        number = start = 0
        with self._named(), closing(self._rows()) as rows:
            while some := list(islice(rows, self.block_rows)):
                read = [row for row, _ in some]
                errors = {k: error for k, (_, error) in enumerate(some) if error}
                if number == 0:
                    self._check_first(read, errors)
                yield Block(number, start, read, errors)
                number, start = number + 1, start + len(some)
        if number == 0:
            raise InvalidInputError(f"{self.path!r} has no rows.")

    def _check_first(self, rows: Sequence[dict[str, Any]], errors: dict[int, str]) -> None:
        """Raise if no row of the first block can be read, or a column is missing in all of them.

        Raises:
            InvalidInputError: In either case.
        """
        if len(errors) == len(rows):
            raise InvalidInputError(f"no row of {self.path!r} can be read as {self._form()}: {errors[0]}")
        refuse_missing(self.columns, list(dict.fromkeys(name for row in rows for name in row)))

    @contextmanager
    def on_disk(self) -> Iterator[Source]:
        """Copy standard input to a file that lasts as long as the context is open.

        Yields:
            The source of that file; of any other source itself.
        """
        if self.path != STANDARD_INPUT:
            yield self
            return
        with NamedTemporaryFile(prefix="captum-ssm-") as file:
            copyfileobj(sys.stdin.buffer, file)
            file.flush()
            yield replace(self, path=file.name, form=self._form())

    def kept(self) -> dict[str, Any]:
        """Return the names of the columns: of a Parquet file with their types of Arrow, of others with None.

        Raises:
            InvalidInputError: If the file cannot be read, or a column is missing.
        """
        first = next(self.blocks())
        if self._form() == "parquet":
            with self._named():
                schema = needed("pyarrow.parquet").read_schema(self._files()[0])
            return {name: schema.field(name).type for name in schema.names}
        return dict.fromkeys(name for row in first.rows for name in row)

    def count(self) -> int:
        """Return how many rows there are; of CSV how many lines, which are more if fields go over several."""
        with self._named():
            if self._form() == "parquet":
                parquet = needed("pyarrow.parquet")
                return sum(parquet.read_metadata(file).num_rows for file in self._files())
            with Path(self.path).open("rb") as file:
                lines, last = 0, b"\n"
                while part := file.read(1 << 20):
                    lines, last = lines + part.count(b"\n"), part[-1:]
            return lines + (last != b"\n") - (self._form() == "csv")

    def _form(self) -> str:
        """Return the form of the file.

        Raises:
            InvalidInputError: If its name does not say it.
        """
        if self.form is not None:
            return self.form
        if self.path == STANDARD_INPUT:
            return "txt"
        endings = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".txt": "txt"}
        ending = Path(self.path).suffix.lower()
        if ending in (".parquet", ".pq") or Path(self.path).is_dir():
            return "parquet"
        if ending not in endings:
            raise InvalidInputError(
                f"the form of {self.path!r} is not known by its name; name it: jsonl, csv, txt or parquet."
            )
        return endings[ending]

    def _files(self) -> list[Path]:
        """Return the Parquet files, in the order of their names.

        Raises:
            InvalidInputError: If the folder has none.
        """
        path = Path(self.path)
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
        if not files:
            raise InvalidInputError(f"the folder {self.path!r} has no Parquet files.")
        return files

    def _rows(self) -> Generator[Row, None, None]:
        """Yield all rows."""
        form = self._form()
        if form == "parquet":
            yield from _parquet(self._files(), self.block_rows)
            return
        with Path(self.path).open("rb") as file:
            yield from {"jsonl": _json_lines, "csv": _csv, "txt": _lines}[form](file)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in errors of reading it.

        Yields:
            None.

        Raises:
            InvalidInputError: For such an error.
        """
        errors: tuple[type[Exception], ...] = (OSError, csv.Error)
        if self._form() == "parquet":
            errors = (OSError, needed("pyarrow").ArrowException)
        try:
            yield
        except errors as error:
            raise InvalidInputError(f"cannot read {self.path!r}: {error}") from error


def _decoded(line: bytes) -> tuple[str, str]:
    """Return a line as text, and the error if it is not valid UTF-8; invalid bytes are replaced by U+FFFD."""
    try:
        return line.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return line.decode("utf-8", "replace"), f"InvalidInputError: the row is not valid UTF-8: {error.reason}."


def _stripped(file: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file without their ends, and without the mark of Unicode at its start."""
    for number, line in enumerate(file):
        yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")


def _lines(file: BinaryIO) -> Iterator[Row]:
    """Yield each line as the column ``text``."""
    for line in _stripped(file):
        text, error = _decoded(line)
        yield {"text": text}, error


def _json_lines(file: BinaryIO) -> Iterator[Row]:
    """Yield the object of each line; a line that is none is a row with an error."""
    for line in _stripped(file):
        text, error = _decoded(line)
        if error or not text.strip():
            yield {}, error or "InvalidInputError: the line is empty."
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as problem:
            yield {}, f"InvalidInputError: the line is no JSON: {problem}"
            continue
        if isinstance(value, dict):
            yield value, ""
        else:
            yield {}, f"InvalidInputError: the line is a {type(value).__name__}, not an object with columns."


def _csv(file: BinaryIO) -> Iterator[Row]:
    """Yield the rows below the head of a CSV file; one with another number of fields has an error."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text)
    head = next(reader, [])
    for fields in reader:
        cells = [cell.encode("utf-8", "surrogateescape") for cell in fields]
        decoded = [_decoded(cell) for cell in cells]
        error = next((error for _, error in decoded if error), "")
        if not fields:
            error = "InvalidInputError: the line is empty."
        elif len(fields) != len(head):
            error = f"InvalidInputError: the row has {len(fields)} fields, and the head {len(head)}."
        values = [value for value, _ in decoded]
        yield dict(zip(head, [*values, *[""] * (len(head) - len(values))])), error


def _parquet(files: Sequence[Path], rows: int) -> Iterator[Row]:
    """Yield the rows of Parquet files, one file after the other."""
    parquet = needed("pyarrow.parquet")
    for path in files:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):
                for row in batch.to_pylist():
                    yield row, ""
