"""ssd, its backward and its forms in discrete time against NumPy in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
from reference import check_gradients, close, numbers

from krait import ops

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all options": {"skip": 1, "gate": True, "bias": True, "softplus": True, "initial": True},
    "limits, D of channels": {"skip": 2, "limit": (0.0625, 0.1875)},
    "reverse": {"reverse": True, "initial": True},
    "seq_idx": {"sequences": "seq_idx", "initial": True, "gate": True},
    "packed": {"sequences": "cu_seqlens", "initial": True},
    "few tokens": {"length": 3, "initial": True},
    "no tokens": {"length": 0, "initial": True},
    "no rows": {"batch": 0},
    "no heads": {"heads": 0, "groups": 1},
}


def make(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    length: int = 90,
    heads: int = 4,
    headdim: int = 5,
    groups: int = 2,
    d_state: int = 6,
    skip: int = 0,
    gate: bool = False,
    bias: bool = False,
    softplus: bool = False,
    initial: bool = False,
    reverse: bool = False,
    limit: tuple[float, float] = (0.0, math.inf),
    sequences: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    if sequences == "cu_seqlens":
        batch = 1
    cuts = np.array([0, 0, length // 2, length])
    count = len(cuts) - 1 if sequences == "cu_seqlens" else batch
    arrays = {
        "x": numbers(rng, (batch, length, heads, headdim)),
        "dt": numbers(rng, (batch, length, heads), 0.01) * 0.3,
        "A": numbers(rng, (heads,)) - 1.5,
        "B": numbers(rng, (batch, length, groups, d_state)),
        "C": numbers(rng, (batch, length, groups, d_state)),
        "D": numbers(rng, (heads, headdim)[:skip]) if skip else None,
        "z": numbers(rng, (batch, length, heads, headdim)) if gate else None,
        "dt_bias": numbers(rng, (heads,)) * 0.1 if bias else None,
        "initial_states": numbers(rng, (count, heads, headdim, d_state)) if initial else None,
    }
    options: dict[str, Any] = {"dt_softplus": softplus, "dt_limit": limit, "reverse": reverse}
    if sequences == "cu_seqlens":
        options["cu_seqlens"] = cuts
    elif sequences:
        ids = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
        options["seq_idx"] = np.where(rng.random((batch, length)) < 0.1, -1, ids).astype(np.int32)
    return arrays, options


def rounded(arrays: dict[str, Any]) -> dict[str, Any]:
    return {n: None if a is None else a.astype(np.float32) for n, a in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_forward(rng: np.random.Generator, case: str) -> None:
    arrays, options = make(rng, **CASES[case])
    expected = reference.ssd(**arrays, **options)
    for chunk_size in (0, 16):
        for precision, tolerance in ((lambda a: a, 1e-12), (rounded, 2e-5)):
            inputs = precision(arrays)
            found = ops.ssd(**inputs, **options, chunk_size=chunk_size, return_final_states=True)
            assert found[0].dtype == inputs["x"].dtype
            close(found[0], expected[0], tolerance, "out")
            close(found[1], expected[1], tolerance, "final_states")


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("no")])
def test_backward(rng: np.random.Generator, case: str) -> None:
    arrays, options = make(rng, **CASES[case])
    dout = numbers(rng, arrays["x"].shape)
    dstates = numbers(rng, reference.ssd(**arrays, **options)[1].shape)

    def loss(**inputs: Any) -> Any:
        out, states = reference.ssd(**inputs, **options)
        return (out * dout).sum() + (states * dstates).sum()

    gradients = ops.ssd_backward(**arrays, **options, dout=dout, dfinal_states=dstates)
    named = {name[1:]: gradient for name, gradient in gradients._asdict().items()}
    # A clamp has a corner, which a difference may step over.
    check_gradients(loss, arrays, named, rng, 1e-3 if "limit" in CASES[case] else 1e-6)

    inputs = {**rounded(arrays), **rounded({"dout": dout, "dfinal_states": dstates})}
    for name, gradient in ops.ssd_backward(**inputs, **options)._asdict().items():
        if gradient is not None:
            close(gradient, named[name[1:]], 2e-4, name)


def test_states_at_positions(rng: np.random.Generator) -> None:
    arrays, options = make(rng, length=40)
    positions = np.array([[0, 39], [7, 20]])
    _, states = ops.ssd(**rounded(arrays), **options, state_positions=positions)
    assert states.shape == (2, 2, 4, 5, 6)
    for b, row in enumerate(positions):
        for m, t in enumerate(row):
            shorter = {
                name: array[:, : t + 1] if name in ("x", "dt", "B", "C") else array
                for name, array in arrays.items()
            }
            close(states[b, m], reference.ssd(**shorter, **options)[1][b], 2e-5, f"{b}, {m}")


def test_discrete_forms(rng: np.random.Generator) -> None:
    arrays, _ = make(rng, groups=4, length=33)
    x, dt, A, B, C = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
    expected, state = reference.ssd(x, dt, A, B, C)
    single = [a.astype(np.float32) for a in (x, dt, A)]
    X, dA = ops.ssd_discretize(*single)
    close(X, x * dt[..., None], 1e-6, "X")
    close(dA, dt * A, 1e-6, "A")
    Y, final = ops.ssd_minimal_discrete(X, dA, B.astype(np.float32), C.astype(np.float32), 8)
    close(Y, expected, 2e-5, "Y")
    close(final, state, 2e-5, "final_state")
    back, decay = ops.ssd_undiscretize(X, dA, single[1])
    close(back, x, 1e-5, "x")
    close(decay, np.broadcast_to(A, dt.shape), 1e-5, "A")


def test_step_is_ssd(rng: np.random.Generator) -> None:
    arrays, _ = make(rng, skip=1, gate=True, bias=True, length=6)
    expected, last = reference.ssd(**arrays, dt_softplus=True, dt_limit=(0.1, 0.9))
    inputs = rounded(arrays)
    # Rows of the state in another order, and a padding slot.
    state = np.zeros((5, 4, 5, 6), np.float32)
    rows = np.array([3, 1])
    for t in range(6):
        out = ops.state_update(
            state,
            *(inputs[name][:, t] for name in ("x", "dt")),
            inputs["A"],
            *(inputs[name][:, t] for name in ("B", "C")),
            inputs["D"],
            inputs["z"][:, t],
            inputs["dt_bias"],
            state_batch_indices=rows,
            dt_softplus=True,
            dt_limit=(0.1, 0.9),
        )
        close(out, expected[:, t], 1e-5, f"token {t}")
    close(state[rows], last, 1e-5, "state")
    assert not state[[0, 2, 4]].any()


def test_messages(rng: np.random.Generator) -> None:
    inputs = rounded(make(rng)[0])
    with pytest.raises(
        ValueError, match=r"^\[ssd\] dt has shape \(2, 90, 3\), expected \(2, 90, 4\)"
    ):
        ops.ssd(**{**inputs, "dt": inputs["dt"][:, :, :3]})
    with pytest.raises(ValueError, match=r"^\[ssd\] dt_limit is \(1, 0\), expected low <= high$"):
        ops.ssd(**inputs, dt_limit=(1.0, 0.0))
    for wrong in (1.0, (1.0,), (0.0, "x")):
        with pytest.raises(TypeError, match=r"^\[ssd\] dt_limit is .*, expected two numbers$"):
            ops.ssd(**inputs, dt_limit=wrong)
    with pytest.raises(ValueError, match=r"^\[ssd\] out overlaps x$"):
        ops.ssd(**inputs, out=inputs["x"])
    with pytest.raises(
        ValueError, match=r"^\[ssd\] state_positions has shape \(3,\), expected \(B, M"
    ):
        ops.ssd(**inputs, state_positions=np.zeros(3, np.int64))
