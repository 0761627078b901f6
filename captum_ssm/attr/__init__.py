"""The attribution methods, as Captum ``Attribution`` classes; one file each."""

from captum_ssm.attr.attribution import ImplicitAttentionAttribution
from captum_ssm.attr.class_token import ClassTokenAttention
from captum_ssm.attr.embeddings import LayerImplicitAttentionAttribution
from captum_ssm.attr.generation import LLMImplicitAttention
from captum_ssm.attr.inner_relevance import LayerImplicitAttentionRelevance, NeuronImplicitAttentionRelevance
from captum_ssm.attr.layer import LayerImplicitAttention
from captum_ssm.attr.raw import RawImplicitAttention
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.attr.rollout import ImplicitAttentionRollout

__all__ = [
    "ClassTokenAttention",
    "ImplicitAttentionAttribution",
    "ImplicitAttentionRelevance",
    "ImplicitAttentionRollout",
    "LLMImplicitAttention",
    "LayerImplicitAttention",
    "LayerImplicitAttentionAttribution",
    "LayerImplicitAttentionRelevance",
    "NeuronImplicitAttentionRelevance",
    "RawImplicitAttention",
]
