"""Run by torchrun for test_shard.py: the same steps with and without --shard, many cases in one start.

    torchrun --nproc_per_node 2 tests/sharded.py WORLD LLAMA OUT case:kind ...
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: F401  (before torch)
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import ranks
import train
from config import Config
from profiling import Speed

STEPS = 8
CASES = {                                                   # what differs from a finetune of the toy's LLM
    "tied": {}, "untied": {"llm_backbone": "LLAMA"}, "everything": {"trains": "vision,projector,llm"},
    "last": {"trains": "projector,llm.last", "llm_backbone": "LLAMA"},
    "recomputing": {"gradient_checkpointing": True, "llm_backbone": "LLAMA"},
    "align": {"stage": "align", "no_align": False, "length_window": 0},
    "bf16": {"precision": "bf16", "llm_backbone": "LLAMA"}}


def steps(world, llama, case, kind, device):
    """-> what came out of STEPS steps: losses, norms, modalities, weights, the share that lies here."""
    flags = {"stage": "finetune", "no_align": True, "shard": kind, "train_json": "finetune.json",
             "image_dir": f"{world}/images", "global_batch_size": 8, "per_device_batch_size": 2,
             "num_workers": 0, "learning_rate": 1e-3, "weight_decay": 0.01} | CASES[case]
    flags["train_json"] = f"{world}/{'align' if flags['stage'] == 'align' else 'finetune'}.json"
    if flags.get("llm_backbone"):
        flags["llm_backbone"] = llama
    cfg = Config(**flags)
    *_, pictures, loader = train.load_data(cfg, device)
    _, model = train.load_model(cfg, None, loader.batch_sampler, device)
    optimizer = train.make_optimizer(model, cfg)
    ddp = model if kind != "no" else DistributedDataParallel(
        model, find_unused_parameters=not loader.batch_sampler.has_image.all())
    found = {"losses": [], "norms": [], "modalities": []}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    speed = Speed(model, device, torch.float32, 0, STEPS)
    for _, batches, counts in train.global_batches(loader, pictures, 0, STEPS, speed, Nobody):
        queued = train.train_step(ddp, optimizer, scaler, batches, counts["tokens"], cfg, device)
        loss, norm, _ = train.look(*queued, batches, counts["tokens"], train.right_tokens)
        found["losses"].append(loss)
        found["norms"].append(norm)
        found["modalities"].append("image" if batches[0]["pixel_values"] else "text")
        if len(found["losses"]) == 1:
            found["share"] = share(model)
    tensors = checkpoint.tensors_of(model, ["vision", "projector", "llm"])
    found["weights"] = {name: checkpoint.whole(tensor).double().abs().sum().item()
                        for name, tensor in tensors.items()}
    found["moments"] = sorted(checkpoint.optimizer_tensors(model, optimizer))
    return found


class Nobody:
    """Asks the run to stop."""
    asked = False


def share(model):
    """Of the weights that train, and of all of the language model's, what this rank holds."""
    def here(parameters):
        parameters = list(parameters)
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters)
        return local / sum(p.numel() for p in parameters)
    return here(p for p in model.parameters() if p.requires_grad), here(model.llm.parameters())


def main(world, llama, out, *wanted):
    device, _ = ranks.start()
    if dist.get_world_size() == 4:                          # as on two machines with two ranks each
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank() % 2)}
    found = {name: steps(world, llama, *name.split(":"), device) for name in wanted}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    ranks.barrier()


if __name__ == "__main__":
    ranks.run(lambda: main(*sys.argv[1:]))
