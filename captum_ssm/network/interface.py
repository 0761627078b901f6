"""Recognise a model by its interface; no model library is imported.

A model of transformers has ``get_input_embeddings``, and its ``forward`` takes ``inputs_embeds``. A model of mamba_ssm
takes ``inference_params`` with its ``input_ids``, and keeps its embeddings in ``embedding``. A host
(:mod:`captum_ssm.network.hosts`) has the interface of the model inside.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from captum_ssm.layers.call import signature
from captum_ssm.network.hosts import inside


def is_language_model(forward_func: object) -> bool:
    """Whether this is a model with transformers' or mamba_ssm's interface rather than a plain Captum callable."""
    model = inside(forward_func)
    if is_mamba_ssm_model(model):
        return hasattr(model, "lm_head")
    return hasattr(model, "get_input_embeddings") and _takes(model, "inputs_embeds")


def is_mamba_ssm_model(model: object) -> bool:
    """Whether this is a model with mamba_ssm's interface: it takes token ids alone, no embeddings and no mask."""
    model = inside(model)
    return _takes(model, "input_ids", "inference_params") and hasattr(getattr(model, "backbone", model), "embedding")


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the module that turns token ids into vectors; None if the model's interface does not name it."""
    model = inside(model)
    if is_mamba_ssm_model(model):
        return getattr(model, "backbone", model).embedding
    return model.get_input_embeddings() if callable(getattr(model, "get_input_embeddings", None)) else None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the module that turns vectors into logits; None if the model's interface does not name it."""
    model = inside(model)
    if is_mamba_ssm_model(model):
        return getattr(model, "lm_head", None)
    return model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None


def keeps_logits(model: object) -> bool:
    """Whether a language model can leave out the logits of all but the last tokens."""
    return _takes(model, "logits_to_keep")


def models_inside(holder: object) -> list[str]:
    """Return the names of the language models among a module's attributes, outermost only: ``"net.model"``."""
    names: list[str] = []
    for name, module in holder.named_modules() if isinstance(holder, nn.Module) else ():
        if name and not any(name.startswith(f"{outer}.") for outer in names) and is_language_model(module):
            names.append(name)
    return names


def _takes(model: object, *names: str) -> bool:
    """Whether the model's ``forward`` has parameters of all these names."""
    if not isinstance(model, nn.Module):
        return False
    patched = "forward" in vars(model)  # of the object, not of its class: a cache would outlive the object
    parameters = (inspect.signature(model.forward) if patched else signature(type(model).forward)).parameters
    return {*names} <= parameters.keys()
