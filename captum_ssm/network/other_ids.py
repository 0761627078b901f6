"""Measure what token ids change: the model runs on the text with other ids, its mixers' outputs held fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_ssm.network.held_run import HeldRun, by_example, run_again, tokens_first, tokens_read
from captum_ssm.network.interface import input_embeddings
from captum_ssm.network.token_codes import token_codes


@dataclass(frozen=True)
class IdReadings:
    """The effect of other ids.

    Args:
        tried: Whether any id was changed.
        calls: For each call the rounds in which its tokens changed, (B, L, rounds).
        output: The rounds in which the explained output changed, (B, rounds).
        output_tokens: The rounds in which the tokens of an output that has tokens changed, (B, L, rounds), else None.
        try_others: From tokens (B, L) to two truth values of each example, (B,): whether other ids there change the
            output, and whether it then reads other tokens than with the inputs' own ids.
    """

    tried: bool
    calls: list[Tensor]
    output: Tensor
    output_tokens: Tensor | None
    try_others: Callable[[Tensor], tuple[Tensor, Tensor]]

    def reach_output_elsewhere(self, read: Tensor) -> bool:
        """Whether ids of other tokens than ``read`` (B, L) change the output past the mixers.

        That other ids are read at another token, such as the last one before the end mark, is no such path.

        Args:
            read: Where the output reads the mixers' outputs, (B, L).

        Returns:
            Whether they do.
        """
        codes = token_codes(read.shape[1]).to(read.device)
        for marked in (torch.ones_like(codes[:, 0]), *codes.T):  # all others, and if that moves the reading, some
            changed, moved = self.try_others(marked & ~read)
            if bool((changed & ~moved).any()):
                return True
            if not bool(moved.any()):
                return False
        return False


def read_ids(model: nn.Module, run: Callable[[Tensor], Tensor], held: HeldRun, mask: Tensor) -> IdReadings:
    """Run the model with other ids at some tokens, in rounds, and record which tokens of which call change.

    Args:
        model: The model that holds the mixers.
        run: From inputs to the explained output.
        held: The run on the inputs' own ids.
        mask: 1 at real tokens and 0 at padding, (B, L); padding keeps its ids.

    Returns:
        The changes.
    """
    others = _other_ids(model, held.inputs, mask)
    texts = [torch.where(marked, others, held.inputs) for marked in token_codes(held.length).to(others.device).T]
    inputs: list[list[Tensor]] = [[] for _ in held.calls]
    output: list[Tensor] = []
    for ids in texts:
        with torch.no_grad():
            calls, result = run_again(model, run, held, ids)
        for rounds, call, original in zip(inputs, calls, held.calls):
            rounds.append(held.changed(call.x, original.x).any(-1))
        output.append(held.changed(result, held.output))
    by_token = [tokens_first(changed, held.length).any(-1) for changed in output if held.has_tokens(changed)]

    def try_others(tokens: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.where(tokens, others, held.inputs)
        with torch.no_grad():
            _, result = run_again(model, run, held, ids)
        changed = by_example(held.changed(result, held.output), len(others))
        if not bool(changed.any()):
            return changed, changed
        with torch.enable_grad():
            calls, result = run_again(model, run, held, ids)
            now, before = tokens_read(calls, result), tokens_read(held.calls, held.output)
        return changed, now.ne(before).flatten(1).any(1)

    return IdReadings(
        bool(others.ne(held.inputs).any()),
        [torch.stack(rounds, -1) for rounds in inputs],
        torch.stack([by_example(changed, len(others)) for changed in output], -1),
        torch.stack(by_token, -1) if by_token else None,
        try_others,
    )


def _other_ids(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return another id for each real token, (B, L): one that the texts have too, if they have several."""
    ids = ids.contiguous()
    known = ids[mask.bool()].unique()
    if len(known) > 1:
        others = known[(torch.searchsorted(known, ids) + 1) % len(known)]
    else:
        others = (ids + 1) % (getattr(input_embeddings(model), "num_embeddings", None) or int(ids.max()) + 1)
    return torch.where(mask.bool(), others, ids)
