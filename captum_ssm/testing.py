"""The conformance suite: the laws of adapters, for authors of layers that this package does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.layers.call import LayerCall, first_output
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import Chain

__all__ = ["AdapterReport", "check_adapter"]


@dataclass(frozen=True)
class AdapterReport:
    """The errors that :func:`check_adapter` measured.

    Args:
        fidelity: Largest difference between the chain's output and the layer's own, relative to the largest output.
        adjoint: Largest relative difference between ``<u, A x>`` and ``<A^T u, x>``.
        dense: Largest relative difference between the core's matrices times a vector and its product.
        factors: Names of the chain's factors, in the order of the equation.
        channels: D, the number of channels of the recurrence or attention.
    """

    fidelity: float
    adjoint: float
    dense: float
    factors: tuple[str, ...]
    channels: int


def check_adapter(
    mixer: nn.Module,
    x: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-5,
    causal: bool = True,
) -> AdapterReport:
    """Check that the registered adapter of a layer decomposes the layer exactly and holds every law.

    Args:
        mixer: The layer, in evaluation mode. Perturb its parameters first, so that no symmetry of their
            initial values (a bias of 0, a scale of 1) hides a mistake.
        x: (B, L, E) random input, with B and L of at least 2.
        kwargs: Further arguments of the layer's forward, by name; an attention mask, for example.
        tolerance: Allowed relative error of every comparison.
        causal: Whether the layer must not read the future.

    Returns:
        The measured errors.

    Raises:
        AssertionError: If a law does not hold; the message names the law and the error.
        UnsupportedModelError: If no adapter is registered for the layer, or the adapter refuses it.
        FidelityError: If the chain does not reproduce the layer's own output.
        ModelStateError: If the layer's input or output is not finite.
        InvalidInputError: If padding before or within a sequence changes the layer's output.

    Cost:
        O(L²·D·N) and B·D·L² numbers; use a small layer and a short sequence.
    """
    assert x.dim() == 3 and min(x.shape[:2]) >= 2, f"x must be (B, L, E) with B, L >= 2, not {tuple(x.shape)}"
    assert not mixer.training, "put the layer in evaluation mode: mixer.eval()"
    kwargs = dict(kwargs or {})
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    original = x.clone()
    call = _call(mixer, x, kwargs)
    layer = decompose(call, tolerance)
    chain, x = layer.chain, layer.x

    assert torch.equal(original.to(x), x), "the adapter changed the layer's input in place"
    after = mixer.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"the adapter changed the layer's parameters {changed}"

    _check_differentiable(call, x)
    _check_batch(mixer, x, kwargs, chain, tolerance)
    adjoint = _check_adjoint(chain, x, tolerance)
    chain.split()  # says so if nothing mixes tokens
    random = torch.Generator().manual_seed(0)
    cores = [core for summand in _summands(chain) for core in summand.channelwise()]
    values = [
        torch.randn(*x.shape[:2], core.sizes[1] or x.shape[-1], generator=random, device="cpu").to(x) for core in cores
    ]
    matrices = max(_check_core(core, v, tolerance, causal) for core, v in zip(cores, values))
    _check_split(chain, x, tolerance)
    return AdapterReport(layer.error, adjoint, matrices, tuple(chain.factors), values[0].shape[-1])


def _summands(chain: Chain) -> list[Chain]:
    """Return the chain, or the summands of a chain whose core mixes channels."""
    return list(chain.summands().values()) if chain.split()[1].mixes_channels else [chain]


def _call(mixer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> LayerCall:
    with torch.no_grad():
        output = mixer(x, **kwargs)
    y = first_output(output)
    return LayerCall(type(mixer).__name__, mixer, x, y, kwargs)


def _check_differentiable(call: LayerCall, x: Tensor) -> None:
    """Check that gates that depend on the input do so by autograd."""
    adapter = find_adapter(call.mixer)
    assert adapter is not None
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = adapter(call.mixer, leaf, call.kwargs).apply(torch.ones_like(x), bias=True)
        gradient = torch.autograd.grad(y.sum(), leaf, allow_unused=True)[0] if y.requires_grad else None
    if gradient is None:  # a layer may have coefficients that are the same for all inputs
        with torch.no_grad():
            other = adapter(call.mixer, x.flip(-1) + 1, call.kwargs).apply(torch.ones_like(x), bias=True)
        assert torch.equal(y, other), "the chain's gates do not depend on x by autograd: the adapter must not detach"


def _check_batch(mixer: nn.Module, x: Tensor, kwargs: dict[str, Any], chain: Chain, tolerance: float) -> None:
    """Check that the operator of an example does not depend on the other examples of its batch."""
    size = len(x)

    def first(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(first, value))
        return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    first_kwargs = {name: first(value) for name, value in kwargs.items()}
    adapter = find_adapter(mixer)
    assert adapter is not None
    with torch.no_grad():
        error = relative_error(
            adapter(mixer, x[:1], first_kwargs).apply(x[:1], bias=True), chain.apply(x, bias=True)[:1]
        )
    assert error <= tolerance, f"an example decomposed alone differs from the same in a batch by {error:.1e}"


def _check_adjoint(chain: Chain, x: Tensor, tolerance: float) -> float:
    """Check ``<u, A x> = <A^T u, x>`` for the chain; return the error."""
    y = chain.apply(x)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(y)
    left, right = (u * y).sum(), (chain.adjoint(u) * x).sum()
    error = ((left - right).abs() / (u.norm() * y.norm())).item()
    assert error <= tolerance, f"the chain's adjoint is not its transpose; they differ by {error:.1e}"
    return error


def _check_core(core: Chain, v: Tensor, tolerance: float, causal: bool) -> float:
    """Check that matrices, products and channels of the core agree and do not read the future; return the error."""
    y, matrices = core.apply(v), channel_matrices(core, v)
    deviation = relative_error(torch.einsum("bdij,bjd->bid", matrices, v), y)
    assert deviation <= tolerance, f"the core's matrices times its input differ from its product by {deviation:.1e}"
    future = matrices.triu(1).abs().max().item()
    assert not causal or future == 0, f"the core reads the future (entries up to {future:.1e} above the diagonal)"
    half = slice(0, max(1, v.shape[-1] // 2))
    error = relative_error(core.channels(half).apply(v[..., half]), y[..., half])
    assert error <= tolerance, f"channels taken before and after the core differ by {error:.1e}"
    return deviation


def _check_split(chain: Chain, x: Tensor, tolerance: float) -> None:
    """Check that the three parts of the split chain multiply back to it, and that every term can be left out."""
    output, core, into = chain.split()
    product = output.apply(core.apply(into.apply(x, bias=True), bias=True), bias=True)
    error = relative_error(product, chain.apply(x, bias=True))
    assert error <= tolerance, f"the parts of the split chain do not multiply back to it; they miss it by {error:.1e}"
    for term in chain.terms:
        chain.without(term).apply(x, bias=True)
