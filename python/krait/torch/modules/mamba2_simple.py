"""The simpler Mamba-2 block of the paper's code."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..functional import split_conv1d_scan
from ._parameters import require_hidden_states
from .mamba2 import Mamba2

__all__ = ["Mamba2Simple"]


class Mamba2Simple(Mamba2):
    """`Mamba2` without d_ssm and inference, always with norm(y silu(z)), optionally with learnt
    initial states.

    Args:
        learnable_init_states: the recurrence starts from the parameter init_states (H, P, N),
            initially 0.
        activation: of the convolution: "silu" or "swish" (the same).
        others: as `Mamba2`'s.
    """

    no_weight_decay = ("A_log", "D", "dt_bias", "init_states")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: Optional[float] = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: Optional[int] = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            conv_init=conv_init,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.learnable_init_states = learnable_init_states
        self.activation = activation
        if learnable_init_states:
            self.init_states = nn.Parameter(
                torch.zeros(self.nheads, self.headdim, d_state, device=device, dtype=dtype)
            )
        self.mark_parameters()

    def forward(  # type: ignore[override]
        self, u: Tensor, seq_idx: Optional[Tensor] = None
    ) -> Tensor:
        """Mixes u (B, L, d_model) over time: (B, L, d_model). seq_idx (B, L): documents packed into
        rows.
        """
        require_hidden_states("Mamba2Simple", u, self.d_model)
        zxbcdt = self.in_proj(u)
        states = None
        if self.learnable_init_states:
            states = self.init_states.expand(u.shape[0], -1, -1, -1)
        if not self.use_mem_eff_path:
            return self.out_proj(self._mix(zxbcdt, seq_idx, None, None, states))
        y = split_conv1d_scan(
            zxbcdt,
            self._conv_weight(),
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self._D(),
            headdim=self.headdim,
            ngroups=self.ngroups,
            activation=self.activation,
            norm_weight=self.norm.weight,
            norm_eps=self.norm.eps,
            norm_before_gate=False,
            dt_limit=self.dt_limit,
            initial_states=states,
            seq_idx=seq_idx,
        )
        return self.out_proj(y)
