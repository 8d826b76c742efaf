"""Weak scaling: each process gets the same work, so two processes should do twice the work in the same time.

    python tests/bench_scaling.py                   # 1, 2 and 4 processes of one thread each
    python tests/bench_scaling.py --ranks 1,2,4,8 --size 0.5B       # one GPU each

Runs train.py under torchrun on the world of bench_train.py, with one micro-batch for each process and step.
Tokens are those that are not padding, over all processes. `all-reduce` is rank zero's share of the step's
time, from --profile; it runs while backward goes on, and holds the waiting for a slower rank. Where there are
more processes than cores, the most that can be reached is the number of cores.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_train import SIZES, make_world    # noqa: E402

STEPS, WATCHED = 9, 5


def tokens_per_second(folder, ranks, micro):
    """-> over all processes; and rank zero's all-reduce, as it is printed."""
    root = folder / f"runs-{ranks}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "train.py",
               "--stage", "finetune", "--no_align", "--prompt", "plain",
               "--vision_backbone", str(folder / "vision"), "--llm_backbone", str(folder / "llm"),
               "--train_json", str(folder / "finetune.json"), "--image_dir", str(folder / "images"),
               "--run_root", str(root), "--run_id", "r", "--max_steps", str(STEPS), "--num_workers", "1",
               "--global_batch_size", str(micro * ranks), "--per_device_batch_size", str(micro),
               "--profile", str(WATCHED), "--val_json", ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    steps = [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text().splitlines()][2:]
    real = [step["positions"] * (1 - step["padding"]) for step in steps]
    seconds = [n / step["tokens_per_second"] for n, step in zip(real, steps)]
    return sum(real) / sum(seconds), re.search(r"([\d.]+%)  all-reduce", done.stdout)[1]


def main(args):
    cores, base = len(os.sched_getaffinity(0)), None
    print(f"{cores} cores, load before: {os.getloadavg()[0]:.1f}; size {args.size}")
    print("processes  tokens/s  of one  all-reduce")
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), args.size)
        for ranks in map(int, args.ranks.split(",")):
            speed, sent = tokens_per_second(Path(folder), ranks, SIZES[args.size][2])
            base = base or speed
            print(f"{ranks:>9}{speed:10.0f}{speed / base:8.2f}{sent:>12}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--size", default="8M", choices=SIZES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(parser.parse_args())
