"""Small models of many kinds, followed function by function: sums, and the order of their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from captum_ssm import ImplicitAttentionRelevance
from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.traced import Traced
from tests.conftest import build

B, L, E = 2, 12, 8


class ConvolutionAndLSTM(nn.Module):
    """A convolution with batch normalization and pooling, and an LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(E, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.lstm = nn.LSTM(16, 6, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 1)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(F.relu(self.norm(self.conv(x.mT)), inplace=True), 2)
        outputs, (h, _) = self.lstm(y.mT)
        return self.head(outputs.mean(1) + torch.cat([h[-2], h[-1]], -1))[:, 0]


class Transformer(nn.Module):
    """torch's own encoder, with padding."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 16, activation="gelu", batch_first=True, norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(E, 1)
        for parameter in self.encoder.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)  # its layers are copies of one

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[1, -3:] = True
        y = self.encoder(
            x, src_key_padding_mask=padding
        )  # torch's fast path, which is not followed, leaves padding out
        return self.head(y.masked_fill(padding[..., None], 0).mean(1))[:, 0]


class Attention(nn.Module):
    """Attention between two sequences, with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(L // 2, L // 2).tril() == 0
        y, weights = self.attention(x[:, : L // 2], x[:, L // 2 :], x[:, L // 2 :].tanh(), attn_mask=mask)
        return y.sin().sum((1, 2)) + weights.square().sum((1, 2))


class DiagonalStateSpace(nn.Module):
    """An S4D layer: a long convolution by Fourier transforms, a GELU and a gated linear unit (arXiv 2206.11893)."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.randn(E, 4, dtype=torch.cdouble))
        self.a = nn.Parameter(torch.complex(-torch.rand(E, 4).double(), 3 * torch.rand(E, 4).double()))
        self.d, self.out = nn.Parameter(torch.randn(E)), nn.Linear(E, 2 * E)

    def forward(self, x: Tensor) -> Tensor:
        u = x.mT
        kernel = 2 * torch.einsum("hn,hnl->hl", self.c, torch.exp(self.a[..., None] * torch.arange(L))).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L), n=2 * L)[..., :L]
        y = F.gelu(y + u * self.d[:, None]).mT
        return (F.glu(self.out(y)) + x).mean(1).square().sum(1)


class Hyena(nn.Module):
    """Long convolutions with filters of the input's own, between gates (arXiv 2302.10866)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.filters = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).chunk(3, -1)
        spectrum = torch.fft.rfft(k * v, 2 * L, dim=1) * torch.fft.rfft(self.filters(x).tanh() / L, 2 * L, dim=1)
        return (q * torch.fft.irfft(spectrum, 2 * L, dim=1)[:, :L]).sum((1, 2))


class LinearRecurrentUnit(nn.Module):
    """A complex state, step by step, with complex gates (arXiv 2303.06349)."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = (nn.Parameter(torch.randn(E, E, dtype=torch.cdouble) / 3) for _ in range(2))
        self.gate = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        h: Any = torch.zeros(B, E, dtype=torch.cdouble)
        outputs = []
        for step, rate in zip(x.unbind(1), self.gate(x).unbind(1)):
            h = torch.polar(torch.sigmoid(rate), rate) * h + step.to(torch.cdouble) @ self.b
            outputs.append((h @ self.c).real + h.abs())
        return torch.stack(outputs, 1).tanh().sum((1, 2))


class UNet(nn.Module):
    """Down by pooling, up by a transposed convolution, and past both (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(16, 2, 1)
        self.norm, self.groups = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8)
        self.up, self.prelu = nn.ConvTranspose2d(8, 8, 4, 2), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        high = F.elu(self.norm(self.first(x)))
        low = self.prelu(self.groups(self.second(F.max_pool2d(high, 2))))
        up = F.interpolate(self.up(low), size=high.shape[-2:], mode="bilinear")
        masks = self.last(torch.cat([high, up], 1)) + F.pixel_shuffle(F.avg_pool2d(x, 2).repeat(1, 2, 1, 1), 2)
        return F.cross_entropy(masks, torch.arange(64).view(1, 8, 8).expand(B, 8, 8) % 2, reduction="none").mean((1, 2))


class Retrieval(nn.Module):
    """The similarity of what a GRU reads to a query, with hard attention beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell, self.query = nn.GRU(E, 6), nn.RNNCell(E, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.gru(x.transpose(0, 1))
        state = self.cell(x[:, -1], last[0].detach())
        similarity = F.cosine_similarity(state + outputs.amax(0), self.query.expand(B, 6))
        return 3 * similarity + outputs.logcumsumexp(0)[-1].sum(1)


TOKENS, PIXELS = (B, L, E), (B, 4, 8, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution and LSTM": (ConvolutionAndLSTM, TOKENS),
    "transformer": (lambda: Transformer(False), TOKENS),
    "transformer, norms first": (lambda: Transformer(True), TOKENS),
    "attention": (Attention, TOKENS),
    "S4D": (DiagonalStateSpace, TOKENS),
    "Hyena": (Hyena, TOKENS),
    "LRU": (LinearRecurrentUnit, TOKENS),
    "U-Net": (UNet, PIXELS),
    "retrieval": (Retrieval, TOKENS),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    create, shape = MODELS[name]
    return create().double().eval(), torch.randn(shape).double(), 0.1 * torch.randn(shape).double()


def relevance(model: nn.Module, x: Tensor, r: Tensor, rule: Any) -> tuple[Tensor, Any]:
    leaf = x.clone().requires_grad_()
    out: Any = model(Traced.of(leaf * 1, r, rule))
    return (x - r) * torch.autograd.grad(out.value.sum(), leaf)[0], out


def integrated_gradients(model: nn.Module, x: Tensor, r: Tensor, steps: int = 100) -> Tensor:
    total = torch.zeros_like(x)
    for k in range(steps):
        at = torch.lerp(r, x, (k + 0.5) / steps).requires_grad_()
        total += torch.autograd.grad(model(at).sum(), at)[0]
    return (x - r) * total / steps


def rank_correlation(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([t.flatten().argsort().argsort().double() for t in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


@every_model
def test_relevance_of_a_model_adds_up(name: str) -> None:
    model, x, r = made(name)
    rule = Difference()
    found, out = relevance(model, x, r, rule)
    with torch.no_grad():
        assert torch.allclose(out.value, model(x), rtol=1e-9)
        if not rule.changed_decisions:
            assert torch.allclose(out.reference, model(r), rtol=1e-9)
    change = out.value - out.reference
    assert (found.flatten(1).sum(1) - change).abs().max() <= 1e-10 * (out.value.abs() + out.reference.abs()).max()


@every_model
@pytest.mark.parametrize("gates", ["half", "value"])
def test_relevance_of_a_model_with_frozen_gates_adds_up(name: str, gates: Any) -> None:
    model, x, _ = made(name)
    found, out = relevance(model, x, torch.zeros_like(x), Frozen(gates))
    change = out.value - out.reference
    assert (found.flatten(1).sum(1) - change).abs().max() <= 1e-10 * (out.value.abs() + out.reference.abs()).max()


@every_model
def test_scores_of_a_model_are_ordered_as_by_integrated_gradients(name: str) -> None:
    model, x, r = made(name)
    found, _ = relevance(model, x, r, Difference())
    assert rank_correlation(found, integrated_gradients(model, x, r)) > 0.8


@every_model
def test_a_model_in_float32_is_about_that_in_float64(name: str) -> None:
    if "cdouble" in str({p.dtype for p in MODELS[name][0]().parameters()}):
        pytest.skip("a model of complex128")
    model, x, r = made(name)
    wide, _ = relevance(model, x.float().double(), r.float().double(), Difference())
    narrow, _ = relevance(model.float(), x.float(), r.float(), Difference())
    assert (narrow - wide).abs().max() <= 1e-4 * wide.abs().max()


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(E, 5, 2, bidirectional=True), (L, B, E)),
    "LSTM with projections": (lambda: nn.LSTM(E, 5, 2, bias=False, proj_size=3, bidirectional=True), (L, B, E)),
    "LSTM of one sequence": (lambda: nn.LSTM(E, 5, batch_first=True), (L, E)),
    "GRU": (lambda: nn.GRU(E, 5, 3, batch_first=True, bias=False), (B, L, E)),
    "GRU of one sequence": (lambda: nn.GRU(E, 5, bidirectional=True), (L, E)),
    "RNN": (lambda: nn.RNN(E, 5, 2, nonlinearity="relu", bidirectional=True), (L, B, E)),
    "LSTMCell": (lambda: nn.LSTMCell(E, 5, bias=False), (B, E)),
    "GRUCell of one": (lambda: nn.GRUCell(E, 5), (E,)),
    "RNNCell": (lambda: nn.RNNCell(E, 5), (B, E)),
    "TransformerDecoderLayer": (lambda: Twice(nn.TransformerDecoderLayer(E, 2, 16, batch_first=True)), (B, L, E)),
    "Transformer": (lambda: Twice(nn.Transformer(E, 2, 1, 1, 16, batch_first=True)), (B, L, E)),
    "BatchNorm2d without weights": (lambda: nn.BatchNorm2d(4, affine=False), (B, 4, 3, 3)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), (B, 4, 3, 3)),
    "Softmax2d": (nn.Softmax2d, (B, 4, 3, 3)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (B, 4, 4, 4)),
    "Fold": (lambda: nn.Fold((4, 4), 2, stride=2), (B, 16, 4)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (B, 4, 3, 3)),
    "AdaptiveLogSoftmax": (lambda: LogProbabilities(nn.AdaptiveLogSoftmaxWithLoss(E, 9, [3, 6])), (B, E)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(E, 3)), (B, E)),
}


class Twice(nn.Module):
    """A module of two sequences, of one and its tanh."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x.tanh())


class LogProbabilities(nn.Module):
    """The log-probabilities of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.log_prob(x)  # type: ignore[operator]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rule", [Difference, Frozen])
def test_a_module_of_torch_is_followed(name: str, rule: Any) -> None:
    create, shape = MODULES[name]
    module = create().double().eval()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    x, r = torch.randn(shape).double(), torch.randn(shape).double()
    r = r if rule is Difference else torch.zeros_like(r)
    leaf = x.clone().requires_grad_()
    results = [t for t in tree_leaves(module(Traced.of(leaf * 1, r, rule()))) if isinstance(t, Tensor)]
    expected, at_reference = (tree_leaves(module(t)) for t in (x, r))
    assert len(results) == len(expected)
    for result, value, reference in zip(results, expected, at_reference):
        if not isinstance(result, Traced):
            assert rule is Frozen and torch.equal(result, value)  # a gate
            continue
        traced: Any = result
        assert (traced.value - value).abs().max() <= 1e-9
        assert rule is Frozen or (traced.reference - reference).abs().max() <= 1e-9
        weights = torch.randn_like(value)
        (multiplier,) = torch.autograd.grad((traced.value * weights).sum(), leaf, retain_graph=True)
        change = ((traced.value - traced.reference) * weights).sum()
        assert (((x - r) * multiplier).sum() - change).abs() <= 1e-9 * (value.abs().sum() + reference.abs().sum())


class MambaThenLSTM(nn.Module):
    """What an LSTM reads of a Mamba, by a pooling and Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.mamba = build("mamba")
        width = self.mamba.config.hidden_size
        self.lstm = nn.LSTM(width, 5, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.mamba.backbone(ids).last_hidden_state
        mixed = torch.fft.irfft(torch.fft.rfft(hidden, dim=1) * (0.5 + 0.5j), hidden.shape[1], dim=1)
        outputs, _ = self.lstm(F.max_pool1d(mixed.mT, 2, 1).mT)
        return F.huber_loss(outputs.sum((1, 2)), torch.ones(len(ids)), reduction="none")


@pytest.mark.parametrize("baselines", [0.0, None, 3])
def test_layers_of_all_kinds_may_stand_after_a_mixer(baselines: Any, ids: Tensor) -> None:
    model = MambaThenLSTM().eval()
    method = ImplicitAttentionRelevance(model)
    scores, delta = method.attribute(ids, baselines=baselines, return_convergence_delta=True)
    assert scores.shape == ids.shape and scores.abs().sum() > 0
    assert (delta.abs() <= 1e-5 * (model(ids).abs() + scores.abs().sum(1))).all()
