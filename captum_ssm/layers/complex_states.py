"""Complex diagonal recurrences with constant coefficients, S4D, S5 and LRU, in real numbers.

A state that turns, ``z_t = r exp(i theta) z_{t-1} + w_t``, sums its inputs with the weights ``r^(t-s)`` times the
cosine or the sine of ``theta (t - s)``. Each is a real recurrence of two states, as the cosine of a difference is a
product of cosines plus one of sines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators import Chain, Projection, Scan


def complex_states(decay: Tensor, B: Tensor, C: Tensor, skip: Tensor, x: Tensor) -> Chain:
    """Build the chain of a layer with complex states.

    Equation::

        y_t = Re(C z_t) + skip x_t,  z_t = decay z_{t-1} + B x_t

    The real and the imaginary part of ``B x`` are two channels of the scan, which weighs them by the cosine, and two
    further ones, by the sine. The last E channels are the input, which passes by.

    Args:
        decay: (N,), complex.
        B: Weights of the input (N, E), complex.
        C: Weights of the states in the output (E, N), complex.
        skip: Direct path (E,).
        x: Any tensor (B, L, E) of the shape and type of the input.

    Returns:
        Chain of ``out``, ``scan`` with 4N + E channels, ``in``.

    Cost: O(L·N), as the angles are taken for the whole sequence, in float64.

    Source:
        Gu et al. 2022 (arXiv 2206.11893), S4D; Smith et al. 2022 (arXiv 2208.04933), S5, equation 2; Orvieto et al.
        2023 (arXiv 2303.06349), LRU.
    """
    L, E = x.shape[1:]
    turned = torch.cat([-B.imag, B.real])  # i B x: (2N, E)
    into = torch.cat([B.real, B.imag, turned, torch.eye(E, dtype=B.real.dtype, device=B.device)]).to(x)  # (4N + E, E)
    read = torch.cat([C.real, -C.imag] * 2 + [torch.diag(skip)], dim=1).to(x)  # (E, 4N + E)

    angles = torch.arange(L, device=decay.device).unsqueeze(-1) * decay.to(torch.cdouble).angle()  # (L, N)
    cos, sin = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))  # (L, 2N)
    write = torch.stack([cos, sin], -1).repeat(1, 2, 1)  # (L, 4N, 2)
    weigh = torch.cat([torch.stack([cos, sin], -1), torch.stack([sin, -cos], -1)], 1)
    scan = Scan(
        a=F.pad(decay.abs().repeat(4), (0, E)).view(1, 1, -1, 1).to(x),
        b=F.pad(write, (0, 0, 0, E)).unsqueeze(0).to(x),
        c=F.pad(weigh, (0, 0, 0, E)).unsqueeze(0).to(x),
        skip=F.pad(x.new_ones(E), (len(read.T) - E, 0)),
    )
    return Chain({"out": Projection(read), "scan": scan, "in": Projection(into)})


def complex_kernels(decay: Tensor, weights: Tensor, skip: Tensor, x: Tensor) -> Scan:
    """Build the scan of a layer whose channels have complex states of their own, in pairs of conjugates.

    Equation::

        y_t = sum_{s <= t} 2 Re(sum_n weights_n decay_n^(t-s)) x_s + skip x_t

    Args:
        decay: (D, N), complex.
        weights: Of the states in the output (D, N), complex.
        skip: Direct path (D,).
        x: Any tensor (B, L, D) of the shape and type of the input.

    Returns:
        The scan, with 2N states for each channel.
    """
    angles = torch.arange(x.shape[1], device=decay.device).view(-1, 1, 1) * decay.to(torch.cdouble).angle()  # (L, D, N)
    phases = angles + weights.to(torch.cdouble).angle()
    return Scan(
        a=decay.abs().repeat(1, 2)[None, None].to(x),
        b=torch.cat([angles.cos(), angles.sin()], -1)[None].to(x),
        c=(2 * weights.abs().repeat(1, 2) * torch.cat([phases.cos(), phases.sin()], -1))[None].to(x),
        skip=skip.to(x),
    )
