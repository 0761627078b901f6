"""Measure which layers are supported, and print their table; ``--write`` puts it into ``docs/layers.md``.

Run it from the repository with the package's ``test`` extra installed::

    python -m scripts.support_table --write
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionAttribution, InvalidInputError, supported
from captum_ssm.layers.fidelity import relative_error
from scripts.sections import write_section
from tests.conftest import build
from tests.families import FAMILIES, VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
PAGE, SECTION = ROOT / "docs" / "layers.md", "supported"
TYPES = (torch.float64, torch.bfloat16, torch.float16)
HEADER = ("model type", "layers", "kernels", "largest error", "left padding", "types")


class Measured(NamedTuple):
    """What one family's tiny model showed."""

    error: float
    """Largest relative error of any layer's decomposition in float32, on four batches."""
    left_padding: bool
    """Whether left padding is explained exactly; it is refused where the model itself is not exact."""
    types: tuple[str, ...]
    """Floating-point types in which the model runs and is explained."""


def measure(family: str) -> Measured:
    """Measure a family's tiny model."""
    model = build(family)
    method = ImplicitAttentionAttribution(model, rectify=None)
    error = 0.0
    for seed in range(4):
        ids = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))
        method.attribute(ids, target=3)
        error = max(error, *method.fidelity.values())
    types = ["float32", *(name(dtype) for dtype in TYPES if runs_in(family, dtype, ids))]
    return Measured(error, explains_left_padding(model, ids), tuple(types))


def explains_left_padding(model: nn.Module, ids: Tensor) -> bool:
    """Whether padding before the tokens is explained; then their scores must be those without it.

    Returns:
        Whether; False if the model refuses padding.

    Raises:
        AssertionError: If the scores differ.
    """
    method = ImplicitAttentionAttribution(model, rectify=None)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    try:
        scores = method.attribute(padded, 3, (padded > 0).long())
    except InvalidInputError:
        return False
    error = relative_error(scores[:, 3:], method.attribute(ids, target=3))
    assert error <= 1e-3, f"{type(model).__name__}: left padding changes the scores by {error:.1e}"
    assert bool(scores[:, :3].eq(0).all())
    return True


def in_type(family: str, dtype: torch.dtype) -> Any:
    """Return the family's model in another type, with experts that run in any."""
    model = build(family)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # the grouped product of torch has no float64
    return model.to(dtype)


def runs(model: Any, ids: Tensor) -> bool:
    """Whether the model itself runs."""
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except RuntimeError:
        return False
    return True


def runs_in(family: str, dtype: torch.dtype, ids: Tensor) -> bool:
    """Whether the model runs in this type; if so, it must be explained."""
    model = in_type(family, dtype)
    if not runs(model, ids):
        return False
    return bool(ImplicitAttentionAttribution(model, rectify=None).attribute(ids, target=3).isfinite().all())


def name(dtype: torch.dtype) -> str:
    """Return a type's name without its module."""
    return str(dtype).removeprefix("torch.")


def table() -> str:
    """Return the measured table in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for family in dict.fromkeys(support.family for support in supported() if support.family in FAMILIES):
        layers = [support for support in supported() if support.family == family]
        layers.sort(key=lambda support: support.kernel == "softmax attention")
        variants = [measure(variant) for variant in FAMILIES if variant.partition(" ")[0] == family]
        types = [t for t in variants[0].types if all(t in variant.types for variant in variants)]
        everything = len(types) == 1 + len(TYPES)
        rows.append((
            f"`{family}`",
            ", ".join(f"`{layer.layer}`" for layer in layers),
            ", ".join(dict.fromkeys(layer.kernel for layer in layers)),
            f"{max(variant.error for variant in variants):.0e}",
            "exact" if all(variant.left_padding for variant in variants) else "refused",
            "all" if everything else ", ".join(types),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section() -> str:
    """Return what stands between the markers."""
    import transformers

    return f"""{table()}

Measured on a tiny random model of each type by `scripts/support_table.py`, with transformers {transformers.__version__}
and torch {torch.__version__.partition("+")[0]} on a CPU. *Largest error*: of a layer's decomposition against its real
output in float32, relative to the largest output. *Left padding*: exact if scores equal those of the sentence alone;
where the model itself is not exact, because it ignores the mask or, in some configurations, has a bias before its
convolution, the call is refused, and padding on the right works. *Types*: `all` is float64, float32, bfloat16 and
float16. Any other layer that mixes tokens is refused by name,
but for relevance, which follows it function by function."""


def main() -> None:
    """Print the section, or write it into its page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/layers.md")
    if parser.parse_args().write:
        write_section(PAGE, SECTION, section())
    else:
        print(section())


if __name__ == "__main__":
    main()
