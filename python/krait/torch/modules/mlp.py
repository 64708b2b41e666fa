"""The gated MLP of hybrid models."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import gated_silu

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """fc2(y activation(gate)) with [y, gate] = fc1(x) (Shazeer 2020, "GLU variants improve
    Transformer").

    Args:
        in_features: channels of the input.
        hidden_features: width between the layers, rounded up to a multiple of multiple_of; None:
            8/3 in_features.
        out_features: channels of the output; None: in_features.
        activation: of the gate.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = (hidden + multiple_of - 1) // multiple_of * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        if self.activation is F.silu:
            return self.fc2(gated_silu(y, gate))
        return self.fc2(y * self.activation(gate))
