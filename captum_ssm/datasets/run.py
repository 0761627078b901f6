"""A whole file explained: read, explained, written in parts, resumed where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from captum_ssm._progress import progress_bar
from captum_ssm.datasets.engines import Engine, Local, Work
from captum_ssm.datasets.explain import Explain
from captum_ssm.datasets.parts import Output
from captum_ssm.datasets.reading import Source
from captum_ssm.datasets.report import Report


def explain_file(
    explain: Explain,
    source: Source | str | Path,
    folder: str | Path,
    *,
    engine: Engine | None = None,
    resume: bool = False,
    show_progress: bool = False,
) -> Report:
    """Explain all rows of a file, and write them to a folder of Parquet files.

    A part of the folder is written whole or not at all, so a run that is killed goes on at the first part that is
    missing, and its rows are those, bit by bit, of a run that was not.

    Args:
        explain: The explanation.
        source: The file, ``-`` for standard input: JSON lines, CSV, a text on each line, or Parquet.
        folder: The folder of the output.
        engine: Where the rows are explained; None: in this process, one block after the other.
        resume: Go on with the output that is there.
        show_progress: Show a progress bar, with the rows a second and the time left.

    Returns:
        The fate of the rows.

    Raises:
        InvalidInputError: If the file cannot be read, a column is missing, the output cannot be written, was begun with
            another model, method or file, or another run writes it.
        ModelStateError: If the model is in training mode.
        UnsupportedModelError: If the method does not know the model.

    Cost:
        One block of rows in memory at a time.
    """
    engine = engine or Local()
    source = source if isinstance(source, Source) else Source(str(source))
    columns = ([] if explain.prepare is not None else [explain.column]) + explain.question.columns()
    source = replace(source, columns=tuple(dict.fromkeys([*source.columns, *columns])))
    output = Output(Path(folder))
    with source.on_disk() as file, output.held():
        kept = file.kept()
        output.refuse_begun(resume)
        with engine.opened():
            identity = engine.identity(explain)
            done = output.begin(
                {
                    "model": identity,
                    "settings": explain.settings(),
                    "columns": list(kept),
                    "rows of a part": file.block_rows,
                }
            )
            total = file.count() if show_progress else 0
            with progress_bar("explain", total, show_progress, "row", output.count()) as on_rows:
                for part in engine.parts(Work(explain, file, kept, done, identity), on_rows):
                    output.write(part.number, part.table, part.digest)
        return Report.of(output)
