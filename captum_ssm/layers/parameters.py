"""Parameters of a layer, and the factors that are read off them: projections and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from captum_ssm.operators import CausalConv, Projection

Rows = Callable[[Tensor], Tensor]
"""From the rows of a weight or a bias to those that a factor takes: a slice, an order, a repetition."""


def parameters(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Collect the parameters and floating-point buffers of a layer.

    Args:
        mixer: The layer.
        x: A tensor of the wanted type, on the wanted device.

    Returns:
        Tensors by dotted name.
    """
    tensors = [*mixer.named_parameters(), *mixer.named_buffers()]
    return {name: tensor.to(x.device, x.dtype) for name, tensor in tensors if tensor.is_floating_point()}


def projection(weights: Mapping[str, Tensor], name: str, rows: Rows = lambda t: t) -> Projection:
    """Build the projection of a layer that has this name, with its bias if it has one.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        name: Dotted name of the projection in the layer.
        rows: From the rows of weight and bias to those of the factor.

    Returns:
        The projection.
    """
    bias = weights.get(f"{name}.bias")
    return Projection(rows(weights[f"{name}.weight"]), None if bias is None else rows(bias))


def projections(weights: Mapping[str, Tensor], name: str, sizes: Sequence[int], groups: int = 1) -> list[Projection]:
    """Build the projections that a layer keeps in a single one.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        name: Dotted name of the fused projection in the layer.
        sizes: Rows of each projection in a group; they add up to the rows of a group.
        groups: Number of groups of consecutive rows, such as heads, that each hold rows of every projection.

    Returns:
        A projection for each size, its rows in the order of the groups.
    """

    def rows(number: int) -> Rows:
        if groups == 1:
            return lambda t: t.split(sizes)[number]
        return lambda t: t.unflatten(0, (groups, -1)).split(sizes, dim=1)[number].flatten(0, 1)

    return [projection(weights, name, rows(number)) for number in range(len(sizes))]


_SUFFIXES = ("_proj", "_a_proj", "_b_proj", ".0", ".1", ".2")
"""Endings of the names of a projection, or of the two that its matrix is a product of, in the order of application."""


def low_rank(
    weights: Mapping[str, Tensor], prefix: str, x: Tensor, between: Callable[[Tensor], Tensor] = lambda t: t
) -> Tensor:
    """Project ``x`` by a matrix that may be stored as a product of two.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        prefix: Name of the projection without its ending: ``"g"`` of ``g_a_proj`` and ``g_b_proj``, or ``"g_proj"`` of
            ``g_proj.0`` and ``g_proj.1``.
        x: (B, L, E).
        between: Function applied between the two.

    Returns:
        (B, L, rows of the last projection).

    Raises:
        KeyError: If the layer has no projection with this prefix.
    """
    names = [f"{prefix}{end}" for end in _SUFFIXES if f"{prefix}{end}.weight" in weights]
    if not names:
        raise KeyError(prefix)
    *first, last = (projection(weights, name) for name in names)
    for factor in first:
        x = between(factor.apply(x, bias=True))
    return last.apply(x, bias=True)


def convolution(weights: Mapping[str, Tensor], name: str, rows: Rows = lambda t: t) -> CausalConv:
    """Build the depthwise convolution of a layer that has this name, with its bias if it has one.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        name: Dotted name of the convolution in the layer; its weight is (D, 1, K).
        rows: From the channels of weight and bias to those of the factor.

    Returns:
        The convolution.
    """
    bias = weights.get(f"{name}.bias")
    return CausalConv(rows(weights[f"{name}.weight"].squeeze(1)), None if bias is None else rows(bias))
