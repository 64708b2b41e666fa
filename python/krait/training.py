"""Training runs: data in, a model in a directory out.

>>> krait.train(config="config.json", tokenizer="gpt-neox", data=["books.txt"], out="run",
...             steps=1000, lr=3e-3, on_log=print)
>>> model = krait.LanguageModel.from_pretrained("run")
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from krait import _arguments
from krait._interrupt import Interruptible
from krait._library import library
from krait.tokenizer import Tokenizer

__all__ = [
    "EvaluationReport",
    "PackResult",
    "RunStart",
    "SampleReport",
    "StepReport",
    "TrainResult",
    "pack_tokens",
    "run_settings",
    "train",
]

Path = str | os.PathLike[str]
_logger = logging.getLogger("krait")


@dataclass(frozen=True)
class RunStart:
    """What a run is about to do."""

    steps: int
    first_step: int
    """Steps done before: the checkpoint that the run goes on from."""
    parameters: int
    data_tokens: int
    batches_per_epoch: int


@dataclass(frozen=True)
class StepReport:
    """One optimizer step."""

    step: int
    """From 1."""
    loss: float
    """Mean over the targets of the step, in nats."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    lr: float
    tokens: int
    """Targets learnt from since the beginning of the run."""
    seconds: float
    """Since the beginning of the run, evaluations and earlier processes included."""
    tokens_per_second: float
    """Of this step; in ``on_log`` of all since the line before."""
    skipped: int
    """Steps since the beginning that were not finite and changed no weight."""
    was_skipped: bool
    """This one was."""


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation on ``val``."""

    step: int
    loss: float
    """Mean cross-entropy in nats."""
    bits_per_byte: float | None
    average_loss: float | None
    """Of the moving average of the weights (with ``ema``)."""
    average_bits_per_byte: float | None
    best: bool
    """No evaluation before it was as good (by the average, where there is one)."""
    seconds: float


@dataclass(frozen=True)
class SampleReport:
    """A text that the model wrote on the way."""

    step: int
    text: str
    """Prompt and continuation."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    end: Literal["finished", "stopped_early", "interrupted", "already_finished"]
    """"stopped_early" by ``patience``, "interrupted" by ``stop``; "already_finished": ``resume``
    found nothing to do and changed nothing."""
    steps: int
    """Done, those of earlier processes included."""
    best_step: int | None
    """Of the best evaluation, where there was one."""
    best_loss: float | None
    seconds: float


@dataclass(frozen=True)
class PackResult:
    """What a packed file holds."""

    tokens: int
    documents: int
    bytes: int
    """Of the texts."""


# Settings that may be given as one path instead of a list.
_LISTS = ("data", "val")


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if name in _LISTS and not isinstance(value, str):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} is {value!r}, expected a path or several")
        return [_arguments.path(name, item) for item in value]
    if isinstance(value, (tuple, list)):
        return [_as_json(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a scalar of NumPy
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{name} is {type(value).__name__}, expected a number, str or list")
    return value


def train(
    settings: Path | Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    # Model and data.
    model: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    data: Path | Sequence[Path] | None = None,
    val: Path | Sequence[Path] | None = None,
    out: Path | None = None,
    # Steps.
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    accumulate: int | None = None,
    ignore_boundaries: bool | None = None,
    carry_state: bool | None = None,
    # Computation.
    dtype: Literal["f32", "bf16"] | None = None,
    recompute: Literal["none", "block"] | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    # Optimizer.
    lr: float | None = None,
    schedule: Literal["constant", "linear", "cosine", "wsd"] | None = None,
    warmup: int | None = None,
    decay: int | None = None,
    min_lr: float | None = None,
    weight_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    clip: float | None = None,
    ema: float | None = None,
    # What is kept, and what is looked at on the way.
    save_every: int | None = None,
    keep: int | None = None,
    eval_every: int | None = None,
    patience: int | None = None,
    export: Literal["last", "average", "best"] | None = None,
    sample_every: int | None = None,
    sample_prompt: str | None = None,
    sample_tokens: int | None = None,
    log_every: int | None = None,
    # Where it runs.
    device: str = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
    offline: bool | None = None,
    progress: bool = False,
    # What it tells.
    on_start: Callable[[RunStart], object] | None = None,
    on_step: Callable[[StepReport], object] | None = None,
    on_log: Callable[[StepReport], object] | None = None,
    on_evaluation: Callable[[EvaluationReport], object] | None = None,
    on_sample: Callable[[SampleReport], object] | None = None,
    on_checkpoint: Callable[[str], object] | None = None,
    stop: Callable[[], object] | None = None,
) -> TrainResult:
    """A whole training run, as ``krait train`` makes it: AdamW (Loshchilov and Hutter 2019) on
    next-token prediction, in f32 or with bf16 matrices over f32 master weights.

    Settings are keywords; those left out have their defaults, or what the file (JSON or TOML) or
    mapping ``settings`` says. ``docs/training.md`` describes each, and what a run leaves in
    ``out``: ``model.safetensors``, ``config.json`` and ``tokenizer.json``, beside
    ``settings.json``, ``metrics.jsonl``, ``samples.jsonl`` and ``checkpoints/step-N``.

    Args:
        settings: a settings file, or a mapping of settings, which keywords go before.
        resume: go on from the newest checkpoint in ``out``, with the settings that the run was
            started with, bit for bit; begin where there is none.
        model: a checkpoint to train on: directory, or name on the hub.
        config: or a ``config.json``, for a model with fresh weights.
        tokenizer: with ``config``: a ``tokenizer.json``, a directory that holds one, or
            "gpt-neox"; not needed for token ids.
        data: what to train on: text, JSONL with "text", packed tokens (:func:`pack_tokens`), or
            ``.npy`` of token ids.
        val: what to evaluate on, likewise.
        out: the run's directory, new or empty unless ``resume``.
        steps: of the whole run; with neither steps nor ``epochs`` one epoch.
        batch_size: sequences of a batch (8). ``seq_len``: tokens of each (512). ``accumulate``:
            batches whose gradients make one step.
        ignore_boundaries: states pass from one document to the next. ``carry_state``: from one
            batch to the next (truncated back-propagation).
        dtype: of matrices in forward and backward. ``recompute``: "block" keeps only the input of
            each block. ``dropout``: on the embedding and on what each block adds.
        seed: of fresh weights, order of the data, dropout and samples.
        lr, schedule, warmup, decay, min_lr: the learning rate over the steps.
        weight_decay, no_decay, betas, eps, clip: of AdamW; ``no_decay`` are regular expressions
            for the names of parameters without decay, ``clip`` the largest norm of all gradients.
        ema: decay of a moving average of the weights; 0: none.
        save_every, keep, eval_every, patience, sample_every, sample_prompt, sample_tokens,
            log_every: every so many steps (0: never), and how much of it.
        export: which weights are left as the model.
        device: "cpu", "cuda", "cuda:N" or "auto". ``threads``: on a CPU; 0: all processors.
        cache_dir, offline, progress: of a model that is downloaded; see
            :meth:`krait.LanguageModel.from_pretrained`.
        on_start, on_step, on_evaluation, on_sample, on_checkpoint: called as things happen, on the
            calling thread. ``on_log`` is told those steps that are written to ``metrics.jsonl``.
        stop: asked between steps; true ends the run with a checkpoint.

    Ctrl-C ends the run with a checkpoint and then raises KeyboardInterrupt, and so does an
    exception in a callback, which is raised then.

    Raises:
        ValueError: settings, data, model or directory are not what they should be (nothing is
            overwritten), or training diverges: the last checkpoint is intact then.
        FileNotFoundError, OSError: files that are not there, a full disk.
        MemoryError: a step does not fit into memory.
    """
    arguments = dict(locals())
    names = [str(row[0]) for row in library().train_settings_table()]
    given: dict[str, Any] = {}
    file: str | None = None
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            name = str(key).replace("-", "_")
            if name not in names:
                raise ValueError(f"unknown setting {key!r}, expected one of {', '.join(names)}")
            given[name] = value
    elif settings is not None:
        file = _arguments.path("settings", settings)
    given.update({name: arguments[name] for name in names if arguments[name] is not None})
    given = {name: _as_json(name, value) for name, value in given.items() if value is not None}

    def on_message(level: str, text: str) -> None:
        if level == "warning":
            warnings.warn(text, RuntimeWarning, stacklevel=5)
        else:
            _logger.log(logging.INFO if level == "info" else logging.DEBUG, "%s", text)

    def as_report(kind: Callable[..., Any], callback: Callable[[Any], object] | None) -> Any:
        return None if callback is None else lambda *values: callback(kind(*values))

    with Interruptible() as work:
        end, done, best_step, best_loss, seconds = library().train(
            json.dumps(given),
            list(given),
            file,
            bool(resume),
            _arguments.text("device", device),
            _arguments.integer("threads", threads),
            _arguments.optional_path("cache_dir", cache_dir),
            None if offline is None else bool(offline),
            bool(progress),
            work.guard(as_report(RunStart, on_start)),
            work.guard(as_report(StepReport, on_step)),
            work.guard(as_report(StepReport, on_log)),
            work.guard(as_report(EvaluationReport, on_evaluation)),
            work.guard(as_report(SampleReport, on_sample)),
            work.guard(as_report(str, on_checkpoint)),
            work.guard(on_message),
            work.guard_question(stop),
            work.stop,
        )
    found = int(best_step) >= 0
    return TrainResult(
        end=str(end),  # type: ignore[arg-type]
        steps=int(done),
        best_step=int(best_step) if found else None,
        best_loss=float(best_loss) if found else None,
        seconds=float(seconds),
    )


def run_settings(directory: Path) -> dict[str, Any] | None:
    """The settings that the run in a directory was started with; None where there is no run."""
    text = library().train_settings_of_run(_arguments.path("directory", directory))
    if text is None:
        return None
    settings: dict[str, Any] = json.loads(str(text))
    return settings


def pack_tokens(
    texts: Path | Iterable[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    end_of_text: int | None = None,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> PackResult:
    """Encodes text files and JSONL files into one packed file of token ids, which training maps
    and reads in place. It appears complete or not at all.

    ``end_of_text`` is the id behind each document; None: the tokenizer's. ``progress(done, total)``
    is told bytes of text. Ctrl-C ends it with KeyboardInterrupt.

    Raises FileNotFoundError, OSError, and ValueError naming the file and line.
    """
    paths = [texts] if isinstance(texts, (str, os.PathLike)) else list(texts)
    with Interruptible() as work:
        tokens, documents, size = library().pack_tokens(
            [_arguments.path("texts", path) for path in paths],
            _arguments.instance("tokenizer", tokenizer, Tokenizer)._handle,
            _arguments.path("out", out),
            -1 if end_of_text is None else _arguments.integer("end_of_text", end_of_text),
            _arguments.integer("threads", threads),
            work.guard(progress),
            work.stop,
        )
    return PackResult(int(tokens), int(documents), int(size))
