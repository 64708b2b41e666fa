"""Krait for PyTorch: differentiable operators, layers and language models, on CPUs and GPUs.

krait.torch.functional   operators on tensors: selective_scan, ssd, causal_conv1d, norm, ...
krait.torch.Mamba, ...   layers with the parameter names of published checkpoints
krait.torch.MambaLMHeadModel.from_pretrained(...)   language models
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "krait.torch needs PyTorch 2.4 or newer, which is not installed: "
        "pip install krait-ssm[torch]",
        name="torch",
    ) from None

from . import functional
from .config import MambaConfig
from .generation import InferenceParams
from .models import CausalLMOutput, MambaLMHeadModel, MixerModel, create_block
from .modules.block import Block
from .modules.mamba import Mamba
from .modules.mamba2 import Mamba2
from .modules.mamba2_simple import Mamba2Simple
from .modules.mha import MHA
from .modules.mlp import GatedMLP
from .modules.norm import GatedLayerNorm, GatedRMSNorm, LayerNorm, RMSNorm

__all__ = [
    "Block",
    "CausalLMOutput",
    "GatedLayerNorm",
    "GatedMLP",
    "GatedRMSNorm",
    "InferenceParams",
    "LayerNorm",
    "MHA",
    "Mamba",
    "Mamba2",
    "Mamba2Simple",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "create_block",
    "functional",
]
