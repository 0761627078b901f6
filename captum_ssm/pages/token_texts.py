"""The characters that each token adds to a text, and short labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

_CHARACTERS = 16  # the longest label
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the characters that each token adds to the text.

    A character of several tokens, such as an emoji in a vocabulary of bytes, belongs to the last of them.

    Args:
        tokenizer: The model's tokenizer.
        ids: The L ids of the text's tokens, special ones included.

    Returns:
        (L,) texts; joined they are the text. Cost: the text is decoded L times, a few tokens at a time.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start, done = 0, 0  # a few tokens before, as some decoders drop the first blank; tokens whose text is known
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:done]), decode(ids[start:end])
        waits = now.endswith(_UNFINISHED) and end < len(ids)
        texts.append("" if waits else now[len(before) :])
        if not waits:
            start, done = done, end
    return texts


def offset_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Return the characters of a text that belong to each token.

    Args:
        text: The text.
        offsets: First character and end of each token, (0, 0) for tokens that the tokenizer added.

    Returns:
        (L,) texts; joined they are the text up to the end of the last token.
    """
    ends = accumulate((end for _, end in offsets), max, initial=0)
    return [text[start:end] for start, end in pairwise(ends)]


def label(token: str) -> str:
    """Return a short printable label of a token.

    Line breaks and other invisible characters are written as Python's escapes, spaces of a token of spaces as visible
    characters, and characters beyond the sixteenth are left out.
    """
    if token.strip(" ") == "":
        token = "␣" * len(token)
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return visible if len(visible) <= _CHARACTERS else visible[: _CHARACTERS - 1] + "…"
