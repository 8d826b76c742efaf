"""What only a GPU can show: bf16 beside fp32, and a run that is killed there. A table, in three minutes.

    python tests/gpu.py                 # on a machine with a GPU, with the packages of requirements.txt
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SAME = ("step", "loss", "grad_norm", "lr", "tokens")


def command(root, run_id, *flags, stage="align"):
    return [sys.executable, "train.py", "--stage", stage, "--val_json", "", "--run_root", str(root),
            "--run_id", run_id, "--save_every", "10", *flags]


def train(root, run_id, *flags, stage="align"):
    """One run of train.py on the toy -> its metrics, its folder."""
    done = subprocess.run(command(root, run_id, *flags, stage=stage), cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics_of(root / run_id), root / run_id


def metrics_of(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def killed_after(root, run_id, step, *flags):
    """SIGKILL once so many steps are logged, then the same command again -> its metrics."""
    process = subprocess.Popen(command(root, run_id, *flags), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while len(metrics_of(root / run_id)) < step and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return train(root, run_id, *flags)[0]


def say(what, result):
    print(f"{what:<58} {result}", flush=True)


def main(root):
    say("device", torch.cuda.get_device_name())
    bf16, run = train(root, "bf16", "--max_steps", "40")
    fp32, _ = train(root, "fp32", "--max_steps", "40", "--precision", "fp32")
    say("loss of steps 1, 20, 40 in bf16", [round(bf16[i]["loss"], 3) for i in (0, 19, 39)])
    say("largest difference of the loss to fp32",
        f"{max(abs(a['loss'] / b['loss'] - 1) for a, b in zip(bf16, fp32)):.2%}")
    again = train(root, "again", "--max_steps", "40")[0]
    say("the same run twice, bit for bit",
        [[line[key] for key in SAME] for line in again] == [[line[key] for key in SAME] for line in bf16])
    killed = killed_after(root, "killed", 25, "--max_steps", "40")
    say("killed at step 25 and continued, bit for bit",
        [[line[key] for key in SAME] for line in killed] == [[line[key] for key in SAME] for line in bf16])
    tuned, folder = train(root, "tuned", "--ckpt", str(run), "--max_steps", "60", stage="finetune")
    again, _ = train(root, "recomputed", "--ckpt", str(run), "--max_steps", "60", "--gradient_checkpointing",
                     stage="finetune")
    say("finetune, loss of steps 1 and 60", [round(tuned[i]["loss"], 3) for i in (0, 59)])
    say("largest difference of the loss with recomputing",
        f"{max(abs(a['loss'] / b['loss'] - 1) for a, b in zip(again, tuned)):.2%}")
    done = subprocess.run([sys.executable, "generate.py", "--ckpt", str(folder), "--image",
                           "data/toy/images/test_00001.png", "--prompt", "How many shapes are there?"],
                          cwd=ROOT, capture_output=True, text=True)
    say("generate", done.stdout.strip() or done.stderr[-300:])
    done = subprocess.run(["torchrun", *command(root, "torchrun", "--max_steps", "3")[1:]], cwd=ROOT,
                          capture_output=True, text=True)
    say("exit code of torchrun", done.returncode)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; the tests of pytest need none")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
