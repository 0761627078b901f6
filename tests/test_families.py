"""What holds for the models of every family: nothing is skipped, nothing leaks, and the rollout is the model's own.

What is expected is read off transformers' configurations and blocks here, never asked of the library.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    RawImplicitAttention,
    UnsupportedModelError,
)
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.matrices.fusion import Fusion
from captum_ssm.network.recording import record_mixers
from tests import oracles_softmax
from tests.conftest import SEVERAL, build
from tests.families import FAMILIES, VOCABULARY, Block, layers_of, perturbed

FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
METHODS: dict[str, Callable[..., Any]] = {
    "channel": ImplicitAttentionAttribution,
    "token": functools.partial(ImplicitAttentionAttribution, rectify="token"),
    "signed": functools.partial(ImplicitAttentionAttribution, rectify=None),
    **{f"rollout {name}": functools.partial(ImplicitAttentionRollout, fusion=name) for name in FUSIONS},
    "raw": functools.partial(RawImplicitAttention, layers=2, fusion="absolute"),
}
BLIND = [family for family, record in FAMILIES.items() if not record.reads_mask]
"""Families whose models ignore the attention mask in their recurrences."""
every_family = pytest.mark.parametrize("family", FAMILIES)
PAIRS = [(f, m) for f in FAMILIES for m in METHODS if m in ("signed", "rollout absolute") or f in SEVERAL]
"""All methods on families of every kind, and on all families one method with gradients and one without.

That each method is right on each family is what the products of matrices below are for.
"""
every_pair = pytest.mark.parametrize(("family", "method"), PAIRS)
masked_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BLIND])
blind_family = pytest.mark.parametrize("family", BLIND)

IDS = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(14))
LENGTHS = (7, 4)
TARGET = 3


ROUNDING = {"signed": 2e-4, "token": 1e-4}
"""Relative tolerance by method, 1e-5 for all others: what rounding in float32 becomes where terms cancel.

On these ids float32 and float64 differ by up to 2e-5, on others by up to 2e-4; the gradients' rounding hangs on the
alignment of memory too.
"""


@functools.cache
def model_of(family: str) -> Any:
    """Return the family's model, shared by the tests: that a call leaves it as it was is a test of its own."""
    return build(family)


def assert_close(actual: Tensor, expected: Tensor, method: str = "", tolerance: float = 1e-5) -> None:
    tolerance = ROUNDING.get(method, tolerance)
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= tolerance, f"{difference:.1e}"


# --- The structure of the models, from their configurations -------------------------------------------------------


def blocks(family: str, model: Any) -> list[Block]:
    """Return the model's blocks in order, as its modeling file writes them down."""
    return FAMILIES[family].blocks(getattr(model.config, "text_config", model.config))


def mixers_of(family: str, model: nn.Module) -> dict[str, str]:
    """Return the class of each mixer by dotted name, in the order of their calls."""
    return {name: kind for block in blocks(family, model) for name, kind in zip(block.mixers, block.classes)}


@contextmanager
def hooked(model: nn.Module, names: list[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(module, args, kwargs, output)`` after each of these modules; once for one that has several names."""
    with ExitStack() as hooks:
        for module in {id(m): m for m in map(model.get_submodule, names)}.values():
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@every_family
def test_every_mixer_of_every_block_is_decomposed(family: str) -> None:
    model = model_of(family)
    expected = mixers_of(family, model)
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=IDS, use_cache=False)
    assert {call.name: type(call.mixer).__name__ for call in calls} == expected
    assert [call.name for call in calls] == [*expected]
    method = ImplicitAttentionAttribution(model, rectify=None)
    method.attribute(IDS, target=TARGET)
    assert method.fidelity.keys() == expected.keys()
    assert max(method.fidelity.values()) <= 1e-5
    assert max(decompose(call).error for call in calls) <= 1e-5


@every_family
def test_nothing_but_the_mixers_moves_information_between_tokens(family: str) -> None:
    """So that the list of mixers which these tests start from is complete."""
    model = model_of(family)
    names = [*mixers_of(family, model)]
    outputs: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs.append(output)

    def hold(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return outputs.pop(0)

    other = IDS.clone()
    other[:, 2] = IDS[:, 2] % (VOCABULARY - 1) + 1
    rest = torch.arange(7) != 2
    with torch.no_grad():
        with hooked(model, names, keep):
            plain = model(input_ids=IDS, use_cache=False).logits
        assert len(outputs) == len(names)
        free = model(input_ids=other, use_cache=False).logits
        with hooked(model, names, hold):
            held = model(input_ids=other, use_cache=False).logits
    assert relative_error(held[:, rest], plain[:, rest]) <= 1e-6
    assert relative_error(held[:, 2], plain[:, 2]) > 1e-3
    assert relative_error(free[:, 3:], plain[:, 3:]) > 1e-3


# --- Every method on every family ---------------------------------------------------------------------------------


@functools.cache
def explained(family: str, method: str, row: int | None = None) -> Tensor:
    """Return the scores of both examples, or of one alone at its length, without a mask."""
    ids = IDS if row is None else IDS[row : row + 1, : LENGTHS[row]]
    return METHODS[method](model_of(family)).attribute(ids, target=TARGET)


@every_pair
def test_every_method_gives_one_finite_score_for_each_token(family: str, method: str) -> None:
    scores = explained(family, method)
    assert scores.shape == IDS.shape and scores.dtype == torch.float32
    assert scores.isfinite().all() and scores.ne(0).any(1).all()
    if method not in ("signed", "rollout mean"):
        assert scores.ge(0).all()
    if method.startswith("rollout") and method != "rollout mean":
        assert (scores.sum(1) - 1).abs().max() <= 1e-5
    assert torch.equal(METHODS[method](model_of(family)).attribute(IDS, target=TARGET), scores)  # to the last bit


@every_pair
def test_no_token_after_the_explained_position_has_a_score(family: str, method: str) -> None:
    scores = METHODS[method](model_of(family)).attribute(IDS, target=TARGET, query=3)
    assert scores[:, 4:].eq(0).all()
    if method not in ("channel", "token", "signed"):  # for these the score at the last token has a gradient at all
        assert scores[:, :4].ne(0).any(1).all()


@every_pair
def test_an_example_is_explained_alike_alone_and_in_a_batch(family: str, method: str) -> None:
    alone = METHODS[method](model_of(family)).attribute(IDS[1:], target=TARGET)
    assert_close(explained(family, method)[1:], alone, method)


@every_family
def test_a_call_leaves_the_model_as_it_was(family: str, unchanged: Any) -> None:
    model = build(family)
    model(input_ids=IDS, use_cache=False)  # RWKV rescales its weights in the first
    with unchanged(model, IDS):
        ImplicitAttentionAttribution(model, rectify=None).attribute(IDS, target=TARGET)
        RawImplicitAttention(model).attribute(IDS, target=TARGET)
        LayerImplicitAttention(model, -1).attribute(IDS)


@every_family
def test_the_matrices_of_every_layer_are_causal(family: str) -> None:
    model = model_of(family)
    for name, kind in mixers_of(family, model).items():
        layer = LayerImplicitAttention(model, name)
        matrix = layer.attribute(IDS)
        assert layer.fidelity.keys() == {name}
        assert matrix.shape == (2, 7, 7) and matrix.isfinite().all()
        assert matrix.triu(1).eq(0).all() and matrix.ge(0).all()
        past = 2 if kind == "RwkvFeedForward" else 7
        assert matrix[:, -1, -past:].ne(0).any(1).all()


@every_family
@pytest.mark.parametrize("method", ["signed", "rollout absolute"])
def test_ids_are_explained_as_their_embeddings(family: str, method: str) -> None:
    model = model_of(family)
    x = model.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        assert_close(model(inputs_embeds=x, use_cache=False).logits, model(input_ids=IDS, use_cache=False).logits)
    scores = METHODS[method](model).attribute(x, target=TARGET)
    assert scores.shape == x.shape
    assert_close(scores.sum(-1), explained(family, method), method)


@pytest.mark.parametrize("method", ["signed", "rollout absolute"])
def test_embeddings_that_the_model_itself_reads_otherwise_are_explained_as_it_reads_them(method: str) -> None:
    """Falcon-H1 multiplies the embeddings of ids, and not those that it is given."""
    model = FAMILIES["falcon_h1"].build(embedding_multiplier=2.0)
    x = model.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        assert relative_error(model(inputs_embeds=x, use_cache=False).logits, plain) > 0.01
    ids = METHODS[method](model).attribute(IDS, target=TARGET)
    assert_close(METHODS[method](model).attribute(2 * x, target=TARGET).sum(-1), ids, method)
    assert relative_error(METHODS[method](model).attribute(x, target=TARGET).sum(-1), ids) > 1e-3


# --- The rollout is the model's: explicit matrices along the blocks -----------------------------------------------


class Walk:
    """One run of a model, recorded by the test: what enters and leaves its mixers, and their gradients."""

    def __init__(self, family: str) -> None:
        self.model = model_of(family)
        self.blocks = blocks(family, self.model)
        names = [name for block in self.blocks for name in block.mixers]
        self.x: list[Tensor] = []
        y: list[Tensor] = []
        connection = FAMILIES[family].connection
        self.written: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.x.append((args[0] if args else kwargs["hidden_states"]).detach())
            y.append(first(output))

        with ExitStack() as hooks:
            hooks.enter_context(hooked(self.model, names, keep))
            if connection is not None:
                attribute, place = connection
                modules = [f"{name.rpartition('.')[0]}.{attribute}" for name in names]
                note = lambda m, a, k, output: self.written.append(output[place].mean(-1).detach())  # noqa: E731
                hooks.enter_context(hooked(self.model, modules, note))
            score = self.model(input_ids=IDS, use_cache=False).logits[:, -1, TARGET].sum()
        self.gradients = torch.autograd.grad(score, y)
        self.names = names

    def matrices(self, fusion: Fusion) -> list[Tensor]:
        """Return each layer's fused matrix (B, L, L), times what it is written with."""
        matrices = [LayerImplicitAttention(self.model, name).attribute(IDS, fusion=fusion) for name in self.names]
        if self.written:
            return [w.unsqueeze(-1) * C for w, C in zip(self.written, matrices, strict=True)]
        writes = [block.write * (len(block.mixers) // len(block.write)) for block in self.blocks]
        return [w * C for w, C in zip(itertools.chain(*writes), matrices, strict=True)]

    def gradient_weighted(self, rectify: str | None) -> list[Tensor]:
        """Return each layer's matrix ``sum_d u_id A^d_ij v_jd``, one token after the other.

        ``u`` comes by automatic differentiation through the layer's output side, ``A_ij v_j`` by passing one token's
        values alone through the core.
        """
        with torch.no_grad(), record_mixers(self.model) as calls:
            self.model(input_ids=IDS, use_cache=False)
        matrices = []
        for call, x, g in zip(calls, self.x, self.gradients, strict=True):
            assert torch.equal(call.x, x)
            output, core, into = decompose(call.detach()).chain.split()
            v = into.apply(x, bias=True)
            columns = torch.stack([core.apply(v * (torch.arange(7) == j)[:, None]) for j in range(7)], 2)  # B, i, j, D
            leaf = torch.zeros(2, 7, columns.shape[-1], requires_grad=True)
            (u,) = torch.autograd.grad(output.apply(leaf), leaf, g)
            terms = u.unsqueeze(2) * columns
            if rectify == "channel":
                matrices.append(terms.clamp(min=0).mean(-1))
            else:
                matrices.append(terms.sum(-1).clamp(min=0) if rectify == "token" else terms.sum(-1))
        return matrices

    def rolled_out(self, matrices: list[Tensor]) -> Tensor:
        """Return the last token's row of the product of ``rownorm(keep I + C)``, written down block by block."""
        remaining = list(zip(matrices, self.x, strict=True))
        one = torch.eye(7).expand(2, 7, 7)
        stream, branches = one, 0
        for block in self.blocks:
            taken = [remaining.pop(0) for _ in block.mixers]
            if block.shape == "parallel":
                stream = normed(1.0, torch.stack([C for C, _ in taken]).sum(0), stream, stream)
            elif block.shape == "branch":
                (attention, x), (mamba, _) = taken
                share = embedded_share(self.model.get_submodule(block.mixers[0]), x, branches)
                branches += 1
                read = (1 - share) * stream + share * one
                branch = normed(1.0, attention, stream, read)
                stream = normed(1.0, mamba, stream, branch)
            else:
                for C, _ in taken:
                    stream = normed(block.keep, C, stream, stream)
        assert not remaining
        return stream[:, -1]


def normed(keep: float, C: Tensor, stream: Tensor, read: Tensor) -> Tensor:
    """Return ``keep stream + C read``, each row over ``keep + |sum of the row of C|``."""
    return (keep * stream + C @ read) / (keep + C.sum(-1, keepdim=True).abs())


def embedded_share(attention: Any, x: Tensor, number: int) -> Tensor:
    """Return how much of a token's values Zamba's attention reads off the embeddings, which are half its input.

    The attention that is called a second time may have a second projection of low rank for that (Zamba2).
    """
    E = x.shape[-1] // 2
    halves = (x * (torch.arange(2 * E) >= E), x * (torch.arange(2 * E) < E))
    values = [attention.v_proj(half) for half in halves]
    if hasattr(attention, "linear_v_adapter_list"):
        low_rank = [list(attention.linear_v_adapter_list)[number](half) for half in halves]
        assert all(value.ne(0).any() for value in low_rank)
        values = [value + more for value, more in zip(values, low_rank, strict=True)]
    embedded, other = (value.norm(dim=-1, keepdim=True) for value in values)
    return (embedded / (embedded + other)).detach()


walk_of = functools.cache(Walk)


@every_family
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_rollout_is_the_product_of_the_blocks_matrices(family: str, fusion: Fusion) -> None:
    walk = walk_of(family)
    assert_close(explained(family, f"rollout {fusion}"), walk.rolled_out(walk.matrices(fusion)))


@every_family
@pytest.mark.parametrize(("method", "rectify"), [("signed", None), ("channel", "channel"), ("token", "token")])
def test_the_attribution_is_the_product_of_the_gradient_weighted_matrices(
    family: str, method: str, rectify: str | None
) -> None:
    walk = walk_of(family)
    assert_close(explained(family, method), walk.rolled_out(walk.gradient_weighted(rectify)), method)


@every_family
@pytest.mark.parametrize("rectify", ["channel", "token"])
def test_normalized_rows_share_a_row_with_the_residual_path_in_equal_parts(family: str, rectify: Any) -> None:
    walk = walk_of(family)
    matrices = walk.gradient_weighted(rectify)
    totals = [C.sum(-1, keepdim=True) for C in matrices]
    normalized = [torch.where(total > 0, C / total, 0) for C, total in zip(matrices, totals, strict=True)]
    method = ImplicitAttentionAttribution(walk.model, rectify=rectify, normalize="rows")
    assert_close(method.attribute(IDS, target=TARGET), walk.rolled_out(normalized), "token")


@every_family
def test_raw_attention_is_the_mean_of_the_last_layers_rows(family: str) -> None:
    walk = walk_of(family)
    last = [LayerImplicitAttention(walk.model, name).attribute(IDS)[:, -1] for name in walk.names[-2:]]
    assert_close(explained(family, "raw"), (last[0] + last[1]) / 2)


# --- Padding ------------------------------------------------------------------------------------------------------

SIDES = ("left", "right")


def padded(side: str, lengths: tuple[int, ...] = LENGTHS, width: int = 7) -> tuple[Tensor, Tensor]:
    """Return the first tokens of each example with padding at one side, and the mask."""
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = IDS[row, :n], 1
    return ids, mask


def assert_explained_as_alone(family: str, method: str, scores: Tensor, mask: Tensor) -> None:
    assert scores[mask == 0].eq(0).all()
    for row in range(len(scores)):
        assert_close(scores[row][mask[row] == 1], explained(family, method, row)[0], method)


@pytest.mark.parametrize(
    ("family", "method", "side"),
    [(f, m, side) for f, m in PAIRS for side in SIDES if side == "right" or f not in BLIND],
)
def test_padding_changes_no_score_and_has_none(family: str, method: str, side: str) -> None:
    """Two lengths in one batch, both padded; where the model ignores the mask, on the right."""
    ids, mask = padded(side, width=9)
    scores = METHODS[method](model_of(family)).attribute(ids, target=TARGET, additional_forward_args=mask)
    assert_explained_as_alone(family, method, scores, mask)


def assert_refuses_left_padding(model: nn.Module, **kwargs: Any) -> None:
    """And only that: the same batch padded on the right is explained as each example alone."""
    ids, mask = padded("left")
    with pytest.raises(InvalidInputError, match=r"[Pp]adding on the left.*mask.*[Pp]ad on the right"):
        ImplicitAttentionAttribution(model, rectify=None).attribute(ids, TARGET, mask, **kwargs)
    with pytest.raises(InvalidInputError, match="adding on the left"):
        ImplicitAttentionRollout(model).attribute(ids, TARGET, mask, **kwargs)
    with pytest.raises(InvalidInputError, match="adding on the left"):
        LayerImplicitAttention(model, 0).attribute(ids, mask)
    ids, mask = padded("right")
    method = ImplicitAttentionAttribution(model, rectify=None)
    scores = method.attribute(ids, TARGET, mask)
    assert scores[mask == 0].eq(0).all()
    for row, n in enumerate(LENGTHS):
        assert_close(scores[row, :n], method.attribute(IDS[row : row + 1, :n], TARGET)[0], "signed")


@blind_family
def test_left_padding_is_refused_where_the_model_ignores_the_mask(family: str) -> None:
    assert_refuses_left_padding(model_of(family))


LEAKS: dict[str, dict[str, Any]] = {
    "mamba": {"use_bias": True},
    "mamba2": {"use_bias": True},
    "bamba": {"mamba_proj_bias": True},
    "lfm2": {"conv_bias": True},
}


@pytest.mark.parametrize("family", LEAKS)
def test_left_padding_is_refused_where_a_bias_makes_it_leak_through_the_convolution(family: str) -> None:
    model = FAMILIES[family].build(**LEAKS[family])
    ids, mask = padded("left")
    with torch.no_grad():  # the reason is the model's
        alone = model(input_ids=IDS[1:, :4], use_cache=False).logits[:, -1]
        together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[1:, -1]
    assert relative_error(together, alone) > 1e-3
    assert_refuses_left_padding(model)


HOLES = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", [*BLIND, *(f"{f} with bias" for f in LEAKS)])
def test_a_gap_that_the_model_reads_is_refused(family: str) -> None:
    name = family.removesuffix(" with bias")
    model = model_of(family) if name == family else FAMILIES[name].build(**LEAKS[name])
    gap = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    for method in METHODS.values():
        with pytest.raises(InvalidInputError, match="reads tokens that the mask leaves out"):
            method(model).attribute(IDS, TARGET, gap)


@masked_family
def test_what_is_masked_inside_a_sequence_has_no_score(family: str) -> None:
    model = model_of(family)
    for method in METHODS.values():
        scores = method(model).attribute(IDS, TARGET, HOLES)
        assert scores[HOLES == 0].eq(0).all()
        assert scores[HOLES == 1].ne(0).any() and scores.isfinite().all()


@masked_family
def test_the_matrices_of_padded_layers_are_those_of_the_sentences_alone(family: str) -> None:
    model = model_of(family)
    names = [*mixers_of(family, model)]
    for side in SIDES:
        ids, mask = padded(side)
        at = slice(3, 7) if side == "left" else slice(0, 4)
        for name in (names[0], names[-1]):
            layer = LayerImplicitAttention(model, name)
            matrices = layer.attribute(ids, mask)
            assert_close(matrices[1, at, at], layer.attribute(IDS[1:, :4])[0])
            outside = matrices[1].clone()
            outside[at, at] = 0
            assert outside.eq(0).all()


# --- Types --------------------------------------------------------------------------------------------------------


def of_type(family: str, dtype: torch.dtype) -> Any:
    """Return the family's model in another type, and with experts that run in any."""
    model = build(family)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return model.to(dtype)


@every_family
def test_a_float64_model_has_the_scores_of_the_same_in_float32(family: str) -> None:
    """Up to what rounding in float32 becomes where positive and negative scores cancel."""
    model = of_type(family, torch.float64)
    method = ImplicitAttentionAttribution(model, rectify=None)
    scores = method.attribute(IDS, target=TARGET)
    assert max(method.fidelity.values()) <= 1e-5
    assert_close(scores, explained(family, "signed"), "signed")


HALF: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SENTENCES = torch.randint(1, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(2))


@functools.cache
def sentences_explained(family: str, method: str) -> Tensor:
    return METHODS[method](model_of(family)).attribute(SENTENCES, target=TARGET)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "xlstm"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_model_of_half_precision_is_explained_much_as_in_float32(family: str, dtype: str) -> None:
    """As far as it is the same model: an expert that rounding exchanges may change a single sentence's scores."""
    model = of_type(family, HALF[dtype])
    for name in ("signed", "rollout absolute"):
        method = METHODS[name](model)
        scores = method.attribute(SENTENCES, target=TARGET)
        assert scores.dtype == torch.float32 and scores.isfinite().all()
        assert 1e-5 < max(method.fidelity.values()) < 0.2
        cosines = torch.cosine_similarity(scores, sentences_explained(family, name), dim=1)
        assert cosines.median() > 0.9
        assert name == "signed" or cosines.min() > 0.95


@pytest.mark.parametrize("dtype", HALF)
def test_xlstm_itself_does_not_run_in_half_precision_here(dtype: str) -> None:
    """The chunkwise code of transformers 5.23 multiplies a float32 state by values of the model's type."""
    model = of_type("xlstm", HALF[dtype])
    for run in (
        lambda: model(input_ids=IDS, use_cache=False),
        lambda: ImplicitAttentionAttribution(model).attribute(IDS, target=TARGET),
    ):
        with pytest.raises(RuntimeError, match="same dtype"):
            run()


# --- Heads, implementations, checkpoints --------------------------------------------------------------------------

CLASSIFIERS: dict[str, tuple[str, bool]] = {
    "JambaForSequenceClassification": ("jamba", False),
    "ZambaForSequenceClassification": ("zamba", False),
    "Zamba2ForSequenceClassification": ("zamba2", False),
    "Qwen3NextForSequenceClassification": ("qwen3_next", False),
    "Qwen3_5TextForSequenceClassification": ("qwen3_5", False),
    "Qwen3_5ForSequenceClassification": ("qwen3_5", True),
    "MiniMaxForSequenceClassification": ("minimax", False),
}
"""Family, and whether the text model is the part of one that also sees."""
SEEING: dict[str, str] = {
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Qwen4ExpForConditionalGeneration": "qwen4_exp",
    "Lfm2VlForConditionalGeneration": "lfm2",
    "Lfm3VlForConditionalGeneration": "lfm3",
}
VISION: dict[str, Any] = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 16, "num_heads": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "out_hidden_size": 16,
}  # fmt: skip


def with_head(name: str, family: str, sees: bool, **options: Any) -> Any:
    """Return a tiny model of another class around the family's text model."""
    config = copy.deepcopy(model_of(family).config)
    if sees:
        cls: Any = getattr(hf, name).config_class
        vision = {**VISION, "model_type": cls().vision_config.model_type}
        config = cls(text_config=config.to_dict(), vision_config=vision, **options)
        if ROPE := getattr(config.text_config, "rope_parameters", None):
            ROPE.setdefault("mrope_section", [1, 1, 0])
        config.get_text_config().pad_token_id = 0
    config.pad_token_id = 0
    config.num_labels = 3
    torch.manual_seed(0)
    return perturbed(getattr(hf, name)(config))


@functools.cache
def classifier(name: str) -> Any:
    return with_head(name, *CLASSIFIERS[name])


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("method", ["signed", "channel", "rollout absolute"])
def test_a_classifier_is_explained_with_and_without_padding(name: str, method: str) -> None:
    model = classifier(name)
    made = METHODS[method](model)
    alone = [made.attribute(IDS[row : row + 1, :n], target=2)[0] for row, n in enumerate(LENGTHS)]
    assert len(made.fidelity) >= 4
    for side in SIDES:
        ids, mask = padded(side, width=9)
        scores = made.attribute(ids, 2, mask)
        assert scores[mask == 0].eq(0).all()
        for row, expected in enumerate(alone):
            assert_close(scores[row][mask[row] == 1], expected, method)
    if method != "rollout absolute":
        assert relative_error(made.attribute(IDS[:1], target=1)[0], alone[0]) > 1e-3


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_that_reads_padding_of_embeddings_is_refused(name: str) -> None:
    """Given embeddings, transformers' classifiers read the last position, whatever the mask says."""
    model = classifier(name)
    method = ImplicitAttentionAttribution(model, rectify=None)
    for side in SIDES:
        ids, mask = padded(side)
        x = model.get_input_embeddings()(ids).detach()
        if side == "right":
            with pytest.raises(InvalidInputError, match="read at padding"):
                method.attribute(x, 2, mask)
        else:
            assert_close(method.attribute(x, 2, mask).sum(-1), method.attribute(ids, 2, mask), "signed")


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_is_explained_on_text_alone(name: str) -> None:
    model, expected_mixers = with_head(name, SEEING[name], sees=True), mixers_of(SEEING[name], model_of(SEEING[name]))
    text = [path for path, m in model.named_modules() if type(m).__name__ in expected_mixers.values()]
    for method in (ImplicitAttentionAttribution(model, rectify=None), ImplicitAttentionRollout(model)):
        alone = [method.attribute(IDS[row : row + 1, :n], target=TARGET)[0] for row, n in enumerate(LENGTHS)]
        assert sorted(method.fidelity) == sorted(text) and len(text) == len(expected_mixers)
        for side in SIDES:
            ids, mask = padded(side)
            scores = method.attribute(ids, TARGET, mask)
            assert scores[mask == 0].eq(0).all()
            for row, expected in enumerate(alone):
                assert_close(scores[row][mask[row] == 1], expected, "signed")


HYBRIDS = {family for family, _, _ in layers_of(oracles_softmax)}
SOFTMAX = [family for family in FAMILIES if family.partition(" ")[0] in HYBRIDS]


@pytest.mark.parametrize("family", SOFTMAX)
def test_the_implementation_of_the_attention_changes_no_score(family: str) -> None:
    model = build(family)
    kinds = {attention._attn_implementation for attention in map(config_of, model.modules()) if attention is not None}
    assert kinds == {"sdpa"}
    model.set_attn_implementation("eager")
    ids, mask = padded("left" if family not in BLIND else "right", width=9)
    for name in ("signed", "rollout absolute"):
        assert_close(METHODS[name](model).attribute(IDS, target=TARGET), explained(family, name), name)
        scores = METHODS[name](model).attribute(ids, TARGET, mask)
        assert_explained_as_alone(family, name, scores, mask)


def config_of(module: nn.Module) -> Any:
    """Return the configuration of an attention layer, or None."""
    return getattr(module, "config", None) if type(module).__name__.endswith("Attention") else None


@pytest.mark.parametrize("family", ["mamba2", "zamba2", "nemotron_h", "qwen3_5_moe", "rwkv", "glm5_next", "lfm2"])
def test_a_saved_model_has_the_same_scores(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(METHODS["signed"](loaded).attribute(IDS, target=TARGET), explained(family, "signed"), "signed")


def test_a_layer_between_the_mixers_that_no_adapter_knows_is_refused() -> None:
    """The lexical convolution that Qwen4 may have besides its attention."""
    options = {"ple_layer_ids": [1], "ngram_vocab_size_base": 29, "split_ngram_parts": 1}
    model = FAMILIES["qwen4_exp"].build(**options, make_ngram_vocab_size_divisible_by=1)
    with pytest.raises(UnsupportedModelError, match=r"PLELayer.*mixes tokens"):
        ImplicitAttentionAttribution(model).attribute(IDS, target=TARGET)
