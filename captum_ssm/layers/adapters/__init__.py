"""The adapters of all layers that the package knows, one file for each kernel. An import registers them all."""

from captum_ssm.layers.adapters import blocks as blocks
from captum_ssm.layers.adapters import delta as delta
from captum_ssm.layers.adapters import fla_channel_mixing as fla_channel_mixing
from captum_ssm.layers.adapters import fla_delta as fla_delta
from captum_ssm.layers.adapters import fla_linear as fla_linear
from captum_ssm.layers.adapters import fla_rwkv6 as fla_rwkv6
from captum_ssm.layers.adapters import fla_rwkv7 as fla_rwkv7
from captum_ssm.layers.adapters import fla_softmax as fla_softmax
from captum_ssm.layers.adapters import lightning as lightning
from captum_ssm.layers.adapters import mamba3 as mamba3
from captum_ssm.layers.adapters import mambapy as mambapy
from captum_ssm.layers.adapters import mambavision as mambavision
from captum_ssm.layers.adapters import mha as mha
from captum_ssm.layers.adapters import min_rnn as min_rnn
from captum_ssm.layers.adapters import mlstm as mlstm
from captum_ssm.layers.adapters import native_s6 as native_s6
from captum_ssm.layers.adapters import native_ssd as native_ssd
from captum_ssm.layers.adapters import recurrentgemma as recurrentgemma
from captum_ssm.layers.adapters import rg_lru as rg_lru
from captum_ssm.layers.adapters import s5 as s5
from captum_ssm.layers.adapters import s6 as s6
from captum_ssm.layers.adapters import short_conv as short_conv
from captum_ssm.layers.adapters import softmax as softmax
from captum_ssm.layers.adapters import ssd as ssd
from captum_ssm.layers.adapters import torchscale as torchscale
from captum_ssm.layers.adapters import wkv as wkv
