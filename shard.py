"""--shard: weights, gradients and moments cut among the ranks, instead of a copy of all on each (DDP).

FSDP2 (torch's `fully_shard`; the idea is ZeRO's third stage, arXiv 1910.02054). Each rank keeps a slice of
each tensor. Before a block computes, its slices are gathered; afterwards the whole weights are dropped again,
and in backward each gradient is averaged over the ranks and cut (reduce-scatter). The optimizer sees slices
only. The results are those of DDP, up to rounding.
"""
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import ranks
from config import UserError
from model import blocks


def make_mesh(kind, device):
    """Which ranks share one whole. all: every rank; machine: those of a machine, and the machines hold copies
    (the links between machines are slow). Every rank must call it."""
    world, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if kind == "all":
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // here, here), mesh_dim_names=("copies", "slices"))


@contextmanager
def in_turn():
    """The ranks of a machine load one after the other: eight whole models would not fit into its memory."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for turn in range(here):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            yield
        ranks.barrier()


def cut(model, mesh, device, dtype):
    """Cuts a loaded VLM and moves it to the device, block by block.

    A block is a unit: it is gathered and dropped as one. All the rest (embeddings, output, projector) is the
    root unit. It stays whole from forward to backward, because it is used at both ends of a step; two tied
    tables must lie in one unit. What of vision is frozen stays whole on each rank: it is small.
    """
    if dtype == torch.float16:
        raise UserError("--shard does not go with fp16: each rank would find a scale of its own for its "
                        "slices. Give --precision fp32, or bf16 on a card that has it")
    # Blocks are gathered in bf16, as autocast would compute with them, and gradients averaged in fp32. (On a
    # CPU autocast leaves LayerNorm alone, which then refuses weights in bf16.)
    refuses = device.type == "cpu" and any(isinstance(m, nn.LayerNorm) for m in model.llm.modules())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) \
        if dtype == torch.bfloat16 and not refuses else MixedPrecisionPolicy(cast_forward_inputs=False)
    frozen = {parameter for parameter in model.vision.parameters() if not parameter.requires_grad}
    model.vision.to(device)
    towers = model.vision.models if "vision" in model.trained else []
    for block in [*blocks(model.llm.base_model), *(b for tower in towers for b in blocks(tower)[:-1])]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def slice_like(tensor, parameter):
    """This rank's slice of a whole tensor, cut as the parameter is. Nothing is sent: all have the whole."""
    return distribute_tensor(tensor.to(parameter.device, parameter.dtype), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)
