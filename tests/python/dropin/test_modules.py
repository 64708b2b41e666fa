"""Modules and models as upstream's documentation uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import close
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MixerModel, create_block
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.utils.determinism import set_deterministic_mode, use_deterministic_mode
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_first_example_of_the_readme(device: str) -> None:
    batch, length, dim = 2, 64, 16
    x = torch.randn(batch, length, dim).to(device)
    model = Mamba(d_model=dim, d_state=16, d_conv=4, expand=2).to(device)
    y = model(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_second_example_of_the_readme(device: str) -> None:
    batch, length, dim = 2, 64, 16
    x = torch.randn(batch, length, dim).to(device)
    # Half as wide as a head.
    model = Mamba2(d_model=dim, d_state=64, d_conv=4, expand=2).to(device)
    y = model(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def tiny(layer: str = "Mamba2", **changes: object) -> MambaConfig:
    ssm_cfg = {"layer": layer, "d_state": 8}
    if layer == "Mamba2":
        ssm_cfg["headdim"] = 16
    return MambaConfig(
        **{  # type: ignore[arg-type]
            "d_model": 32,
            "n_layer": 2,
            "vocab_size": 53,
            "ssm_cfg": ssm_cfg,
            **changes,
        }
    )


def test_names_of_parameters() -> None:
    config = tiny(d_intermediate=48, attn_layer_idx=[1], attn_cfg={"num_heads": 4, "causal": True})
    model = MambaLMHeadModel(config)
    names = set(model.state_dict())
    mixer = {"A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "in_proj.weight"}
    mixer |= {"norm.weight", "out_proj.weight"}
    attention = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
    rest = {"norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    expected |= {f"backbone.layers.0.{n}" for n in rest | {f"mixer.{m}" for m in mixer}}
    expected |= {f"backbone.layers.1.{n}" for n in rest | {f"mixer.{m}" for m in attention}}
    assert names == expected
    mamba = Mamba(16)
    marked = {n for n, p in mamba.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"}
    assert mamba.dt_proj.bias._no_reinit


def test_classes_fit_together() -> None:
    model = MambaLMHeadModel(tiny())
    assert isinstance(model.backbone, MixerModel)
    assert isinstance(model.backbone.layers[0], Block)
    assert isinstance(model.backbone.layers[0].mixer, Mamba2)
    block = create_block(32, 48, attn_layer_idx=[3], attn_cfg={"num_heads": 4}, layer_idx=3)
    assert isinstance(block.mixer, MHA) and isinstance(block.mlp, GatedMLP)
    assert isinstance(create_block(32, 0, layer_idx=0).mixer, Mamba)
    assert Mamba2Simple(32, headdim=16)(torch.randn(1, 5, 32)).shape == (1, 5, 32)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_forward_names_its_output(layer: str) -> None:
    model = MambaLMHeadModel(tiny(layer))
    output = model(torch.randint(0, 53, (2, 9)))
    assert type(output).__name__ == "CausalLMOutput" and output._fields == ("logits",)
    # 53 tokens, padded to a multiple of 8.
    assert output.logits.shape == (2, 9, 56)
    last = model(torch.randint(0, 53, (2, 9)), num_last_tokens=1).logits
    assert last.shape == (2, 1, 56)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded(layer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(tiny(layer))
    model.save_pretrained(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["d_model"] == 32 and config["ssm_cfg"]["layer"] == layer
    assert load_config_hf(str(tmp_path / "model")) == config
    device = model.lm_head.weight.device
    state = load_state_dict_hf(str(tmp_path / "model"), device=device, dtype=dtype)
    assert state["backbone.embedding.weight"].dtype == (dtype or torch.float32)
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "model"), device=device, dtype=dtype)
    assert again.lm_head.weight.dtype == (dtype or torch.float32)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(value.dtype)), name
    if dtype is None:
        ids = torch.randint(0, 53, (2, 9))
        close(again(ids).logits, model(ids).logits)


def test_found_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub lays a repository out; nothing is downloaded."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = MambaLMHeadModel(tiny())
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    model.save_pretrained(str(repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    again = MambaLMHeadModel.from_pretrained("someone/tiny")
    ids = torch.randint(0, 53, (1, 5))
    close(again(ids).logits, model(ids).logits)
    with pytest.raises(Exception, match="someone/other|offline|cannot find"):
        MambaLMHeadModel.from_pretrained("someone/other")


def test_block_on_the_hub(tmp_path: Path) -> None:
    """Mamba2 is a PyTorchModelHubMixin."""
    pytest.importorskip("huggingface_hub")
    block = Mamba2(32, d_state=8, headdim=16)
    block.save_pretrained(tmp_path / "block")
    again = Mamba2.from_pretrained(str(tmp_path / "block"))
    assert again.d_state == 8 and again.headdim == 16
    x = torch.randn(1, 6, 32)
    close(again(x), block(x))


def test_determinism_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    assert use_deterministic_mode() == torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")
    assert use_deterministic_mode() is True
    set_deterministic_mode(False)
    assert use_deterministic_mode() is False
    set_deterministic_mode(None)
    assert use_deterministic_mode() is True


def test_autocast_decorators() -> None:
    from mamba_ssm.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd

    calls = []

    def decorator(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append((args, kwargs))

    custom_amp_decorator(decorator, True)(1)
    custom_amp_decorator(decorator, False)(2)
    assert calls == [((1,), {"device_type": "cuda"}), ((2,), {})]

    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        @custom_bwd
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3
