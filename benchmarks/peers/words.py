"""A tokenizer for models of bare ids: the libraries for language models take texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

_FOLDER = TemporaryDirectory()


def tokenizer(model: Any, unknown: int, end: int, padding: int = 0) -> Any:
    """Return a tokenizer whose words are the ids themselves, written with six digits, so that none is within another.

    Args:
        model: The language model.
        unknown: Id of the unknown token.
        end: Id of the token that begins and ends a text.
        padding: Id of the padding token.

    Returns:
        The tokenizer as it is loaded from a folder, which some libraries ask for.
    """
    return _loaded(model.get_input_embeddings().num_embeddings, unknown, end, padding)


def text(ids: Tensor) -> str:
    """Return ids (L,) as a text."""
    return " ".join(f"{number:06}" for number in ids.tolist())


@cache
def _loaded(size: int, unknown: int, end: int, padding: int) -> Any:
    words = [f"{number:06}" for number in range(size)]
    splitter = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, words[unknown]))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": unknown, "bos_token": end, "eos_token": end, "pad_token": padding}
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=splitter, **{name: words[number] for name, number in names.items()}
    )
    folder = Path(_FOLDER.name) / f"{size}-{unknown}-{end}-{padding}"
    made.save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)
