"""Sampling of ids from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._arguments import unsigned
from .._arrays import Array, Arrays
from .._library import library
from ._common import require_ndim, several


def _options(
    arrays: Arrays,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> tuple[float, int, float, float, float]:
    """What every sampler of the library takes, in its order."""
    return (
        arrays.number("temperature", temperature),
        arrays.integer("top_k", top_k),
        arrays.number("top_p", top_p),
        arrays.number("min_p", min_p),
        arrays.number("repetition_penalty", repetition_penalty),
    )


def _row(
    op: str, logits: Array, vocab_size: int | None, previous: Array | None
) -> tuple[Arrays, tuple[Any, int, Any]]:
    """What the samplers of one row take first."""
    arrays = Arrays(op, "logits", logits)
    require_ndim(op, "logits", logits, 1, "(V,)")
    size = logits.shape[0] if vocab_size is None else arrays.integer("vocab_size", vocab_size)
    return arrays, (arrays("logits", logits), size, arrays("previous", previous))


class Sample(NamedTuple):
    """What was drawn."""

    id: int
    logprob: float
    """The log softmax of the raw logits at the id."""
    position: int
    """Where the generator stands now; an argmax leaves it where it was."""


def sample_rows(
    logits: Array,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    streams: Array | None = None,
    positions: Array | None = None,
    seen: Array | None = None,
    return_logprobs: bool = False,
) -> Array:
    """Draws one id from each row of logits.

    The order is: repetition penalty over the ids marked in `seen`; temperature 0 or top_k 1: the
    largest; top_k > 0: the k best, temperature, top_p; else min_p, temperature, top_p.

    Args:
        logits: (B, V), float32, bfloat16 or float16.
        vocab_size: ids at and beyond it are never drawn; None: V.
        temperature: >= 0; 0 takes the largest.
        top_k: 0: off.
        top_p: <= 0 or >= 1: off; the smallest set with that cumulative probability is kept.
        min_p: in [0, 1]; tokens whose probability is at least min_p times the largest are kept.
        repetition_penalty: > 0.
        seed: of Philox4x32-10, 0 to 2^64 - 1; row b draws from stream streams[b], else b.
        streams: (B,), int64 or int32, optional.
        positions: (B,), int64, where each generator stands, advanced by a draw; None: from 0.
        seen: (B, V), uint8, needed for a repetition penalty; the drawn id is marked in it.
        return_logprobs: also return (B,) float32, the log softmax of the raw logits at the ids.

    Returns:
        ids (B,) int64, or (ids, logprobs).
    """
    op = "sample_rows"
    arrays = Arrays(op, "logits", logits)
    require_ndim(op, "logits", logits, 2, "(B, V)")
    batch = logits.shape[0]
    ids = arrays.empty((batch,), "int64")
    logprobs = arrays.empty((batch,), "float32") if return_logprobs else None
    if positions is None:
        positions = arrays.zeros((batch,), "int64")
    library().sample_rows(
        arrays("logits", logits),
        logits.shape[1] if vocab_size is None else arrays.integer("vocab_size", vocab_size),
        *_options(arrays, temperature, top_k, top_p, min_p, repetition_penalty),
        unsigned(f"[{op}] seed", seed),
        arrays("streams", streams),
        arrays.destination("positions", positions),
        arrays.destination("seen", seen),
        arrays.destination("ids", ids),
        arrays.destination("logprobs", logprobs),
    )
    return several(*map(arrays.result, (ids, logprobs)))


def sample(
    logits: Array,
    *,
    vocab_size: int | None = None,
    previous: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stream: int = 0,
    position: int = 0,
) -> Sample:
    """Draws one id from one row of logits.

    Args:
        logits: (V,), float32, on the CPU. NaN, infinity and a row without a finite logit raise
            ValueError.
        previous: (n,), int64, optional: ids that the repetition penalty counts.
        vocab_size, temperature .. repetition_penalty: as in sample_rows.
        seed, stream, position: of Philox4x32-10 and where it stands, 0 to 2^64 - 1. The position
            that comes back is that of the next draw.
    """
    op = "sample"
    arrays, row = _row(op, logits, vocab_size, previous)
    id, logprob, after = library().sample(
        *row,
        *_options(arrays, temperature, top_k, top_p, min_p, repetition_penalty),
        unsigned(f"[{op}] seed", seed),
        unsigned(f"[{op}] stream", stream),
        unsigned(f"[{op}] position", position),
    )
    return Sample(int(id), float(logprob), int(after) % (1 << 64))


def sampling_distribution(
    logits: Array,
    *,
    vocab_size: int | None = None,
    previous: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Array:
    """The distribution that a draw is made from: probabilities after penalty, filters and
    temperature.

    Args:
        logits: (V,), float32, on the CPU.
        previous: (n,), int64, optional: ids that the repetition penalty counts.
        vocab_size, temperature .. repetition_penalty: as in sample_rows.

    Returns:
        (V,) float32; 0 at and beyond vocab_size.
    """
    op = "sampling_distribution"
    arrays, row = _row(op, logits, vocab_size, previous)
    out = arrays.empty(logits.shape, "float32")
    library().sampling_distribution(
        *row,
        *_options(arrays, temperature, top_k, top_p, min_p, repetition_penalty),
        arrays.destination("out", out),
    )
    return arrays.result(out)
