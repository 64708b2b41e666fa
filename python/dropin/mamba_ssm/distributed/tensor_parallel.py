"""Layers sharded over a process group, by upstream's interface."""

from krait.torch.distributed import (  # noqa: F401
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    ParallelEmbeddings,
    ParallelLinearFunc,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_linear_func,
)
