"""A model inside a wrapper of another library is explained as the model itself; the wrappers are built like theirs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    InvalidInputError,
    LayerImplicitAttention,
    ModelStateError,
    UnsupportedModelError,
)
from captum_ssm.metrics import activation
from captum_ssm.network.hosts import HOSTS, called, host_of, inside
from captum_ssm.network.interface import input_embeddings, is_language_model, models_inside
from tests.conftest import build


class Envoy:
    """As nnsight's: no module, and all else is the module's."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.interleaver, self.dispatched = module, object(), True

    def trace(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Bridge(nn.Module):
    """As TransformerLens's bridge: a forward of its own, around the model's layers under other names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.adapter = object()
        vars(self)["original_model"] = model
        self.blocks = model.backbone.layers

    def run_with_hooks(self) -> None: ...

    def forward(self, input: Tensor, return_type: str = "logits") -> Tensor:
        return vars(self)["original_model"](input).logits


class Tuner(nn.Module):
    """As PEFT's, such as LoraModel."""

    peft_config: dict[str, Any] = {}  # noqa: RUF012 (as theirs)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.peft_config = self.peft_config  # on the model inside too, which has a base_model of its own

    def inject_adapter(self) -> None: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Adapted(nn.Module):
    """As PeftModel without a task: its forward names no argument."""

    peft_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def get_nb_trainable_parameters(self) -> None: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Prompted(Adapted):
    """As PeftModel with a prompt: virtual tokens in front."""

    def __init__(self, model: Any, count: int = 3) -> None:
        nn.Module.__init__(self)
        self.base_model = model
        self.prompt = nn.Parameter(torch.randn(1, count, model.config.hidden_size))

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **options: Any
    ) -> Any:
        model: Any = self.base_model
        vectors = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        prompt = self.prompt.expand(len(vectors), -1, -1)
        if attention_mask is not None:
            attention_mask = torch.cat([torch.ones(prompt.shape[:2]), attention_mask], 1)
        return model(inputs_embeds=torch.cat([prompt, vectors], 1), attention_mask=attention_mask, **options)


class Features(nn.Module):
    """As the first module of sentence-transformers."""

    tokenizer = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model

    def save(self) -> None: ...

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "token_embeddings": self.auto_model(**features)[0]}


class Mean(nn.Module):
    """As their pooling."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        x = features["token_embeddings"]
        mask = features.get("attention_mask", torch.ones(x.shape[:2])).unsqueeze(-1)
        return {**features, "sentence_embedding": (x * mask).sum(1) / mask.sum(1)}


class Sentences(nn.Sequential):
    """As SentenceTransformer."""

    module_kwargs = tokenizer = None


class Lightning(nn.Module):
    """As a LightningModule: the model is an attribute, and the forward is the user's."""

    def __init__(self, model: nn.Module, returns: str) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"model": model})
        self.returns = returns

    def forward(self, batch: Any, mask: Any = None) -> Any:
        if self.returns == "nothing":
            raise NotImplementedError
        if self.returns == "batch":
            return self.net["model"](**batch)
        output = self.net["model"](input_ids=batch, attention_mask=mask)
        return output if self.returns == "output" else output.logits[:, -1]


SAME: dict[str, Any] = {
    "DataParallel": nn.DataParallel,
    "nnsight": Envoy,
    "bridge": Bridge,
    "PeftModel": lambda model: Adapted(model).eval(),
    "tuner": lambda model: Tuner(model).eval(),
    "several": lambda model: nn.DataParallel(Adapted(model).eval()),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled around several": lambda model: torch.compile(nn.DataParallel(Adapted(model)).eval(), backend="eager"),
    "several around compiled": lambda model: Adapted(cast(Any, torch.compile(model, backend="eager"))).eval(),
}
every_same_host = pytest.mark.parametrize("wrap", SAME.values(), ids=SAME)


@every_same_host
def test_a_host_is_explained_as_the_model_inside(wrap: Any, mamba: Any, ids: Tensor) -> None:
    host, mask = wrap(mamba), torch.ones_like(ids)
    mask[0, :2] = 0
    assert is_language_model(host) and inside(host) is mamba
    assert input_embeddings(host) is mamba.get_input_embeddings()
    relevance, attribution = ImplicitAttentionRelevance(mamba), ImplicitAttentionAttribution(mamba)
    embeddings = mamba.get_input_embeddings()(ids).detach()
    for inputs in (ids, embeddings):
        expected = relevance.attribute(inputs, 5, mask, baselines=0)
        torch.testing.assert_close(
            ImplicitAttentionRelevance(host).attribute(inputs, 5, mask, baselines=0), expected, rtol=0, atol=0
        )
        expected = attribution.attribute(inputs, 5, mask)
        torch.testing.assert_close(
            ImplicitAttentionAttribution(host).attribute(inputs, 5, mask), expected, rtol=0, atol=0
        )


def test_every_kind_of_host_has_a_stand_in(mamba: Any) -> None:
    hosts = [wrap(mamba) for wrap in SAME.values()]
    hosts += [Features(mamba), Sentences(Features(mamba))]
    assert {host_of(host) for host in hosts} == {*HOSTS.values()}


def test_a_model_is_no_host(family: Any) -> None:
    assert host_of(family) is None and called(family) is family is inside(family)
    assert all(host_of(module) is None for module in family.modules())


@pytest.mark.parametrize("wrap", [nn.DataParallel, Envoy, SAME["PeftModel"]])
def test_a_model_may_be_named_by_its_host(wrap: Any, mamba: Any, ids: Tensor) -> None:
    def score(ids: Tensor) -> Tensor:
        return mamba(ids).logits[:, -1]

    method = ImplicitAttentionAttribution(score, wrap(mamba))
    torch.testing.assert_close(
        method.attribute(ids, 5), ImplicitAttentionAttribution(mamba).attribute(ids, 5), rtol=0, atol=0
    )


def test_a_host_is_measured_and_its_layers_are_seen(mamba: Any, ids: Tensor) -> None:
    scores, host = torch.rand(ids.shape), nn.DataParallel(mamba)
    expected = activation(mamba, ids, scores, baselines=0, target=5)
    assert torch.equal(activation(host, ids, scores, baselines=0, target=5).values, expected.values)
    matrix = LayerImplicitAttention(mamba, 0).attribute(ids)
    assert torch.equal(LayerImplicitAttention(host, 0).attribute(ids), matrix)


def test_a_model_without_weights_is_refused_with_the_remedy(mamba: Any, ids: Tensor) -> None:
    host: Any = Envoy(mamba)
    host.dispatched = False
    with pytest.raises(ModelStateError, match=r"dispatch\(\)"):
        ImplicitAttentionRelevance(host)


@pytest.mark.parametrize("baseline", [None, 3])
def test_virtual_tokens_belong_to_no_token(baseline: Any, mamba: Any, ids: Tensor, unchanged: Any) -> None:
    """The sum is the difference that the host itself makes, or the score with the virtual tokens in the bias."""
    host, mask = Prompted(mamba).eval(), torch.ones_like(ids)
    mask[0, :2] = 0
    method = ImplicitAttentionRelevance(host)
    with unchanged(host, ids):
        scores = method.attribute(ids, 5, mask, baselines=baseline)

    def value(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return host(ids, mask).logits[:, -1, 5]

    expected = value(ids) - (method.terms["bias"] if baseline is None else value(torch.where(mask.bool(), 3, ids)))
    torch.testing.assert_close(scores.sum(1), expected, rtol=0, atol=1e-5)
    assert bool((scores[0, :2] == 0).all())


def test_no_matrix_has_virtual_tokens(mamba: Any, ids: Tensor, unchanged: Any) -> None:
    host = Prompted(mamba).eval()
    with unchanged(host, ids), pytest.raises(UnsupportedModelError, match="put in front"):
        ImplicitAttentionAttribution(host).attribute(ids, 5, torch.ones_like(ids))


def test_the_last_real_token_is_found_behind_virtual_ones(mamba: Any, ids: Tensor) -> None:
    """Padding on the right: the score is read where the text ends, not the prompt's length before it."""
    host, mask = Prompted(mamba).eval(), torch.ones_like(ids)
    mask[:, 5:] = 0
    scores = ImplicitAttentionRelevance(host).attribute(ids, 5, mask)
    torch.testing.assert_close(
        scores[:, :5], ImplicitAttentionRelevance(host).attribute(ids[:, :5], 5), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pooled", [True, False])
def test_a_component_of_an_embedding_is_explained(pooled: bool, ids: Tensor) -> None:
    model, mask = build("mamba").backbone, torch.ones_like(ids)
    mask[0, 5:] = 0
    host: Any = Sentences(Features(model), Mean()).eval() if pooled else Features(model).eval()

    def component(ids: Tensor) -> Tensor:
        x = model(ids, attention_mask=mask)[0]
        weights = mask if pooled else nn.functional.one_hot(mask.sum(1) - 1, ids.shape[1])
        return (x * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)

    scores = ImplicitAttentionRelevance(host).attribute(ids, 2, mask, baselines=3)
    reference = torch.where(mask.bool(), 3, ids)
    expected = ImplicitAttentionRelevance(component, model).attribute(ids, 2, baselines=reference)
    torch.testing.assert_close(scores, expected)
    scores = ImplicitAttentionAttribution(host).attribute(ids, 2, mask)
    torch.testing.assert_close(scores, ImplicitAttentionAttribution(component, model).attribute(ids, 2))


def test_a_forward_of_ones_own_is_called(mamba: Any, ids: Tensor) -> None:
    host = Lightning(mamba, "logits").eval()
    assert models_inside(host) == ["net.model"]
    scores = ImplicitAttentionRelevance(host).attribute(ids, 5, baselines=3)
    torch.testing.assert_close(scores, ImplicitAttentionRelevance(mamba).attribute(ids, 5, baselines=3))


@pytest.mark.parametrize("returns", ["nothing", "batch", "output"])
@pytest.mark.parametrize("method", [ImplicitAttentionRelevance, ImplicitAttentionAttribution])
def test_a_forward_that_gives_no_scores_is_refused_with_the_attribute_to_pass(
    method: Any, returns: str, mamba: Any, ids: Tensor, unchanged: Any
) -> None:
    host = Lightning(mamba, returns).eval()
    with unchanged(host, ids), pytest.raises(InvalidInputError, match=r"pass it: forward_func\.net\.model"):
        method(host).attribute(ids, 5)


def test_an_error_of_a_module_without_a_model_is_its_own(ids: Tensor) -> None:
    with pytest.raises(NotImplementedError):
        ImplicitAttentionRelevance(nn.Module().eval()).attribute(ids, 5)


def test_attributes_of_the_model_inside_make_no_host(mamba: Any) -> None:
    """A host that passes on what it has not, as most do, is known by what is its own."""
    envoy: Any = Envoy(mamba)
    mamba.module, mamba.device_ids, mamba.scatter = (SimpleNamespace() for _ in range(3))
    assert host_of(envoy) is HOSTS["nnsight"]
