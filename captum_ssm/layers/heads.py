"""Groups of heads: a group's queries, keys or values repeated for each of the heads that it serves."""

from __future__ import annotations

from torch import Tensor


def to_heads(t: Tensor, H: int) -> Tensor:
    """Repeat groups for the heads that they serve; each group serves consecutive heads.

    Args:
        t: (B, L, G, N).
        H: Number of heads, a multiple of G.

    Returns:
        (B, L, H, N), or ``t`` itself if there is one group, which all heads share.
    """
    groups = t.shape[2]
    return t if groups == 1 else t.repeat_interleave(H // groups, dim=2)


def rows_to_heads(t: Tensor, groups: int, H: int) -> Tensor:
    """Repeat the rows of a parameter, group by group, for the heads that a group serves.

    Args:
        t: Weight or bias (G·P, ...), P consecutive rows for each group.
        groups: Number of groups G.
        H: Number of heads, a multiple of G.

    Returns:
        (H·P, ...).
    """
    return t if groups == H else t.unflatten(0, (groups, -1)).repeat_interleave(H // groups, 0).flatten(0, 1)
