"""Layers: steps equal a prefill, documents keep apart, and what PyTorch does to modules works on
them.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from krait.torch import (
    MHA,
    Block,
    GatedLayerNorm,
    GatedMLP,
    GatedRMSNorm,
    InferenceParams,
    LayerNorm,
    Mamba,
    Mamba2,
    Mamba2Simple,
    RMSNorm,
)

D_MODEL = 16
MIXERS = {
    "mamba": lambda **kw: Mamba(D_MODEL, d_state=5, **kw),
    "mamba_constant": lambda **kw: Mamba(
        D_MODEL, d_conv=2, expand=3, dt_rank=3, dt_init="constant", conv_bias=False, bias=True, **kw
    ),
    "mamba2": lambda **kw: Mamba2(D_MODEL, d_state=8, headdim=8, **kw),
    "mamba2_mlp": lambda **kw: Mamba2(
        D_MODEL, d_state=8, headdim=4, d_ssm=16, ngroups=2, D_has_hdim=True, norm_before_gate=True,
        dt_limit=(0.01, 0.05), conv_init=0.2, bias=True, **kw
    ),
    "mamba2_ungated": lambda **kw: Mamba2(
        D_MODEL, d_state=8, headdim=8, rmsnorm=False, d_conv=3, **kw
    ),
    "mha": lambda **kw: MHA(D_MODEL, 4, num_heads_kv=2, causal=True, rotary_emb_dim=4, **kw),
    "mha_conv": lambda **kw: MHA(
        D_MODEL, 2, causal=True, d_conv=4, rotary_emb_dim=8, rotary_emb_interleaved=True,
        mlp_dim=20, softmax_scale=0.3, head_dim=10, **kw
    ),
}  # fmt: skip
OTHERS = {
    "simple": lambda **kw: Mamba2Simple(
        D_MODEL, d_state=8, headdim=8, learnable_init_states=True, **kw
    ),
    "mlp": lambda **kw: GatedMLP(D_MODEL, **kw),
}
ALL = {**MIXERS, **OTHERS}


def states_of(params):
    return [t for pair in params.key_value_memory_dict.values() for t in pair if t is not None]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("pieces", [[9], [5, 1, 1, 2], [1] * 9, [2, 7], [1, 8], [3, 3, 3]])
def test_steps_and_any_split_equal_one_pass(name, pieces):
    layer = MIXERS[name](layer_idx=0)
    x = torch.randn(2, 9, D_MODEL)
    with torch.no_grad():
        want = layer(x)
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        got = []
        for part in x.split(pieces, dim=1):
            got.append(layer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
        # A new prefill starts from nothing, whatever the states hold.
        params.seqlen_offset = 0
        torch.testing.assert_close(layer(x, inference_params=params), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MIXERS if not n.startswith("mha")])
def test_step_on_states_of_its_own(name):
    layer = MIXERS[name]()
    x = torch.randn(2, 6, D_MODEL)
    conv_state, ssm_state = layer.allocate_inference_cache(2, 6)
    with torch.no_grad():
        outs = [layer.step(x[:, t : t + 1], conv_state, ssm_state) for t in range(6)]
        torch.testing.assert_close(
            torch.cat([o[0] for o in outs], 1), layer(x), rtol=1e-4, atol=1e-5
        )
    assert outs[-1][1] is conv_state and outs[-1][2] is ssm_state
    with pytest.raises(ValueError, match="one token at a time"):
        layer.step(x, conv_state, ssm_state)


def test_attention_steps_at_lengths_of_their_own():
    layer = MIXERS["mha"](layer_idx=0)
    x = torch.randn(2, 8, D_MODEL)
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    params = InferenceParams(max_seqlen=10, max_batch_size=2)
    with torch.no_grad():
        layer(x[:, :6], inference_params=params)
        params.seqlen_offset, params.lengths_per_sample = 6, lengths
        token = torch.randn(2, 1, D_MODEL)
        got = layer(token, inference_params=params)
        for row, n in enumerate(lengths.tolist()):
            sequence = torch.cat((x[row : row + 1, :n], token[row : row + 1]), 1)
            torch.testing.assert_close(got[row, -1], layer(sequence)[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("fused", [False, True])
def test_documents_keep_apart(name, fused):
    layer = MIXERS[name]()
    if hasattr(layer, "use_mem_eff_path"):
        layer.use_mem_eff_path = fused
    x = torch.randn(1, 9, D_MODEL)
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 4])
    want = torch.cat([layer(part) for part in x.split([4, 1, 4], 1)], 1)
    torch.testing.assert_close(layer(x, seq_idx=seq_idx), want, rtol=1e-4, atol=1e-5)
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    torch.testing.assert_close(layer(x, cu_seqlens=bounds), want, rtol=1e-4, atol=1e-5)


def test_prefill_of_packed_sequences():
    layer = MIXERS["mamba2"](layer_idx=0)
    x = torch.randn(1, 9, D_MODEL)
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    token = torch.randn(2, 1, D_MODEL)
    with torch.no_grad():
        layer(x, cu_seqlens=torch.tensor([0, 3, 9]), inference_params=params)
        params.seqlen_offset = 9
        got = layer(token, inference_params=params)
        for row, part in enumerate(x.split([3, 6], 1)):
            want = layer(torch.cat((part, token[row : row + 1]), 1))[:, -1:]
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_mamba2_with_tokens_in_one_dimension():
    layer = MIXERS["mamba2"]()
    x = torch.randn(2, 5, D_MODEL)
    torch.testing.assert_close(layer(x.flatten(0, 1), seqlen=5), layer(x).flatten(0, 1))


@pytest.mark.parametrize("name", ["mamba2", "mamba2_mlp", "mamba2_ungated", "simple"])
def test_the_fused_path_equals_the_other(name):
    layer = ALL[name]()
    if name == "simple":
        nn.init.normal_(layer.init_states)
    x = torch.randn(2, 7, D_MODEL)
    grads = []
    for fused in (True, False):
        layer.use_mem_eff_path = fused
        layer.zero_grad()
        layer(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    assert set(grads[0]) == {n for n, _ in layer.named_parameters()}
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2_mlp", "mha_conv", "simple"])
def test_gradcheck(name):
    layer = ALL[name]().double()
    x = torch.randn(1, 3, D_MODEL, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    layer = ALL[name]()
    x = torch.randn(2, 7, D_MODEL)
    want = layer(x)
    with torch.autocast(DEVICE, dtype=dtype):
        got = layer(x)
    assert got.dtype is dtype
    got.sum().backward()
    assert (got - want).norm() <= 0.03 * want.norm()
    for p in layer.parameters():
        assert p.grad.dtype is torch.float32 and p.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    layer = ALL[name]()
    x = torch.randn(2, 7, D_MODEL)
    want = layer(x)
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype is dtype
    assert (got - want).norm() <= (0.05 if dtype is torch.bfloat16 else 1e-5) * want.norm()
    got.sum().backward()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant):
    layer = ALL[name]()
    x = torch.randn(2, 7, D_MODEL, requires_grad=True)
    layer(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    got = {n: p.grad for n, p in layer.named_parameters()} | {"x": x.grad}
    for n in want:
        torch.testing.assert_close(got[n], want[n])


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles(name):
    layer = ALL[name]()
    x = torch.randn(2, 5, D_MODEL)
    want = layer(x)
    marks = {n: vars(p) for n, p in layer.named_parameters()}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), want)
        assert {n: vars(p) for n, p in other.named_parameters()} == marks
    fresh = ALL[name]()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), want)


@pytest.mark.parametrize("name", ALL)
def test_meta_device_and_reset(name):
    layer = ALL[name](device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device=DEVICE)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if name == "simple":
        nn.init.zeros_(layer.init_states)
    assert layer(torch.randn(1, 3, D_MODEL)).isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_nothing_at_all(name, shape):
    x = torch.randn(*shape, D_MODEL, requires_grad=True)
    out = ALL[name]()(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_mamba2_alone_is_saved_and_loaded(tmp_path):
    pytest.importorskip("huggingface_hub")
    layer = MIXERS["mamba2_mlp"]()
    layer.save_pretrained(tmp_path)
    other = Mamba2.from_pretrained(tmp_path)
    x = torch.randn(1, 5, D_MODEL)
    assert torch.equal(other(x), layer(x))


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as PEFT makes it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Wrapped(nn.Module):
    """A layer inside another, which has no weight of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_wrapped_projections_keep_states(name):
    torch.manual_seed(0)
    layer = MIXERS[name](layer_idx=0)
    if not hasattr(layer, "allocate_inference_cache"):
        pytest.skip("no states")
    x = torch.randn(2, 5, D_MODEL)
    with torch.no_grad():
        expected = layer(x)
        for n, child in list(layer.named_children()):
            if type(child) is nn.Linear:
                setattr(layer, n, Wrapped(child))
        params = InferenceParams(max_seqlen=5, max_batch_size=2)
        found = [layer(x[:, :4], inference_params=params)]
        params.seqlen_offset = 4
        found.append(layer(x[:, 4:], inference_params=params))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_a_watched_dt_projection_is_called():
    """A hook in front of it, and what accelerate puts in place of its forward, see its calls."""
    layer, x = MIXERS["mamba"](), torch.randn(2, 5, D_MODEL)
    expected = layer(x)
    calls = []
    handle = layer.dt_proj.register_forward_pre_hook(lambda module, args: calls.append("hook"))
    torch.testing.assert_close(layer(x), expected)
    handle.remove()
    plain = layer.dt_proj.forward
    layer.dt_proj.forward = lambda x: calls.append("forward") or plain(x)
    torch.testing.assert_close(layer(x), expected)
    assert calls == ["hook", "forward"]


def test_every_projection_can_be_replaced():
    layer = MIXERS["mamba"](layer_idx=0)
    x = torch.randn(2, 5, D_MODEL)
    plain = layer(x)
    for n in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        adapter = Adapter(getattr(layer, n))
        nn.init.zeros_(adapter.up.weight)
        setattr(layer, n, adapter)
    torch.testing.assert_close(layer(x), plain)
    for n in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        nn.init.normal_(getattr(layer, n).up.weight)
    out = layer(x)
    out.sum().backward()
    for n in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert getattr(layer, n).down.weight.grad.abs().sum() > 0
    params = InferenceParams(max_seqlen=5, max_batch_size=2)
    with torch.no_grad():
        steps = []
        for t in range(5):
            steps.append(layer(x[:, t : t + 1], inference_params=params))
            params.seqlen_offset += 1
    torch.testing.assert_close(torch.cat(steps, 1), out, rtol=1e-4, atol=1e-5)


def test_initial_values():
    torch.manual_seed(1)
    layer = Mamba(256, d_state=4)
    assert layer.dt_rank == 16 and layer.in_proj.bias is None
    torch.testing.assert_close(layer.A_log.exp(), torch.tensor([1.0, 2, 3, 4]).expand(512, 4))
    assert torch.equal(layer.D, torch.ones(512))
    dt = nn.functional.softplus(layer.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and 0.008 < dt.log().mean().exp() < 0.0125
    assert layer.dt_proj.weight.abs().max() <= 0.25 < 4.1 * layer.dt_proj.weight.abs().max()
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay
    assert layer.dt_proj.bias._no_reinit
    layer = Mamba2(256, A_init_range=(2, 3), conv_init=0.1, dt_min=0.02, dt_init_floor=0.05)
    assert 2 <= layer.A_log.exp().min() and layer.A_log.exp().max() <= 3.0001
    assert layer.conv1d.weight.abs().max() <= 0.1 and layer.norm.group_size == 512
    dt = nn.functional.softplus(layer.dt_bias)
    assert dt.min() >= 0.0499 and dt.max() <= 0.101
    assert all(getattr(layer, n)._no_weight_decay for n in ("A_log", "D", "dt_bias"))
    assert Mamba(D_MODEL, dtype=torch.bfloat16).A_log.dtype is torch.float32
    assert GatedMLP(64).fc1.weight.shape == (512, 64)
    assert MHA(64, 4, mlp_dim=100).out_proj.weight.shape == (64, 64 + 128)


def test_names_of_parameters():
    names = {n for n, _ in Mamba2(D_MODEL, headdim=8).named_parameters()}
    assert names == {
        "dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight",
        "out_proj.weight",
    }  # fmt: skip
    names = {n for n, _ in Mamba(D_MODEL).named_parameters()}
    assert names == {
        "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "out_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba2Simple", "MHA"])
def test_inputs_need_three_dimensions(name):
    classes = {"Mamba": Mamba, "Mamba2": Mamba2, "Mamba2Simple": Mamba2Simple}
    layer = MHA(32, 4) if name == "MHA" else classes[name](32)
    with pytest.raises(ValueError, match=rf"\[{name}\] the input has shape \(5, 32\), expected"):
        layer(torch.zeros(5, 32))
    with pytest.raises(ValueError, match=r"\(1, 5, 31\), expected \(B, L, 32\)"):
        layer(torch.zeros(1, 5, 31))


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="headdim"):
        Mamba2(D_MODEL, headdim=5)
    with pytest.raises(ValueError, match="ngroups"):
        Mamba2(D_MODEL, headdim=8, ngroups=3)
    with pytest.raises(ValueError, match="headdim is 8, ngroups 0, expected positive"):
        Mamba2(D_MODEL, headdim=8, ngroups=0)
    with pytest.raises(ValueError, match="num_heads is 0, expected a positive"):
        MHA(D_MODEL, 0)
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(D_MODEL, dt_init="zero")
    with pytest.raises(ValueError, match="dt_rank is 'full', expected 'auto'"):
        Mamba(D_MODEL, dt_rank="full")
    with pytest.raises(ValueError, match="num_heads_kv"):
        MHA(D_MODEL, 4, num_heads_kv=3)
    with pytest.raises(ValueError, match="layer_idx is None"):
        Mamba(D_MODEL)(torch.randn(1, 2, D_MODEL), InferenceParams(4, 1))
    layer = MHA(D_MODEL, 2, causal=True, layer_idx=0)
    with pytest.raises(ValueError, match="5 tokens"):
        layer(torch.randn(1, 5, D_MODEL), InferenceParams(4, 1))


def test_norm_layers():
    x, r = torch.randn(3, D_MODEL), torch.randn(3, D_MODEL)
    plain = nn.LayerNorm(D_MODEL)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours = LayerNorm(D_MODEL)
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ours(x), plain(x))
    out, total = ours(x, r, prenorm=True)
    torch.testing.assert_close((out, total), (plain(x + r), x + r))
    rms = RMSNorm(D_MODEL)
    torch.testing.assert_close(rms(x), nn.functional.rms_norm(x, (D_MODEL,), eps=1e-5))
    dropped = RMSNorm(D_MODEL, dropout_p=0.5)(x, prenorm=True)[1]
    assert 0 < (dropped == 0).sum() < x.numel()
    z = torch.randn(3, D_MODEL)
    torch.testing.assert_close(GatedRMSNorm(D_MODEL)(x, z), rms(x) * nn.functional.silu(z))
    gated = GatedLayerNorm(D_MODEL, norm_before_gate=False)
    gated.load_state_dict(plain.state_dict())
    torch.testing.assert_close(gated(x, z), plain(x * nn.functional.silu(z)))


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm, LayerNorm])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_fused_blocks_equal_others(norm_cls, in_fp32):
    blocks = [
        Block(
            D_MODEL, Mamba, GatedMLP, norm_cls=norm_cls, fused_add_norm=fused,
            residual_in_fp32=in_fp32,
        )
        for fused in (False, True)
    ]  # fmt: skip
    blocks[1].load_state_dict(blocks[0].state_dict())
    x, residual = torch.randn(2, 4, D_MODEL), torch.randn(2, 4, D_MODEL)
    for r in (None, residual):
        plain, fused = (block(x, r) for block in blocks)
        torch.testing.assert_close(fused, plain)
    with pytest.raises(TypeError, match="RMSNorm or nn.LayerNorm"):
        Block(D_MODEL, Mamba, nn.Identity, norm_cls=nn.BatchNorm1d, fused_add_norm=True)


def test_attention_without_a_mask_sees_everything():
    layer = MHA(D_MODEL, 2)
    x = torch.randn(1, 6, D_MODEL)
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1), rtol=1e-4, atol=1e-5)
