"""Find what gradients do not show: code behind ``detach``, ``no_grad`` or numpy that carries values between tokens.

The model runs with other outputs of its mixers at some tokens, in rounds, and then at all that the output does not
read. By its gradients a call reads the token of its own number, or the one that its order says, and the explained
output the tokens that it has a gradient at. If others change it, there is a path without a gradient, which a rollout
would leave out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.network.graph import EMBEDDINGS, ResidualGraph
from captum_ssm.network.held_run import HeldRun, by_example, run_again, tokens_first, tokens_read
from captum_ssm.network.token_codes import token_codes


def refuse_hidden_paths(
    model: nn.Module, run: Callable[[Tensor], Tensor], held: HeldRun, graph: ResidualGraph, of_output: Tensor | None
) -> None:
    """Raise if values come from other tokens than gradients do.

    Args:
        model: The model that holds the mixers.
        run: From inputs to the explained output.
        held: The run with the mixers' outputs held fixed.
        graph: The residual graph, with the order of the tokens in each call.
        of_output: The token of the inputs that each token of an output with tokens is, (B, L); None if all have the
            same number.

    Raises:
        UnsupportedModelError: With the layer that such values reach.

    Cost: about log2(L) + log2(log2(L)) forward passes.
    """
    B, L = held.calls[0].y.shape[:2]
    with torch.enable_grad():
        read = tokens_read(held.calls, held.output)
    of_inputs = graph.in_order_of_inputs(-1, read.any(-1))
    rounds = [marked.expand(B, -1) for marked in token_codes(L).to(read.device).T]
    for marked in (*rounds, ~of_inputs):
        places = [_places(marked, graph.order(number)) for number in range(len(held.calls))]
        outputs = [_changed_at(at, call.y) for at, call in zip(places, held.calls)]
        has_tokens = held.inputs.is_floating_point() and not held.takes_images
        inputs = _changed_at(marked, held.inputs) if has_tokens else held.inputs
        with torch.no_grad():
            calls, output = run_again(model, run, held, inputs, outputs)
        for at, reads, call, original in zip(places, graph.reads, calls, held.calls):
            changed = held.changed(call.x, original.x).any(-1)
            shown = reads if has_tokens else reads - {EMBEDDINGS}  # of what has other values now
            if bool((changed & ~at if shown else changed).any()):
                raise UnsupportedModelError(_reason(f"Layer '{call.name}'"))
        changed = held.changed(output, held.output)
        if held.has_tokens(output):
            reached = tokens_first(changed, L).any(-1) & ~_places(marked, of_output)
        else:
            reached = by_example(changed, B) & of_inputs.any(1) & ~(of_inputs & marked).any(1)
            if bool(reached.any()):
                with torch.enable_grad():
                    calls, output = run_again(model, run, held, inputs, outputs)
                    reached = reached & ~tokens_read(calls, output).ne(read).flatten(1).any(1)
        if bool(reached.any()):
            raise UnsupportedModelError(_reason("The explained output"))


def _places(marked: Tensor, order: Tensor | None) -> Tensor:
    """Return which places hold a marked token of the inputs, both (B, L)."""
    return marked if order is None else marked.gather(1, order)


def _changed_at(places: Tensor, values: Tensor) -> Tensor:
    """Return values (B, L, E) with quite others at some places (B, L)."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(values)
    return torch.where(places.unsqueeze(-1), noise * values.detach().abs().max(), values.detach())


def _reason(name: str) -> str:
    return (
        f"{name} reads values of other tokens than its gradient shows: code behind detach(), no_grad() or numpy, or an "
        "order of the tokens that depends on their values, carries values between tokens, which an explanation would "
        "silently leave out. Let a gradient pass there, sort before the model, or use ImplicitAttentionRelevance, "
        "which follows every function."
    )
