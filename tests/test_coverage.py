"""No gated-linear layer of the installed transformers is missing: its source is searched for what such layers need.

When a new version of transformers brings one, these tests fail. Then it needs an adapter, or a line in ``EXCEPTIONS``
with the reason why it has none.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build
from families import FAMILIES, VOCABULARY

from captum_ssm import register, supported, unregister
from captum_ssm.layers.mixers import find_adapter

MODELS = Path(transformers.__file__).parent / "models"
SIGNS = re.compile(
    r"causal_conv1d|selective_scan|chunk_scan|ssm_state|A_log"  # Mamba
    r"|delta_rule|delta_net|(?<![a-z])kda(?![a-z])|kimi_delta"  # the delta rule
    r"|(?<![a-z])wkv|time_mix|time_shift|mlstm|rglru|rg_lru|retention|hyena|lightning"  # kernels by name
    r"|recurrent_state|conv_state|linear_attention|short_?conv|slope_rate|(?<!path_)decay",  # what they keep
    re.IGNORECASE,
)
"""Names that the code of a recurrence, a linear attention or a short convolution uses."""
SOFTMAX = re.compile("softmax|scaled_dot_product_attention|ALL_ATTENTION_FUNCTIONS|eager_attention_forward")
NOT_LAYERS = re.compile("PreTrainedModel|Config|Cache|ModelOutput|Function|Enum")
"""Bases of what is no layer."""

PART = "a part of a layer that is covered"
NEAR = "softmax attention that first mixes neighbouring keys and values, not a gated-linear layer; the model is refused"
EXCEPTIONS: dict[str, str] = {
    "KimiLinearForgetGate": PART,
    "BailingHybridForgetGate": PART,
    "Glm5NextTextForgetGate": PART,
    "RecurrentGemmaRglru": PART,
    "xLSTMBackend": PART,
    "xLSTMBlock": "the block around a layer that is covered",
    "InklingShortConvolution": NEAR,
    "Inkling2ShortConvolution": NEAR,
    "Inkling2DynamicShortConvolution": NEAR,
    "ZayaCCAProjection": NEAR,
    "EsmFold2Parcae": "a recurrence over the rounds of recycling, not over tokens",
    "Lfm3VlVisionShortConv": "a gated convolution over the patches of an image, within its encoder; text is explained",
    "PvtV2SelfAttention": "softmax attention of images with pooled keys, which its authors call linear",
    "PvtV2ConvFeedForwardNetwork": "reads a switch of that name",
    "Qwen4ExpTextNGramEmbedding": "an embedding of neighbouring ids, before any layer; the model is refused",
    "Qwen4ExpTextPLELayer": "a lexical convolution beside the layers, off by default; a model that has it is refused",
}
"""Classes with such names in their code that need no adapter, and why."""

LAYERS: dict[str, tuple[str, ...]] = {
    "mamba": ("MambaMixer",),
    "falcon_mamba": ("FalconMambaMixer",),
    "jamba": ("JambaMambaMixer", "JambaAttention"),
    "zamba": ("ZambaMambaMixer", "ZambaAttention"),
    "mamba2": ("Mamba2Mixer",),
    "bamba": ("BambaMixer", "BambaAttention"),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer", "GraniteMoeHybridAttention"),
    "falcon_h1": ("FalconH1Mixer", "FalconH1Attention"),
    "nemotron_h": ("NemotronHMamba2Mixer", "NemotronHAttention"),
    "zamba2": ("Zamba2MambaMixer", "Zamba2Attention"),
    "recurrent_gemma": ("RecurrentGemmaRecurrentBlock", "RecurrentGemmaAttention"),
    "rwkv": ("RwkvSelfAttention", "RwkvFeedForward"),
    "xlstm": ("xLSTMLayer",),
    "qwen3_next": ("Qwen3NextGatedDeltaNet", "Qwen3NextAttention"),
    "qwen3_5": ("Qwen3_5GatedDeltaNet", "Qwen3_5Attention"),
    "qwen3_5_moe": ("Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeAttention"),
    "qwen4_exp": ("Qwen4ExpTextGatedDeltaNet", "Qwen4ExpTextAttention"),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet", "OlmoHybridAttention"),
    "kimi_linear": ("KimiLinearDeltaAttention", "KimiLinearAttention"),
    "bailing_hybrid": ("BailingHybridDeltaAttention", "BailingHybridAttention"),
    "glm5_next": ("Glm5NextTextLinearAttention", "Glm5NextTextAttention"),
    "minimax": ("MiniMaxLightningAttention", "MiniMaxAttention"),
    "lfm2": ("Lfm2ShortConv", "Lfm2Attention"),
    "lfm2_moe": ("Lfm2MoeShortConv", "Lfm2MoeAttention"),
    "lfm3": ("Lfm3ShortConv", "Lfm3Attention"),
}
"""The layers that mix tokens of each family, read off its modeling file by hand."""

NATIVE = {
    "mamba_ssm": ("Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "MHA"),
    "fla": (
        "MultiScaleRetention", "GatedLinearAttention", "HGRN2Attention", "RWKV6Attention", "RWKV6FeedForward",
        "RWKV7Attention", "RWKV7FeedForward", "DeltaNet", "GatedDeltaNet", "KimiDeltaAttention", "Attention",
    ),
}  # fmt: skip
"""The layers of the packages whose tests have an environment of their own (tests/native)."""


class Layer(ast.NodeVisitor):
    """Whether a class of a modeling file is a layer, and the names that its code uses."""

    def __init__(self, node: ast.ClassDef, classes: set[str]) -> None:
        self.name = node.name
        self.is_layer = bool(node.bases) and not any(NOT_LAYERS.search(ast.unparse(base)) for base in node.bases)
        self.names: set[str] = set()
        if self.is_layer:
            self.visit(node)
        self.names = self.names - classes | {node.name}  # a block names the layer that it has

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.names.add(node.attr)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.names.add(node.arg)

    def looks(self, signs: re.Pattern[str]) -> bool:
        return any(signs.search(name) for name in self.names)


def classes(family: str) -> Iterator[Layer]:
    """Yield the layers of a family's modeling files whose text has any of the names looked for."""
    for path in sorted((MODELS / family).glob("modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if not SIGNS.search(text):
            continue
        lines, nodes = text.splitlines(), [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
        for node in nodes:
            own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if SIGNS.search(own) or SOFTMAX.search(own):
                yield Layer(node, {other.name for other in nodes})


@functools.cache
def found() -> dict[str, list[str]]:
    """Return the classes that look like gated-linear layers, by family."""
    families = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
    layers = {f: [layer.name for layer in classes(f) if layer.is_layer and layer.looks(SIGNS)] for f in families}
    return {family: names for family, names in layers.items() if names}


def uncovered() -> list[str]:
    """Return what looks like a gated-linear layer and has neither an adapter nor an exception."""
    covered = {support.layer for support in supported()} | EXCEPTIONS.keys()
    return [f"{family}: {name}" for family, names in found().items() for name in names if name not in covered]


def test_every_gated_linear_layer_of_transformers_has_an_adapter() -> None:
    assert uncovered() == []


def test_every_exception_is_still_needed() -> None:
    names = {name for names in found().values() for name in names}
    assert EXCEPTIONS.keys() <= names
    assert not EXCEPTIONS.keys() & {support.layer for support in supported()}


SEARCHED = [s for s in supported() if s.family in LAYERS and s.kernel != "softmax attention"]


@pytest.mark.parametrize("support", SEARCHED, ids=lambda s: s.layer)
def test_a_layer_without_its_adapter_is_found(support: tuple[str, str, str]) -> None:
    """The search would find each of the layers that are covered now."""
    layer, kernel, family = support
    adapter = find_adapter(type(layer, (), {})())  # type: ignore[arg-type]
    assert adapter is not None
    unregister(layer)
    try:
        assert uncovered() == [f"{family}: {layer}"]
    finally:
        register(layer, kernel=kernel, family=family)(adapter)
    assert uncovered() == []


@pytest.mark.parametrize("family", LAYERS)
def test_the_layers_of_a_family_are_those_that_are_supported(family: str) -> None:
    """Each is a class of the modeling file of that name, and there is no other softmax attention in the text model."""
    assert sorted(s.layer for s in supported() if s.family == family) == sorted(LAYERS[family])
    layers = {layer.name: layer for layer in classes(family)}
    for name in LAYERS[family]:
        assert layers[name].is_layer
    softmax = {name for name, layer in layers.items() if layer.is_layer and layer.looks(SOFTMAX)}
    others = {name for name in softmax if name.endswith("Attention") and "Vision" not in name}
    assert others <= set(LAYERS[family])


def test_no_family_is_supported_by_accident() -> None:
    assert {s.family for s in supported()} == LAYERS.keys() | NATIVE.keys()
    assert all(s.kernel for s in supported())


@pytest.mark.parametrize("package", NATIVE)
def test_the_layers_of_a_package_are_those_that_are_supported_and_listed(package: str) -> None:
    assert sorted(s.layer for s in supported() if s.family == package) == sorted(NATIVE[package])
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in NATIVE[package])


def test_every_family_has_a_tiny_model() -> None:
    assert {name.partition(" ")[0] for name in FAMILIES} == LAYERS.keys()


# --- The table of the README --------------------------------------------------------------------------------------


def script() -> Any:
    """Return the script that writes the table, as a module."""
    path = Path(__file__).parent.parent / "scripts" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def rows() -> dict[str, list[str]]:
    """Return the cells of the README's table by model type."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    table = text.partition(script().START)[2].partition(script().END)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert tuple(lines[0]) == script().HEADER and all(len(line) == len(lines[0]) for line in lines)
    return {line[0].strip("`"): line[1:] for line in lines[2:]}


def test_the_table_has_the_families_that_are_supported() -> None:
    assert rows().keys() == LAYERS.keys()


@pytest.mark.parametrize("family", LAYERS)
def test_a_row_of_the_table_is_true(family: str) -> None:
    layers, kernels, error, padding, types = rows()[family]
    support = [s for s in supported() if s.family == family]
    assert sorted(re.findall("`([^`]*)`", layers)) == sorted(s.layer for s in support)
    assert set(kernels.split(", ")) == {s.kernel for s in support}
    assert 1e-8 < float(error) <= 1e-5
    ids = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    assert padding == ("exact" if script().explains_left_padding(build(family), ids) else "refused")
    every = ["float32", "float64", "bfloat16", "float16"]
    listed = every if types == "all" else types.split(", ")
    assert set(listed) == {t for t in every if t == "float32" or script().runs_in(family, getattr(torch, t), ids)}
