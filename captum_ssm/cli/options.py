"""The options of the command ``explain``, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_ssm.cli.methods import METHOD_OPTIONS, METHODS
from captum_ssm.cli.problems import CommandError


def add_explain_command(commands: Any) -> None:
    """Add the command ``explain`` to the commands of the parser."""
    command = commands.add_parser("explain", help="colour a text by the contributions of its tokens to a prediction")
    _add_question(command)
    add_method(command)
    _add_execution(command)


def _add_question(command: argparse.ArgumentParser) -> None:
    """Add the options that say which output of which model is explained."""
    command.add_argument("text", help="the text to explain; - reads it from standard input")
    add_model(command)
    command.add_argument(
        "--target", default=None, help="token or class to explain, by name or number (default: the prediction)"
    )
    command.add_argument(
        "--contrast", default=None, metavar="TARGET", help="explain why the target and not this one, by name or number"
    )
    command.add_argument(
        "--generate",
        type=int,
        default=None,
        metavar="N",
        help="let the model write up to N tokens after the text, and explain each of them",
    )
    command.add_argument(
        "--score",
        choices=["log-probability", "logit"],
        default="log-probability",
        help="score of the target to explain; a part that all logits have in common decides nothing "
        "(default: %(default)s)",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the choice of the model."""
    command.add_argument(
        "--model",
        default=None,
        metavar="PATH_OR_HUB_ID",
        help="folder written by save_pretrained, also of a PEFT adapter, or a name on the hub (default: the shipped "
        "model)",
    )


def add_method(command: argparse.ArgumentParser) -> None:
    """Add the choice of the method, and the options of single methods; :func:`resolve` gives them their defaults."""
    command.add_argument(
        "--method", choices=sorted(METHODS), default=None, help="default: relevance; with --generate, attribution"
    )
    command.add_argument(
        "--reference",
        default=None,
        metavar="WORD",
        help="relevance: the token of which the reference text consists: unk, pad or mask (the tokenizer's), a word, "
        "or an id; none: frozen gates (default: the first of unk, pad, mask that the model has, else none)",
    )
    command.add_argument(
        "--gates",
        choices=["half", "value"],
        default=None,
        help="relevance with --reference none: how the relevance of a product of a gate and a value is divided, half "
        "to each or all to the value (default: half)",
    )
    command.add_argument(
        "--rectify",
        choices=["channel", "token", "none"],
        default=None,
        help="attribution: where negative contributions are dropped (default: none)",
    )
    command.add_argument(
        "--fusion",
        choices=["absolute", "mean", "positive", "norm", "root"],
        default=None,
        help="rollout and raw: how channels become one matrix (default: root)",
    )
    command.add_argument(
        "--attention",
        choices=["unified", "scan"],
        default=None,
        help="attribution, rollout and raw: of the whole layer, or of its recurrence alone (default: unified)",
    )
    command.add_argument(
        "--without",
        nargs="+",
        default=None,
        metavar="FACTOR",
        help="attribution, rollout and raw: leave out factors of the attention: conv, act, gate, skip, ...",
    )


def _add_execution(command: argparse.ArgumentParser) -> None:
    """Add the options that say how the model runs, and what is written."""
    add_placement(command)
    command.add_argument(
        "--layers",
        action="store_true",
        default=None,
        help="relevance: the HTML page also shows the relevance before each layer, by one more explanation",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    command.add_argument("--png", type=Path, metavar="FILE", help="also write a picture")
    command.add_argument("--json", action="store_true", help="print the explanation as one line of JSON instead")


def add_placement(command: argparse.ArgumentParser) -> None:
    """Add the options that say how the model's numbers are stored, and where."""
    command.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="floating-point type of the model (default: %(default)s)",
    )
    command.add_argument("--device", default=None, help="torch device to run on (default: cpu)")
    command.add_argument(
        "--load-in",
        choices=["8bit", "4bit"],
        default=None,
        help="quantise the layers' weights by bitsandbytes, to LLM.int8 or nf4 (default: floating point)",
    )
    command.add_argument(
        "--device-map",
        default=None,
        metavar="MAP",
        help="spread the model over devices by accelerate: auto, balanced, sequential, or JSON from parts to devices",
    )


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the default method and the defaults of its options.

    Args:
        options: The options as parsed; None where one is missing.

    Returns:
        A copy of the options, complete.

    Raises:
        CommandError: If an option belongs to another method, or two do not go together.
    """
    options = argparse.Namespace(**vars(options))
    if options.device is not None and options.device_map is not None:
        raise CommandError("--device is one device, --device-map are several; leave one of them out.")
    is_default = options.method is None
    if is_default:
        options.method = "relevance" if options.generate is None else "attribution"
    for name, (methods, default) in METHOD_OPTIONS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.method not in methods:
            method = f"{options.method}, the default here" if is_default else options.method
            remedy = f"add --method {_alternatives(methods)}, or leave --{name} out"
            raise CommandError(f"--{name} is no option of the method {method}; {remedy}.")
        elif name == "gates" and options.reference != "none":
            raise CommandError("--gates is for frozen gates; add --reference none, or leave --gates out.")
    return options


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
