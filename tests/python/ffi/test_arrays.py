"""Kinds of arrays, element types, strides, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import close, numbers

from krait import ops
from krait._library import library

F32 = np.float32


def inputs(rng: np.random.Generator) -> list[np.ndarray]:
    return [
        numbers(rng, (2, 6, 40)).astype(F32),
        (numbers(rng, (2, 6, 40), 0.01) * 0.3).astype(F32),
        (numbers(rng, (6, 4)) - 1.5).astype(F32),
        numbers(rng, (2, 4, 40)).astype(F32),
        numbers(rng, (2, 4, 40)).astype(F32),
    ]


def strided(array: np.ndarray, way: str) -> np.ndarray:
    """The same numbers, elsewhere in memory."""
    if way == "transposed":
        return np.ascontiguousarray(array.T).T
    if way == "padded":
        wide = np.zeros((*array.shape[:-1], array.shape[-1] * 2 + 3), array.dtype)
        wide[..., 1:-2:2] = array
        return wide[..., 1:-2:2]
    if way == "backwards":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    if way == "read-only":
        copy = array.copy()
        copy.flags.writeable = False
        return copy
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


@pytest.mark.parametrize("way", ["transposed", "padded", "backwards", "read-only", "of bytes"])
def test_strides(rng: np.random.Generator, way: str) -> None:
    arrays = inputs(rng)
    expected = ops.selective_scan(*arrays)
    found = ops.selective_scan(*(strided(array, way) for array in arrays))
    np.testing.assert_array_equal(found, expected)
    if way in ("transposed", "padded", "backwards"):
        out = strided(np.zeros_like(arrays[0]), way)
        assert ops.selective_scan(*arrays, out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_broadcast(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    arrays[3] = np.broadcast_to(arrays[3][:1], arrays[3].shape)
    dense = [np.ascontiguousarray(array) for array in arrays]
    np.testing.assert_array_equal(ops.selective_scan(*arrays), ops.selective_scan(*dense))


def test_results_lie_as_the_first_argument(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    arrays[0] = strided(arrays[0], "transposed")
    assert ops.selective_scan(*arrays).strides == arrays[0].strides


def test_element_types(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    expected = ops.selective_scan(*arrays).astype(float)
    half = [a.astype(np.float16) if a.ndim == 3 else a for a in arrays]
    found = ops.selective_scan(*half)
    assert found.dtype == np.float16
    close(found, expected, 5e-3)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = [a.astype(ml_dtypes.bfloat16) if a.ndim == 3 else a for a in arrays]
    half[1] = strided(half[1], "padded")
    half[3] = strided(half[3], "read-only")
    found, state = ops.selective_scan(*half, return_last_state=True)
    assert found.dtype == ml_dtypes.bfloat16
    assert state.dtype == F32
    close(found.astype(F32), expected, 3e-2)


def test_index_types(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    ids = np.repeat([[0, 1]], 2, axis=0).repeat(20, axis=1)
    for dtype in (np.int32, np.int64):
        ops.selective_scan(*arrays, seq_idx=ids.astype(dtype))
    with pytest.raises(ValueError, match=r"seq_idx has dtype i16, expected i32 or i64$"):
        ops.selective_scan(*arrays, seq_idx=ids.astype(np.int16))


def test_what_is_no_operand(rng: np.random.Generator) -> None:
    arrays = inputs(rng)

    def message(position: int, array: Any, exception: type[Exception] = ValueError) -> str:
        changed: list[Any] = list(arrays)
        changed[position] = array
        with pytest.raises(exception) as raised:
            ops.selective_scan(*changed)
        return str(raised.value)

    swapped = arrays[0].astype(arrays[0].dtype.newbyteorder())
    assert message(0, swapped).startswith("[selective_scan] u has byte order '>', expected")
    records = np.zeros((2, 6, 40), [("a", np.int8), ("b", F32)])["b"]
    assert message(1, records).startswith(
        "[selective_scan] delta has strides of (1200, 200, 5) bytes"
    )
    assert "delta has dtype" in message(1, arrays[1].astype(np.uint32))
    assert message(1, arrays[1].tolist(), TypeError) == (
        "[selective_scan] delta is a list, expected a NumPy array or one with __dlpack__"
    )
    assert message(0, 3.0, TypeError).startswith("[selective_scan] u is a float, expected")
    assert "expected at most double precision" in message(1, arrays[1].astype(np.longdouble))
    with pytest.raises(ValueError, match=r"out is read-only, expected a writable destination$"):
        ops.selective_scan(*arrays, out=strided(arrays[0], "read-only"))


X = np.ones((2, 3, 4), F32)
W = np.ones((3, 4), F32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.causal_conv1d(X, [1.0]), "[causal_conv1d] weight is a list, expected a NumPy"),
        (lambda: ops.linear(X, None), "[linear] weight is None, expected a NumPy array"),
        (lambda: ops.linear_backward(X, 3.0, X), "[linear_backward] weight is a float, expected"),
        (lambda: ops.embedding([0, 1], W), "[embedding] ids is a list, expected a NumPy array"),
        (lambda: ops.norm_backward(X, dout=None), "[norm_backward] dout is None, expected"),
        (lambda: ops.gated_silu_backward(X, None, X), "[gated_silu_backward] gate is None"),
        (
            lambda: ops.selective_scan_backward(X, X, None, W, W, dout=X),
            "[selective_scan] A is None, expected a NumPy array",
        ),
        (lambda: ops.adamw(X, [X], [X], [X], step=1), "[adamw] parameters is a ndarray, expected"),
        (lambda: ops.global_norm(X), "[global_norm] arrays is a ndarray, expected a list of"),
        (lambda: ops.norm(X, eps="1"), "[norm] eps is '1', expected a number"),
        (lambda: ops.norm(X, group_size=2.0), "[norm] group_size is 2.0, expected an integer"),
        (lambda: ops.sample(X[0, 0], top_k=1.5), "[sample] top_k is 1.5, expected an integer"),
        (
            lambda: ops.causal_conv1d_varlen_states(W, np.array([0, 3]), "2"),
            "[causal_conv1d_varlen_states] state_len is '2', expected an integer",
        ),
    ],
)
def test_arguments_of_another_type(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_many_dimensions(rng: np.random.Generator) -> None:
    x = numbers(rng, (1, 2, 1, 3, 1, 2, 1, 4)).astype(F32)
    assert ops.gelu(x).shape == x.shape
    with pytest.raises(ValueError, match=r"9 dimensions, expected at most 8$"):
        ops.gelu(x[None])


class Capsule:
    """An array of a library that nobody knows."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_anything_with_dlpack(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    found = ops.selective_scan(*map(Capsule, arrays))
    np.testing.assert_array_equal(found, ops.selective_scan(*arrays))


def test_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(rng)
    expected = ops.selective_scan(*arrays)
    tensors = [torch.from_numpy(array) for array in arrays]
    found, state = ops.selective_scan(*tensors, return_last_state=True)
    assert isinstance(found, torch.Tensor)
    assert isinstance(state, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), expected)
    last = ops.selective_scan(tensors[0].mT.contiguous().mT, *tensors[1:])
    assert last.stride() == (240, 1, 6)
    np.testing.assert_array_equal(last.numpy(), expected)
    wanting = [tensor.clone().requires_grad_() for tensor in tensors]
    assert not ops.selective_scan(*wanting).requires_grad
    half = [tensor.bfloat16() if tensor.ndim == 3 else tensor for tensor in tensors]
    found = ops.selective_scan(*half)
    assert found.dtype == torch.bfloat16
    close(found.float().numpy(), expected.astype(float), 3e-2)
    # Kinds may be mixed.
    mixed = ops.selective_scan(tensors[0], *arrays[1:])
    np.testing.assert_array_equal(mixed.numpy(), expected)


def test_a_destination_has_a_place_for_each_element(rng: np.random.Generator) -> None:
    arrays = inputs(rng)
    message = r"out has 2 elements at one place in dimension 0 \(it is expanded\), expected a place"
    out = np.lib.stride_tricks.as_strided(np.zeros((1, 6, 40), F32), (2, 6, 40), (0, 160, 4))
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(*arrays, out=out)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(*arrays, out=torch.zeros(1, 6, 40).expand(2, 6, 40))


def test_views_of_torch_whose_values_lie_nowhere(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    u, delta, A, B, C = [torch.from_numpy(array) for array in inputs(rng)]
    A = torch.complex(A, A)
    B = C = torch.cat([B, C], 2)
    assert torch.equal(
        ops.selective_scan(u, delta, A.conj(), B, C),
        ops.selective_scan(u, delta, A.conj().resolve_conj(), B, C),
    )
    negative = torch.complex(u, u).conj().imag
    assert negative.is_neg()
    assert torch.equal(ops.gelu(negative), ops.gelu(-u))
    with pytest.raises(ValueError, match=r"out is a negating view, expected a destination whose"):
        ops.gelu(u, out=negative)


def test_destinations_may_be_left_out(rng: np.random.Generator) -> None:
    """The functions of the library itself take None for what is not wanted."""
    u, delta, A, B, C = inputs(rng)
    last = np.zeros((2, 6, 4), F32)
    nothing = [None] * 7
    library().selective_scan(u, delta, A, B, C, *nothing, False, False, None, last, None, None)
    np.testing.assert_array_equal(
        last, ops.selective_scan(u, delta, A, B, C, return_last_state=True)[1]
    )


def test_wrong_calls_of_the_library() -> None:
    with pytest.raises(TypeError, match="selective_scan"):
        library().selective_scan(1, 2)
    with pytest.raises(AttributeError):
        _ = library().no_such_function
