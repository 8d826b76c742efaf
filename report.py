"""What a run tells a person before its first step, at each step, and after its last."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import chat
import checkpoint
import metrics as curves
import trackers
from actions import image_dir_of
from check import show
from config import BadExample, UserError, printable, read_config
from model import PARTS

DOES_NOT_FIT = 3                                            # plan.py's exit code, with --one_line
COLUMNS = 100                                               # of the widest line
INDENT = " " * 9                                            # behind it stands what a line says
EVERY = 30                                                  # seconds between two lines in a log file


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
    say("", said[0] if done.returncode == 0 else f"memory   can't be counted: {printable(said[0], 400)}")


def say(label, text):
    """One line, or several where it is longer than COLUMNS. Commands to be copied are printed as they are."""
    print("\n".join(wrapped(f"{label:<8} {text}" if label else text)), flush=True)


def wrapped(text):
    """Text without line breaks -> lines of at most COLUMNS, cut at spaces where there are some."""
    lines, line = [], ""
    for word in re.findall(r"\S+\s*|\s+", text):
        # A word that is longer than a line (Chinese has no spaces) is cut where it stands.
        if columns_of(line + word.rstrip()) > COLUMNS and columns_of(INDENT + word) <= COLUMNS:
            lines, line = [*lines, line.rstrip()], INDENT
        for letter in word:
            if columns_of(line + letter) > COLUMNS and not letter.isspace():
                lines, line = [*lines, line.rstrip()], INDENT
            line += letter
    return [*lines, line.rstrip()]


def columns_of(text):
    """How many columns of a terminal it takes: Chinese characters take two, accents none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def opening(cfg, model, data, sampler, total, step, rate):
    """What trains, how the batches are cut, how a conversation is written, the first example. rate: the
    learning rate of the next step."""
    run = cfg.run_folder
    def sizes(trained):
        counts = {name: sum(p.numel() for p in getattr(model, name).parameters()
                            if p.requires_grad == trained) for name in PARTS}
        return ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items() if count) or "nothing"
    before = last_total(run)
    if before and before > total:                           # flags that say less are refused (owner.py)
        say("shorter", f"from {before:,} to {total:,} steps: the data has fewer examples than before")
    if step == total:
        print(f"{run}: this run is finished, all {total:,} steps are done")
        return
    say("trains", f"{sizes(True)} · frozen {sizes(False)}")
    if model.adapters:
        added = model.adapters
        where = f" of {added.base['folder']}, which must stay" if added.base else ""
        if added.base and Path(added.base["folder"]).is_dir():
            checkpoint.keep_forever(Path(added.base["folder"]))
        say("adapters", f"rank {added.rank}, alpha {added.alpha}, beside {len(added.layers)} layers of the "
            f"language model{where}")
    say("batch", f"{sampler.global_batch_size} = {sampler.per_device_batch_size} x "
        f"{sampler.accumulation} accumulated x {sampler.world_size} ranks · "
        f"{len(sampler.lengths):,} examples ({int((sampler.has_image > 0).sum()):,} with pictures) · "
        f"{total:,} steps, {sampler.batches_per_epoch:,} an epoch")
    if before and before < total:
        say("extended", f"from {before:,} to {total:,} steps, {step:,} are done; the learning rate goes on "
            f"at {rate:.2g}, where the {cfg.schedule} schedule of {total:,} steps has it")
    if not data.language.captions:
        say("prompt", printable(chat.describe(data.language)))
        before = state_of(cfg.ckpt) if cfg.ckpt and read_config(cfg.ckpt).stage != "align" else {}
        different = chat.changed(before, data.language)     # stage align has seen no prompt
        if different:
            say("prompt", printable(different))
    example = data[0]
    if isinstance(example, BadExample):
        raise example
    shown = show(example["input_ids"].tolist(), example["labels"].tolist(), data.language.tokenizer)
    say("sample 0", f"{printable(shown, 800)}     (>> << is what the loss sees)")


def check_prompt(cfg, language):
    """Before anything is written: a run goes on in the format that it was trained with."""
    saved = state_of(cfg.run_folder)
    if saved and not cfg.overwrite and not language.captions:
        chat.check_same(saved, language, cfg.run_folder, cfg.llm_backbone)


def state_of(ckpt):
    """state.json of the newest whole checkpoint of a run, or of a step folder; {} where there is none. Its
    files, many GB, are not read through."""
    folder = Path(ckpt).resolve()
    folders = [folder] if folder.name.startswith("step-") else checkpoint.step_folders(folder)
    whole = (each for each in reversed(folders) if not checkpoint.damage(each, thorough=False))
    found = next(whole, None)
    return checkpoint.read_state(found) if found else {}


def last_total(run):
    """The steps that the run had when its last line of metrics was written; None if there is no such line."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1]).get("total") if lines else None


class Progress:
    """Where the run stands, on one line of stderr. On a terminal the line is written over at each step. A log
    file gets a line every EVERY seconds, and for the first step, the last, and those with a validation. What
    is shown goes to the --tracker, too. All on rank zero; `with Progress(...)` on the others does nothing."""

    def __init__(self, cfg, total):
        self.cfg, self.total, self.held_out, self.tracker = cfg, total, {}, None
        self.terminal, self.shown = sys.stderr.isatty(), -math.inf

    def __enter__(self):
        if dist.get_rank() == 0:
            self.tracker = trackers.begin(self.cfg, self.cfg.run_folder)
        return self

    def __exit__(self, kind, *_):
        if self.terminal and self.shown > -math.inf:
            print(file=sys.stderr)
        self.track(lambda tracker: tracker.end(failed=kind is not None))

    def track(self, what):
        """A tracker that fails is no reason to end a run."""
        try:
            if self.tracker:
                what(self.tracker)
        except Exception as e:                              # it is a foreign program: it can raise anything
            print(f"\n--tracker {self.cfg.tracker} has failed ({trackers.said(e)}); the run goes on without, "
                  "and the next start makes up for it", file=sys.stderr, flush=True)
            self.tracker = None

    def show(self, metrics):
        """metrics: a line of metrics.jsonl."""
        self.track(lambda tracker: tracker.log(metrics))
        step, now = metrics["step"], time.monotonic()
        validated = "val_loss" in metrics
        if validated:                                       # it stays in sight until there is a newer one
            self.held_out = {"val_loss": metrics["val_loss"]}
        wait = 0.1 if self.terminal else EVERY
        if now < self.shown + wait and step < self.total and not validated:
            return
        self.shown, start = now, f"{self.cfg.stage} {step}/{self.total} {step / self.total:.0%}"
        if self.terminal:
            columns = min(COLUMNS, shutil.get_terminal_size().columns - 1)
            line = progress(self.held_out | metrics, start, columns)[:columns]
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)       # clears what stood behind it
        else:
            print(progress(self.held_out | metrics, start), file=sys.stderr, flush=True)


def progress(metrics, start, columns=COLUMNS):
    """The line of a step that a person watches. What matters least is left out where it has no room."""
    norm, mfu, memory, left = (metrics[name] for name in
                               ("grad_norm", "mfu", "peak_memory_gb", "seconds_left"))
    rate = metrics["tokens_per_second"]
    parts = [start, f"loss {metrics['loss']:.3f}",
             f"val {metrics['val_loss']:.3f}" if "val_loss" in metrics else "",
             f"lr {metrics['lr']:.1e}", "skipped" if norm is None else f"norm {norm:.2f}",
             f"{rate / 1000:.1f}k tok/s" if rate >= 1000 else f"{rate:.0f} tok/s",
             f"data {metrics['data_wait']:.0%}", "" if mfu is None else f"mfu {mfu:.0%}",
             "" if memory is None else f"{memory:.1f} GB", "" if left is None else f"{duration(left)} left"]
    for least in ("GB", "mfu", "data", "norm", "lr", "tok/s", "left"):
        if len(", ".join(filter(None, parts))) > columns:
            parts = [part for part in parts if least not in part.split(" ")]
    return ", ".join(filter(None, parts))


def draw(run):
    """The curves of the run as a picture. The run itself is whole, whatever becomes of that."""
    try:
        curves.draw(curves.read_run(run), run / "curves.png")
        print(f"curves   {run / 'curves.png'}")
    except (UserError, OSError) as e:
        print(f"the curves can't be drawn: {e}", file=sys.stderr)


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{seconds:02}"


def closing(cfg, run):
    """Scores the held-out examples with the command that a user would type, and names the next step."""
    if cfg.val_json:
        command = ["evaluate.py", "--ckpt", str(run), "--json", cfg.val_json, "--image_dir",
                   image_dir_of(cfg, cfg.val_json), "--out", str(run / "val.json")]
        print(f"\nscore    python {' '.join(command)}", flush=True)
        # Without RANK: torchrun's variables name a group of ranks that has ended. This is a world of one.
        own = {name: value for name, value in os.environ.items() if name != "RANK"}
        if subprocess.run([sys.executable, *command], env=own).returncode:
            print("the run itself is whole; when the score's error above is mended, give its command again")
    draw(run)
    own = "" if cfg.prepare else f" --train_json FILE --image_dir {cfg.image_dir}"
    print(f"run      {run}")
    if cfg.stage == "align":
        print(f"next     torchrun train.py --stage finetune --ckpt {run}{own}")
    elif cfg.stage == "vla" and cfg.prepare:
        print(f"next     python toy/robot.py --ckpt {run} --rollouts 100")
    else:
        print(f"next     python generate.py --ckpt {run} --image FILE --prompt TEXT")
