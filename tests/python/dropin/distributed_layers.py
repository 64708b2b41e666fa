"""One rank of two: sharded layers against the whole ones. Started by test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import close
from mamba_ssm.distributed.distributed_utils import (
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    allreduce_sequence_parallel_grad,
    reduce_scatter,
    reduce_scatter_raw,
    sync_shared_params,
)
from mamba_ssm.distributed.tensor_parallel import (
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    ParallelEmbeddings,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_linear_func,
)
from mamba_ssm.modules.mamba2 import Mamba2
from torch import Tensor, nn

WORLD = 2


def both(seed: int, *shape: int) -> list[Tensor]:
    """What each of the ranks holds, the same list on all of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(WORLD)]


def check_collectives(rank: int, group: dist.ProcessGroup) -> None:
    inputs, whole = both(0, 3, 2), both(1, 4, 2)
    output, handle = all_gather_raw(inputs[rank], group)
    assert handle is None
    close(output, torch.cat(inputs))
    output, handle = reduce_scatter_raw(whole[rank], group, async_op=True)
    handle.wait()
    close(output, sum(whole).chunk(WORLD)[rank])
    output, _ = all_reduce_raw(inputs[rank].clone(), group)
    close(output, sum(inputs))
    try:
        reduce_scatter_raw(inputs[rank], group)
    except ValueError as error:
        assert "dimension 0 is 3, expected a multiple of the 2 ranks" in str(error)
    else:
        raise AssertionError("3 rows cannot be scattered over 2 ranks")

    x = inputs[rank].clone().requires_grad_()
    grads = both(2, 6, 2)
    all_gather(x, group).backward(grads[rank])
    close(x.grad, sum(grads).chunk(WORLD)[rank])
    x = whole[rank].clone().requires_grad_()
    grads = both(3, 2, 2)
    reduce_scatter(x, group).backward(grads[rank])
    close(x.grad, torch.cat(grads))
    x = inputs[rank].clone().requires_grad_()
    all_reduce(x, group).backward(torch.ones(3, 2))
    close(x.grad, torch.ones(3, 2))
    close(x, inputs[rank])


def check_linear(rank: int, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """Column, activation, row: the usual sharded MLP, of an odd number of columns."""
    torch.manual_seed(4)
    up, down = nn.Linear(6, 10), nn.Linear(10, 6)
    x = torch.randn(4, 3, 6, requires_grad=True)
    expected = down(F.silu(up(x)))
    grad = torch.randn(4, 3, 6)
    expected.backward(grad)

    column = ColumnParallelLinear(6, 10, group, sequence_parallel=sequence_parallel, multiple_of=2)
    row = RowParallelLinear(10, 6, group, sequence_parallel=sequence_parallel, multiple_of=2)
    # Five pairs over two ranks.
    share = slice(0, 6) if rank == 0 else slice(6, 10)
    assert column.weight.shape == (share.stop - share.start, 6)
    assert (row.bias is None) == (rank != 0)
    with torch.no_grad():
        column.weight.copy_(up.weight[share])
        column.bias.copy_(up.bias[share])
        row.weight.copy_(down.weight[:, share])
        if rank == 0:
            row.bias.copy_(down.bias)
    mine = slice(2 * rank, 2 * rank + 2) if sequence_parallel else slice(0, 4)
    local = x.detach()[mine].clone().requires_grad_()
    out = row(F.silu(column(local)))
    close(out, expected.detach()[mine])
    out.backward(grad[mine])
    close(local.grad, x.grad[mine])
    close(column.weight.grad, up.weight.grad[share])
    close(column.bias.grad, up.bias.grad[share])
    close(row.weight.grad, down.weight.grad[:, share])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = parallel_linear_func(local, column.weight, None, group, sequence_parallel)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert column.weight.grad.dtype == torch.float32


def check_embeddings(rank: int, group: dist.ProcessGroup) -> None:
    torch.manual_seed(5)
    words, places = nn.Embedding(10, 4), nn.Embedding(7, 4)
    ids = torch.randint(0, 10, (2, 6))
    expected = words(ids) + places(torch.arange(6))
    grad = torch.randn(12, 4)
    expected.backward(grad.view(2, 6, 4))
    for sequence_parallel in (False, True):
        made = ParallelEmbeddings(4, 10, 7, group, sequence_parallel=sequence_parallel)
        assert isinstance(made.word_embeddings, VocabParallelEmbedding)
        assert isinstance(made.position_embeddings, ColumnParallelEmbedding)
        with torch.no_grad():
            made.word_embeddings.weight.copy_(words.weight[5 * rank : 5 * rank + 5])
            made.position_embeddings.weight.copy_(places.weight[:, 2 * rank : 2 * rank + 2])
        out = made(ids, combine_batch_seqlen_dim=True)
        mine = slice(6 * rank, 6 * rank + 6) if sequence_parallel else slice(0, 12)
        close(out, expected.detach().flatten(0, 1)[mine])
        out.backward(grad[mine])
        close(made.word_embeddings.weight.grad, words.weight.grad[5 * rank : 5 * rank + 5])
        close(
            made.position_embeddings.weight.grad,
            places.weight.grad[:, 2 * rank : 2 * rank + 2],
        )
    for make in (
        lambda: VocabParallelEmbedding(11, 4, process_group=group),
        lambda: ColumnParallelEmbedding(11, 5, process_group=group),
        lambda: VocabParallelEmbedding(10, 4, process_group=group, padding_idx=1),
    ):
        try:
            make()
        except ValueError:
            continue
        raise AssertionError("expected a ValueError")


def check_marked_parameters(rank: int, group: dist.ProcessGroup) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    values = both(6, 2)
    with torch.no_grad():
        model[1].weight.copy_(values[rank])
        model[1].bias.copy_(values[rank])
    model[1].weight._shared_params = True
    sync_shared_params(model, group)
    close(model[1].weight, values[0])
    close(model[1].bias, values[rank])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, rank + 1.0)
    model[1].weight._sequence_parallel = model[1].bias._sequence_parallel = True
    allreduce_sequence_parallel_grad(model, group)
    close(model[1].weight.grad, torch.full((2,), 3.0))
    close(model[1].bias.grad, torch.full((2,), 3.0))
    close(model[0].weight.grad, torch.full((2, 2), rank + 1.0))


def check_mamba2(rank: int, group: dist.ProcessGroup) -> None:
    """Half of the heads on each rank."""
    torch.manual_seed(7)
    sizes = dict(d_model=16, d_state=4, headdim=8, ngroups=2)
    whole = Mamba2(**sizes)
    x = torch.randn(2, 6, 16, requires_grad=True)
    expected = whole(x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    half = Mamba2(**sizes, process_group=group, sequence_parallel=False)

    def share(tensor: Tensor, widths: list[int]) -> Tensor:
        return torch.cat([t.chunk(WORLD)[rank] for t in tensor.split(widths)])

    with torch.no_grad():
        half.in_proj.weight.copy_(share(whole.in_proj.weight, [32, 32, 8, 8, 4]))
        half.conv1d.weight.copy_(share(whole.conv1d.weight, [32, 8, 8]))
        half.conv1d.bias.copy_(share(whole.conv1d.bias, [32, 8, 8]))
        half.out_proj.weight.copy_(whole.out_proj.weight.chunk(WORLD, dim=1)[rank])
        for name in ("A_log", "D", "dt_bias"):
            getattr(half, name).copy_(getattr(whole, name).chunk(WORLD)[rank])
        half.norm.weight.copy_(whole.norm.weight.chunk(WORLD)[rank])
    local = x.detach().clone().requires_grad_()
    out = half(local)
    close(out, expected.detach())
    out.backward(grad)
    close(local.grad, x.grad)
    close(half.A_log.grad, whole.A_log.grad.chunk(WORLD)[rank])
    close(half.in_proj.weight.grad, share(whole.in_proj.weight.grad, [32, 32, 8, 8, 4]))


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD
    )
    group = dist.group.WORLD
    check_collectives(rank, group)
    check_linear(rank, group, True)
    check_linear(rank, group, False)
    check_embeddings(rank, group)
    check_marked_parameters(rank, group)
    check_mamba2(rank, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
