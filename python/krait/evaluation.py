"""How well models do: likelihoods of continuations, and tasks in local files, in the conventions of
lm-evaluation-harness (Gao et al., "A framework for few-shot language model evaluation").

>>> model = krait.LanguageModel.from_pretrained("state-spaces/mamba-130m")
>>> for result in krait.evaluate(model, "tasks/"):
...     print(result.name, {name: metric.value for name, metric in result.metrics.items()})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from krait import _arguments
from krait._ids import Ids, as_ids, pack
from krait._interrupt import Interruptible
from krait._library import library
from krait.model import LanguageModel
from krait.tokenizer import Tokenizer

__all__ = ["DocumentResult", "Likelihood", "Metric", "TaskResult", "evaluate", "likelihoods"]

Path = str | os.PathLike[str]


class Likelihood(NamedTuple):
    """How probable a model finds a continuation."""

    log_likelihood: float
    """In nats, over all rows of the head."""
    is_greedy: bool
    """Whether each of its tokens is the most probable one."""


@dataclass(frozen=True)
class Metric:
    """One number for all documents of a task."""

    value: float
    standard_error: float | None
    """Of accuracies and of ``perplexity``, where there is more than one document."""
    higher_is_better: bool


@dataclass(frozen=True)
class DocumentResult:
    """One document of a task."""

    requests: list[Likelihood]
    """One for each choice, or one; of a whole text with ``is_greedy`` false. Choices without
    context, which ``acc_mutual_info`` asks for, follow behind."""
    metrics: dict[str, float]
    """1 or 0 for accuracies; the log-likelihood in nats for perplexities."""


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task."""

    name: str
    metrics: dict[str, Metric]
    documents: list[DocumentResult] = field(repr=False)


def likelihoods(
    model: LanguageModel,
    continuations: Iterable[tuple[Ids, Ids]],
    *,
    max_length: int = 0,
    batch_size: int = 0,
    share_prefixes: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> list[Likelihood]:
    """How probable ``model`` finds each continuation after its context.

    ``continuations``  pairs of token ids, (context, continuation), each at least one.
    ``max_length``  tokens that the model sees at a time: a longer context loses its beginning, a
        continuation must fit. 0: any.
    ``batch_size``  sequences whose states exist at a time; 0: chosen from the size of a state.
        Sequences are packed, without padding.
    ``share_prefixes``  what continuations have in common at their beginning runs once, and its
        state is forked.
    ``progress``  is told (done, total) of the continuations.

    Returns one for each, in their order. Ctrl-C raises KeyboardInterrupt.

    Raises ValueError where one is empty, longer than ``max_length`` or holds an id outside of the
    vocabulary; the message has its index.
    """
    _arguments.instance("model", model, LanguageModel)
    rows = []
    for index, pair in enumerate(continuations):
        try:
            context, continuation = pair
        except (TypeError, ValueError):
            raise TypeError(
                f"continuation {index} is {type(pair).__name__}, expected (context, continuation)"
            ) from None
        rows += [as_ids(context, "context"), as_ids(continuation, "continuation")]
    for row in rows:
        if row.ndim != 1:
            raise ValueError(f"a context or continuation has shape {row.shape}, expected (tokens)")
    flat, offsets = pack(rows)
    log_likelihoods = np.empty(len(rows) // 2, np.float64)
    is_greedy = np.empty(len(rows) // 2, np.bool_)
    with Interruptible() as work:
        model._call(
            library().model_likelihoods,
            model._handle,
            flat,
            offsets,
            _arguments.integer("max_length", max_length),
            _arguments.integer("batch_size", batch_size),
            bool(share_prefixes),
            work.guard(progress),
            work.stop,
            log_likelihoods,
            is_greedy,
        )
    return [
        Likelihood(value, greedy)
        for value, greedy in zip(log_likelihoods.tolist(), is_greedy.tolist(), strict=True)
    ]


def evaluate(
    model: LanguageModel,
    tasks: Path | Sequence[Path],
    *,
    limit: int = 0,
    batch_size: int = 0,
    max_length: int | None = None,
    prefix_token: int | None = None,
    tokenizer: Tokenizer | None = None,
    bootstrap_iterations: int = 100_000,
    progress: Callable[[str, int, int], object] | None = None,
) -> list[TaskResult]:
    """Runs tasks, as ``krait eval`` does (docs/evaluation.md).

    ``tasks``  descriptions (.json), directories of them, documents alone (.jsonl), one or several.
    ``limit``  > 0: the first documents of each task alone.
    ``batch_size``  as in :func:`likelihoods`.
    ``max_length``  tokens that the model sees at a time; None: what its configuration or tokenizer
        says, else 2,048.
    ``prefix_token``  the id in place of an empty context; None: the token of the beginning of a
        text, else of its end.
    ``tokenizer``  in place of the model's own.
    ``bootstrap_iterations``  resamplings behind the standard error of ``perplexity``; 0: no
        standard errors.
    ``progress``  is told (task, done, total) of the requests.

    Raises FileNotFoundError, OSError, and ValueError where a file is not understood; the message
    names file, line and field.
    """
    _arguments.instance("model", model, LanguageModel)
    if isinstance(tasks, (str, bytes, os.PathLike)) or not isinstance(tasks, Iterable):
        tasks = [tasks]
    paths = [_arguments.path("tasks", path) for path in tasks]
    if not paths:
        raise ValueError("tasks is empty, expected at least one path")
    length = 0 if max_length is None else _arguments.integer("max_length", max_length)
    if max_length is not None and length < 1:
        raise ValueError(f"max_length is {length}, expected at least 1")
    prefix = -1 if prefix_token is None else _arguments.integer("prefix_token", prefix_token)
    if prefix_token is not None and prefix < 0:
        raise ValueError(f"prefix_token is {prefix}, expected an id")
    with Interruptible() as work:
        results = model._call(
            library().model_evaluate,
            model._handle,
            None
            if tokenizer is None
            else _arguments.instance("tokenizer", tokenizer, Tokenizer)._handle,
            paths,
            _arguments.integer("limit", limit),
            length,
            prefix,
            _arguments.integer("batch_size", batch_size),
            _arguments.integer("bootstrap_iterations", bootstrap_iterations),
            work.guard(progress),
            work.stop,
        )
    return [
        TaskResult(
            name=str(name),
            metrics={
                str(metric): Metric(
                    float(value), None if error is None else float(error), bool(better)
                )
                for metric, value, error, better in metrics
            },
            documents=[
                DocumentResult(
                    requests=[
                        Likelihood(float(value), bool(greedy))
                        for value, greedy in zip(log_likelihoods, is_greedy, strict=True)
                    ],
                    metrics={
                        str(metric[0]): float(value)
                        for metric, value in zip(metrics, values, strict=True)
                    },
                )
                for log_likelihoods, is_greedy, values in documents
            ],
        )
        for name, metrics, documents in results
    ]
