"""LayerNorm and RMSNorm, with what stands before them and with gates, against plain PyTorch."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, close, differentiated
from mamba_ssm.ops.triton import layer_norm, layernorm_gated
from mamba_ssm.ops.triton.layer_norm import (
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from torch import Tensor

WIDTH = 24


def test_references_by_hand() -> None:
    x, weight = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0, 10.0])
    rms = (12.5 + 1e-6) ** -0.5
    close(rms_norm_ref(x, weight, None), torch.tensor([[6.0 * rms, -40.0 * rms]]))
    std = (12.25 + 1e-6) ** -0.5
    expected = torch.tensor([[3.5 * std * 2.0 + 1.0, -3.5 * std * 10.0]])
    close(layer_norm_ref(x, weight, torch.tensor([1.0, 0.0])), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, "same"])
@pytest.mark.parametrize("has_x1, has_rowscale", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "prenorm, has_weight1, dropout_p",
    [
        (False, False, 0.0),
        (True, False, 0.0),
        (True, False, 0.4),
        (True, True, 0.4),
        (False, True, 0.0),
    ],
)
def test_layer_norm(
    prenorm: bool,
    has_weight1: bool,
    dropout_p: float,
    has_x1: bool,
    has_rowscale: bool,
    residual_dtype: Any,
    is_rms: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    shape = (2, 7, WIDTH)
    residual_dtype = dtype if residual_dtype == "same" else residual_dtype
    inputs = (
        torch.randn(shape, dtype=dtype),
        torch.randn(WIDTH),
        None if is_rms else torch.randn(WIDTH),
        None if residual_dtype is None else torch.randn(shape, dtype=residual_dtype),
        torch.randn(shape, dtype=dtype) if has_x1 else None,
        torch.randn(WIDTH) if has_weight1 else None,
        torch.randn(WIDTH) if has_weight1 and not is_rms else None,
    )
    rowscale = torch.randn(shape[:-1], dtype=dtype) if has_rowscale else None
    masks: list[Optional[Tensor]] = []

    def ours(*inputs):  # type: ignore[no-untyped-def]
        function = rms_norm_fn if is_rms else layer_norm_fn
        names = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
        *results, mask, mask1 = function(
            **dict(zip(names, inputs)),
            eps=1e-5,
            dropout_p=dropout_p,
            rowscale=rowscale,
            prenorm=prenorm,
            residual_in_fp32=True,
            return_dropout_mask=True,
        )
        masks[:] = [mask, mask1]
        return results

    def plain(*inputs):  # type: ignore[no-untyped-def]
        return (rms_norm_ref if is_rms else layer_norm_ref)(
            *inputs,
            eps=1e-5,
            dropout_p=dropout_p,
            rowscale=rowscale,
            prenorm=prenorm,
            dropout_mask=masks[0],
            dropout_mask1=masks[1],
            upcast=True,
        )

    outputs, gradients = differentiated(ours, inputs)
    assert (masks[0] is None) == (dropout_p == 0.0)
    assert (masks[1] is None) == (dropout_p == 0.0 or not has_x1)
    expected, expected_gradients = differentiated(plain, inputs)
    assert outputs[0].dtype == dtype
    if prenorm:
        assert outputs[-1].dtype == (residual_dtype or torch.float32)
    close(outputs, expected, dtype)
    close(gradients, expected_gradients, dtype, "gradients")


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(1)
    x = torch.ones(400, WIDTH)
    _, residual, mask, nothing = layer_norm_fn(
        x,
        torch.ones(WIDTH),
        torch.zeros(WIDTH),
        dropout_p=0.3,
        prenorm=True,
        return_dropout_mask=True,
    )
    assert nothing is None and mask.dtype == torch.bool
    assert torch.equal(residual, mask.float() / (1.0 - 0.3))
    assert abs(mask.float().mean() - 0.7) < 0.02


@pytest.mark.parametrize("prenorm", [False, True])
def test_residual_without_more(prenorm: bool) -> None:
    x, weight = torch.randn(3, WIDTH).bfloat16(), torch.randn(WIDTH)
    result = rms_norm_fn(x, weight, None, prenorm=prenorm)
    if not prenorm:
        assert isinstance(result, Tensor)
        return
    assert torch.equal(result[1], x)
    assert (
        rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    )


def test_rowscale_has_one_value_for_each_row_in_any_shape() -> None:
    x, weight, scale = torch.randn(2, 4, 8), torch.randn(8), torch.rand(2, 4)
    for function in (layer_norm_fn, layer_norm_ref):
        assert torch.equal(
            function(x, weight, None, rowscale=scale),
            function(x, weight, None, rowscale=scale.flatten()),
        )


def test_rowscale_and_x1_exclude_each_other() -> None:
    x = torch.zeros(2, WIDTH)
    for function in (layer_norm_fn, layer_norm_ref):
        with pytest.raises(ValueError, match="rowscale was given with x1"):
            function(x, x[0], None, x1=x, rowscale=x[:, 0])


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("has_x1", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_layer_norm_without_autograd(dropout_p: float, has_x1: bool, is_rms: bool) -> None:
    torch.manual_seed(2)
    names = ["x", "weight", "bias", "residual", "x1", "weight1", "bias1"]
    tensors = [torch.randn(5, WIDTH) if i in (0, 3, 4) else torch.randn(WIDTH) for i in range(7)]
    if not has_x1:
        tensors[4] = None
    rowscale = None if has_x1 else torch.randn(5)
    x, weight, bias, residual, x1, weight1, bias1 = tensors
    y, y1, mean, rstd, total, seeds, mask, mask1 = layer_norm._layer_norm_fwd(
        x,
        weight,
        bias,
        1e-5,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        dropout_p=dropout_p,
        rowscale=rowscale,
        is_rms_norm=is_rms,
        return_dropout_mask=True,
    )
    assert (mean is None) == is_rms
    grads = [torch.randn_like(y) for _ in range(3)]

    def plain(*inputs):  # type: ignore[no-untyped-def]
        return (rms_norm_ref if is_rms else layer_norm_ref)(
            **dict(zip(names, inputs)),
            eps=1e-5,
            dropout_p=dropout_p,
            rowscale=rowscale,
            prenorm=True,
            dropout_mask=mask,
            dropout_mask1=mask1,
        )

    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    expected = plain(*leaves)
    close((y, y1, total), expected)
    wanted = iter(torch.autograd.grad(expected, [t for t in leaves if t is not None], grads))
    gradients = dict(zip(names, (None if t is None else next(wanted) for t in leaves)))
    found = layer_norm._layer_norm_bwd(
        grads[0],
        total,
        weight,
        bias,
        1e-5,
        mean,
        rstd,
        dresidual=grads[2],
        dy1=grads[1],
        weight1=weight1,
        bias1=bias1,
        seeds=seeds,
        dropout_p=dropout_p,
        rowscale=rowscale,
        has_residual=True,
        has_x1=has_x1,
        is_rms_norm=is_rms,
        recompute_output=True,
    )
    order = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    close(found[:7], tuple(gradients[n] for n in order))
    close(found[7], y)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_linear_after_norm(prenorm: bool, is_rms: bool) -> None:
    torch.manual_seed(3)
    inputs = (
        torch.randn(2, 5, WIDTH),
        torch.randn(WIDTH),
        None if is_rms else torch.randn(WIDTH),
        torch.randn(9, WIDTH),
        torch.randn(9),
        torch.randn(2, 5, WIDTH),
    )

    def ours(*inputs):  # type: ignore[no-untyped-def]
        return layer_norm_linear_fn(*inputs, prenorm=prenorm, is_rms_norm=is_rms)

    def plain(x, weight, bias, linear, linear_bias, residual):  # type: ignore[no-untyped-def]
        norm = rms_norm_ref if is_rms else layer_norm_ref
        y, total = norm(x, weight, bias, residual=residual, prenorm=True)
        out = F.linear(y, linear, linear_bias)
        return (out, total) if prenorm else out

    outputs, gradients = differentiated(ours, inputs)
    expected, expected_gradients = differentiated(plain, inputs)
    close(outputs, expected)
    close(gradients, expected_gradients, what="gradients")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        low = ours(*inputs)
    low = low[0] if prenorm else low
    assert low.dtype == torch.bfloat16
    low_inputs = [None if t is None else t.bfloat16() for t in inputs]
    result = layer_norm_linear_fn(*low_inputs, is_rms_norm=is_rms)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_gated(
    group_size: Optional[int],
    norm_before_gate: bool,
    gated: bool,
    is_rms: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(4)
    inputs = (
        torch.randn(2, 7, WIDTH, dtype=dtype),
        torch.randn(WIDTH),
        torch.randn(WIDTH),
        torch.randn(2, 7, 2 * WIDTH, dtype=dtype)[..., :WIDTH] if gated else None,
    )
    options: dict[str, Any] = dict(
        eps=1e-5, group_size=group_size, norm_before_gate=norm_before_gate
    )

    def ours(x, weight, bias, z):  # type: ignore[no-untyped-def]
        if is_rms:
            return layernorm_gated.rmsnorm_fn(x, weight, bias, z=z, **options)
        return layernorm_gated.layernorm_fn(x, weight, bias, z=z, **options)

    def plain(x, weight, bias, z):  # type: ignore[no-untyped-def]
        if is_rms:
            return layernorm_gated.rms_norm_ref(x, weight, bias, z=z, **options)
        x, z = x.float(), None if z is None else z.float()
        if z is not None and not norm_before_gate:
            x = x * F.silu(z)
        size = group_size or WIDTH
        groups = F.layer_norm(x.unflatten(-1, (-1, size)), (size,), eps=1e-5)
        out = groups.flatten(-2) * weight + bias
        return (out * F.silu(z) if z is not None and norm_before_gate else out).to(dtype)

    outputs, gradients = differentiated(ours, inputs)
    expected, expected_gradients = differentiated(plain, inputs)
    assert outputs[0].dtype == dtype
    close(outputs, expected, dtype)
    close(gradients, expected_gradients, dtype, "gradients")
    if dtype != torch.float32:
        return

    x, weight, bias, z = inputs
    options["is_rms_norm"] = is_rms
    options.pop("eps")
    out, mean, rstd = layernorm_gated._layer_norm_fwd(x, weight, bias, 1e-5, z=z, **options)
    close(out, expected[0])
    assert (mean is None) == is_rms and rstd.shape == (14 * WIDTH // (group_size or WIDTH),)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    dout = torch.randn(x.shape, generator=generator)
    room = torch.empty_like(z) if gated else None
    *found, again = layernorm_gated._layer_norm_bwd(
        dout, x, weight, bias, 1e-5, mean, rstd, z=z, dz=room, recompute_output=True, **options
    )
    close(found, expected_gradients)
    close(again, expected[0])
    assert room is None or found[3] is room
    assert (
        layernorm_gated._layer_norm_fwd(x, weight, bias, 1e-5, out=again, z=z, **options)[0]
        is again
    )


def test_modules() -> None:
    x, z = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    norm = layer_norm.RMSNorm(WIDTH)
    assert norm.eps == 1e-5 and norm.bias is None
    out, total = norm(x, residual=z, prenorm=True)
    close((out, total), rms_norm_ref(x, norm.weight, None, residual=z, eps=1e-5, prenorm=True))
    gated = layernorm_gated.RMSNorm(WIDTH, group_size=8, norm_before_gate=False)
    expected = layernorm_gated.rms_norm_ref(
        x, gated.weight, None, z=z, eps=1e-5, group_size=8, norm_before_gate=False
    )
    close(gated(x, z), expected)
    assert list(layernorm_gated.LayerNorm(WIDTH).state_dict()) == ["weight", "bias"]
    layer = layernorm_gated.LayerNorm(WIDTH)
    close(layer(x), F.layer_norm(x, (WIDTH,), eps=1e-5))
    dropping = layer_norm.RMSNorm(WIDTH, dropout_p=0.5)
    dropped = dropping(x, residual=torch.zeros_like(x), prenorm=True)[1]
    assert (dropped == 0).any() and not torch.equal(dropped, x)
    assert torch.equal(dropping.eval()(x, residual=torch.zeros_like(x), prenorm=True)[1], x)


def test_name_of_earlier_releases() -> None:
    from mamba_ssm.ops.triton import layernorm

    assert layernorm.rms_norm_fn is rms_norm_fn and layernorm.RMSNorm is layer_norm.RMSNorm


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.randn(2, 4, 10), torch.randn(10)
    with pytest.raises(ValueError, match=r"x1 has shape \(2, 4, 9\), expected \(2, 4, 10\)"):
        layer_norm_fn(x, weight, None, x1=torch.randn(2, 4, 9))
    with pytest.raises(ValueError, match=r"rowscale has shape \(3,\), expected \(2, 4\)"):
        layer_norm_fn(x, weight, None, rowscale=torch.randn(3))
    with pytest.raises(ValueError, match="dropout_p is 1.5"):
        layer_norm_fn(x, weight, None, dropout_p=1.5)
    with pytest.raises(ValueError, match="group_size is 0"):
        layernorm_gated.rmsnorm_fn(x, weight, None, group_size=0)
