"""Tests of hosts and peers that are not installed are left out. Run by ``make test-hosts``."""

from importlib.util import find_spec

PACKAGES = (
    "bitsandbytes", "inseq", "nnsight", "peft", "pytorch_lightning", "quantus", "sentence_transformers", "shap",
    "transformer_lens",
)  # fmt: skip

collect_ignore_glob = ["test_*"] if any(find_spec(package) is None for package in PACKAGES) else []
