"""The folder of an output: parts that are written whole or not at all, and the manifest."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from captum_ssm.datasets.packages import needed
from captum_ssm.errors import InvalidInputError

MANIFEST, LOCK = "_manifest.json", "_lock"
"""Files beside the parts; readers of Parquet folders skip names that begin so."""

_KEY = b"captum_ssm"
"""The key in the metadata of a part under which its own entries are."""


class Output:
    """The folder of an output.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while the context is open, so that no other run writes into it.

        Yields:
            None.

        Raises:
            InvalidInputError: If the folder cannot be written, or another run holds it.
        """
        lock = self._hold()
        try:
            yield
        finally:
            os.close(lock)

    def refuse_begun(self, resume: bool) -> None:
        """Raise if the folder holds an output that is not to be resumed, or anything else.

        Args:
            resume: Whether to go on with an output that is there.

        Raises:
            InvalidInputError: In these cases.
        """
        if self.manifest():
            if not resume:
                raise InvalidInputError(
                    f"{str(self.folder)!r} holds an output already, {len(self._parts())} parts of it; go on with "
                    "resume, or name another folder."
                )
            return
        names = [path.name for path in self.folder.iterdir()]
        others = [name for name in names if name != LOCK and not name.startswith(".part-")]
        if others:
            raise InvalidInputError(
                f"{str(self.folder)!r} is no output, and holds other files ({others[0]!r}); name a new folder."
            )

    def begin(self, begun_with: Mapping[str, Any]) -> dict[int, str]:
        """Begin the output, or go on with it.

        Args:
            begun_with: All that the output depends on: model, settings.

        Returns:
            The digests of the rows of the parts that are there, by number.

        Raises:
            InvalidInputError: If it was begun with something else, a part is damaged, or it cannot be written.
        """
        before, asked = self.manifest(), json.loads(json.dumps(dict(begun_with)))
        for name in asked if before else ():
            if before.get(name) != asked[name]:
                difference = _differing(before.get(name), asked[name])
                raise InvalidInputError(
                    f"the output in {str(self.folder)!r} was begun with another {name}: {difference}. Go on with the "
                    "same, or name another folder."
                )
        if not before:
            self._write_manifest(begun_with)
        for left in self.folder.glob(".part-*"):
            left.unlink()
        return {number: self._about(path)["rows"] for number, path in self._parts().items()}

    def count(self) -> int:
        """Return how many rows the parts that are there have."""
        parquet = needed("pyarrow.parquet")
        return sum(parquet.read_metadata(path).num_rows for path in self._parts().values())

    def write(self, number: int, table: Any, digest: str) -> None:
        """Write a part: whole under another name, which is then changed.

        Args:
            number: The number of its block.
            table: Its rows, a ``pyarrow.Table``.
            digest: The digest of the rows that it was made of.

        Raises:
            InvalidInputError: If it cannot be written: no space is left, for example. Nothing is left of it then.
        """
        parquet = needed("pyarrow.parquet")
        about = {_KEY: json.dumps({"number": number, "rows": digest}).encode()}
        path = self._path(number)
        hidden = path.with_name(f".{path.name}")
        try:
            parquet.write_table(table.replace_schema_metadata(about), hidden, compression="zstd")
            _flush(hidden)
            hidden.replace(path)
            _flush(self.folder)
        except OSError as error:
            raise InvalidInputError(
                f"cannot write {str(path)!r}: {error}. All parts before it are complete: mend the cause, and go on "
                "with resume."
            ) from error
        finally:
            with suppress(OSError):
                hidden.unlink(missing_ok=True)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Read the parts one after the other.

        Args:
            columns: Names of the columns to read; None: all. One that is not there is left out.

        Yields:
            The table of each, in the order of the rows.

        Raises:
            InvalidInputError: If there is none, or one cannot be read.
        """
        parquet = needed("pyarrow.parquet")
        parts = self._parts()
        if not parts:
            raise InvalidInputError(f"{str(self.folder)!r} holds no parts of an output.")
        for number in sorted(parts):
            with _readable(parts[number]), parquet.ParquetFile(parts[number]) as file:
                names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                table = file.read(columns=names)
            yield table

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; empty if that is not there."""
        path = self.folder / MANIFEST
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except ValueError as error:
            raise InvalidInputError(f"cannot read {str(path)!r}: {error}") from error

    def _hold(self) -> int:
        """Return the descriptor of the folder's lock, held until it is closed or the process ends.

        Raises:
            InvalidInputError: If the folder cannot be made or written, or another process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InvalidInputError(f"cannot write into {str(self.folder)!r}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 200).decode("utf-8", "replace").strip()
            os.close(lock)
            raise InvalidInputError(
                f"another run writes into {str(self.folder)!r} ({holder or 'its process is not known'}); wait for it, "
                "or name another folder."
            ) from error
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def _write_manifest(self, begun_with: Mapping[str, Any]) -> None:
        """Write the manifest, whole or not at all.

        Raises:
            InvalidInputError: If it cannot be written.
        """
        hidden = self.folder / f".part-{MANIFEST}"
        try:
            hidden.write_text(json.dumps(dict(begun_with), indent=1), encoding="utf-8")
            _flush(hidden)
            hidden.replace(self.folder / MANIFEST)
        except OSError as error:
            raise InvalidInputError(f"cannot write into {str(self.folder)!r}: {error}") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _parts(self) -> dict[int, Path]:
        """Return the parts that are there, by number."""
        return {int(path.stem.partition("-")[2]): path for path in self.folder.glob("part-*.parquet")}

    def _about(self, path: Path) -> dict[str, Any]:
        """Return the entries of a part about itself.

        Raises:
            InvalidInputError: If it cannot be read, or says nothing.
        """
        parquet = needed("pyarrow.parquet")
        with _readable(path):
            metadata = parquet.read_schema(path).metadata or {}
        if _KEY not in metadata:
            raise InvalidInputError(f"{str(path)!r} is no part of this output; move it elsewhere.")
        return dict(json.loads(metadata[_KEY]))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name a part in the error of reading it.

    Yields:
        None.

    Raises:
        InvalidInputError: If it is damaged.
    """
    pyarrow = needed("pyarrow")
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidInputError(
            f"the part {str(path)!r} is damaged ({error}); delete it, and go on with resume, which makes it again."
        ) from error


def _flush(path: Path) -> None:
    """Have a file or a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differing(before: Any, now: Any) -> str:
    """Return in words how two settings differ, by the innermost entries that do."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return ", ".join(f"{name} {_differing(before.get(name), now.get(name))}" for name in names)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return ", ".join(_differing(one, other) for one, other in zip(before, now) if one != other)
    return f"{_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
