"""Tests of packages that are not installed are left out. Run by ``make test-deployed``."""

from importlib.util import find_spec

PACKAGES = ("accelerate", "bitsandbytes", "gguf", "hqq", "optimum", "peft", "torchao")

collect_ignore_glob = ["test_*"] if any(find_spec(package) is None for package in PACKAGES) else []
