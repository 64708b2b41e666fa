"""torch.compile keeps whole graphs, and torch.library's own checks of what was registered."""

from __future__ import annotations

import pytest
import torch
from cases import leaves, scan_inputs, ssd_inputs
from test_functional import split_inputs
from test_gradients import GRADIENTS

from krait.torch import GatedMLP, MambaConfig, MambaLMHeadModel
from krait.torch import functional as K


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_graphs_with_gradients(name, dynamic):
    torch._dynamo.reset()
    make, function = GRADIENTS[name]
    eager, compiled_inputs = leaves(make(torch.float32)), None
    compiled_inputs = leaves(eager)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = function(*eager), compiled(*compiled_inputs)
    torch.testing.assert_close(got, want)
    dout = torch.randn_like(want)
    want.backward(dout)
    got.backward(dout)
    for a, b in zip(compiled_inputs, eager):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*compiled_inputs), want)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("complex", [False, True])
def test_checkpoints_of_sizes_without_numbers(on_gpu, complex):
    from krait.torch._ops.selective_scan import _checkpoints_shape, _symbolic_checkpoints_shape

    for rows in (1, 3):
        for length in (0, 1, 8, 9, 32, 33, 1000):
            for d_state in (1, 4, 16, 100, 256, 700):
                sizes = (rows, 5, length, d_state, complex, on_gpu)
                assert _symbolic_checkpoints_shape(*sizes) == _checkpoints_shape(*sizes)


def test_whole_graphs_of_steps():
    torch._dynamo.reset()
    x, weight = torch.randn(2, 5, 3), torch.randn(5, 4)
    inputs = [t[:, 0] if i in (0, 1, 3, 4, 6) else t
              for i, t in enumerate(ssd_inputs(2, 1, dtype=torch.float32))]  # fmt: skip

    def steps(conv_state, state):
        out = K.causal_conv1d_update(x, conv_state, weight, activation="silu")
        return out, K.state_update(state, *inputs, dt_softplus=True)

    states = [torch.randn(2, 5, 4), torch.randn(2, 4, 3, 5)]
    copies = [s.clone() for s in states]
    want = steps(*states)
    got = torch.compile(steps, fullgraph=True, backend="aot_eager")(*copies)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(copies, states)


def test_states_under_compile():
    torch._dynamo.reset()
    bounds = torch.tensor([0, 3, 9])

    def scan(*inputs):
        return K.selective_scan(*inputs, cu_seqlens=bounds, return_last_state=True)

    inputs = leaves(scan_inputs(1, 4, 9, 3))
    got = torch.compile(scan, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, scan(*inputs))
    got[1].sum().backward()
    other = leaves(inputs)
    scan(*other)[1].sum().backward()
    for a, b in zip(inputs, other):
        torch.testing.assert_close(a.grad, b.grad)


def test_inductor():
    torch._dynamo.reset()
    inputs = leaves(ssd_inputs(1, 5, dtype=torch.float32))

    def function(*tensors):
        return K.norm(K.ssd(*tensors).flatten(-2) * 2, None).sum()

    got = torch.compile(function, fullgraph=True)(*inputs)
    got.backward()
    other = leaves(inputs)
    want = function(*other)
    want.backward()
    torch.testing.assert_close(got, want)
    for a, b in zip(inputs, other):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_whole_model_is_one_graph(layer):
    torch._dynamo.reset()
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=20, d_intermediate=8, attn_layer_idx=[1],
        ssm_cfg={"layer": layer, "d_state": 8, **({"headdim": 8} if layer == "Mamba2" else {})},
        attn_cfg={"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3},
    )  # fmt: skip
    model = MambaLMHeadModel(config)
    ids = torch.randint(0, 20, (2, 7))
    want = model(ids).logits
    want.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)


def tensors_that_ask(*inputs):
    return tuple(
        t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs
    )


INF = float("inf")
REGISTERED = {
    "selective_scan": lambda: (*scan_inputs(2, 3, 5, 2, dtype=torch.float32), None, None, None,
                               True, False, True, True),
    "ssd": lambda: (*ssd_inputs(2, 5, dtype=torch.float32), None, None, None, True, 0.0, INF,
                    False, 0, True),
    "causal_conv1d": lambda: (torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(3), None, None,
                              None, "silu", True),
    "norm": lambda: (torch.randn(2, 6), torch.randn(6), None, torch.randn(2, 6), None, "rms", 1e-5,
                     0, True, torch.float32),
    "gated_silu": lambda: (torch.randn(2, 6), torch.randn(2, 6)),
    "cross_entropy": lambda: (torch.randn(3, 6), torch.tensor([0, 3, 5]), -100, 0.0),
    "split_conv1d_scan": lambda: (*split_inputs(2, dtype=torch.float32), None, None, 3, 2, "silu",
                                  1e-5, True, 0.0, INF, True),
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name):
    op = getattr(torch.ops.krait, name).default
    torch.library.opcheck(op, tensors_that_ask(*REGISTERED[name]()))


MUTATING = {
    "causal_conv1d_update": lambda: (torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(3, 4),
                                     None, "none", None, None),
    "causal_conv1d_varlen_states": lambda: (torch.randn(5, 3), torch.tensor([0, 2, 5]), 3),
    "state_update": lambda: (
        torch.randn(2, 4, 3, 5),
        *(t[:, 0] if i in (0, 1, 3, 4, 6) else t
          for i, t in enumerate(ssd_inputs(2, 1, dtype=torch.float32))),
        None, True, 0.0, INF),
    "linear_cross_entropy": lambda: (torch.randn(3, 4), torch.randn(6, 4), None,
                                     torch.tensor([0, 3, 5]), -100, 0.0, [True, True, False]),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATING)
def test_opcheck_of_what_has_no_derivative(name):
    op = getattr(torch.ops.krait, name).default
    torch.library.opcheck(
        op,
        MUTATING[name](),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_export():
    program = torch.export.export(GatedMLP(8, 12, multiple_of=4), (torch.randn(2, 8),))
    assert "krait.gated_silu" in str(program.graph)


def test_operators_are_seen_by_dispatch_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        K.norm(torch.randn(2, 6), None)
    assert "krait.norm.default" in seen
