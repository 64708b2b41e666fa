"""A Mamba-2 block between its projections as one differentiable PyTorch operator (Dao and Gu 2024,
section 7).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd import Function

from .._operator import (
    GRAD,
    check_offsets,
    count_sequences,
    define,
    define_backward,
    examine,
    like,
    native,
    on_host,
    shape_of,
    sum_dtype,
)
from .causal_conv1d import activation_word

_FLOATS = 8  # the differentiable inputs come first
_INPUTS = 17


class _Sizes(NamedTuple):
    """Widths of what zxbcdt and the convolution's output consist of."""

    d_mlp: int
    d_ssm: int
    conv_dim: int
    nheads: int
    headdim: int
    ngroups: int
    d_state: int

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """z0, x0 (B, L, d_mlp), z (B, L, d_ssm), xBC (B, L, conv_dim), dt (B, L, H)."""
        widths = [self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]
        return zxbcdt.split_with_sizes(widths, 2)

    def split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, H, P), B and C (B, L, G, N)."""
        states = self.ngroups * self.d_state
        x, B, C = xBC.split_with_sizes([self.d_ssm, states, states], 2)
        lead = xBC.shape[:2]
        groups = (*lead, self.ngroups, self.d_state)
        return self.by_head(x), B.view(groups), C.view(groups)

    def by_head(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], t.shape[1], self.nheads, self.headdim)


def _sizes(zxbcdt: Tensor, conv_weight: Tensor, A: Tensor, headdim: int, ngroups: int) -> _Sizes:
    if zxbcdt.dim() != 3:
        raise ValueError(
            f"[split_conv1d_scan] zxbcdt has shape {shape_of(zxbcdt)}, expected (B, L, width)"
        )
    if conv_weight.dim() != 2 or A.dim() != 1 or headdim <= 0 or ngroups <= 0:
        raise ValueError(
            f"[split_conv1d_scan] conv_weight has shape {shape_of(conv_weight)}, A {shape_of(A)}, "
            f"headdim is {headdim}, ngroups {ngroups}, expected (conv channels, K), (H) and "
            "positive numbers"
        )
    nheads, conv_dim, width = A.shape[0], conv_weight.shape[0], zxbcdt.shape[2]
    d_ssm = nheads * headdim
    states = conv_dim - d_ssm
    mlp = width - d_ssm - conv_dim - nheads
    if states <= 0 or states % (2 * ngroups) != 0 or mlp < 0 or mlp % 2 != 0:
        raise ValueError(
            f"[split_conv1d_scan] zxbcdt has {width} and conv_weight {conv_dim} channels, which do "
            f"not split for {nheads} heads of {headdim} channels and {ngroups} groups"
        )
    return _Sizes(mlp // 2, d_ssm, conv_dim, nheads, headdim, ngroups, states // (2 * ngroups))


def _empty_outputs(
    zxbcdt: Tensor,
    sizes: _Sizes,
    gated: bool,
    cu_seqlens: Optional[Tensor],
    want_final_states: bool,
) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    batch, length, _ = zxbcdt.shape
    out = zxbcdt.new_empty((batch, length, sizes.d_mlp + sizes.d_ssm))
    convolved = zxbcdt.new_empty((batch, length, sizes.conv_dim))
    y = zxbcdt.new_empty((batch, length, sizes.d_ssm)) if gated else None
    final_states = None
    if want_final_states:
        if cu_seqlens is not None:
            check_offsets("split_conv1d_scan", cu_seqlens)
        rows = count_sequences(batch, cu_seqlens)
        final_states = zxbcdt.new_empty(
            (rows, sizes.nheads, sizes.headdim, sizes.d_state), dtype=sum_dtype((zxbcdt,))
        )
    return out, convolved, y, final_states


def _forward(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Optional[Tensor],
    A: Tensor,
    D: Optional[Tensor],
    norm_weight: Optional[Tensor],
    initial_states: Optional[Tensor],
    seq_idx: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    headdim: int,
    ngroups: int,
    activation: str,
    norm_eps: float,
    norm_before_gate: bool,
    dt_low: float,
    dt_high: float,
    want_final_states: bool,
) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    """out, the convolution's output, ssd's where a norm follows, final states where wanted."""
    if zxbcdt.is_cuda and zxbcdt.dtype is torch.float64:
        return on_host(
            _forward, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_states,
            seq_idx, cu_seqlens, headdim, ngroups, activation, norm_eps, norm_before_gate,
            dt_low, dt_high, want_final_states,
        )  # fmt: skip
    sizes = _sizes(zxbcdt, conv_weight, A, headdim, ngroups)
    gated = norm_weight is not None
    out, convolved, y, final_states = _empty_outputs(
        zxbcdt, sizes, gated, cu_seqlens, want_final_states
    )
    z0, x0, z, xBC, dt = sizes.split(zxbcdt)
    native("causal_conv1d")(
        xBC.transpose(1, 2), conv_weight, conv_bias, None, seq_idx, cu_seqlens, None, activation,
        convolved.transpose(1, 2), None, None,
    )  # fmt: skip
    x, B, C = sizes.split_conv(convolved)
    ssm_out = out.narrow(2, sizes.d_mlp, sizes.d_ssm) if sizes.d_mlp > 0 else out
    scanned = sizes.by_head(ssm_out if y is None else y)
    native("ssd")(
        x, dt, A, B, C, D, None if gated else sizes.by_head(z), dt_bias, initial_states, seq_idx,
        cu_seqlens, None, True, dt_low, dt_high, False, 0, scanned, final_states, None,
    )  # fmt: skip
    if y is not None:
        native("norm")(
            "rms", y, norm_weight, None, None, z, norm_eps, sizes.d_ssm // ngroups,
            norm_before_gate, False, ssm_out, None,
        )  # fmt: skip
    if sizes.d_mlp > 0:
        native("gated_silu")(x0, z0, out.narrow(2, 0, sizes.d_mlp))
    return out, convolved, y, final_states


def _backward(
    wanted: list[bool],
    dout: Optional[Tensor],
    dfinal_states: Optional[Tensor],
    convolved: Tensor,
    y: Optional[Tensor],
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Optional[Tensor],
    A: Tensor,
    D: Optional[Tensor],
    norm_weight: Optional[Tensor],
    initial_states: Optional[Tensor],
    seq_idx: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    headdim: int,
    ngroups: int,
    activation: str,
    norm_eps: float,
    norm_before_gate: bool,
    dt_low: float,
    dt_high: float,
) -> list[Tensor]:
    """Gradients of those of the eight floating inputs that are wanted, in their order."""
    inputs = (zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_states)
    if zxbcdt.is_cuda and zxbcdt.dtype is torch.float64:
        return on_host(
            _backward, wanted, dout, dfinal_states, convolved, y, *inputs, seq_idx, cu_seqlens,
            headdim, ngroups, activation, norm_eps, norm_before_gate, dt_low, dt_high,
        )  # fmt: skip
    sizes = _sizes(zxbcdt, conv_weight, A, headdim, ngroups)
    batch, length, _ = zxbcdt.shape
    if dout is None:
        dout = zxbcdt.new_zeros((batch, length, sizes.d_mlp + sizes.d_ssm))
    sums = sum_dtype((zxbcdt,))

    dzxbcdt = zxbcdt.new_empty(zxbcdt.shape)
    grads: list[Optional[Tensor]] = [dzxbcdt]
    for want, t in zip(wanted[1:7], inputs[1:7]):
        grads.append(torch.zeros_like(t, dtype=sums) if want and t is not None else None)
    dinitial_states = None
    if wanted[7] and initial_states is not None:
        dinitial_states = torch.empty_like(initial_states)
    grads.append(dinitial_states)
    _, dconv_weight, dconv_bias, ddt_bias, dA, dD, dnorm_weight, _ = grads

    z0, x0, z, xBC, dt = sizes.split(zxbcdt)
    dz0, dx0, dz, dxBC, ddt = sizes.split(dzxbcdt)
    dssm_out = dout
    if sizes.d_mlp > 0:
        native("gated_silu_backward")(x0, z0, dout.narrow(2, 0, sizes.d_mlp), dx0, dz0)
        dssm_out = dout.narrow(2, sizes.d_mlp, sizes.d_ssm)
    gated = y is not None
    dy = dssm_out
    if y is not None:
        dy = torch.empty_like(y)
        native("norm_backward")(
            "rms", y, norm_weight, None, z, norm_eps, sizes.d_ssm // ngroups, norm_before_gate,
            dssm_out, None, dy, None, dz, dnorm_weight, None,
        )  # fmt: skip
    dconvolved = torch.empty_like(convolved)
    x, B, C = sizes.split_conv(convolved)
    dx, dB, dC = sizes.split_conv(dconvolved)
    native("ssd_backward")(
        x, dt, A, B, C, D, None if gated else sizes.by_head(z), dt_bias, initial_states, seq_idx,
        cu_seqlens, True, dt_low, dt_high, False, 0,
        dy.unflatten(2, (sizes.nheads, sizes.headdim)), dfinal_states, dx, ddt, dB, dC,
        None if gated else sizes.by_head(dz), dinitial_states, dA, dD, ddt_bias,
    )  # fmt: skip
    native("causal_conv1d_backward")(
        xBC.transpose(1, 2), conv_weight, conv_bias, None, seq_idx, cu_seqlens, activation,
        dconvolved.transpose(1, 2), None, dxBC.transpose(1, 2), dconv_weight, dconv_bias, None,
    )  # fmt: skip
    if not wanted[0]:
        grads[0] = None
    return [like(g, t) for g, t in zip(grads, inputs) if g is not None and t is not None]


def _op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, convolved, y, final_states = _forward(*args)
    return (
        out,
        convolved,
        out.new_empty(0) if y is None else y,
        out.new_empty(0) if final_states is None else final_states,
    )


def _op_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zxbcdt, conv_weight, A, norm_weight, cu_seqlens = args[0], args[1], args[4], args[6], args[9]
    sizes = _sizes(zxbcdt, conv_weight, A, args[10], args[11])
    out, convolved, y, final_states = _empty_outputs(
        zxbcdt, sizes, norm_weight is not None, cu_seqlens, args[_INPUTS]
    )
    return (
        out,
        convolved,
        out.new_empty(0) if y is None else y,
        out.new_empty(0) if final_states is None else final_states,
    )


def _op_backward_fake(wanted: list[bool], *args: Any) -> list[Tensor]:
    inputs = args[4 : 4 + _FLOATS]
    grads = [torch.empty_like(t) for w, t in zip(wanted, inputs) if w and t is not None]
    if wanted[0]:
        grads[0] = inputs[0].new_empty(inputs[0].shape)
    return grads


_SCHEMA = (
    "Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, "
    "Tensor? norm_weight, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, "
    "SymInt headdim, SymInt ngroups, str activation, float norm_eps, bool norm_before_gate, "
    "float dt_low, float dt_high"
)
define(
    f"split_conv1d_scan({_SCHEMA}, bool want_final_states) -> (Tensor, Tensor, Tensor, Tensor)",
    _op,
    _op_fake,
)
define_backward(
    "split_conv1d_scan_backward(bool[] wanted, Tensor? dout, Tensor? dfinal_states, "
    f"Tensor convolved, Tensor? y, {_SCHEMA}) -> Tensor[]",
    _backward,
    _op_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    y = output[2]
    if y is not None and y.dim() != 3:
        y = None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], y, *inputs[:10])
    ctx.options = inputs[10:_INPUTS]


def _gradients(
    ctx: Any, dout: Optional[Tensor], *others: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    dfinal_states = others[-1]
    if dout is None and dfinal_states is None:
        return (None,) * (_INPUTS + 1)
    saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:_FLOATS])
    eager = not torch.is_grad_enabled() and examine((*saved, dout, dfinal_states))
    compute: Any = _backward if eager else torch.ops.krait.split_conv1d_scan_backward
    grads = iter(compute(wanted, dout, dfinal_states, *saved, *ctx.options))
    rest = (None,) * (_INPUTS + 1 - _FLOATS)
    return (*(next(grads) if want else None for want in wanted), *rest)


torch.library.register_autograd("krait::split_conv1d_scan", _gradients, setup_context=_save)


class _SplitConv1dScan(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Optional[Tensor]]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0], output[3]

    backward = staticmethod(_gradients)


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Optional[Tensor],
    A: Tensor,
    D: Optional[Tensor],
    *,
    headdim: int,
    ngroups: int = 1,
    activation: Optional[str] = "silu",
    norm_weight: Optional[Tensor] = None,
    norm_eps: float = 1e-6,
    norm_before_gate: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    return_final_states: bool = False,
) -> Any:
    """What stands between the projections of a Mamba-2 block (Dao and Gu 2024, section 7)::

        [z0, x0, z, xBC, dt] = zxbcdt
        [x, B, C] = activation(conv(xBC))
        y = ssd(x, softplus(dt + dt_bias), A, B, C, D)       (gated by z inside, without
        norm_weight) y = rms_norm(y, z)                                   (gated, over d_ssm /
        ngroups channels) out = [x0 silu(z0), y]

    Its gradients are written where they belong in that of zxbcdt, without copies. Differentiable
    once in every floating input; `final_states` carry gradients too.

    Args:
        zxbcdt: (B, L, 2 d_mlp + 2 d_ssm + 2 G N + H), with d_ssm = H headdim; d_mlp may be 0.
        conv_weight: (d_ssm + 2 G N, K).
        conv_bias: (d_ssm + 2 G N).
        dt_bias: (H).
        A: (H), negative.
        D: (H) or (H, headdim).
        headdim: P, channels of a head.
        ngroups: G, groups of heads that share B and C.
        activation: of the convolution: None, "silu" or "swish" (the same).
        norm_weight: (d_ssm), of the gated RMSNorm; None: z gates inside the recurrence.
        norm_eps, norm_before_gate: as in `norm`.
        dt_limit: what step sizes are clamped to, after softplus.
        initial_states: (B, H, P, N) of the recurrence; (n, H, P, N) with cu_seqlens.
        seq_idx: (B, L), as in `ssd` and `causal_conv1d`.
        cu_seqlens: (n + 1), bounds of sequences packed into one row (B = 1).
        return_final_states: also return the recurrence's final states.

    Returns:
        out (B, L, d_mlp + d_ssm) in zxbcdt's dtype, or (out, final_states).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the tensor.
    """
    tensors = (
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_states, seq_idx,
        cu_seqlens,
    )  # fmt: skip
    low, high = dt_limit
    options = (headdim, ngroups, activation_word(activation), norm_eps, norm_before_gate, low, high)
    how = examine(tensors)
    run: Any = torch.ops.krait.split_conv1d_scan
    if how:
        run = _SplitConv1dScan.apply if how & GRAD else _forward
    results = run(*tensors, *options, return_final_states)
    return (results[0], results[-1]) if return_final_states else results[0]
