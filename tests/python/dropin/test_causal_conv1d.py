"""causal_conv1d: widths, layouts, states, sequences, decoding, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import (
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)
from helpers import DTYPES, close, differentiated


def test_reference_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    weight, bias = torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    assert causal_conv1d_ref(x, weight, bias).tolist() == [[[1.5, 12.5, 23.5]]]
    out, states = causal_conv1d_ref(
        x, weight, initial_states=torch.tensor([[[4.0]]]), return_final_states=True
    )
    assert out.tolist() == [[[41.0, 12.0, 23.0]]] and states.tolist() == [[[3.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 8, 37, 129])
@pytest.mark.parametrize("channel_last", [False, True])
def test_forward_and_backward(
    channel_last: bool, length: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    channels, batch = 24, 2
    if channel_last:
        x = torch.randn(batch, length, 2 * channels, dtype=dtype)[..., :channels].transpose(1, 2)
    else:
        x = torch.randn(batch, 2 * channels, length, dtype=dtype)[:, :channels]
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    initial = torch.randn(batch, width - 1, channels, dtype=dtype).transpose(1, 2)
    for silu, with_bias, with_initial in [
        (True, True, False),
        (False, False, True),
        (True, True, True),
    ]:
        inputs = (x, weight, bias if with_bias else None, initial if with_initial else None)

        def ours(x, weight, bias, initial):  # type: ignore[no-untyped-def]
            return causal_conv1d_fn(
                x,
                weight,
                bias,
                initial_states=initial,
                return_final_states=True,
                activation="silu" if silu else None,
            )

        def plain(x, weight, bias, initial):  # type: ignore[no-untyped-def]
            return causal_conv1d_ref(
                x,
                weight,
                bias,
                initial_states=initial,
                return_final_states=True,
                activation="silu" if silu else None,
            )

        outputs, gradients = differentiated(ours, inputs)
        expected, expected_gradients = differentiated(plain, inputs)
        assert outputs[0].dtype == dtype and outputs[0].shape == x.shape
        close(outputs, expected, dtype)
        close(gradients, expected_gradients, dtype, "gradients")


def test_sequences_with_states() -> None:
    """The states before a row belong to its first sequence; those after it are its last tokens."""
    torch.manual_seed(7)
    x, weight, bias = torch.randn(1, 8, 12), torch.randn(8, 4), torch.randn(8)
    initial = torch.randn(1, 8, 3)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    out, states = causal_conv1d_fn(
        x, weight, bias, seq_idx=seq_idx, initial_states=initial, return_final_states=True
    )
    first = causal_conv1d_ref(x[..., :5], weight, bias, initial_states=initial)
    close(out, torch.cat([first, causal_conv1d_ref(x[..., 5:], weight, bias)], dim=-1))
    close(states, x[..., -3:])


def test_output_may_be_changed_in_place() -> None:
    """A loss that adds to the output what the final states give."""
    torch.manual_seed(6)
    x, weight = torch.randn(2, 9, 8).transpose(1, 2), torch.randn(8, 4)

    def of(function, x, weight):  # type: ignore[no-untyped-def]
        out, states = function(x, weight, return_final_states=True, activation="silu")
        out += torch.sigmoid(states).sum(dim=-1, keepdim=True)
        return out

    outputs, gradients = differentiated(lambda *t: of(causal_conv1d_fn, *t), (x, weight))
    expected, expected_gradients = differentiated(lambda *t: of(causal_conv1d_ref, *t), (x, weight))
    close(outputs, expected)
    close(gradients, expected_gradients, what="gradients")


def test_final_states_out() -> None:
    x, weight = torch.randn(2, 8, 5), torch.randn(8, 4)
    room = torch.empty(2, 3, 8).transpose(1, 2)
    out, states = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=room)
    assert states.data_ptr() == room.data_ptr()
    close(room, x[..., -3:])
    close(out, causal_conv1d_ref(x, weight))
    room.zero_()
    close(causal_conv1d_fn(x, weight, final_states_out=room), out)
    close(room, x[..., -3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[5, 9], [1, 1, 30, 2], [40], [3, 64, 64, 1]])
def test_sequences_do_not_mix(lengths: list[int], width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    channels = 16
    x = torch.randn(1, sum(lengths), channels, dtype=dtype).transpose(1, 2)
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    seq_idx = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])

    def ours(x, weight, bias):  # type: ignore[no-untyped-def]
        return causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx[None], activation="silu")

    def plain(x, weight, bias):  # type: ignore[no-untyped-def]
        pieces = x.split(lengths, dim=-1)
        return torch.cat(
            [causal_conv1d_ref(p, weight, bias, activation="silu") for p in pieces], dim=-1
        )

    outputs, gradients = differentiated(ours, (x, weight, bias))
    expected, expected_gradients = differentiated(plain, (x, weight, bias))
    close(outputs, expected, dtype)
    close(gradients, expected_gradients, dtype, "gradients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("ring", [False, True])
def test_update(ring: bool, count: int, size: int, width: int, dtype: torch.dtype) -> None:
    """count 0: x without a dimension of tokens."""
    torch.manual_seed(2)
    batch, channels = 3, 20
    shape = (batch, channels) if count == 0 else (batch, channels, count)
    x = torch.randn(shape, dtype=dtype)
    state = torch.randn(batch, size, channels, dtype=dtype).transpose(1, 2)
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    seqlens = torch.tensor([0, 5, 1000], dtype=torch.int32) if ring else None
    expected_state = state.clone()
    expected = causal_conv1d_update_ref(
        x, expected_state, weight, bias, activation="silu", cache_seqlens=seqlens
    )
    out = causal_conv1d_update(x, state, weight, bias, activation="silu", cache_seqlens=seqlens)
    close(out, expected, dtype)
    assert torch.equal(state, expected_state)


def test_update_reference_continues_a_sequence() -> None:
    x, weight, bias = torch.randn(2, 6, 30), torch.randn(6, 4), torch.randn(6)
    whole = causal_conv1d_ref(x, weight, bias, activation="silu")
    shifted, ring = torch.zeros(2, 6, 5), torch.zeros(2, 6, 5)
    for t in range(30):
        out = causal_conv1d_update_ref(x[..., t], shifted, weight, bias, activation="silu")
        close(out, whole[..., t])
        seqlens = torch.full((2,), t, dtype=torch.int32)
        out = causal_conv1d_update_ref(
            x[..., t], ring, weight, bias, activation="silu", cache_seqlens=seqlens
        )
        close(out, whole[..., t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_update_of_chosen_rows(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    channels = 12
    x = torch.randn(4, channels, dtype=dtype)
    states = torch.randn(9, channels, width, dtype=dtype)
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    indices = torch.tensor([7, -1, 0, 3], dtype=torch.int32)
    rows = [7, 0, 3]
    chosen, before = states[rows], states.clone()
    expected = causal_conv1d_update_ref(x[[0, 2, 3]], chosen, weight, bias, activation="silu")
    out = causal_conv1d_update(
        x, states, weight, bias, activation="silu", conv_state_indices=indices
    )
    close(out[[0, 2, 3]], expected, dtype)
    assert not out[1].any()
    before[rows] = chosen
    assert torch.equal(states, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_varlen_states(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    lengths = [1, 0, 5, 30, 2]
    x = torch.randn(sum(lengths), 10, dtype=dtype)
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    states = causal_conv1d_varlen_states(x, bounds, size)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, bounds, size))
    assert torch.equal(states[3], x[36 - size : 36].T)
    assert not states[1].any() and not states[0][:, :-1].any()


def test_functions_without_autograd() -> None:
    torch.manual_seed(5)
    x, weight, bias = torch.randn(2, 8, 11), torch.randn(8, 4), torch.randn(8)
    initial, room = torch.randn(2, 8, 3), torch.empty(2, 8, 3)
    out = causal_conv1d_fwd_function(x, weight, bias, None, initial, room, True)
    close(out, causal_conv1d_ref(x, weight, bias, initial_states=initial, activation="silu"))
    close(room, x[..., -3:])
    dout, dfinal = torch.randn_like(out), torch.randn_like(room)
    dx = torch.empty_like(x)
    found = causal_conv1d_bwd_function(x, weight, bias, dout, None, initial, dfinal, dx, True, True)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias, initial)]
    results = causal_conv1d_ref(
        *inputs[:3], initial_states=inputs[3], return_final_states=True, activation="silu"
    )
    close(found, torch.autograd.grad(results, inputs, (dout, dfinal)))
    assert found[0].data_ptr() == dx.data_ptr()
    state, expected_state = initial.clone(), initial.clone()
    stepped = causal_conv1d_update_function(x[..., 0], state, weight, bias, False, None, None)
    close(stepped, causal_conv1d_update_ref(x[..., 0], expected_state, weight, bias))
    close(state, expected_state)


def test_refuses_other_activations() -> None:
    with pytest.raises(NotImplementedError, match="activation is 'relu'"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 2), activation="relu")


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.randn(2, 4, 10), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"final_states_out has shape \(2, 4, 2\), expected"):
        causal_conv1d_fn(x, weight, final_states_out=torch.randn(2, 4, 2))
    with pytest.raises(ValueError, match="state_len is -1, expected 0 or more"):
        causal_conv1d_varlen_states(x[0].T, torch.tensor([0, 10]), -1)
    with pytest.raises(TypeError, match="found None, expected a torch.Tensor"):
        causal_conv1d_fn(None, weight)
