"""--tracker: metrics.jsonl shown elsewhere, by TensorBoard or by Weights & Biases. Rank zero only.

metrics.jsonl stays the one record of a run. When a run starts again, its file is cut back to the checkpoint
that it goes on from, and the tracker is made to agree with it: so no step is there twice and none is missing,
whatever was lost when the run was killed. A tracker can be switched on and off between two starts.

    tensorboard   an event file in the run folder, written anew at each start; tensorboard --logdir runs
    wandb         one run of theirs for each run of ours. Where it is offline, each start writes a whole new
                  folder below run_root/wandb, and removes that of the start before
"""
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from config import UserError, printable

SUFFIX = ".metrics"                                         # of event files that this program wrote


def check(name):
    """Before anything is loaded. Raises UserError where the package is not there."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name}: this package is not installed here. pip install {name}")


def begin(cfg, run):
    """-> a tracker that knows all of metrics.jsonl; None without --tracker. A new run does not begin without
    it. One that was begun goes on: its tracker makes up for it at the next start."""
    lines = read_lines(run / "metrics.jsonl")
    try:
        tracker = {"": lambda *_: None, "tensorboard": TensorBoard, "wandb": WandB}[cfg.tracker](cfg, run)
        for line in lines if tracker else ():
            tracker.log(line)
        return tracker
    except Exception as e:                                  # it is a foreign program: it can raise anything
        if lines:
            print(f"--tracker {cfg.tracker} can't begin ({said(e)}); the run goes on without",
                  file=sys.stderr)
            return None
        raise UserError(f"--tracker {cfg.tracker} can't begin ({said(e)}). Mend it, or leave the flag out"
                        + ("; WANDB_MODE=offline needs no network" if cfg.tracker == "wandb" else "")) from e


def said(error):
    return printable(f"{type(error).__name__}: {error}".splitlines()[0], 400)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def numbers(line):
    """What of a line of metrics.jsonl is a number: name -> number; of a list, name/0, name/1 ..."""
    found = {}
    for name, value in line.items():
        several = value if isinstance(value, list) else [value]
        for i, each in enumerate(several):
            if isinstance(each, (int, float)) and name not in ("step", "start", "total"):
                found[f"{name}/{i}" if several is value else name] = each
    return found


class TensorBoard:
    def __init__(self, cfg, run):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
        for old in event_files(run):
            old.unlink()
        self.summary = Summary
        # purge_step: a TensorBoard that has read the old file forgets its points.
        self.writer = SummaryWriter(str(run), purge_step=0, filename_suffix=SUFFIX, flush_secs=10)

    def log(self, line):
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in numbers(line).items()]
        self.writer.file_writer.add_summary(self.summary(value=values), line["step"])

    def end(self, failed):
        self.writer.close()


def event_files(run):
    """Those that this program wrote, no links."""
    return [path for path in Path(run).glob(f"events.out.tfevents.*{SUFFIX}")
            if path.is_file() and not path.is_symlink()]


class WandB:
    def __init__(self, cfg, run):
        import wandb
        key = re.sub("[^0-9a-f]", "", json.loads((run / "config.json").read_text())["started"])
        old = [path for path in (run.parent / "wandb").glob(f"offline-run-*-{key}") if not path.is_symlink()]
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "vlm"), id=key, name=run.name,
                              dir=str(run.parent), config=asdict(cfg), resume="allow",
                              settings=wandb.Settings(console="off"))
        self.first = self.run.step                          # online: behind the last one that it has
        for folder in old:                                  # this start writes all that they hold
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, line):
        if line["step"] >= self.first:
            self.run.log(numbers(line), step=line["step"])

    def end(self, failed):
        self.run.finish(exit_code=int(failed))
