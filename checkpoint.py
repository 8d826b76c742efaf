"""A run on disk: write, find, load, resume.

Weights and optimizer are safetensors, the rest is JSON; never pickle.

    runs/<run_id>/config.json            every flag of the run
                  metrics.jsonl          one line per optimizer step
                  step-00000500/model.safetensors       parts trained so far: projector.*, llm.*, vision.*
                                optimizer.safetensors   AdamW's state and every rank's random state
                                state.json              step, parts, and what else a run needs to go on
"""
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import config
from config import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

# A run may continue with other values of these: they do not change what is computed, up to float rounding.
FREE_TO_CHANGE = ("per_device_batch_size", "num_workers", "save_every", "keep", "overwrite",
                  "gradient_checkpointing", "run_root", "run_id", "prepare", "val_json", "keep_epochs",
                  "skip_bad_examples", "profile", "compile")


# -- a run folder --------------------------------------------------------------------------------------------

def open_run(cfg, run, restarted):
    """Makes the run folder with its config.json, or finds the run that is to be continued.
    `restarted`: by torchrun, so --overwrite has been obeyed already."""
    if cfg.ckpt and Path(cfg.ckpt).resolve() in (run.resolve(), *run.resolve().glob("step-*")):
        raise UserError(f"--ckpt {cfg.ckpt} is the folder of this run. To continue it, leave --ckpt "
                        "as it was at the start; to start from it, name the new run with --run_id")
    if cfg.overwrite and not restarted and (run / "config.json").exists():
        old = run.with_name(f"{run.name}.overwritten")
        shutil.rmtree(old, ignore_errors=True)
        run.rename(old)                 # if this is killed, half of the old run must not pass for the new one
        shutil.rmtree(old)
    if (run / "config.json").exists():
        return check_same_run(cfg, config.read_config(run), run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.json", json.dumps(asdict(cfg), indent=2))
    except OSError as e:
        raise UserError(f"the run folder {run} can't be written ({e.strerror}). "
                        "Choose another --run_root") from e


def check_same_run(cfg, before, run):
    old, new = asdict(before), asdict(cfg)
    changed = [f"--{name} was {old[name]!r}, is {new[name]!r}" for name in new
               if old[name] != new[name] and name not in FREE_TO_CHANGE]
    if changed:
        raise UserError(f"{run} holds a run with other flags: {'; '.join(changed)}. Give the same flags to "
                        "continue it, --run_id for a new run, or --overwrite to start over")


def parts_of(cfg):
    """The parts of the model that --ckpt holds. Its other parts are those of the backbones' folders."""
    if not cfg.ckpt:
        return []
    before = config.read_config(cfg.ckpt)
    for name in ("vision_backbone", "llm_backbone", "projector", "image_resize"):
        if getattr(cfg, name) != getattr(before, name):
            raise UserError(f"--{name} {getattr(cfg, name)}: the checkpoint {cfg.ckpt} was made with "
                            f"{getattr(before, name)}. Leave the flag out")
    return read_state(find(cfg.ckpt))["parts"]


def resume(run, model, optimizer):
    """Restores the newest checkpoint of the run, if there is one -> the number of steps done."""
    folder, damaged = newest(run)
    rank, step = dist.get_rank(), 0
    for sentence in damaged if rank == 0 else ():
        print(sentence, file=sys.stderr)
    if folder:
        step = read_state(folder)["step"]
        load_weights(model, folder)
        set_random_state(load_optimizer(model, optimizer, folder).get(str(rank)))
    file = Path(run) / "metrics.jsonl"
    if rank == 0 and file.exists():                         # drop the lines of steps that were lost
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text(file, "".join(line for line in lines if json.loads(line)["step"] <= step))
    return step


# -- a step folder: find and write ---------------------------------------------------------------------------

def step_folders(run):
    """All step folders of a run, oldest first.
    A folder gets this name only after all its files are on disk."""
    folders = [path for path in Path(run).glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def damage(step_folder):
    """What is wrong with a step folder, "" if it is whole.
    The head of a safetensors file says how long it must be."""
    for name in FILES:
        try:
            if name.endswith(".json"):
                json.loads((Path(step_folder) / name).read_text())
            else:
                with safe_open(Path(step_folder) / name, "pt"):
                    pass
        except (OSError, SafetensorError, json.JSONDecodeError) as e:
            return f"{name}: {e}"
    return ""


def newest(run):
    """-> the newest whole step folder of a run or None,
    and a sentence about each damaged one that is newer."""
    damaged = []
    for folder in reversed(step_folders(run)):
        if not damage(folder):
            return folder, damaged
        damaged.append(f"{folder} is damaged and left aside ({damage(folder)})")
    return None, damaged


def save(run, step, model_tensors, optimizer_tensors, state, keep):
    """Writes one step folder, whole or not at all, then removes all but the `keep` newest.

    Returns the folder. One whose state.json says "forever": true is never removed. Raises UserError where the
    disk refuses; what was there stays.
    """
    run = Path(run)
    final, unfinished = run / f"step-{step:08d}", run / f"unfinished-{step:08d}"
    for left_over in run.glob("unfinished-*"):              # by a run that was killed while it saved
        shutil.rmtree(left_over)
    try:
        unfinished.mkdir(parents=True)
        save_file(model_tensors, unfinished / FILES[0])
        save_file(optimizer_tensors, unfinished / FILES[1])
        write_text(unfinished / FILES[2], json.dumps({"step": step, **state}, indent=2))
        for name in FILES:
            flush(unfinished / name)
        flush(unfinished)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"the checkpoint of step {step} can't be written to {run} ({e}). "
                        "Older ones are intact. Free some space or lower --keep, "
                        "then give the same command again") from e
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)                                # the folder appears whole or not at all
    flush(run)
    # A damaged one counts for nothing: with it among the `keep` newest, the last whole one could go.
    whole = [folder for folder in step_folders(run) if not damage(folder)]
    for old in [folder for folder in whole if not read_state(folder).get("forever")][:-keep]:
        # Not under its own name: if this run were killed now, the folder would pass for a damaged one.
        old.rename(unfinished)
        shutil.rmtree(unfinished)
    return final


def write_text(path, text):
    """Writes a file whole or not at all."""
    unfinished = Path(path).with_suffix(".unfinished")
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)


def flush(path):
    """What was written is on the disk, not in a cache, when this returns.
    Works for folders too (their list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(ckpt):
    """A step folder, or the newest whole one of a run folder."""
    folder = Path(ckpt)
    if folder.name.startswith("step-"):
        if damage(folder):
            raise UserError(f"--ckpt {ckpt} is damaged ({damage(folder)}). "
                            "Give another step folder of this run")
        return folder
    found, damaged = newest(folder)
    if found is None:
        raise UserError(f"--ckpt {ckpt}: there is no whole step-* folder in it"
                        f"{''.join('; ' + text for text in damaged)}. "
                        "Give a run folder with a checkpoint, or a step folder")
    return found


def read_state(step_folder):
    return json.loads((Path(step_folder) / "state.json").read_text())


# -- a step folder: what is in it ----------------------------------------------------------------------------

def tensors_of(module, parts):
    """State dict of the given parts.
    Some models use one tensor twice, as embedding and as output ("tied"). It goes in once, under its first
    name: safetensors refuses two."""
    tensors, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.split(".")[0] in parts and tensor not in seen:
            seen.add(tensor)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def load_weights(model, step_folder):
    """Fills the parts that the checkpoint holds.
    Strict: every tensor of a part must be there, in its shape."""
    file = Path(step_folder) / "model.safetensors"
    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} can't be read: {e}") from e
    parts = {name.split(".")[0] for name in saved} | set(read_state(step_folder)["parts"])
    wanted = tensors_of(model, parts)
    wrong = ([f"missing {name}" for name in wanted if name not in saved]
             + [f"surplus {name}" for name in saved if name not in wanted]
             + [f"{name} is {tuple(saved[name].shape)}, the model has {tuple(wanted[name].shape)}"
                for name in wanted if name in saved and saved[name].shape != wanted[name].shape]
             + [f"{name} is of type {tensor.dtype}" for name, tensor in saved.items()
                if not tensor.is_floating_point()])
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{file} is the checkpoint of another model: {shown}. "
                        "Use the flags of the run that made it: see config.json in its run folder")
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in saved.items():
            state[name].copy_(tensor)


def optimizer_tensors(model, optimizer):
    """AdamW's state by the names of the parameters: {"exp_avg.projector.0.weight": tensor, ...}."""
    return {f"{key}.{name}": value.detach().cpu().contiguous() for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer(model, optimizer, step_folder):
    """Fills the optimizer as it was. Returns {"0": random state of rank 0, ...}, see gather_random_states."""
    parameters = dict(model.named_parameters())
    random_states = {}
    with safe_open(Path(step_folder) / "optimizer.safetensors", "pt") as file:
        for full_name in file.keys():
            key, name = full_name.split(".", 1)
            tensor = file.get_tensor(full_name)
            if key == "random":
                random_states[name] = tensor
            elif name not in parameters or tensor.shape not in ((), parameters[name].shape):
                raise UserError(f"{step_folder}/optimizer.safetensors is of another model: its {full_name} "
                                f"{tuple(tensor.shape)} has no such parameter to go with. Remove "
                                f"{step_folder}; the same command then continues from the checkpoint before")
            else:
                optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
    return random_states


def gather_random_states():
    """The random state of every rank: {"random.0": tensor, "random.1": tensor, ...}. Every rank calls it."""
    state = torch.get_rng_state()                           # what dropout draws from, uint8
    if torch.cuda.is_available():
        state = torch.cat([state, torch.cuda.get_rng_state()]).cuda()
    states = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(states, state)
    return {f"random.{rank}": state.cpu() for rank, state in enumerate(states)}


def set_random_state(state):
    if state is None:                                       # the run did not have this rank before
        return
    cpu = len(torch.get_rng_state())
    torch.set_rng_state(state[:cpu])
    if len(state) > cpu and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[cpu:])
