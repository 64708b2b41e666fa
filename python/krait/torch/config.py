"""The configuration of a Mamba language model, as its config.json spells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """What a ``MambaLMHeadModel`` consists of.

    Attributes:
        d_model: channels of the residual stream.
        d_intermediate: width of the gated MLPs; 0: none.
        n_layer: blocks.
        vocab_size: token ids; padded up to a multiple of pad_vocab_size_multiple.
        ssm_cfg: arguments of the mixers, and "layer": "Mamba1" (the default) or "Mamba2".
        attn_layer_idx: blocks whose mixer is attention.
        attn_cfg: arguments of ``MHA``.
        rms_norm: RMSNorm, else LayerNorm.
        residual_in_fp32: the residual stream is float32.
        fused_add_norm: addition and norm in one operator.
        pad_vocab_size_multiple: what the vocabulary is rounded up to.
        tie_embeddings: the head's weights are the embedding's.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
