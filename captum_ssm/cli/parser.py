"""The parser of the command line."""

from __future__ import annotations

import argparse

import captum_ssm
from captum_ssm.cli.file_options import add_file_command, add_summary_command
from captum_ssm.cli.options import add_explain_command


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    summary = (captum_ssm.__doc__ or "").partition("\n")[0]
    top = argparse.ArgumentParser(prog="captum-ssm", description=summary)
    top.add_argument("--version", action="version", version=f"captum-ssm {captum_ssm.__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    add_explain_command(commands)
    add_file_command(commands)
    add_summary_command(commands)
    return top
