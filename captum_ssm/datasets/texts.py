"""Texts, or rows of token ids, made ready for a language model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_ssm.datasets.examples import Batch, as_array
from captum_ssm.datasets.padding import Padding, padded
from captum_ssm.errors import InvalidInputError


@dataclass(frozen=True)
class Tokens:
    """One text as tokens.

    Attributes:
        ids: The number of each token.
        offsets: First character and end of each token in the text; equal for a token that the tokenizer added. Empty
            for a row of ids.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    @property
    def added(self) -> list[int]:
        """Positions of the tokens that the tokenizer added."""
        return [k for k, (start, end) in enumerate(self.offsets) if start == end]


@dataclass(frozen=True)
class Texts:
    """A column of texts, or of ids.

    Attributes:
        column: Its name.
        tokenizer: The tokenizer; None if all rows are ids.
        reference: The id of which a reference text consists; None freezes the gates.
        padding: The side of the padding.
        pad: The id of the padding.
        count: How many ids the model has.
        longest: Largest number of tokens.
        truncate: Cut a longer text off there, rather than refuse it.
        device: Where the model's inputs are.
    """

    column: str
    tokenizer: Any
    reference: int | None
    padding: Padding
    pad: int
    count: int
    longest: int
    truncate: bool
    device: torch.device

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the tokens of each row, or the error that says why there are none.

        Args:
            rows: The columns of each row by name.

        Returns:
            Tokens, or an exception.
        """
        found = [self._checked(row.get(self.column)) for row in rows]
        texts = [k for k, value in enumerate(found) if isinstance(value, str)]
        if texts:
            encoding = self.tokenizer(
                [found[k] for k in texts], return_offsets_mapping=bool(self.tokenizer.is_fast),
                return_special_tokens_mask=True, verbose=False,
            )  # fmt: skip
            for number, k in enumerate(texts):
                found[k] = self._tokens(encoding, number)
        return [self._fitting(tokens) if isinstance(tokens, Tokens) else tokens for tokens in found]

    def key(self, example: Tokens) -> tuple[Hashable, int]:
        """Return the key that the texts of a batch share, their length if they cannot be padded, and the length."""
        L = len(example.ids)
        return (L if self.padding in ("none", "alone") else 0), L

    def batch(self, examples: Sequence[Tokens]) -> Batch:
        """Return several texts as ids, their mask if there is padding, and the ids of their references."""
        ids, mask = padded([example.ids for example in examples], self.pad, self.padding, self.device)
        args = () if bool(mask.all()) else (mask,)
        if self.reference is None:
            return Batch((ids,), args, None)
        replaced = mask.bool()
        for k, example in enumerate(examples):
            shift = ids.shape[1] - len(example.ids) if self.padding == "left" else 0
            replaced[k, [shift + position for position in example.added]] = False
        return Batch((ids,), args, (torch.where(replaced, self.reference, ids),))

    def scores(self, examples: Sequence[Tokens], scores: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the scores of each text's tokens."""
        table = as_array(scores[0])
        lengths = [len(example.ids) for example in examples]
        if self.padding == "left":
            return [row[len(row) - L :].copy() for row, L in zip(table, lengths)]
        return [row[:L].copy() for row, L in zip(table, lengths)]

    def describe(self, example: Tokens | None) -> dict[str, Any]:
        """Return ids, words, and where they stand in the text."""
        ids = [] if example is None else example.ids
        offsets = [] if example is None else example.offsets
        words = map(str, ids) if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(ids)
        return {
            "ids": np.array(ids, dtype=np.int32),
            "tokens": [str(word) for word in words] or np.array([], dtype=str),  # which keeps its type if all are empty
            "starts": np.array([start for start, _ in offsets], dtype=np.int32),
            "ends": np.array([end for _, end in offsets], dtype=np.int32),
        }

    def _checked(self, value: Any) -> str | Tokens | Exception:
        """Return a text that can be cut into tokens, a row of ids, or the error that says why it is neither."""
        if isinstance(value, str):
            if self.tokenizer is None:
                return InvalidInputError("the row is a text, and there is no tokenizer; pass one, or rows of ids.")
            if any("\ud800" <= c <= "\udfff" for c in value):
                return InvalidInputError("the text is not valid Unicode; pass it encoded as UTF-8.")
            return value if value.strip() else InvalidInputError("the text is empty: it has no token to explain.")
        if isinstance(value, (list, tuple, np.ndarray, Tensor)):
            numbers = value.tolist() if isinstance(value, (np.ndarray, Tensor)) else list(value)
            if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
                return Tokens(numbers, []) if numbers else InvalidInputError("the row of ids is empty.")
        if value is None:
            return InvalidInputError(f"the row has no value in the column {self.column!r}.")
        return InvalidInputError(f"the row has a {type(value).__name__} in the place of a text or of ids.")

    def _tokens(self, encoding: Any, number: int) -> Tokens | Exception:
        """Return the tokens of one text of several, or an error if there is none but those that are added."""
        ids = encoding["input_ids"][number]
        if "offset_mapping" in encoding:
            offsets = [(int(start), int(end)) for start, end in encoding["offset_mapping"][number]]
        else:  # which ones are added is known, but not where the others stand
            offsets = [(0, 0) if added else (-1, 0) for added in encoding["special_tokens_mask"][number]]
        if not any(end > start for start, end in offsets):
            return InvalidInputError("the text is empty: it has no token to explain.")
        return Tokens(ids, offsets)

    def _fitting(self, tokens: Tokens) -> Tokens | Exception:
        """Return tokens that the model can take, or the error that says why it cannot."""
        low, high = min(tokens.ids), max(tokens.ids)
        if low < 0 or high >= self.count:
            return InvalidInputError(
                f"token ids must lie in 0 to {self.count - 1}, but the row has {low} to {high}. Does the tokenizer "
                "belong to this model?"
            )
        if len(tokens.ids) <= self.longest:
            return tokens
        if not self.truncate:
            return InvalidInputError(
                f"the row has {len(tokens.ids)} tokens, more than the {self.longest} that the model allows; cut it, or "
                "truncate."
            )
        return self._cut(tokens)

    def _cut(self, tokens: Tokens) -> Tokens:
        """Return the first tokens of a text, and all those that the tokenizer added behind it."""
        behind = len(tokens.offsets) - 1 - max((k for k, (s, e) in enumerate(tokens.offsets) if s < e), default=-1)
        kept = [*range(self.longest - behind), *range(len(tokens.ids) - behind, len(tokens.ids))]
        return Tokens([tokens.ids[k] for k in kept], [tokens.offsets[k] for k in kept] if tokens.offsets else [])
