"""A transformers model with its tokenizer: from words to numbers and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ssm import models
from captum_ssm.cli.encoding import Encoding
from captum_ssm.cli.problems import MISSING_EXTRA, CommandError

SPECIAL_TOKENS = ("unk", "pad", "mask")
"""Special tokens of a tokenizer that may replace a word; the first one that the model has is the default reference."""


@dataclass(frozen=True)
class TextModel:
    """A transformers model with its tokenizer, and the words for its predictions.

    Attributes:
        model: A causal language model, or a classifier.
        tokenizer: Its fast tokenizer.
        source: Where the model comes from, in words.
    """

    model: Any
    tokenizer: Any
    source: str

    @classmethod
    def load(cls, source: str, dtype: str, device: str) -> TextModel:
        """Load a model and its tokenizer.

        Args:
            source: A folder, or a name on the hub.
            dtype: Name of a floating-point type of torch.
            device: A device of torch.

        Returns:
            The model in evaluation mode, on the device, with its tokenizer.

        Raises:
            CommandError: If transformers is missing, the model cannot be loaded, or its tokenizer is not a fast one.
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise CommandError(MISSING_EXTRA) from error
        logging.set_verbosity_error()
        if source == str(models.REVIEWS):
            logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(source)
            if torch.device(device).type == "cpu" and hasattr(config, "use_mamba_kernels"):
                config.use_mamba_kernels = False  # earlier releases run no Jamba or Zamba on a CPU with the default
            classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
            auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
            model = auto.from_pretrained(source, config=config, dtype=getattr(torch, dtype)).eval().to(device)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:
            raise CommandError(f"cannot load a model from {source!r} to device {device!r}: {error}") from error
        if not tokenizer.is_fast:
            raise CommandError(f"the tokenizer of {source!r} cannot say where its tokens stand; use a fast tokenizer.")
        name = "the shipped movie-review Mamba" if source == str(models.REVIEWS) else source
        return cls(model, tokenizer, f"{name}, {type(model).__name__}")

    def encode(self, text: str) -> Encoding:
        """Cut the text into tokens.

        Args:
            text: The text to explain.

        Returns:
            The tokens, on the device of the model.

        Raises:
            CommandError: If the text has no token, or is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CommandError(f"the text is not valid Unicode: {error}; pass it encoded as UTF-8.") from error
        encoding = self.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = [(int(start), int(end)) for start, end in encoding["offset_mapping"][0]]
        if not any(end > start for start, end in offsets):
            raise CommandError("the text has no token to explain; pass at least one word.")
        ids, mask = (encoding[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        return Encoding(text, self.tokenizer, ids, mask, offsets)

    @property
    def classifies(self) -> bool:
        """Whether the model scores classes rather than vocabulary entries."""
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def name(self, target: int) -> str:
        """Return the word for a class or a vocabulary entry."""
        if self.classifies:
            return str(self.model.config.id2label.get(target, target))
        return str(self.tokenizer.decode([target]).strip() or self.tokenizer.convert_ids_to_tokens(target))

    def target(self, word: str, count: int) -> int:
        """Return the number of a class or a vocabulary entry.

        Args:
            word: Its name or number.
            count: The number of classes, or of vocabulary entries.

        Returns:
            A number from 0 to ``count - 1``.

        Raises:
            CommandError: If no class or token has this name, or the number is out of range.
        """
        if (number := _as_number("target", word, count)) is not None:
            return number
        if self.classifies:
            labels = {str(label): number for number, label in self.model.config.id2label.items()}
            if word not in labels:
                raise CommandError(f"there is no class {word!r}; choose from {', '.join(labels)}.")
            return labels[word]
        return self.token(word)

    def token(self, word: str) -> int:
        """Return the id of the one token that a word consists of.

        Args:
            word: A word, with or without a blank before it in the vocabulary.

        Returns:
            The id.

        Raises:
            CommandError: If the word consists of several tokens, or the tokenizer does not know it.
        """
        candidates = [self.tokenizer.encode(form, add_special_tokens=False) for form in (f" {word}", word)]
        single = [ids[0] for ids in candidates if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id]
        if not single:
            pieces = self.tokenizer.convert_ids_to_tokens(candidates[0])
            raise CommandError(f"{word!r} is not one token of this model, but {pieces}; choose one of them.")
        return single[0]

    def reference(self, word: str | None) -> int | None:
        """Return the token of which the reference text consists, or None for frozen gates.

        Args:
            word: ``"unk"``, ``"pad"`` or ``"mask"``, ``"none"``, a special token as the tokenizer writes it, a word, or
                an id; None takes the first special token that tokenizer and model have.

        Returns:
            The id of the token, or None.

        Raises:
            CommandError: If the model has no such token.
        """
        count = self.model.get_input_embeddings().weight.shape[0]
        special = {name: getattr(self.tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
        special = {name: token for name, token in special.items() if token is not None and token < count}
        if word is None:
            return next(iter(special.values()), None)
        if word == "none":
            return None
        if word in SPECIAL_TOKENS and word not in special:
            others = ", ".join([*special, "none"])
            raise CommandError(f"the model has no {word} token; choose {others}, a word, or an id.")
        if word in special:
            return special[word]
        if (number := _as_number("reference", word, count)) is not None:
            return number
        if word in self.tokenizer.all_special_tokens:
            return int(self.tokenizer.convert_tokens_to_ids(word))
        return self.token(word)

    def prediction(self, logits: Tensor) -> str:
        """Return the most probable outcomes in words, from the logits (V,) of all."""
        best = logits.softmax(-1).topk(min(3, len(logits)))
        outcomes = [(self.name(int(k)), float(p)) for p, k in zip(*best)]
        return ", ".join(f"{name!r} {p:.1%}" for k, (name, p) in enumerate(outcomes) if k == 0 or p >= 0.001)


def _as_number(option: str, word: str, count: int) -> int | None:
    """Return a number that is written in digits, or None for any other word.

    Raises:
        CommandError: If the number does not lie in 0 to ``count - 1``.
    """
    if not re.fullmatch(r"-?[0-9]+", word):
        return None
    if not 0 <= int(word) < count:
        raise CommandError(f"{option} {word} is out of range; the model has {count} (0 to {count - 1}).")
    return int(word)
