"""One file for each kernel. Importing this package registers all adapters."""

from captum_ssm.adapters import blocks as blocks
from captum_ssm.adapters import delta as delta
from captum_ssm.adapters import fla_delta as fla_delta
from captum_ssm.adapters import fla_linear as fla_linear
from captum_ssm.adapters import fla_rwkv as fla_rwkv
from captum_ssm.adapters import fla_softmax as fla_softmax
from captum_ssm.adapters import lightning as lightning
from captum_ssm.adapters import mamba3 as mamba3
from captum_ssm.adapters import mlstm as mlstm
from captum_ssm.adapters import rg_lru as rg_lru
from captum_ssm.adapters import s6 as s6
from captum_ssm.adapters import short_conv as short_conv
from captum_ssm.adapters import softmax as softmax
from captum_ssm.adapters import ssd as ssd
from captum_ssm.adapters import wkv as wkv
