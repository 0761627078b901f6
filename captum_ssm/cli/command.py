"""The entry point: parse the arguments, explain the text, show the explanation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from captum_ssm import FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError, models
from captum_ssm.cli.file import explain_rows, print_row, summarise
from captum_ssm.cli.generation import explain_generation
from captum_ssm.cli.loading import Placement
from captum_ssm.cli.options import resolve
from captum_ssm.cli.output import show, terminal
from captum_ssm.cli.parser import parser
from captum_ssm.cli.prediction import explain_prediction
from captum_ssm.cli.problems import CommandError
from captum_ssm.cli.text_model import TextModel
from captum_ssm.datasets.reading import STANDARD_INPUT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words of the command; None takes those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    options = parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except (CommandError, FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError) as error:
        print("\n".join([f"captum-ssm: error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
    return 0


def explain(options: argparse.Namespace) -> None:
    """Explain one text, or the tokens that a model writes after it, and show the explanation.

    Args:
        options: The options of the command.

    Raises:
        CommandError: If a package is missing, the model cannot be loaded, the text has no token, the target is unknown,
            two options do not go together, or a file cannot be written.
    """
    options = resolve(options)
    if options.layers and options.html is None:
        raise CommandError("--layers is for the HTML page; add --html FILE, or leave --layers out.")
    if options.text == STANDARD_INPUT:
        options.text = sys.stdin.read()
    if options.json:
        print_row(options)
        return
    console = terminal()  # first: it needs a package that may be missing, and loading a model takes time
    placement = Placement(options.dtype, options.device or "cpu", options.load_in, options.device_map)
    text_model = TextModel.load(options.model or str(models.REVIEWS), placement)
    encoding = text_model.encode(options.text)
    explain_text = explain_prediction if options.generate is None else explain_generation
    show(explain_text(options, text_model, encoding), console, {"html": options.html, "png": options.png})


COMMANDS = {"explain": explain, "explain-file": explain_rows, "summary": summarise}
"""The function of each command."""
