"""Krait's operators on PyTorch tensors: differentiable, on CPUs and GPUs, whole under
``torch.compile``.
"""

from __future__ import annotations

from ._ops.causal_conv1d import causal_conv1d, causal_conv1d_update, causal_conv1d_varlen_states
from ._ops.cross_entropy import cross_entropy, linear_cross_entropy
from ._ops.gated_silu import gated_silu
from ._ops.norm import norm
from ._ops.selective_scan import selective_scan
from ._ops.split_conv1d_scan import split_conv1d_scan
from ._ops.ssd import ssd
from ._ops.state_update import state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "cross_entropy",
    "gated_silu",
    "linear_cross_entropy",
    "norm",
    "selective_scan",
    "split_conv1d_scan",
    "ssd",
    "state_update",
]
