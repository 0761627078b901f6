"""No gated-linear layer of the installed transformers is missing: its source is searched for what such layers need.

When a new version of transformers brings one, these tests fail. Then it needs an adapter, or a line in ``EXCEPTIONS``
with the reason why it has none.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from captum_ssm import register, supported, unregister
from captum_ssm.layers.mixers import find_adapter
from scripts import support_table
from scripts.sections import read_section
from tests import (
    test_adapters_delta,
    test_adapters_gated,
    test_adapters_softmax,
    test_adapters_ssd,
    test_fidelity,
)
from tests.cases import on_all
from tests.families import EARLIER, FAMILIES, VOCABULARY

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

RECORDS = {family: record for family, record in FAMILIES.items() if " " not in family}
"""The families, without the variants that some have."""

NATIVE = {
    "mamba_ssm": ("Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "MHA"),
    "fla": (
        "MultiScaleRetention", "GatedLinearAttention", "HGRN2Attention", "RWKV6Attention", "RWKV6FeedForward",
        "RWKV7Attention", "RWKV7FeedForward", "DeltaNet", "GatedDeltaNet", "KimiDeltaAttention", "Attention",
    ),
    "mambapy": ("MambaBlock", "VMambaBlock"),
    "mambavision": ("MambaVisionMixer",),
    "minGRU_pytorch": ("minGRU", "minLSTM"),
    "recurrentgemma": ("LocalAttentionBlock", "RecurrentBlock"),
    "rwkv7_hf": ("RWKV7ChannelMix", "RWKV7TimeMix"),
    "s4": ("S4D",),
    "s5": ("S5",),
    "torchscale": ("MultiScaleRetention",),
    "xlstm (NX-AI)": ("mLSTMLayer", "mLSTMLayer"),
}  # fmt: skip
"""The layers of the packages whose tests have an environment of their own (tests/native, tests/packages),
and of repositories that are no package."""


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


@pytest.mark.slow
def test_every_gated_linear_layer_of_transformers_has_an_adapter() -> None:
    assert uncovered() == []


@pytest.mark.slow
def test_every_exception_is_still_needed() -> None:
    names = {name for names in found().values() for name in names}
    assert EXCEPTIONS.keys() <= names
    assert not EXCEPTIONS.keys() & {support.layer for support in supported()}


SEARCHED = [s for s in supported() if s.family in RECORDS and s.kernel != "softmax attention"]


@pytest.mark.slow  # as the two that read all of transformers, so that one process does
@on_all("support", SEARCHED)
def test_a_layer_without_its_adapter_is_found(support: tuple[str, str, str]) -> None:
    """The search would find each of the layers that are covered now."""
    layer, kernel, family = support
    adapter = find_adapter(type(layer, (), {})())
    assert adapter is not None
    unregister(layer)
    try:
        assert uncovered() == [f"{family}: {layer}"]
    finally:
        register(layer, kernel=kernel, family=family)(adapter)
    assert uncovered() == []


def family_names() -> list[str]:
    """Return the families that are supported, or have a record: both must have both."""
    return sorted({s.family for s in supported()} - NATIVE.keys() | RECORDS.keys())


@pytest.mark.parametrize("family", family_names())
def test_the_layers_of_a_family_are_those_of_its_record(family: str) -> None:
    """Each is a class of the modeling file of that name, and there is no other softmax attention in the text model."""
    assert family in RECORDS, f"{family} is supported and has no record in tests/families/table.py"
    record = RECORDS[family]
    now = {s.layer for s in supported() if s.family == family} - EARLIER.keys()
    assert sorted(now) == sorted(record.layers)
    layers = {layer.name: layer for layer in classes(family)}
    for name in record.layers:
        assert layers[name].is_layer
    softmax = {name for name, layer in layers.items() if layer.is_layer and layer.looks(SOFTMAX)}
    others = {name for name in softmax if name.endswith("Attention") and "Vision" not in name}
    assert others <= set(record.layers)


KERNELS = (test_fidelity, test_adapters_ssd, test_adapters_gated, test_adapters_delta, test_adapters_softmax)
"""Where layers are compared with the oracles of their kernels."""
EVERY_LAYER = [(family, name) for family, record in FAMILIES.items() for name in record.layers]


@pytest.mark.parametrize(("family", "name"), EVERY_LAYER)
def test_every_layer_is_compared_with_its_oracle(family: str, name: str) -> None:
    layer = FAMILIES[family].layers[name]
    assert layer.oracle_module.startswith("tests.oracles"), "a layer has no oracle"
    drawn = [module for module in KERNELS if any(each is layer for each in module.LAYERS.values())]
    assert len(drawn) == 1, f"no test, or several, draws the layers whose oracle is in {layer.oracle_module}"


def test_a_layer_has_one_record() -> None:
    layers = [layer for record in FAMILIES.values() for layer in record.layers.values()]
    assert len({id(layer) for layer in layers}) == len(layers) == len(EVERY_LAYER)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - RECORDS.keys()))
def test_a_variant_has_layers_of_its_family(family: str) -> None:
    assert FAMILIES[family].layers.keys() <= RECORDS[family.partition(" ")[0]].layers.keys()


def test_every_supported_layer_has_a_kernel_and_a_family() -> None:
    assert NATIVE.keys() <= {s.family for s in supported()}
    assert all(s.kernel and s.family for s in supported())


@pytest.mark.parametrize("package", NATIVE)
def test_the_layers_of_a_package_are_those_that_are_supported_and_listed(package: str) -> None:
    assert sorted(s.layer for s in supported() if s.family == package) == sorted(NATIVE[package])
    page = support_table.PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in NATIVE[package])


# --- The table of layers ------------------------------------------------------------------------------------------


@functools.cache
def rows() -> dict[str, list[str]]:
    """Return the cells of the table of ``docs/layers.md`` by model type."""
    table = read_section(support_table.PAGE, support_table.SECTION)
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert tuple(lines[0]) == support_table.HEADER and all(len(line) == len(lines[0]) for line in lines)
    return {line[0].strip("`"): line[1:] for line in lines[2:]}


def test_the_table_has_the_families_that_are_supported() -> None:
    assert rows().keys() == RECORDS.keys()


@pytest.mark.parametrize("family", RECORDS)
def test_a_row_of_the_table_is_true(family: str) -> None:
    """That the model is explained in these types and with padding is for ``tests/test_families.py``."""
    layers, kernels, error, padding, types = rows()[family]
    support = [s for s in supported() if s.family == family]
    assert sorted(re.findall("`([^`]*)`", layers)) == sorted(s.layer for s in support)
    assert set(kernels.split(", ")) == {s.kernel for s in support}
    assert 1e-8 < float(error) <= 1e-5
    assert padding == ("exact" if RECORDS[family].reads_mask else "refused")
    every = ["float32", "float64", "bfloat16", "float16"]
    listed = every if types == "all" else types.split(", ")
    ids = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    models = {t: support_table.in_type(family, getattr(torch, t)) for t in every}
    assert set(listed) == {t for t in every if support_table.runs(models[t], ids)}
