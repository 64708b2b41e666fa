"""Derivatives: gradcheck in f64 for every operator and state, and lower precisions against f64."""

from __future__ import annotations

import pytest
import torch
from cases import leaves, scan_inputs, ssd_inputs
from test_functional import split_inputs

from krait.torch import functional as K

SEQ_IDX = torch.tensor([[0, 0, 1, 1, -1], [0, -1, -1, 2, 2]])


def check(function, inputs):
    """gradcheck of those inputs that are floating."""
    inputs = [t.requires_grad_() if t is not None and not t.is_floating_point() and t.is_complex()
              else t for t in leaves(inputs)]  # fmt: skip
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", ["", "BC"])
@pytest.mark.parametrize("complex", [False, True])
def test_selective_scan(reverse, constant, complex):
    inputs = scan_inputs(2, 2, 4, 2, complex=complex, constant=constant)
    inputs.append(torch.randn(2, 2, 2, dtype=inputs[2].dtype))

    def scan(*tensors):
        *others, state = tensors
        return K.selective_scan(
            *others,
            delta_softplus=True,
            initial_state=state,
            reverse=reverse,
            return_last_state=True,
        )

    check(scan, inputs)


def test_selective_scan_of_lazily_conjugated_views():
    inputs = scan_inputs(2, 2, 4, 2, complex=True, constant="B")

    def scan(u, delta, A, B, C):
        out, last = K.selective_scan(u, delta, A.conj(), B.conj(), C, return_last_state=True)
        return out, last.conj()

    check(scan, inputs[:5])


@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan_of_documents(groups):
    inputs = scan_inputs(2, 4, 5, 2, G=groups)
    check(lambda *t: K.selective_scan(*t, seq_idx=SEQ_IDX, return_last_state=True), inputs)
    inputs = scan_inputs(1, 4, 5, 2, G=groups) + [torch.randn(2, 4, 2, dtype=torch.float64)]
    bounds = torch.tensor([0, 2, 5])
    check(
        lambda *t: K.selective_scan(
            *t[:-1], initial_state=t[-1], cu_seqlens=bounds, return_last_state=True
        ),
        inputs,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wide_D", [False, True])
def test_ssd(reverse, wide_D):
    inputs = ssd_inputs(2, 4, 2, 2, 3, 1, wide_D=wide_D)
    inputs.append(torch.randn(2, 2, 2, 3, dtype=torch.float64))
    check(
        lambda *t: K.ssd(
            *t[:-1], initial_states=t[-1], dt_softplus=True, dt_limit=(0.25, 1.5), reverse=reverse,
            return_final_states=True,
        ),
        inputs,
    )  # fmt: skip


def test_ssd_of_documents():
    inputs = ssd_inputs(2, 5, 4, 2, 3, 2)
    check(lambda *t: K.ssd(*t, seq_idx=SEQ_IDX, return_final_states=True), inputs)
    inputs = ssd_inputs(1, 5, 2, 2, 3, 1) + [torch.randn(2, 2, 2, 3, dtype=torch.float64)]
    bounds = torch.tensor([0, 2, 5])
    check(
        lambda *t: K.ssd(
            *t[:-1], initial_states=t[-1], cu_seqlens=bounds, return_final_states=True
        ),
        inputs,
    )


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(activation):
    inputs = [
        torch.randn(2, 3, 5, dtype=torch.float64),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3, dtype=torch.float64),
        torch.randn(2, 3, 3, dtype=torch.float64),
    ]
    check(
        lambda x, w, b, s: K.causal_conv1d(
            x, w, b, activation=activation, initial_states=s, return_final_states=True
        ),
        inputs,
    )
    check(
        lambda x, w, b: K.causal_conv1d(x, w, b, activation=activation, seq_idx=SEQ_IDX), inputs[:3]
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("before", [False, True])
def test_gated_norm(kind, before):
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 6), (6,), (6,), (2, 6))]
    check(
        lambda x, w, b, z: K.norm(
            x, w, b, z=z, kind=kind, group_size=3, norm_before_gate=before, eps=1e-5
        ),
        inputs,
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_norm_with_a_residual(kind, prenorm):
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 6), (6,), (2, 6))]
    check(lambda x, w, r: K.norm(x, w, residual=r, kind=kind, prenorm=prenorm, eps=1e-5), inputs)
    check(lambda x, w: K.norm(x, w, kind=kind, prenorm=True, eps=1e-5), inputs[:2])


def test_gated_silu():
    check(K.gated_silu, [torch.randn(2, 6, dtype=torch.float64) for _ in range(2)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    targets = torch.tensor([1, -100, 3, 0])
    check(
        lambda t: K.cross_entropy(t, targets, label_smoothing=0.1, reduction=reduction),
        [torch.randn(4, 5, dtype=torch.float64)],
    )


def test_linear_cross_entropy():
    targets = torch.tensor([1, -100, 3, 0])
    shapes = ((4, 3), (5, 3), (5,))
    check(
        lambda x, w, b: K.linear_cross_entropy(x, w, targets, b, label_smoothing=0.1),
        [torch.randn(s, dtype=torch.float64) for s in shapes],
    )


@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_split_conv1d_scan(mlp, gated):
    inputs = split_inputs(mlp, gated, length=3)
    inputs = [t[:1] if i in (0, 7) else t for i, t in enumerate(inputs)]
    seq_idx = torch.tensor([[0, 1, 1]])

    def scan(*tensors):
        *params, weight, states = tensors
        return K.split_conv1d_scan(
            *params, headdim=3, ngroups=2, norm_weight=weight, initial_states=states,
            norm_before_gate=False, seq_idx=seq_idx, dt_limit=(0.0, 2.0), return_final_states=True,
        )  # fmt: skip

    check(scan, inputs)


def norm_arguments(dtype):
    return [torch.randn(6, 33).to(dtype), torch.randn(33), torch.randn(33)]


GRADIENTS = {
    "selective_scan": (
        lambda dtype: scan_inputs(2, 17, 39, 5, dtype=dtype),
        lambda *t: K.selective_scan(*t, delta_softplus=True),
    ),
    "ssd": (
        lambda dtype: ssd_inputs(2, 70, 4, 13, 9, 2, dtype=dtype),
        lambda *t: K.ssd(*t, dt_softplus=True),
    ),
    "causal_conv1d": (
        lambda dtype: [torch.randn(2, 9, 21).to(dtype), torch.randn(9, 4), torch.randn(9)],
        lambda *t: K.causal_conv1d(*t, activation="silu"),
    ),
    "norm": (norm_arguments, lambda *t: K.norm(*t, kind="layer")),
    "gated_silu": (
        lambda dtype: [torch.randn(3, 17).to(dtype), torch.randn(3, 17).to(dtype)],
        K.gated_silu,
    ),
    "cross_entropy": (
        lambda dtype: [torch.randn(6, 33).to(dtype)],
        lambda t: K.cross_entropy(t, torch.arange(6, device=t.device)),
    ),
    "linear_cross_entropy": (
        lambda dtype: [torch.randn(6, 9).to(dtype), torch.randn(33, 9).to(dtype)],
        lambda x, w: K.linear_cross_entropy(x, w, torch.arange(6, device=x.device)),
    ),
    "split_conv1d_scan": (
        lambda dtype: [
            t.to(dtype) if i < 2 else t
            for i, t in enumerate(split_inputs(4, dtype=torch.float32, length=40)[:7])
        ],
        lambda *t: K.split_conv1d_scan(*t[:6], norm_weight=t[6], headdim=3, ngroups=2),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_agree_with_f64(name, dtype):
    make, function = GRADIENTS[name]
    inputs = leaves(make(dtype))
    exact = leaves([t.double() for t in inputs])
    out = function(*inputs)
    dout = torch.randn_like(out)
    out.backward(dout)
    function(*exact).backward(dout.double())
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for i, (t, e) in enumerate(zip(inputs, exact)):
        assert t.grad.dtype is t.dtype
        error = (t.grad.double() - e.grad).norm() / e.grad.norm()
        assert error <= tolerance, f"gradient {i} is off by {error}"


@pytest.mark.parametrize("name", GRADIENTS)
def test_only_what_asks_for_a_gradient_gets_one(name):
    make, function = GRADIENTS[name]
    inputs = make(torch.float32)
    wanted = leaves(inputs)
    out = function(*wanted)
    dout = torch.randn_like(out)
    out.backward(dout)
    for i, t in enumerate(wanted):
        one = list(inputs)
        one[i] = inputs[i].clone().requires_grad_()
        function(*one).backward(dout)
        torch.testing.assert_close(one[i].grad, t.grad)
    with torch.no_grad():
        assert not function(*wanted).requires_grad


def test_gradients_through_the_last_state_alone():
    inputs = leaves(scan_inputs(1, 3, 4, 2))
    last = K.selective_scan(*inputs, return_last_state=True)[1]
    last.sum().backward()
    assert inputs[0].grad.abs().sum() > 0 and inputs[6].grad.abs().sum() == 0
    inputs = leaves(ssd_inputs(1, 4))
    K.ssd(*inputs, return_final_states=True)[1].sum().backward()
    assert inputs[0].grad.abs().sum() > 0 and inputs[4].grad.abs().sum() == 0


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_second_derivative_is_refused(name):
    make, function = GRADIENTS[name]
    for further in (torch.sum, lambda t: t.square().sum()):
        inputs = leaves(make(torch.float32))
        (grad,) = torch.autograd.grad(further(function(*inputs)), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} was differentiated twice"):
            grad.sum().backward()


@pytest.mark.parametrize("name", GRADIENTS)
def test_forward_mode_is_refused(name):
    import torch.autograd.forward_ad as forward_ad

    make, function = GRADIENTS[name]
    inputs = make(torch.float32)
    with forward_ad.dual_level():
        inputs[0] = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(*inputs)


def test_what_was_changed_in_place_is_noticed():
    y = torch.randn(2, 3, 5, requires_grad=True) * 1
    out = K.causal_conv1d(y, torch.randn(3, 4, requires_grad=True))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
