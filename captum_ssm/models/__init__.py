"""Models that ship with the package, as folders for ``from_pretrained``."""

from pathlib import Path

REVIEWS = Path(__file__).parent / "reviews"
"""A small Mamba that tells positive from negative movie reviews; its README.md is the model card."""
