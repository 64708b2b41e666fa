"""Language models: files made by independent implementations, initial weights, and round trips."""

from __future__ import annotations

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from cases import DEVICE
from torch import nn

from krait.torch import (
    InferenceParams,
    MambaConfig,
    MambaLMHeadModel,
    MixerModel,
    RMSNorm,
    create_block,
)
from krait.torch import functional as K

FIXTURES = ["mamba1-tiny", "mamba2-tiny", "mamba2attn-tiny", "transformerpp-tiny"]


def array(folder, name):
    return torch.from_numpy(np.load(folder / f"{name}.npy")).to(DEVICE)


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("fused", [True, False])
def test_logits_equal_those_of_the_fixture(golden, name, fused):
    folder = golden / name
    model = MambaLMHeadModel.from_pretrained(folder)
    model.backbone.fused_add_norm = fused
    for layer in model.backbone.layers:
        layer.fused_add_norm = fused
        if hasattr(layer.mixer, "use_mem_eff_path"):
            layer.mixer.use_mem_eff_path = fused
    want = array(folder, "logits")
    with torch.no_grad():
        got = model(array(folder, "input_ids").long()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", FIXTURES)
def test_greedy_text_equals_that_of_the_fixture(golden, name):
    folder = golden / name
    model = MambaLMHeadModel.from_pretrained(folder)
    want = array(folder, "greedy_ids").long()
    prompt = array(folder, "prompt_ids").long()
    got = model.generate(prompt, want.shape[1], vocab_size=277)
    assert torch.equal(got, want)


def test_loss_of_a_trained_model_in_half_precision_weights(golden):
    folder = golden / "shakespeare"
    model = MambaLMHeadModel.from_pretrained(folder)
    prompt = array(folder, "prompt_ids").long().reshape(1, -1)
    with torch.no_grad():
        logits = model(prompt).logits
    want = array(folder, "prompt_logits").reshape(logits.shape)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-3)
    greedy = array(folder, "greedy_ids").long().reshape(1, -1)
    length = prompt.shape[1] + 64
    got = model.generate(prompt, length)
    assert torch.equal(got[:, -64:], greedy[:, -64:])


def test_training_follows_the_fixture(golden):
    folder = golden / "train-mamba1-tiny"
    model = MambaLMHeadModel.from_pretrained(folder)
    batches = array(folder, "batches").long()
    losses, norms = array(folder, "losses"), array(folder, "grad_norms")
    named = dict(model.named_parameters())
    kept = [p for n, p in named.items() if n.endswith(("A_log", "D"))]
    decayed = [p for n, p in named.items() if not n.endswith(("A_log", "D"))]
    assert all(p._no_weight_decay for p in kept)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = K.cross_entropy(model(batch[:, :-1]).logits, batch[:, 1:])
        loss.backward()
        if step == 0:
            for n, p in named.items():
                if n == "lm_head.weight":
                    continue
                want = array(folder, f"grad0__{n}")
                error = (p.grad - want).norm() / want.norm()
                assert error < 1e-4, f"gradient of {n} is off by {error}"
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(loss.item(), losses[step].item(), rtol=2e-4, atol=0)
        torch.testing.assert_close(norm.item(), norms[step].item(), rtol=5e-3, atol=0)
    for n, p in named.items():
        if n != "lm_head.weight":
            want = array(folder, f"final__{n}")
            assert (p.detach() - want).norm() < 2e-3 * want.norm(), n


def tiny(**overrides):
    fields = {
        "d_model": 16, "n_layer": 2, "vocab_size": 21, "d_intermediate": 24, "attn_layer_idx": [1],
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8},
        "attn_cfg": {"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3},
    }  # fmt: skip
    return MambaConfig(**{**fields, **overrides})


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_again(tmp_path, tied):
    model = MambaLMHeadModel(tiny(tie_embeddings=tied))
    model.save_pretrained(tmp_path / "new" / "folder")
    other = MambaLMHeadModel.from_pretrained(tmp_path / "new" / "folder")
    assert other.config == model.config
    assert (other.lm_head.weight is other.backbone.embedding.weight) == tied
    ids = torch.randint(0, 21, (2, 6))
    assert torch.equal(other(ids).logits, model(ids).logits)
    half = MambaLMHeadModel.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert half.backbone.embedding.weight.dtype is torch.bfloat16
    assert half.backbone.layers[0].mixer.D.dtype is torch.float32


def test_safetensors_and_shards(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = MambaLMHeadModel(tiny())
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(0, 21, (2, 6))
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    index = {}
    for part in range(2):
        file = f"pytorch_model-{part}.bin"
        shard = {k: state[k] for k in names[part::2]}
        torch.save(shard, tmp_path / file)
        index |= dict.fromkeys(shard, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-1.bin"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_errors_of_checkpoints(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="config.json"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ValueError, match="d_model and n_layer"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 4, "n_layer": 1, "n_heads": 2}')
    with pytest.raises(ValueError, match="n_heads"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 4, "n_layer": 1}')
    with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    with pytest.raises((FileNotFoundError, ImportError), match="not a name of anything"):
        MambaLMHeadModel.from_pretrained("not a name of anything")
    with pytest.raises(ValueError, match="'Mamba4'"):
        create_block(8, 0, ssm_cfg={"layer": "Mamba4"})


def test_a_name_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the model's name is empty, expected a folder"):
        MambaLMHeadModel.from_pretrained("")
    with pytest.raises(TypeError):
        MambaLMHeadModel.from_pretrained(None)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no config.json in the cache, and the hub cannot"):
        MambaLMHeadModel.from_pretrained("some-org/some-model")


def test_initial_weights():
    config = MambaConfig(
        d_model=64, n_layer=8, vocab_size=1001, d_intermediate=64, pad_vocab_size_multiple=16
    )
    model = MambaLMHeadModel(config)
    assert model.lm_head.weight.shape == (1008, 64)
    assert abs(model.backbone.embedding.weight.std().item() - 0.02) < 1e-3
    block = model.backbone.layers[3]
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in); then over sqrt(n_layer).
    for weight in (block.mixer.out_proj.weight, block.mlp.fc2.weight):
        bound = 1 / math.sqrt(weight.shape[1]) / math.sqrt(8)
        assert 0.95 * bound < weight.abs().max() <= bound
    bound = 1 / math.sqrt(64)
    assert 0.95 * bound < block.mixer.in_proj.weight.abs().max() <= bound
    dt = nn.functional.softplus(block.mixer.dt_proj.bias)
    assert dt.min() > 0.9e-3, "the bias of dt_proj was overwritten"
    bare = MixerModel(64, 8, 64, 100, rms_norm=True)
    weight = bare.layers[0].mlp.fc2.weight
    bound = 1 / math.sqrt(weight.shape[1]) / math.sqrt(16)
    assert 0.95 * bound < weight.abs().max() <= bound
    assert isinstance(bare.norm_f, RMSNorm)


def test_last_logits_alone_and_states():
    model = MambaLMHeadModel(tiny()).eval()
    ids = torch.randint(0, 21, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        last = model(ids, num_last_tokens=2).logits
        torch.testing.assert_close(last, want[:, -2:], rtol=1e-5, atol=1e-6)
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        params.key_value_memory_dict = model.allocate_inference_cache(2, 9)
        got = []
        for part in ids.split([4, 1, 1, 3], 1):
            got.append(model(part, inference_params=params).logits)
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


def test_documents_in_rows_of_a_hybrid_model():
    model = MambaLMHeadModel(tiny())
    ids = torch.randint(0, 21, (1, 9))
    seq_idx = torch.tensor([[0] * 4 + [1] * 5])
    want = torch.cat([model(part).logits for part in ids.split([4, 5], 1)], 1)
    torch.testing.assert_close(model(ids, seq_idx=seq_idx).logits, want, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_residual_stream_wide():
    model = MambaLMHeadModel(tiny(attn_layer_idx=[]))
    ids = torch.randint(0, 21, (2, 6))
    want = model(ids).logits
    seen = []
    model.backbone.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = model(ids).logits
    assert got.dtype is torch.bfloat16 and seen[0][1].dtype is torch.float32
    assert (got - want).norm() < 0.03 * want.norm()


def test_copies_and_pickles_after_recorded_generation():
    """What was recorded for one model is neither copied nor in the way of a copy."""
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=40, ssm_cfg={"layer": "Mamba2"})
    model = MambaLMHeadModel(config).eval()
    prompt = torch.randint(0, 40, (2, 5))
    expected = model.generate(prompt, max_length=12, cg=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert other._decoding_cache.callables == {}
        assert torch.equal(other.generate(prompt, max_length=12, cg=True), expected)
