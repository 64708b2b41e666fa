"""The operators in NumPy and double precision, as their headers define them, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def softplus(x: Array) -> Array:
    return np.logaddexp(x, 0.0)


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def tokens_of(
    length: int, seq_idx: Array | None, cu_seqlens: Array | None, reverse: bool
) -> list[tuple[int, int, bool, bool]]:
    """(token, state, fresh, padding) of one row in the order of time; `fresh` restarts from 0."""
    steps: list[tuple[int, int, bool, bool]] = []
    if cu_seqlens is not None:
        for state, (begin, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            order = range(int(begin), int(end))
            steps += [(t, state, False, False) for t in (reversed(order) if reverse else order)]
        return steps
    last = None
    for t in reversed(range(length)) if reverse else range(length):
        here = 0 if seq_idx is None else int(seq_idx[t])
        steps.append((t, 0, here >= 0 and last is not None and here != last, here < 0))
        if here >= 0:
            last = here
    return steps


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    batch, channels, length = u.shape
    d_state = A.shape[1]
    d = delta if delta_bias is None else delta + delta_bias[:, None]
    d = softplus(d) if delta_softplus else d
    complex_ = np.iscomplexobj(A)

    def at(factor: Array, b: int, t: int) -> Array:
        """(D, N) of token t."""
        if factor.ndim == 2:
            return factor
        full = factor[:, None] if factor.ndim == 3 else factor
        if complex_:
            full = full[..., 0::2] + 1j * full[..., 1::2]
        return np.repeat(full[b, :, :, t], channels // full.shape[1], axis=0)

    count = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = np.zeros((count, channels, d_state), A.dtype)
    if initial_state is not None:
        states += initial_state
    out = np.zeros(u.shape)
    for b in range(batch):
        row_ids = None if seq_idx is None else seq_idx[b]
        for t, state, fresh, padding in tokens_of(length, row_ids, cu_seqlens, reverse):
            if padding:
                continue
            s = b + state
            if fresh:
                states[s] = 0.0
            step = d[b, :, t, None]
            states[s] = np.exp(step * A) * states[s] + step * at(B, b, t) * u[b, :, t, None]
            y = (at(C, b, t) * states[s]).sum(-1)
            y = 2.0 * y.real if complex_ else y
            if D is not None:
                y = y + D * u[b, :, t]
            out[b, :, t] = y if z is None else y * silu(z[b, :, t])
    return out, states


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    batch, length, heads, headdim = x.shape
    d = dt if dt_bias is None else dt + dt_bias
    d = softplus(d) if dt_softplus else d
    d = np.clip(d, *dt_limit)
    B, C = (np.repeat(factor, heads // factor.shape[2], axis=2) for factor in (B, C))
    count = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = np.zeros((count, heads, headdim, B.shape[3]))
    if initial_states is not None:
        states += initial_states
    out = np.zeros(x.shape)
    for b in range(batch):
        row_ids = None if seq_idx is None else seq_idx[b]
        for t, state, fresh, padding in tokens_of(length, row_ids, cu_seqlens, reverse):
            if padding:
                continue
            s = b + state
            if fresh:
                states[s] = 0.0
            step = d[b, t, :, None, None]
            new = step * x[b, t, :, :, None] * B[b, t, :, None, :]
            states[s] = np.exp(step * A[:, None, None]) * states[s] + new
            y = (states[s] * C[b, t, :, None, :]).sum(-1)
            if D is not None:
                y = y + (D[:, None] if D.ndim == 1 else D) * x[b, t]
            out[b, t] = y if z is None else y * silu(z[b, t])
    return out, states


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
) -> tuple[Array, Array]:
    batch, channels, length = x.shape
    width = weight.shape[1] - 1
    count = batch if cu_seqlens is None else len(cu_seqlens) - 1
    windows = np.zeros((count, channels, width))
    if initial_states is not None:
        windows += initial_states
    out = np.zeros(x.shape)
    for b in range(batch):
        row_ids = None if seq_idx is None else seq_idx[b]
        for t, state, fresh, padding in tokens_of(length, row_ids, cu_seqlens, False):
            if padding:
                continue
            s = b + state
            if fresh:
                windows[s] = 0.0
            taps = np.concatenate([windows[s], x[b, :, t, None]], axis=1)
            y = (taps * weight).sum(-1) + (0.0 if bias is None else bias)
            out[b, :, t] = silu(y) if activation == "silu" else y
            windows[s] = taps[:, 1:]
    return out, windows


def norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    kind: str = "rms",
    residual: Array | None = None,
    z: Array | None = None,
    eps: float = 1e-6,
    group_size: int = 0,
    norm_before_gate: bool = True,
) -> tuple[Array, Array]:
    r = x if residual is None else x + residual
    y = r if z is None or norm_before_gate else r * silu(z)
    groups = y.reshape(*y.shape[:-1], -1, group_size or y.shape[-1])
    if kind == "layer":
        groups = groups - groups.mean(-1, keepdims=True)
    y = (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + eps)).reshape(y.shape)
    y = y * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
    return (y * silu(z) if z is not None and norm_before_gate else y), r


def attention(
    q: Array, k: Array, v: Array, *, causal: bool = False, scale: float = 0.0
) -> tuple[Array, Array]:
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(t, repeats, axis=1) for t in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * (scale or q.shape[2] ** -0.5)
    if causal:
        i, j = np.arange(q.shape[0])[:, None], np.arange(k.shape[0])
        scores = np.where(j <= i + k.shape[0] - q.shape[0], scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("hij,jhd->ihd", weights / total, v)
    return out, (largest + np.log(total))[..., 0].T


def gelu(x: Array, kind: str = "exact") -> Array:
    if kind == "exact":
        return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def cross_entropy(
    logits: Array, targets: Array, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Array, float, int]:
    """(losses, mean, count)."""
    logsumexp = np.logaddexp.reduce(logits, axis=1)
    kept = targets != ignore_index
    chosen = logits[np.arange(len(targets)), np.where(kept, targets, 0)]
    hard, even = logsumexp - chosen, logsumexp - logits.mean(1)
    losses = np.where(kept, (1.0 - label_smoothing) * hard + label_smoothing * even, 0.0)
    count = int(kept.sum())
    return losses, float(losses.sum() / count) if count else 0.0, count


def check_gradients(
    function: Callable[..., Array],
    inputs: dict[str, Array | None],
    gradients: dict[str, Array | None],
    rng: np.random.Generator,
    tolerance: float = 1e-6,
) -> None:
    """Each gradient of the number that `function` returns, against differences."""
    step = 1e-5
    for name, gradient in gradients.items():
        value = inputs[name]
        if value is None:
            assert gradient is None, name
            continue
        assert gradient is not None, name
        assert gradient.shape == value.shape, name
        direction = rng.standard_normal(value.shape)
        if np.iscomplexobj(value):
            direction = direction + 1j * rng.standard_normal(value.shape)
        forward = function(**{**inputs, name: value + step * direction})
        backward = function(**{**inputs, name: value - step * direction})
        expected = float(forward - backward) / (2.0 * step)
        found = float((gradient * direction.conj()).real.sum())
        assert abs(found - expected) <= tolerance * max(1.0, abs(expected)), (
            f"{name}: {found}, expected {expected}"
        )


def close(found: Any, expected: Array, tolerance: float, name: str = "") -> None:
    """Within `tolerance` of the largest number of `expected`."""
    array = np.asarray(found)
    array = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    assert array.shape == expected.shape, f"{name}: {array.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(array - expected).max())
    assert difference <= tolerance * scale, f"{name} differs by {difference}, scale {scale}"


def numbers(rng: np.random.Generator, shape: Sequence[int], low: float = -1.0) -> Array:
    return rng.uniform(low, 1.0, tuple(shape))
