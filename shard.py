"""--shard: weights, gradients and moments cut among the ranks, instead of a copy of all on each (DDP).

FSDP2 (torch's `fully_shard`; the idea is ZeRO's third stage, arXiv 1910.02054). Each rank keeps a slice of
each tensor. Before a block computes, its slices are gathered; afterwards they are dropped again, and in
backward each gradient is averaged over the ranks and cut (reduce-scatter). The results are those of DDP, up
to rounding.
"""
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import ranks
from config import UserError
from model import blocks


def make_mesh(kind, device):
    """Which ranks share one whole. all: every rank; machine: those of a machine, and the machines hold copies
    (the links between machines are slow). Every rank must call it."""
    world = dist.get_world_size()
    if kind == "all":
        return init_device_mesh(device.type, (world,))
    least, most = ranks_of_a_machine(world)
    if least != most:
        raise UserError(f"--shard machine: a machine has {least} ranks, another one {most}. Start as many "
                        "on each, or give --shard all")
    return init_device_mesh(device.type, (world // most, most), mesh_dim_names=("copies", "slices"))


def ranks_of_a_machine(alone):
    """The fewest and the most ranks that any machine has. alone: their number without torchrun."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", alone))
    found = torch.tensor([-here, here])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=ranks.cpu_group)
    return -int(found[0]), int(found[1])


@contextmanager
def in_turn():
    """The ranks of a machine load one after the other: eight whole models would not fit into its memory.
    All take as many turns, as each ends with a barrier of all; machines may have unequal numbers of ranks."""
    for turn in range(ranks_of_a_machine(1)[1]):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            yield
        ranks.barrier()


def cut(model, mesh, device, dtype):
    """Cuts a loaded VLM and moves it to the device, block by block.

    A block's matrices are a unit: gathered and dropped as one. All the rest (embeddings, output, projector,
    norms) is the root unit. It stays whole from forward to backward: it is small, or used at both ends of a
    step; two tied tables must lie in one unit. Frozen vision stays whole on each rank: it is small.
    """
    if dtype == torch.float16:
        raise UserError("--shard does not go with fp16: each rank would find a scale of its own for its "
                        "slices. Give --precision fp32, or bf16 on a card that has it")
    # Matrices are gathered in bf16, as autocast uses them, and gradients averaged in fp32. Norms stay in
    # fp32, as autocast leaves them: near 1, bf16 has steps of 0.4 to 0.8 %, and most updates are smaller.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = whole if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32, None, False)
    model.vision.to(device)
    frozen = {p for p in model.vision.parameters() if not p.requires_grad}
    towers = [blocks(tower)[:-1] for tower in model.vision.models if "vision" in model.trained]
    units = [block for stack in (blocks(model.llm.base_model), *towers) for block in stack]
    matrices = {p for block in units for p in block.parameters() if p.ndim > 1}
    # The root first: what it takes of a block becomes a slice, which the block's own unit then leaves alone.
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=False,
                ignored_params=frozen | matrices)
    for block in units:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - matrices)


def slice_like(tensor, parameter):
    """This rank's slice of a whole tensor, cut as the parameter is. Nothing is sent: all have the whole."""
    return distribute_tensor(tensor.to(parameter.device, parameter.dtype), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)
