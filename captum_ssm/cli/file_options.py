"""The options of the commands ``explain-file`` and ``summary``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_ssm.cli.options import add_method, add_model, add_placement
from captum_ssm.datasets.batches import BATCH_ROWS, BATCH_TOKENS
from captum_ssm.datasets.reading import BLOCK_ROWS, FORMS


def add_file_command(commands: Any) -> None:
    """Add the command ``explain-file`` to the commands of the parser."""
    command = commands.add_parser(
        "explain-file",
        help="explain all rows of a file, and write them to a folder of Parquet files",
        description="Explain all rows of a file. A run that was killed goes on with --resume where it stopped.",
    )
    command.add_argument(
        "source", metavar="IN", help="JSON lines, CSV, a text on each line, Parquet, or - for standard input"
    )
    command.add_argument("folder", metavar="OUT", type=Path, help="folder of the Parquet files")
    command.add_argument("--format", choices=FORMS, default=None, help="of IN (default: by the ending of its name)")
    command.add_argument("--resume", action="store_true", help="go on with the output that is in OUT")
    command.add_argument("--quiet", action="store_true", help="show no progress bar")
    _add_columns(command)
    add_method(command)
    add_placement(command)
    _add_sizes(command)
    _add_engine(command)


def add_summary_command(commands: Any) -> None:
    """Add the command ``summary`` to the commands of the parser."""
    command = commands.add_parser("summary", help="what the output of explain-file says about the whole data set")
    command.add_argument("folder", metavar="OUT", type=Path, help="folder that explain-file wrote")
    command.add_argument("--words", type=int, default=10, metavar="N", help="words shown for and against each class")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    command.add_argument("--png", type=Path, metavar="FILE", help="also write a picture")


def _add_columns(command: argparse.ArgumentParser) -> None:
    """Add the options that say which outcome of which column is explained."""
    command.add_argument(
        "--text-column", default="text", metavar="COLUMN", help="of texts, or rows of token ids (default: text)"
    )
    add_model(command)
    command.add_argument(
        "--target", default=None, help="outcome to explain in all rows, by name or number (default: the prediction)"
    )
    command.add_argument("--target-column", default=None, metavar="COLUMN", help="column that names it for each row")
    command.add_argument(
        "--contrast",
        default=None,
        metavar="TARGET",
        help="explain why the target and not this one; runner-up: the most probable other one",
    )
    command.add_argument("--contrast-column", default=None, metavar="COLUMN", help="column that names it for each row")
    command.add_argument(
        "--classes",
        nargs="+",
        default=None,
        metavar="OUTCOME",
        help="outcomes that a prediction is chosen among (default: all)",
    )
    command.add_argument(
        "--score",
        choices=["log-probability", "logit"],
        default="log-probability",
        help="score of the target to explain (default: %(default)s)",
    )
    command.add_argument(
        "--layers",
        action="store_true",
        default=None,
        help="relevance: also the share of the score that passes each layer",
    )


def _add_sizes(command: argparse.ArgumentParser) -> None:
    """Add the options that say how long a row, how large a batch and a part may be."""
    command.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="longest text (default: that of tokenizer and model)"
    )
    command.add_argument("--truncate", action="store_true", help="cut longer texts off, rather than refuse them")
    command.add_argument(
        "--batch-tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="tokens of a batch (default: %(default)s; on a GPU more)",
    )
    command.add_argument(
        "--batch-rows", type=int, default=BATCH_ROWS, metavar="N", help="rows of a batch at most (default: %(default)s)"
    )
    command.add_argument(
        "--part-rows",
        type=int,
        default=BLOCK_ROWS,
        metavar="N",
        help="rows of a part, which is written as a whole (default: %(default)s)",
    )
    command.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of a process on the CPU; another number may change the last bits (default: %(default)s)",
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    """Add the options that say where the rows are explained."""
    command.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="this process, or a cluster of Ray (default: local)"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="ray: how many processes explain (default: one for each CPU of --threads, or each GPU)",
    )
    command.add_argument(
        "--address",
        default=None,
        help="ray: the cluster; auto: that of this machine (default: RAY_ADDRESS, else one of this machine alone)",
    )
    command.add_argument(
        "--gpus", type=float, default=0, metavar="N", help="ray: GPUs of each worker (default: %(default)s)"
    )
