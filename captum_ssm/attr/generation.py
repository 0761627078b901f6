"""Explain a whole generation: every generated token by the prompt and by what was generated before it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm._captum import LLMAttributionResult
from captum_ssm._progress import progress_bar
from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.layers.call import LayerCall, together
from captum_ssm.layers.fidelity import Decomposition
from captum_ssm.network.examination import examine
from captum_ssm.network.forward import language_logits
from captum_ssm.network.inputs import outside_inference_mode, refuse_bad_inputs, refuse_bad_state, token_mask
from captum_ssm.network.interface import is_language_model
from captum_ssm.network.recording import output_through_chain, record_head, record_mixers
from captum_ssm.network.turns import unchanged

_PASS = 2**22
"""How much one backward pass of several tokens may span, in tokens times channels: the size of a processor's cache."""

_WARNINGS = Lock()
"""Held while warnings are filtered: Python has one filter for all threads."""


class LLMImplicitAttention:
    """Explain every token of a generated text in one call.

    The counterpart of Captum's ``LLMGradientAttribution`` for the methods of this package, with the same call and the
    same result. The model runs once over prompt and answer; each generated token's log-probability is then explained
    by all tokens before it, several at a time, instead of one run of the model for each of them.

    Args:
        method: Any of this package's methods, made of a transformers language model itself.
        tokenizer: The model's tokenizer.

    Raises:
        InvalidInputError: If the method does not explain a transformers language model.

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

    def __init__(self, method: ImplicitAttentionMethod, tokenizer: Any) -> None:
        if not isinstance(method, ImplicitAttentionMethod):
            raise InvalidInputError(
                "A generation is explained by a method of all layers, such as ImplicitAttentionAttribution(model), "
                f"not by {type(method).__name__}."
            )
        output = getattr(method.forward_func, "get_output_embeddings", None)
        if not is_language_model(method.forward_func) or output is None or output() is None:
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
        show_progress: bool = False,
    ) -> LLMAttributionResult:
        """Explain each generated token by the tokens before it.

        Args:
            inp: The prompt: a text, which gets the tokenizer's special tokens; its token ids (L,) or (1, L); or
                Captum's ``TextTokenInput``.
            target: The answer, a text or its token ids; None lets the model generate it.
            gen_args: Arguments of ``model.generate`` for that; by default 25 tokens, each the most probable.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Captum's result. ``token_attr`` (generated tokens, prompt and generated tokens): row i has the scores of
            generated token i, for its log-probability; tokens that come after it have exactly 0. ``seq_attr`` is the
            sum of the rows: the sources of the whole answer. ``input_tokens`` are the prompt and the answer but for
            its last token, ``output_tokens`` the answer. It plots with ``plot_token_attr()`` and ``plot_seq_attr()``.

        Raises:
            InvalidInputError: If the prompt or the answer is empty, or has ids that the model does not know.
            ModelStateError: If the model is training, or gives NaN or infinity.
            UnsupportedModelError: If another layer of the model mixes tokens.
            FidelityError: If a layer's decomposition misses the layer's own output.

        Cost: one forward pass; for a method with gradients one backward pass of the model's decomposition for each
        generated token, and two passes of the recurrences, all of the generated tokens' at once.
        """
        device = next(self.model.parameters()).device
        prompt = self._ids(inp, special=True).to(device)
        answer = self.generate(prompt, gen_args) if target is None else self._ids(target, special=False).to(device)
        if prompt.shape[1] == 0 or answer.shape[1] == 0:
            raise InvalidInputError("The prompt or the answer has no token; pass at least one word of each.")
        ids = torch.cat([prompt, answer], dim=1)
        scores = self.explain(ids, prompt.shape[1], show_progress=show_progress)
        tokens = self.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        return LLMAttributionResult(
            seq_attr=scores.sum(0),
            token_attr=scores,
            input_tokens=tokens[:-1],
            output_tokens=tokens[prompt.shape[1] :],
        )

    def explain(self, ids: Tensor, start: int, *, show_progress: bool = False) -> Tensor:
        """Return the scores of every token from ``start`` on.

        Args:
            ids: Prompt and answer (1, L).
            start: Number of the first explained token, at least 1.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            (L - start, L - 1): row i has the scores for token start + i.

        Raises:
            InvalidInputError: If there is no token to explain, or ids that the model does not know.
            ModelStateError: If the model is training, or gives NaN or infinity.
            UnsupportedModelError: If another layer of the model mixes tokens.
            FidelityError: If a layer's decomposition misses the layer's own output.
        """
        method, model = self.method, self.model
        refuse_bad_state(model)
        refuse_bad_inputs(model, ids)
        if not 1 <= start < ids.shape[1]:
            raise InvalidInputError(f"The first explained token must be 1 to {ids.shape[1] - 1}, not {start}.")
        with torch.inference_mode(False), unchanged(model, model, ids):
            ids = outside_inference_mode(ids)
            inputs, answer = ids[:, :-1], ids[0, start:]
            positions = torch.arange(start - 1, inputs.shape[1], device=ids.device)
            hold = method.gradient_at == "last layer"  # no gradient is asked for
            mixers = record_mixers(model, hold=hold, replacement=None if hold else output_through_chain)
            with torch.enable_grad(), mixers as recorded, record_head(model) as head_inputs:
                logits = language_logits(model, inputs)
                log_probabilities = logits[0, positions].log_softmax(-1).gather(1, answer.unsqueeze(1))
            if not bool(log_probabilities.isfinite().all()):
                raise ModelStateError(
                    "The log-probability of a generated token is NaN or infinite. Check the model's weights for NaN or "
                    "infinity, or run the model in a wider floating-point type."
                )
            calls = together(recorded)
            mask = token_mask(model, (), calls)
            graph = examine(model, calls, inputs, mask, partial(language_logits, model), language_logits)
            decompositions: dict[int, Decomposition] = {}  # shared by all generated tokens
            rows = []
            with progress_bar(type(self).__name__, len(positions), show_progress, "token") as advance:
                for some, gradients in self._gradients(log_probabilities, head_inputs[-1], positions, recorded):
                    query = F.one_hot(positions[some], inputs.shape[1]).to(mask).unsqueeze(1)  # (M, 1, L)
                    with torch.no_grad():
                        scores = method.scores_of_calls(
                            calls, gradients, graph, mask, query, decompositions=decompositions
                        )
                    rows.append(scores.squeeze(1))
                    advance(len(query))
        return torch.cat(rows).detach()

    def _gradients(
        self, log_probabilities: Tensor, head_input: Tensor, positions: Tensor, calls: list[LayerCall]
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Differentiate the log-probabilities, several at a time.

        The layers after the last mixer act on each token alone, and each log-probability is read at another position:
        so one backward pass to the head's input gives the gradients of all log-probabilities there, each at its
        position.

        Args:
            log_probabilities: Of the generated tokens, (M, 1).
            head_input: Input of the output embeddings (1, L, E).
            positions: Where each log-probability is read, (M,).
            calls: The mixers' calls, part of the graph.

        Yields:
            Some of the generated tokens, and their gradients at each call's output, (M, 1, L, E).
        """
        if self.method.gradient_at == "last layer":
            yield slice(0, len(positions)), [None] * len(calls)
            return
        (at_head,) = torch.autograd.grad(log_probabilities.sum(), head_input, retain_graph=True)
        outputs = [call.y for call in calls]
        L, E = head_input.shape[1:]
        size = max(1, _PASS // (L * E * 32))
        for start in range(0, len(positions), size):
            some = slice(start, start + size)
            one_hot = F.one_hot(positions[some], L).to(at_head)
            each = one_hot[:, None, :, None] * at_head  # (M, 1, L, E)

            def backward(gradient: Tensor) -> tuple[Tensor, ...]:
                return torch.autograd.grad(head_input, outputs, gradient, retain_graph=True, materialize_grads=True)

            with _WARNINGS, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batched form
                try:
                    gradients = torch.func.vmap(backward)(each)
                except RuntimeError:  # as what is sent between processes, or a norm of mixed types
                    gradients = tuple(map(torch.stack, zip(*map(backward, each))))
            like = together(calls)[-1].wide_input
            yield some, [g.to(like) for g in gradients]

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
        answer: Any = self.model.generate
        with torch.no_grad(), unchanged(self.model, answer, prompt):
            output = answer(prompt, **{"attention_mask": torch.ones_like(prompt), **options})
        ids: Tensor = getattr(output, "sequences", output)
        if len(ids) != 1:
            raise InvalidInputError(
                f"One generation is explained at a time, but the model gave {len(ids)} answers. Set "
                "num_return_sequences=1, or pass each answer as `target`."
            )
        return ids[:, prompt.shape[1] :]
