"""Tensor and sequence parallelism over torch.distributed: collectives with gradients, sharded
layers.

The names and arguments are those of ``mamba_ssm.distributed``. With sequence parallelism tokens are
dimension 0 of an activation, split evenly over the process group (Korthikanti et al., 2022,
arXiv:2205.05198).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

__all__ = [
    "AllGatherFunc",
    "AllReduceFunc",
    "ColumnParallelEmbedding",
    "ColumnParallelLinear",
    "ParallelEmbeddings",
    "ParallelLinearFunc",
    "ReduceScatterFunc",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "parallel_linear_func",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]


def all_gather_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """input_ (n, ...) of all ranks along dimension 0: (world * n, ...), and a handle or None."""
    world_size = dist.get_world_size(process_group)
    output = input_.new_empty((world_size * input_.shape[0], *input_.shape[1:]))
    handle = dist.all_gather_into_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def reduce_scatter_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """input_ (world * n, ...) summed over ranks, a rank's rows (n, ...), and a handle or None."""
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size != 0:
        raise ValueError(
            f"[reduce_scatter] dimension 0 is {input_.shape[0]}, expected a multiple of the "
            f"{world_size} ranks"
        )
    output = input_.new_empty((input_.shape[0] // world_size, *input_.shape[1:]))
    handle = dist.reduce_scatter_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def all_reduce_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """Sums input_ over ranks, in place where it is contiguous: the sum, and a handle or None."""
    input_ = input_.contiguous()
    handle = dist.all_reduce(input_, group=process_group, async_op=async_op)
    return input_, handle


class AllGatherFunc(torch.autograd.Function):
    """``all_gather_raw``; the gradient is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """``reduce_scatter_raw``; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """The sum over ranks; each rank's input gets the gradient of its own copy of the result."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def sync_shared_params(model: nn.Module, process_group: ProcessGroup) -> None:
    """Gives every rank the first rank's values of the parameters marked ``_shared_params``."""
    source = dist.get_process_group_ranks(process_group)[0]
    for _, parameter in sorted(model.named_parameters()):
        if getattr(parameter, "_shared_params", False):
            with torch.no_grad():
                dist.broadcast(parameter, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: nn.Module, process_group: ProcessGroup) -> None:
    """Sums gradients of parameters marked ``_sequence_parallel``: each rank saw its own tokens."""
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for _, parameter in sorted(model.named_parameters()):
        if getattr(parameter, "_sequence_parallel", False) and parameter.grad is not None:
            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    with torch.no_grad():
        for group in gradients.values():
            # One message a dtype: these gradients are small and many.
            flat = torch.cat([gradient.reshape(-1) for gradient in group])
            dist.all_reduce(flat, group=process_group)
            pieces = torch.split(flat, [gradient.numel() for gradient in group])
            for gradient, piece in zip(group, pieces):
                gradient.copy_(piece.view_as(gradient))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """A rank's share of ``dim``, in multiples of ``multiple_of``; the first take what is left."""
    share, rest = divmod(dim // multiple_of, world_size)
    return (share + (1 if local_rank < rest else 0)) * multiple_of


def _autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


class ParallelLinearFunc(torch.autograd.Function):
    """x W^T + b with x gathered (sequence parallel) or copied (tensor parallel) over a process
    group.

    Gathered tokens are not kept: the backward pass gathers them again while it forms the gradient
    of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        process_group: Optional[ProcessGroup],
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        dtype = _autocast_dtype(x.device)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.process_group, ctx.sequence_parallel = process_group, sequence_parallel
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            if process_group is not None and sequence_parallel:
                x = all_gather_raw(x, process_group)[0]
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        group, sequence_parallel = ctx.process_group, ctx.sequence_parallel
        grad_x: Optional[Tensor] = None
        grad_weight: Optional[Tensor] = None
        grad_bias: Optional[Tensor] = None
        handle: Any = None
        with torch.autocast(grad_output.device.type, enabled=False):
            total_x = x
            if ctx.needs_input_grad[1] and group is not None and sequence_parallel:
                total_x, handle = all_gather_raw(x, group, async_op=True)
            if ctx.needs_input_grad[0]:
                grad_x = grad_output @ weight
            if handle is not None:
                handle.wait()
                handle = None
            if grad_x is not None and group is not None:
                reduce = reduce_scatter_raw if sequence_parallel else all_reduce_raw
                grad_x, handle = reduce(grad_x, group, async_op=True)
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            if ctx.needs_input_grad[1]:
                grad_weight = (flat.t() @ total_x.reshape(-1, total_x.shape[-1])).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(dim=0, dtype=torch.float32).to(bias_dtype)
            if handle is not None:
                handle.wait()
        if grad_x is not None:
            grad_x = grad_x.to(x_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def parallel_linear_func(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    process_group: Optional[ProcessGroup] = None,
    sequence_parallel: bool = True,
) -> Tensor:
    """x (n, ..., in) times weight (out, in): (n or world * n, ..., out).

    With sequence_parallel x is gathered over the group before, and its gradient summed and
    scattered; without, x is the same on all ranks and its gradient summed.
    """
    out: Tensor = ParallelLinearFunc.apply(x, weight, bias, process_group, sequence_parallel)
    return out


def _local_multiples(what: str, size: int, group: ProcessGroup, multiple_of: int) -> int:
    if size % multiple_of != 0:
        raise ValueError(f"[{what}] is {size}, expected a multiple of multiple_of = {multiple_of}")
    return get_dim_for_local_rank(
        size, dist.get_world_size(group), dist.get_rank(group), multiple_of
    )


def _summed(x: Tensor, group: ProcessGroup, scatter: bool) -> Tensor:
    """The sum over ranks, scattered over dimension 0 or whole."""
    out: Tensor = (reduce_scatter if scatter else all_reduce)(x, group)
    return out


class ColumnParallelLinear(nn.Linear):
    """A linear layer of which each rank holds rows of the weight: (out_features share,
    in_features).

    ``forward``: x (n, ..., in), gathered over ranks with sequence_parallel, to (..., out_features
    share).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        local = _local_multiples(
            "ColumnParallelLinear: out_features", out_features, process_group, multiple_of
        )
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return parallel_linear_func(
            x,
            self.weight,
            self.bias,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )


class RowParallelLinear(nn.Linear):
    """A linear layer of which each rank holds columns of the weight: (out_features, in_features
    share).

    ``forward``: x (n, ..., in share) to the sum over ranks (n, ..., out), with sequence_parallel
    scattered over dimension 0. The bias belongs to the first rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        local = _local_multiples(
            "RowParallelLinear: in_features", in_features, process_group, multiple_of
        )
        super().__init__(
            local,
            out_features,
            bias=bias and dist.get_rank(process_group) == 0,
            device=device,
            dtype=dtype,
        )
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        out = parallel_linear_func(x, self.weight, self.bias)
        return _summed(out, self.process_group, self.sequence_parallel)


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds a contiguous range of ids; others give zeros, to be
    summed over ranks.
    """

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: Optional[ProcessGroup] = None,
        padding_idx: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        self.process_group = process_group
        if process_group is not None:
            world_size = dist.get_world_size(process_group)
            if num_embeddings % world_size != 0:
                raise ValueError(
                    f"[VocabParallelEmbedding] num_embeddings is {num_embeddings}, expected "
                    f"a multiple of the {world_size} ranks"
                )
            if world_size > 1 and padding_idx is not None:
                raise ValueError(
                    f"[VocabParallelEmbedding] padding_idx is {padding_idx}, expected None "
                    "with more than one rank"
                )
            num_embeddings //= world_size
        kwargs["padding_idx"] = padding_idx
        super().__init__(num_embeddings, *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        if self.process_group is None:
            return super().forward(input)
        local = input - dist.get_rank(self.process_group) * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        embeddings = super().forward(local.masked_fill(elsewhere, 0))
        return embeddings.masked_fill(elsewhere.unsqueeze(-1), 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds some channels: (..., embedding_dim / world)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: Optional[ProcessGroup] = None,
        **kwargs: Any,
    ) -> None:
        self.process_group = process_group
        if process_group is not None:
            world_size = dist.get_world_size(process_group)
            if embedding_dim % world_size != 0:
                raise ValueError(
                    f"[ColumnParallelEmbedding] embedding_dim is {embedding_dim}, expected "
                    f"a multiple of the {world_size} ranks"
                )
            embedding_dim //= world_size
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)


class ParallelEmbeddings(nn.Module):
    """Word embeddings sharded by id and, with max_position_embeddings > 0, positions sharded by
    channel.

    ``forward``: input_ids (B, L) to (B, L, D), or (B * L, D) with combine_batch_seqlen_dim; with
    sequence_parallel scattered over dimension 0.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: Optional[ProcessGroup],
        padding_idx: Optional[int] = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            embed_dim,
            padding_idx=padding_idx,
            process_group=process_group,
            **factory_kwargs,
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, process_group=process_group, **factory_kwargs
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> Tensor:
        embeddings: Tensor = self.word_embeddings(input_ids)
        world_size = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        if self.max_position_embeddings > 0:
            if position_ids is None:
                position_ids = torch.arange(
                    input_ids.shape[-1], dtype=torch.long, device=input_ids.device
                )
            positions = self.position_embeddings(position_ids)
            if world_size > 1:
                # The sum over ranks puts each rank's channels beside the others'.
                start = dist.get_rank(self.process_group) * positions.shape[-1]
                rest = embeddings.shape[-1] - start - positions.shape[-1]
                positions = F.pad(positions, (start, rest))
            embeddings = embeddings + positions
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if self.process_group is None or world_size == 1:
            return embeddings
        return _summed(embeddings, self.process_group, self.sequence_parallel)
