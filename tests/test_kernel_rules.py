"""Kernels by name: each is followed as the loop that it stands for, wherever a model finds it, or refused."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan as torch_scan
from torch.utils._pytree import tree_leaves

from captum_ssm import (
    FidelityError,
    ImplicitAttentionRelevance,
    UnsupportedModelError,
    register_rule,
    unregister_rule,
)
from captum_ssm.relevance.called_code import called_code
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.relevance.kernels import Kernel
from tests import stand_in_kernels as loops
from tests.stand_in_kernels import AUTOGRAD, FUNCTIONS, autograd_function, hidden

B, L, E, H, N, P = 2, 7, 6, 2, 3, 4
D = H * P
LOOPS = FUNCTIONS | AUTOGRAD
NAMES = sorted(LOOPS)
Call = Callable[["Read"], dict[str, Any]]


class Read:
    """Tensors that a layer reads from its input (B, L, E) with random weights, each the same in every call."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A projection of the input, (B, L, *shape)."""
        size = int(torch.tensor(shape).prod())
        return (self.x @ self.constant(name, E, size) * 0.5).unflatten(-1, shape)

    def constant(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.x.dtype)

    def rate(self, name: str, *shape: int) -> Tensor:
        return -self.constant(name, *shape).exp()

    def log_decay(self, name: str, *shape: int) -> Tensor:
        return F.logsigmoid(self(name, *shape) + 1)


def scan(t: Read, **options: Any) -> dict[str, Any]:
    delta = t("delta", D).transpose(1, 2)
    if not options.get("delta_softplus"):
        delta = F.softplus(delta)
    b, c = (t(name, N).transpose(1, 2) for name in "bc")
    return {"u": t("u", D).transpose(1, 2), "delta": delta, "A": t.rate("A", D, N), "B": b, "C": c, **options}


def grouped_scan(t: Read) -> dict[str, Any]:
    b, c = (t(name, 2, N).permute(0, 2, 3, 1) for name in "bc")
    return scan(t) | {"B": b, "C": c, "D": t.constant("D", D)}


def full_scan(t: Read) -> dict[str, Any]:
    z = t("z", D).transpose(1, 2)
    return scan(t, D=t.constant("D", D), z=z, delta_bias=t.constant("bias", D), delta_softplus=True)


def forked_scan(t: Read) -> dict[str, Any]:
    return scan(t, D=t.constant("D", D), delta_bias=t.constant("bias", D), delta_softplus=True, oflex=False)


def layer(t: Read, projects: bool = True, **options: Any) -> dict[str, Any]:
    R = 2
    weights = {
        "conv1d_weight": t.constant("conv", D, 1, 3), "conv1d_bias": t.constant("conv bias", D),
        "x_proj_weight": t.constant("read", R + 2 * N, D), "delta_proj_weight": t.constant("step", D, R),
    }  # fmt: skip
    if projects:
        weights |= {"out_proj_weight": t.constant("out", E, D), "out_proj_bias": t.constant("out bias", E)}
    given = {"A": t.rate("A", D, N), "D": t.constant("D", D), "delta_bias": t.constant("bias", D)}
    return {"xz": t("xz", 2 * D).transpose(1, 2), **weights, **given, "delta_softplus": True, **options}


def ssd(t: Read, G: int = 1, **options: Any) -> dict[str, Any]:
    dt = t("dt", H) if options.get("dt_softplus") else F.softplus(t("dt", H))
    return {
        "x": t("x", H, P), "dt": dt, "A": t.rate("A", H), "B": t("b", G, N), "C": t("c", G, N), "chunk_size": 4,
        **options,
    }  # fmt: skip


def split_ssd(t: Read, G: int = 1, M: int = 0, **options: Any) -> dict[str, Any]:
    inner, GN = D, G * N
    return {
        "zxbcdt": t("zxbcdt", 2 * M + 2 * inner + 2 * GN + H), "conv1d_weight": t.constant("conv", inner + 2 * GN, 3),
        "conv1d_bias": t.constant("conv bias", inner + 2 * GN), "dt_bias": t.constant("bias", H),
        "A": t.rate("A", H), "D": t.constant("D", H), "chunk_size": 4, "headdim": P, "ngroups": G, **options,
    }  # fmt: skip


def qkv(t: Read, G: int = H, **options: Any) -> dict[str, Any]:
    return {"q": t("q", G, N), "k": t("k", G, N), "v": t("v", H, P), **options}


def delta(t: Read, **options: Any) -> dict[str, Any]:
    beta = t("beta", H) if options.get("use_beta_sigmoid_in_kernel") else t("beta", H).sigmoid()
    return qkv(t, beta=beta, use_qk_l2norm_in_kernel=True, **options)


def gated_in_kernel(t: Read, *shape: int, **options: Any) -> dict[str, Any]:
    return delta(
        t, g=t("g", *shape), use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
        A_log=t.constant("A", H), dt_bias=t.constant("bias", H, *shape[1:]).flatten(), **options,
    )  # fmt: skip


def low_rank(t: Read, names: str = "qkabg") -> dict[str, Any]:
    q, k, a, b, g = list(names)
    kappa = F.normalize(t("kappa", H, N), dim=-1)
    parts = {q: t("q", H, N), k: t("k", H, N), "v": t("v", H, P), a: -kappa, b: kappa * t("eta", H, N).sigmoid()}
    return parts | ({g: t.log_decay("g", H, N)} if g != "-" else {})


def wkv5(t: Read, w: Callable[[Read], Tensor]) -> dict[str, Any]:
    sizes = {"B": B, "T": L, "C": D, "H": H}
    return {**sizes, "r": t("r", D), "k": t("k", D), "v": t("v", D), "w": w(t), "u": t.constant("u", H, P)}


def heads_first(t: Read, names: str = "qkvif", gate: tuple[int, ...] = (), **options: Any) -> dict[str, Any]:
    q, k, v, i, f = names.split() if " " in names else list(names)
    gates = {i: t("i", H, *gate), f: t("f", H, *gate) + 2}
    parts = {q: t("q", H, N), k: t("k", H, N), v: t("v", H, P), **gates}
    return {name: part.transpose(1, 2) for name, part in parts.items()} | options


def steps(t: Read) -> tuple[Tensor, Tensor]:
    return t("a", D, N).sigmoid(), t("x", D, N)


def combined(earlier: Any, later: Any) -> Any:
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def combined_in_logarithms(earlier: Any, later: Any) -> Any:
    return torch.exp(later[1]) * earlier[0] + later[0], later[1] + earlier[1]


XLSTM = "queries keys values igate_preact fgate_preact"
CALLS: dict[Callable[..., Any], dict[str, Call]] = {
    loops.causal_conv1d_fn: {
        "plain": lambda t: {"x": t("x", D).transpose(1, 2), "weight": t.constant("w", D, 3)},
        "with all": lambda t: {
            "x": t("x", D).transpose(1, 2), "weight": t.constant("w", D, 3), "bias": t.constant("b", D),
            "activation": "silu",
        },
        "with a state": lambda t: {
            "x": t("x", D).transpose(1, 2), "weight": t.constant("w", D, 3), "return_final_states": True
        },
    },
    loops.causal_conv1d: {
        "plain": lambda t: {
            "x": t("x", D), "weight": t.constant("w", D, 3), "bias": t.constant("b", D), "residual": t("r", D),
            "activation": "swish",
        },
    },
    loops.selective_scan_fn: {
        "plain": scan, "groups": grouped_scan, "with all": full_scan,
        "with a state": partial(scan, return_last_state=True),
        "constant coefficients": lambda t: scan(t) | {"B": t.constant("B", D, N), "C": t.constant("C", D, N)},
    },
    loops.forked_scan_fn: {"with all": forked_scan, "groups": lambda t: grouped_scan(t) | {"delta_softplus": False}},
    loops.mamba_inner_fn: {
        "plain": layer,
        "norms": partial(
            lambda t: layer(
                t, b_rms_weight=t.constant("nb", N), c_rms_weight=t.constant("nc", N),
                dt_rms_weight=t.constant("nd", D), B_proj_bias=t.constant("bb", N), C_proj_bias=t.constant("cb", N),
            )
        ),
        "constant coefficients": lambda t: layer(t, B=t.constant("B", D, N), C=t.constant("C", D, N)),
    },
    loops.mamba_inner_fn_no_out_proj: {"plain": partial(layer, projects=False)},
    loops.mamba_chunk_scan_combined: {
        "plain": ssd,
        "with all": lambda t: ssd(
            t, G=2, D=t.constant("D", H), z=t("z", H, P), dt_bias=t.constant("bias", H), dt_softplus=True,
            dt_limit=(0.4, 1.1),
        ),
        "a path for each channel": lambda t: ssd(t, D=t.constant("D", H, P), return_final_states=True),
    },
    loops.mamba_split_conv1d_scan_combined: {
        "plain": split_ssd,
        "norm after the gate": lambda t: split_ssd(
            t, G=2, M=3, rmsnorm_weight=t.constant("n", D), norm_before_gate=False,
            outproj_weight=t.constant("out", E, D + 3), outproj_bias=t.constant("out bias", E),
        ),
        "norm before the gate": lambda t: split_ssd(t, rmsnorm_weight=t.constant("n", D), dt_limit=(0.1, 2.0)),
    },
    loops.chunk_gla: {
        "plain": lambda t: qkv(t, g=t.log_decay("g", H, N)),
        "with a state": lambda t: qkv(t, g=t.log_decay("g", H, N), scale=0.7, output_final_state=True),
    },
    loops.fused_recurrent_gla: {
        "plain": lambda t: qkv(t, gk=t.log_decay("g", H, N)),
        "no decay": lambda t: qkv(t),
    },
    loops.chunk_simple_gla: {
        "plain": lambda t: qkv(t, g=t.log_decay("g", H)),
        "constant": lambda t: qkv(t, g_gamma=-t.constant("g", H).exp()),
        "both": lambda t: qkv(t, g=t.log_decay("g", H), g_gamma=-t.constant("g", H).exp()),
        "no decay": qkv,
    },
    loops.parallel_simple_gla: {"plain": lambda t: qkv(t, g=t.log_decay("g", H), scale=1.0)},
    loops.chunk_retention: {"plain": qkv},
    loops.chunk_lightning_attn: {"plain": partial(qkv, layer_idx=1, num_layers=3)},
    loops.chunk_linear_attn: {
        "plain": lambda t: qkv(t) | {"q": t("q", H, N).exp(), "k": t("k", H, N).exp()},
        "not normalized": partial(qkv, normalize=False),
    },
    loops.parallel_based: {"plain": qkv, "not normalized": partial(qkv, use_norm=False)},
    loops.chunk_gsa: {
        "plain": lambda t: qkv(t, s=t("s", H, 5).sigmoid(), g=t.log_decay("g", H, 5)),
        "groups": lambda t: {
            "q": t("q", H, N), "k": t("k", 1, N), "v": t("v", 1, P), "s": t("s", 1, 5).sigmoid(),
            "g": t.log_decay("g", 1, 5), "output_final_state": True,
        },
    },
    loops.chunk_hgrn: {"plain": lambda t: {"x": t("x", D), "g": t.log_decay("g", D)}},
    loops.chunk_rwkv6: {
        "plain": lambda t: {
            "r": t("r", H, N), "k": t("k", H, N), "v": t("v", H, P), "w": t.log_decay("w", H, N),
            "u": t.constant("u", H, N),
        },
    },
    loops.chunk_delta_rule: {"plain": delta},
    loops.chunk_gated_delta_rule: {
        "plain": lambda t: delta(t, g=t.log_decay("g", H)),
        "groups": lambda t: delta(t, g=t.log_decay("g", H)) | qkv(t, G=1),
        "in the kernel": lambda t: gated_in_kernel(t, H),
    },
    loops.fused_recurrent_gated_delta_rule: {
        "plain": lambda t: delta(t, g=t.log_decay("g", H)),
        "neither": lambda t: qkv(t, use_qk_l2norm_in_kernel=True),
    },
    loops.chunk_kda: {
        "plain": lambda t: delta(t, g=t.log_decay("g", H, N)),
        "in the kernel": lambda t: gated_in_kernel(t, H, N),
        "with a bound": lambda t: gated_in_kernel(t, H, N, safe_gate=True, lower_bound=-3.0),
    },
    loops.chunk_gated_delta_product: {
        "plain": lambda t: {
            "q": t("q", H, N), "k": t("k", 2, H, N).flatten(1, 2), "v": t("v", 2, H, P).flatten(1, 2),
            "g": t.log_decay("g", H), "beta": t("beta", 2, H).sigmoid().flatten(1, 2), "num_householder": 2,
            "use_qk_l2norm_in_kernel": True,
        },
    },
    loops.chunk_comba: {"plain": lambda t: delta(t, p=t("p", H, N), g=t.log_decay("g", H))},
    loops.chunk_dplr_delta_rule: {"plain": lambda t: {n if n != "g" else "gk": v for n, v in low_rank(t).items()}},
    loops.chunk_iplr_delta_rule: {"plain": partial(low_rank, names="qkab-")},
    loops.chunk_rwkv7: {"plain": partial(low_rank, names="rkabw")},
    loops.fused_mul_recurrent_rwkv7: {
        "plain": lambda t: {
            "r": t("r", H, N), "w": t.log_decay("w", H, N), "k": t("k", H, N), "v": t("v", H, P),
            "kk": F.normalize(t("kk", H, N), dim=-1), "a": t("a", H, N).sigmoid(),
        },
    },
    loops.fused_recurrent_rwkv4: {
        "plain": lambda t: {
            "w": t.constant("w", D), "u": t.constant("u", D), "k": t("k", D), "v": t("v", D),
            "state": torch.cat([t.x.new_zeros(B, 2, 1, D), t.x.new_full((B, 1, 1, D), -1e38)], 1),
        },
    },
    loops.rwkv_linear_attention: {
        "plain": lambda t: {
            "time_decay": t.constant("w", D), "time_first": t.constant("u", D), "key": t("k", D), "value": t("v", D)
        },
    },
    loops.WKV: {
        "plain": lambda t: {
            "B": B, "T": L, "C": D, "w": t.constant("w", D), "u": t.constant("u", D), "k": t("k", D), "v": t("v", D)
        },
    },
    loops.WKV_6: {
        "of the token": partial(wkv5, w=lambda t: t("w", D)),
        "constant": partial(wkv5, w=lambda t: t.constant("w", H, P)),
    },
    loops.WindBackstepping: {
        "plain": lambda t: low_rank(t, "qkzbw") | {"w": t("w", H, N)},
    },
    loops.WKV_7: {
        "plain": lambda t: {
            **{name: 0.1 * t(name, 128) for name in "rkvb"}, "w": t("w", 128), "a": -0.1 * t("b", 128)
        },
    },
    loops.mlstm_chunkwise: {"plain": heads_first, "with a state": partial(heads_first, return_last_states=True)},
    loops.wrap_chunkwise: {
        "plain": lambda t: heads_first(t, mlstm_chunkwise_kernel=len, mlstm_sequence_kernel=None, eps=1e-2)
    },
    loops.mlstm_parallel: {"plain": partial(heads_first, eps=1e-2)},
    loops.parallel_stabilized_simple: {"plain": partial(heads_first, names=XLSTM, gate=(1,))},
    loops.mlstm_siging: {"plain": heads_first, "not normalized": partial(heads_first, normalize=False)},
    loops.pscan: {"plain": lambda t: dict(zip("AX", steps(t)))},
    loops.PScan: {"plain": lambda t: dict(zip(("A_in", "X_in"), steps(t)))},
    loops.associative_scan: {
        "recurrence": lambda t: {"combine_fn": combined, "xs": steps(t), "dim": 1},
        "in logarithms": lambda t: {
            "combine_fn": combined_in_logarithms, "xs": [t("x", D), t.log_decay("a", D)], "dim": -2, "reverse": True,
        },
        "sum": lambda t: {"combine_fn": torch.add, "xs": t("x", D), "dim": 1},
    },
}  # fmt: skip
"""By loop: the arguments of calls, as functions of what a layer reads."""

CASES = [(name, label) for name in NAMES for label in CALLS[LOOPS[name]]]


def first(result: Any) -> Tensor:
    """The tensor of a result that the rule follows: the first one, but of the steps of a recurrence its states."""
    if isinstance(result, Tensor):
        return result
    return next(part for part in result if isinstance(part, Tensor))


class Model(nn.Module):
    """A layer that calls a kernel by a name, and reads scores off its output."""

    def __init__(self, name: str, arguments: Call, kernels: Any, read: Callable[[Any], Tensor] = first) -> None:
        super().__init__()
        self.name, self.kernels = name, kernels
        self.arguments, self.read = [arguments], [read]
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Two scores of each example of ``x`` (B, L, E)."""
        given = self.arguments[0](Read(x))
        called = getattr(self.kernels, self.name)
        result = called(**given) if not hasattr(called, "apply") else called.apply(*positional(self.name, given))
        y = self.read[0](result).flatten(1).tanh()
        return torch.stack([y[:, ::2].mean(1), y[:, 1::2].square().mean(1)], 1)


def positional(name: str, given: dict[str, Any]) -> list[Any]:
    bound = inspect.signature(AUTOGRAD[name]).bind(**given)
    bound.apply_defaults()
    return list(bound.arguments.values())


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """A package of kernels that torch's functions do not show."""
    package = ModuleType("package_of_kernels")
    for name, function in FUNCTIONS.items():
        setattr(package, name, hidden(name, function))
    for name, function in AUTOGRAD.items():
        setattr(package, name, autograd_function(name, function))
    sys.modules[package.__name__] = package
    yield package
    del sys.modules[package.__name__]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, reference = (torch.randn(B, L, E, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, reference


def states_of(label: str) -> Callable[[Any], Tensor]:
    return (lambda result: result[1]) if label == "recurrence" else first


def explained(model: nn.Module, *, dtype: torch.dtype = torch.float64, frozen: bool = False, **options: Any) -> Tensor:
    """The relevance (B, L, E), which must add up to what the model itself gives."""
    x, reference = inputs(dtype)
    model = model.to(dtype).eval()
    method = ImplicitAttentionRelevance(model, **options)
    relevance = method.attribute(x, 1, baselines=None if frozen else reference)
    difference = model(x)[:, 1] - (method.terms["bias"] if frozen else model(reference)[:, 1])
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    size = relevance.abs().sum((1, 2)) + difference.abs()
    assert ((relevance.sum((1, 2)) - difference).abs() <= bound * size).all()
    assert relevance.abs().max() > 1e-6
    return relevance


def test_every_kernel_has_a_loop() -> None:
    assert [name for name in EXTERNAL_CODE if isinstance(EXTERNAL_CODE[name], Kernel) and name not in NAMES] == []
    assert [name for name in NAMES if not isinstance(EXTERNAL_CODE[name], Kernel)] == []


@pytest.mark.parametrize(("name", "label"), CASES)
def test_a_kernel_is_explained_without_a_look_inside(name: str, label: str, kernels: Any) -> None:
    arguments = CALLS[LOOPS[name]][label]
    explained(Model(name, arguments, kernels, states_of(label)))


ONCE = [(min(name for name in NAMES if LOOPS[name] is loop), label) for loop in CALLS for label in CALLS[loop]]
"""One name for each loop."""


@pytest.mark.parametrize(("name", "label"), ONCE)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_kernel_is_explained_in_single_precision_and_with_frozen_gates(
    name: str, label: str, frozen: bool, kernels: ModuleType
) -> None:
    arguments = CALLS[LOOPS[name]][label]
    explained(Model(name, arguments, kernels, states_of(label)), dtype=torch.float32, frozen=frozen)


@pytest.mark.parametrize(("name", "label"), ONCE)
def test_a_kernel_in_half_precision_is_explained_in_single(name: str, label: str, kernels: Any) -> None:
    explained(Model(name, CALLS[LOOPS[name]][label], kernels, states_of(label)), dtype=torch.bfloat16)


@contextmanager
def no_kernels() -> Iterator[None]:
    """No kernel has a rule, so that its code is followed function by function, or refused."""
    rules = {name: EXTERNAL_CODE[name] for name in EXTERNAL_CODE if isinstance(EXTERNAL_CODE[name], Kernel)}
    for name in rules:
        unregister_rule(name)
    try:
        yield
    finally:
        for name, rule in rules.items():
            EXTERNAL_CODE.add(name, rule)


OTHER_SHARES = (
    loops.selective_scan_fn, loops.forked_scan_fn, loops.mamba_inner_fn, loops.mamba_inner_fn_no_out_proj,
    loops.mamba_chunk_scan_combined, loops.mamba_split_conv1d_scan_combined, loops.chunk_rwkv6, loops.WKV_6,
    loops.mlstm_chunkwise, loops.wrap_chunkwise, loops.mlstm_parallel, loops.parallel_stabilized_simple,
    loops.mlstm_siging, loops.parallel_based,
)  # fmt: skip
"""Loops with a product of three factors, which a rule shares among all three, and a loop two by two; or of others."""


@pytest.mark.parametrize(("name", "label"), [case for case in ONCE if LOOPS[case[0]] not in OTHER_SHARES])
def test_a_kernel_is_explained_as_its_loop_is(name: str, label: str, kernels: Any) -> None:
    arguments = CALLS[LOOPS[name]][label]
    found = explained(Model(name, arguments, kernels, states_of(label)), value_share=0.5)
    with no_kernels():
        followed = SimpleNamespace(loop=LOOPS[name])
        wanted = explained(Model("loop", arguments, followed, states_of(label)), value_share=0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


# --- Where a model finds a kernel -------------------------------------------------------------------------------------


def decaying(t: Read) -> dict[str, Any]:
    return qkv(t, g=t.log_decay("g", H, N))


GLA = hidden("chunk_gla", loops.chunk_gla)
SCAN = autograd_function("PScan", loops.PScan)
chunk_gla = under_another_name = GLA
apply = SCAN.apply


def helper(**given: Any) -> Any:
    return chunk_gla(**given)


class Held(nn.Module):
    """A layer that holds a kernel itself."""

    static = staticmethod(GLA)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.own, self.part = GLA, partial(partial(GLA, scale=0.5), output_final_state=True)

    def forward(self, x: Tensor) -> Tensor:
        """Two scores of each example, read off all of these."""
        given = decaying(Read(x))
        ys = [call(**given)[0] for call in (self.own, self.static, self.part, helper, under_another_name)]
        states = apply(*steps(Read(x))) + SCAN.apply(*steps(Read(x)))
        return torch.stack([ys[0].sum((1, 2, 3)), sum(ys).tanh().mean((1, 2, 3)) + states.mean((1, 2, 3))], 1)


def test_a_kernel_is_found_wherever_a_layer_holds_it() -> None:
    model = Held().eval()
    before = dict(vars(model)), dict(globals()), dict(vars(Held)), dict(vars(SCAN))
    explained(model)
    after = dict(vars(model)), dict(globals()), dict(vars(Held)), dict(vars(SCAN))
    for names, others in zip(before, after):
        assert names.keys() == others.keys() and all(names[name] is others[name] for name in names)


def test_a_model_calls_no_code_of_this_package() -> None:
    called = list(called_code(Held(), frozenset(EXTERNAL_CODE)))
    assert any(place.path == __name__ and place.name == "under_another_name" for place in called)
    assert not [place for place in called if place.path.startswith("captum_ssm")]
    assert len({(id(place.home), place.name) for place in called}) == len(called)


def test_the_arguments_go_by_the_names_of_the_function_that_is_called(kernels: Any) -> None:
    """VMamba's scan has the name of mamba_ssm's, and other arguments in other places."""
    kernels.selective_scan_fn = hidden("selective_scan_fn", loops.forked_scan_fn)
    explained(Model("selective_scan_fn", forked_scan, kernels))
    calls = {"u": 0, "delta": 1, "A": 2, "B": 3, "C": 4, "D": 5, "delta_bias": 6}

    class Positional(Model):
        def forward(self, x: Tensor) -> Tensor:
            given = forked_scan(Read(x))
            return self.kernels.selective_scan_fn(*(given[name] for name in calls)).tanh().mean(2)

    explained(Positional("selective_scan_fn", forked_scan, kernels))


def test_another_function_of_the_same_name_and_arguments_is_found_out(kernels: Any) -> None:
    kernels.chunk_gla = hidden("chunk_gla", lambda q, k, v, g: (1.1 * loops.chunk_gla(q, k, v, g)[0], None))
    with pytest.raises(FidelityError, match=r"package_of_kernels\.chunk_gla.*wrong rule for chunk_gla"):
        explained(Model("chunk_gla", decaying, kernels))
    kernels.pscan = hidden("pscan", lambda A, X: loops.pscan(A, X).transpose(0, 1))
    with pytest.raises(FidelityError, match="wrong rule for pscan"):
        explained(Model("pscan", CALLS[loops.pscan]["plain"], kernels))


def test_another_function_of_the_same_name_with_other_arguments_is_followed(kernels: Any) -> None:
    def pscan(x: Tensor, gate: Tensor) -> Tensor:
        return x.cumsum(1) * gate.sigmoid()

    kernels.pscan = pscan
    explained(Model("pscan", lambda t: {"x": t("x", D), "gate": t("gate", D)}, kernels))
    kernels.pscan = hidden("pscan", pscan)
    with pytest.raises(UnsupportedModelError, match="past torch's functions"):
        explained(Model("pscan", lambda t: {"x": t("x", D), "gate": t("gate", D)}, kernels))


def test_a_rule_that_does_not_fit_the_arguments_is_named(kernels: Any) -> None:
    kernels.pscan = hidden("pscan", lambda A, X: A.sum(-1) * X)
    with pytest.raises(UnsupportedModelError, match=r"kernel 'pscan' does not fit.*unregister_rule"):
        explained(Model("pscan", lambda t: {"A": t("A", D, N), "X": t("x", D)}, kernels))


@pytest.mark.parametrize("name", ["fused_scan", "SelectiveScanNew"])
def test_a_kernel_without_a_known_name_is_refused(name: str, kernels: Any) -> None:
    setattr(kernels, name, hidden(name, loops.selective_scan_fn))
    with pytest.raises(UnsupportedModelError, match="past torch's functions"):
        explained(Model(name, scan, kernels))


def test_a_class_derived_from_a_known_function_of_autograd_is_refused(kernels: Any) -> None:
    forward = staticmethod(lambda ctx, A_in, X_in: 2 * kernels.PScan.forward(ctx, A_in, X_in))
    kernels.Derived = type("Derived", (kernels.PScan,), {"forward": forward})
    with pytest.raises(UnsupportedModelError):
        model = Model("Derived", CALLS[loops.PScan]["plain"], kernels)
        AUTOGRAD["Derived"] = loops.PScan
        try:
            explained(model)
        finally:
            del AUTOGRAD["Derived"]


def test_the_associative_scan_of_torch() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            states = torch_scan(combined, steps(Read(x)), dim=1, combine_mode="generic")[1]
            return states.tanh().mean(1).flatten(1)[:, :2]

    explained(Layer())


def test_a_rule_of_ones_own_takes_the_place_of_a_kernel_s(kernels: Any) -> None:
    kernels.chunk_gla = hidden("chunk_gla", lambda q, k, v, g: (1.1 * loops.chunk_gla(q, k, v, g)[0], None))
    rule = EXTERNAL_CODE["chunk_gla"]
    with pytest.raises(ValueError, match="already registered"):
        register_rule("chunk_gla")(loops.chunk_gla)
    unregister_rule("chunk_gla")
    try:
        register_rule("chunk_gla")(lambda q, k, v, g: (1.1 * loops.chunk_gla(q, k, v, g)[0], None))
        explained(Model("chunk_gla", decaying, kernels))
        unregister_rule("chunk_gla")
    finally:
        EXTERNAL_CODE.add("chunk_gla", rule)


def test_a_module_that_has_the_name_of_a_kernel_is_followed() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x.cumsum(1).tanh().mean(1)[:, :2]

    layer = type("SelectiveScan", (nn.Module,), {"forward": forward})()
    layer.weight = nn.Parameter(torch.ones(1))
    explained(layer)


# --- Layers of vision models ------------------------------------------------------------------------------------------


class CrossScan(torch.autograd.Function):
    """Four sequences of an image (B, D, H, W): by rows and by columns, from both ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sequences = x.new_empty((len(x), 4, x.shape[1], x[0, 0].numel()))
        sequences[:, 0] = x.flatten(2, 3)
        sequences[:, 1] = x.transpose(2, 3).flatten(2, 3)
        sequences[:, 2:4] = sequences[:, 0:2].flip(-1)
        return sequences


class SS2D(nn.Module):
    """The layer of VMamba: the same kernel on four sequences, each with weights of its own, added up."""

    def __init__(self, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.selective_scan, self.into, self.conv = scan, nn.Linear(3, 2 * D), nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.x_proj = nn.Parameter(torch.randn(4, 2 + 2 * N, D) / D)
        self.dt_proj, self.dt_bias = nn.Parameter(torch.randn(4, D, 2)), nn.Parameter(torch.randn(4, D))
        self.A_logs, self.Ds = nn.Parameter(torch.rand(4 * D, N)), nn.Parameter(torch.ones(4 * D))
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two scores of each image (B, 3, H, W)."""
        y, z = self.into(x.permute(0, 2, 3, 1)).chunk(2, -1)
        y = F.silu(self.conv(y.permute(0, 3, 1, 2)))
        height, width = y.shape[2:]
        xs = CrossScan.apply(y)
        read = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj)
        dts, b, c = read.split([2, N, N], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, self.dt_proj)
        ys = self.selective_scan(
            xs.flatten(1, 2), dts.flatten(1, 2), -self.A_logs.exp(), b, c, self.Ds, self.dt_bias.flatten(), True
        ).unflatten(1, (4, -1))
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        y = ys[:, 0] + ys[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
        return self.out(self.norm(y.mT) * F.silu(z).flatten(1, 2)).mean(1)


class MambaVisionMixer(nn.Module):
    """The layer of MambaVision: half of the channels go through the kernel, the others past it."""

    def __init__(self, kernels: Any) -> None:
        super().__init__()
        self.kernels, self.into = [kernels], nn.Linear(E, D)
        self.conv = nn.ModuleList(nn.Conv1d(D // 2, D // 2, 3, padding="same", groups=D // 2) for _ in range(2))
        self.read, self.step = nn.Linear(D // 2, 2 + 2 * N), nn.Linear(2, D // 2)
        self.A_log, self.D = nn.Parameter(torch.rand(D // 2, N)), nn.Parameter(torch.ones(D // 2))
        self.out = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two scores of each example of ``x`` (B, L, E)."""
        u, z = (F.silu(conv(t)) for conv, t in zip(self.conv, self.into(x).mT.chunk(2, 1)))
        low, b, c = self.read(u.mT).split([2, N, N], -1)
        delta = (low @ self.step.weight.mT).mT
        y = self.kernels[0].selective_scan_fn(
            u, delta, -self.A_log.exp(), b.mT, c.mT, self.D, z=None, delta_bias=self.step.bias, delta_softplus=True,
            return_last_state=None,
        )  # fmt: skip
        return self.out(torch.cat([y, z], 1).mT).tanh().mean(1)


def test_the_layers_of_vision_models(kernels: Any) -> None:
    torch.manual_seed(0)
    explained(MambaVisionMixer(kernels))
    model = SS2D(kernels.SelectiveScanCuda.apply).double().eval()
    images, reference = torch.randn(2, B, 3, 4, 5, dtype=torch.float64)
    relevance = ImplicitAttentionRelevance(model).attribute(images, 1, baselines=reference)
    difference = (model(images) - model(reference))[:, 1]
    torch.testing.assert_close(relevance.sum((1, 2, 3)), difference, rtol=1e-9, atol=1e-12)


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Call, str, Any]] = {
    "chunk_gla": (decaying, "initial_state", torch.ones(B, H, N, P)),
    "fused_recurrent_gla": (lambda t: qkv(t, gk=t.log_decay("g", H, N)), "reverse", True),
    "chunk_gsa": (CALLS[loops.chunk_gsa]["plain"], "g", None),
    "chunk_kda": (CALLS[loops.chunk_kda]["plain"], "beta", torch.ones(B, L, H, P)),
    "chunk_delta_rule": (delta, "cu_seqlens", torch.tensor([0, 3, L])),
    "mamba_chunk_scan_combined": (ssd, "seq_idx", torch.zeros(B, L, dtype=torch.int32)),
    "mamba_split_conv1d_scan_combined": (split_ssd, "initial_states", torch.zeros(B, H, P, N)),
    "causal_conv1d_fn": (CALLS[loops.causal_conv1d_fn]["plain"], "seq_idx", torch.zeros(B, L, dtype=torch.int32)),
    "mlstm_chunkwise__xl_chunk": (heads_first, "c_initial", torch.zeros(B, H, N, P)),
    "rwkv_linear_attention": (CALLS[loops.rwkv_linear_attention]["plain"], "state", [torch.zeros(B, D)] * 3),
    "fused_recurrent_rwkv4": (CALLS[loops.fused_recurrent_rwkv4]["plain"], "state", torch.ones(B, 3, 1, D)),
}
"""By name: a call, and an argument that no rule follows."""


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_is_not_followed_is_refused_by_its_name(name: str, kernels: Any) -> None:
    arguments, argument, value = REFUSED[name]
    explained(Model(name, arguments, kernels))
    model = Model(name, lambda t: arguments(t) | {argument: value}, kernels)
    with pytest.raises(UnsupportedModelError, match=f"'{argument}'"):
        explained(model)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("selective_scan_fn", partial(scan, return_last_state=True)),
        ("chunk_gla", lambda t: decaying(t) | {"output_final_state": True}),
        ("chunk_linear_attn", CALLS[loops.chunk_linear_attn]["plain"]),
        ("associative_scan", lambda t: {"combine_fn": combined, "xs": steps(t), "dim": 1}),
        ("mlstm_chunkwise__xl_chunk", partial(heads_first, return_last_states=True)),
    ],
)
def test_a_further_result_is_refused_when_it_is_read(name: str, arguments: Call, kernels: Any) -> None:
    def read(result: Any) -> Tensor:
        parts = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
        return sum((part.mean() for part in parts[1:]), parts[0])

    with pytest.raises(UnsupportedModelError, match=f"further result.*{name}"):
        explained(Model(name, arguments, kernels, read))


def test_complex_states_are_refused(kernels: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="complex"):
        explained(Model("selective_scan_fn", lambda t: scan(t) | {"A": t.rate("A", D, N) * 1j}, kernels))


@pytest.mark.parametrize("combine", [torch.maximum, lambda earlier, later: (earlier[0], later[1])])
def test_other_associative_scans_are_refused(combine: Callable[..., Any], kernels: Any) -> None:
    xs = (lambda t: t("x", D)) if combine is torch.maximum else steps
    model = Model("associative_scan", lambda t: {"combine_fn": combine, "xs": xs(t), "dim": 1}, kernels)
    with pytest.raises(UnsupportedModelError, match="associative scan"):
        explained(model)
