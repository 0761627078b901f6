"""Explain a whole generation: every generated token by the prompt and by what was generated before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_ssm._captum import LayerAttribution, LLMAttributionResult
from captum_ssm._progress import progress_bar
from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.attr.generated_tokens import attention_rows, relevance_rows
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.errors import InvalidInputError
from captum_ssm.network.continuation import continued
from captum_ssm.network.inputs import outside_inference_mode, refuse_bad_inputs, refuse_bad_state
from captum_ssm.network.interface import is_language_model, output_embeddings
from captum_ssm.network.reference import Baseline
from captum_ssm.network.turns import unchanged
from captum_ssm.pages import Views, token_texts, views_html


class AnswerAttribution(LLMAttributionResult):
    """Captum's result, which a notebook shows as a text whose written tokens show where they come from.

    Args:
        tokenizer: The model's tokenizer, asked only when the result is shown.
        ids: The ids of prompt and answer.
        **result: The arguments of Captum's result; ``token_attr`` is one of them.
    """

    def __init__(self, *, tokenizer: Any, ids: Sequence[int], **result: Any) -> None:
        super().__init__(**result)
        self.tokenizer = tokenizer
        self.ids = list(ids)

    @property
    def texts(self) -> list[str]:
        """The characters that each token of prompt and answer adds to the text."""
        return token_texts(self.tokenizer, self.ids)

    @property
    def views(self) -> Views:
        """One view of the text for each written token, and their sum; ``views_html(result.views)`` is a page."""
        count = len(self.output_tokens)
        names = [*self.input_tokens, self.output_tokens[-1]]
        texts = self.texts
        answer = "".join(texts[-count:]).strip()
        return Views.of_answer(texts, names, cast(Tensor, self.token_attr), f"Where {answer!r} comes from")

    def _repr_html_(self) -> str:
        """Show the result in a notebook."""
        return views_html(self.views, page=False)


class LLMImplicitAttention:
    """Explain every token of a generated text in one call.

    The counterpart of Captum's ``LLMGradientAttribution`` for the methods of this package, with the same call and the
    same result. The model runs once over prompt and answer; each generated token's log-probability is then explained
    by all tokens before it, several at a time, instead of one run of the model for each of them. By relevance it is
    one explanation for each generated token, of the tokens before it: each row sums to the log-probability, or to its
    difference to the reference.

    Args:
        method: Any of this package's methods of all layers, made of a language model of transformers or mamba_ssm
            itself, or of a host around one.
        tokenizer: The model's tokenizer.

    Raises:
        InvalidInputError: If the method does not explain a language model.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from captum_ssm import ImplicitAttentionAttribution, LLMImplicitAttention, models
        >>> model = AutoModelForCausalLM.from_pretrained(models.REVIEWS)
        >>> tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
        >>> method = ImplicitAttentionAttribution(model, rectify=None)
        >>> prompt = tokenizer("a gorgeous", return_tensors="pt", add_special_tokens=False).input_ids
        >>> result = LLMImplicitAttention(method, tokenizer).attribute(prompt, target=" witty film")
        >>> result.token_attr.shape == (len(result.output_tokens), len(result.input_tokens))
        True
    """

    def __init__(self, method: ImplicitAttentionMethod | ImplicitAttentionRelevance, tokenizer: Any) -> None:
        whole = isinstance(method, ImplicitAttentionRelevance) and not isinstance(method, LayerAttribution)
        if not isinstance(method, ImplicitAttentionMethod) and not whole:
            raise InvalidInputError(
                "A generation is explained by a method of all layers, such as ImplicitAttentionAttribution(model), "
                f"not by {type(method).__name__}."
            )
        if not is_language_model(method.forward_func) or output_embeddings(method.forward_func) is None:
            raise InvalidInputError(
                "A generation is explained through a transformers language model as it is, such as "
                f"{type(method).__name__}(model); this method's forward_func is {type(method.forward_func).__name__}."
            )
        self.method = method
        self.tokenizer = tokenizer

    @property
    def model(self) -> nn.Module:
        """The language model."""
        return self.method.model

    def attribute(
        self,
        inp: Any,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        baselines: Baseline | list[Baseline] | None = None,
        show_progress: bool = False,
    ) -> AnswerAttribution:
        """Explain each generated token by the tokens before it.

        Args:
            inp: The prompt: a text, which gets the tokenizer's special tokens; its token ids (L,) or (1, L); or
                Captum's ``TextTokenInput``.
            target: The answer, a text or its token ids; None lets the model generate it.
            gen_args: Arguments of ``model.generate`` for that; by default 25 tokens, each the most probable.
            baselines: For relevance, the reference: an id that replaces every token before the explained one; ids
                (1, tokens) in the place of prompt and answer, but for its last token; or a list of several, which are
                averaged over. None freezes the gates.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Captum's result. ``token_attr`` (generated tokens, prompt and generated tokens): row i has the scores of
            generated token i, for its log-probability; tokens that come after it have exactly 0. ``seq_attr`` is the
            sum of the rows: the sources of the whole answer. ``input_tokens`` are the prompt and the answer but for
            its last token, ``output_tokens`` the answer. It plots with ``plot_token_attr()`` and ``plot_seq_attr()``;
            a notebook shows it as a text in which each written token shows where it comes from.

        Raises:
            InvalidInputError: If the prompt or the answer is empty, or has ids that the model does not know; if the
                method takes no baselines, or they do not fit.
            ModelStateError: If the model is training, or gives NaN or infinity.
            UnsupportedModelError: If another layer of the model mixes tokens, or, for relevance, calls a function that
                has no rule.
            FidelityError: If a layer's decomposition misses the layer's own output, or the relevance does not add up.

        Cost: one forward pass; for a method with gradients one backward pass of the model's decomposition for each
        generated token, and two passes of the recurrences, all of the generated tokens' at once. By relevance one
        explanation for each generated token, whose passes run over the tokens before it.
        """
        device = next(self.model.parameters()).device
        prompt = self._ids(inp, special=True).to(device)
        answer = self.generate(prompt, gen_args) if target is None else self._ids(target, special=False).to(device)
        if prompt.shape[1] == 0 or answer.shape[1] == 0:
            raise InvalidInputError("The prompt or the answer has no token; pass at least one word of each.")
        ids = torch.cat([prompt, answer], dim=1)
        scores = self.explain(ids, prompt.shape[1], baselines=baselines, show_progress=show_progress)
        tokens = self.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        return AnswerAttribution(
            seq_attr=scores.sum(0),
            token_attr=scores,
            input_tokens=tokens[:-1],
            output_tokens=tokens[prompt.shape[1] :],
            tokenizer=self.tokenizer,
            ids=ids[0].tolist(),
        )

    def explain(
        self,
        ids: Tensor,
        start: int,
        *,
        baselines: Baseline | list[Baseline] | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Return the scores of every token from ``start`` on.

        Args:
            ids: Prompt and answer (1, L).
            start: Number of the first explained token, at least 1.
            baselines: For relevance, the reference, as in :meth:`attribute`.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            (L - start, L - 1): row i has the scores for token start + i.

        Raises:
            InvalidInputError: If there is no token to explain, or ids that the model does not know; if the method takes
                no baselines, or they do not fit.
            ModelStateError: If the model is training, or gives NaN or infinity.
            UnsupportedModelError: If another layer of the model mixes tokens, or, for relevance, calls a function that
                has no rule.
            FidelityError: If a layer's decomposition misses the layer's own output, or the relevance does not add up.
        """
        method, model = self.method, self.model
        refuse_bad_state(model)
        refuse_bad_inputs(model, ids)
        if not 1 <= start < ids.shape[1]:
            raise InvalidInputError(f"The first explained token must be 1 to {ids.shape[1] - 1}, not {start}.")
        count = ids.shape[1] - start
        with torch.inference_mode(False), unchanged(model, model, ids):
            ids = outside_inference_mode(ids)
            with progress_bar(type(self).__name__, count, show_progress, "token") as advance:
                if isinstance(method, ImplicitAttentionRelevance):
                    return relevance_rows(method, ids, start, baselines, advance).detach()
                if baselines is not None:
                    raise InvalidInputError(
                        f"{type(method).__name__} compares with no reference; leave out baselines, or explain the "
                        "generation by ImplicitAttentionRelevance(model)."
                    )
                return attention_rows(method, ids, start, advance).detach()

    def _ids(self, text: Any, *, special: bool) -> Tensor:
        """Return token ids (1, L) of a text, of ids, or of Captum's text input."""
        if isinstance(text, str):
            text = self.tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
        elif hasattr(text, "to_model_input"):
            own_input = text.to_model_input()
            if isinstance(own_input, str):
                raise InvalidInputError(
                    f"The features of a {type(text).__name__} are not tokens, and this method explains tokens. Pass "
                    "its text: inp.to_model_input()."
                )
            text = own_input if isinstance(own_input, Tensor) else own_input["input_ids"]
        if not isinstance(text, Tensor) or text.is_floating_point() or text.dim() not in (1, 2):
            raise InvalidInputError(
                "A prompt or an answer is a text, token ids (L,) or (1, L), or Captum's TextTokenInput, not "
                f"{type(text).__name__}."
            )
        ids = text if text.dim() == 2 else text.unsqueeze(0)
        if len(ids) != 1:
            raise InvalidInputError(f"One generation is explained at a time, but got a batch of {len(ids)}.")
        return ids.long()

    def generate(self, prompt: Tensor, gen_args: dict[str, Any] | None = None) -> Tensor:
        """Let the model answer a prompt.

        Args:
            prompt: Token ids (1, L).
            gen_args: Arguments of ``model.generate``; by default 25 tokens, each the most probable.

        Returns:
            The answer's token ids (1, generated tokens).

        Raises:
            InvalidInputError: If the arguments ask for several answers, or for a prompt with padding.
        """
        refuse_bad_state(self.model)
        refuse_bad_inputs(self.model, prompt)
        options = {"max_new_tokens": 25, "do_sample": False} if gen_args is None else gen_args
        mask = options.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.numel() == prompt.numel() and bool(mask.all())):
            raise InvalidInputError(
                "The attention_mask among the generation's arguments leaves out tokens of the prompt, or does not fit "
                "it. Pass a prompt without padding, and no mask."
            )
        with torch.no_grad(), unchanged(self.model, continued, prompt):
            ids = continued(self.model, prompt, options, getattr(self.tokenizer, "eos_token_id", None))
        if len(ids) != 1:
            raise InvalidInputError(
                f"One generation is explained at a time, but the model gave {len(ids)} answers. Set "
                "num_return_sequences=1, or pass each answer as `target`."
            )
        return ids[:, prompt.shape[1] :]
