"""Parts of a layer that stand in for plain weights, which no adapter can read: fine-tuning adapters, quantised weights.

They are known by how they are built; no library that makes them is imported.
"""

from __future__ import annotations

from torch import Tensor, nn

_PACKED = ("qweight", "W_q", "weight_packed")
"""Attributes of modules that hold quantised weights: those of GPTQ and AWQ, of HQQ, of compressed-tensors."""


def _is_fine_tuned(module: nn.Module) -> bool:
    """Whether a module adds the matrices of a fine-tuning to a weight, as the modules of peft and loralib do."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) or hasattr(module, "lora_A")


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module holds its weight in fewer bits than floating-point numbers have."""
    weight = vars(module).get("_parameters", {}).get("weight")
    packed = isinstance(weight, Tensor) and (not weight.is_floating_point() or hasattr(weight, "quant_state"))
    return packed or any(hasattr(module, name) for name in _PACKED)


def refusal(name: str, layer: nn.Module) -> str:
    """Return in words why a layer cannot be decomposed, if it holds a part that stands in for a plain weight.

    Args:
        name: Dotted name of the layer in the model.
        layer: The layer.

    Returns:
        The reason and its remedy; empty if there is no such part.
    """
    for part, module in layer.named_modules():
        shown = f"Layer '{name}' ({type(layer).__name__}) has '{part}' ({type(module).__name__}), "
        if _is_fine_tuned(module):
            return shown + (
                "which adds the matrices of a fine-tuning, such as LoRA, to a weight, and its adapter reads weights "
                "alone. Merge them into the weights first: model = model.merge_and_unload()."
            )
        if _is_quantised(module):
            return shown + (
                "whose weight is quantised, and its adapter reads floating-point weights. Load the model without "
                "quantization, or call model.dequantize() if it has that."
            )
    return ""
