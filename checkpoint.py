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
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from config import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


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

    Returns the folder. A state with "forever": true is never removed. Raises UserError where the disk
    refuses; what was there stays.
    """
    run = Path(run)
    final, part = run / f"step-{step:08d}", run / f"part-{step:08d}"
    for left_over in run.glob("part-*"):                    # by a run that was killed while it saved
        shutil.rmtree(left_over)
    try:
        part.mkdir(parents=True)
        save_file(model_tensors, part / FILES[0])
        save_file(optimizer_tensors, part / FILES[1])
        write_text(part / FILES[2], json.dumps({"step": step, **state}, indent=2))
        for name in FILES:
            flush(part / name)
        flush(part)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"the checkpoint of step {step} can't be written to {run} ({e}). "
                        "Older ones are intact. Free some space or lower --keep, "
                        "then give the same command again") from e
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)                                      # the folder appears whole or not at all
    flush(run)
    # A damaged one counts for nothing: with it among the `keep` newest, the last whole one could go.
    whole = [folder for folder in step_folders(run) if not damage(folder)]
    for old in [folder for folder in whole if not read_state(folder).get("forever")][:-keep]:
        old.rename(part)                        # under its own name it would be a damaged one, if killed here
        shutil.rmtree(part)
    return final


def write_text(path, text):
    """Writes a file whole or not at all."""
    part = Path(path).with_suffix(".part")
    part.write_text(text)
    flush(part)
    part.replace(path)


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


def tensors_of(module, parts):
    """State dict of the given parts.
    A tied tensor goes in once, under its first name: safetensors refuses two."""
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
    """Fills the optimizer as it was.
    Returns the random state of each rank: (ranks, bytes) uint8, see `save`."""
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
