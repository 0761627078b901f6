"""Exact attention and relevance for recurrent language models, as Captum attribution methods."""

from captum_ssm import adapters as adapters
from captum_ssm import models
from captum_ssm.attr import (
    ClassTokenAttention,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    LayerImplicitAttentionAttribution,
    LayerImplicitAttentionRelevance,
    LLMImplicitAttention,
    NeuronImplicitAttentionRelevance,
    RawImplicitAttention,
)
from captum_ssm.errors import FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError
from captum_ssm.layers.mixers import register, supported, unregister
from captum_ssm.layers.wires import Wire, register_wire, unregister_wire
from captum_ssm.network.reference_kernels import reference_kernels
from captum_ssm.relevance.functions import register_rule, unregister_rule

__version__ = "0.1.0"

__all__ = [
    "ClassTokenAttention",
    "FidelityError",
    "ImplicitAttentionAttribution",
    "ImplicitAttentionRelevance",
    "ImplicitAttentionRollout",
    "InvalidInputError",
    "LLMImplicitAttention",
    "LayerImplicitAttention",
    "LayerImplicitAttentionAttribution",
    "LayerImplicitAttentionRelevance",
    "ModelStateError",
    "NeuronImplicitAttentionRelevance",
    "RawImplicitAttention",
    "UnsupportedModelError",
    "Wire",
    "models",
    "reference_kernels",
    "register",
    "register_rule",
    "register_wire",
    "supported",
    "unregister",
    "unregister_rule",
    "unregister_wire",
]
