"""Files of tensors, written one tensor at a time: with --shard each is gathered from all ranks, and rank
zero's memory holds one.
"""
import json

import torch

import ranks
from checkpoint import whole

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8"}                  # safetensors' words


def in_file_order(tensors):
    """Names, the widest type first, as safetensors has them: so each tensor starts where its type wants."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def gathered(tensor):
    """The whole tensor, on every rank. A gather that waits for a rank ends the run after the group's ten
    minutes, and rank zero may write for an hour. So the ranks meet first, in a barrier that has days."""
    if hasattr(tensor, "full_tensor"):
        ranks.barrier()
    return whole(tensor)


def give(*files):
    """What the other ranks do while rank zero writes: it gathers one tensor after the other."""
    for tensors in files:
        for name in in_file_order(tensors):
            gathered(tensors[name])


def write_tensors(file, tensors):
    """A safetensors file. Unlike its own save_file, this holds one whole tensor in memory at a time: weights
    and moments of 7 billion parameters are 84 GB."""
    head, end = {}, 0
    for name in in_file_order(tensors):
        start, end = end, end + tensors[name].nbytes
        head[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                      "data_offsets": [start, end]}
    head = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name in in_file_order(tensors):
            out.write(gathered(tensors[name]).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
