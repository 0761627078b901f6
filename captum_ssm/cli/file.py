"""The commands on many rows: explain a file, sum up an output; and one text as a row."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from captum_ssm import models
from captum_ssm.cli.loading import Placement, load
from captum_ssm.cli.methods import METHOD_OPTIONS, make_method
from captum_ssm.cli.options import resolve
from captum_ssm.cli.problems import CommandError
from captum_ssm.datasets import Explain, Ray, Source, explain_file, summary
from captum_ssm.datasets.engines import Engine, Local


def explain_rows(options: argparse.Namespace) -> None:
    """Explain the rows of a file, and print their fate.

    Args:
        options: The options of the command.

    Raises:
        CommandError: If two options do not go together.
    """
    options = resolve(Namespace(**vars(options), generate=None))
    rows = {
        "column": options.text_column,
        "target_column": options.target_column,
        "contrast_column": options.contrast_column,
        "classes": options.classes,
        "layers": options.layers,
        "max_tokens": options.max_tokens,
        "truncate": options.truncate,
        "batch_tokens": options.batch_tokens,
        "batch_rows": options.batch_rows,
        "threads": options.threads,
    }
    source = Source(options.source, options.format, (), options.part_rows)
    report = explain_file(
        _explanation(options, **rows),
        source,
        options.folder,
        engine=_engine(options),
        resume=options.resume,
        show_progress=not options.quiet,
    )
    print("\n".join(report.lines()))


def print_row(options: argparse.Namespace) -> None:
    """Explain one text, and print it as ``explain-file`` writes it: one line of JSON.

    Args:
        options: The resolved options of ``explain``.

    Raises:
        CommandError: If the text cannot be explained, or an option does not go with it.
    """
    for name in ("generate", "html", "png"):
        if getattr(options, name) is not None:
            raise CommandError(f"--json prints one prediction; leave --{name} out.")
    row = _explanation(options)({"text": [options.text]})
    values = {name: _plain(column[0]) for name, column in row.items()}
    if values["error"]:
        raise CommandError(values["error"].partition(": ")[2])
    print(json.dumps(values, allow_nan=False))


def summarise(options: argparse.Namespace) -> None:
    """Print the summary of an output, and write it to files.

    Args:
        options: The options of the command.

    Raises:
        CommandError: If a file cannot be written.
    """
    found = summary(options.folder, surprises=options.words)
    print(found.table(options.words))
    writers: dict[str, Callable[[Path], object]] = {
        "html": lambda path: path.write_text(found.html(options.words), encoding="utf-8"),
        "png": lambda path: found.figure(options.words).savefig(path),
    }
    for name, write in writers.items():
        if (path := getattr(options, name)) is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            except (OSError, ValueError) as error:
                raise CommandError(f"cannot write {str(path)!r}: {error}") from error


def _explanation(options: argparse.Namespace, **rows: Any) -> Explain:
    """Return the explanation of rows that the options ask for.

    Args:
        options: The resolved options, of either command.
        **rows: Those of rows of a file alone.
    """
    placement = Placement(options.dtype, options.device or "cpu", options.load_in, options.device_map)
    method = Namespace(method=options.method, **{name: getattr(options, name) for name in METHOD_OPTIONS})
    return Explain(
        partial(load, options.model or str(models.REVIEWS), placement),
        method=partial(make_method, method),
        target=options.target,
        contrast=options.contrast,
        score=options.score,
        reference=options.reference,
        **rows,
    )


def _engine(options: argparse.Namespace) -> Engine:
    """Return the engine that the options ask for.

    Raises:
        CommandError: If an option belongs to another engine.
    """
    if options.engine == "ray":
        return Ray(options.workers, options.address, options.gpus)
    for name in ("workers", "address", "gpus"):
        if getattr(options, name):
            raise CommandError(f"--{name} is of the engine ray; add --engine ray, or leave --{name} out.")
    return Local()


def _plain(value: Any) -> Any:
    """Return an entry of a row in JSON's own types; None for NaN."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return None if isinstance(value, float) and value != value else value
