"""Does grouping by length cost quality?

The same number of examples in random order and grouped, over eight seeds.

    python tests/bench_quality.py runs/toy-align-x7         # about a quarter of an hour on two cores

Each run is one epoch of the toy's finetune stage; the score is that of the held-out data/toy/val.json.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS, WINDOWS = range(1, 9), {"random order": 0, "grouped by length": 64}


def accuracy_and_padding(ckpt, seed, window, folder):
    subprocess.run([sys.executable, "train.py", "--stage", "finetune", "--ckpt", ckpt, "--epochs", "1",
                    "--seed", str(seed), "--length_window", str(window), "--run_root", folder,
                    "--run_id", f"{window}-{seed}"],
                   cwd=ROOT, check=True, capture_output=True)
    run = Path(folder) / f"{window}-{seed}"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    padding = (sum(step["padding"] * step["positions"] for step in steps)
               / sum(step["positions"] for step in steps))
    return json.loads((run / "val.json").read_text())["accuracy"], padding


if __name__ == "__main__":
    ckpt = str(Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        for name, window in WINDOWS.items():
            results = [accuracy_and_padding(ckpt, seed, window, folder) for seed in SEEDS]
            scores = [score for score, _ in results]
            print(f"{name:<18} accuracy", " ".join(f"{score:6.1%}" for score in scores),
                  f"mean {sum(scores) / len(scores):6.1%} | padding {results[0][1]:.1%}", flush=True)
