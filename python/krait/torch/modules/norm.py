"""Normalisation layers: RMSNorm and LayerNorm with a fused residual addition, and the gated ones of
Mamba-2.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import norm

__all__ = ["GatedLayerNorm", "GatedRMSNorm", "LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019), with a
    learnt scale.

    Args:
        hidden_size: channels.
        eps: added to the mean square.
        dropout_p: probability of zeroing an element of x before the residual is added, in training.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Optional[Tensor] = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """x (..., C), residual (..., C) to norm(x + residual) in x's dtype; with prenorm also x +
        residual.
        """
        if self.dropout_p > 0.0 and self.training:
            x = F.dropout(x, self.dropout_p)
        return norm(
            x,
            self.weight,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, with a fused residual addition."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        residual: Optional[Tensor] = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """x (..., C), residual (..., C) to norm(x + residual) in x's dtype; with prenorm also x +
        residual.
        """
        return norm(
            x,
            self.weight,
            self.bias,
            kind="layer",
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class _Gated(nn.Module):
    kind: str

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: Optional[int] = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        if self.kind == "layer":
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Optional[Tensor] = None) -> Tensor:
        """x (..., C) and gate z (..., C) to norm(x) silu(z), or norm(x silu(z)) without
        norm_before_gate.
        """
        return norm(
            x,
            self.weight,
            self.bias,
            kind=self.kind,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )


class GatedRMSNorm(_Gated):
    """RMSNorm with a gate (Dao and Gu 2024, "Transformers are SSMs", section 7.2).

    Args:
        hidden_size: channels.
        eps: added to the mean square.
        group_size: channels normalised together, a divisor of hidden_size; None: all.
        norm_before_gate: norm(x) silu(z) if true, else norm(x silu(z)).
    """

    kind = "rms"


class GatedLayerNorm(_Gated):
    """LayerNorm with a gate; arguments as `GatedRMSNorm`'s."""

    kind = "layer"
