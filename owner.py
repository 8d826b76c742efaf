"""Who may write into a run folder: one process, of the run that the folder holds.

    claim       before anything is loaded: is the folder free, or a run that this command continues?
    begin       after everything is loaded: makes the folder, or extends the run that is there
    move_away   --overwrite: runs/NAME becomes runs/NAME.overwritten, when everything is checked and loaded.
                A mistake in the flags costs nothing
    forget      the first checkpoint of the new run deletes the old one
"""
import fcntl
import json
import os
import re
import socket
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

import ranks
import trackers
from checkpoint import delete_step, flush, started, step_folders, unused_name, write_text
from config import UserError, read_config
from errors import holds_scores

# A run may continue with other values of these: they do not change what is computed, up to float rounding.
FREE_TO_CHANGE = ("per_device_batch_size", "num_workers", "save_every", "keep", "overwrite",
                  "gradient_checkpointing", "run_root", "run_id", "prepare", "val_json", "keep_epochs",
                  "skip_bad_examples", "profile", "compile", "shard", "forecast", "config", "val_every",
                  "val_examples", "tracker")
MAY_GROW = ("epochs", "max_steps")                          # see check_longer

# What train.py and its commands write into a run folder. Anything else in it is the user's.
RUN_FILES = ("config.json", "metrics.jsonl", "replaces.json", "dataset_statistics.json", "trace.json",
             "val.json", "val.png", "scores.json", "scores.png", "samples.png", "rollouts.json",
             "rollouts.png", "rollouts.gif", "curves.png")
SCORES = "val.json", "scores.json", "rollouts.json"         # but data may have these names, too


def claim(cfg, run):
    """Before anything is loaded, on every rank: may this command write into `run`? Nothing is changed yet.

    -> for rank zero the lock: an open file, to be held as long as the process may write.
    """
    held = claim_alone(cfg, run) if dist.get_rank() == 0 else None
    ranks.barrier()
    return held


def claim_alone(cfg, run):
    if cfg.ckpt and Path(cfg.ckpt).resolve() in (run.resolve(), *run.resolve().glob("step-*")):
        raise UserError(f"--ckpt {cfg.ckpt} is the folder of this run. To continue it, leave --ckpt "
                        "as it was at the start; to start from it, name the new run with --run_id")
    try:
        trackers.check(cfg.tracker)
        held = lock(run)
        for name in RUN_FILES:                              # opening a named pipe would wait for ever
            if os.path.lexists(run / name) and not (run / name).is_file():
                raise UserError(f"{run / name} is no file. Move it away")
        if (run / "config.json").exists():
            before = read_config(run)                       # an error if another program wrote it
            for name in replaced(run):
                if cfg.ckpt and Path(cfg.ckpt).resolve().is_relative_to(run.with_name(name).resolve()):
                    raise UserError(f"--ckpt {cfg.ckpt}: the next checkpoint of {run} would delete it. "
                                    f"Rename {run.with_name(name)} first")
            if not cfg.overwrite:
                check_same_run(cfg, before, run)
                check_longer(cfg, before, run)
        elif os.path.lexists(run) and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"{run} exists and holds no run of this program. Choose another --run_id")
        return held
    except OSError as e:
        raise UserError(f"the run folder {run} can't be written ({e}). "
                        "Choose another --run_root") from e


def lock(run):
    """Makes this process the only writer of a run, until it ends -> the open lock file.

    A POSIX lock belongs to a process: however it ends, the system lets go of the lock, and data workers do
    not inherit it. It works on local disks and over NFS. A file system without locks (Lustre mounted without
    -o flock, some others) says so; then nothing but care keeps a second writer away.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    run = run.resolve()                                     # a link to a run is the same run
    path = run.parent / f".{run.name}.lock"
    # A link would lead to somebody's file; a pipe would wait for ever.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+")
    for last_try in [False] * 50 + [True]:                  # the ranks of a dead torchrun end within seconds
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if last_try:
                file.seek(0)
                raise UserError(f"{run} is being written by another start of it: {file.read(200).strip()}. "
                                "Wait for it, end it, or name a new run with --run_id") from None
            time.sleep(0.1)
        except OSError as e:
            print(f"{run.parent} has no locks ({e.strerror}): do not start this run twice", file=sys.stderr)
            return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}")
    file.flush()
    return file


def check_same_run(cfg, before, run):
    old, new = asdict(before), asdict(cfg)
    changed = [f"--{name} was {old[name]!r}, is {new[name]!r}" for name in new
               if old[name] != new[name] and name not in (*FREE_TO_CHANGE, *MAY_GROW)]
    if changed:
        raise UserError(f"{run} holds a run with other flags: {'; '.join(changed)}. Give the same flags to "
                        "continue it, --run_id for a new run, or --overwrite to start over")


def check_longer(cfg, before, run, epoch=0):
    """A run can be extended, by more --epochs or --max_steps, but not cut short. epoch: its steps; 0 while
    they are not known, and epochs can't be compared with steps."""
    old, new = (of.max_steps or of.epochs * (epoch or 1) for of in (before, cfg))
    if new < old and (epoch or bool(before.max_steps) == bool(cfg.max_steps)):
        changed = [f"--{name} was {getattr(before, name)}, is {getattr(cfg, name)}" for name in MAY_GROW
                   if getattr(before, name) != getattr(cfg, name)]
        raise UserError(f"{run} holds a longer run: {'; '.join(changed)}. A run can be extended, not cut "
                        "short. Give at least as much, --run_id for a new run, or --overwrite to start over")


def extend(cfg, run, epoch):
    """config.json says from now on how long the run is."""
    check_longer(cfg, read_config(run), run, epoch)
    saved = json.loads((run / "config.json").read_text())
    longer = saved | {name: getattr(cfg, name) for name in MAY_GROW}
    if longer != saved:
        write_text(run / "config.json", json.dumps(longer, indent=2))


def begin(cfg, run, restarted, epoch):
    """After everything is loaded, on every rank: the run folder is there when this returns.
    epoch: steps of one."""
    if dist.get_rank() == 0:
        begin_alone(cfg, run, restarted, epoch)
    ranks.barrier()


def begin_alone(cfg, run, restarted, epoch):
    """Makes the run folder if there is none, or if --overwrite wants a new one.
    `restarted`: an earlier start of this job has obeyed --overwrite already, if it came so far."""
    replaces = []
    try:
        if (run / "config.json").exists():
            if not cfg.overwrite or restarted and str(started(run)).endswith(job()):
                check_same_run(cfg, read_config(run), run)
                extend(cfg, run, epoch)
                return
            replaces = move_away(run)
        new = unused_name(run.with_name(f".{run.name}.new"))     # under its own name it appears whole
        new.mkdir(parents=True)
        # Checkpoints carry this word, too: a step folder of another run is not taken for one of this.
        name = f"{time.strftime('%F %T')} {os.urandom(4).hex()}{job()}"
        write_text(new / "config.json", json.dumps(asdict(cfg) | {"started": name}, indent=2))
        if replaces:
            write_text(new / "replaces.json", json.dumps(replaces))
        if run.exists():
            run.rmdir()                                     # it is empty, see claim
        new.rename(run)
        flush(run.parent)
    except OSError as e:
        raise UserError(f"the run folder {run} can't be written ({e}). "
                        "Choose another --run_root") from e


def job():
    """What all starts of a job share, after --requeue and after --max_restarts, as a word. "" where it has no
    name (torchrun without --standalone or --rdzv_id): then a restart is believed to have begun the run that
    it finds. Better the old run goes on than that a restart throws away what its own job has trained."""
    name = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else f" {zlib.crc32(name.encode()):08x}"


def move_away(run):
    """Moves a run out of the way -> all runs whose place the next one takes, also those that it replaced."""
    if run.is_symlink():
        raise UserError(f"--overwrite: {run} is a link to {run.resolve()}. Remove the link, "
                        "or name a new run with --run_id")
    before = replaced(run)
    old = unused_name(run.with_name(f"{run.name}.overwritten"))
    run.rename(old)
    print(f"the old run is now {old}; the first checkpoint of the new one deletes it", flush=True)
    return [*before, old.name]


def forget(run):
    """Deletes the runs that this one replaces: what this program wrote, and nothing else."""
    for name in replaced(run):
        old = run.with_name(name)
        for folder in step_folders(old):
            delete_step(folder)
        for file in (*(old / name for name in RUN_FILES), *trackers.event_files(old)):
            if file.name not in SCORES or holds_scores(file):
                file.unlink(missing_ok=True)
        for file in old.glob("*.unfinished*.jsonl"):        # answers of an evaluation that did not end
            if file.is_file() and not file.is_symlink() and file.read_bytes()[:8] == b'{"asked"':
                file.unlink()
        if old.exists() and any(old.iterdir()):
            print(f"{old} is kept: it holds more than this program wrote")
        elif old.exists():
            old.rmdir()
    (run / "replaces.json").unlink(missing_ok=True)


def replaced(run):
    """Names of the runs that this one replaces. A run folder may come from a stranger, so only names that
    move_away gives are taken, beside the run itself."""
    record = run / "replaces.json"
    try:
        names = json.loads(record.read_text()) if record.exists() else []
        if not all(re.fullmatch(re.escape(run.name) + r"\.overwritten(-\d+)?", name) for name in names):
            raise ValueError("it names other folders")      # no assert: `python -O` would skip it
        return [name for name in names if not run.with_name(name).is_symlink()]
    except (ValueError, TypeError) as e:
        raise UserError(f"{record} can't be read ({e}). Remove it; the runs that it names then stay") from e
