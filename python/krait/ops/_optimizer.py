"""AdamW and what stands around it."""

from __future__ import annotations

from collections.abc import Sequence

from .._arrays import Array, Arrays
from .._library import library


def _listed(op: str, name: str, group: Sequence[Array]) -> Sequence[Array]:
    if not isinstance(group, Sequence):
        found = "None" if group is None else f"a {type(group).__name__}"
        raise TypeError(f"[{op}] {name} is {found}, expected a list of arrays")
    return group


def adamw(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    *,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Sequence[bool] | None = None,
    gradient_scale: float = 1.0,
    compute: Sequence[Array] | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) over all parameters, in place.

    Args:
        parameters, gradients, m, v: lists of contiguous float32 arrays; parameters and both moments
            are written.
        step: from 1, of the bias correction.
        lr: the learning rate.
        beta1, beta2: of the moments, in [0, 1); eps: added to the root of the second one.
        weight_decay: of the parameters with `decay`: p -= lr * weight_decay * p, before the update.
        decay: one flag for each parameter; None: all decay.
        gradient_scale: gradients are multiplied by it first (clipping).
        compute: arrays of bfloat16 or float16 that receive the new parameters, rounded; optional.
    """
    op = "adamw"
    if not _listed(op, "parameters", parameters):
        return
    arrays = Arrays(op, "parameters", parameters[0])

    def written(name: str, group: Sequence[Array]) -> list[Array]:
        return [arrays.destination(name, array) for array in _listed(op, name, group)]

    library().adamw(
        written("parameters", parameters),
        [arrays("gradients", array) for array in _listed(op, "gradients", gradients)],
        written("m", m),
        written("v", v),
        None if compute is None else written("compute", compute),
        [True] * len(parameters) if decay is None else [bool(flag) for flag in decay],
        arrays.integer("step", step),
        arrays.number("lr", lr),
        arrays.number("beta1", beta1),
        arrays.number("beta2", beta2),
        arrays.number("eps", eps),
        arrays.number("weight_decay", weight_decay),
        arrays.number("gradient_scale", gradient_scale),
    )


def global_norm(arrays: Sequence[Array]) -> float:
    """sqrt of the sum of squares over all arrays (float32), summed in float64; not finite where any
    element is not."""
    op = "global_norm"
    if not _listed(op, "arrays", arrays):
        return 0.0
    operands = Arrays(op, "arrays", arrays[0])
    return float(library().global_norm([operands("arrays", array) for array in arrays]))


def update_average(averages: Sequence[Array], parameters: Sequence[Array], decay: float) -> None:
    """average = decay average + (1 - decay) parameter, in place, for lists of contiguous float32
    arrays."""
    op = "update_average"
    first = [*_listed(op, "averages", averages)[:1], *_listed(op, "parameters", parameters)[:1]]
    if not first:
        return
    operands = Arrays(op, "averages", first[0])
    library().update_average(
        [operands.destination("averages", array) for array in averages],
        [operands("parameters", array) for array in parameters],
        operands.number("decay", decay),
    )
