"""What :meth:`krait.LanguageModel.generate` returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from krait._library import library

__all__ = ["Generation", "TextStream", "Timing", "as_generations"]

Piece = TypeVar("Piece", covariant=True)


@dataclass(frozen=True)
class Timing:
    """How long a batch took."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Until the first token of each sequence was known."""
    decode_seconds: float
    """All tokens after it."""


@dataclass(frozen=True)
class Generation:
    """One sequence: a prompt and its continuation."""

    text: str
    """Of the continuation; empty where the model has no tokenizer."""
    ids: list[int] = field(repr=False)
    """Prompt and continuation; an end-of-text id that ended it included."""
    prompt_length: int
    logprobs: npt.NDArray[np.float32] = field(repr=False, compare=False)
    """Of each new token, in nats, under the model's own distribution: (new tokens)."""
    finish_reason: str
    """ "length", "eos", "stop" or "interrupted"."""
    seed: int
    """What the draws came from."""
    timing: Timing = field(repr=False, compare=False)
    """Of the whole batch."""

    @property
    def new_ids(self) -> list[int]:
        """The continuation."""
        return self.ids[self.prompt_length :]


def as_generations(result: Any, seed: int) -> list[Generation]:
    """From what the library returns."""
    sequences, prompt_tokens, new_tokens, prefill, decode = result
    timing = Timing(int(prompt_tokens), int(new_tokens), float(prefill), float(decode))
    return [
        Generation(
            text=str(text),
            ids=list(ids),
            prompt_length=int(prompt_length),
            logprobs=np.frombuffer(bytes(logprobs), np.float32),
            finish_reason=str(finish),
            seed=seed,
            timing=timing,
        )
        for ids, prompt_length, logprobs, text, finish in sequences
    ]


class TextStream(Generic[Piece]):
    """Pieces of text while they are made, by a thread that runs ahead of whoever reads them.

    An iterator: of one prompt over ``str``, of several over ``(index, str)``. Closing it, leaving
    its ``with`` block, and dropping it end the generation within the time of one step. So does
    Ctrl-C, which raises KeyboardInterrupt from it. What was made up to then is in
    :attr:`generations`.

    >>> for piece in model.generate("ROMEO:", stream=True):
    ...     print(piece, end="", flush=True)
    """

    _WAIT = 0.05  # seconds between looks at signals

    def __init__(
        self, handle: Any, single: bool, seed: int, pass_on_messages: Callable[[], None]
    ) -> None:
        self._handle = handle
        self._single = single
        self._seed = seed
        self._pass_on_messages = pass_on_messages
        self._ended = False
        # Also at the end of the process, which no thread of the library's may outlive.
        self._close = weakref.finalize(self, library().stream_close, handle)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            while not self._ended:
                index, text = library().stream_next(self._handle, self._WAIT)
                if index >= 0:
                    piece: Any = str(text) if self._single else (int(index), str(text))
                    return piece  # type: ignore[no-any-return]
                self._ended = index == -2
        except BaseException:
            self.close()
            raise
        self.close()
        library().stream_result(self._handle)  # raises what ended it
        raise StopIteration

    def close(self) -> None:
        """Ends the generation where it is. Pieces that were not read are dropped."""
        self._ended = True
        if self._close.alive:
            self._close()
            self._pass_on_messages()

    def __enter__(self) -> TextStream[Piece]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def generations(self) -> list[Generation]:
        """What was made, one for each prompt, once the stream has ended or was closed (before:
        ValueError). Sequences that were ended by closing have the finish reason "interrupted"."""
        return as_generations(library().stream_result(self._handle), self._seed)

    @property
    def generation(self) -> Generation:
        """The same of one prompt."""
        if not self._single:
            raise ValueError("the stream is of several prompts, expected generations instead")
        return self.generations[0]
