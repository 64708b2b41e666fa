"""Operators against loops in plain PyTorch: dtypes, odd shapes and strides, documents, states."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import DEVICE, scan_inputs, ssd_inputs

from krait.torch import functional as K

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def close(got, want, dtype):
    """Relative to the largest value, since sums run over terms of that size."""
    assert got.shape == want.shape
    scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
    error = (got.to(want.dtype) - want).abs().max().item() if want.numel() else 0.0
    assert error <= TOLERANCE[dtype] * scale, f"off by {error}, values up to {scale}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 9, 3), (1, 5, 1, 1), (3, 17, 33, 16), (1, 1, 0, 4)])
def test_selective_scan(dtype, shape):
    B, D, L, N = shape
    inputs = scan_inputs(B, D, L, N, dtype=dtype)
    out, last = K.selective_scan(*inputs, delta_softplus=True, return_last_state=True)
    assert out.dtype is dtype
    assert last.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    if L == 0:
        assert out.shape == (B, D, 0) and torch.equal(last, torch.zeros(B, D, N))
        return
    want, want_last = reference.selective_scan(*inputs, delta_softplus=True)
    close(out, want, dtype)
    close(last, want_last, torch.float32 if dtype is torch.float32 else dtype)
    assert torch.equal(out, K.selective_scan(*inputs, delta_softplus=True))


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selective_scan_of_complex_states(constant, dtype):
    inputs = scan_inputs(2, 4, 7, 3, dtype=dtype, complex=True, constant=constant)
    initial = torch.randn(2, 4, 3, dtype=inputs[2].dtype)
    out, last = K.selective_scan(*inputs, initial_state=initial, return_last_state=True)
    want, want_last = reference.selective_scan(*inputs, initial_state=initial)
    close(out, want, dtype)
    close(last, want_last, dtype)


def test_selective_scan_of_lazily_conjugated_and_negated_views():
    inputs = scan_inputs(2, 4, 7, 3, complex=True, constant="BC")
    inputs[2], inputs[3] = inputs[2].conj(), inputs[3].conj()
    u = torch.complex(torch.randn(2, 4, 7, dtype=torch.float64), inputs[0]).conj().imag
    assert u.is_neg() and inputs[2].is_conj()
    inputs[0] = u
    out = K.selective_scan(*inputs)
    close(out, reference.selective_scan(*inputs)[0], torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_selective_scan_of_groups_and_documents(reverse, groups):
    inputs = scan_inputs(2, 6, 11, 3, G=groups)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2, 2, 2, 2], [5] * 8 + [-1] * 3])
    initial = torch.randn(2, 6, 3, dtype=torch.float64)
    options = {"seq_idx": seq_idx, "initial_state": initial, "reverse": reverse}
    out, last = K.selective_scan(*inputs, **options, return_last_state=True)
    want, want_last = reference.selective_scan(*inputs, **options)
    close(out, want, torch.float64)
    close(last, want_last, torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
def test_selective_scan_of_packed_sequences(reverse):
    inputs = scan_inputs(1, 4, 10, 3)
    options = {
        "cu_seqlens": torch.tensor([0, 3, 4, 10], dtype=torch.int32),
        "initial_state": torch.randn(3, 4, 3, dtype=torch.float64),
        "reverse": reverse,
    }
    out, last = K.selective_scan(*inputs, **options, return_last_state=True)
    want, want_last = reference.selective_scan(*inputs, **options)
    assert last.shape == (3, 4, 3)
    close(out, want, torch.float64)
    close(last, want_last, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 4, 3, 5, 2), (1, 1, 1, 1, 1, 1), (2, 131, 3, 17, 13, 1), (1, 300, 2, 64, 128, 1)],
)
def test_ssd(dtype, shape):
    if dtype is torch.float16 and shape[1] == 300:
        shape = (1, 100, *shape[2:])
    inputs = ssd_inputs(*shape, dtype=dtype, wide_D=shape[1] % 2 == 1)
    out, final = K.ssd(*inputs, dt_softplus=True, return_final_states=True)
    want, want_final = reference.ssd(*inputs, dt_softplus=True)
    assert out.dtype is dtype and out.is_contiguous()
    close(out, want, dtype)
    close(final, want_final, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_ssd_of_documents(reverse, packed):
    inputs = ssd_inputs(1 if packed else 2, 11)
    if packed:
        options = {"cu_seqlens": torch.tensor([0, 2, 2, 11])}
        rows = 3
    else:
        options = {
            "seq_idx": torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2, 2, 2, 2], [5] * 8 + [-1] * 3])
        }
        rows = 2
    options["initial_states"] = torch.randn(rows, 4, 3, 5, dtype=torch.float64)
    options |= {"reverse": reverse, "dt_limit": (0.125, 0.75)}
    out, final = K.ssd(*inputs, **options, return_final_states=True)
    want, want_final = reference.ssd(*inputs, **options)
    close(out, want, torch.float64)
    close(final, want_final, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_causal_conv1d(dtype, channel_last, width, length):
    x = torch.randn(2, 5, length, dtype=dtype)
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = torch.randn(5, width, dtype=dtype), torch.randn(5, dtype=dtype)
    initial = torch.randn(2, 5, width - 1, dtype=dtype)
    out, final = K.causal_conv1d(
        x, weight, bias, activation="swish", initial_states=initial, return_final_states=True
    )
    want, want_final = reference.causal_conv1d(
        x, weight, bias, activation="silu", initial_states=initial
    )
    assert out.stride() == x.stride()
    close(out, want, dtype)
    assert torch.equal(final.double(), want_final)


def test_causal_conv1d_of_documents_equals_that_of_each():
    x, weight = torch.randn(1, 4, 10), torch.randn(4, 4)
    bounds = [0, 3, 4, 10]
    packed = K.causal_conv1d(x, weight, cu_seqlens=torch.tensor(bounds))
    marked = K.causal_conv1d(x, weight, seq_idx=torch.tensor([[0] * 3 + [1] + [2] * 6]))
    for a, b in zip(bounds, bounds[1:]):
        want = reference.causal_conv1d(x[..., a:b], weight)[0]
        close(packed[..., a:b], want, torch.float32)
        close(marked[..., a:b], want, torch.float32)


def test_causal_conv1d_update_continues_a_sequence():
    x, weight, bias = torch.randn(2, 5, 9), torch.randn(5, 4), torch.randn(5)
    want = K.causal_conv1d(x, weight, bias, activation="silu")
    state = torch.zeros(3, 5, 4)
    rows = torch.tensor([2, 0], dtype=torch.int32)
    version = state._version
    for t in range(6):
        out = K.causal_conv1d_update(
            x[..., t], state, weight, bias, activation="silu", conv_state_indices=rows
        )
        torch.testing.assert_close(out, want[..., t])
    assert state._version > version, "autograd does not know that the state changed"
    out = K.causal_conv1d_update(
        x[..., 6:], state, weight, bias, activation="silu", conv_state_indices=rows
    )
    torch.testing.assert_close(out, want[..., 6:])
    assert torch.equal(state[1], torch.zeros(5, 4))
    assert torch.equal(state[2], x[0, :, -4:])


def test_causal_conv1d_varlen_states():
    x = torch.randn(9, 3)
    states = K.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 9]), 4)
    assert torch.equal(states[0], torch.cat((torch.zeros(2, 3), x[:2])).T)
    assert torch.equal(states[1], x[5:].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_update_continues_ssd(dtype):
    inputs = ssd_inputs(2, 7, dtype=dtype)
    want = K.ssd(*inputs, dt_softplus=True, dt_limit=(0.2, 0.9))
    state = torch.zeros(
        2, 4, 3, 5, dtype=torch.float64 if dtype is torch.float64 else torch.float32
    )
    x, dt, A, B, C, D, z, dt_bias = inputs
    for t in range(7):
        out = K.state_update(
            state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias,
            dt_softplus=True, dt_limit=(0.2, 0.9),
        )  # fmt: skip
        close(out, want[:, t].double(), dtype)


def test_state_update_continues_selective_scan():
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 6, 5, 3, dtype=torch.float32)
    want, last = K.selective_scan(
        u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True
    )
    state = torch.zeros(4, 6, 3)
    rows = torch.tensor([3, 1])
    for t in range(5):
        out = K.state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias,
            dt_softplus=True, state_batch_indices=rows,
        )  # fmt: skip
        torch.testing.assert_close(out, want[..., t])
    torch.testing.assert_close(state[rows], last)
    assert torch.equal(state[0], torch.zeros(6, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("channels,group", [(12, None), (12, 4), (67, None)])
def test_gated_norm(dtype, kind, before, channels, group):
    x, z = torch.randn(2, 3, channels, dtype=dtype), torch.randn(2, 3, channels, dtype=dtype)
    weight, bias = torch.randn(channels), torch.randn(channels)
    options = {"kind": kind, "z": z, "group_size": group, "norm_before_gate": before, "eps": 1e-5}
    out = K.norm(x, weight, bias, **options)
    want, _ = reference.norm(x, weight, bias, **options)
    assert out.dtype is dtype
    close(out, want, dtype)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_norm_with_a_residual(kind, grad, given, in_fp32):
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=grad)
    residual = torch.randn(3, 8, dtype=torch.bfloat16) if given else None
    options = {"kind": kind, "residual": residual}
    out, total = K.norm(x, None, prenorm=True, residual_in_fp32=in_fp32, **options)
    want, want_total = reference.norm(x, None, **options)
    assert total.dtype is (torch.float32 if in_fp32 else torch.bfloat16)
    close(out, want, torch.bfloat16)
    close(total, want_total, torch.float32 if in_fp32 else torch.bfloat16)
    assert torch.equal(out, K.norm(x, None, residual_in_fp32=in_fp32, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu(dtype):
    x, gate = torch.randn(3, 10, dtype=dtype).chunk(2, dim=-1)
    want = x.double() * torch.nn.functional.silu(gate.double())
    close(K.gated_silu(x, gate), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(dtype, smoothing, reduction):
    logits = (3 * torch.randn(2, 5, 11)).to(dtype)
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2] = -100
    got = K.cross_entropy(logits, targets, label_smoothing=smoothing, reduction=reduction)
    want = torch.nn.functional.cross_entropy(
        logits.double().transpose(1, 2), targets, label_smoothing=smoothing, reduction=reduction
    )
    close(got, want, torch.float64 if dtype is torch.float64 else torch.float32)


def test_linear_cross_entropy():
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.randint(0, 11, (2, 5))
    targets[1, 3] = 3
    got = K.linear_cross_entropy(x, weight, targets, bias, ignore_index=3)
    logits = torch.nn.functional.linear(x, weight, bias)
    want = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=3)
    torch.testing.assert_close(got, want)


def test_linear_cross_entropy_under_autocast():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    want = K.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = K.linear_cross_entropy(x, weight, targets)
    assert torch.equal(got, want) and got.dtype is torch.float32
    got.backward()
    assert x.grad.dtype is torch.float32 and weight.grad.abs().sum() > 0


def split_conv1d_scan_in_pieces(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, states, *, headdim, ngroups,
    d_state, norm_before_gate=True, **documents,
):  # fmt: skip
    """Made of the operators that it fuses."""
    d_ssm = A.shape[0] * headdim
    conv_dim = conv_weight.shape[0]
    mlp = (zxbcdt.shape[-1] - d_ssm - conv_dim - A.shape[0]) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([mlp, mlp, d_ssm, conv_dim, A.shape[0]], -1)
    xBC = K.causal_conv1d(
        xBC.transpose(1, 2), conv_weight, conv_bias, activation="silu", **documents
    ).transpose(1, 2)
    x, B, C = xBC.split([d_ssm, ngroups * d_state, ngroups * d_state], -1)
    heads = (A.shape[0], headdim)
    y, final = K.ssd(
        x.unflatten(-1, heads), dt, A, B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)), D,
        z.unflatten(-1, heads) if norm_weight is None else None, dt_bias, dt_softplus=True,
        initial_states=states, return_final_states=True, **documents,
    )  # fmt: skip
    y = y.flatten(-2)
    if norm_weight is not None:
        y = K.norm(
            y, norm_weight, z=z, group_size=d_ssm // ngroups, norm_before_gate=norm_before_gate
        )
    return torch.cat((K.gated_silu(x0, z0), y), -1) if mlp else y, final


def split_inputs(mlp=0, gated=True, dtype=torch.float64, length=7):
    H, P, G, N = 4, 3, 2, 5
    conv_dim = H * P + 2 * G * N
    return [
        torch.randn(2, length, 2 * mlp + H * P + conv_dim + H, dtype=dtype),
        torch.randn(conv_dim, 4, dtype=dtype),
        torch.randn(conv_dim, dtype=dtype),
        torch.randn(H, dtype=dtype),
        -torch.rand(H, dtype=dtype) - 0.1,
        torch.randn(H, dtype=dtype),
        torch.randn(H * P, dtype=dtype) if gated else None,
        torch.randn(2, H, P, N, dtype=dtype),
    ]


@pytest.mark.parametrize("mlp", [0, 6])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_split_conv1d_scan_equals_its_pieces(mlp, gated, before):
    inputs = split_inputs(mlp, gated)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0] * 7])
    *params, norm_weight, states = inputs
    options = {"headdim": 3, "ngroups": 2, "norm_before_gate": before, "seq_idx": seq_idx}
    out, final = K.split_conv1d_scan(
        *params, norm_weight=norm_weight, initial_states=states, return_final_states=True, **options
    )
    want, want_final = split_conv1d_scan_in_pieces(*inputs, d_state=5, **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(final, want_final)


def strided(t):
    """The same values, two elements apart in memory and in another order of dimensions."""
    room = t.new_zeros([2 * n for n in reversed(t.shape)])
    view = room[tuple(slice(None, None, 2) for _ in t.shape)].permute(*range(t.dim() - 1, -1, -1))
    return view.copy_(t)


def test_any_strides():
    inputs = scan_inputs(2, 6, 9, 3, dtype=torch.float32)
    apart = [strided(t) for t in inputs]
    assert not any(t.is_contiguous() for t in apart)
    torch.testing.assert_close(K.selective_scan(*apart), K.selective_scan(*inputs))
    inputs = ssd_inputs(2, 33, dtype=torch.float32)
    torch.testing.assert_close(K.ssd(*map(strided, inputs)), K.ssd(*inputs))
    expanded = inputs[0][:, :1].expand(-1, 33, -1, -1)
    torch.testing.assert_close(K.ssd(expanded, *inputs[1:]), K.ssd(expanded.clone(), *inputs[1:]))
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    torch.testing.assert_close(K.norm(strided(x), strided(weight)), K.norm(x, weight))


def test_states_that_are_written_need_memory_of_their_own():
    """An expanded state would be updated once for each entry that it stands for."""
    one = torch.ones(3, 4)
    state = torch.zeros(1, 4, 2).expand(3, 4, 2)
    with pytest.raises(ValueError, match=r"\[state_update\] state has 3 elements at one place"):
        K.state_update(state, one, one, -torch.ones(4, 2), torch.ones(3, 2), torch.ones(3, 2))
    state = torch.zeros(1, 4, 3).expand(3, 4, 3)
    with pytest.raises(ValueError, match=r"conv_state has 3 elements at one place in dimension 0"):
        K.causal_conv1d_update(one, state, torch.ones(4, 4))


def test_errors_name_what_does_not_fit():
    u, delta, A, B, C, D, z, bias = scan_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[selective_scan\] u has shape \(6, 9\)"):
        K.selective_scan(u[0], delta, A, B, C, return_last_state=True)
    with pytest.raises(ValueError, match=r"delta.*\(2, 6, 8\)"):
        K.selective_scan(u, delta[..., :8], A, B, C)
    with pytest.raises(ValueError, match="dtype"):
        K.selective_scan(u.int(), delta, A, B, C)
    with pytest.raises(TypeError, match="found ndarray, expected a torch.Tensor"):
        K.causal_conv1d(u.cpu().numpy(), torch.randn(6, 4))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        K.causal_conv1d(u, torch.randn(6, 4), activation="relu")
    with pytest.raises(ValueError, match="weight"):
        K.causal_conv1d(u, torch.randn(5, 4))
    with pytest.raises(ValueError, match="kind is 'batch'"):
        K.norm(u, None, kind="batch")
    x, dt, A, *rest = ssd_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[ssd\] A"):
        K.ssd(x, dt, A[:3], *rest)
    with pytest.raises(ValueError, match="targets has shape"):
        K.cross_entropy(torch.randn(3, 4), torch.zeros(2, dtype=torch.long))
