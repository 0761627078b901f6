"""The selective scan of Mamba, of mamba_ssm and its many forks, and the kernels that fuse a whole layer with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.norms import rms_norm
from captum_ssm.operators import Product, Scan
from captum_ssm.relevance.kernels.convolution import causal_conv1d_fn
from captum_ssm.relevance.kernels.kernel import kernel


@kernel(
    "selective_scan_fn", "selective_scan_ref", "SelectiveScanFn", "SelectiveScan", "SelectiveScanCore",
    "SelectiveScanOflex", "SelectiveScanCuda", "SelectiveScanMamba", "SelectiveScanEasy",
)  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run the selective scan.

    Equation::

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = silu(z_t) (<C_t, h_t> + D u_t)

    Args:
        u: Input (B, D, L).
        delta: Steps (B, D, L).
        A: Rates (D, N).
        B: Weights of the input (D, N), (B, N, L), or (B, G, N, L) with a group for D / G consecutive channels.
        C: Weights of the state in the output, of a shape that B may have.
        D: Direct path (D,), or None.
        z: Output gate before the activation (B, D, L), or None.
        delta_bias: (D,), added to the steps, or None.
        delta_softplus: Whether the steps go through a softplus.

    Returns:
        (B, D, L).

    Raises:
        UnsupportedModelError: If the states are complex numbers.

    Source:
        mamba_ssm ``ops/selective_scan_interface.py``; Gu & Dao 2023 (arXiv 2312.00752).
    """
    if A.is_complex():
        raise UnsupportedModelError("A selective scan with complex states has no rule of relevance.")
    delta = delta if delta_bias is None else delta + delta_bias.unsqueeze(-1)
    step = (F.softplus(delta) if delta_softplus else delta).mT.unsqueeze(-1)  # (B, L, D, 1)
    scan = Scan(
        a=Product((step, A[None, None]), exponential=True),
        b=Product((step, _by_token(B, len(A)))),
        c=_by_token(C, len(A)),
        skip=D,
    )
    y = scan.apply(u.mT).mT
    return y if z is None else y * F.silu(z)


@kernel("mamba_inner_fn", "MambaInnerFn")
def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a layer of Mamba from behind its input projection; see :func:`mamba_inner_without_projection`.

    Returns:
        (B, L, E).
    """
    y = mamba_inner_without_projection(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


@kernel("mamba_inner_fn_no_out_proj", "MambaInnerFnNoOutProj")
def mamba_inner_without_projection(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a layer of Mamba between its projections: the convolution, its readings, the selective scan and the gate.

    Args:
        xz: Input and gate (B, 2D, L).
        conv1d_weight: (D, 1, K).
        conv1d_bias: (D,), or None.
        x_proj_weight: (R + 2N, D).
        delta_proj_weight: (D, R).
        A: Rates (D, N).
        B: As for :func:`selective_scan`; None if it is read from the input.
        C: As for :func:`selective_scan`; None if it is read from the input.
        D: Direct path (D,), or None.
        delta_bias: (D,), or None.
        B_proj_bias: (N,), or None.
        C_proj_bias: (N,), or None.
        delta_softplus: Whether the steps go through a softplus.
        b_rms_weight: Weight of a norm of B, or None.
        c_rms_weight: Weight of a norm of C, or None.
        dt_rms_weight: Weight of a norm of the steps, or None.
        b_c_dt_rms_eps: Added to the mean squares of these norms.

    Returns:
        (B, D, L).
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    R, N = delta_proj_weight.shape[1], A.shape[-1]
    low, b, c = F.linear(x.mT, x_proj_weight).split([R, N, N], dim=-1)

    def read(t: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        t = t if bias is None else t + bias
        return (t if norm is None else rms_norm(t, b_c_dt_rms_eps, norm)).mT

    delta = read(F.linear(low, delta_proj_weight), None, dt_rms_weight)
    b = read(b, B_proj_bias, b_rms_weight) if B is None else B
    c = read(c, C_proj_bias, c_rms_weight) if C is None else C
    return selective_scan(x, delta, A, b, c, D, z, delta_bias, delta_softplus)


def _by_token(t: Tensor, D: int) -> Tensor:
    """Arrange the weights of the states as a coefficient (B, L, D, N), with 1 where an axis is shared."""
    if t.dim() == 2:
        return t[None, None]
    return t.mT.unsqueeze(2) if t.dim() == 3 else to_heads(t.permute(0, 3, 1, 2), D)
