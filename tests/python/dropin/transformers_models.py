"""Tiny random models of transformers that scan, and what they compute.

Run as a program it hides mamba_ssm and causal_conv1d, so that transformers takes its own slow path,
and saves the results of all models into the file that it is given.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Optional

import torch

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}

# Class, configuration class, arguments of the configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {**SMALL, "num_hidden_layers": 2, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **SMALL,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {**SMALL, "num_hidden_layers": 2, "state_size": 8},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **SMALL,
            **ATTENTION,
            "num_hidden_layers": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
        },
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {
            **SMALL,
            **ATTENTION,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 2,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "chunk_size": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **SMALL,
            **ATTENTION,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "granite_hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **SMALL,
            **ATTENTION,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **SMALL,
            **ATTENTION,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {
            **SMALL,
            **ATTENTION,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
}


class Warnings(logging.Handler):
    """Collects what transformers says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def make(name: str) -> Any:
    import transformers

    model_name, config_name, arguments = MODELS[name]
    config = getattr(transformers, config_name)(
        **arguments, bos_token_id=0, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            # Initial weights of 0.02 would hide most of what goes on behind the embedding.
            if parameter.dim() == 2 and "A_log" not in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def loss_and_gradients(
    model: Any, ids: torch.Tensor, labels: Optional[torch.Tensor] = None, **arguments: Any
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids, labels=ids if labels is None else labels, **arguments)
    output.loss.backward()
    results = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad.clone()
    return results


def generation(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Greedy, from states."""
    with torch.no_grad():
        generated = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return {"sequences": generated.sequences, "logits": torch.stack(generated.logits)}


def run(name: str, device: str = "cpu") -> dict[str, Any]:
    """All that is compared, on the CPU, and the warnings that were given meanwhile."""
    import transformers

    warnings = Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(warnings)
    # What is said once in a process would be said for the first model alone.
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    transformers.utils.logging.set_verbosity_warning()
    try:
        model = make(name).to(device)
        ids = torch.randint(1, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(2))
        ids = ids.to(device)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        results: dict[str, Any] = {}
        results["evaluation"] = loss_and_gradients(model.eval(), ids)
        results["training"] = loss_and_gradients(model.train(), ids, use_cache=False)
        padded_labels = ids.masked_fill(mask == 0, -100)
        model.eval()
        padded = loss_and_gradients(model, ids, padded_labels, attention_mask=mask)
        padded["logits"] = padded["logits"][mask.bool()]
        results["padded"] = padded
        results["generation"] = generation(model, ids[:, :7], torch.ones_like(ids[:, :7]))
        results["padded generation"] = generation(model, ids[:, :9], mask[:, :9])
        model.to(torch.bfloat16)
        results["bfloat16"] = loss_and_gradients(model, ids)
        # Later logits follow tokens that rounding may have chosen.
        first = generation(model, ids[:, :9], mask[:, :9])["logits"][0]
        results["bfloat16"]["first logits of padded generation"] = first
    finally:
        logger.removeHandler(warnings)
    results = {p: {k: t.cpu() for k, t in part.items()} for p, part in results.items()}
    results["warnings"] = warnings.texts
    return results


def main() -> None:
    sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
    sys.modules["causal_conv1d"] = None  # type: ignore[assignment]
    torch.set_num_threads(2)
    from transformers.integrations import hub_kernels  # noqa: F401

    torch.save({name: run(name) for name in MODELS}, sys.argv[1])


if __name__ == "__main__":
    main()
