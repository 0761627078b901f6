"""The kernels of mLSTM, in mlstm_kernels and in xlstm, with exponential and with sigmoid input gates."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.matrix_memory import matrix_memory
from captum_ssm.operators import Product, Scan
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.over_heads import over_heads


@kernel(
    "mlstm_chunkwise__native_autograd", "mlstm_chunkwise__native_custbw", "mlstm_chunkwise__limit_chunk",
    "mlstm_chunkwise__xl_chunk", "mlstm_recurrent_sequence__native_fw",
    "mlstm_recurrent_sequence__triton_alternate_step_fw", "mlstm_recurrent_sequence__triton_step_fused_fw",
    "wrap_chunkwise__arbitrary_sequence_length", "wrap_chunkwise__arbitrary_sequence_length_with_padding",
    "wrap_chunkwise__pad_zeros",
)  # fmt: skip
def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, eps: float = 1e-6) -> Tensor:
    """Run the matrix memory, see :func:`captum_ssm.layers.matrix_memory.matrix_memory`.

    Args:
        q: Queries (B, H, L, N).
        k: Keys (B, H, L, N).
        v: Values (B, H, L, P).
        i: Input gates, as exponents (B, H, L).
        f: Forget gates before the sigmoid (B, H, L).
        eps: Added to the normaliser.

    Returns:
        (B, H, L, P).

    Source:
        mlstm_kernels ``torch/``; Beck et al. 2024 (arXiv 2405.04517); Beck et al. 2025 (arXiv 2503.13427).
    """
    return _mlstm(q, k, v, i, f, eps, starts_at_zero=True)


@kernel(
    "mlstm_parallel__native_autograd", "mlstm_parallel__native_custbw", "mlstm_parallel__native_stablef_autograd",
    "mlstm_parallel__native_stablef_custbw", "mlstm_parallel__limit_headdim",
)  # fmt: skip
@kernel(
    "parallel_stabilized_simple", queries="q", keys="k", values="v", igate_preact="i", fgate_preact="f",
    ignored="stabilize_rowwise",
)  # fmt: skip
def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, eps: float = 1e-6) -> Tensor:
    """Run :func:`mlstm`, the ``eps`` relative to the largest weight of each row; gates may be (B, H, L, 1)."""
    return _mlstm(q, k, v, i, f, eps, starts_at_zero=False)


@kernel("mlstm_siging_parallel__native_autograd", "mlstm_siging_parallel__native_custbw", ignored="stable_fgate")
@kernel("mlstm_siging_chunkwise__xl_chunk")
def mlstm_sigmoid(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, eps: float = 1e-6, normalize: bool = True
) -> Tensor:
    """Run :func:`mlstm` with input gates that are sigmoids; where ``normalize`` is false, without its normaliser."""
    q, k, v, i, f = _tokens_first(q, k, v, i, f)
    a, b, c = f.sigmoid().unsqueeze(-1), Product((i.sigmoid().unsqueeze(-1), k)), q * q.shape[-1] ** -0.5
    scan = Scan(a=a, b=b, c=c)
    y = over_heads(replace(scan, head_size=v.shape[-1]), v)
    if normalize:
        total = scan.apply(torch.ones_like(i)).abs().clamp(min=1.0) + eps  # (B, L, H)
        y = y / total.unsqueeze(-1)
    return y.transpose(1, 2)


def _mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, eps: float, *, starts_at_zero: bool) -> Tensor:
    """Run the matrix memory on heads that come before the tokens, (B, H, L, P)."""
    q, k, v, i, f = _tokens_first(q, k, v, i, f)
    memory = matrix_memory(q, k, i, F.logsigmoid(f), eps, v.shape[-1], starts_at_zero=starts_at_zero)
    return over_heads(memory, v).transpose(1, 2)


def _tokens_first(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """Exchange tokens and heads of queries, keys, values (B, L, H, N) and gates (B, L, H)."""
    i, f = (t.squeeze(-1) if t.dim() == 4 else t for t in (i, f))
    return tuple(t.transpose(1, 2) for t in (q, k, v, i, f))
