"""Calls of every function that has a row: what the sweep over the table runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as typed_torch
from torch import Tensor, nn

torch: Any = typed_torch  # whose stubs know fewer arguments and results than the functions have
F: Any = torch.nn.functional

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A function of tensors that are drawn at random.

    Args:
        function: The function.
        shapes: The shape of each tensor.
        within: From normal numbers to those that the function takes.
        traced: Which tensors are traced, one tuple of positions for each call; None: all of them, and each alone.
        flat: Whether torch has no gradient of it that is its slope, as of a function that rounds.
    """

    function: Callable[..., Any]
    shapes: tuple[Shape, ...] = ((2, 3, 4),)
    within: Callable[[Tensor], Tensor] = lambda x: x
    traced: tuple[tuple[int, ...], ...] | None = None
    flat: bool = False

    @property
    def calls(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the traced tensors in each call."""
        every = tuple(range(len(self.shapes)))
        alone = tuple((k,) for k in every) if len(every) > 1 else ()
        return (every, *alone) if self.traced is None else self.traced


IMAGE, VOLUME, LINE = (2, 4, 6, 6), (1, 2, 4, 4, 4), (2, 4, 8)
MASK = torch.arange(24).view(2, 3, 4) % 3 == 0
NUMBERS = torch.tensor([[[0, 2, 1, 3]], [[7, 5, 4, 6]]])
ROWS = torch.arange(24).view(2, 3, 4) % 5 % 3
PLACES = torch.tensor([2, 0])
CLASSES = torch.tensor([1, 3, 0])
SIGNS = torch.tensor([1, -1, 1])


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.2


def unit(x: Tensor) -> Tensor:
    return 0.05 + 0.9 * x.sigmoid()


def complex_pair(x: Tensor) -> Tensor:
    """A complex tensor (..., 2) of a real one (..., 4)."""
    return torch.view_as_complex(x.unflatten(-1, (2, 2)))


def like(constant: Any, x: Tensor) -> Tensor:
    """A constant of the type of a tensor, which may be traced."""
    return torch.as_tensor(constant).to(x.dtype)


# --- Linear -------------------------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {
    "sum_to_size": lambda x: x.sum_to_size(1, 3, 1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "view_as": lambda x: x.view_as(torch.empty(4, 6)),
    "reshape_as": lambda x: x.mT.reshape_as(torch.empty(4, 6)),
    "sum": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(1, keepdim=True),
    "nansum": lambda x: x.nansum(-1),
    "nanmean": lambda x: x.nanmean(-1),
    "trace": lambda x: x[0].trace(),
    "rsub": lambda x: torch.rsub(x, 3, alpha=2),
    "subtract": lambda x: torch.subtract(x, 1),
    "neg": torch.neg,
    "negative": torch.negative,
    "positive": torch.positive,
    "cumsum": lambda x: x.cumsum(-1),
    "diff": lambda x: x.diff(dim=1),
    "deg2rad": torch.deg2rad,
    "rad2deg": torch.rad2deg,
    "gradient": lambda x: torch.gradient(x, dim=[1, 2], spacing=0.5),
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.mT.reshape(-1, 3),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "ravel": torch.ravel,
    "expand": lambda x: x.unsqueeze(1).expand(2, 5, 3, 4),
    "broadcast_to": lambda x: torch.broadcast_to(x, (3, 2, 3, 4)),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "atleast": lambda x: [torch.atleast_1d(x.sum()), torch.atleast_2d(x[0, 0]), torch.atleast_3d(x[0])],
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:, :1]),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij"),
    "as_strided": lambda x: torch.as_strided(x.clone(), (3, 2), (2, 5), 1),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(0, -1),
    "moveaxis": lambda x: torch.moveaxis(x, 1, 0),
    "swapaxes": lambda x: torch.swapaxes(x, 0, 1),
    "swapdims": lambda x: torch.swapdims(x, 0, 1),
    "transposed": lambda x: [x[0].t(), x[0].T, x.mT, x[0].H, x.mH, x.adjoint()],
    "flip": lambda x: [x.flip(1), x.fliplr(), x.flipud(), x.rot90(1, (1, 2)), x.rot90(2), reversed(x)],
    "roll": lambda x: x.roll((1, 2), (1, 2)),
    "repeat": lambda x: [x.repeat(1, 2, 1), x.tile(2), x.repeat_interleave(2, 1)],
    "split": lambda x: [*x.split(2, 1), *x.split([1, 3], -1), *x.tensor_split(2, 2), *x.chunk(2, -1)],
    "split_with_sizes": lambda x: x.split_with_sizes([1, 2], 1),
    "split by axis": lambda x: [*x.dsplit(2), *x.hsplit(3), *x.vsplit(2), *x.unbind(1)],
    "unsafe split": lambda x: [*x.unsafe_chunk(2, 2), *x.unsafe_split(2, 2), *x.unsafe_split_with_sizes([1, 3], 2)],
    "pad_sequence": lambda x: nn.utils.rnn.pad_sequence([x[0], x[1, :2]], batch_first=True),
    "unfold": lambda x: [x.unfold(-1, 2, 1), F.unfold(x.unsqueeze(1), 2)],
    "cat": lambda x: [torch.cat([x, x], 1), torch.concat([x, x]), torch.concatenate([x, x], -1)],
    "stack": lambda x: [torch.stack([x, x], 1), torch.hstack([x, x]), torch.vstack([x, x]), torch.dstack([x, x])],
    "columns": lambda x: [torch.column_stack([x[0], x[1]]), torch.row_stack([x[0], x[1]])],
    "block_diag": lambda x: torch.block_diag(x[0], x[1]),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0, 0], x[0, 1]),
    "combinations": lambda x: torch.combinations(x[0, 0]),
    "pad": lambda x: [F.pad(x, (1, 2)), F.pad(x, (1, 1), mode="reflect"), torch.constant_pad_nd(x, (1, 0), 2.0)],
    "select": lambda x: [x.select(1, 2), x.narrow(-1, 1, 2), x[:, 1:, ::2], x[MASK]],
    "diagonal": lambda x: [x.diagonal(0, 1, 2), torch.linalg.diagonal(x), torch.diag(x[0]), torch.diagflat(x[0, 0])],
    "diag_embed": lambda x: [torch.diag_embed(x), x.tril(), x.triu(1)],
    "gather": lambda x: [x.gather(1, NUMBERS % 3), x.take(NUMBERS), x.take_along_dim(NUMBERS % 3, 1)],
    "index": lambda x: [x.index_select(1, PLACES), x.index_fill(1, PLACES, 0.5)],
    "select_scatter": lambda x: torch.zeros_like(x).select_scatter(x[:, 0] * 2, 1, 1),
    "slice_scatter": lambda x: torch.ones_like(x).slice_scatter(x[:, :2], 1, 1, 3),
    "diagonal_scatter": lambda x: torch.ones_like(x[0]).diagonal_scatter(x[1, :, 0], 0),
    "fill_diagonal": lambda x: (x[0] * 1).fill_diagonal_(2.0),
    "fill": lambda x: [torch.fill(x, 2.0) + x, (x * 1).fill_(3.0) + x, (x * 1).zero_() + x, torch.clone(x)],
    "masked_fill": lambda x: [x.masked_fill(MASK, 0.5), x.masked_select(MASK), x.contiguous(), x.nan_to_num()],
    "copies": lambda x: [
        torch.alias_copy(x), torch.as_strided_copy(x, (2, 2), (1, 2)), torch.diagonal_copy(x[0]),
        torch.expand_copy(x, (1, 2, 3, 4)), torch.narrow_copy(x, 1, 0, 2), torch.permute_copy(x, (2, 0, 1)),
        torch.select_copy(x, 1, 0), torch.slice_copy(x, 1, 0, 2), torch.squeeze_copy(x[:, :1]), torch.t_copy(x[0]),
        torch.transpose_copy(x, 0, 1), *torch.unbind_copy(x), torch.unfold_copy(x, -1, 2, 1),
        torch.view_copy(x, (4, 6)), torch.unsqueeze_copy(x, 0),
        *torch.split_copy(x, 2, 2), *torch.split_with_sizes_copy(x, [1, 3], 2),
    ],
    "embedding": lambda x: [F.embedding(PLACES, x[0]), torch.embedding(x[0], PLACES)],
    "affine_grid": lambda x: [F.affine_grid(x[:, :2, :3], [2, 1, 3, 3]),
                              torch.affine_grid_generator(x[:, :2, :3], [2, 1, 3, 3], True)],
    "requires_grad": lambda x: (x * 1).requires_grad_() + 1,
    "dropout": lambda x: [f(x, 0.5, False) for f in (F.dropout, F.dropout1d, F.alpha_dropout, F.feature_alpha_dropout,
                                                    torch.feature_dropout)],
}  # fmt: skip
"""Functions of one tensor (2, 3, 4)."""
IMAGES: dict[str, Any] = {
    "avg_pool2d": lambda x: [F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1, True, False)],
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "lp_pool2d": lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2),
    "max_pool2d": lambda x: [F.max_pool2d(x, 2), torch.max_pool2d(x, 3, 2, 1)],
    "max_pool2d and where": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool2d of windows apart": lambda x: F.max_pool2d(x, 2, 3, 1, 2, True),
    "MaxPool2d": lambda x: nn.MaxPool2d(3, 1, 1)(x),
    "adaptive_max_pool2d": lambda x: [F.adaptive_max_pool2d(x, (2, 3)), nn.AdaptiveMaxPool2d(2, True)(x)[0]],
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "pixels": lambda x: [F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 3), torch.channel_shuffle(x, 2)],
    "interpolate": lambda x: [F.interpolate(x, scale_factor=2, mode=m) for m in ("nearest", "bilinear", "bicubic")],
    "dropout2d": lambda x: F.dropout2d(x, 0.5, False),
    "local_response_norm": lambda x: F.local_response_norm(x, 2, k=0.5),
    "fold": lambda x: F.fold(x.flatten(2)[..., :4], (2, 2), 1),
    "fold of windows": lambda x: F.fold(x.reshape(2, 16, 9), (4, 4), 2),
    "instance_norm": lambda x: [
        F.instance_norm(x), torch.instance_norm(x, None, None, None, None, True, 0.1, 0.1, False)
    ],
}  # fmt: skip
"""Functions of one tensor (2, 4, 6, 6)."""
FOURIER: dict[str, Any] = {
    "fft": lambda x: torch.fft.fft(x, 6, 1),
    "ifft": lambda x: torch.fft.ifft(x, norm="ortho"),
    "rfft": lambda x: torch.fft.rfft(x, 7),
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x), 4),
    "hfft": lambda x: torch.fft.hfft(complex_pair(x)),
    "ihfft": torch.fft.ihfft,
    "fft2": lambda x: [torch.fft.fft2(x), torch.fft.ifft2(x), torch.fft.rfft2(x), torch.fft.ihfft2(x)],
    "irfft2": lambda x: [torch.fft.irfft2(torch.fft.rfft2(x), (3, 4)), torch.fft.hfft2(complex_pair(x))],
    "fftn": lambda x: [torch.fft.fftn(x), torch.fft.ifftn(x), torch.fft.rfftn(x), torch.fft.ihfftn(x)],
    "irfftn": lambda x: [torch.fft.irfftn(torch.fft.rfftn(x), (2, 3, 4)), torch.fft.hfftn(complex_pair(x))],
    "fftshift": lambda x: [torch.fft.fftshift(x), torch.fft.ifftshift(x, 1)],
    "stft": lambda x: torch.stft(x.flatten(1), 6, 3, window=torch.hann_window(6, dtype=x.dtype), return_complex=True),
    "istft": lambda x: torch.istft(
        torch.stft(x.flatten(1), 6, 2, return_complex=True), 6, 2, window=torch.ones(6, dtype=x.dtype), length=12
    ),
    "long convolution": lambda x: torch.fft.irfft(
        torch.fft.rfft(x, 8) * torch.fft.rfft(torch.arange(4.0).to(x.dtype), 8), 8
    )[..., :4],
    "view_as_complex": lambda x: [complex_pair(x).real, complex_pair(x).imag * 2],
    "parts": lambda x: [torch.real(complex_pair(x)), torch.imag(complex_pair(x)), torch.view_as_real(complex_pair(x))],
    "conj": lambda x: [complex_pair(x).conj(), complex_pair(x).conj_physical(), complex_pair(x).conj().resolve_conj()],
    "neg": lambda x: complex_pair(x).conj().imag.resolve_neg(),
    "abs": lambda x: [complex_pair(x).abs(), torch.absolute(complex_pair(x))],
    "angle": lambda x: complex_pair(x).angle(),
    "angle of real numbers": torch.angle,
    "sgn": lambda x: [complex_pair(x).sgn(), x.sgn()],
    "exp": lambda x: complex_pair(x).exp(),
    "log": lambda x: complex_pair(x).log(),
    "square": lambda x: [complex_pair(x).square(), complex_pair(x) ** 3, complex_pair(x).sqrt()],
    "pow": lambda x: complex_pair(x) ** -1.5,
    "reciprocal": lambda x: [complex_pair(x).reciprocal(), x[..., :2] / complex_pair(x), 1 / complex_pair(x)],
    "norm": lambda x: complex_pair(x).norm(dim=-1),
    "prod": lambda x: complex_pair(x).prod(1),
    "mean": lambda x: [complex_pair(x).mean(1), complex_pair(x).var(1), complex_pair(x)[0].cov()],
    "matmul": lambda x: complex_pair(x) @ complex_pair(x).mH,
    "cast": lambda x: [x.to(torch.complex128) * 2, x.cdouble() + 1j, complex_pair(x).to(torch.complex128),
                       complex_pair(x).to(torch.float64), complex_pair(x).double() + x[..., 2:]],
    "cast to real": lambda x: complex_pair(x).conj().real.double(),
}  # fmt: skip
"""Complex functions of one tensor (2, 3, 4)."""

# --- Products -----------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, Case] = {
    "mul": Case(torch.mul, ((2, 3, 4), (3, 1))),
    "multiply": Case(torch.multiply, ((2, 3, 4), (4,))),
    "matmul": Case(torch.matmul, ((2, 3, 4), (4, 2))),
    "linalg_matmul": Case(torch.linalg.matmul, ((2, 3, 4), (4, 2))),
    "mm": Case(torch.mm, ((3, 4), (4, 2))),
    "bmm": Case(torch.bmm, ((2, 3, 4), (2, 4, 2))),
    "mv": Case(torch.mv, ((3, 4), (4,))),
    "dot": Case(torch.dot, ((4,), (4,))),
    "vdot": Case(torch.vdot, ((4,), (4,))),
    "inner": Case(torch.inner, ((2, 4), (3, 4))),
    "outer": Case(lambda x, y: [torch.outer(x, y), torch.ger(x, y)], ((4,), (3,))),
    "tensordot": Case(lambda x, y: torch.tensordot(x, y, dims=([1, 2], [0, 1])), ((2, 3, 4), (3, 4, 2))),
    "vecdot": Case(torch.linalg.vecdot, ((2, 4), (2, 4))),
    "kron": Case(torch.kron, ((2, 3), (3, 2))),
    "cross": Case(lambda x, y: [torch.cross(x, y, -1), torch.linalg.cross(x, y)], ((2, 3), (2, 3))),
    "trapezoid": Case(lambda y, x: [torch.trapezoid(y, x), torch.trapz(y, x)], ((2, 4), (2, 4))),
    "cumulative_trapezoid": Case(torch.cumulative_trapezoid, ((2, 4), (2, 4))),
    "linear": Case(F.linear, ((2, 3, 4), (5, 4), (5,))),
    "bilinear": Case(F.bilinear, ((2, 4), (2, 3), (5, 4, 3), (5,))),
    "einsum": Case(lambda x, y: torch.einsum("bij,bkj->ikb", x, y), ((2, 3, 4), (2, 5, 4))),
    "einsum of three": Case(lambda x, y, z: torch.einsum("bij,bjk,kl->bil", x, y, z), ((2, 3, 4), (2, 4, 3), (3, 2))),
    "einsum of four": Case(
        lambda w, x, y, z: torch.einsum("...i,...j,ij,...k", [w, x, y, z]), ((2, 3, 2), (2, 3, 3), (2, 3), (2, 3, 4))
    ),
    "einsum of diagonals": Case(lambda x, y, z: torch.einsum("ii, ij, j -> i", x, y, z), ((3, 3), (3, 4), (4,))),
    "conv1d": Case(lambda x, w: F.conv1d(x, w, padding=1, groups=2), (LINE, (4, 2, 3))),
    "conv2d": Case(lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1)), (IMAGE, (3, 4, 2, 2), (3,))),
    "conv3d": Case(F.conv3d, (VOLUME, (3, 2, 2, 2, 2))),
    "conv_tbc": Case(torch.conv_tbc, ((5, 2, 4), (3, 4, 2), (2,)), traced=((0,), (1,))),
    "convolution": Case(
        lambda x, w, b: torch.convolution(x, w, b, [1], [0], [1], False, [0], 1), (LINE, (3, 4, 2), (3,))
    ),
    "conv_transpose1d": Case(lambda x, w, b: F.conv_transpose1d(x, w, b, 2), (LINE, (4, 3, 3), (3,))),
    "conv_transpose2d": Case(
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2), (IMAGE, (4, 3, 3, 3))
    ),
    "conv_transpose3d": Case(F.conv_transpose3d, (VOLUME[1:], (2, 2, 2, 2, 2))),
    "grid_sample": Case(
        lambda x, g: [F.grid_sample(x, g.tanh(), align_corners=False), torch.grid_sampler(x, g.tanh(), 0, 0, True),
                      torch.grid_sampler_2d(x, g.tanh(), 1, 1, True)],
        (IMAGE, (2, 3, 3, 2)), traced=((0,),),
    ),
    "grid_sampler_3d": Case(
        lambda x, g: torch.grid_sampler_3d(x, g.tanh(), 0, 0, True), (VOLUME, (1, 2, 2, 2, 3)), traced=((0,),)
    ),
    "complex": Case(lambda x, y: torch.complex(x, y) * torch.complex(y, x).conj(), ((3, 4), (3, 4))),
    "complex quotient": Case(lambda x, y: complex_pair(x) / complex_pair(y), ((3, 4), (3, 4))),
    "complex einsum": Case(
        lambda x, y: torch.einsum("bi,ij->bj", complex_pair(x), complex_pair(y)), ((3, 4), (2, 4))
    ),
    "complex vdot": Case(lambda x, y: [torch.vdot(complex_pair(x), complex_pair(y)),
                                       torch.linalg.vecdot(complex_pair(x), complex_pair(y))], ((4,), (4,))),
    "convolution by transforms": Case(
        lambda x, k: torch.fft.irfft(torch.fft.rfft(x, 16) * torch.fft.rfft(k, 16), 16)[..., :8], (LINE, (4, 8))
    ),
    "polar": Case(torch.polar, ((3, 4), (3, 4)), positive),
    "prod": Case(lambda x: [x.prod(1), x.prod(-1, keepdim=True), x[0].prod()]),
    "cumprod": Case(lambda x: x.cumprod(1)),
    "multi_dot": Case(
        lambda x, y, z: [torch.linalg.multi_dot([x, y, z]), torch.chain_matmul(x, y, z)], ((2, 3), (3, 4), (4, 2))
    ),
    "matrix_power": Case(lambda x: [torch.matrix_power(x, 3), torch.linalg.matrix_power(x, 1)], ((2, 3, 3),)),
    "addmm": Case(lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), ((2,), (3, 4), (4, 2))),
    "addmv": Case(torch.addmv, ((3,), (3, 4), (4,))),
    "addr": Case(lambda b, x, y: torch.addr(b, x, y, beta=0.5, alpha=2), ((3, 4), (3,), (4,))),
    "addbmm": Case(lambda b, x, y: torch.addbmm(b, x, y, beta=0.5), ((3, 2), (2, 3, 4), (2, 4, 2))),
    "baddbmm": Case(torch.baddbmm, ((2, 3, 2), (2, 3, 4), (2, 4, 2))),
    "addcmul": Case(lambda x, y, z: torch.addcmul(x, y, z, value=0.3), ((3, 4), (3, 4), (4,))),
    "addcdiv": Case(lambda x, y, z: torch.addcdiv(x, y, z.exp(), value=0.3), ((3, 4), (3, 4), (4,))),
    "lerp": Case(torch.lerp, ((3, 4), (3, 4), (4,))),
    "solve_triangular": Case(
        lambda b: [torch.linalg.solve_triangular(like(torch.eye(3) * 2 + 1, b).tril(), b, upper=False),
                   torch.linalg.solve(like(torch.eye(3) * 2 + 1, b), b)],
        ((2, 3, 4),),
    ),
}  # fmt: skip
"""Products, of which each factor is traced alone, and all together where that is possible."""

# --- Choices and steps --------------------------------------------------------------------------------------------

CHOICES: dict[str, Case] = {
    "max": Case(lambda x: [x.max(), x.max(1).values, torch.max(x, 2, True)[0]]),
    "min": Case(lambda x: [x.min(), x.min(-1)[0]]),
    "max of two": Case(lambda x, y: [torch.max(x, y), x.max(y), torch.min(x, other=y)], ((3, 4), (3, 4))),
    "maximum": Case(lambda x, y: [torch.maximum(x, y), torch.fmax(x, y)], ((3, 4), (4,))),
    "minimum": Case(lambda x, y: [torch.minimum(x, y), torch.fmin(x, y)], ((3, 4), (4,))),
    "clamp": Case(lambda x, a, b: torch.clamp(x, a - 1, b + 1), ((3, 4), (4,), (4,))),
    "clamp_min": Case(lambda x, y: [torch.clamp_min(x, y), torch.clamp_max(x, y)], ((3, 4), (4,))),
    "amax": Case(lambda x: [x.amax(1), x.amax((2, 0), True), x.amax(), x.amin(-1), x.amin((0, 1))]),
    "aminmax": Case(lambda x: [*torch.aminmax(x), *x.aminmax(dim=1, keepdim=True)]),
    "median": Case(lambda x: [x.median(), x.median(1).values, x.nanmedian(-1).values, x.nanmedian()]),
    "mode": Case(lambda x: x.mode(-1).values),
    "sort": Case(lambda x: [x.sort(1).values, x.sort(dim=-1, descending=True)[0], torch.msort(x)]),
    "cummax": Case(lambda x: [x.cummax(1).values, torch.cummin(x, -1)[0]]),
    "topk": Case(lambda x: [x.topk(2, 1).values, x.kthvalue(2, -1).values]),
    "quantile": Case(lambda x: [x.quantile(0.3), x.quantile(0.7, 1), x.quantile(0.5, -1, True)]),
    "max_pool1d": Case(lambda x: [F.max_pool1d(x, 2), F.max_pool1d(x, 3, 2, 1, return_indices=True)[0]], (LINE,)),
    "adaptive_max_pool1d": Case(lambda x: [F.adaptive_max_pool1d(x, 3), F.adaptive_max_pool1d(x, 2, True)[0]], (LINE,)),
    "max_pool1d_with_indices": Case(lambda x: torch.max_pool1d_with_indices(x, 2)[0], (LINE,)),
    "max_unpool1d": Case(lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2), (LINE,)),
    "max_unpool2d of windows that share entries": Case(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 3, 1, 1, return_indices=True), 1), (IMAGE,), flat=True
    ),
    "max_pool3d": Case(lambda x: [F.max_pool3d(x, 2), F.adaptive_max_pool3d(x, 3)], (VOLUME,)),
    "max_unpool3d": Case(lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), (VOLUME,)),
    "avg_pool1d": Case(lambda x: [F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 3)], (LINE,)),
    "lp_pool1d": Case(lambda x: F.lp_pool1d(x, 3, 2), (LINE,), positive),
    "lp_pool3d": Case(lambda x: F.lp_pool3d(x, 1, 2), (VOLUME,), positive),
    "avg_pool3d": Case(
        lambda x: [F.avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, 3), F.dropout3d(x, 0.1, False)], (VOLUME,)
    ),
    "steps": Case(lambda x: x * torch.floor(3 * x) + torch.ceil(x) + torch.round(2 * x) * x + torch.trunc(3 * x)
                  + torch.fix(x) + torch.special.round(x, decimals=1) * x, flat=True),
    "remainder": Case(lambda x, y: [x % y, torch.fmod(x, y), x // y * y], ((3, 4), (4,)), positive, flat=True),
    "remainder of numbers": Case(lambda x: [x % 0.7, 3 % x, 5 // x * x, x.frac()], within=positive, flat=True),
    "division of integers": Case(
        lambda x, y: [torch.div(x, y, rounding_mode=mode) * x for mode in ("floor", "trunc")], ((3, 4), (4,)), flat=True
    ),
    "heaviside": Case(lambda x, y: torch.heaviside(x, y) * x, ((3, 4), (4,)), flat=True),
    "copysign": Case(lambda x, y: [torch.copysign(x, y), x.copysign(-1.0)], ((3, 4), (3, 4))),
}  # fmt: skip
"""Functions in which the input chooses, rounds or bounds."""

# --- Functions of two, statistics and norms -----------------------------------------------------------------------

COMPOSED: dict[str, Case] = {
    "detach": Case(lambda x: [x.detach() * 2 + x.data, torch.detach_copy(x), x * (1 - x.detach())], flat=True),
    "add": Case(lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=3), ((3, 4), (4,))),
    "div": Case(lambda x, y: [x / y, torch.divide(x, y), 2 / y], ((3, 4), (4,)), positive),
    "complex copies": Case(
        lambda x: torch.view_as_real_copy(torch.view_as_complex_copy(x.unflatten(-1, (2, 2)))), flat=True
    ),
    "pow": Case(lambda x, y: [x**y, torch.float_power(x, y), 2**y], ((3, 4), (4,)), positive),
    "xlogy": Case(lambda x, y: [torch.xlogy(x, y), torch.special.xlog1py(x, y)], ((3, 4), (4,)), positive),
    "mvlgamma": Case(lambda x: [torch.mvlgamma(x + 1, 3), torch.special.multigammaln(x + 1, 2)], within=positive),
    "ldexp": Case(torch.ldexp, ((3, 4), (4,))),
    "hypot": Case(torch.hypot, ((3, 4), (4,))),
    "atan2": Case(lambda x, y: [torch.atan2(x, y), torch.arctan2(y, x)], ((5, 4), (4,))),
    "logaddexp": Case(lambda x, y: [torch.logaddexp(x, y), torch.logaddexp2(x, y)], ((3, 4), (4,))),
    "logcumsumexp": Case(lambda x: [x.logcumsumexp(1), torch.logcumsumexp(300 * x, -1)]),
    "logsumexp": Case(lambda x: [x.logsumexp((0, 2)), torch.special.logsumexp(x, 1)]),
    "softmax": Case(lambda x: [torch.special.softmax(x, -1), torch.special.log_softmax(x, 1), F.softmin(x, 1),
                                 torch.log_softmax(x, 1, x.dtype), torch.softmax(x, 1, x.dtype)]),
    "prelu": Case(F.prelu, ((2, 3, 4), (3,))),
    "prelu of one": Case(lambda x, w: [F.prelu(x, w), F.prelu(x[0], w)], ((4,), (1,))),
    "single numbers": Case(lambda x: [x.sum().amax(), x.sum().prod(), x.sum().cumprod(0), x.sum().logcumsumexp(0),
                                      x.sum().quantile(0.5)]),
    "glu": Case(lambda x: F.glu(x, -1)),
    "rrelu": Case(lambda x: F.rrelu(x, 0.1, 0.3)),
    "var": Case(lambda x: [x.var(), x.var(False), *torch.var_mean(x, (0, 1)), *torch.std_mean(x, 2, keepdim=True),
                             *torch.var_mean(x, keepdim=True)]),
    "std": Case(lambda x: [x.std(1), *torch.var_mean(x), *torch.std_mean(x, dim=1, correction=0)]),
    "cov": Case(lambda x: [x[0].cov(), x[0, 0].cov(), x[0, :1].cov(), torch.corrcoef(x[1]), torch.corrcoef(x[1, 1])]),
    "norm": Case(lambda x: [x.norm(), x.norm(3, 1), x.norm(float("inf"), -1), torch.norm(x, 2, (0, 1), True),
                              x.norm(-torch.inf, 1), x.norm(-1, 1)]),
    "linalg norm": Case(lambda x: [torch.linalg.norm(x), torch.linalg.norm(x[0], "fro"), torch.linalg.norm(x, 1, -1)]),
    "matrix_norm": Case(lambda x: [torch.linalg.matrix_norm(x), torch.frobenius_norm(x, [1, 2], False)]),
    "vector_norm": Case(lambda x: torch.linalg.vector_norm(x, 3, dim=1)),
    "renorm": Case(lambda x: [x.renorm(2, 1, 2.8), x.renorm(1, -1, 3.0), torch.norm_except_dim(x, 2, 1),
                               torch.norm_except_dim(x, 2, -1)]),
    "normalize": Case(lambda x: F.normalize(x, 1, -1)),
    "dist": Case(lambda x, y: torch.dist(x, y, 3), ((3, 4), (3, 4))),
    "cosine_similarity": Case(
        lambda x, y: [F.cosine_similarity(x, y, -1), F.cosine_similarity(x[None], y[0], 1)], ((3, 4), (3, 4))
    ),
    "pairwise_distance": Case(lambda x, y: F.pairwise_distance(x, y, 1, keepdim=True), ((3, 4), (3, 4))),
    "cdist": Case(lambda x, y: [torch.cdist(x, y), torch.cdist(x, y, 1.0)], ((2, 3, 4), (2, 5, 4))),
    "pdist": Case(F.pdist, ((4, 3),)),
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, (4,), w, b), ((2, 3, 4), (4,), (4,))),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, (4,), w, 1e-3), ((2, 3, 4), (4,))),
    "group_norm": Case(lambda x, w, b: F.group_norm(x, 2, w, b), (LINE, (4,), (4,))),
    "batch_norm": Case(lambda x, w, b: F.batch_norm(x, like([0.1] * 4, x), like([0.5] * 4, x), w, b),
                       (IMAGE, (4,), (4,))),
    "batch_norm in the order of torch": Case(
        lambda x: torch.batch_norm(x, None, None, like([0.1] * 4, x), like([0.5] * 4, x), False, 0.1, 1e-3, False),
        ((2, 4),),
    ),
    "instance_norm": Case(lambda x, w, b: F.instance_norm(x, None, None, w, b), (LINE, (4,), (4,))),
    "instance_norm by what was learnt": Case(
        lambda x: F.instance_norm(x, like([0.1] * 4, x), like([0.5] * 4, x), use_input_stats=False), (LINE,)
    ),
    "scatter": Case(
        lambda x, y: [x.scatter(1, NUMBERS % 3, y[:, :1]), x.scatter_add(1, ROWS, y)], ((2, 3, 4), (2, 3, 4))
    ),
    "scatter_reduce": Case(
        lambda x, y: [x.scatter_reduce(1, ROWS, y, r, include_self=s) for r in ("sum", "mean") for s in (True, False)],
        ((2, 3, 4), (2, 3, 4)),
    ),
    "writing": Case(
        lambda x, y: [x.index_add(1, PLACES, y[:, :2]), x.index_copy(1, PLACES, y[:, :2]), torch.where(MASK, x, y),
                      x.index_put((torch.tensor([1, 0]),), y), x.put(NUMBERS, y[:, :1]), x.masked_scatter(MASK, y),
                      torch.clone(x).copy_(y) + torch.Tensor.copy_(x * 1, 2 * y)],
        ((2, 3, 4), (2, 3, 4)),
    ),
    "set": Case(lambda x, y: written(x * 1, y), ((2, 3, 4), (2, 4))),
    "set complex numbers": Case(lambda x, y: complex_writing(x, y), ((2, 3, 4), (2, 3, 4))),
}  # fmt: skip
"""Functions that are written in others."""


def written(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1] = y
    return x


def complex_writing(x: Tensor, y: Tensor) -> Tensor:
    z = torch.full((2, 3, 4), 1j, dtype=x.dtype.to_complex())
    z[:, 1] = x[:, 0]
    z.real[:, 0] = y[:, 1]
    z[:, 2].mul_(torch.complex(x[:, 1], y[:, 2]))
    parts = torch.zeros(3, 4, 2, dtype=x.dtype)
    torch.view_as_complex(parts)[1:].copy_(z[0, 1:])
    return z[1] + torch.view_as_complex(parts)


# --- Attention and recurrent networks -----------------------------------------------------------------------------

HEADS = (2, 2, 3, 4)


def multi_head(q: Tensor, k: Tensor, v: Tensor, w: Tensor, out: Tensor) -> Any:
    bias = torch.zeros(12, dtype=w.dtype)
    return F.multi_head_attention_forward(
        q, k, v, 4, 2, w, bias, None, None, False, 0.0, out, None, training=False, need_weights=True
    )


def of_all_layers(call: Callable[..., Any], x: Tensor, *states: Tensor, gates: int, options: Any) -> Any:
    """A network of two layers in both directions, its weights constants of the type of the input."""
    made = torch.Generator().manual_seed(0)
    hidden = states[0].shape[-1]
    shapes = [(x.shape[-1], hidden), (x.shape[-1], hidden), (2 * hidden, hidden), (2 * hidden, hidden)]
    weights = [
        like(torch.randn(shape, generator=made) / 2, x)
        for inputs, H in shapes for shape in ((gates * H, inputs), (gates * H, H), (gates * H,), (gates * H,))
    ]  # fmt: skip
    state = states if len(states) > 1 else states[0]
    return call(x, state, weights, *options)


def network(name: str, gates: int) -> Callable[..., Any]:
    options = (True, 2, 0.0, False, True, False)
    return lambda x, *states: of_all_layers(getattr(torch._VF, name), x, *states, gates=gates, options=options)


LAYERS: dict[str, Case] = {
    "attention": Case(F.scaled_dot_product_attention, (HEADS, HEADS, HEADS)),
    "causal attention": Case(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
        (HEADS, (2, 2, 5, 4), (2, 2, 5, 4)),
    ),
    "attention of groups": Case(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), ((2, 4, 3, 4), (2, 2, 5, 4))
    ),
    "attention with a bias": Case(
        lambda q, k, b: F.scaled_dot_product_attention(q, k, k, attn_mask=b), (HEADS, HEADS, (3, 3))
    ),
    "attention that sees nothing": Case(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=torch.tensor([[True], [False], [True]])),
        (HEADS, HEADS),
    ),
    "multi_head_attention": Case(
        multi_head, ((3, 2, 4), (5, 2, 4), (5, 2, 4), (12, 4), (4, 4)), traced=((0, 1, 2), (0,), (1,), (2,))
    ),
    "lstm": Case(network("lstm", 4), ((5, 2, 3), (4, 2, 4), (4, 2, 4))),
    "gru": Case(network("gru", 3), ((5, 2, 3), (4, 2, 4))),
    "rnn_tanh": Case(network("rnn_tanh", 1), ((5, 2, 3), (4, 2, 4))),
    "rnn_relu": Case(network("rnn_relu", 1), ((5, 2, 3), (4, 2, 4))),
    "lstm_cell": Case(
        lambda x, h, c, w, u: torch.lstm_cell(x, (h, c), w, u), ((2, 3), (2, 4), (2, 4), (16, 3), (16, 4))
    ),
    "gru_cell": Case(torch.gru_cell, ((2, 3), (2, 4), (12, 3), (12, 4), (12,), (12,))),
    "rnn_tanh_cell": Case(torch.rnn_tanh_cell, ((2, 3), (2, 4), (4, 3), (4, 4), (4,), (4,))),
    "rnn_relu_cell": Case(torch.rnn_relu_cell, ((2, 3), (2, 4), (4, 3), (4, 4), (4,), (4,))),
}  # fmt: skip
"""Attention and recurrent networks."""

# --- Losses -------------------------------------------------------------------------------------------------------

REDUCTIONS = ("none", "mean", "sum")


def reductions(loss: Callable[..., Tensor], *constants: Any, **options: Any) -> Callable[..., list[Tensor]]:
    """The loss with each of the reductions."""
    return lambda *tensors: [loss(*tensors, *constants, reduction=name, **options) for name in REDUCTIONS]


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return F.linear_cross_entropy(x, weight, CLASSES, linear_bias=bias, ignore_index=1, label_smoothing=0.1)


TWO = ((3, 4), (3, 4))
LOSSES: dict[str, Case] = {
    "mse_loss": Case(lambda x, y, w: [*reductions(F.mse_loss)(x, y), F.mse_loss(x, y, weight=w.abs())], (*TWO, (3, 4))),
    "l1_loss": Case(reductions(F.l1_loss), TWO),
    "smooth_l1_loss": Case(reductions(F.smooth_l1_loss, beta=0.5), TWO),
    "huber_loss": Case(reductions(F.huber_loss, delta=0.7), TWO),
    "binary_cross_entropy": Case(reductions(F.binary_cross_entropy), TWO, unit),
    "binary_cross_entropy of a weight": Case(
        lambda x, y, w: F.binary_cross_entropy(x, y, w), (*TWO, (4,)), unit, traced=((0, 1), (0,))
    ),
    "binary_cross_entropy_with_logits": Case(
        lambda x, y: [*reductions(F.binary_cross_entropy_with_logits)(x, y.sigmoid()),
                      F.binary_cross_entropy_with_logits(x, y.sigmoid(), pos_weight=like(2.0, x))], TWO,
    ),
    "kl_div": Case(
        lambda x, y: [*reductions(F.kl_div)(x, y.exp()), F.kl_div(x, y, reduction="batchmean", log_target=True)], TWO
    ),
    "poisson_nll_loss": Case(
        lambda x, y: [*reductions(F.poisson_nll_loss)(x, y), F.poisson_nll_loss(x, 2 * y, False, True)], TWO, positive
    ),
    "soft_margin_loss": Case(reductions(F.soft_margin_loss, SIGNS.unsqueeze(1)), ((3, 4),)),
    "hinge_embedding_loss": Case(reductions(F.hinge_embedding_loss, SIGNS.unsqueeze(1)), ((3, 4),)),
    "margin_ranking_loss": Case(reductions(F.margin_ranking_loss, SIGNS.unsqueeze(1), 0.5), TWO),
    "cosine_embedding_loss": Case(reductions(F.cosine_embedding_loss, SIGNS, 0.1), TWO),
    "triplet_margin_loss": Case(
        lambda x, y, z: [*reductions(F.triplet_margin_loss)(x, y, z), F.triplet_margin_loss(x, y, z, swap=True)],
        (*TWO, (3, 4)),
    ),
    "triplet_margin_with_distance_loss": Case(reductions(F.triplet_margin_with_distance_loss), (*TWO, (3, 4))),
    "gaussian_nll_loss": Case(lambda x, y, v: F.gaussian_nll_loss(x, y, v.exp(), full=True), (*TWO, (3, 4))),
    "nll_loss": Case(
        lambda x, w: [*reductions(F.nll_loss, CLASSES)(x), F.nll_loss(x, CLASSES, w.exp(), ignore_index=0)],
        ((3, 4), (4,)),
        traced=((0,),),
    ),
    "cross_entropy": Case(
        lambda x: [*reductions(F.cross_entropy, CLASSES)(x),
                   *reductions(F.cross_entropy, CLASSES, label_smoothing=0.1)(x),
                   F.cross_entropy(x, CLASSES, like([1, 2, 3, 4], x), ignore_index=1, label_smoothing=0.2)], ((3, 4),),
    ),
    "cross_entropy of probabilities": Case(
        lambda x, y: [reductions(F.cross_entropy, label_smoothing=s)(x, y.softmax(1)) for s in (0.0, 0.1)][-1], TWO
    ),
    "cross_entropy of images": Case(lambda x: F.cross_entropy(x, torch.arange(8).view(2, 4) % 3), ((2, 3, 4),)),
    "linear_cross_entropy": Case(
        lambda x, w, b: [*reductions(F.linear_cross_entropy, CLASSES)(x, w), linear_cross_entropy(x, w, b)],
        ((3, 5), (4, 5), (4,)),
    ),
    "multi_margin_loss": Case(
        lambda x: [*reductions(F.multi_margin_loss, CLASSES)(x),
                   F.multi_margin_loss(x, CLASSES, 2, 0.5, like([1, 2, 3, 4], x))],
        ((3, 4),),
    ),
    "multilabel_soft_margin_loss": Case(lambda x, y: F.multilabel_soft_margin_loss(x, y.sigmoid()), TWO),
}  # fmt: skip
"""Losses."""

GROUPS = (PRODUCTS, CHOICES, COMPOSED, LAYERS, LOSSES)
CASES: dict[str, Case] = {
    **{f"{name} (linear)": Case(function) for name, function in LINEAR.items()},
    **{f"{name} (image)": Case(function, (IMAGE,)) for name, function in IMAGES.items()},
    **{f"{name} (complex)": Case(function) for name, function in FOURIER.items()},
    **{name: case for group in GROUPS for name, case in group.items()},
}
"""All of them, by what they are called."""
