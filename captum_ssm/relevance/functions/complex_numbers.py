"""Functions of complex numbers, written in functions of their real and imaginary parts.

A complex tensor is traced as it is. A function that is linear, or linear in each of two tensors, has the rule of real
numbers, and a multiplier m of ``z - z'`` gives the relevance ``Re(conj(m) (z - z'))``, as gradients of torch are
defined. Any other function goes by its parts: of a function of the plane a quotient of differences says too little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.table import composed


def modulus(z: Tensor) -> Tensor:
    """Return the absolute value."""
    return squared_modulus(z).sqrt()


def squared_modulus(z: Tensor) -> Tensor:
    """Return the square of the absolute value."""
    return z.real.square() + z.imag.square()


def square(z: Tensor) -> Tensor:
    """Return ``z z``."""
    return z * z


def complex_power(z: Tensor, exponent: Any) -> Tensor:
    """Return ``z`` to a power: as a product if it is a positive whole number, else ``exp(exponent log(z))``."""
    if not isinstance(exponent, (int, float)) or exponent < 1 or exponent != int(exponent):
        return exponential(logarithm(z) * exponent)
    result = z
    for _ in range(int(exponent) - 1):
        result = result * z
    return result


def square_root(z: Tensor) -> Tensor:
    """Return the root whose real part is positive."""
    return complex_power(z, 0.5)


def inverse(z: Tensor) -> Tensor:
    """Return ``conj(z) / |z|²``."""
    return z.conj() * torch.reciprocal(squared_modulus(z))


def exponential(z: Tensor) -> Tensor:
    """Return ``exp(x) (cos(y) + i sin(y))``."""
    return _polar(z.real.exp(), z.imag)


def logarithm(z: Tensor) -> Tensor:
    """Return ``log|z| + i angle(z)``."""
    return torch.complex(squared_modulus(z).log() / 2, _angle(z))


@composed("polar")
def _polar(abs: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(abs * torch.cos(angle), abs * torch.sin(angle))


composed("view_as_complex_copy")(torch.view_as_complex)  # the copy has no derivative


@composed("angle")
def _angle(input: Tensor) -> Tensor:
    if not input.is_complex():
        return torch.atan2(torch.zeros_like(input), input)
    return torch.atan2(input.imag, input.real)


@composed("sgn")
def _sgn(input: Tensor) -> Tensor:
    return input / modulus(input) if input.is_complex() else input.sign()


@composed("atan2", aliases=("arctan2",))
def _atan2(input: Tensor, other: Tensor) -> Tensor:
    """Take the half angle, whose tangent is ``y / (r + |x|)``, and turn it where x is negative."""
    half = torch.atan(input / (torch.hypot(input, other) + other.abs()))
    right, up = torch.heaviside(other, _one(other)), torch.heaviside(input, _one(input))
    return (4 * right - 2) * half + torch.pi * (1 - right) * (2 * up - 1)


@composed("hypot")
def _hypot(input: Tensor, other: Tensor) -> Tensor:
    return (input.square() + other.square()).sqrt()


@composed("copysign")
def _copysign(input: Tensor, other: Any) -> Tensor:
    other = other if isinstance(other, Tensor) else torch.full_like(input, other)
    return input.abs() * (2 * torch.heaviside(other, _one(other)) - 1)


def _one(like: Tensor) -> Tensor:
    """Return the value of a step at 0, where it is up."""
    return torch.ones((), dtype=like.dtype, device=like.device)
