"""Language models of Mamba, Mamba-2 and attention blocks."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import namedtuple
from dataclasses import asdict, fields
from functools import partial
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor, nn

from .config import MambaConfig
from .generation import GenerationMixin
from .hub import load_config_hf, load_state_dict_hf
from .modules.block import Block, add_norm
from .modules.mamba import Mamba
from .modules.mamba2 import Mamba2
from .modules.mha import MHA
from .modules.mlp import GatedMLP
from .modules.norm import RMSNorm

__all__ = ["CausalLMOutput", "MambaLMHeadModel", "MixerModel", "create_block"]

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

_MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: Optional[dict[str, Any]] = None,
    attn_layer_idx: Optional[list[int]] = None,
    attn_cfg: Optional[dict[str, Any]] = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: Optional[int] = None,
    device: Any = None,
    dtype: Optional[torch.dtype] = None,
) -> Block:
    """A block with the mixer that a configuration gives layer `layer_idx`; arguments as
    `MambaConfig`'s fields.

    Raises:
        ValueError: for an ssm_cfg whose "layer" is neither "Mamba1" nor "Mamba2".
    """
    made = {"device": device, "dtype": dtype}
    mixer_cls: Callable[[int], nn.Module]
    if layer_idx in (attn_layer_idx or []):
        mixer_cls = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **made)
    else:
        arguments = copy.deepcopy(ssm_cfg or {})
        layer = arguments.pop("layer", "Mamba1")
        if layer not in _MIXERS:
            raise ValueError(
                f"[create_block] ssm_cfg's layer is {layer!r}, expected 'Mamba1' or 'Mamba2'"
            )
        mixer_cls = partial(_MIXERS[layer], layer_idx=layer_idx, **arguments, **made)
    mlp_cls: Callable[[int], nn.Module] = nn.Identity
    if d_intermediate > 0:
        mlp_cls = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **made)
    norm_cls = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made)
    block = Block(
        d_model,
        mixer_cls,
        mlp_cls,
        norm_cls=norm_cls,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Biases 0 but those marked _no_reinit, embeddings normal, and projections into the residual
    stream scaled by 1 / sqrt(number of residual branches) (Radford et al. 2019, "Language models
    are unsupervised multitask learners").
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and a final norm; arguments as `MambaConfig`'s fields.

    Args:
        norm_epsilon: added to the norms' mean square or variance.
        initializer_cfg: of the weights: initializer_range, rescale_prenorm_residual,
            n_residuals_per_layer.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: Optional[dict[str, Any]] = None,
        attn_layer_idx: Optional[list[int]] = None,
        attn_cfg: Optional[dict[str, Any]] = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Optional[dict[str, Any]] = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate=d_intermediate,
                ssm_cfg=ssm_cfg,
                attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg,
                norm_epsilon=norm_epsilon,
                rms_norm=rms_norm,
                residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm,
                layer_idx=i,
                **made,
            )
            for i in range(n_layer)
        )
        norm_cls = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm_cls(d_model, eps=norm_epsilon, **made)
        residuals = {"n_residuals_per_layer": 1 if d_intermediate == 0 else 2}
        self.apply(
            partial(_init_weights, n_layer=n_layer, **{**residuals, **(initializer_cfg or {})})
        )

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> dict[int, Any]:
        """Zeroed states of all layers, as ``InferenceParams.key_value_memory_dict`` holds them."""
        return {
            i: layer.allocate_inference_cache(  # type: ignore[operator]
                batch_size, max_seqlen, dtype=dtype, **kwargs
            )
            for i, layer in enumerate(self.layers)
        }

    def forward(
        self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any
    ) -> Tensor:
        """input_ids (B, L) to hidden states (B, L, d_model); mixer_kwargs go to every mixer
        (seq_idx, ...).
        """
        hidden_states = self.embedding(input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        if self.fused_add_norm:
            return add_norm(
                self.norm_f, hidden_states, residual, self.residual_in_fp32, prenorm=False
            )
        total = hidden_states if residual is None else hidden_states + residual
        return self.norm_f(total.to(dtype=self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: `MixerModel` and a head over the vocabulary.

    Args:
        config: what it consists of.
        initializer_cfg: as `MixerModel`'s.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Optional[dict[str, Any]] = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = (config.vocab_size + multiple - 1) // multiple * multiple
        made = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **made,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **made)
        # Once more over all weights, as published models were: the second pass counts one residual
        # branch a layer.
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head's weights the embedding's, with tie_embeddings."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> dict[int, Any]:
        """Zeroed states of all layers, as ``InferenceParams.key_value_memory_dict`` holds them."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Any = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """Logits of what follows each token.

        Args:
            input_ids: (B, L).
            position_ids: not used: positions follow from inference_params.
            inference_params: states to start from and to leave.
            num_last_tokens: logits of so many tokens at the end alone; 0: of all.

        Returns:
            ``CausalLMOutput`` with logits (B, L or num_last_tokens, vocabulary).
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: Union[str, "os.PathLike[str]"],
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """The model of a folder or hub repository.

        Args:
            pretrained_model_name: a folder or hub repository with config.json and weights.
            device, dtype: of the model's parameters.
            kwargs: of the constructor.

        Raises:
            FileNotFoundError: where there is no such folder, repository or file.
            ValueError: for a config.json of another kind of model, or with unknown fields.
        """
        found = load_config_hf(pretrained_model_name)
        known = {f.name for f in fields(MambaConfig)}
        if "d_model" not in found or "n_layer" not in found:
            raise ValueError(
                f"[from_pretrained] the config.json of {str(pretrained_model_name)!r} has "
                f"{sorted(found)[:6]}..., expected one with d_model and n_layer"
            )
        unknown = sorted(set(found) - known)
        if unknown:
            raise ValueError(
                f"[from_pretrained] the config.json of {str(pretrained_model_name)!r} has unknown "
                f"fields {unknown}, expected {sorted(known)}"
            )
        model = cls(MambaConfig(**found), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name))
        return model

    def save_pretrained(self, save_directory: Union[str, "os.PathLike[str]"]) -> None:
        """Writes pytorch_model.bin and config.json into a folder, which is made where it does not
        exist.
        """
        os.makedirs(save_directory, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(save_directory, "pytorch_model.bin"))
        with open(os.path.join(save_directory, "config.json"), "w", encoding="utf-8") as file:
            json.dump(asdict(self.config), file, indent=4)
