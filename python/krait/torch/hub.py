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


def _find(name: Union[str, "os.PathLike[str]"], file: str) -> Optional[Path]:
    """`file` of the folder or hub repository `name`; None where it has no such file."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise ImportError(
            f"[from_pretrained] {str(name)!r} is no folder, and huggingface_hub, which would "
            "download it, is not installed"
        ) from None
    try:
        return Path(hf_hub_download(str(name), file))
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"[from_pretrained] {str(name)!r} is neither a folder nor a repository on the hub"
        ) from error


def load_config_hf(model_name: Union[str, "os.PathLike[str]"]) -> dict[str, Any]:
    """The config.json of a folder or hub repository.

    Raises:
        FileNotFoundError: where there is none.
    """
    path = _find(model_name, _CONFIG)
    if path is None:
        raise FileNotFoundError(f"[from_pretrained] {str(model_name)!r} has no {_CONFIG}")
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
    state: dict[str, Tensor] = {}
    for file in (_SAFETENSORS, _TORCH):
        path = _find(model_name, file)
        if path is not None:
            state = _load_file(path, device)
            break
        index = _find(model_name, file + ".index.json")
        if index is None:
            continue
        with open(index, encoding="utf-8") as opened:
            shards = sorted(set(json.load(opened)["weight_map"].values()))
        for shard in shards:
            path = _find(model_name, shard)
            if path is None:
                raise FileNotFoundError(
                    f"[from_pretrained] {str(model_name)!r} has no {shard}, which its index names"
                )
            state.update(_load_file(path, device))
        break
    else:
        raise FileNotFoundError(
            f"[from_pretrained] {str(model_name)!r} has neither {_SAFETENSORS} nor {_TORCH}"
        )
    if dtype is not None:
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    return state
