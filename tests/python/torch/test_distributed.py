"""Two processes, over gloo or on two GPUs: data, tensor, sequence parallelism, sharded parameters."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import DEVICE

from krait.torch import Mamba2, MambaConfig, MambaLMHeadModel

TOO_FEW = DEVICE == "cuda" and torch.cuda.device_count() < 2

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
    pytest.mark.skipif(TOO_FEW, reason="fewer than two GPUs"),
]

CONFIG = MambaConfig(
    d_model=16, n_layer=2, vocab_size=16, d_intermediate=8, attn_layer_idx=[1],
    ssm_cfg={"layer": "Mamba2", "headdim": 8, "d_state": 8},
    attn_cfg={"num_heads": 2, "causal": True},
)  # fmt: skip


def model_and_ids():
    torch.manual_seed(3)
    return MambaLMHeadModel(CONFIG), torch.randint(0, 16, (4, 6))


def loss_of(model, ids):
    return model(ids).logits.float().square().mean()


def gradients_of_one_process():
    model, ids = model_and_ids()
    loss_of(model, ids).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def data_parallel(rank):
    model, ids = model_and_ids()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    loss_of(wrapped, ids.chunk(2)[rank]).backward()
    for n, want in gradients_of_one_process().items():
        got = dict(model.named_parameters())[n].grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:  # before torch 2.6, for GPUs alone
        return

    want = gradients_of_one_process()
    mesh = init_device_mesh(DEVICE, (2,))
    for precision in (torch.float32, torch.bfloat16):
        model, ids = model_and_ids()
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
        for layer in model.backbone.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss = loss_of(model, ids.chunk(2)[rank])
        loss.backward()
        if precision is torch.float32:
            for n, p in model.named_parameters():
                torch.testing.assert_close(p.grad.full_tensor(), want[n], rtol=1e-4, atol=1e-6)
        optimizer.step()
        assert loss_of(model, ids.chunk(2)[rank]) < loss


def tensor_parallel(rank):
    group = dist.group.WORLD
    options = {"d_state": 8, "headdim": 4, "ngroups": 2, "d_ssm": 16, "bias": True}
    for sequence_parallel in (False, True):
        torch.manual_seed(5)
        whole, x = Mamba2(16, **options), torch.randn(2, 6, 16)
        part = Mamba2(16, **options, process_group=group, sequence_parallel=sequence_parallel)
        copy_share(whole, part, rank)
        want = whole(x)
        if sequence_parallel:
            # Tokens are split over ranks outside the projections.
            flat = x.flatten(0, 1).chunk(2)[rank].clone().requires_grad_()
            got = part(flat, seqlen=6)
            want_here = want.flatten(0, 1).chunk(2)[rank]
        else:
            flat = x.clone().requires_grad_()
            got, want_here = part(flat), want
        torch.testing.assert_close(got, want_here, rtol=1e-4, atol=1e-5)
        got.square().sum().backward()
        want.square().sum().backward()
        share = part.nheads
        torch.testing.assert_close(
            part.A_log.grad,
            whole.A_log.grad[rank * share : (rank + 1) * share],
            rtol=1e-4,
            atol=1e-5,
        )


def copy_share(whole, part, rank):
    """Gives a rank's layer its heads and groups of the whole layer's weights."""

    def rows(t, widths):
        return torch.cat([piece.chunk(2)[rank] for piece in t.split(widths)])

    states = whole.ngroups * whole.d_state
    conv = [whole.d_ssm, states, states]
    wide = [whole.d_mlp, whole.d_mlp, whole.d_ssm, *conv, whole.nheads]
    with torch.no_grad():
        part.in_proj.weight.copy_(rows(whole.in_proj.weight, wide))
        part.in_proj.bias.copy_(rows(whole.in_proj.bias, wide))
        part.conv1d.weight.copy_(rows(whole.conv1d.weight, conv))
        part.conv1d.bias.copy_(rows(whole.conv1d.bias, conv))
        columns = rows(whole.out_proj.weight.T, [whole.d_mlp, whole.d_ssm])
        part.out_proj.weight.copy_(columns.T)
        if part.out_proj.bias is not None:
            part.out_proj.bias.copy_(whole.out_proj.bias)
        for n in ("A_log", "D", "dt_bias"):
            getattr(part, n).copy_(getattr(whole, n).chunk(2)[rank])
        part.norm.weight.copy_(whole.norm.weight.chunk(2)[rank])


def run(rank, port, names):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=rank, world_size=2)
    try:
        for name in names:
            globals()[name](rank)
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("names", [["data_parallel", "tensor_parallel", "sharded"]])
def test_two_processes(names):
    mp.spawn(run, args=(free_port(), names), nprocs=2, join=True)
