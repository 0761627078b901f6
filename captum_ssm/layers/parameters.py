"""Parameters of a layer, and the factors that are read off them: projections and convolutions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

from torch import Tensor, nn

from captum_ssm.layers.measured import MeasuredPart, MeasuredProjection
from captum_ssm.layers.measured import Rows as Rows
from captum_ssm.layers.stand_ins import is_called, is_fine_tuned, is_packed, parts_of
from captum_ssm.operators import CausalConv, Projection


class Parameters(MutableMapping[str, Tensor]):
    """Parameters and floating-point buffers of a layer by dotted name.

    ``"name.weight"`` and ``"name.bias"`` of a part that stands in for a plain weight are measured when they are read,
    by running the part. An entry that is set counts instead of the part.

    Args:
        tensors: The tensors that are there.
        parts: The parts that stand in for plain weights, by their name in the layer.
    """

    def __init__(self, tensors: dict[str, Tensor], parts: Mapping[str, MeasuredPart]) -> None:
        self._tensors, self._parts = tensors, parts

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors and self._parts:
            measured = self._measured(name)
            if measured is None:
                raise KeyError(name)
            return measured
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __contains__(self, name: object) -> bool:
        if name in self._tensors or not self._parts:
            return name in self._tensors
        part, _, kind = str(name).rpartition(".")
        return part in self._parts and (kind == "weight" or (kind == "bias" and self._measured(str(name)) is not None))

    def __iter__(self) -> Iterator[str]:
        own = [f"{part}.{kind}" for part in self._parts for kind in ("weight", "bias")]
        return iter([*self._tensors, *(name for name in own if name not in self._tensors and name in self)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def part(self, name: str) -> MeasuredPart | None:
        """Return the part of this name if it stands in for a plain weight, and no entry was set instead of it."""
        if not self._parts or f"{name}.weight" in self._tensors or f"{name}.bias" in self._tensors:
            return None
        return self._parts.get(name)

    def renamed(self, names: Mapping[str, str]) -> Parameters:
        """Return these parameters with others by some of the names, such as those of another direction of reading.

        Args:
            names: From names to those of the parameters that come instead; without its ``weight`` and ``bias`` a part
                of the layer has no other.
        """
        parts = {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in names.items()}
        tensors = {name: self._tensors[other] for name, other in names.items() if other in self._tensors}
        return Parameters(
            {name: t for name, t in self._tensors.items() if name not in names} | tensors,
            {name: part for name, part in self._parts.items() if name not in parts}
            | {name: self._parts[other] for name, other in parts.items() if other in self._parts},
        )

    def _measured(self, name: str) -> Tensor | None:
        prefix, _, kind = name.rpartition(".")
        part = self._parts.get(prefix)
        if part is None or kind not in ("weight", "bias"):
            return None
        own = getattr(part.module, "weight", None)
        dims = own.dim() if isinstance(own, Tensor) else 2
        if dims == 2:
            return part.matrix if kind == "weight" else part.bias
        if dims == 3:
            return part.taps()[kind == "bias"]
        return _bare(part.module, kind, part)


def parameters(mixer: nn.Module, x: Tensor) -> Parameters:
    """Collect the parameters and floating-point buffers of a layer, as its own code reads them.

    Args:
        mixer: The layer.
        x: A tensor of the wanted type, on the wanted device.

    Returns:
        Tensors by dotted name. Of a part that stands in for a plain weight and is called, ``weight`` and ``bias`` are
        measured when they are read.
    """
    tensors: dict[str, Tensor] = {}
    parts: dict[str, MeasuredPart] = {}
    for prefix, module, is_stand_in in parts_of(mixer):
        if is_stand_in and is_called(prefix):
            parts[prefix] = MeasuredPart(prefix, module, x)
        elif is_stand_in:
            _warn_of_unused(prefix, module, mixer)
            named = {f"{prefix}.{kind}": _bare(module, kind, MeasuredPart(prefix, module, x)) for kind in _KINDS}
            tensors.update({name: tensor for name, tensor in named.items() if tensor is not None})
        else:
            start = f"{prefix}." if prefix else ""
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_floating_point():
                        tensors[start + name] = tensor.to(x.device, x.dtype)
    return Parameters(tensors, parts)


_KINDS = ("weight", "bias")


def _bare(module: nn.Module, kind: str, part: MeasuredPart) -> Tensor | None:
    """Return the ``weight`` or ``bias`` of a part as code reads it that does not call the part."""
    tensor = getattr(module, kind, None)
    if not isinstance(tensor, Tensor):
        return None
    if is_packed(module):
        return part.matrix if kind == "weight" else part.bias
    return part.like(tensor) if tensor.is_floating_point() else None


def _warn_of_unused(name: str, module: nn.Module, mixer: nn.Module) -> None:
    """Warn of the matrices of a fine-tuning that the model never applies."""
    if is_fine_tuned(module):
        warnings.warn(
            f"The fine-tuning adapter on '{name}' of {type(mixer).__name__} has no effect: the model itself never "
            f"applies it, for its code reads the weight of '{name}' and does not call it. It is left out here too.",
            stacklevel=2,
        )


def projection(weights: Mapping[str, Tensor], name: str, rows: Rows | None = None) -> Projection:
    """Build the projection of a layer that has this name, with its bias if it has one.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        name: Dotted name of the projection in the layer.
        rows: From the rows of weight and bias to those of the factor; None for all.

    Returns:
        The projection. If a part of the layer stands in for a plain weight, the projection runs it.
    """
    part = weights.part(name) if isinstance(weights, Parameters) else None
    if part is not None:
        return MeasuredProjection(part, rows)
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if rows is None:
        return Projection(weight, bias)
    return Projection(rows(weight), None if bias is None else rows(bias))


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


def sizes_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return how many channels the projection of this name has at its output and at its input.

    Args:
        weights: Parameters by name, from :func:`parameters`.
        name: Dotted name of the projection in the layer.
    """
    part = weights.part(name) if isinstance(weights, Parameters) else None
    if part is not None:
        return part.sizes
    D, E = weights[f"{name}.weight"].shape
    return D, E


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
