"""Collectives and sharded layers on two processes of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from mamba_ssm.distributed.distributed_utils import get_dim_for_local_rank
from mamba_ssm.distributed.tensor_parallel import (
    ColumnParallelEmbedding,
    ParallelEmbeddings,
    VocabParallelEmbedding,
)


def test_share_of_a_rank() -> None:
    assert [get_dim_for_local_rank(10, 4, r) for r in range(4)] == [3, 3, 2, 2]
    assert [get_dim_for_local_rank(80, 3, r, multiple_of=16) for r in range(3)] == [32, 32, 16]


def test_without_a_group_embeddings_are_whole() -> None:
    ids = torch.tensor([[0, 4]])
    words = VocabParallelEmbedding(5, 3, padding_idx=0)
    assert torch.equal(words(ids)[0, 1], words.weight[4]) and not words(ids)[0, 0].any()
    assert ColumnParallelEmbedding(5, 3)(ids).shape == (1, 2, 3)
    made = ParallelEmbeddings(3, 5, 2, None)
    expected = made.word_embeddings.weight[ids] + made.position_embeddings.weight
    assert torch.equal(made(ids), expected)


def test_two_processes(tmp_path: Path) -> None:
    program = Path(__file__).with_name("distributed_layers.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n\n".join(outputs)
