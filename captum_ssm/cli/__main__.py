"""Run the command line: ``python -m captum_ssm.cli``."""

import sys

from captum_ssm.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
