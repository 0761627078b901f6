"""Run mamba_ssm without a GPU: tensors on a CPU go to the package's own references, those on a GPU to its kernels.

Its layers call kernels that need CUDA. Next to most of them the package keeps a reference in torch, which is what the
kernels are tested against. :func:`enable` puts in the place of each kernel a function of the same signature that
chooses by where the tensors are.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNLIMITED = (0.0, float("inf"))


def enable() -> None:
    """Make mamba_ssm importable and usable on a CPU, in this process."""
    extension = "selective_scan_cuda"  # which the package imports without asking whether it was built
    if extension not in sys.modules and importlib.util.find_spec(extension) is None:
        sys.modules[extension] = types.ModuleType(extension)
    for name in ("ops.selective_scan_interface", "models.mixer_seq_simple", "modules.mamba2_simple", "modules.mamba3"):
        importlib.import_module(f"mamba_ssm.{name}")
    for home, name, reference in (
        ("selective_scan_interface", "selective_scan_fn", selective_scan),
        ("triton.layer_norm", "layer_norm_fn", layer_norm),
        ("triton.layer_norm", "rms_norm_fn", functools.partial(layer_norm, is_rms_norm=True)),
        ("triton.layernorm_gated", "rmsnorm_fn", gated_norm),
        ("triton.ssd_combined", "mamba_chunk_scan_combined", chunk_scan),
        ("triton.ssd_combined", "mamba_split_conv1d_scan_combined", split_conv_scan),
        ("triton.mamba3.mamba3_siso_combined", "mamba3_siso_combined", mamba3_siso),
    ):
        kernel = getattr(importlib.import_module(f"mamba_ssm.ops.{home}"), name)
        if not hasattr(kernel, "__wrapped__"):
            _replace(name, kernel, _by_device(kernel, reference))


def _by_device(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel for tensors on a GPU and the reference for others; transformers reads the signature."""

    @functools.wraps(kernel)
    def choose(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        if first.is_cuda:
            return kernel(*args, **kwargs)
        known = inspect.signature(reference).parameters
        given = inspect.signature(kernel).bind(*args, **kwargs).arguments
        defaults = inspect.signature(kernel).parameters
        ignored = [name for name, value in given.items() if name not in known and value is not defaults[name].default]
        assert not set(ignored) - {"chunk_size", "residual_in_fp32"}, f"not covered by the reference: {ignored}"
        return reference(**{name: value for name, value in given.items() if name in known})

    return choose


def _replace(name: str, old: Any, new: Any) -> None:
    for module in [m for key, m in sys.modules.items() if key.split(".")[0] == "mamba_ssm"]:
        if vars(module).get(name) is old:
            setattr(module, name, new)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Any, residual: Any = None, eps: float = 1e-6, prenorm: bool = False,
    is_rms_norm: bool = False,
) -> Any:  # fmt: skip
    from mamba_ssm.ops.triton.layer_norm import layer_norm_ref, rms_norm_ref

    reference = rms_norm_ref if is_rms_norm else layer_norm_ref
    return reference(x, weight, bias, residual, eps=eps, prenorm=prenorm)


def gated_norm(
    x: Tensor, weight: Tensor, bias: Any, z: Any = None, eps: float = 1e-6, group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref

    return rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = UNLIMITED,
) -> Tensor:  # fmt: skip
    from mamba_ssm.ops.triton.ssd_combined import ssd_selective_scan

    return ssd_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


def split_conv_scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Any, dt_bias: Tensor, A: Tensor, D: Tensor,
    dt_limit: tuple[float, float] = UNLIMITED, activation: str = "silu", rmsnorm_weight: Any = None,
    rmsnorm_eps: float = 1e-6, outproj_weight: Any = None, outproj_bias: Any = None, headdim: Any = None,
    ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """The fused layer, of its parts' references.

    The package's own reference of the whole leaves out the groups of the norm and the channels of the gated MLP, both
    of which the kernel has.
    """
    H = len(A)
    P = D.shape[1] if D.dim() == 2 else headdim
    GN = (len(conv1d_weight) - H * P) // 2
    M = (zxbcdt.shape[-1] - 2 * H * P - 2 * GN - H) // 2
    z0, x0, z, xbc, dt = zxbcdt.split([M, M, H * P, H * P + 2 * GN, H], dim=-1)
    K = conv1d_weight.shape[1]
    padded = F.pad(xbc.transpose(1, 2), (K - 1, 0))
    xbc = F.silu(F.conv1d(padded, conv1d_weight.unsqueeze(1), conv1d_bias, groups=len(conv1d_weight))).transpose(1, 2)
    x, b, c = xbc.split([H * P, GN, GN], dim=-1)
    x, heads = x.unflatten(-1, (H, P)), z.unflatten(-1, (H, P))
    b, c = (t.unflatten(-1, (ngroups, -1)) for t in (b, c))
    gate = heads if rmsnorm_weight is None else None
    y = chunk_scan(x, dt, A, b, c, D, gate, dt_bias, True, dt_limit).flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_norm(y, rmsnorm_weight, None, z, rmsnorm_eps, H * P // ngroups, norm_before_gate)
    return F.linear(torch.cat([F.silu(z0) * x0, y], -1), outproj_weight, outproj_bias)


def mamba3_siso(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
    Angles: Tensor, D: Any = None, Z: Any = None,
) -> Tensor:  # fmt: skip
    """Mamba-3's recurrence, token by token: the package keeps no reference of it."""
    B, L, H, P = V.shape
    N = Q.shape[-1]
    q, k = (t.repeat_interleave(H // t.shape[2], 2) + bias for t, bias in ((Q, Q_bias), (K, K_bias)))
    angle = V.new_zeros(B, H, Angles.shape[-1])
    state, written = V.new_zeros(B, H, N, P), V.new_zeros(B, H, N, P)
    outputs = []
    for t in range(L):
        dt, trap = DT[:, :, t, None, None], Trap[:, :, t, None, None].sigmoid()
        angle = angle + torch.pi * Angles[:, t].tanh() * DT[:, :, t, None]
        query, key = (_turned(v[:, t], angle) for v in (q, k))
        before, written = written, key.unsqueeze(-1) * V[:, t].unsqueeze(-2)
        decay = ADT[:, :, t, None, None].exp()
        state = decay * state + decay * dt * (1 - trap) * before + dt * trap * written
        outputs.append((query.unsqueeze(-1) * state).sum(-2))
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D[:, None] * V
    return y if Z is None else y * F.silu(Z)


def _turned(v: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs of neighbouring entries, as many as there are angles, as complex numbers."""
    pairs = torch.view_as_complex(v[..., : 2 * angle.shape[-1]].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat([turned, v[..., 2 * angle.shape[-1] :]], -1)
