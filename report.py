"""What a run tells a person before its first step, and after its last."""
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from tqdm import tqdm

import chat
from check import show
from config import BadExample, UserError, printable
from model import PARTS

DOES_NOT_FIT = 3                                            # plan.py's exit code, with --one_line


def forecast(cfg, device):
    """On a GPU, before anything is loaded: what a step will take of it. Raises UserError if it can't fit."""
    if device.type == "cuda" and cfg.forecast and dist.get_rank() == 0:
        count(cfg, dist.get_world_size(), torch.cuda.get_device_properties(device).total_memory)


def count(cfg, gpus, memory):
    """Asks plan.py, in a process of its own: it makes a process group of its own, and takes nothing of the
    GPU. memory: bytes"""
    print("memory   is being counted, which takes some seconds (--no-forecast leaves it out)", flush=True)
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
             for name, value in asdict(cfg).items()]
    command = [sys.executable, str(Path(__file__).with_name("plan.py")), *flags, f"--gpus={gpus}",
               f"--memory={memory / 1e9}", "--one_line"]
    alone = {name: value for name, value in os.environ.items()
             if name not in ("RANK", "TORCHELASTIC_ERROR_FILE")}    # it is no rank, its errors are its own
    done = subprocess.run(command, capture_output=True, text=True, env=alone | {"CUDA_VISIBLE_DEVICES": ""})
    said = (done.stdout or done.stderr).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode == DOES_NOT_FIT:
        raise UserError(f"this run can't fit. {said[0]}. Less take --gradient_checkpointing and a smaller "
                        "--per_device_batch_size; python plan.py with the flags of this run shows how much. "
                        "--no-forecast tries it all the same")
    print(said[0] if done.returncode == 0 else f"memory   can't be counted: {printable(said[0], 400)}",
          flush=True)


def opening(model, data, sampler, total, run, step):
    """What trains, how the batches are cut, how a conversation is written, the first example."""
    def sizes(trained):
        counts = {name: sum(p.numel() for p in getattr(model, name).parameters()
                            if p.requires_grad == trained) for name in PARTS}
        return ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items() if count) or "nothing"
    if step == total:
        print(f"{run}: this run is finished, all {total:,} steps are done")
        return
    print(f"trains   {sizes(True)} · frozen {sizes(False)}")
    if model.adapters:
        added = model.adapters
        where = f" of {added.base['folder']}, which must stay" if added.base else ""
        print(f"adapters rank {added.rank}, alpha {added.alpha}, beside {len(added.layers)} layers of the "
              f"language model{where}")
    print(f"batch    {sampler.global_batch_size} = {sampler.per_device_batch_size} x "
          f"{sampler.accumulation} accumulated x {sampler.world_size} ranks · "
          f"{len(sampler.lengths):,} examples ({int(sampler.has_image.sum()):,} with pictures) · "
          f"{total:,} steps, {sampler.batches_per_epoch:,} an epoch")
    if not data.language.captions:
        print(f"prompt   {printable(chat.describe(data.language))}")
    example = data[0]
    if isinstance(example, BadExample):
        raise example
    shown = show(example["input_ids"].tolist(), example["labels"].tolist(), data.language.tokenizer)
    print(f"sample 0 {printable(shown)}     (>> << is what the loss sees)", flush=True)


def progress_bar(stage, total, step, rank):
    """Its end, `postfix`, is what `progress` says; tqdm's own guess of the time left is left out."""
    return tqdm(total=total, initial=step, disable=rank != 0 or step == total, desc=stage,
                dynamic_ncols=True, bar_format="{desc} {n_fmt}/{total_fmt} {percentage:.0f}%{postfix}")


def progress(metrics):
    """The line of a step that a person watches."""
    norm, mfu, memory, left = (metrics[name] for name in
                               ("grad_norm", "mfu", "peak_memory_gb", "seconds_left"))
    rate = metrics["tokens_per_second"]
    parts = (f"loss {metrics['loss']:.3f}", f"lr {metrics['lr']:.1e}",
             "skipped" if norm is None else f"norm {norm:.2f}",
             f"{rate / 1000:.1f}k tok/s" if rate >= 1000 else f"{rate:.0f} tok/s",
             f"data {metrics['data_wait']:.0%}", "" if mfu is None else f"mfu {mfu:.0%}",
             "" if memory is None else f"{memory:.1f} GB", "" if left is None else f"{duration(left)} left")
    return ", ".join(part for part in parts if part)


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{seconds:02}"


def closing(cfg, run):
    """Scores the held-out examples with the command that a user would type, and names the next step."""
    if cfg.val_json:
        command = ["evaluate.py", "--ckpt", str(run), "--json", cfg.val_json, "--image_dir", cfg.image_dir,
                   "--out", str(run / "val.json")]
        print(f"\nscore    python {' '.join(command)}", flush=True)
        # Without RANK: torchrun's variables name a group of ranks that has ended. This is a world of one.
        own = {name: value for name, value in os.environ.items() if name != "RANK"}
        if subprocess.run([sys.executable, *command], env=own).returncode:
            print("the run itself is whole; when the score's error above is mended, give its command again")
    own = "" if cfg.prepare else f" --train_json FILE --image_dir {cfg.image_dir}"
    print(f"run      {run}")
    if cfg.stage == "align":
        print(f"next     torchrun train.py --stage finetune --ckpt {run}{own}")
    elif cfg.stage == "vla" and cfg.prepare:
        print(f"next     python toy/robot.py --ckpt {run} --rollouts 100")
    else:
        print(f"next     python generate.py --ckpt {run} --image FILE --prompt TEXT")
