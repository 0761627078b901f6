"""The packages' own functions in layers of one's own: explained by their names and signatures."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionRelevance
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.relevance.kernels import Kernel

B, L, E, H, N, P = 2, 9, 6, 2, 4, 8
D = H * P
REGISTERED = {name: EXTERNAL_CODE[name] for name in EXTERNAL_CODE}


class Layer(nn.Module):
    """A layer of one's own around a function of a package."""

    def __init__(self, call: Callable[["Layer", Tensor], Any], *sizes: int) -> None:
        super().__init__()
        self.call = [call]
        self.read = nn.ModuleList(nn.Linear(E, size) for size in sizes)
        self.log_rate = nn.Parameter(torch.randn(D, N) * 0.3)
        self.direct = nn.Parameter(torch.randn(D))
        self.conv = nn.Conv1d(D, D, 3, groups=D)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Two scores of each example of ``x`` (B, L, E)."""
        y = self.call[0](self, x)
        y = (y if isinstance(y, Tensor) else y[0]).flatten(1).tanh()
        return torch.stack([y[:, ::2].mean(1), y[:, 1::2].square().mean(1)], 1)


def explained(layer: Layer, device: str) -> None:
    """The relevance adds up to what the layer itself gives."""
    generator = torch.Generator().manual_seed(2)
    x, reference = (torch.randn(B, L, E, generator=generator).to(device) for _ in range(2))
    layer = layer.to(device)
    relevance = ImplicitAttentionRelevance(layer).attribute(x, 1, baselines=reference)
    difference = layer(x)[:, 1] - layer(reference)[:, 1]
    error = (relevance.sum((1, 2)) - difference).abs() / (relevance.abs().sum((1, 2)) + difference.abs())
    assert error.max() <= (1e-5 if device == "cpu" else 1e-3)
    assert relevance.abs().max() > 1e-6


def heads(layer: Layer, x: Tensor) -> list[Tensor]:
    return [read(x).unflatten(-1, (H, -1)) for read in layer.read]


# --- mamba_ssm --------------------------------------------------------------------------------------------------------

if find_spec("mamba_ssm") is not None:
    from tests.native import mamba_ssm_cpu

    mamba_ssm_cpu.enable()
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton import ssd_combined


def selective(layer: Layer, x: Tensor, scan: Callable[..., Any]) -> Any:
    u, z, delta, b, c = (read(x).transpose(1, 2) for read in layer.read)
    A = -layer.log_rate.exp()
    return scan(u, delta, A, b, c, layer.direct, z, layer.direct, delta_softplus=True, return_last_state=True)


needs_mamba = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="needs mamba_ssm")


@needs_mamba
@pytest.mark.parametrize("scan", ["imported", "of the module"])
def test_a_selective_scan(scan: str, device: str) -> None:
    if scan == "imported":
        layer = Layer(lambda layer, x: selective(layer, x, selective_scan_fn), D, D, D, N, N)
    else:
        layer = Layer(lambda layer, x: selective(layer, x, selective_scan_interface.selective_scan_fn), D, D, D, N, N)
    explained(layer, device)


def duality(layer: Layer, x: Tensor) -> Any:
    v, dt, b, c = (read(x) for read in layer.read)
    A, b, c = -layer.log_rate[:H, 0].exp(), b.unsqueeze(2), c.unsqueeze(2)
    return ssd_combined.mamba_chunk_scan_combined(
        v.unflatten(-1, (H, P)), dt, A, b, c, chunk_size=4, D=layer.direct[:H], dt_softplus=True, dt_limit=(0.2, 1.5)
    )


def fused(layer: Layer, x: Tensor) -> Any:
    W = layer.conv.weight.squeeze(1)
    return ssd_combined.mamba_split_conv1d_scan_combined(
        layer.read[0](x), torch.cat([W, W[: 2 * N]]), None, layer.direct[:H], -layer.log_rate[:H, 0].exp(),
        D=layer.direct[:H], chunk_size=4, rmsnorm_weight=layer.direct, outproj_weight=layer.log_rate.T, headdim=P,
        norm_before_gate=False,
    )  # fmt: skip


@needs_mamba
def test_the_scans_of_mamba_2(device: str) -> None:
    explained(Layer(duality, D, H, N, N), device)
    explained(Layer(fused, 2 * D + 2 * N + H), device)


# --- flash-linear-attention -------------------------------------------------------------------------------------------

if find_spec("fla") is not None:
    from fla import ops

    from tests.native import fla_cpu


FLA: dict[str, tuple[Callable[[Layer, Tensor], Any], tuple[int, ...]]] = {}


def of_fla(*sizes: int) -> Callable[[Callable[[Layer, Tensor], Any]], Callable[[Layer, Tensor], Any]]:
    def decorate(call: Callable[[Layer, Tensor], Any]) -> Callable[[Layer, Tensor], Any]:
        FLA[call.__name__] = call, sizes
        return call

    return decorate


@of_fla(H * N, H * N, D, H * N)
def chunk_gla(layer: Layer, x: Tensor) -> Any:
    q, k, v, g = heads(layer, x)
    return ops.chunk_gla(q, k, v, F.logsigmoid(g), output_final_state=True)


@of_fla(H * N, H * N, D)
def chunk_retention(layer: Layer, x: Tensor) -> Any:
    q, k, v = heads(layer, x)
    return ops.chunk_retention(q, k, v)


@of_fla(H * N, H * N, D, H)
def chunk_delta_rule(layer: Layer, x: Tensor) -> Any:
    q, k, v, beta = heads(layer, x)
    return ops.chunk_delta_rule(q, k, v, beta.squeeze(-1).sigmoid(), use_qk_l2norm_in_kernel=True)


IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@of_fla(H * N, H * N, D, H, H)
def chunk_gated_delta_rule(layer: Layer, x: Tensor) -> Any:
    q, k, v, g, beta = heads(layer, x)
    rates = {"A_log": layer.log_rate[:H, 0], "dt_bias": layer.direct[:H]}
    return ops.chunk_gated_delta_rule(q, k, v, g.squeeze(-1), beta.squeeze(-1), **rates, **IN_KERNEL)


@of_fla(H * N, H * N, D, H * N, H)
def chunk_kda(layer: Layer, x: Tensor) -> Any:
    q, k, v, g, beta = heads(layer, x)
    rates = {"A_log": layer.log_rate[:H, 0], "dt_bias": layer.log_rate[:H].flatten()}
    return ops.chunk_kda(q, k, v, g, beta.squeeze(-1), **rates, **IN_KERNEL, allow_neg_eigval=True)


@of_fla(H * N, H * N, D, H * N)
def chunk_rwkv6(layer: Layer, x: Tensor) -> Any:
    r, k, v, w = heads(layer, x)
    return ops.chunk_rwkv6(r, k, v, -w.exp(), layer.log_rate[:H], scale=1.0)


@of_fla(H * N, H * N, D, H * N, H * N, H * N)
def chunk_rwkv7(layer: Layer, x: Tensor) -> Any:
    r, k, v, w, kappa, eta = heads(layer, x)
    kappa = F.normalize(kappa, dim=-1)
    return ops.chunk_rwkv7(r=r, w=-0.6 * w.sigmoid(), k=k, v=v, a=-kappa, b=kappa * eta.sigmoid(), scale=1.0)


@pytest.mark.skipif(find_spec("fla") is None, reason="needs fla")
@pytest.mark.parametrize("name", FLA)
def test_an_operator_of_fla(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = getattr(ops, name)
    if device == "cpu":
        monkeypatch.setattr(ops, name, with_signature(fla_cpu.FUNCTIONS[name], kernel))
    call, sizes = FLA[name]
    torch.manual_seed(0)
    explained(Layer(call, *sizes), device)


def with_signature(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, hidden from torch's functions, under the name and the signature of the kernel."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return reference(*args, **kwargs)

    stand_in.__name__, stand_in.__signature__ = kernel.__name__, inspect.signature(kernel)  # type: ignore[attr-defined]
    return stand_in


# --- Signatures -------------------------------------------------------------------------------------------------------


def kernels() -> dict[str, Any]:
    """The functions of the packages whose names have a rule."""
    found: dict[str, Any] = {}
    if find_spec("fla") is not None:
        for name in ("", ".hgrn", ".rwkv4", ".rwkv7"):
            found |= vars(import_module(f"fla.ops{name}"))
    if find_spec("mamba_ssm") is not None:
        found |= vars(selective_scan_interface) | vars(ssd_combined)
    return {name: f for name, f in found.items() if callable(f) and isinstance(REGISTERED.get(name), Kernel)}


def test_the_signatures_of_the_packages_are_those_of_the_rules() -> None:
    assert len(kernels()) > 20
    for name, function in kernels().items():
        code = getattr(function, "apply", function)
        assert REGISTERED[name].of(code) is not None, name
