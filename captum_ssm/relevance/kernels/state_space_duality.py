"""The kernels of Mamba-2 in mamba_ssm: the scan with one decay for each head, and the whole layer around it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.norms import inverse_rms
from captum_ssm.operators import Product, Scan
from captum_ssm.relevance.kernels.convolution import causal_conv1d_fn
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.over_heads import over_heads


@kernel("mamba_chunk_scan_combined", "mamba_chunk_scan", "MambaChunkScanCombinedFn", "ssd_selective_scan")
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run the recurrence of Mamba-2.

    Equation::

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = silu(z_t) (<C_t, h_t> + D x_t)

    Args:
        x: Input (B, L, H, P).
        dt: Steps (B, L, H).
        A: Rates (H,).
        B: Weights of the input (B, L, G, N); each group serves consecutive heads.
        C: Weights of the state in the output (B, L, G, N).
        D: Direct path (H,) or (H, P), or None.
        z: Output gate before the activation (B, L, H, P), or None.
        dt_bias: (H,), added to the steps, or None.
        dt_softplus: Whether the steps go through a softplus.
        dt_limit: The smallest and the largest step.

    Returns:
        (B, L, H, P).

    Source:
        mamba_ssm ``ops/triton/ssd_combined.py``; Dao & Gu 2024 (arXiv 2405.21060).
    """
    H, P = x.shape[2:]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    step = (dt if dt_limit == (0.0, math.inf) else dt.clamp(*dt_limit)).unsqueeze(-1)  # (B, L, H, 1)
    scan = Scan(
        a=Product((step, A.view(1, 1, -1, 1)), exponential=True),
        b=Product((step, to_heads(B, H))),
        c=to_heads(C, H),
        skip=None if D is None else D.repeat_interleave(P) if D.dim() == 1 else D.flatten(),
        head_size=P,
    )
    y = over_heads(scan, x)
    return y if z is None else y * F.silu(z)


@kernel("mamba_split_conv1d_scan_combined", "MambaSplitConv1dScanCombinedFn", "mamba_split_conv1d_scan_ref")
def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Run a layer of Mamba-2 from behind its input projection.

    Args:
        zxbcdt: Output of the projection (B, L, 2M + 2D + 2GN + H), M channels of a gated MLP first.
        conv1d_weight: (D + 2GN, K).
        conv1d_bias: (D + 2GN,), or None.
        dt_bias: (H,), or None.
        A: Rates (H,).
        D: Direct path (H,) or (H, P).
        dt_limit: The smallest and the largest step.
        activation: Of the convolution, ``"silu"`` or ``"swish"``, or None.
        rmsnorm_weight: (D,); None for no norm.
        rmsnorm_eps: Added to the mean square.
        outproj_weight: (E, M + D), or None.
        outproj_bias: (E,), or None.
        headdim: P, where D has one number for each head.
        ngroups: Number of groups G, normed separately.
        norm_before_gate: Whether the norm precedes the gate.

    Returns:
        (B, L, E), or (B, L, M + D) without an output projection.
    """
    H, P = len(A), D.shape[1] if D.dim() == 2 else headdim
    inner = H * (P or 0)
    GN = (len(conv1d_weight) - inner) // 2
    M = (zxbcdt.shape[-1] - 2 * inner - 2 * GN - H) // 2
    z0, x0, z, u, dt = zxbcdt.split([M, M, inner, inner + 2 * GN, H], dim=-1)
    u = causal_conv1d_fn(u.mT, conv1d_weight, conv1d_bias, activation).mT
    x, b, c = u.split([inner, GN, GN], dim=-1)
    b, c = (t.unflatten(-1, (ngroups, -1)) for t in (b, c))
    y = chunk_scan(x.unflatten(-1, (H, -1)), dt, A, b, c, D, None, dt_bias, True, dt_limit).flatten(2)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    elif norm_before_gate:
        y = _normed(y, ngroups, rmsnorm_eps) * rmsnorm_weight * F.silu(z)
    else:
        y = _normed(y * F.silu(z), ngroups, rmsnorm_eps) * rmsnorm_weight
    y = torch.cat([F.silu(z0) * x0, y], -1) if M else y
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


def _normed(y: Tensor, groups: int, eps: float) -> Tensor:
    """Scale each group of channels of (B, L, D) to a root mean square of 1."""
    y = y.unflatten(-1, (groups, -1))
    return (y * inverse_rms(y, eps)).flatten(-2)
