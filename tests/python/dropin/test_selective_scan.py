"""The scan of Mamba, its block and its decoding step, against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from helpers import DTYPES, close, differentiated
from mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    rms_norm_forward,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)


def test_reference_by_hand() -> None:
    u, delta = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.5]]])
    A, B = torch.tensor([[-math.log(2.0)]]), torch.tensor([[3.0]])
    C = torch.tensor([[[10.0, 100.0]]])
    out, state = selective_scan_ref(u, delta, A, B, C, return_last_state=True)
    last = 2.0**-0.5 * 3.0 + 0.5 * 3.0 * 2.0
    close(out, torch.tensor([[[30.0, 100.0 * last]]]))
    close(state, torch.tensor([[[last]]]))


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("length", [1, 8, 65, 130])
@pytest.mark.parametrize(
    "variable_B, variable_C, groups",
    [(True, True, 2), (True, True, 0), (True, False, 0), (False, True, 0), (False, False, 0)],
)
@pytest.mark.parametrize("is_complex", [False, True])
def test_scan(
    is_complex: bool,
    variable_B: bool,
    variable_C: bool,
    groups: int,
    length: int,
    itype: torch.dtype,
) -> None:
    """groups 0: B and C without a dimension of groups."""
    torch.manual_seed(length)
    batch, channels, states = 2, 4, 8
    wtype = torch.complex64 if is_complex else torch.float32
    A = -0.5 * torch.rand(channels, states, dtype=wtype)
    long = length * (2 if is_complex else 1)

    def matrix(variable: bool) -> torch.Tensor:
        if not variable:
            return torch.randn(channels, states, dtype=wtype)
        shape = (batch, groups, states, long) if groups else (batch, states, long)
        return torch.randn(shape, dtype=itype)

    B, C = matrix(variable_B), matrix(variable_C)
    D, delta_bias = torch.randn(channels), 0.5 * torch.rand(channels)
    u = torch.randn(batch, channels, length, dtype=itype)
    z = torch.randn(batch, length, channels, dtype=itype).transpose(1, 2)
    delta = 0.5 * torch.rand(batch, channels, length).to(itype)
    for softplus, gated, plain in [(True, True, False), (False, False, False), (False, True, True)]:
        inputs = (
            u,
            delta,
            A,
            B,
            C,
            None if plain else D,
            z if gated else None,
            None if plain else delta_bias,
        )

        def ours(*inputs):  # type: ignore[no-untyped-def]
            return selective_scan_fn(*inputs, delta_softplus=softplus, return_last_state=True)

        def reference(*inputs):  # type: ignore[no-untyped-def]
            return selective_scan_ref(*inputs, delta_softplus=softplus, return_last_state=True)

        outputs, gradients = differentiated(ours, inputs)
        expected, expected_gradients = differentiated(reference, inputs)
        assert outputs[0].dtype == itype and outputs[1].dtype == wtype
        close(outputs, expected, itype)
        # Gradients of weights sum over all tokens.
        close(gradients, expected_gradients, itype, "gradients")


def test_without_last_state_it_is_a_tensor() -> None:
    out = selective_scan_fn(
        torch.randn(1, 2, 3),
        torch.rand(1, 2, 3),
        -torch.rand(2, 4),
        torch.rand(2, 4),
        torch.rand(2, 4),
    )
    assert isinstance(out, torch.Tensor) and out.shape == (1, 2, 3)


def plain_inner(
    xz, conv1d_weight, conv1d_bias, x_proj, delta_proj, out_proj, out_bias, A,
    B=None, C=None, D=None, delta_bias=None, B_bias=None, C_bias=None,
):  # fmt: skip
    """mamba_inner_fn in plain PyTorch."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_ref(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rows = x.transpose(1, 2) @ x_proj.T
    rank, width = delta_proj.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    def over_time(matrix, bias):
        matrix = matrix if bias is None else matrix + bias
        if A.is_complex():
            return matrix.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)
        return matrix.transpose(1, 2)

    delta = (rows[..., :rank] @ delta_proj.T).transpose(1, 2)
    B = over_time(rows[..., rank : rank + width], B_bias) if B is None else B
    C = over_time(rows[..., -width:], C_bias) if C is None else C
    y = selective_scan_ref(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)
    return F.linear(y.transpose(1, 2), out_proj, out_bias)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("given_B", [False, True])
@pytest.mark.parametrize("given_C", [False, True])
def test_inner(given_C: bool, given_B: bool, is_complex: bool) -> None:
    torch.manual_seed(6)
    batch, channels, states, rank, length, width = 2, 8, 4, 3, 33, 6
    wtype = torch.complex64 if is_complex else torch.float32
    both = states * (2 if is_complex else 1)
    projected = rank + both * ((not given_B) + (not given_C))
    B = torch.randn(channels, states, dtype=wtype) if given_B else None
    C = torch.randn(channels, states, dtype=wtype) if given_C else None
    inputs = (
        torch.randn(batch, 2 * channels, length),
        torch.randn(channels, 1, 3),
        torch.randn(channels),
        0.3 * torch.randn(projected, channels),
        torch.randn(channels, rank),
        torch.randn(width, channels),
        torch.randn(width),
        -0.5 * torch.rand(channels, states, dtype=wtype),
        B,
        C,
        torch.randn(channels),
        0.5 * torch.rand(channels),
        None if given_B else torch.randn(both),
        None if given_C else torch.randn(both),
    )
    outputs, gradients = differentiated(mamba_inner_fn, inputs)
    expected, expected_gradients = differentiated(plain_inner, inputs)
    assert outputs[0].shape == (batch, length, width)
    close(outputs, expected)
    close(gradients, expected_gradients, what="gradients")
    composed, composed_gradients = differentiated(mamba_inner_ref, inputs)
    close(composed, expected, what="mamba_inner_ref")
    close(composed_gradients, expected_gradients, what="gradients of mamba_inner_ref")


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("given_B, given_C", [(False, False), (True, False), (True, True)])
def test_inner_equals_its_parts_for_unscaled_weights(
    given_B: bool, given_C: bool, is_complex: bool
) -> None:
    """Shapes, draws and tolerances of upstream's test: outputs reach 1e8, and differences of
    rounding before the scan would exceed the tolerances many times.
    """
    torch.manual_seed(0)
    batch, channels, states, rank, length = 2, 768, 8, 48, 128
    wtype = torch.complex64 if is_complex else torch.float32
    both = states * (2 if is_complex else 1)
    inputs = (
        torch.randn(batch, 2 * channels, length),
        torch.randn(channels, 1, 3),
        torch.randn(channels),
        torch.randn(rank + both * ((not given_B) + (not given_C)), channels),
        torch.randn(channels, rank),
        torch.randn(channels // 2, channels),
        None,
        -0.5 * torch.rand(channels, states, dtype=wtype),
        torch.randn(channels, states, dtype=wtype) if given_B else None,
        torch.randn(channels, states, dtype=wtype) if given_C else None,
        torch.randn(channels),
        0.5 * torch.rand(channels),
    )
    out, expected = mamba_inner_fn(*inputs), mamba_inner_ref(*inputs)
    torch.testing.assert_close(out, expected, rtol=6e-4, atol=2e-3)


def test_inner_norms_B_C_and_delta() -> None:
    """The same composed of its parts: each norm after the projection that it belongs to."""
    torch.manual_seed(7)
    batch, channels, states, rank, length = 2, 8, 4, 3, 9
    xz = torch.randn(batch, 2 * channels, length)
    conv, x_proj = torch.randn(channels, 1, 4), torch.randn(rank + 2 * states, channels)
    delta_proj, out_proj = torch.randn(channels, rank), torch.randn(5, channels)
    A, D = -torch.rand(channels, states), torch.randn(channels)
    b_weight, c_weight, dt_weight = torch.rand(states), torch.rand(states), torch.rand(channels)
    out = mamba_inner_fn(
        xz,
        conv,
        None,
        x_proj,
        delta_proj,
        out_proj,
        None,
        A,
        D=D,
        b_rms_weight=b_weight,
        c_rms_weight=c_weight,
        dt_rms_weight=dt_weight,
        b_c_dt_rms_eps=1e-3,
    )
    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), conv, groups=channels))
    dt, B, C = (x.transpose(1, 2) @ x_proj.T).split([rank, states, states], dim=-1)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight

    y = selective_scan_ref(
        x,
        norm(dt @ delta_proj.T, dt_weight).transpose(1, 2),
        A,
        norm(B, b_weight).transpose(1, 2),
        norm(C, c_weight).transpose(1, 2),
        D,
        z=z,
        delta_softplus=True,
    )
    close(out, y.transpose(1, 2) @ out_proj.T)


def test_inner_in_bfloat16_with_float32_bias() -> None:
    """As transformers calls it."""
    torch.manual_seed(8)
    channels, states, rank = 8, 4, 2
    weights = [
        torch.randn(2, 2 * channels, 7),
        torch.randn(channels, 1, 4),
        torch.randn(channels),
        torch.randn(rank + 2 * states, channels),
        torch.randn(channels, rank),
        torch.randn(6, channels),
    ]
    rest = (torch.randn(6), -torch.rand(channels, states), None, None, torch.randn(channels))
    low = mamba_inner_fn(*(w.bfloat16() for w in weights), *rest)
    high = plain_inner(*(w.bfloat16().float() for w in weights), *rest)
    assert low.dtype == torch.bfloat16
    scale = high.abs().max()
    close(low.float() / scale, high / scale, torch.bfloat16)


def test_inner_under_autocast() -> None:
    torch.manual_seed(9)
    channels, states, rank = 8, 4, 2
    inputs = (
        torch.randn(2, 2 * channels, 7),
        torch.randn(channels, 1, 4),
        torch.randn(channels),
        torch.randn(rank + 2 * states, channels),
        torch.randn(channels, rank),
        torch.randn(6, channels),
        None,
        -torch.rand(channels, states),
    )
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        low = mamba_inner_fn(*inputs)
    high = plain_inner(*inputs)
    assert low.dtype == torch.bfloat16
    scale = high.abs().max()
    close(low.float() / scale, high / scale, torch.bfloat16)


def test_rms_norm_forward() -> None:
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)
    expected = F.rms_norm(x, (16,), weight, 1e-6) + bias
    close(rms_norm_forward(x, weight, bias), expected)
    layer = rms_norm_forward(x, weight, bias, eps=1e-5, is_rms_norm=False)
    close(layer, F.layer_norm(x, (16,), weight, bias, 1e-5))


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("channels, states", [(24, 16), (37, 5)])
def test_state_update(channels: int, states: int, gated: bool, itype: torch.dtype) -> None:
    torch.manual_seed(10)
    batch = 3
    state = torch.randn(batch, channels, states, dtype=itype)
    x, dt = torch.randn(batch, channels, dtype=itype), torch.randn(batch, channels, dtype=itype)
    A, D, bias = (
        -torch.rand(channels, states) - 1.0,
        torch.randn(channels),
        torch.rand(channels) - 4.0,
    )
    B, C = torch.randn(batch, states), torch.randn(batch, states)
    z = torch.randn_like(x) if gated else None
    expected_state = state.clone()
    expected = selective_state_update_ref(
        expected_state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True
    )
    out = selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    assert out.dtype == itype
    close(state, expected_state, itype)
    close(out, expected, itype)


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_state_update_with_heads(groups: int, tied: bool, itype: torch.dtype) -> None:
    torch.manual_seed(11)
    batch, heads, width, states = 2, 4, 16, 24
    state = torch.randn(batch, heads, width, states, dtype=itype)
    x = torch.randn(batch, heads, width, dtype=itype)
    if tied:
        dt = torch.randn(batch, heads, 1, dtype=itype).expand(-1, -1, width)
        bias = (torch.rand(heads, 1) - 4.0).expand(-1, width)
        A = (-torch.rand(heads, 1, 1) - 1.0).expand(-1, width, states)
        D = torch.randn(heads, 1).expand(-1, width)
    else:
        dt = torch.randn(batch, heads, width, dtype=itype)
        bias, D = torch.rand(heads, width) - 4.0, torch.randn(heads, width)
        A = -torch.rand(heads, width, states) - 1.0
    B, C = torch.randn(batch, groups, states), torch.randn(batch, groups, states)
    z = torch.randn_like(x)
    expected_state = state.clone()
    expected = selective_state_update_ref(
        expected_state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True
    )
    out = selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    close(state, expected_state, itype)
    close(out, expected, itype)


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("with_heads", [False, True])
def test_state_update_of_chosen_rows(with_heads: bool, itype: torch.dtype) -> None:
    torch.manual_seed(12)
    states, rows = 16, 11
    inner = (4, 8) if with_heads else (12,)
    pool = torch.randn(rows, *inner, states, dtype=itype)
    before = pool.clone()
    x, dt = torch.randn(3, *inner, dtype=itype), torch.randn(3, *inner, dtype=itype)
    A, D, bias = -torch.rand(*inner, states) - 1.0, torch.randn(inner), torch.rand(inner) - 4.0
    B, C = torch.randn(3, 2, states), torch.randn(3, 2, states)
    if not with_heads:
        B, C = B[:, 0], C[:, 0]
    indices = torch.tensor([4, -1, 9], dtype=torch.int32)
    chosen = pool[[4, 9]]
    kept = [0, 2]
    expected = selective_state_update_ref(
        chosen, x[kept], dt[kept], A, B[kept], C[kept], D=D, dt_bias=bias, dt_softplus=True
    )
    out = selective_state_update(
        pool,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=bias,
        dt_softplus=True,
        state_batch_indices=indices,
    )
    close(out[kept], expected, itype)
    assert not out[1].any()
    close(pool[[4, 9]], chosen, itype)
    before[[4, 9]] = pool[[4, 9]]
    assert torch.equal(pool, before)


def test_state_update_reference_is_one_step_of_the_scan() -> None:
    torch.manual_seed(13)
    batch, channels, states, length = 2, 6, 4, 5
    u, delta = torch.randn(batch, channels, length), torch.rand(batch, channels, length)
    A, D = -torch.rand(channels, states), torch.randn(channels)
    B, C = torch.randn(batch, states, length), torch.randn(batch, states, length)
    out, last = selective_scan_ref(u, delta, A, B, C, D, return_last_state=True)
    state = torch.zeros(batch, channels, states)
    for t in range(length):
        step = selective_state_update_ref(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D=D
        )
        close(step, out[..., t])
    close(state, last)
