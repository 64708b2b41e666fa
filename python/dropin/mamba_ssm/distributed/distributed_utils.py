"""Collectives with gradients, by upstream's interface."""

from krait.torch.distributed import (  # noqa: F401
    AllGatherFunc,
    AllReduceFunc,
    ReduceScatterFunc,
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    allreduce_sequence_parallel_grad,
    get_dim_for_local_rank,
    reduce_scatter,
    reduce_scatter_raw,
    sync_shared_params,
)
