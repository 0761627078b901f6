"""Codes of tokens: which token reads which, from few observations instead of one for each token.

In round r all tokens whose code has bit r are marked at once. The codes are different and all have the same number of
bits, so none contains another: of any two tokens there is a round that marks the first and not the second. The rounds
in which a token is reached then spell the code of the one token that it is connected with. Codes of several tokens,
laid over each other, have more bits than any code.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, count, islice
from math import comb

import torch
from torch import Tensor

NONE, SEVERAL = -1, -2
"""Instead of a token's number: it is connected with no token, or with more than one."""


@lru_cache(maxsize=16)
def token_codes(length: int) -> Tensor:
    """Return the code of every token, (L, rounds), True where the token is marked in the round.

    Args:
        length: L.
    """
    rounds = next(rounds for rounds in count() if comb(rounds, rounds // 2) >= length)
    codes = torch.zeros(length, rounds, dtype=torch.bool, device="cpu")
    for token, bits in enumerate(islice(combinations(range(rounds), rounds // 2), length)):
        codes[token, list(bits)] = True
    return codes


def decoded(observed: Tensor, length: int) -> Tensor:
    """Return the number of the token that each place is connected with.

    Args:
        observed: (B, P, rounds), True where a place was reached in the round; places are tokens, or entries of inputs.
        length: L, how many tokens there are.

    Returns:
        (B, P): a number, :data:`NONE` or :data:`SEVERAL`.
    """
    powers = 2 ** torch.arange(observed.shape[-1], device=observed.device)
    codes, numbers = (token_codes(length).to(observed.device) * powers).sum(-1).sort()
    found = (observed * powers).sum(-1)  # (B, P)
    place = torch.searchsorted(codes, found).clamp_max(length - 1)
    number = torch.where(codes[place] == found, numbers[place], SEVERAL)
    return number.masked_fill(~observed.any(-1), NONE)


def sources(readers: Tensor, places: Tensor, length: int) -> Tensor:
    """Turn the reader of each place into the place that each reader reads.

    Args:
        readers: (B, P), the token that reads the place, :data:`NONE` or :data:`SEVERAL`.
        places: (B, P), the number of the token that the place belongs to.
        length: L, how many readers there are.

    Returns:
        (B, L): for each reader the number of the token, :data:`NONE` or :data:`SEVERAL`.
    """
    if bool(readers.eq(SEVERAL).any() | places.eq(SEVERAL).any()):
        return torch.full_like(readers[:, :1], SEVERAL).expand(-1, length)
    read = torch.where((readers >= 0) & (places >= 0), readers, length)  # the last column is dropped
    numbers = torch.full((len(readers), length + 1), NONE, device=readers.device)
    low = numbers.scatter_reduce(1, read, places, "amin", include_self=False)[:, :length]
    high = numbers.scatter_reduce(1, read, places, "amax", include_self=False)[:, :length]
    return torch.where(low == high, low, SEVERAL)


def reaches_itself_alone(observed: Tensor) -> bool:
    """Whether each token was reached in rounds of its own code alone; ``observed`` is (B, L, rounds)."""
    codes = token_codes(observed.shape[1]).to(observed.device)
    return not bool((observed & ~codes).any())
