"""selective_scan and its backward against NumPy in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from reference import check_gradients, close, numbers

from krait import ops

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all options": {"skip": True, "gate": True, "bias": True, "softplus": True, "initial": True},
    "groups": {"groups": 2, "skip": True},
    "constant B and C": {"constant": True, "bias": True},
    "reverse": {"reverse": True, "initial": True},
    "seq_idx": {"sequences": "seq_idx", "initial": True, "gate": True},
    "seq_idx, reverse": {"sequences": "seq_idx", "reverse": True},
    "packed": {"sequences": "cu_seqlens", "initial": True, "softplus": True},
    "complex": {"complex": True, "skip": True, "gate": True, "initial": True},
    "complex, constant": {"complex": True, "constant": True},
    "one token": {"length": 1, "initial": True},
    "no tokens": {"length": 0, "initial": True},
    "no rows": {"batch": 0, "initial": True},
    "no channels": {"channels": 0},
    "no states": {"d_state": 0, "skip": True},
}


def make(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 6,
    length: int = 75,
    d_state: int = 4,
    groups: int = 1,
    skip: bool = False,
    gate: bool = False,
    bias: bool = False,
    softplus: bool = False,
    initial: bool = False,
    reverse: bool = False,
    constant: bool = False,
    complex: bool = False,
    sequences: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays that have gradients, options), in double precision."""
    if sequences == "cu_seqlens":
        batch = 1

    def like_state(*shape: int) -> np.ndarray:
        values = numbers(rng, shape)
        return values + 1j * numbers(rng, shape) if complex else values

    parts = 2 if complex else 1
    of_factor = (batch, groups, d_state, parts * length)
    cuts = np.array([0, length // 3, length // 3, length - 2, length])
    count = len(cuts) - 1 if sequences == "cu_seqlens" else batch
    arrays = {
        "u": numbers(rng, (batch, channels, length)),
        "delta": numbers(rng, (batch, channels, length), 0.01) * 0.3,
        "A": like_state(channels, d_state) - 1.5,
        "B": like_state(channels, d_state) if constant else numbers(rng, of_factor),
        "C": like_state(channels, d_state) if constant else numbers(rng, of_factor),
        "D": numbers(rng, (channels,)) if skip else None,
        "z": numbers(rng, (batch, channels, length)) if gate else None,
        "delta_bias": numbers(rng, (channels,)) * 0.1 if bias else None,
        "initial_state": like_state(count, channels, d_state) if initial else None,
    }
    options: dict[str, Any] = {"delta_softplus": softplus, "reverse": reverse}
    if sequences == "cu_seqlens":
        options["cu_seqlens"] = cuts.astype(np.int32)
    elif sequences:
        ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
        options["seq_idx"] = np.where(rng.random((batch, length)) < 0.1, -1, ids)
    return arrays, options


def rounded(arrays: dict[str, Any]) -> dict[str, Any]:
    """In single precision."""

    def narrow(array: Any) -> Any:
        if array is None:
            return None
        return array.astype(np.complex64 if np.iscomplexobj(array) else np.float32)

    return {name: narrow(array) for name, array in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_forward(rng: np.random.Generator, case: str) -> None:
    arrays, options = make(rng, **CASES[case])
    expected = reference.selective_scan(**arrays, **options)
    for precision, tolerance in ((lambda a: a, 1e-12), (rounded, 2e-5)):
        inputs = precision(arrays)
        found = ops.selective_scan(**inputs, **options, return_last_state=True)
        assert found[0].dtype == inputs["u"].dtype
        assert found[1].dtype == inputs["A"].dtype
        close(found[0], expected[0], tolerance, "out")
        close(found[1], expected[1], tolerance, "last_state")
        np.testing.assert_array_equal(ops.selective_scan(**inputs, **options), found[0])


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("no")])
def test_backward(rng: np.random.Generator, case: str) -> None:
    arrays, options = make(rng, **CASES[case])
    dout = numbers(rng, arrays["u"].shape)
    state = reference.selective_scan(**arrays, **options)[1]
    dlast = numbers(rng, state.shape)
    if np.iscomplexobj(state):
        dlast = dlast + 1j * numbers(rng, state.shape)

    def loss(**inputs: Any) -> Any:
        out, last = reference.selective_scan(**inputs, **options)
        return (out * dout).sum() + (last * dlast.conj()).real.sum()

    gradients = ops.selective_scan_backward(**arrays, **options, dout=dout, dlast_state=dlast)
    named = {name[1:]: gradient for name, gradient in gradients._asdict().items()}
    check_gradients(loss, arrays, named, rng)

    inputs = {**rounded(arrays), **rounded({"dout": dout, "dlast_state": dlast})}
    fast = ops.selective_scan_backward(**inputs, **options)
    for name, gradient in fast._asdict().items():
        if gradient is not None:
            close(gradient, named[name[1:]], 2e-4, name)


@pytest.mark.parametrize("case", ["plain", "seq_idx", "packed", "complex"])
def test_checkpoints_spare_the_walk(rng: np.random.Generator, case: str) -> None:
    arrays, options = make(rng, **CASES[case], length=200)
    inputs = rounded(arrays)
    out, checkpoints = ops.selective_scan(**inputs, **options, return_checkpoints=True)
    assert checkpoints.shape[0] > 0
    kept = ops.selective_scan_backward(**inputs, **options, dout=out, checkpoints=checkpoints)
    again = ops.selective_scan_backward(**inputs, **options, dout=out)
    for name, gradient in kept._asdict().items():
        np.testing.assert_array_equal(gradient, getattr(again, name), err_msg=name)
    changed = ops.selective_scan_backward(
        **inputs, **options, dout=out, checkpoints=np.full_like(checkpoints, 3)
    )
    assert not np.array_equal(changed.dA, again.dA)


def test_states_at_positions(rng: np.random.Generator) -> None:
    arrays, options = make(rng, initial=True, length=40)
    inputs = rounded(arrays)
    positions = np.array([[0, 17, 39], [5, 5, 38]])
    _, states = ops.selective_scan(**inputs, **options, state_positions=positions)
    for b, row in enumerate(positions):
        for m, t in enumerate(row):
            shorter = {
                name: array
                if array is None or name in ("A", "initial_state")
                else array[..., : t + 1]
                for name, array in inputs.items()
            }
            state = ops.selective_scan(**shorter, **options, return_last_state=True)[1]
            np.testing.assert_array_equal(states[b, m], state[b])


def test_in_place(rng: np.random.Generator) -> None:
    arrays, options = make(rng, gate=True, initial=True)
    inputs = rounded(arrays)
    out, last = ops.selective_scan(**inputs, **options, return_last_state=True)
    ops.selective_scan(**inputs, **options, out=inputs["z"], last_state=inputs["initial_state"])
    np.testing.assert_array_equal(inputs["z"], out)
    np.testing.assert_array_equal(inputs["initial_state"], last)


def test_messages(rng: np.random.Generator) -> None:
    arrays, _ = make(rng)
    inputs = rounded(arrays)
    with pytest.raises(
        ValueError, match=r"^\[selective_scan\] delta has shape \(2, 6, 74\), expected"
    ):
        ops.selective_scan(**{**inputs, "delta": inputs["delta"][:, :, 1:]})
    with pytest.raises(ValueError, match=r"^\[selective_scan\] delta is absent$"):
        ops.selective_scan(**{**inputs, "delta": None})
    with pytest.raises(
        ValueError, match=r"^\[selective_scan\] u has shape \(2, 6\), expected \(B, D"
    ):
        ops.selective_scan(**{**inputs, "u": inputs["u"][:, :, 0]})
    with pytest.raises(ValueError, match=r"return_checkpoints is given in double precision"):
        ops.selective_scan(**arrays, return_checkpoints=True)
    with pytest.raises(ValueError, match=r"both given, expected one of them$"):
        ops.selective_scan(
            **inputs, seq_idx=np.zeros((2, 75), np.int32), cu_seqlens=np.array([0, 75])
        )


def test_step_is_the_scan(rng: np.random.Generator) -> None:
    """state_update and selective_step, token by token, against the scan."""
    arrays, _ = make(rng, skip=True, gate=True, length=7)
    rank = 3
    low = numbers(rng, (2, 7, rank))
    weight, bias = numbers(rng, (6, rank)), numbers(rng, (6,))
    arrays["delta"] = np.einsum("blr,dr->bdl", low, weight)
    arrays["delta_bias"] = bias
    expected, last = reference.selective_scan(**arrays, delta_softplus=True)
    inputs = rounded(arrays)
    state, other = np.zeros((2, 6, 4), np.float32), np.zeros((2, 6, 4), np.float32)
    for t in range(7):
        x, delta, z = (inputs[name][:, :, t] for name in ("u", "delta", "z"))
        B, C = (inputs[name][:, 0, :, t] for name in ("B", "C"))
        A, D, dt_bias = inputs["A"], inputs["D"], inputs["delta_bias"]
        out = ops.state_update(state, x, delta, A, B, C, D, z, dt_bias, dt_softplus=True)
        close(out, expected[:, :, t], 1e-5, "state_update")
        out = ops.selective_step(
            other, x, *(a.astype(np.float32) for a in (low[:, t], weight)), dt_bias, A, B, C, D, z
        )
        close(out, expected[:, :, t], 1e-5, "selective_step")
    close(state, last, 1e-5, "state")
    close(other, last, 1e-5, "other")
