"""The command line: ``captum-ssm explain "text"``."""

from captum_ssm.cli.command import main

__all__ = ["main"]
