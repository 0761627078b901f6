"""The selective scan of Mamba, S6, in the form that its layers share: heads of channels with a state for each channel.

The families differ in the layout of their parameters and in the norms of the vectors that are read from the convolved
input. Their adapters say just that, and the functions below build the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.parameters import Parameters, convolution, projection, projections
from captum_ssm.operators import Chain, Diagonal, Operator, Product, Scan

ReadNorm = Callable[[str, Tensor], Tensor]
"""Norm of the vectors that a head reads: delta's low rank ``"dt"`` (B, L, H, R), ``"b"`` and ``"c"`` (B, L, H, N)."""


def selective_layer(
    x: Tensor,
    activation: str,
    weights: Parameters,
    mask: Mapping[str, Operator],
    norm: ReadNorm = lambda _, read: read,
    masks_input: bool = True,
    gated: Callable[[Tensor], Tensor] = F.silu,
) -> Chain:
    """Build the chain of a layer with a selective scan.

    Args:
        x: Input (B, L, E).
        activation: Name of the activation after the convolution.
        weights: Parameters by ``MambaMixer``'s names. Of a layer with heads, ``x_proj.weight`` (H, R + 2N, P) and
            ``dt_proj.weight`` (H, P, R) have them first.
        mask: Factor that sets padding to 0, or an empty dictionary.
        norm: Norm of the vectors that are read from the convolved input.
        masks_input: Whether padding is set to 0 before its projection, or after it, without the projection's bias.
        gated: Activation of the gate.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``, the last two in the
        order that they are applied in.
    """
    D = len(weights["D"])
    into, gate = projections(weights, "in_proj", [D, D])
    reading: dict[str, Operator] = {"in": into, **mask} if masks_input else {**mask, "in": into}
    return Chain(
        {
            "out": projection(weights, "out_proj"),
            "gate": Diagonal(gated(gate.apply(Chain(mask).apply(x), bias=True))),
            **selective_factors(weights, Chain(reading).apply(x, bias=True), activation, mask, norm),
            **reading,
        }
    )


def names_of_direction(end: str, of_the_layer: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the parameters of a further direction, by those of the first one.

    Args:
        end: Ending of the names of its modules, such as ``"_b"``.
        of_the_layer: Those that are parameters of the layer itself.
    """
    tensors = [f"{module}.{tensor}" for module in ("conv1d", "x_proj", "dt_proj") for tensor in ("weight", "bias")]
    return {name: name.replace(".", f"{end}.") for name in tensors} | dict(of_the_layer)


def gated_layer(x: Tensor, weights: Parameters, between: Callable[[Tensor], Mapping[str, Operator]]) -> Chain:
    """Build the chain of a layer whose factors of mixing stand between its projections, under one gate.

    Args:
        x: Input (B, L, E).
        weights: Parameters by ``MambaMixer``'s names.
        between: From the input of the convolution (B, L, D) to these factors.

    Returns:
        Chain of ``out``, ``gate``, these factors, ``in``.
    """
    D = len(weights["D"])
    into, gate = projections(weights, "in_proj", [D, D])
    return Chain(
        {
            "out": projection(weights, "out_proj"),
            "gate": Diagonal(F.silu(gate.apply(x, bias=True))),
            **between(into.apply(x, bias=True)),
            "in": into,
        }
    )


def two_directions(
    weights: Parameters,
    backward: Mapping[str, str],
    value: Tensor,
    activation: str,
    norm: ReadNorm = lambda _, read: read,
) -> dict[str, Operator]:
    """Build the directions of a layer that reads the sequence from both ends.

    Args:
        weights: Parameters of a layer without heads, by ``MambaMixer``'s names; those of the direction from the end
            have names of their own.
        backward: From the names of the first direction's parameters to those of the direction from the end.
        value: Input of the convolutions (B, L, D).
        activation: Name of the activation after the convolutions.
        norm: Norm of the vectors that both directions read from their convolved input.

    Returns:
        ``forward`` and ``backward``, chains of ``scan``, ``act``, ``conv``.
    """
    turned = weights.renamed(backward)
    return {
        "forward": Chain(selective_factors(weights, value, activation, norm=norm)),
        "backward": Chain(selective_factors(turned, value.flip(1), activation, norm=norm)).flipped(),
    }


def selective_factors(
    weights: Parameters,
    value: Tensor,
    activation: str,
    mask: Mapping[str, Operator] = MappingProxyType({}),
    norm: ReadNorm = lambda _, read: read,
) -> dict[str, Operator]:
    """Build the factors between the projections of a layer, for one direction of reading.

    Args:
        weights: Parameters of this direction, laid out as for :func:`selective_layer`.
        value: Input of the convolution (B, L, D).
        activation: Name of the activation after the convolution.
        mask: Factor that sets padding to 0, or an empty dictionary.
        norm: Norm of the vectors that are read from the convolved input.

    Returns:
        ``scan``, ``act`` and ``conv``.
    """
    conv = convolution(weights, "conv1d")
    pre = conv.apply(value, bias=True)
    act = Chain(mask).apply(secant(activation, pre))  # the bias of the convolution leaves entries at padding
    return {"scan": selective_recurrence(weights, act * pre, norm), "act": Diagonal(act), "conv": conv}


def selective_recurrence(weights: Parameters, u: Tensor, norm: ReadNorm = lambda _, read: read) -> Scan:
    """Build the recurrence, which reads its own coefficients from its input.

    Args:
        weights: Parameters of this direction, laid out as for :func:`selective_layer`.
        u: Its input (B, L, D), convolved and activated.
        norm: Norm of the vectors that are read from it.

    Returns:
        The recurrence.
    """
    D, N = weights["A_log"].shape
    reads = _project_heads(weights, "x_proj", u)  # (B, L, H, R + 2N)
    low, b, c = (norm(t, read) for t, read in zip(("dt", "b", "c"), reads.split([reads.shape[-1] - 2 * N, N, N], -1)))
    b, c = (to_heads(read, D) for read in (b, c))  # (B, L, D, N), or (B, L, 1, N) of one head
    delta = F.softplus(_project_heads(weights, "dt_proj", low.flatten(2)).flatten(2))  # (B, L, D)
    rate = -weights["A_log"].mT.contiguous().exp().mT  # (D, N), channels innermost in memory, as in the step
    step, rate = delta.unsqueeze(-1), rate[None, None]  # (B, L, D, 1), (1, 1, D, N)
    return Scan(a=Product((step, rate), exponential=True), b=Product((step, b)), c=c, skip=weights["D"])


def _project_heads(weights: Parameters, name: str, x: Tensor) -> Tensor:
    """Project the channels of each head: by a projection of the layer if there is one head, else by a weight of each.

    Args:
        weights: Parameters of this direction, laid out as for :func:`selective_layer`.
        name: Name of the projection.
        x: (B, L, H·P).

    Returns:
        (B, L, H, rows of the projection).
    """
    if weights.part(name) is None and weights[f"{name}.weight"].dim() == 3:
        w, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        y = torch.einsum("blhp,hrp->blhr", x.unflatten(-1, (len(w), -1)), w)
        return y if bias is None else y + bias.view(len(w), -1)
    return projection(weights, name).apply(x, bias=True).unsqueeze(2)
