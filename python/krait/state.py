"""What a model remembers of a sequence between prefill and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from krait import _arguments
from krait._library import library

if TYPE_CHECKING:
    from krait.model import LanguageModel, StateDType

__all__ = ["State"]


class State:
    """Convolution windows, SSM states, keys and values of attention layers, and the position.

    Made by :meth:`krait.LanguageModel.new_state`. It is advanced by ``model.logits(ids,
    state=state)`` and ``state.step(id)``; a fork goes on by itself.

    >>> state = model.new_state()
    >>> logits = model.logits("ROMEO:", state=state, last=True)
    >>> other = state.fork()
    >>> logits = state.step(int(logits.argmax()))
    """

    __slots__ = ("_handle", "_model")

    def __init__(self, model: LanguageModel, handle: Any) -> None:
        self._model = model
        self._handle = handle

    @property
    def model(self) -> LanguageModel:
        """The model that it belongs to."""
        return self._model

    @property
    def position(self) -> int:
        """Tokens that it has seen."""
        return int(library().state_position(self._handle))

    @property
    def dtype(self) -> str:
        """What SSM states are kept as: "f32", "bf16" or "f16"."""
        return str(library().state_dtype(self._handle))

    @property
    def nbytes(self) -> int:
        """Bytes in use by this sequence."""
        return int(library().state_nbytes(self._handle))

    def step(self, id: int) -> npt.NDArray[np.float32]:
        """Takes one token; returns the logits after it, (V) f32."""
        return self._model.step(id, self)

    def fork(self) -> State:
        """A second sequence that goes on from here."""
        return State(self._model, library().state_fork(self._handle))

    def rollback(self, earlier: State) -> None:
        """Back to where ``earlier`` is, a fork of this or of another state of the model. Raises
        ValueError for a state of another model or dtype."""
        library().state_rollback(
            self._handle, _arguments.instance("earlier", earlier, State)._handle
        )

    def reset(self) -> None:
        """Back to the empty sequence."""
        library().state_reset(self._handle)

    def to_bytes(self) -> bytes:
        """A versioned image with a checksum, for :meth:`from_bytes`."""
        return bytes(library().state_save(self._handle))

    @staticmethod
    def from_bytes(model: LanguageModel, image: bytes, dtype: StateDType = "f32") -> State:
        """The state of an image, on ``model``, which may have been loaded since. ``dtype`` is what
        SSM states are kept as from now on, whatever they were before. Raises ValueError where the
        image is damaged, or belongs to a model of another shape."""
        return model.load_state(image, dtype)

    def __reduce__(self) -> str:
        raise TypeError("a state cannot be pickled without its model: to_bytes() makes an image")

    def __repr__(self) -> str:
        return f"State(position={self.position}, dtype={self.dtype!r})"
