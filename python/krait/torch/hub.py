"""Checkpoints in folders and on the Hugging Face hub: config.json and weights, whole or sharded."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

__all__ = ["load_config_hf", "load_state_dict_hf"]

_CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"


class _Source:
    """A folder or hub repository."""

    def __init__(self, name: Union[str, "os.PathLike[str]"]) -> None:
        self.name = os.fsdecode(name)
        if not self.name:  # which would be the current folder
            raise ValueError(
                "[from_pretrained] the model's name is empty, expected a folder or ORG/NAME"
            )
        # Whether the hub was asked in vain for something that its cache has not.
        self._unreached = False

    def find(self, file: str) -> Optional[Path]:
        """`file` of it; None where it has no such file, or it is not known whether it has."""
        folder = Path(self.name)
        if folder.is_dir():
            return folder / file if (folder / file).is_file() else None
        return self._fetch(file)

    def missing(self, what: str) -> FileNotFoundError:
        where = f"[from_pretrained] {self.name!r} has {what}"
        if self._unreached:
            where += " in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE forbids it)"
        return FileNotFoundError(where)

    def _fetch(self, file: str) -> Optional[Path]:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import (
                EntryNotFoundError,
                HFValidationError,
                LocalEntryNotFoundError,
                RepositoryNotFoundError,
            )
        except ImportError:
            raise ImportError(
                f"[from_pretrained] {self.name!r} is no folder, and huggingface_hub, which would "
                "download it, is not installed"
            ) from None
        try:
            return Path(hf_hub_download(self.name, file))
        except LocalEntryNotFoundError:
            self._unreached = True
            return None
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(
                f"[from_pretrained] {self.name!r} is neither a folder nor a repository on the hub"
            ) from error


def load_config_hf(model_name: Union[str, "os.PathLike[str]"]) -> dict[str, Any]:
    """The config.json of a folder or hub repository.

    Raises:
        FileNotFoundError: where there is none.
    """
    source = _Source(model_name)
    path = source.find(_CONFIG)
    if path is None:
        raise source.missing(f"no {_CONFIG}")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _load_file(path: Path, device: Any) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                f"[from_pretrained] {path.name} needs the package safetensors, which is not "
                "installed"
            ) from None
        return load_file(path, device=str(device or "cpu"))
    # Files of torch before 1.6 are no zip archives and cannot be mapped.
    return torch.load(
        path, map_location=device or "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )


def load_state_dict_hf(
    model_name: Union[str, "os.PathLike[str]"],
    device: Any = None,
    dtype: Optional[torch.dtype] = None,
) -> dict[str, Tensor]:
    """The weights of a folder or hub repository: model.safetensors or pytorch_model.bin, or the
    shards that either's index names.

    Args:
        device: where they are loaded to; None: the CPU.
        dtype: what floating weights are converted to; None: as they are.

    Raises:
        FileNotFoundError: where there are none, or a shard is missing.
    """
    source = _Source(model_name)
    state: dict[str, Tensor] = {}
    for file in (_SAFETENSORS, _TORCH):
        path = source.find(file)
        if path is not None:
            state = _load_file(path, device)
            break
        index = source.find(file + ".index.json")
        if index is None:
            continue
        with open(index, encoding="utf-8") as opened:
            shards = sorted(set(json.load(opened)["weight_map"].values()))
        for shard in shards:
            path = source.find(shard)
            if path is None:
                raise source.missing(f"no {shard} (its index names it)")
            state.update(_load_file(path, device))
        break
    else:
        raise source.missing(f"neither {_SAFETENSORS} nor {_TORCH}")
    if dtype is not None:
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    return state
