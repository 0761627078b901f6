"""Exact attention and relevance for recurrent language models, as Captum attribution methods.

The nouns that everything here is made of:

* **mixer**: a layer that mixes tokens, such as Mamba's or a softmax attention;
* **call**: one recorded call of a mixer, its input, output and other arguments;
* **operator**: a linear map of token sequences, given by its product and its transposed product;
* **chain**: the product of named operators, its *factors*; given its gates, every mixer is one;
* **adapter**: the function that turns a call of one class of mixers into its chain;
* **core**: the factors of a chain that mix tokens, one (L, L) matrix for each channel: the implicit attention. A
  *split* is a chain cut into output side, core and input side;
* **token matrix**: one (L, L) matrix for each example, the channels of a core fused; a rollout multiplies them;
* **residual graph**: the residual streams, that is, which calls read the outputs of which others. A *wire* is the pair
  of factors by which a mixer's output joins its stream;
* **reference**: the input that relevance compares with. A *multiplier* is relevance per unit of difference to it;
* **rule**: the treatment of one function of torch by relevance.

Modules. Everything not listed as public, and every name with a leading underscore, may change without notice.

Public: captum_ssm, captum_ssm.datasets, captum_ssm.errors, captum_ssm.metrics, captum_ssm.models,
captum_ssm.operators, captum_ssm.testing, captum_ssm.visualization

Internal: captum_ssm.attr, captum_ssm.cli, captum_ssm.datasets.*, captum_ssm.layers, captum_ssm.matrices,
captum_ssm.metrics.*, captum_ssm.network, captum_ssm.operators.*, captum_ssm.pages, captum_ssm.relevance,
captum_ssm.visualization.*
"""

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
from captum_ssm.layers import adapters as adapters
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
