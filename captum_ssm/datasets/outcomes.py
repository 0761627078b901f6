"""Words for the outcomes of a model, its classes or vocabulary entries, and numbers for words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.network.hosts import inside

SPECIAL_TOKENS = ("unk", "pad", "mask")
"""Special tokens of a tokenizer that may replace a word; the first one that the model has is the default reference."""


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of a model by name.

    Attributes:
        model: A causal language model, a classifier, or any other model.
        tokenizer: Its tokenizer; None if it has none.
    """

    model: Any
    tokenizer: Any = None

    @property
    def classifies(self) -> bool:
        """Whether the model scores classes rather than vocabulary entries."""
        return type(inside(self.model)).__name__.endswith("ForSequenceClassification")

    def name(self, target: int) -> str:
        """Return the word for a class or a vocabulary entry; its number if it has no name."""
        if self.classifies:
            return str(self.model.config.id2label.get(target, target))
        if self.tokenizer is None:
            return str(target)
        return str(self.tokenizer.decode([target]).strip() or self.tokenizer.convert_ids_to_tokens(target))

    def target(self, word: str, count: int) -> int:
        """Return the number of a class or a vocabulary entry.

        Args:
            word: Its name or number.
            count: The number of classes, or of vocabulary entries.

        Returns:
            A number from 0 to ``count - 1``.

        Raises:
            InvalidInputError: If no class or token has this name, or the number is out of range.
        """
        if (number := _as_number("target", word, count)) is not None:
            return number
        if self.classifies:
            labels = {str(label): number for number, label in self.model.config.id2label.items()}
            if word not in labels:
                raise InvalidInputError(f"there is no class {word!r}; choose from {', '.join(labels)}.")
            return labels[word]
        return self.token(word)

    def token(self, word: str) -> int:
        """Return the id of the one token that a word consists of.

        Args:
            word: A word, with or without a blank before it in the vocabulary.

        Returns:
            The id.

        Raises:
            InvalidInputError: If the word consists of several tokens, or no tokenizer knows it.
        """
        if self.tokenizer is None:
            raise InvalidInputError(
                f"{word!r} is no number, and there is no tokenizer that knows words; pass a number."
            )
        candidates = [self.tokenizer.encode(form, add_special_tokens=False) for form in (f" {word}", word)]
        single = [ids[0] for ids in candidates if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id]
        if not single:
            pieces = self.tokenizer.convert_ids_to_tokens(candidates[0])
            raise InvalidInputError(f"{word!r} is not one token of this model, but {pieces}; choose one of them.")
        return int(single[0])

    def reference(self, word: str | None) -> int | None:
        """Return the token of which the reference text consists, or None for frozen gates.

        Args:
            word: ``"unk"``, ``"pad"`` or ``"mask"``, ``"none"``, a special token as the tokenizer writes it, a word, or
                an id; None takes the first special token that tokenizer and model have.

        Returns:
            The id of the token, or None.

        Raises:
            InvalidInputError: If the model has no such token.
        """
        count = self.model.get_input_embeddings().weight.shape[0]
        special = {name: getattr(self.tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
        special = {name: token for name, token in special.items() if token is not None and token < count}
        if word is None:
            return next(iter(special.values()), None)
        if word == "none":
            return None
        if word in SPECIAL_TOKENS and word not in special:
            others = ", ".join([*special, "none"])
            raise InvalidInputError(f"the model has no {word} token; choose {others}, a word, or an id.")
        if word in special:
            return special[word]
        if (number := _as_number("reference", word, count)) is not None:
            return number
        if word in getattr(self.tokenizer, "all_special_tokens", ()):
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
        InvalidInputError: If the number does not lie in 0 to ``count - 1``.
    """
    if not re.fullmatch(r"-?[0-9]+", word):
        return None
    if not 0 <= int(word) < count:
        raise InvalidInputError(f"{option} {word} is out of range; the model has {count} (0 to {count - 1}).")
    return int(word)
