"""The hosts themselves are explained as the model inside; each is known by how it is built."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import pytorch_lightning
import sentence_transformers
import torch
import transformers as hf
from nnsight import LanguageModel
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    InvalidInputError,
    LLMImplicitAttention,
    ModelStateError,
    UnsupportedModelError,
)
from captum_ssm.models import REVIEWS
from captum_ssm.network.forward import run_model
from captum_ssm.network.hosts import HOSTS, called, host_of, inside
from captum_ssm.network.interface import is_language_model
from tests.conftest import build
from tests.families import FAMILIES, VOCABULARY

TEXTS = ["a gorgeous film", "what a mess it was"]


@pytest.fixture
def reviews() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(REVIEWS).eval()


@pytest.fixture
def tokenizer() -> Any:
    return hf.AutoTokenizer.from_pretrained(REVIEWS)


def relevance(model: Any, *args: Any, **options: Any) -> Tensor:
    return ImplicitAttentionRelevance(model).attribute(*args, **options)


# --- nnsight, TransformerLens, Lightning --------------------------------------------------------------------------


def test_an_nnsight_model_is_the_model_inside(reviews: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    expected = relevance(reviews, ids, 5, baselines=1), ImplicitAttentionAttribution(reviews).attribute(ids, 5)
    model = LanguageModel(copy.deepcopy(reviews), tokenizer=tokenizer)
    assert host_of(model) is HOSTS["nnsight"] and is_language_model(model)
    assert torch.equal(relevance(model, ids, 5, baselines=1), expected[0])
    assert torch.equal(ImplicitAttentionAttribution(model).attribute(ids, 5), expected[1])
    with model.trace(ids):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, reviews(ids).logits)


def test_an_nnsight_model_without_weights_is_refused(tokenizer: Any) -> None:
    model = LanguageModel(str(REVIEWS), tokenizer=tokenizer)
    with pytest.raises(ModelStateError, match=r"dispatch\(\)"):
        ImplicitAttentionRelevance(model)
    model.dispatch()
    assert relevance(model, torch.tensor([[5, 6, 7]]), 5).shape == (1, 3)


def test_a_bridge_is_the_model_inside(reviews: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    bridge = TransformerBridge.boot_transformers("mamba", hf_model=copy.deepcopy(reviews), tokenizer=tokenizer)
    assert host_of(bridge) is HOSTS["TransformerLens's bridge"] and called(bridge) is bridge.original_model
    torch.testing.assert_close(run_model(bridge, ids), bridge(ids)[:, -1])
    with torch.no_grad():
        difference = (reviews(ids).logits - reviews(torch.ones_like(ids)).logits)[0, -1, 5]
    torch.testing.assert_close(relevance(bridge, ids, 5, baselines=1).sum(), difference, rtol=1e-4, atol=1e-4)
    assert torch.equal(bridge(ids), reviews(ids).logits)


def test_a_lightning_module_is_called_or_names_its_model(reviews: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.reader = reviews

    class Whole(Module):
        def forward(self, ids: Tensor, attention_mask: Any = None) -> Tensor:
            return self.reader(ids, attention_mask=attention_mask).logits[:, -1]

    assert torch.equal(relevance(Whole().eval(), ids, 5, baselines=1), relevance(reviews, ids, 5, baselines=1))
    with pytest.raises(InvalidInputError, match=r"pass it: forward_func\.reader\."):
        relevance(Module().eval(), ids, 5)


# --- sentence-transformers ----------------------------------------------------------------------------------------


@pytest.fixture
def sentences(tmp_path: Path, tokenizer: Any) -> Any:
    hf.AutoModel.from_pretrained(REVIEWS).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = Transformer(str(tmp_path))
    modules = [words, Pooling(words.get_embedding_dimension(), "mean"), Normalize()]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu").eval()


def test_a_component_of_a_sentence_embedding_is_explained(sentences: Any, tokenizer: Any) -> None:
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    ids, mask = encoded.input_ids, encoded.attention_mask
    embeddings = sentences.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(run_model(sentences, ids, mask).detach(), embeddings)
    reference = torch.where(mask.bool(), 1, ids)
    scores = relevance(sentences, ids, 3, mask, baselines=1)
    difference = embeddings[:, 3] - run_model(sentences, reference, mask).detach()[:, 3]
    torch.testing.assert_close(scores.sum(1), difference, rtol=0, atol=1e-5)
    assert bool((scores[mask == 0] == 0).all())
    assert ImplicitAttentionAttribution(sentences).attribute(ids, 3, mask).shape == ids.shape


def test_a_similarity_is_explained(sentences: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    other = sentences.encode(TEXTS[1:], convert_to_tensor=True)[0].clone()  # of inference mode

    def similarity(ids: Tensor) -> Tensor:
        return sentences({"input_ids": ids})["sentence_embedding"] @ other

    scores = ImplicitAttentionRelevance(similarity, sentences).attribute(ids, baselines=1)
    with torch.no_grad():
        torch.testing.assert_close(scores.sum(1), similarity(ids) - similarity(torch.ones_like(ids)))


def test_the_words_alone_are_a_host_too(sentences: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    words = sentences[0]
    assert host_of(words) is HOSTS["sentence-transformers' first module"]
    expected = ImplicitAttentionRelevance(lambda ids: words.auto_model(ids)[0][:, -1], words.auto_model)
    torch.testing.assert_close(relevance(words, ids, 3, baselines=1), expected.attribute(ids, 3, baselines=1))


# --- PEFT ---------------------------------------------------------------------------------------------------------


def jamba(task: str | None) -> Any:
    model = build("jamba")
    classes = {"SEQ_CLS": hf.JambaForSequenceClassification, "FEATURE_EXTRACTION": hf.JambaModel}
    if task in classes:
        model = classes[task](model.config)
    return model.eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None])
def test_an_adapter_is_explained_by_relevance_for_every_task(task: str | None, ids: Tensor) -> None:
    """The sum is the difference that the adapted model itself makes; its adapter is not zero."""
    config = peft.LoraConfig(task_type=task, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    host: Any = peft.get_peft_model(jamba(task), config).eval()
    assert host_of(host) is HOSTS["PEFT"] and inside(host) is host.get_base_model()
    ids[0, 5:] = 0  # the padding token, by which a classifier finds the end of a text
    mask = ids.ne(0).long()
    with torch.no_grad():
        value, other = run_model(host, ids, mask), run_model(host, torch.where(mask.bool(), 3, ids), mask)
    method = ImplicitAttentionRelevance(host)
    scores = method.attribute(ids, 1, mask, baselines=3)
    total = scores.sum(1) + method.terms.get("decisions", torch.zeros(2))
    torch.testing.assert_close(total, (value - other)[:, 1], rtol=1e-3, atol=1e-5)


PROMPTS: dict[str, Any] = {
    "prompt tuning": lambda **options: peft.PromptTuningConfig(num_virtual_tokens=3, **options),
    "p-tuning": lambda **options: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **options),
    "prefix tuning": lambda **options: peft.PrefixTuningConfig(num_virtual_tokens=3, **options),
}


def llama(task: str) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(**small, num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0)
    return {"CAUSAL_LM": hf.LlamaForCausalLM, "SEQ_CLS": hf.LlamaForSequenceClassification}[task](config).eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("baseline", [None, 3])
def test_virtual_tokens_are_followed_and_belong_to_no_token(kind: str, task: str, baseline: Any, ids: Tensor) -> None:
    host: Any = peft.get_peft_model(llama(task), PROMPTS[kind](task_type=task)).eval()
    mask = torch.ones_like(ids)
    if task == "CAUSAL_LM":  # a classifier that is given embeddings, as by prompt tuning, reads the last position
        mask[0, 5:] = 0
    method = ImplicitAttentionRelevance(host)
    scores = method.attribute(ids, 1, mask, baselines=baseline)

    def value(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = host(input_ids=ids, attention_mask=mask).logits
        last = logits.shape[1] - ids.shape[1] + mask.sum(1) - 1 if logits.dim() == 3 else None
        return logits[:, 1] if last is None else logits[torch.arange(2), last, 1]

    expected = value(ids) - (method.terms["bias"] if baseline is None else value(torch.where(mask.bool(), 3, ids)))
    torch.testing.assert_close(scores.sum(1), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores != 0, mask.bool())


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning"])
def test_no_matrix_has_virtual_tokens(kind: str, ids: Tensor) -> None:
    sizes = {"num_layers": 2, "token_dim": 8, "num_attention_heads": 1}
    host = peft.get_peft_model(build("mamba"), PROMPTS[kind](task_type="CAUSAL_LM", **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="put in front"):
        ImplicitAttentionAttribution(host).attribute(ids, 1, torch.ones_like(ids))


def adapted_head() -> Any:
    """A model whose output layer has an adapter, and no weight in common with the embeddings."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(FAMILIES["mamba"].build(tie_word_embeddings=False), config).eval()


@pytest.mark.parametrize("wrap", [lambda host: host, nn.DataParallel, lambda host: host.base_model])
def test_an_adapter_on_linear_layers_is_called_itself(wrap: Any, ids: Tensor) -> None:
    host = adapted_head()
    merged = copy.deepcopy(host).merge_and_unload()
    expected = relevance(merged, ids, 5, baselines=3)
    torch.testing.assert_close(relevance(wrap(host), ids, 5, baselines=3), expected, rtol=1e-4, atol=1e-5)


class Words:
    eos_token_id = None

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(k) for k in ids]


def test_a_generation_of_an_adapted_model_is_explained(ids: Tensor) -> None:
    host = adapted_head()
    merged, options = copy.deepcopy(host).merge_and_unload(), {"max_new_tokens": 3, "do_sample": False}
    for method in (ImplicitAttentionRelevance, ImplicitAttentionAttribution):
        result = LLMImplicitAttention(method(host), Words()).attribute(ids[:1], None, options)
        expected = LLMImplicitAttention(method(merged), Words()).attribute(ids[:1], None, options)
        assert result.output_tokens == expected.output_tokens
        torch.testing.assert_close(result.token_attr, expected.token_attr, rtol=1e-4, atol=1e-5)
