"""Tests of packages that are not installed are left out. Run by ``make test-packages``."""

from importlib.util import find_spec

PACKAGES = ("mambapy", "mambavision", "minGRU_pytorch", "recurrentgemma", "rwkv7_hf", "s5", "torchscale", "xlstm")

collect_ignore_glob = ["test_*"] if any(find_spec(package) is None for package in PACKAGES) else []
