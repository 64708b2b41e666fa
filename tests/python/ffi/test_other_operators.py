"""Convolution, norms, attention, products, losses, sampling and the optimizer against NumPy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import reference
from reference import check_gradients, close, numbers

from krait import ops

F32 = np.float32


def single(arrays: dict[str, Any]) -> dict[str, Any]:
    return {n: None if a is None else a.astype(F32) for n, a in arrays.items()}


def named(gradients: Any) -> dict[str, Any]:
    return {name[1:]: gradient for name, gradient in gradients._asdict().items()}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("sequences", ["", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("kernel", [1, 4])
def test_causal_conv1d(
    rng: np.random.Generator, activation: str | None, sequences: str, kernel: int
) -> None:
    batch, channels, length = (1 if sequences == "cu_seqlens" else 2), 7, 30
    options: dict[str, Any] = {"activation": activation}
    count = batch
    if sequences == "cu_seqlens":
        options["cu_seqlens"] = np.array([0, 2, 2, 30])
        count = 3
    elif sequences:
        ids = np.sort(rng.integers(0, 3, (batch, length)), axis=1)
        options["seq_idx"] = np.where(rng.random((batch, length)) < 0.15, -1, ids)
    arrays = {
        "x": numbers(rng, (batch, channels, length)),
        "weight": numbers(rng, (channels, kernel)),
        "bias": numbers(rng, (channels,)),
        "initial_states": numbers(rng, (count, channels, kernel - 1)),
    }
    out, final = reference.causal_conv1d(**arrays, **options)
    for inputs, tolerance in ((arrays, 1e-12), (single(arrays), 1e-5)):
        found = ops.causal_conv1d(**inputs, **options, return_final_states=True)
        close(found[0], out, tolerance, "out")
        close(found[1], final, tolerance, "final_states")

    dout, dfinal = numbers(rng, out.shape), numbers(rng, final.shape)

    def loss(**inputs: Any) -> Any:
        y, last = reference.causal_conv1d(**inputs, **options)
        return (y * dout).sum() + (last * dfinal).sum()

    gradients = ops.causal_conv1d_backward(**arrays, **options, dout=dout, dfinal_states=dfinal)
    check_gradients(loss, arrays, named(gradients), rng)
    inputs = single({**arrays, "dout": dout, "dfinal_states": dfinal})
    for name, gradient in named(ops.causal_conv1d_backward(**inputs, **options)).items():
        close(gradient, named(gradients)[name], 1e-4, name)


def test_causal_conv1d_update(rng: np.random.Generator) -> None:
    x, weight = numbers(rng, (2, 5, 9)), numbers(rng, (5, 4))
    expected, _ = reference.causal_conv1d(x, weight, activation="silu")
    state, ring = np.zeros((2, 5, 3), F32), np.zeros((4, 5, 6), F32)
    for t in range(9):
        token = x[:, :, t].astype(F32)
        out = ops.causal_conv1d_update(token, state, weight.astype(F32), activation="silu")
        close(out, expected[:, :, t], 1e-5, "shifted")
        out = ops.causal_conv1d_update(
            token,
            ring,
            weight.astype(F32),
            activation="silu",
            cache_seqlens=np.full(2, t, np.int32),
            conv_state_indices=np.array([2, 0]),
        )
        close(out, expected[:, :, t], 1e-5, "ring")
    close(state, x[:, :, 6:], 1e-6, "state")
    assert not ring[[1, 3]].any()
    several = ops.causal_conv1d_update(
        x.astype(F32), np.zeros((2, 5, 3), F32), weight.astype(F32), activation="silu"
    )
    close(several, expected, 1e-5, "several tokens")


def test_causal_conv1d_states(rng: np.random.Generator) -> None:
    x = numbers(rng, (1, 5, 9)).astype(F32)
    weight = numbers(rng, (5, 4)).astype(F32)
    cuts = np.array([0, 2, 9], np.int32)
    states = ops.causal_conv1d_varlen_states(x[0].T, cuts, 3)
    assert states.shape == (2, 5, 3)
    np.testing.assert_array_equal(states[0], np.pad(x[0, :, :2], ((0, 0), (1, 0))))
    np.testing.assert_array_equal(states[1], x[0, :, 6:])
    _, at = ops.causal_conv1d(x, weight, state_positions=np.array([[1, 8, 5]]))
    np.testing.assert_array_equal(at[0, 2], x[0, :, 3:6])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": True},
        {"gate": True},
        {"gate": True, "norm_before_gate": False, "group_size": 4},
    ],
    ids=str,
)
def test_norm(rng: np.random.Generator, kind: str, options: dict[str, Any]) -> None:
    shape = (3, 5, 12)
    arrays = {
        "x": numbers(rng, shape),
        "weight": numbers(rng, shape[-1:]),
        "bias": numbers(rng, shape[-1:]),
        "z": numbers(rng, shape) if options.get("gate") else None,
    }
    chosen: dict[str, Any] = {
        "kind": kind,
        "eps": 1e-5,
        "group_size": options.get("group_size", 0),
        "norm_before_gate": options.get("norm_before_gate", True),
    }
    residual = numbers(rng, shape) if options.get("residual") else None
    out, summed = reference.norm(**arrays, **chosen, residual=residual)
    inputs = single({**arrays, "residual": residual})
    found, r = ops.norm(**inputs, **chosen, prenorm=True)
    close(found, out, 1e-5, "out")
    close(r, summed, 1e-6, "residual")
    same = ops.rms_norm if kind == "rms" else ops.layer_norm
    del chosen["kind"]
    np.testing.assert_array_equal(same(**inputs, **chosen), found)
    chosen["kind"] = kind

    dout, dr = numbers(rng, shape), numbers(rng, shape)

    def loss(**values: Any) -> Any:
        y, total = reference.norm(**values, **chosen)
        return (y * dout).sum() + (total * dr).sum()

    at_sum = {**arrays, "x": summed}
    gradients = named(ops.norm_backward(**at_sum, **chosen, dout=dout, dresidual=dr))
    check_gradients(loss, at_sum, gradients, rng)
    fast = named(ops.norm_backward(**single({**at_sum, "dout": dout, "dresidual": dr}), **chosen))
    for name, gradient in fast.items():
        if gradient is not None:
            close(gradient, gradients[name], 1e-4, name)


def test_activations(rng: np.random.Generator) -> None:
    arrays = {"x": numbers(rng, (4, 9)) * 3, "gate": numbers(rng, (4, 9)) * 3}
    dout = numbers(rng, (4, 9))
    x, gate = arrays.values()
    close(ops.gated_silu(x.astype(F32), gate.astype(F32)), x * reference.silu(gate), 1e-5)
    dx, dgate = ops.gated_silu_backward(x, gate, dout)
    check_gradients(
        lambda x, gate: (x * reference.silu(gate) * dout).sum(),
        arrays,
        {"x": dx, "gate": dgate},
        rng,
    )
    for kind in ("exact", "tanh"):
        close(ops.gelu(x.astype(F32), kind=kind), reference.gelu(x, kind), 1e-5, kind)
        dx = ops.gelu_backward(x, dout, kind=kind)
        check_gradients(
            lambda x, kind=kind: (reference.gelu(x, kind) * dout).sum(), {"x": x}, {"x": dx}, rng
        )
    with pytest.raises(
        ValueError, match=r"^\[gelu\] kind is 'fast', expected one of 'exact', 'tanh'$"
    ):
        ops.gelu(x, kind="fast")


def test_negative_exp(rng: np.random.Generator) -> None:
    A_log, dA = numbers(rng, (3, 4)).astype(F32), numbers(rng, (3, 4)).astype(F32)
    A = ops.negative_exp(A_log)
    close(A, -np.exp(A_log.astype(float)), 1e-6)
    close(ops.negative_exp_backward(A, dA), dA * A, 1e-6)
    half = A_log.astype(np.float16)
    close(ops.negative_exp(half), -np.exp(half.astype(float)), 1e-6)
    assert ops.negative_exp(half).dtype == F32
    with pytest.raises(ValueError, match=r"^\[negative_exp\] A_log has dtype f64, expected f32"):
        ops.negative_exp(A_log.astype(float))


def test_projection(rng: np.random.Generator) -> None:
    """It is norm, linear and causal_conv1d_update one after the other."""
    x, residual = (numbers(rng, (2, 8)).astype(F32) for _ in range(2))
    weight, bias = numbers(rng, (10, 8)).astype(F32), numbers(rng, (10,)).astype(F32)
    scale = numbers(rng, (8,)).astype(F32)
    plain = ops.projection(x, weight, bias)
    close(plain.out, ops.linear(x, weight, bias), 1e-6)
    assert plain.residual is None
    assert plain.convolved is None

    state, taps = numbers(rng, (3, 4, 3)).astype(F32), numbers(rng, (4, 4)).astype(F32)
    indices = np.array([2, 0], np.int32)
    expected_state = state.copy()
    normed, summed = ops.norm(x, scale, residual=residual, kind="rms", eps=1e-3, prenorm=True)
    out = ops.linear(normed, weight, bias)
    convolved = ops.causal_conv1d_update(
        np.ascontiguousarray(out[:, 5:9]), expected_state, taps, activation="silu",
        conv_state_indices=indices,
    )  # fmt: skip
    found = ops.projection(
        x, weight, bias, norm="rms", norm_weight=scale, residual=residual, eps=1e-3,
        return_residual=True, conv_state=state, conv_weight=taps, conv_state_indices=indices,
        conv_first=5,
    )  # fmt: skip
    close(found.residual, summed, 1e-6)
    close(found.out, out, 1e-6)
    close(found.convolved, convolved, 1e-6)
    close(state, expected_state, 1e-6)
    with pytest.raises(
        ValueError, match=r"^\[projection\] norm is 'batch', expected one of 'none'"
    ):
        ops.projection(x, weight, norm="batch")
    with pytest.raises(ValueError, match=r"residual or gate is given, but no norm"):
        ops.projection(x, weight, residual=residual)
    with pytest.raises(ValueError, match=r"conv_state is given without conv_weight"):
        ops.projection(x, weight, conv_state=state)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(rng: np.random.Generator, causal: bool) -> None:
    arrays = {
        "q": numbers(rng, (10, 4, 8)),
        "k": numbers(rng, (13, 2, 8)),
        "v": numbers(rng, (13, 2, 6)),
    }
    out, logsumexp = reference.attention(**arrays, causal=causal)
    found, lse = ops.attention(**single(arrays), causal=causal, return_logsumexp=True)
    close(found, out, 1e-5, "out")
    close(lse, logsumexp, 1e-5, "logsumexp")
    dout = numbers(rng, out.shape)
    exact, lse = ops.attention(**arrays, causal=causal, return_logsumexp=True)
    gradients = ops.attention_backward(**arrays, causal=causal, out=exact, logsumexp=lse, dout=dout)

    def loss(**inputs: Any) -> Any:
        return (reference.attention(**inputs, causal=causal)[0] * dout).sum()

    check_gradients(loss, arrays, named(gradients), rng)


def test_rotary_embedding(rng: np.random.Generator) -> None:
    x = numbers(rng, (5, 2, 8)).astype(F32)
    positions = np.array([0, 1, 7, 1000, 3])
    turned = x.copy()
    ops.rotary_embedding(turned, positions, dim=6, base=100.0)
    angle = positions[:, None] * 100.0 ** (-np.arange(0, 6, 2) / 6)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[:, :, :3], x[:, :, 3:6]
    close(turned[:, :, :3], first * cos - second * sin, 1e-5)
    close(turned[:, :, 3:6], second * cos + first * sin, 1e-5)
    np.testing.assert_array_equal(turned[:, :, 6:], x[:, :, 6:])
    ops.rotary_embedding(turned, positions, dim=6, base=100.0, inverse=True)
    close(turned, x.astype(float), 1e-5)


def test_linear(rng: np.random.Generator) -> None:
    x, weight, bias = numbers(rng, (3, 4, 10)), numbers(rng, (6, 10)), numbers(rng, (6,))
    dout = numbers(rng, (3, 4, 6))
    narrow = [a.astype(F32) for a in (x, weight, bias)]
    expected = x @ weight.T + bias
    close(ops.linear(*narrow), expected, 1e-5)
    out = np.ones((3, 4, 6), F32)
    assert ops.linear(*narrow, out=out, accumulate=True) is out
    close(out, expected + 1, 1e-5)
    gradients = ops.linear_backward(*narrow[:2], dout.astype(F32), has_bias=True)
    close(gradients.dx, dout @ weight, 1e-5)
    close(gradients.dweight, np.einsum("abo,abi->oi", dout, x), 1e-5)
    close(gradients.dbias, dout.sum((0, 1)), 1e-5)
    with pytest.raises(ValueError, match=r"accumulate is given without out"):
        ops.linear(*narrow, accumulate=True)


def test_embedding(rng: np.random.Generator) -> None:
    weight = numbers(rng, (7, 3)).astype(F32)
    ids = np.array([[0, 6, 2], [2, 2, 1]], np.int32)
    np.testing.assert_array_equal(ops.embedding(ids, weight), weight[ids])
    rounded = np.zeros((2, 3, 3), np.float16)
    ops.embedding(ids, weight, out=rounded)
    np.testing.assert_array_equal(rounded, weight[ids].astype(np.float16))
    dout = numbers(rng, (2, 3, 3)).astype(F32)
    expected = np.zeros((7, 3))
    np.add.at(expected, ids, dout)
    close(ops.embedding_backward(ids, dout, 7), expected, 1e-6)
    if os.environ.get("KRAIT_TEST_DEVICE", "cpu") == "cpu":  # a GPU's ids are not looked at
        with pytest.raises(ValueError, match=r"7"):
            ops.embedding(np.array([7]), weight)


def test_dropout() -> None:
    x = np.ones((200, 100), F32)
    out = ops.dropout(x, 0.3, seed=5)
    kept = out != 0
    assert abs(kept.mean() - 0.7) < 0.02
    np.testing.assert_allclose(out[kept], 1 / 0.7, rtol=1e-3)
    np.testing.assert_array_equal(ops.dropout(x, 0.3, seed=5), out)
    assert not np.array_equal(ops.dropout(x, 0.3, seed=2**64 - 1), out)
    np.testing.assert_array_equal(ops.dropout(x[100:], 0.3, seed=5, offset=100 * 100), out[100:])
    with pytest.raises(ValueError, match=r"seed is -1, expected 0 to 2\*\*64 - 1"):
        ops.dropout(x, 0.3, seed=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(rng: np.random.Generator, smoothing: float) -> None:
    logits = numbers(rng, (6, 11)) * 4
    targets = np.array([0, 3, -1, 10, 3, -1])
    options: dict[str, Any] = {"ignore_index": -1, "label_smoothing": smoothing}
    losses, mean, count = reference.cross_entropy(logits, targets, *options.values())
    found = ops.cross_entropy(logits.astype(F32), targets, **options)
    close(found.losses, losses, 1e-5, "losses")
    close(found.logsumexp, np.logaddexp.reduce(logits, axis=1), 1e-5, "logsumexp")
    assert found.count == count
    assert abs(found.mean - mean) < 1e-5
    gradient = ops.cross_entropy_backward(logits, targets, **options, scale=0.5)
    check_gradients(
        lambda logits: 0.5 * reference.cross_entropy(logits, targets, *options.values())[0].sum(),
        {"logits": logits},
        {"logits": gradient},
        rng,
    )
    with pytest.raises(ValueError, match="11"):
        ops.cross_entropy(logits, np.full(6, 11))


def test_linear_cross_entropy(rng: np.random.Generator) -> None:
    arrays = {
        "x": numbers(rng, (9, 5)),
        "weight": numbers(rng, (13, 5)) * 3,
        "bias": numbers(rng, (13,)),
    }
    targets = rng.integers(0, 13, 9)
    targets[4] = -100

    def losses(**inputs: Any) -> Any:
        logits = inputs["x"] @ inputs["weight"].T + inputs["bias"]
        return reference.cross_entropy(logits, targets)[0]

    inputs = {**single(arrays), "targets": targets}
    found = ops.linear_cross_entropy(**inputs, block=4)
    close(found.losses, losses(**arrays), 1e-5, "losses")
    assert found.count == 8
    gradients = ops.linear_cross_entropy_backward(**inputs, block=4, scale=2.0)
    close(gradients.loss.losses, losses(**arrays), 1e-5, "losses of the backward")
    check_gradients(
        lambda **values: 2.0 * losses(**values).sum(),
        arrays,
        {"x": gradients.dx, "weight": gradients.dweight, "bias": gradients.dbias},
        rng,
        1e-4,
    )


def test_sampling(rng: np.random.Generator) -> None:
    logits = (numbers(rng, (4, 50)) * 3).astype(F32)
    ids, logprobs = ops.sample_rows(logits, temperature=0.0, return_logprobs=True)
    np.testing.assert_array_equal(ids, logits.argmax(1))
    expected = logits.max(1) - np.logaddexp.reduce(logits.astype(float), axis=1)
    close(logprobs, expected, 1e-5)
    drawn = ops.sample_rows(logits, seed=3, top_k=5)
    np.testing.assert_array_equal(ops.sample_rows(logits, seed=3, top_k=5), drawn)
    for row, one in zip(logits, drawn, strict=True):
        assert one in np.argsort(row)[-5:]

    distribution = ops.sampling_distribution(logits[0], top_k=5, temperature=0.5)
    best = np.argsort(logits[0])[-5:]
    weights = np.zeros(50)
    weights[best] = np.exp(logits[0, best].astype(float) / 0.5)
    close(distribution, weights / weights.sum(), 1e-5)
    # Many draws have that distribution.
    many = np.broadcast_to(logits[:1], (20000, 50))
    counts = np.bincount(ops.sample_rows(many, seed=1, top_k=5, temperature=0.5), minlength=50)
    close(counts / 20000, distribution.astype(float), 0.02)
    penalised = ops.sampling_distribution(
        logits[0], previous=np.array([best[-1]]), repetition_penalty=1.5
    )
    assert penalised[best[-1]] < ops.sampling_distribution(logits[0])[best[-1]]


def test_sample_draws_as_sample_rows(rng: np.random.Generator) -> None:
    logits = (numbers(rng, (1, 50)) * 3).astype(F32)
    options: dict[str, Any] = {"top_p": 0.9, "temperature": 0.8, "seed": 2**64 - 1}
    positions = np.zeros(1, np.int64)
    at = 0
    for _ in range(20):
        ids, logprobs = ops.sample_rows(
            logits, **options, streams=np.array([3]), positions=positions, return_logprobs=True
        )
        one = ops.sample(logits[0], **options, stream=3, position=at)
        assert one.id == ids[0]
        assert one.logprob == pytest.approx(logprobs[0])
        assert one.position == positions[0] > at
        at = one.position
    best = int(logits[0].argmax())
    assert ops.sample(logits[0], top_k=1) == (best, pytest.approx(logprobs_of(logits[0])[best]), 0)
    previous = np.array([best])
    assert ops.sample(logits[0], top_k=1, previous=previous, repetition_penalty=1e6).id != best
    with pytest.raises(
        ValueError, match=r"^\[sample\] logits has shape \(1, 50\), expected \(V,\)"
    ):
        ops.sample(logits)
    with pytest.raises(ValueError, match=r"^\[sample\] logits has .* dtype f64"):
        ops.sample(logits[0].astype(float))


def logprobs_of(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(float)
    return wide - np.logaddexp.reduce(wide)


def test_optimizer(rng: np.random.Generator) -> None:
    shapes = [(3, 4), (7,)]
    values = [numbers(rng, s).astype(F32) for s in shapes]
    gradients = [numbers(rng, s).astype(F32) for s in shapes]
    m, v = ([np.zeros(s, F32) for s in shapes] for _ in range(2))
    expected = [a.astype(float) for a in values]
    first, second = ([np.zeros(s) for s in shapes] for _ in range(2))
    for step in (1, 2, 3):
        ops.adamw(values, gradients, m, v, step=step, lr=0.1, weight_decay=0.2, decay=[True, False])
        for i, g in enumerate(a.astype(float) for a in gradients):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            if i == 0:
                expected[i] -= 0.1 * 0.2 * expected[i]
            root = np.sqrt(second[i] / (1 - 0.95**step)) + 1e-8
            expected[i] -= 0.1 * first[i] / (1 - 0.9**step) / root
    for found, wanted in zip(values, expected, strict=True):
        close(found, wanted, 1e-5)
    total = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients))
    assert abs(ops.global_norm(gradients) - total) < 1e-6
    averages = [np.ones(s, F32) for s in shapes]
    ops.update_average(averages, values, 0.75)
    close(averages[1], 0.75 + 0.25 * expected[1], 1e-5)
    with pytest.raises(ValueError, match=r"^\[adamw\] m has 1 entries, expected 2: one for each"):
        ops.adamw(values, gradients, m[:1], v, step=1)
