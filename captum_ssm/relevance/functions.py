"""What kind of function each function of torch is, and those that are made of others.

Three kinds need a rule: what is linear in its arguments together, what is linear in each of them (a product), and what
acts on each entry alone. All others are written out in these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.gates import secant_of, upper_bound

Kind = Literal["linear", "product", "elementwise", "constant"]

KINDS: dict[str, Kind | Callable[..., Any]] = {}
"""By a function's own name: its kind, or the same function made of functions that have a kind."""

_NAMES: dict[Kind, str] = {
    "linear": """
        add sub rsub subtract neg negative positive sum nansum mean cumsum flip roll diff
        view reshape view_as reshape_as expand expand_as broadcast_to repeat tile repeat_interleave flatten unflatten
        ravel transpose permute movedim swapaxes swapdims t T mT H mH squeeze unsqueeze squeeze_ unfold
        split split_with_sizes tensor_split chunk unbind select narrow diagonal diag_embed tril triu
        cat concat concatenate stack hstack vstack dstack pad _pad constant_pad_nd
        getitem setitem gather take_along_dim index_select index_add index_copy index_put index_fill scatter scatter_add
        masked_fill masked_select masked_scatter where copy fill zero zero_
        clone contiguous detach data alias dropout real nan_to_num avg_pool1d adaptive_avg_pool1d upsample interpolate
    """,
    "product": """
        mul multiply matmul mm bmm mv dot inner outer einsum tensordot linear conv1d conv2d conv3d
        _grouped_mm grouped_mm grouped_mm_fallback vecdot kron causal_convolution
    """,
    "elementwise": """
        exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square pow float_power abs absolute
        sigmoid special_expit logsigmoid log_sigmoid softplus tanh sin cos erf special_erf special_ndtr arctan atan
        sinh cosh asinh clamp clip clamp_min clamp_max relu relu6 leaky_relu elu selu celu silu gelu mish hardswish
        hardsigmoid hardtanh softsign tanhshrink softshrink hardshrink threshold logit sign
    """,
    "constant": "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full",
}

ALIASES = {"radd": "add", "iadd": "add", "isub": "sub", "rmul": "mul", "imul": "mul", "rmatmul": "matmul",
           "truediv": "div", "divide": "div", "true_divide": "div", "idiv": "div", "itruediv": "div",
           "rtruediv": "rdiv", "ipow": "pow"}  # fmt: skip
"""Operators of Python by the name of the function that they are."""

CASTS = {"to", "cpu", "cuda", "type", "type_as", "float", "double", "half", "bfloat16"}
"""Functions that may change the type."""

LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Functions that take no more than a shape or type from their second argument."""

for _kind, _names in _NAMES.items():
    KINDS.update(dict.fromkeys(_names.split(), _kind))


def made_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say what a function is made of."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[name] = function
        return function

    return decorate


@made_of("div")
def _divide(x: Any, y: Any, *, rounding_mode: None = None) -> Any:
    if rounding_mode is not None:
        raise NotImplementedError("div with a rounding mode")
    return x * torch.reciprocal(y) if isinstance(y, Tensor) else x * (1 / y)


@made_of("rdiv")
def _divided(y: Tensor, x: Any) -> Any:
    return x * torch.reciprocal(y)


@made_of("rpow")
def _raised(exponent: Tensor, base: Any) -> Any:
    return torch.pow(base, exponent)


@made_of("softmax")
def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    x, axis = x if dtype is None else x.to(dtype), -1 if dim is None else dim
    e = torch.exp(x - upper_bound(x).amax(axis, keepdim=True))
    return e / e.sum(axis, keepdim=True)


@made_of("logsumexp")
def _logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    bound = upper_bound(x).amax(dim, keepdim=True)
    total = torch.exp(x - bound).sum(dim, keepdim=True).log() + bound
    return total if keepdim else total.squeeze(dim)


@made_of("log_softmax")
def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return x - _logsumexp(x, -1 if dim is None else dim, keepdim=True)


def _normalized(x: Tensor, dims: list[int], weight: Any, bias: Any, eps: float, centre: bool) -> Tensor:
    x = x - x.mean(dims, keepdim=True) if centre else x
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@made_of("layer_norm")
def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    return _normalized(x, list(range(-len(shape), 0)), weight, bias, eps, centre=True)


@made_of("rms_norm")
def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _normalized(x, list(range(-len(shape), 0)), weight, None, eps, centre=False)


@made_of("group_norm")
def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    y = _normalized(x.unflatten(1, (groups, -1)).flatten(2), [-1], None, None, eps, centre=True).view(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@made_of("var")
def _var(x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Tensor:
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    count = 1
    for d in dims:
        count *= x.shape[d]
    free = count - (int(unbiased) if correction is None else correction)
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim) / free


@made_of("std")
def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _var(*args, **kwargs).sqrt()


@made_of("linalg_vector_norm")
@made_of("norm")
def _norm(x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    p = options.get("ord", 2 if p in (None, "fro") else p)
    if p not in (1, 2):
        raise NotImplementedError(f"norm with p={p}")
    dim = list(range(x.dim())) if dim is None else dim
    return x.abs().sum(dim, keepdim=keepdim) if p == 1 else x.square().sum(dim, keepdim=keepdim).sqrt()


@made_of("normalize")
def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return x / _norm(x, p, dim, keepdim=True).clamp_min(eps)


@made_of("maximum")
def _maximum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y + (x - y).abs())


@made_of("minimum")
def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y - (x - y).abs())


@made_of("glu")
def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


@made_of("bilinear")
def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    both = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return both if bias is None else both + bias


@made_of("addmm")
def _addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@made_of("baddbmm")
def _baddbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@made_of("addcmul")
def _addcmul(x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (y * z)


@made_of("lerp")
def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + weight * (y - x)


@made_of("scaled_dot_product_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    return F.softmax(scores, dim=-1) @ v


@made_of("amax")
def _amax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    if not isinstance(dim, int):
        raise NotImplementedError("amax over other than one axis")
    largest = x.gather(dim, x.argmax(dim, keepdim=True))
    return largest if keepdim else largest.squeeze(dim)


@made_of("iter")
def _iterate(x: Tensor) -> Any:
    return iter(x.unbind(0))


@made_of("secant")
def _secant(activation: str, u: Tensor) -> Tensor:
    return secant_of(activation)(u)


OPAQUE: dict[str, Callable[..., Any]] = {}
"""By the name of a class of modules, or of a function that they call past torch's own: what it is made of.

A function's name may have that of the module that calls it in front, ``"package.module.function"``.
"""

Registered = TypeVar("Registered", bound=Callable[..., Any])


def register_rule(what: Callable[..., Any] | str, kind: Kind | None = None) -> Any:
    """Say what relevance is to make of a function, or of code that it cannot follow, such as a fused kernel.

    Args:
        what: A torch function; or the name of a class of modules, or of a function as the code of a module calls it,
            perhaps with that module's own name in front, ``"package.module.function"``.
        kind: Of a function: ``"linear"`` in its tensors together, ``"product"``: linear in each of two,
            ``"elementwise"``: of each entry alone, or ``"constant"``: it takes no more than a shape. None if it is made
            of other functions.

    Returns:
        With a kind None; else a decorator for the same function made of functions that have a kind. That of a module
        gets the module and then its arguments. Named code is run too, and the rule must give what it gives.

    Raises:
        ValueError: If there is a rule already, or the kind is unknown.

    Example:
        >>> import torch
        >>> register_rule(torch.sinc, "elementwise")
        >>> unregister_rule(torch.sinc)
        >>> @register_rule("FusedSquare")
        ... def fused_square(module, x):
        ...     return x * x
        >>> unregister_rule("FusedSquare")
    """
    table: dict[str, Any] = OPAQUE if isinstance(what, str) else KINDS
    name = what if isinstance(what, str) else what.__name__.strip("_")
    if name in table:
        raise ValueError(f"A rule for {name!r} is already registered; call captum_ssm.unregister_rule first.")
    if kind is not None:
        if kind not in _NAMES or isinstance(what, str):
            raise ValueError(f"{kind!r} is not a kind of function; choose from {', '.join(_NAMES)}.")
        table[name] = kind
        return None

    def decorate(made: Registered) -> Registered:
        table[name] = made
        return made

    return decorate


def unregister_rule(what: Callable[..., Any] | str) -> None:
    """Forget the rule of a function, or of named code.

    Raises:
        KeyError: If there is none.
    """
    if isinstance(what, str):
        del OPAQUE[what]
    else:
        del KINDS[what.__name__.strip("_")]


def _add_and_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, eps: float = 1e-6,
    prenorm: bool = False, is_rms_norm: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Add and norm in one, as the kernels of mamba_ssm and fla do; with ``prenorm`` the sum is wanted too."""
    x = x if residual is None else x + residual
    y = _normalized(x, [-1], weight, bias, eps, centre=not is_rms_norm)
    return (y, x) if prenorm else y


def _swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.silu(x) * y, weight, bias)


OPAQUE.update(
    {
        "layer_norm_fn": _add_and_norm,
        "rms_norm_fn": partial(_add_and_norm, is_rms_norm=True),
        "fla.modules.norm.layernorm.layer_norm": partial(_add_and_norm, eps=1e-5),
        "fla.modules.norm.layernorm.rms_norm": partial(_add_and_norm, eps=1e-5, is_rms_norm=True),
        "fla.modules.mlp.swiglu": lambda x, y: F.silu(x) * y,
        "fla.modules.mlp.swiglu_linear": _swiglu_linear,
    }
)
