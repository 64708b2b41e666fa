"""Language models: Mamba (Gu and Dao 2023), Mamba-2 (Dao and Gu 2024), their hybrids with
attention, Transformer++ and GPT-NeoX (Pythia), from published checkpoints as they are.

>>> model = LanguageModel.from_pretrained()  # the bundled one, which has read Shakespeare
>>> print(model.generate("ROMEO:", max_new_tokens=40, seed=1).text)
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
import numpy.typing as npt

from krait import _arguments
from krait._ids import Ids, as_ids, as_rows, is_row, pack
from krait._library import library
from krait.generation import Generation, TextStream, as_generations
from krait.state import State
from krait.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LanguageModel", "ModelDescription", "Score"]

Path = str | os.PathLike[str]
StateDType = Literal["f32", "bf16", "f16"]
_logger = logging.getLogger("krait")


@dataclass(frozen=True)
class Score:
    """How well a model predicts given tokens."""

    loss: float
    """Mean cross-entropy in nats over the predictions, over all rows of the head."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Of a text: loss / ln 2 x tokens of the text / its UTF-8 bytes. None of ids."""
    tokens: int
    """Predictions."""


@dataclass(frozen=True)
class ModelDescription:
    """What a model consists of."""

    architecture: str
    """Such as "24 x Mamba1" or "58 x Mamba2, 6 x MHA"."""
    n_layer: int
    parameters: int
    parameters_by_part: dict[str, int]
    """Of embedding, mixers, mlps, norms and head."""
    bytes_by_dtype: dict[str, int]
    weight_bytes: int
    state_bytes_per_sequence: int
    """Fixed: convolution windows and SSM states."""
    state_bytes_per_token: int
    """Keys and values of attention layers."""


class _GenerateOptions(TypedDict, total=False):
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    state_dtype: StateDType


class LanguageModel:
    """Embedding, backbone and head, with the device that they are on.

    Any thread may use a model; calls from several come one after the other, each with all the
    model's threads of computation. The GIL is released in all of them. A process that was forked
    from the one that loaded a model cannot use it (ValueError): load it there, or start processes
    by the method "spawn".
    """

    __slots__ = ("__weakref__", "_handle", "_tokenizer")

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: Path | None = None,
        *,
        device: str = "auto",
        dtype: StateDType | None = None,
        revision: str | None = None,
        cache_dir: Path | None = None,
        offline: bool | None = None,
        threads: int = 0,
        progress: bool = False,
    ) -> LanguageModel:
        """Loads a checkpoint: upstream's (``config.json`` with ``pytorch_model.bin`` or
        safetensors) or Hugging Face's ``mamba``, ``mamba2``, ``falcon_mamba`` and ``gpt_neox``,
        sharded or not.

        ``name_or_dir``  a directory, a weight file with a config beside it, a name on the Hugging
            Face hub ("state-spaces/mamba-130m", downloaded once into the cache that
            ``huggingface_hub`` shares); None: the small model inside this package.
        ``device``  "cpu", "cuda", "cuda:N", or "auto": a GPU where the build and the machine have
            one.
        ``dtype``  of the matrices; None keeps the file's, which are then used where they are
            mapped.
        ``revision``  a branch, tag or commit of the hub; directories have none.
        ``cache_dir``  in place of what HF_HUB_CACHE or HF_HOME say.
        ``offline``  True: never touch the network. None: what HF_HUB_OFFLINE says.
        ``threads``  of computation on a CPU; 0: one for each processor that the process may use, or
            what KRAIT_NUM_THREADS or OMP_NUM_THREADS say.
        ``progress``  shows downloads as a bar on stderr.

        Raises FileNotFoundError, ConnectionError, OSError, MemoryError, and ValueError where config
        or weights are not what they should be; the message names file and tensor.
        """
        model = cls(
            library().model_load(
                _arguments.optional_path("name_or_dir", name_or_dir),
                _arguments.text("device", device),
                _arguments.optional_text("dtype", dtype),
                _arguments.optional_text("revision", revision),
                _arguments.optional_path("cache_dir", cache_dir),
                None if offline is None else bool(offline),
                bool(progress),
                _arguments.integer("threads", threads),
            )
        )
        model._pass_on_messages()
        return model

    @classmethod
    def from_config(
        cls,
        config: Path | Mapping[str, Any],
        *,
        seed: int = 0,
        device: str = "auto",
        dtype: StateDType | None = None,
        threads: int = 0,
    ) -> LanguageModel:
        """A model with fresh weights, drawn as the field initialises them. ``config`` is the
        content of a ``config.json``, upstream's or Hugging Face's, or the path of one. The same
        seed gives the same weights."""
        if isinstance(config, Mapping):
            name, text = "config", json.dumps(dict(config), default=_as_json)
        else:
            name = _arguments.path("config", config)
            with open(name, encoding="utf-8") as file:
                text = file.read()
        model = cls(
            library().model_from_config(
                text,
                name,
                _arguments.unsigned("seed", seed),
                _arguments.optional_text("dtype", dtype),
                _arguments.text("device", device),
                _arguments.integer("threads", threads),
            )
        )
        model._pass_on_messages()
        return model

    # What it is.

    @property
    def name(self) -> str:
        """What messages call it: the directory, the name on the hub, or "bundled model"."""
        return str(library().model_name(self._handle))

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration as Krait writes it: upstream's fields (d_model, n_layer, ssm_cfg, ...),
        or Hugging Face's where upstream has no such architecture."""
        config: dict[str, Any] = json.loads(library().model_config(self._handle, "krait"))
        return config

    @property
    def format(self) -> str:
        """Where the checkpoint came from: "mamba_ssm" (upstream), "mamba", "mamba2",
        "falcon_mamba", "gpt_neox"."""
        return str(library().model_format(self._handle))

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(library().model_vocab_size(self._handle))

    @property
    def padded_vocab_size(self) -> int:
        """V: the rows of the head, of which those from ``vocab_size`` on are padding."""
        return int(library().model_padded_vocab_size(self._handle))

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a generation."""
        return list(library().model_eos_token_ids(self._handle))

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:N"."""
        return str(library().model_device(self._handle))

    @property
    def tokenizer(self) -> Tokenizer:
        """The ``tokenizer.json`` beside the weights, else GPT-NeoX's where the vocabulary is that
        of upstream's checkpoints. Raises FileNotFoundError where the checkpoint has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(library().model_tokenizer(self._handle))
        return self._tokenizer

    def describe(self) -> ModelDescription:
        """Counts of parameters, and bytes of weights and states."""
        architecture, n_layer, parameters, parts, dtypes, weights, fixed, per_token = (
            library().model_describe(self._handle)
        )
        return ModelDescription(
            architecture=str(architecture),
            n_layer=int(n_layer),
            parameters=int(parameters),
            parameters_by_part={str(name): int(count) for name, count in parts},
            bytes_by_dtype={str(name): int(count) for name, count in dtypes},
            weight_bytes=int(weights),
            state_bytes_per_sequence=int(fixed),
            state_bytes_per_token=int(per_token),
        )

    def parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of all weights in f32, by their names in checkpoints."""
        weights: dict[str, npt.NDArray[np.float32]] = {}
        for name, shape, _ in library().model_parameters(self._handle):
            weight = np.empty(tuple(shape), np.float32)
            library().model_read_parameter(self._handle, name, weight)
            weights[str(name)] = weight
        return weights

    def save_pretrained(
        self,
        directory: Path,
        *,
        format: Literal["krait", "upstream", "hf"] = "krait",
        dtype: StateDType | None = None,
    ) -> None:
        """Writes a checkpoint's directory: config, weights and the tokenizer.

        ``format``  "krait": upstream's config and names in ``model.safetensors`` (Hugging Face's
            for architectures that upstream has not). "upstream": for mamba_ssm,
            ``pytorch_model.bin``. "hf": for transformers.
        ``dtype``  of the matrices; None: as they are. The rest is f32.

        Raises ValueError where the format cannot express the model, and where weights of another
        format are there already; OSError where it cannot be written.
        """
        library().model_save(
            self._handle,
            _arguments.path("directory", directory),
            _arguments.text("format", format),
            _arguments.optional_text("dtype", dtype),
        )

    # What it does.

    @overload
    def generate(
        self,
        prompts: str | list[int],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[_GenerateOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[_GenerateOptions],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: str | list[int],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Unpack[_GenerateOptions],
    ) -> TextStream[str]: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Unpack[_GenerateOptions],
    ) -> TextStream[tuple[int, str]]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Any] | npt.NDArray[np.integer[Any]],
        max_new_tokens: int = ...,
        *,
        stream: bool = ...,
        **options: Unpack[_GenerateOptions],
    ) -> Any: ...

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        state_dtype: StateDType = "f32",
        stream: bool = False,
    ) -> Any:
        """Continues one prompt or several, as one batch of sequences of any lengths.

        ``prompts``  a text, a list of texts, token ids (n), or several rows of them. Texts are
            encoded with what the tokenizer's template adds.
        ``max_new_tokens``  of each sequence.
        ``temperature``  0: the most probable token each time.
        ``top_k``  draw from so many most probable tokens; 0 is off, 1 is greedy.
        ``top_p``  draw from the most probable tokens that together reach this probability
            (Holtzman et al. 2020); 0 and 1 are off.
        ``min_p``  draw from tokens at least this probable beside the most probable one; off with
            ``top_k``.
        ``repetition_penalty``  above 1: tokens that were there become less probable (Keskar et al.
            2019).
        ``seed``  sequence i draws from stream i of it; None: one of the system's, which the result
            tells.
        ``stop``  texts that end a sequence, and are no part of its text.
        ``ignore_eos``  go on after the model's end of text.
        ``state_dtype``  what SSM states are kept as between steps: "f32", or "bf16" or "f16", which
            halve what a large batch reads and writes.
        ``stream``  return an iterator of pieces of text as they are made, in complete characters:
            of one prompt ``str``, of several ``(index, str)``. Closing it ends the generation.

        Returns a :class:`Generation` for one prompt and a list of them for several. Ctrl-C raises
        KeyboardInterrupt within the time of one step.

        Raises ValueError for an option out of range, an empty prompt, or an id outside of the
        vocabulary; FileNotFoundError where a text is given, or asked for, and the model has no
        tokenizer.
        """
        single, rows = self._prompts(prompts)
        flat, offsets = pack(rows)
        drawn = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        arguments = (
            self._handle,
            flat,
            offsets,
            _arguments.integer("max_new_tokens", max_new_tokens),
            _arguments.number("temperature", temperature),
            _arguments.integer("top_k", top_k),
            _arguments.probability("top_p", top_p),
            _arguments.probability("min_p", min_p),
            _arguments.number("repetition_penalty", repetition_penalty),
            _arguments.unsigned("seed", drawn),
            _arguments.texts("stop", stop),
            bool(ignore_eos),
            _arguments.text("state_dtype", state_dtype),
        )
        if stream:
            return TextStream[Any](
                library().stream_begin(*arguments), single, drawn, self._pass_on_messages
            )
        generations = as_generations(self._call(library().generate, *arguments), drawn)
        return generations[0] if single else generations

    def logits(
        self, ids: Any, *, state: State | Sequence[State] | None = None, last: bool = False
    ) -> npt.NDArray[np.float32]:
        """What the model says of given tokens, before any softmax.

        ``ids``  a text, token ids (L), or rows of them (n, L). With ``last`` rows may differ in
            length.
        ``state``  where the rows go on from, and what they advance: one state, or one for each row.
            None: each row from an empty state. (After an interruption states are where they had
            come to: fork them before, where that matters.)
        ``last``  only the logits after the last token of each row.

        Returns f32 on the CPU: (L, V), or (n, L, V) of rows; with ``last`` (V), or (n, V). V is
        ``padded_vocab_size``.

        Raises ValueError, with the states unchanged, for an empty row, an id outside of the
        vocabulary, and a state of another model.
        """
        single, rows = self._prompts(ids)
        if not rows:
            raise ValueError("ids have no rows, expected at least one token")
        states = None if state is None else _as_states(state)
        lengths = {len(row) for row in rows}
        if not last and len(lengths) > 1:
            raise ValueError(
                f"ids have rows of {min(lengths)} to {max(lengths)} tokens, expected equal lengths "
                "(or last=True)"
            )
        flat, offsets = pack(rows)
        count = len(rows) if last else len(flat)
        out = np.empty((count, self.padded_vocab_size), np.float32)
        handles = None if states is None else _handles(states)
        self._call(library().model_logits, self._handle, flat, offsets, handles, last, out)
        if single:
            return out[0] if last else out
        return out if last else out.reshape(len(rows), lengths.pop(), -1)

    def step(self, ids: Ids | int, states: State | Sequence[State]) -> npt.NDArray[np.float32]:
        """Decoding by hand: token ``ids[i]`` on top of ``states[i]``, which it advances.

        Returns the logits after each, (n, V) f32; for one id and one state (V). On a GPU a step is
        one launch of a recorded graph from the third of a batch size on.

        Raises as :meth:`logits` does.
        """
        single = isinstance(states, State)
        held = _as_states(states)
        tokens = as_ids(ids).reshape(-1)
        out = np.empty((len(tokens), self.padded_vocab_size), np.float32)
        self._call(library().model_step, self._handle, tokens, _handles(held), out)
        return out[0] if single else out

    def score(self, text_or_ids: Any, *, block: int = 0) -> Score:
        """How well the model predicts a text, or given token ids.

        A text is tokenised as a whole and read as one stream, its state carried on. ``block`` > 0
        cuts it into blocks of so many tokens (at least 2), each from an empty state; a last partial
        block is dropped. Ids (n, L) or (L), L >= 2, are read row by row, each from an empty state.

        Raises ValueError where there are fewer than two tokens.
        """
        if isinstance(text_or_ids, str):
            values = self._call(
                library().model_score_text,
                self._handle,
                _arguments.text("text", text_or_ids),
                _arguments.integer("block", block),
            )
        else:
            if block != 0:
                raise ValueError(f"block is {block} with token ids, expected a text")
            ids = as_ids(text_or_ids)
            rows = ids.reshape(1, -1) if ids.ndim == 1 else ids
            values = self._call(library().model_score_ids, self._handle, rows)
        loss, perplexity, bits, tokens = values
        per_byte = None if bits is None else float(bits)
        return Score(float(loss), float(perplexity), per_byte, int(tokens))

    # States.

    def new_state(self, dtype: StateDType = "f32") -> State:
        """The state of an empty sequence. ``dtype`` is what SSM states are kept as between
        steps."""
        return self.new_states(1, dtype)[0]

    def new_states(self, count: int, dtype: StateDType = "f32") -> list[State]:
        """Several at once. All states of a model and dtype may run as one batch."""
        handles = library().state_new(
            self._handle, _arguments.integer("count", count), _arguments.text("dtype", dtype)
        )
        return [State(self, handle) for handle in handles]

    def load_state(self, image: bytes, dtype: StateDType = "f32") -> State:
        """A state from what :meth:`State.to_bytes` made, of this model or one of its shape. Raises
        ValueError where the image is damaged or belongs to another model."""
        if not isinstance(image, (bytes, bytearray, memoryview)):
            raise TypeError(f"image is {type(image).__name__}, expected bytes")
        state = self.new_state(dtype)
        library().state_load(state._handle, bytes(image))
        return state

    def _prompts(self, prompts: Any) -> tuple[bool, list[npt.NDArray[np.int64]]]:
        """Whether there is one, and the ids of each."""
        if isinstance(prompts, str):
            return True, [self._encode(prompts)]
        if isinstance(prompts, bytes) or not (
            isinstance(prompts, Sequence) or hasattr(prompts, "ndim")
        ):
            raise TypeError(
                f"prompts are {type(prompts).__name__}, expected a text, token ids, or a list of "
                "either"
            )
        if not isinstance(prompts, np.ndarray) and len(prompts) > 0 and isinstance(prompts[0], str):
            for index, text in enumerate(prompts):
                if not isinstance(text, str):
                    found = type(text).__name__
                    raise TypeError(f"prompt {index} is {found}, expected str as the first")
            return False, [self._encode(text) for text in prompts]
        if is_row(prompts):
            row = as_ids(prompts)
            # An empty list is no prompt at all.
            return (False, []) if isinstance(prompts, Sequence) and not prompts else (True, [row])
        return False, as_rows(prompts)

    def _encode(self, text: str) -> npt.NDArray[np.int64]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=True), np.int64)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        finally:
            self._pass_on_messages(4)

    def _pass_on_messages(self, level: int = 3) -> None:
        """Warnings of the library as Python's, the rest to the logger "krait"."""
        messages = library().model_take_messages(self._handle)
        for kind, text in zip(messages[0::2], messages[1::2], strict=True):
            if kind == "warning":
                warnings.warn(str(text), RuntimeWarning, stacklevel=level)
            else:
                _logger.log(logging.INFO if kind == "info" else logging.DEBUG, "%s", text)

    def __reduce__(self) -> str:
        raise TypeError("a model cannot be pickled: load it in the other process")

    def __repr__(self) -> str:
        architecture = self.describe().architecture
        return f"LanguageModel({self.name!r}, {architecture}, device={self.device!r})"


def _as_json(value: Any) -> Any:
    """What json cannot write by itself: scalars of NumPy."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"config has {value!r}, expected numbers, str, lists and mappings")


def _as_states(states: State | Sequence[State]) -> list[State]:
    if isinstance(states, State):
        return [states]
    if not isinstance(states, Iterable):
        found = "None" if states is None else f"a {type(states).__name__}"
        raise TypeError(f"state is {found}, expected a State, or one for each row")
    return list(states)


def _handles(states: Sequence[State]) -> list[Any]:
    return [_arguments.instance(f"state {i}", s, State)._handle for i, s in enumerate(states)]
