"""A text cut into tokens by the tokenizer of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_ssm.pages.token_texts import offset_texts


@dataclass(frozen=True)
class Encoding:
    """A text as tokens.

    Attributes:
        text: The text.
        tokenizer: The tokenizer that cut it.
        ids: (1, L) the number of each token.
        mask: (1, L) 1 at every token: there is no padding.
        offsets: First character and end of each token in the text; equal for a token that the tokenizer added.
    """

    text: str
    tokenizer: Any
    ids: Tensor
    mask: Tensor
    offsets: list[tuple[int, int]]

    @property
    def added(self) -> list[int]:
        """Positions of the tokens that the tokenizer added and that stand nowhere in the text."""
        return [k for k, (start, end) in enumerate(self.offsets) if start == end]

    @property
    def texts(self) -> list[str]:
        """The characters of the text that belong to each token; none to a token that the tokenizer added."""
        return offset_texts(self.text, self.offsets)

    def to_continue(self) -> Encoding:
        """Return the text without the tokens that the tokenizer added behind it, which end a text or ask a question."""
        L = 1 + max(k for k, (start, end) in enumerate(self.offsets) if start < end)
        return replace(self, ids=self.ids[:, :L], mask=self.mask[:, :L], offsets=self.offsets[:L])

    def reference_ids(self, token: int) -> Tensor:
        """Return the ids of a reference text, (1, L): one token everywhere but where the tokenizer added a token."""
        ids = torch.full_like(self.ids, token)
        ids[0, self.added] = self.ids[0, self.added]
        return ids

    def describe_reference(self, token: int | None) -> str:
        """Return the reference of a relevance in words.

        Args:
            token: The token of which the reference text consists; None for frozen gates.

        Returns:
            The token, the added tokens that the reference keeps, and how many tokens of the text equal the reference.
        """
        if token is None:
            return "none: the gates are frozen, and the term of bias belongs to no token"
        name = self.tokenizer.convert_ids_to_tokens(token)
        words = f"{name} (id {token}) in the place of every token of the text"
        if self.added:
            words += f", {', '.join(self._added_names())} kept"
        equal = [k for k in (self.ids[0] == token).nonzero()[:, 0].tolist() if k not in self.added]
        count = len(self.offsets) - len(self.added)
        return words + (f"; {len(equal)} of {count} already {name}, score 0" if equal else "")

    def describe_added(self, scores: Tensor) -> dict[str, str]:
        """Return the scores of the tokens that the tokenizer added, as a fact by name.

        Args:
            scores: (L,) one score for each token.

        Returns:
            One fact under the name "not shown", or none if the tokenizer added no token.
        """
        shares = ", ".join(f"{name} {float(scores[k]):+.2g}" for k, name in zip(self.added, self._added_names()))
        return {"not shown": f"tokens added by the tokenizer: {shares}"} if self.added else {}

    def _added_names(self) -> list[str]:
        names: list[str] = self.tokenizer.convert_ids_to_tokens(self.ids[0, self.added].tolist())
        return names
