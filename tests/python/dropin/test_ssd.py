"""SSD and its steps: against the recurrence token by token, whatever the chunks and sequences."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, close, differentiated
from mamba_ssm.modules.ssd_minimal import segsum, segsum_unstable, ssd_minimal_discrete
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import _chunk_scan_fwd, chunk_scan, chunk_scan_ref
from mamba_ssm.ops.triton.ssd_chunk_state import (
    _chunk_cumsum_fwd,
    _chunk_state_fwd,
    chunk_state,
    chunk_state_ref,
    chunk_state_varlen,
)
from mamba_ssm.ops.triton.ssd_combined import (
    _mamba_chunk_scan_combined_bwd,
    _mamba_chunk_scan_combined_fwd,
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_conv1d_scan_ref,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
    selective_scan_bwd,
    ssd_chunk_scan_combined_ref,
    ssd_selective_scan,
)
from mamba_ssm.ops.triton.ssd_state_passing import (
    _state_passing_bwd,
    _state_passing_fwd,
    state_passing,
    state_passing_ref,
)
from torch import Tensor

LIMIT = (0.01, 0.3)


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    initial_states: Optional[Tensor] = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """The definition of SSD in float64: (out, final states)."""
    dtype, heads = x.dtype, x.shape[2]
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (m.repeat_interleave(heads // m.shape[2], dim=2) for m in (B, C))
    state = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3], dtype=torch.float64)
    if initial_states is not None:
        state = initial_states.double()
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        drive = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        state = decay * state + drive
        outputs.append((state * C[:, t].unsqueeze(-2)).sum(-1))
    out = torch.stack(outputs, dim=1)
    if D is not None:
        out = out + x * (D if D.dim() == 2 else D[:, None]).double()
    if z is not None:
        out = out * F.silu(z.double())
    return out.to(dtype), state.float()


def problem(
    length: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    groups: int = 2,
    seed: int = 0,
    D_has_hdim: bool = False,
) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, z, dt_bias, initial states."""
    torch.manual_seed(seed)
    heads, width, states = 4, 6, 5
    return (
        torch.randn(batch, length, heads, width, dtype=dtype),
        torch.randn(batch, length, heads, dtype=dtype),
        -torch.rand(heads) - 0.2,
        torch.randn(batch, length, groups, states, dtype=dtype),
        torch.randn(batch, length, groups, states, dtype=dtype),
        torch.randn(heads, width) if D_has_hdim else torch.randn(heads),
        torch.randn(batch, length, heads, width, dtype=dtype),
        torch.randn(heads),
        torch.randn(batch, heads, width, states),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, chunk_size", [(1, 16), (16, 16), (37, 16), (70, 64), (64, 8)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("limited", [False, True])
def test_combined(
    limited: bool, groups: int, length: int, chunk_size: int, dtype: torch.dtype
) -> None:
    inputs = problem(length, dtype, groups=groups, D_has_hdim=limited)
    limit = LIMIT if limited else (0.0, float("inf"))

    def ours(x, dt, A, B, C, D, z, dt_bias, initial):  # type: ignore[no-untyped-def]
        return mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D=D,
            z=z,
            dt_bias=dt_bias,
            initial_states=initial,
            dt_softplus=True,
            dt_limit=limit,
            return_final_states=True,
        )

    def plain(*inputs):  # type: ignore[no-untyped-def]
        return recurrence(*inputs, dt_limit=limit)

    outputs, gradients = differentiated(ours, inputs)
    expected, expected_gradients = differentiated(plain, inputs)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
    close(outputs, expected, dtype)
    close(gradients, expected_gradients, dtype, "gradients")


def test_what_is_returned() -> None:
    x, dt, A, B, C, *_ = problem(12, batch=1)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = mamba_chunk_scan_combined(x, dt, A, B, C, 8)
    assert isinstance(out, Tensor)
    both = mamba_chunk_scan_combined(
        x, dt, A, B, C, 8, cu_seqlens=bounds, return_final_states=True, return_varlen_states=True
    )
    assert [tuple(t.shape) for t in both] == [(1, 12, 4, 6), (1, 4, 6, 5), (2, 4, 6, 5)]
    close(both[1], both[2][1:])
    states = mamba_chunk_scan_combined(
        x, dt, A, B, C, 8, cu_seqlens=bounds, return_varlen_states=True
    )
    assert len(states) == 2
    close(states[1], both[2])
    compiled = torch.compile(mamba_chunk_scan_combined, fullgraph=True, backend="aot_eager")
    again = compiled(
        x, dt, A, B, C, 8, cu_seqlens=bounds, return_final_states=True, return_varlen_states=True
    )
    close(again, both, what="under torch.compile")
    # The last sequence that has tokens leaves the row's final states.
    empty_end = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    final = mamba_chunk_scan_combined(
        x, dt, A, B, C, 8, cu_seqlens=empty_end, return_final_states=True
    )[1]
    close(final, both[1])
    with pytest.raises(TypeError, match="cu_seqlens is a list, expected a tensor"):
        mamba_chunk_scan_combined(x, dt, A, B, C, 8, cu_seqlens=[0, 12])
    with pytest.raises(ValueError, match="without cu_seqlens"):
        mamba_chunk_scan_combined(x, dt, A, B, C, 8, return_varlen_states=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[5, 3, 20], [16, 1, 15], [1, 1, 1], [40], [7, 0, 9]])
@pytest.mark.parametrize("numbered", ["seq_idx", "cu_seqlens", "both"])
def test_packed_sequences(numbered: str, lengths: list[int], dtype: torch.dtype) -> None:
    x, dt, A, B, C, D, z, dt_bias, _ = problem(sum(lengths), dtype, batch=1, groups=1)
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = (x, dt, A, B, C, D, z, dt_bias)

    def ours(x, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
        return mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            16,
            D=D,
            z=z,
            dt_bias=dt_bias,
            seq_idx=None if numbered == "cu_seqlens" else seq_idx[None].to(torch.int32),
            cu_seqlens=None if numbered == "seq_idx" else bounds,
            dt_softplus=True,
            return_final_states=True,
            return_varlen_states=numbered != "seq_idx",
        )

    def plain(x, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
        pieces = zip(*(t.split(lengths, dim=1) for t in (x, dt, B, C, z)))
        results = [
            recurrence(x, dt, A, B, C, D, z, dt_bias) for x, dt, B, C, z in pieces if x.shape[1]
        ]
        out = torch.cat([r[0] for r in results], dim=1)
        if numbered == "seq_idx":
            return out, results[-1][1]
        found = iter([r[1] for r in results])
        empty = torch.zeros_like(results[0][1])
        return out, results[-1][1], torch.cat([next(found) if n else empty for n in lengths])

    outputs, gradients = differentiated(ours, inputs)
    expected, expected_gradients = differentiated(plain, inputs)
    close(outputs, expected, dtype)
    close(gradients, expected_gradients, dtype, "gradients")


def test_initial_state_of_a_row_belongs_to_its_first_sequence() -> None:
    x, dt, A, B, C, *_, initial = problem(20, batch=1)
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
    out, states = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        16,
        initial_states=initial,
        cu_seqlens=bounds,
        dt_softplus=True,
        return_varlen_states=True,
    )
    first = recurrence(x[:, :8], dt[:, :8], A, B[:, :8], C[:, :8], initial_states=initial)
    second = recurrence(x[:, 8:], dt[:, 8:], A, B[:, 8:], C[:, 8:])
    close(out, torch.cat([first[0], second[0]], dim=1))
    close(states, torch.cat([first[1], second[1]]))


@pytest.mark.parametrize("length, chunk_size", [(1, 16), (37, 16), (48, 16)])
@pytest.mark.parametrize("groups", [1, 2])
def test_steps(groups: int, length: int, chunk_size: int) -> None:
    """Chunk states, their passing and the scan of chunks: each by itself, and all together."""
    x, dt, A, B, C, D, z, dt_bias, initial = problem(length, groups=groups)
    dA_cumsum, step = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias=dt_bias, dt_softplus=True)
    chunks = -(-length // chunk_size)
    assert dA_cumsum.shape == step.shape == (2, 4, chunks, chunk_size)
    missing = chunks * chunk_size - length
    expected_step = F.pad(F.softplus(dt + dt_bias), (0, 0, 0, missing))
    close(step, expected_step.transpose(1, 2).unflatten(-1, (chunks, chunk_size)))
    close(dA_cumsum, (step * A[:, None, None]).cumsum(-1))

    states, gradients = differentiated(chunk_state, (B, x, step, dA_cumsum))
    expected, expected_gradients = differentiated(chunk_state_ref, (B, x, step, dA_cumsum))
    close(states, expected)
    close(gradients, expected_gradients, what="gradients of chunk_state")
    left, last = states[0].flatten(-2), dA_cumsum[..., -1]
    start = initial.flatten(-2)
    passed, gradients = differentiated(state_passing, (left, last, start))
    expected, expected_gradients = differentiated(state_passing_ref, (left, last, start))
    close(passed, expected)
    close(gradients, expected_gradients, what="gradients of state_passing")
    before = passed[0].unflatten(-1, (6, 5))
    out, gradients = differentiated(chunk_scan, (B, C, x, step, dA_cumsum, before, D, z))
    expected, expected_gradients = differentiated(
        chunk_scan_ref, (B, C, x, step, dA_cumsum, before, D, z)
    )
    close(out, expected)
    close(gradients, expected_gradients, what="gradients of chunk_scan")
    whole, final = recurrence(x, dt, A, B, C, D, z, dt_bias, initial)
    close(out[0], whole)
    close(passed[1].unflatten(-1, (6, 5)), final)

    whole, _ = recurrence(x, dt, A, B, C, D, z, dt_bias)
    for function in (mamba_chunk_scan, ssd_chunk_scan_combined_ref):
        close(function(x, dt, A, B, C, chunk_size, D, z, dt_bias, True), whole)


def test_gradients_of_state_passing_without_autograd() -> None:
    torch.manual_seed(3)
    states, last, initial = torch.randn(2, 5, 4, 7), -torch.rand(2, 4, 5), torch.randn(2, 4, 7)
    seq_idx = torch.tensor([[0] * 9 + [1] * 11, [0] * 20], dtype=torch.int32)
    for numbers in (None, seq_idx):
        inputs = [t.clone().requires_grad_() for t in (states, last, initial)]
        out, final = _state_passing_fwd(*inputs, seq_idx=numbers, chunk_size=4)
        dout, dfinal = torch.randn_like(out), torch.randn_like(final)
        expected = torch.autograd.grad((out, final), inputs, (dout, dfinal))
        found = _state_passing_bwd(
            out.detach(),
            last,
            dout,
            dfinal_states=dfinal,
            seq_idx=numbers,
            has_initial_states=True,
            chunk_size=4,
        )
        close(found, expected)
        without = _state_passing_bwd(out.detach(), last, dout, seq_idx=numbers, chunk_size=4)
        assert without[2] is None


@pytest.mark.parametrize("lengths", [[5, 3, 20], [16, 1, 15], [16, 16], [1, 40, 2]])
def test_chunk_state_varlen(lengths: list[int]) -> None:
    x, dt, A, B, C, *_ = problem(sum(lengths), batch=1)
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    dA_cumsum, step = _chunk_cumsum_fwd(dt, A, 16, dt_softplus=True)
    states = _chunk_state_fwd(B, x, step, dA_cumsum, seq_idx=seq_idx)
    before, _ = _state_passing_fwd(
        states.flatten(-2), dA_cumsum[..., -1], seq_idx=seq_idx, chunk_size=16
    )
    found = chunk_state_varlen(
        B[0],
        x[0],
        step[0],
        dA_cumsum[0],
        bounds,
        before.unflatten(-1, (6, 5))[0],
    )
    pieces = zip(*(t.split(lengths, dim=1) for t in (x, dt, B, C)))
    close(found, torch.cat([recurrence(x, dt, A, B, C)[1] for x, dt, B, C in pieces]))


def test_states_are_written_where_asked() -> None:
    x, dt, A, B, *_ = problem(20, torch.bfloat16)
    dA_cumsum, step = _chunk_cumsum_fwd(dt, A, 8, dt_softplus=True)
    expected = _chunk_state_fwd(B, x, step, dA_cumsum)
    assert expected.dtype == torch.float32
    room = torch.empty_like(expected)
    assert _chunk_state_fwd(B, x, step, dA_cumsum, states=room) is room
    close(room, expected)
    low = _chunk_state_fwd(B, x, step, dA_cumsum, states_in_fp32=False)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [0, 3])
def test_bmm(groups: int) -> None:
    torch.manual_seed(4)
    shape = (2, 20, groups, 7) if groups else (2, 20, 7)
    a, b = torch.randn(shape), torch.randn(shape)
    seq_idx = torch.tensor([[0] * 5 + [1] * 15, [2] * 20], dtype=torch.int32)
    out = _bmm_chunk_fwd(a, b, 8, seq_idx=seq_idx, causal=True)
    assert out.shape == ((2, 3, groups, 8, 8) if groups else (2, 3, 8, 8))
    for i in range(20):
        for j in range(8 * (i // 8), i + 1):
            found = out[:, i // 8, ..., i % 8, j % 8]
            expected = (a[:, i] * b[:, j]).sum(-1)
            same = seq_idx[:, i] == seq_idx[:, j]
            close(found, torch.where(same[:, None] if groups else same, expected, 0.0))
    assert not out.triu(1).any()
    low = _bmm_chunk_fwd(a.bfloat16(), b.bfloat16(), 8)
    assert low.dtype == torch.bfloat16
    assert _bmm_chunk_fwd(a, b, 8, output_dtype=torch.float16).dtype == torch.float16


def test_chunk_scan_keeps_what_was_before_the_gate() -> None:
    x, dt, A, B, C, D, z, *_ = problem(20)
    dA_cumsum, step = _chunk_cumsum_fwd(dt, A, 8, dt_softplus=True)
    cb = _bmm_chunk_fwd(C, B, 8)
    before = torch.randn(2, 3, 4, 6, 5)
    out, ungated = _chunk_scan_fwd(cb, x, step, dA_cumsum, C, before, D=D, z=z)
    close(out, ungated * F.silu(z))
    plain, nothing = _chunk_scan_fwd(cb, x, step, dA_cumsum, C, before, D=D)
    assert nothing is None
    close(plain, ungated)


@pytest.mark.parametrize("packed", [False, True])
def test_combined_without_autograd(packed: bool) -> None:
    x, dt, A, B, C, D, z, dt_bias, initial = problem(37, batch=1)
    bounds = torch.tensor([0, 10, 37], dtype=torch.int32) if packed else None
    options: dict[str, Any] = dict(
        D=D, z=z, dt_bias=dt_bias, initial_states=initial, dt_softplus=True, dt_limit=LIMIT
    )
    results = _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, 16, cu_seqlens=bounds, **options)
    expected = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        16,
        cu_seqlens=bounds,
        return_final_states=True,
        return_varlen_states=packed,
        **options,
    )
    close(results[0], expected[0])
    close(results[5], expected[1])
    assert results[3].shape == (1, 4, 3, 16) and results[4].shape == (1, 3, 4, 6, 5)
    if packed:
        # The state handed over belongs to sequence 0, which this step alone does not see.
        close(results[6][1:], expected[2][1:])


def test_gradients_without_autograd() -> None:
    x, dt, A, B, C, D, z, dt_bias, initial = problem(21)
    inputs = [t.clone().requires_grad_() for t in (x, dt, A, B, C, D, z, dt_bias, initial)]
    out, final = recurrence(*inputs)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    expected = torch.autograd.grad((out, final), inputs, (dout, dfinal))
    dx, dz = torch.empty_like(x), torch.empty_like(z)
    *found, again = _mamba_chunk_scan_combined_bwd(
        dout,
        x,
        dt,
        A,
        B,
        C,
        out.detach(),
        16,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial,
        dfinal_states=dfinal,
        dt_softplus=True,
        dx=dx,
        dz=dz,
        recompute_output=True,
    )
    close(found, expected)
    close(again, out.detach())
    assert found[0].data_ptr() == dx.data_ptr() and found[6].data_ptr() == dz.data_ptr()
    short = _mamba_chunk_scan_combined_bwd(dout, x, dt.abs(), A, B, C, None, 16)
    assert len(short) == 9 and short[5:] == (None,) * 4


def test_by_way_of_the_selective_scan() -> None:
    x, dt, A, B, C, D, z, dt_bias, _ = problem(19)
    whole, _ = recurrence(x, dt, A, B, C, D, z, dt_bias)
    close(ssd_selective_scan(x, dt, A, B, C, D, z, dt_bias, True), whole)
    limited, _ = recurrence(x, dt, A, B, C, D, z, dt_bias, dt_limit=LIMIT)
    close(ssd_selective_scan(x, dt, A, B, C, D, z, dt_bias, True, LIMIT), limited)
    by_channel = ssd_selective_scan(
        x,
        dt.unsqueeze(-1).expand(-1, -1, -1, 6),
        A.repeat_interleave(6)[:, None].expand(-1, 5),
        B,
        C,
        D[:, None].expand(-1, 6),
        z,
        dt_bias[:, None].expand(-1, 6),
        True,
    )
    close(by_channel, whole)

    step = F.softplus(dt)
    inputs = [t.clone().requires_grad_() for t in (x, step, A, B, C, D, z)]
    out, _ = recurrence(*inputs, dt_softplus=False)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, dout)
    close(selective_scan_bwd(dout, x, step, A, B, C, D, z), expected)
    chunked = F.pad(step, (0, 0, 0, 13)).transpose(1, 2).unflatten(-1, (2, 16))
    found = selective_scan_bwd(dout, x, chunked, A, B, C, D, z)
    close(found[0], expected[0])
    close(found[1].flatten(2)[..., :19].transpose(1, 2), expected[1])
    assert selective_scan_bwd(dout, x, step, A, B, C)[5:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("beside", [0, 10])
@pytest.mark.parametrize("projects", [False, True])
def test_split_conv1d_scan(
    projects: bool, beside: int, norm: str, groups: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    batch, length, heads, width, states = 2, 23, 4, 6, 8
    inner = heads * width
    mixed = inner + 2 * groups * states
    inputs = (
        torch.randn(batch, length, 2 * beside + inner + mixed + heads, dtype=dtype),
        torch.randn(mixed, 4),
        torch.randn(mixed),
        torch.randn(heads),
        -torch.rand(heads) - 0.2,
        torch.randn(heads),
        None if norm == "none" else torch.rand(inner) + 0.5,
        0.3 * torch.randn(14, beside + inner, dtype=dtype) if projects else None,
        torch.randn(14) if projects else None,
    )

    def call(function, *inputs):  # type: ignore[no-untyped-def]
        zxbcdt, conv, conv_bias, dt_bias, A, D, norm_weight, weight, bias = inputs
        return function(
            zxbcdt,
            conv,
            conv_bias,
            dt_bias,
            A,
            D,
            16,
            dt_limit=LIMIT,
            rmsnorm_weight=norm_weight,
            rmsnorm_eps=1e-5,
            outproj_weight=weight,
            outproj_bias=bias,
            headdim=width,
            ngroups=groups,
            norm_before_gate=norm == "before",
        )

    outputs, gradients = differentiated(
        lambda *t: call(mamba_split_conv1d_scan_combined, *t), inputs
    )
    wide = [None if t is None else t.float() for t in inputs]
    expected, expected_gradients = differentiated(
        lambda *t: call(mamba_split_conv1d_scan_ref, *t), wide
    )
    assert outputs[0].dtype == dtype
    assert outputs[0].shape == (batch, length, 14 if projects else beside + inner)

    def scaled(found: Any, wanted: Any) -> None:
        size = wanted.abs().max()
        close(found.float() / size, wanted / size, dtype)

    scaled(outputs[0], expected[0])
    for found, wanted in zip(gradients, expected_gradients):
        assert (found is None) == (wanted is None)
        if found is not None:
            scaled(found, wanted)


def test_split_conv1d_scan_with_states_and_sequences() -> None:
    torch.manual_seed(6)
    heads, width, states = 4, 6, 8
    inner, mixed = heads * width, heads * width + 2 * states
    zxbcdt = torch.randn(1, 20, inner + mixed + heads)
    weights = (
        torch.randn(mixed, 4),
        torch.randn(mixed),
        torch.randn(heads),
        -torch.rand(heads) - 0.2,
        torch.randn(heads, width),
    )
    seq_idx = torch.tensor([[0] * 7 + [1] * 13], dtype=torch.int32)
    out, final = mamba_split_conv1d_scan_combined(
        zxbcdt, *weights, 16, seq_idx=seq_idx, return_final_states=True
    )
    pieces = [
        mamba_split_conv1d_scan_combined(p, *weights, 16, return_final_states=True)
        for p in zxbcdt.split([7, 13], dim=1)
    ]
    close(out, torch.cat([p[0] for p in pieces], dim=1))
    close(final, pieces[1][1])
    with pytest.raises(ValueError, match="expected headdim or D of"):
        mamba_split_conv1d_scan_combined(zxbcdt, *weights[:4], torch.randn(heads), 16)
    with pytest.raises(ValueError, match="zxbcdt has 69"):
        mamba_split_conv1d_scan_combined(F.pad(zxbcdt, (0, 1)), *weights, 16)


def test_conv1d_scan_ref() -> None:
    torch.manual_seed(7)
    heads, width, states = 2, 3, 4
    xBC, dt = torch.randn(2, 9, heads * width + 2 * states), torch.randn(2, 9, heads)
    conv, A = torch.randn(xBC.shape[-1], 4), -torch.rand(heads)
    mixed = F.silu(
        F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), conv[:, None], groups=xBC.shape[-1])
    ).transpose(1, 2)
    x, B, C = mixed.split([heads * width, states, states], dim=-1)
    expected, _ = recurrence(x.unflatten(-1, (heads, width)), dt, A, B[:, :, None], C[:, :, None])
    out = mamba_conv1d_scan_ref(xBC, conv, None, dt, A, 8, dt_softplus=True, headdim=width)
    close(out, expected)


@pytest.mark.parametrize("length, block", [(16, 4), (13, 4), (3, 8), (8, 8)])
@pytest.mark.parametrize("continued", [False, True])
def test_minimal(continued: bool, length: int, block: int) -> None:
    torch.manual_seed(8)
    batch, heads, width, states = 2, 3, 5, 4
    x, dt = torch.randn(batch, length, heads, width), torch.rand(batch, length, heads)
    A = -torch.rand(heads)
    B, C = torch.randn(batch, length, heads, states), torch.randn(batch, length, heads, states)
    initial = torch.randn(batch, 1, heads, width, states) if continued else None
    found = ssd_minimal_discrete(x * dt.unsqueeze(-1), dt * A, B, C, block, initial)
    expected = recurrence(
        x,
        dt,
        A,
        B,
        C,
        initial_states=None if initial is None else initial[:, 0],
        dt_softplus=False,
    )
    close(found, expected)


def test_segsum() -> None:
    x = torch.randn(2, 6)
    for function in (segsum, segsum_unstable):
        sums = function(x)
        for i in range(6):
            for j in range(6):
                if j > i:
                    assert torch.isinf(sums[:, i, j]).all()
                else:
                    close(sums[:, i, j], x[:, j + 1 : i + 1].sum(-1))
