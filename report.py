"""What a run tells a person before its first step, and after its last."""
import os
import subprocess
import sys

from tqdm import tqdm

import chat
from check import show
from config import BadExample, printable
from model import PARTS


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
