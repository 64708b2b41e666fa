"""On a GPU: values and derivatives beside the CPU's, f64, streams, and steps in a graph."""

from __future__ import annotations

import pytest
import torch
from cases import leaves, scan_inputs, ssd_inputs
from test_gradients import GRADIENTS
from test_modules import ALL, D_MODEL, MIXERS

import krait
from krait.torch import InferenceParams, MambaConfig, MambaLMHeadModel
from krait.torch import functional as K


def usable():
    return torch.cuda.is_available() and krait.build_info()["cuda_devices"] > 0


pytestmark = pytest.mark.skipif(not usable(), reason="no GPU, or a library without kernels for it")


def on_gpu(tensors):
    return [t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]


def near(got, want, tolerance):
    got, want = got.detach().double().cpu(), want.detach().double()
    error = (got - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= tolerance, f"off by {error}"


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_derivatives_equal_the_cpus(name, dtype):
    make, function = GRADIENTS[name]
    host = leaves(make(dtype))
    device = on_gpu(host)
    want, got = function(*host), function(*device)
    assert got.is_cuda and got.dtype is want.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 8e-2)
    near(got, want, tolerance)
    dout = torch.randn_like(want)
    want.backward(dout)
    got.backward(dout.cuda())
    for d, h in zip(device, host):
        assert d.grad.is_cuda and d.grad.dtype is h.grad.dtype
        near(d.grad, h.grad, tolerance)


def test_states_and_documents():
    inputs = scan_inputs(1, 6, 11, 3, dtype=torch.float32)
    bounds = torch.tensor([0, 4, 11])
    want = K.selective_scan(*inputs, cu_seqlens=bounds, return_last_state=True)
    for where in ("cpu", "cuda"):
        got = K.selective_scan(*on_gpu(inputs), cu_seqlens=bounds.to(where), return_last_state=True)
        near(got[0], want[0], 1e-5)
        near(got[1], want[1], 1e-5)
    inputs = ssd_inputs(2, 70, dtype=torch.float32)
    want = K.ssd(*inputs, dt_softplus=True, return_final_states=True)
    got = K.ssd(*on_gpu(inputs), dt_softplus=True, return_final_states=True)
    near(got[0], want[0], 1e-4)
    near(got[1], want[1], 1e-4)


@pytest.mark.parametrize("name", ALL)
def test_layers(name):
    host = ALL[name]()
    device = ALL[name]().cuda()
    device.load_state_dict(host.state_dict())
    x = torch.randn(2, 70, D_MODEL)
    want, got = host(x), device(x.cuda())
    near(got, want, 1e-3)
    want.square().sum().backward()
    got.square().sum().backward()
    for (n, d), (_, h) in zip(device.named_parameters(), host.named_parameters()):
        assert d.grad is not None, n
        near(d.grad, h.grad, 5e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        near(device(x.cuda()), want, 5e-2)


@pytest.mark.parametrize("name", MIXERS)
def test_steps_equal_one_pass(name):
    layer = MIXERS[name](layer_idx=0).cuda()
    x = torch.randn(2, 9, D_MODEL, device="cuda")
    with torch.no_grad():
        want = layer(x)
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        got = []
        for part in x.split([5, 1, 1, 2], dim=1):
            got.append(layer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-3, atol=1e-3)


def test_streams_of_their_own():
    inputs = on_gpu(ssd_inputs(2, 300, 4, 64, 64, 1, dtype=torch.float32))
    want = K.ssd(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        doubled = inputs[0] * 2
        torch.cuda._sleep(10_000_000)
        doubled = doubled / 2
        got = K.ssd(doubled, *inputs[1:]) + 0
    stream.synchronize()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_generation_with_a_recorded_step(layer):
    config = MambaConfig(
        d_model=32, n_layer=2, vocab_size=40,
        ssm_cfg={"layer": layer, "d_state": 16, **({"headdim": 16} if layer == "Mamba2" else {})},
    )  # fmt: skip
    model = MambaLMHeadModel(config, device="cuda")
    prompt = torch.randint(0, 40, (2, 7), device="cuda")
    plain = model.generate(prompt, 30)
    recorded = model.generate(prompt, 30, cg=True)
    assert torch.equal(plain, recorded)


def test_whole_graphs():
    torch._dynamo.reset()
    model = MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=40), device="cuda")
    ids = torch.randint(0, 40, (2, 20), device="cuda")
    want = model(ids).logits
    want.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    got.square().sum().backward()
    torch.testing.assert_close(got, want)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)
