"""Text to token ids and back.

The rules are those of a Hugging Face ``tokenizer.json``: byte-level and byte-fallback BPE
(Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units", ACL
2016), with the ids and the text that ``tokenizers`` gives.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from krait import _arguments
from krait._ids import Ids, as_ids
from krait._interrupt import Interruptible
from krait._library import library

__all__ = ["StreamDecoder", "Tokenizer"]


class Tokenizer:
    """A loaded ``tokenizer.json``. Immutable; any number of threads may use it.

    >>> tokenizer = Tokenizer.from_pretrained("gpt-neox")
    >>> tokenizer.decode(tokenizer.encode("Mamba is"))
    'Mamba is'
    """

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        progress: bool = False,
    ) -> Tokenizer:
        """The tokenizer of a checkpoint.

        ``name_or_dir`` is a directory (with ``tokenizer.json``, or a checkpoint with GPT-NeoX's
        vocabulary, which needs none), a file, a name on the hub ("org/name"), "gpt-neox" for the
        bundled one of EleutherAI/gpt-neox-20b, or None for that of the bundled model. The other
        arguments are those of :meth:`krait.LanguageModel.from_pretrained`; weights are not
        downloaded.

        Raises FileNotFoundError, ConnectionError, OSError, and ValueError for a file that is no
        tokenizer that is understood.
        """
        return cls(
            library().tokenizer_load(
                _arguments.optional_path("name_or_dir", name_or_dir),
                _arguments.optional_text("revision", revision),
                _arguments.optional_path("cache_dir", cache_dir),
                None if offline is None else bool(offline),
                bool(progress),
            )
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """That of a ``tokenizer.json``. Raises FileNotFoundError, OSError or ValueError."""
        return cls(library().tokenizer_from_file(_arguments.path("path", path)))

    @classmethod
    def from_json(cls, json: str) -> Tokenizer:
        """The same from the content of such a file."""
        return cls(library().tokenizer_from_json(_arguments.text("json", json), "tokenizer.json"))

    @classmethod
    def train(
        cls,
        files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = ("<|endoftext|>",),
        min_frequency: int = 1,
        threads: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Tokenizer:
        """Learns a byte-level BPE vocabulary from text files and JSONL files (".jsonl", a "text" in
        each line).

        The most frequent pair is merged first, of equally frequent ones that with the smaller ids,
        as Hugging Face's ``BpeTrainer`` does behind its ``ByteLevel`` pre-tokenizer. The result
        depends on neither threads nor the order of files.

        ``vocab_size`` counts the special tokens, which get the ids from 0 on (the first is what
        Krait's models end a text with), and the 256 bytes. Pairs that occur less often than
        ``min_frequency`` are not merged. ``progress(done, total)`` is told bytes of text that are
        counted. Ctrl-C ends it with KeyboardInterrupt.

        Raises FileNotFoundError, OSError, and ValueError for texts that are all empty or a
        ``vocab_size`` below 256 and the special tokens. Warns where the text has fewer pairs than
        asked for.
        """
        paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        messages: list[str] = []
        with Interruptible() as work:
            handle = library().tokenizer_train(
                [_arguments.path("files", path) for path in paths],
                _arguments.integer("vocab_size", vocab_size),
                _arguments.texts("special_tokens", special_tokens),
                _arguments.integer("min_frequency", min_frequency),
                _arguments.integer("threads", threads),
                work.guard(progress),
                work.stop,
                work.guard(messages.append),
            )
        for message in messages:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return cls(handle)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of ``text``. Special tokens that are spelled out in it become their ids.

        ``add_special_tokens`` adds what the file's template adds, such as "<s>" in front; prompts
        of :meth:`krait.LanguageModel.generate` are encoded with it.
        """
        text = _arguments.text("text", text)
        return list(library().tokenizer_encode(self._handle, text, bool(add_special_tokens)))

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        """The ids of each text, on all threads."""
        if isinstance(texts, str):
            raise TypeError("texts are one str, expected a sequence of them (encode takes one)")
        rows = library().tokenizer_encode_batch(
            self._handle, _arguments.texts("texts", texts), bool(add_special_tokens)
        )
        return [list(row) for row in rows]

    def decode(self, ids: Ids, skip_special_tokens: bool = False) -> str:
        """The text of ``ids`` (n). Bytes that do not form a character become U+FFFD. Raises
        ValueError at an unknown id."""
        row = as_ids(ids)
        if row.ndim == 0:
            row = row.reshape(1)
        if row.ndim != 1:
            raise ValueError(f"ids have shape {row.shape}, expected one row (else decode_batch)")
        return str(library().tokenizer_decode(self._handle, row, skip_special_tokens))

    def decode_batch(self, rows: Iterable[Ids], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """Decodes id by id, for text that is shown while it is made."""
        return StreamDecoder(library().decoder_new(self._handle, skip_special_tokens))

    @property
    def vocab_size(self) -> int:
        """The largest id, added tokens included, plus one."""
        return int(library().tokenizer_vocab_size(self._handle))

    def __len__(self) -> int:
        return self.vocab_size

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the file spells it (byte-level: "\u0120the"); None for another."""
        found = int(library().tokenizer_token_to_id(self._handle, _arguments.text("token", token)))
        return None if found < 0 else found

    def id_to_token(self, id: int) -> str:
        """The token as the file spells it. Raises ValueError at an unknown id."""
        return str(library().tokenizer_id_to_token(self._handle, _arguments.integer("id", id)))

    def is_special(self, id: int) -> bool:
        """Whether ``id`` is a special token's, such as that of the end of a text."""
        return bool(library().tokenizer_is_special(self._handle, _arguments.integer("id", id)))

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens."""
        return list(library().tokenizer_special_ids(self._handle))

    @property
    def end_of_text(self) -> int | None:
        """The id that ends texts in training: "<|endoftext|>", "<|end_of_text|>", "</s>" or
        "<eos>", else 0 where that is a special token, else None."""
        found = int(library().tokenizer_end_of_text(self._handle))
        return None if found < 0 else found

    def to_json(self) -> str:
        """The content of its ``tokenizer.json``."""
        return str(library().tokenizer_json(self._handle))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json``: to ``path``, or into it where it is a directory."""
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.from_json, (self.to_json(),))

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"


class StreamDecoder:
    """Decodes id by id: pieces of complete characters, which together are the text of all ids."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def push(self, id: int) -> str:
        """The text that ``id`` completes, which may be empty. Raises ValueError at an unknown
        id."""
        return str(library().decoder_push(self._handle, _arguments.integer("id", id)))

    def finish(self) -> str:
        """The text still held back, with U+FFFD for an incomplete character. Ready for a new text
        then."""
        return str(library().decoder_finish(self._handle))
