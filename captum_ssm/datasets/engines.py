"""The engine that explains block after block in this process, and the form of all engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from captum_ssm.datasets.explain import Explain
from captum_ssm.datasets.reading import Block, Source
from captum_ssm.datasets.tables import table_of
from captum_ssm.errors import InvalidInputError


@dataclass(frozen=True)
class Part:
    """An explained block.

    Attributes:
        number: The number of the block.
        table: Its rows, a ``pyarrow.Table``.
        digest: The digest of the rows of the input.
    """

    number: int
    table: Any
    digest: str


@dataclass(frozen=True)
class Work:
    """The work of an engine: which blocks of which file, by which explanation.

    Attributes:
        explain: The explanation.
        source: The file.
        kept: The input columns to keep by name, with their types of Arrow; None: as text.
        done: The digests of the rows of blocks that are done, by number.
        identity: The identity of the model.
    """

    explain: Explain
    source: Source
    kept: Mapping[str, Any]
    done: Mapping[int, str]
    identity: Mapping[str, Any]

    def blocks(self) -> Iterator[Block]:
        """Read the blocks that are not done yet.

        Yields:
            The blocks in order.

        Raises:
            InvalidInputError: If the rows of a block that is done have changed.
        """
        for block in self.source.blocks():
            if block.number not in self.done:
                yield block
            elif self.done[block.number] != block.digest():
                raise InvalidInputError(
                    f"the rows {block.start} to {block.start + len(block.rows) - 1} of {self.source.path!r} are not "
                    "those that the output was made of; go on with the same file, or name another folder."
                )

    def part(self, block: Block, on_rows: Callable[[int], object] = lambda count: None) -> Part:
        """Return a block explained.

        Args:
            block: The block.
            on_rows: Called with the number of rows whenever some are done.
        """
        explanation = self.explain.explained(block.rows, on_rows, block.errors)
        return Part(block.number, table_of(block.start, block.rows, self.kept, explanation), block.digest())


class Engine(Protocol):
    """Where the blocks are explained."""

    def opened(self) -> AbstractContextManager[None]:
        """Return the context in which the engine is used."""

    def identity(self, explain: Explain) -> dict[str, Any]:
        """Return the model's identity: class, digests of weights and vocabulary, layers."""

    def parts(self, work: Work, on_rows: Callable[[int], object]) -> Iterator[Part]:
        """Yield each part once, in any order."""


class Local:
    """Explains block after block in this process."""

    def opened(self) -> AbstractContextManager[None]:
        """Return the context in which the engine is used: any."""
        return nullcontext()

    def identity(self, explain: Explain) -> dict[str, Any]:
        """Return the model's identity: class, digests of weights and vocabulary, layers."""
        return explain.ready().identity()

    def parts(self, work: Work, on_rows: Callable[[int], object]) -> Iterator[Part]:
        """Explain the blocks.

        Args:
            work: Which blocks, and how.
            on_rows: Called with the number of rows whenever some are done.

        Yields:
            Each part once, in order.
        """
        for block in work.blocks():
            yield work.part(block, on_rows)
