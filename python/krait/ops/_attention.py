"""attention and rotary position embedding."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Arrays, dtype_name
from .._library import library
from ._common import require_ndim, several


class AttentionGradients(NamedTuple):
    """Gradients of attention's inputs."""

    dq: Array
    dk: Array
    dv: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
    return_logsumexp: bool = False,
    out: Array | None = None,
) -> Array:
    """softmax(scale q k^T) v with grouped queries, of one sequence; never all Lq x Lk scores at
    once.

    Args:
        q: (Lq, H, head_dim), real.
        k: (Lk, Hkv, head_dim); H is a multiple of Hkv, query head h uses h // (H // Hkv).
        v: (Lk, Hkv, head_dim_v).
        causal: query i sees keys 0 .. Lk - Lq + i; needs Lk >= Lq.
        scale: of the scores; 0: head_dim ** -0.5.
        return_logsumexp: also return (Lq, H) float32, of the scaled scores, which the backward
            takes.
        out: destination (Lq, H, head_dim_v).

    Returns:
        out (Lq, H, head_dim_v) in q's element type, or (out, logsumexp).
    """
    op = "attention"
    arrays = Arrays(op, "q", q)
    require_ndim(op, "q", q, 3, "(Lq, H, head_dim)")
    require_ndim(op, "v", v, 3, "(Lk, Hkv, head_dim_v)")
    inputs = (arrays("q", q), arrays("k", k), arrays("v", v))
    if out is None:
        out = arrays.empty((*q.shape[:2], v.shape[2]), dtype_name(q))
    logsumexp = arrays.empty(q.shape[:2], arrays.real) if return_logsumexp else None
    library().attention(
        *inputs,
        bool(causal),
        arrays.number("scale", scale),
        arrays.destination("out", out),
        arrays.destination("logsumexp", logsumexp),
    )
    return several(*map(arrays.result, (out, logsumexp)))


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array,
    logsumexp: Array,
    dout: Array,
    causal: bool = False,
    scale: float = 0.0,
) -> AttentionGradients:
    """The gradients of attention, in the shapes and element types of q, k and v; scores are
    recomputed block by block (Dao et al. 2022, "FlashAttention", algorithm 4).

    Args:
        q, k, v, causal, scale: as given to attention.
        out, logsumexp: as attention returned them.
        dout: (Lq, H, head_dim_v), the gradient of out.
    """
    arrays = Arrays("attention_backward", "q", q)
    inputs = (arrays("q", q), arrays.given("k", k), arrays.given("v", v))
    result = AttentionGradients(
        *(arrays.empty(array.shape, dtype_name(array)) for array in (q, k, v))
    )
    library().attention_backward(
        *inputs,
        bool(causal),
        arrays.number("scale", scale),
        arrays("out", out),
        arrays("logsumexp", logsumexp),
        arrays("dout", dout),
        arrays.destination("dq", result.dq),
        arrays.destination("dk", result.dk),
        arrays.destination("dv", result.dv),
    )
    return AttentionGradients(*map(arrays.result, result))


def rotary_embedding(
    x: Array,
    positions: Array,
    *,
    dim: int,
    base: float = 10000.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Rotary position embedding (Su et al. 2021, "RoFormer"), in place: pairs of channels turn by
    position * base ** (-2 i / dim).

    Args:
        x: (T, H, head_dim), real, turned in place.
        positions: (T,), int64 or int32.
        dim: the first `dim` channels turn; even, at most head_dim.
        base: above 0.
        interleaved: pairs (2 i, 2 i + 1) instead of (i, i + dim / 2).
        inverse: turn backwards, which is the gradient.
    """
    arrays = Arrays("rotary_embedding", "x", x)
    library().rotary_embedding(
        arrays.destination("x", x),
        arrays("positions", positions),
        arrays.integer("dim", dim),
        arrays.number("base", base),
        bool(interleaved),
        bool(inverse),
    )
