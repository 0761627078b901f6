"""The error of the command line itself."""

MISSING_EXTRA = "this needs transformers and rich: pip install 'captum-ssm[cli]'"
"""The message when a package of the extra ``cli`` is not installed."""


class CommandError(Exception):
    """The command cannot be carried out; the message names the cause and the remedy."""
