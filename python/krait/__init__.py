"""Krait: Mamba without a deep-learning framework, on CPUs and GPUs.

    krait.ops             the operators, over NumPy arrays and everything that speaks DLPack
    krait.LanguageModel   models that generate and score
    krait.evaluate        tasks, and how well a model does on them
    krait.train           training runs
    krait.Tokenizer       byte-level BPE
    krait.torch           autograd functions and nn.Modules for PyTorch

``import krait`` loads neither the compiled library nor any framework: what is used is imported when
it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from ._library import build_info as build_info
    from ._library import get_num_threads as get_num_threads
    from ._library import release_memory as release_memory
    from ._library import set_num_threads as set_num_threads
    from .evaluation import Likelihood as Likelihood
    from .evaluation import TaskResult as TaskResult
    from .evaluation import evaluate as evaluate
    from .evaluation import likelihoods as likelihoods
    from .generation import Generation as Generation
    from .generation import TextStream as TextStream
    from .model import LanguageModel as LanguageModel
    from .model import Score as Score
    from .state import State as State
    from .tokenizer import Tokenizer as Tokenizer
    from .training import TrainResult as TrainResult
    from .training import pack_tokens as pack_tokens
    from .training import run_settings as run_settings
    from .training import train as train

__version__ = "0.1.0"

# Where each public name is defined.
_HOMES = {
    "build_info": "._library",
    "get_num_threads": "._library",
    "release_memory": "._library",
    "set_num_threads": "._library",
    "Likelihood": ".evaluation",
    "TaskResult": ".evaluation",
    "evaluate": ".evaluation",
    "likelihoods": ".evaluation",
    "Generation": ".generation",
    "TextStream": ".generation",
    "LanguageModel": ".model",
    "Score": ".model",
    "State": ".state",
    "Tokenizer": ".tokenizer",
    "TrainResult": ".training",
    "pack_tokens": ".training",
    "run_settings": ".training",
    "train": ".training",
}
_SUBMODULES = ("ops", "torch")

__all__ = ["__version__", *_HOMES, "ops"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
