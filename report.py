"""What a run tells a person before its first step, and after its last."""
import subprocess
import sys

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


def closing(cfg, run):
    """Scores the held-out examples with the command that a user would type, and names the next step."""
    if cfg.val_json:
        command = ["evaluate.py", "--ckpt", str(run), "--json", cfg.val_json, "--image_dir", cfg.image_dir,
                   "--out", str(run / "val.json")]
        print(f"\nscore    python {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command]).returncode:
            print("the run itself is whole; when the score's error above is mended, give its command again")
    own = "" if cfg.prepare else f" --train_json FILE --image_dir {cfg.image_dir}"
    print(f"run      {run}")
    if cfg.stage == "align":
        print(f"next     torchrun train.py --stage finetune --ckpt {run}{own}")
    elif cfg.stage == "vla" and cfg.prepare:
        print(f"next     python toy/robot.py --ckpt {run} --rollouts 100")
    else:
        print(f"next     python generate.py --ckpt {run} --image FILE --prompt TEXT")
