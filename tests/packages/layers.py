"""The layers of the packages, built small, with their oracles."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.families import perturbed
from tests.packages import oracles, stand_ins

with stand_ins.installed():
    from mambapy import vim
    from mambapy.mamba import MambaBlock, MambaConfig
    from mambavision.models.mamba_vision import MambaVisionMixer
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM
    from mlstm_kernels.torch.backend_module import mLSTMBackendConfig
    from recurrentgemma.torch import LocalAttentionBlock, RecurrentBlock
    from rwkv7_hf import RWKV7ChannelMix, RWKV7Config, RWKV7TimeMix
    from s5.s5_model import S5
    from torchscale.architecture.retnet import RetNetRelPos
    from torchscale.component.multiscale_retention import MultiScaleRetention
    from xlstm import mLSTMLayer, mLSTMLayerConfig
    from xlstm.xlstm_large import model as xlstm_large

E, L = 16, 8


class Record(NamedTuple):
    """One layer."""

    make: Callable[[], nn.Module]
    oracle: Callable[[Any, Tensor], oracles.Written]
    factors: str
    """Of its chain, in the order of the equation."""
    causal: bool = True
    arguments: Callable[[int], dict[str, Any]] = lambda batch: {}
    """The layer's other arguments, by name, for a batch of this size."""

    def build(self) -> Any:
        torch.manual_seed(0)
        return perturbed(self.make())


def mamba_block(**options: Any) -> nn.Module:
    return MambaBlock(MambaConfig(d_model=E, n_layers=1, d_state=3, **options))


def vision_block(**options: Any) -> nn.Module:
    return vim.VMambaBlock(vim.MambaConfig(d_model=E, n_layers=1, d_state=3, **options))


def s5(width: int = E, **options: Any) -> nn.Module:
    return S5(width, 8, **options)


def mlstm(**options: Any) -> nn.Module:
    return mLSTMLayer(mLSTMLayerConfig(embedding_dim=E, num_heads=4, context_length=L, **options))


def large_mlstm(weight_mode: str, use_bias: bool) -> nn.Module:
    """On the kernels in torch: the default ones are written in triton, for a GPU."""
    backend = mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
        chunk_size=4, mode="inference", return_last_states=False,
    )  # fmt: skip
    options: dict[str, Any] = {"weight_mode": weight_mode, "use_bias": use_bias, "mlstm_backend": backend}
    return xlstm_large.mLSTMLayer(xlstm_large.mLSTMLayerConfig(embedding_dim=E, num_heads=2, **options))


def retention() -> nn.Module:
    return MultiScaleRetention(SimpleNamespace(multiway=False, layernorm_eps=1e-5), E, 2 * E, 4)


def positions(batch: int) -> dict[str, Any]:
    args = SimpleNamespace(decoder_embed_dim=E, decoder_retention_heads=4, recurrent_chunk_size=4)
    return {"rel_pos": RetNetRelPos(args)(L)}


RWKV7 = RWKV7Config(
    hidden_size=E, num_heads=4, head_dim=4, intermediate_size=24, decay_low_rank_dim=3, gate_low_rank_dim=5,
    a_low_rank_dim=3, v_low_rank_dim=2, num_hidden_layers=3,
)  # fmt: skip


def before(batch: int) -> dict[str, Any]:
    """No token before the first, and none masked."""
    return {"shift_state": torch.zeros(batch, E), "attention_mask": torch.ones(batch, L, dtype=torch.bool)}


def values(batch: int) -> dict[str, Any]:
    """The states before the first token, and the values of the model's first layer."""
    v_first = torch.randn(1, L, E, generator=torch.Generator().manual_seed(3)).expand(batch, -1, -1)
    return {**before(batch), "recurrent_state": torch.zeros(batch, 4, 4, 4), "v_first": v_first}


def places(batch: int) -> dict[str, Any]:
    """The positions of the tokens, from 0."""
    return {"segment_pos": torch.arange(L).expand(batch, -1), "return_cache": False}


SELECTIVE, BOTH_WAYS = "out gate scan act conv in", "out gate half directions in"
LAYERS: dict[str, Record] = {
    "mambapy: MambaBlock": Record(mamba_block, oracles.mambapy, SELECTIVE),
    "mambapy: norms and biases": Record(
        lambda: mamba_block(inner_layernorms=True, bias=True, conv_bias=False), oracles.mambapy, SELECTIVE
    ),
    "mambapy: norms without weights": Record(
        lambda: mamba_block(inner_layernorms=True, mup=True, pscan=False), oracles.mambapy, SELECTIVE
    ),
    "mambapy: VMambaBlock": Record(vision_block, oracles.mambapy_vision, BOTH_WAYS, causal=False),
    "mambapy: VMambaBlock, norms, a sum": Record(
        lambda: vision_block(inner_layernorms=True, divide_output=False, bias=True), oracles.mambapy_vision,
        "out gate directions in", causal=False,
    ),
    "mambapy: VMambaBlock, one direction": Record(
        lambda: vision_block(bidirectional=False), oracles.mambapy, SELECTIVE
    ),
    "mambavision: MambaVisionMixer": Record(
        lambda: MambaVisionMixer(E, d_state=3, expand=1), oracles.mambavision, "out scan act conv in", causal=False
    ),
    "mambavision: three taps, biases": Record(
        lambda: MambaVisionMixer(E, d_state=3, d_conv=3, bias=True), oracles.mambavision, "out scan act conv in",
        causal=False,
    ),
    "minGRU_pytorch: minGRU": Record(lambda: minGRU(E), oracles.min_gru, "scan act in"),
    "minGRU_pytorch: minGRU, wide": Record(lambda: minGRU(E, 1.5), oracles.min_gru, "out scan act in"),
    "minGRU_pytorch: minLSTM": Record(lambda: minLSTM(E, 1.5), oracles.min_lstm, "out scan act in"),
    "recurrentgemma: RecurrentBlock": Record(
        lambda: RecurrentBlock(E, 4, lru_width=24), oracles.griffin, "out gate scan conv in", arguments=places
    ),
    "recurrentgemma: LocalAttentionBlock": Record(
        lambda: LocalAttentionBlock(E, 2, window_size=3), oracles.local_attention, "out attention in", arguments=places
    ),
    "rwkv7_hf: RWKV7TimeMix, first": Record(
        lambda: RWKV7TimeMix(RWKV7, 0), oracles.wkv7, "out gate heads padding value shift mask", arguments=values
    ),
    "rwkv7_hf: RWKV7TimeMix, later": Record(
        lambda: RWKV7TimeMix(RWKV7, 1), oracles.wkv7, "out gate heads padding mix value shift mask", arguments=values
    ),
    "rwkv7_hf: RWKV7ChannelMix": Record(
        lambda: RWKV7ChannelMix(RWKV7), oracles.channel_mix7, "value act key shift mask", arguments=before
    ),
    "s5: S5": Record(s5, oracles.s5, "out scan in"),
    "s5: two blocks, odd width": Record(lambda: s5(7, block_count=2), oracles.s5, "out scan in"),
    "s5: both ways": Record(lambda: s5(bidir=True), oracles.s5, "directions", causal=False),
    "torchscale: MultiScaleRetention": Record(
        retention, oracles.retention, "out gate norm attention in", arguments=positions
    ),
    "xlstm: mLSTMLayer": Record(mlstm, oracles.mlstm, "out gate paths in"),
    "xlstm: mLSTMLayer, biases": Record(
        lambda: mlstm(bias=True, qkv_proj_blocksize=8, proj_factor=1.0), oracles.mlstm, "out gate paths in"
    ),
    "xlstm: 7B": Record(
        lambda: large_mlstm("single", False), oracles.large_mlstm, "out gate norm scan centre in"
    ),
    "xlstm: 7B, fused, biases": Record(
        lambda: large_mlstm("fused", True), oracles.large_mlstm, "out gate norm scan centre in"
    ),
}  # fmt: skip


def width(layer: nn.Module) -> int:
    """E, the number of channels that the layer reads."""
    return layer.width if isinstance(layer, S5) else E
