"""A residual block around a mixer."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from ..functional import norm
from .norm import RMSNorm

__all__ = ["Block", "add_norm"]


def add_norm(
    layer: nn.Module,
    hidden_states: Tensor,
    residual: Optional[Tensor],
    residual_in_fp32: bool,
    prenorm: bool = True,
) -> Any:
    """norm(hidden_states + residual) by an RMSNorm or LayerNorm in one operator; with prenorm also
    the sum.
    """
    return norm(
        hidden_states,
        layer.weight,  # type: ignore[arg-type]
        layer.bias,  # type: ignore[arg-type]
        kind="rms" if isinstance(layer, RMSNorm) else "layer",
        residual=residual,
        eps=layer.eps,  # type: ignore[arg-type]
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


class Block(nn.Module):
    """Add -> Norm -> Mixer, and Add -> Norm -> MLP where there is one.

    The sum comes first, so that it fuses with the normalisation: what a block returns is its last
    layer's output beside the residual that it is yet to be added to.

    Args:
        dim: channels.
        mixer_cls: makes the mixer, given dim.
        mlp_cls: makes the MLP, given dim; nn.Identity: there is none.
        norm_cls: makes a norm, given dim.
        fused_add_norm: addition and norm in one operator; the norm is an RMSNorm or nn.LayerNorm
            then.
        residual_in_fp32: the residual is carried in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: Optional[nn.Module] = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise TypeError(
                f"[Block] norm_cls makes a {type(self.norm).__name__}, expected an RMSNorm or "
                "nn.LayerNorm with fused_add_norm"
            )

    def _add_norm(
        self, layer: nn.Module, hidden_states: Tensor, residual: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return add_norm(layer, hidden_states, residual, self.residual_in_fp32)
        total = hidden_states if residual is None else hidden_states + residual
        normed = layer(total.to(dtype=layer.weight.dtype))  # type: ignore[arg-type]
        if self.residual_in_fp32 and total.dtype is not torch.float64:
            total = total.float()
        return normed, total

    def forward(
        self,
        hidden_states: Tensor,
        residual: Optional[Tensor] = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(hidden_states, residual) (..., dim) of the block before to those of this one."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> Any:
        """The mixer's state for batch_size sequences of up to max_seqlen tokens."""
        return self.mixer.allocate_inference_cache(  # type: ignore[operator]
            batch_size, max_seqlen, dtype=dtype, **kwargs
        )
