"""The tokens of a stored row as words: the pieces of one word joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A word of a text.

    Attributes:
        text: The word in lower case; a token without a place in the text by itself.
        score: The sum of the scores of its tokens.
        position: Where it stands, from 0 at the first token of the text to 1 at the last.
    """

    text: str
    score: float
    position: float


def words_of(row: Mapping[str, Any], text: str | None) -> Iterator[Word]:
    """Join the tokens of a row to words.

    Neighbouring tokens are one word if they touch in the text, letter or digit to letter or digit. Tokens that the
    tokenizer added belong to no word.

    Args:
        row: The columns ``tokens``, ``starts``, ``ends`` and ``scores`` of the row.
        text: The text; None for a row of ids, whose tokens are words.

    Yields:
        The words in order.
    """
    tokens, scores, L = row["tokens"], row["scores"], len(row["scores"])
    spans = list(zip(row["starts"], row["ends"]))
    if text is None or not spans or min(start for start, _ in spans) < 0:
        for k, (token, score) in enumerate(zip(tokens, scores)):
            if not spans or spans[k][0] != spans[k][1]:
                yield Word(token, score, k / max(L - 1, 1))
        return
    groups: list[list[int]] = []
    for k, (start, end) in enumerate(spans):
        if start == end:
            continue
        before = spans[groups[-1][-1]][1] if groups else -1
        if start < before or (start == before and text[start - 1].isalnum() and text[start].isalnum()):
            groups[-1].append(k)
        else:
            groups.append([k])
    for group in groups:
        word = text[spans[group[0]][0] : spans[group[-1]][1]].strip().lower()
        yield Word(word, sum(scores[k] for k in group), group[0] / max(L - 1, 1))
