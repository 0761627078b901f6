"""A transformers model with its tokenizer, and a text in its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from captum_ssm import models
from captum_ssm.cli.encoding import Encoding
from captum_ssm.cli.loading import Placement, load
from captum_ssm.cli.problems import CommandError
from captum_ssm.datasets.outcomes import Outcomes
from captum_ssm.network.hosts import inside


@dataclass(frozen=True)
class TextModel(Outcomes):
    """A transformers model with its tokenizer, and the words for its predictions.

    Attributes:
        model: A causal language model, or a classifier; with an adapter, PEFT's host around it.
        tokenizer: Its fast tokenizer.
        source: Where the model comes from, in words.
    """

    source: str = ""

    @classmethod
    def load(cls, source: str, placement: Placement) -> TextModel:
        """Load a model and its tokenizer.

        Args:
            source: A folder, also of a PEFT adapter, or a name on the hub.
            placement: How the model is stored, and where.

        Returns:
            The model in evaluation mode with its tokenizer.

        Raises:
            CommandError: If a package is missing, the model cannot be loaded, or its tokenizer is not a fast one.
        """
        model, tokenizer = load(source, placement)
        name = "the shipped movie-review Mamba" if source == str(models.REVIEWS) else source
        return cls(model, tokenizer, f"{name}, {type(inside(model)).__name__}")

    @property
    def device(self) -> torch.device:
        """The device that the model's inputs are on: that of its first parameter with values."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

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
        ids, mask = (encoding[name].to(self.device) for name in ("input_ids", "attention_mask"))
        return Encoding(text, self.tokenizer, ids, mask, offsets)
