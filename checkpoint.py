"""A run on disk: write, find, load, resume.

Weights and optimizer are safetensors, the rest is JSON; never pickle.

    runs/<run_id>/config.json            every flag of the run
                  metrics.jsonl          one line per optimizer step
                  step-00000500/model.safetensors       trained: projector.*, vision.*, llm.* or its adapters
                                optimizer.safetensors   AdamW's state and every rank's random state
                                state.json              step, parts, what else a run needs to go on; of
                                                        the files above: checksum, names and shapes

What can't be read now is not damaged: a network share may stutter. Then the start stops with a sentence. What
is damaged is set aside under another name. Deleted is only what this program wrote itself. Who may write into
a run folder, and what --overwrite does, stands in owner.py.
"""
import hashlib
import json
import os
import re
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
import config
import ranks
from config import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

# -- a step folder: find -------------------------------------------------------------------------------------

def step_folders(run):
    """All step folders of a run, oldest first. A folder is called so only when all its files are on disk."""
    folders = [path for path in Path(run).glob("step-*")
               if re.fullmatch("step-[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def damage(step_folder, thorough=True):
    """What is wrong with a step folder, "" if it is whole. thorough: with checksums, so all of it is read.

    Raises UserError where it can't be read now.
    """
    folder = Path(step_folder)
    try:
        for name in FILES:
            if not (folder / name).is_file():
                return f"{name}: it is missing, or no file"
        state = json.loads((folder / name).read_text())     # the last of FILES
        if state["step"] != int(folder.name[5:]):
            return f"{name}: it tells of step {state['step']}, so it belongs to another folder"
        start = started(folder.parent)
        if start and (state.get("started") != start or "files" not in state):
            return f"{name}: it belongs to another run"
        if not state["parts"] or not set(state["parts"]) <= {"vision", "projector", "llm"}:
            return f"{name}: its parts are {state['parts']}"
        for name in FILES[:2]:
            with open(folder / name, "rb") as file:         # a read error here is not taken for damage
                told = state.get("files", {}).get(name)     # a folder of an older version does not tell
                if told and thorough and hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return f"{name}: its bytes are not those that were written"
            found = tensors_in(folder / name)
            if told and found != told["tensors"]:
                return f"{name}: it holds other tensors than were written"
    except OSError as e:
        raise UserError(f"{folder} can't be read now ({e}). Nothing was changed; try again") from e
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f"{name}: {type(e).__name__}: {e}"
    return ""


def started(run):
    """The name of a run's first start, from its config.json; None for a run of an older version."""
    file = run / "config.json"
    return json.loads(file.read_text()).get("started") if file.is_file() else None


def tensors_in(file):
    """{name: shape} of a safetensors file. Its head is read, which also says how long the file must be."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}


def newest(run, aside=False, advice="--overwrite starts the run over"):
    """-> the newest whole step folder of a run, None if there is no step folder at all.

    Damaged ones that are newer are named; `aside`: and set aside. Raises UserError if none is whole: whether
    to start over is for the user to say.
    """
    damaged, folders = [], step_folders(run)
    for folder in reversed(folders):
        problem = damage(folder)
        if not problem:
            for bad, why in damaged:
                where = f", and is now {set_aside(bad)}" if aside else ""
                print(f"{bad} is damaged and left aside ({config.printable(why)}){where}", file=sys.stderr)
            return folder
        damaged.append((folder, problem))
    if folders:
        why = "; ".join(f"{folder.name} is damaged ({problem})" for folder, problem in damaged)
        raise UserError(f"{run}: there is no whole step-* folder in it: {why}. {advice}")
    return None


def find(ckpt):
    """A step folder, or the newest whole one of a run folder."""
    folder = Path(ckpt).resolve()
    if folder.name.startswith("step-"):
        problem = damage(folder)
        if problem:
            raise UserError(f"--ckpt {ckpt} is damaged ({problem}). Give another step folder of this run")
        return folder
    found = newest(folder, advice="Give --ckpt another run")
    if found is None:
        raise UserError(f"--ckpt {ckpt}: there is no step-* folder in it. "
                        "Give a run folder with a checkpoint, or a step folder")
    return found


def together(choose):
    """Rank zero chooses a step folder and tells the others. If each looked for itself, ranks that see the
    disk differently (each machine has its own, a cached list) would go on from different steps."""
    folder = ranks.tell(choose() if dist.get_rank() == 0 else None)
    if folder and not all((folder / name).is_file() for name in FILES):
        raise UserError(f"rank {dist.get_rank()} on {socket.gethostname()} does not see {folder}, which rank "
                        "zero has chosen. All machines need the same files: put --run_root on a shared disk")
    return folder


# -- a step folder: write ------------------------------------------------------------------------------------

def save(run, step, model_tensors, optimizer_tensors, state, keep):
    """Writes one step folder, whole or not at all, then removes all but the `keep` newest.

    Returns the folder. One whose state.json says "forever": true is never removed. Raises UserError where the
    disk refuses; what was there stays.
    """
    import slices
    run = Path(run)
    if (run / "metrics.jsonl").exists():
        flush(run / "metrics.jsonl")                        # a power cut must not take its lines
    final, unfinished = run / f"step-{step:08d}", run / f"unfinished-{step:08d}"
    for left_over in run.glob("unfinished-*"):              # by a run that was killed while it saved
        if re.fullmatch(r"unfinished-\d{8,}(-\d+)?", left_over.name):
            delete_step(left_over)
    try:
        if os.path.lexists(unfinished):                     # it was not ours
            set_aside(unfinished)
        unfinished.mkdir()              # without parents: a run folder that was moved away is not made anew
        files = {}
        for name, tensors in zip(FILES, (model_tensors, optimizer_tensors)):
            slices.write_tensors(unfinished / name, tensors)
            flush(unfinished / name)
            with open(unfinished / name, "rb") as file:
                files[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                               "tensors": {key: list(tensor.shape) for key, tensor in tensors.items()}}
        state = {"step": step, **state, "started": started(run), "files": files}
        write_text(unfinished / FILES[2], json.dumps(state, indent=1))
        flush(unfinished)
        if os.path.lexists(final):                          # not ours: a step is saved once
            set_aside(final)
        unfinished.rename(final)                            # the folder appears whole or not at all
        flush(run)
    except (OSError, SafetensorError) as e:
        delete_step(unfinished)
        raise UserError(f"the checkpoint of step {step} can't be written to {run} ({e}). Older ones are "
                        "intact. Free some space, lower --keep, or mend what is named; "
                        "the same command continues") from e
    keep_newest(run, keep)
    return final


def keep_newest(run, keep):
    """Removes all whole step folders but the newest. A damaged one counts for nothing: with it among the
    `keep` newest, the last whole one could go. What can't be read, and what is a link, stays."""
    whole = []
    for folder in step_folders(run):
        try:
            if not folder.is_symlink() and not damage(folder, thorough=False):
                whole += [folder] if not read_state(folder).get("forever") else []
        except UserError as e:
            print(e, file=sys.stderr)
    for old in whole[:-keep]:
        # Not under its own name: if this run were killed now, the folder would pass for a damaged one.
        unfinished = old.rename(unused_name(old.with_name(f"unfinished-{old.name[5:]}")))
        delete_step(unfinished)


def keep_forever(folder):
    """A run's next checkpoints delete its old ones, but not this one: another run stands on it."""
    state = read_state(folder)
    try:
        if not state.get("forever"):
            write_text(folder / "state.json", json.dumps(state | {"forever": True}))
    except OSError as e:                                    # a folder one may not write into
        print(f"{folder} must stay, but its own run may delete it ({e.strerror})", file=sys.stderr)


def delete_step(folder):
    """Deletes the files of a checkpoint, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in (*FILES, "state.unfinished"):
        (folder / name).unlink(missing_ok=True)
    if any(folder.iterdir()):
        print(f"{folder} is kept: it holds more than a checkpoint", file=sys.stderr)
    else:
        folder.rmdir()


def unused_name(path):
    """The path, or the first of path-2, path-3 ... that does not exist."""
    names = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, 10 ** 6))
    return next(name for name in names if not os.path.lexists(name))


def set_aside(path):
    """Renames what is in the way or can't be used; a person may want to look at it -> its new path."""
    return path.rename(unused_name(path.with_name(f"set-aside-{path.name}")))


def write_text(path, text):
    """Writes a file whole or not at all."""
    unfinished = Path(path).with_suffix(".unfinished")
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)


def flush(path):
    """What was written is on the disk when this returns, not in a cache; of folders, their list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- load and resume -----------------------------------------------------------------------------------------

def resume(run, model, optimizer, scaler):
    """Restores the newest checkpoint of the run, if there is one -> the number of steps done."""
    rank, step = dist.get_rank(), 0
    folder = together(lambda: newest(run, aside=True))
    if folder:
        state = read_state(folder)
        step = state["step"]
        load_weights(model, folder)
        scaler.load_state_dict(state.get("scaler") or scaler.state_dict())      # there is one in fp16 only
        set_random_state(load_optimizer(model, optimizer, folder).get(str(rank)))
    if rank == 0:
        drop_lost_lines(Path(run) / "metrics.jsonl", step)
    return step


def drop_lost_lines(file, step):
    """Of metrics.jsonl: the lines of steps that will be done again, and what is no line of ours."""
    def kept(line):
        try:
            return 0 < json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
    if file.exists():
        lines = file.read_text(errors="replace").splitlines(keepends=True)
        write_text(file, "".join(line for line in lines if line.endswith("\n") and kept(line)))


def read_state(step_folder):
    return json.loads((Path(step_folder) / "state.json").read_text())


def parts_of(cfg, step_folder):
    """The parts of the model that --ckpt holds. Its other parts are those of the backbones' folders."""
    before = config.read_config(cfg.ckpt)
    for name in set(config.MODEL_FIELDS) - {"preset", "prompt"}:
        if getattr(cfg, name) != getattr(before, name):
            raise UserError(f"--{name} {getattr(cfg, name)}: the checkpoint {cfg.ckpt} was made with "
                            f"{getattr(before, name)}. Leave the flag out")
    return read_state(step_folder)["parts"]


def tensors_of(module, parts):
    """State dict of the given parts. A tensor that a model uses twice, as embedding and as output ("tied"),
    goes in once, under its first name: safetensors refuses two."""
    tensors, seen, adapters = {}, set(), getattr(module, "adapters", None)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.split(".")[0] in parts and tensor not in seen and (not adapters or adapters.saves(name)):
            seen.add(tensor)
            tensors[name] = tensor.detach()
    return tensors


def whole(tensor):
    """A tensor of which each rank may hold a slice (--shard). Then all ranks must call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_weights(model, step_folder):
    """Fills the parts that the checkpoint holds. Strict: each tensor of them must be there, in its shape."""
    file = Path(step_folder) / "model.safetensors"
    try:
        saved = tensors_in(file)
        if read_state(step_folder).get("lora"):
            import lora
            lora.prepare(model, step_folder)
        if "projector.slots" in saved and not hasattr(model.projector, "slots"):
            import parallel
            parallel.add_slots(model, saved["projector.slots"])
        parts = {name.split(".")[0] for name in saved} | set(read_state(step_folder)["parts"])
        wanted = tensors_of(model, parts)
        wrong = ([f"missing {name}" for name in wanted if name not in saved]
                 + [f"surplus {name}" for name in saved if name not in wanted]
                 + [f"{name} is {tuple(saved[name])}, the model has {tuple(wanted[name].shape)}"
                    for name in wanted if name in saved and saved[name] != list(wanted[name].shape)])
        with safe_open(file, "pt") as opened:
            for name, parameter in wanted.items() if not wrong else ():
                tensor = opened.get_tensor(name)            # one at a time is in memory
                if not tensor.is_floating_point():
                    wrong.append(f"{name} is of type {tensor.dtype}")
                elif not tensor.float().isfinite().all():
                    wrong.append(f"{name} holds values that are not finite")
                else:
                    parameter.copy_(like(tensor, parameter))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} can't be read: {e}") from e
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{file} is the checkpoint of another model: {shown}. "
                        "Use the flags of the run that made it: see config.json in its run folder")


def like(tensor, parameter):
    """A whole tensor where the parameter lies, and as it lies there: with --shard, a rank's slice of it."""
    if hasattr(parameter, "device_mesh"):
        import shard
        return shard.slice_like(tensor, parameter)
    return tensor.to(parameter.device)


def optimizer_tensors(model, optimizer):
    """AdamW's state by the names of the parameters: {"exp_avg.projector.0.weight": tensor, ...}."""
    return {f"{key}.{name}": value.detach() for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer(model, optimizer, step_folder):
    """Fills the optimizer as it was. Returns {"0": random state of rank 0, ...}, see gather_random_states."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {"exp_avg": lambda p: p.shape, "exp_avg_sq": lambda p: p.shape, "step": lambda p: ()}
    file = Path(step_folder) / FILES[1]
    saved = tensors_in(file)
    random = [name for name in saved if name.startswith("random.")]
    saved = {name: shape for name, shape in saved.items() if name not in random}
    # A part may have no state yet: the projector, if all steps were text only.
    seen = {name.split(".", 1)[1] for name in saved}
    wanted = {f"{key}.{name}": shape(trained[name]) for name in seen & trained.keys()
              for key, shape in shapes.items()}
    wrong = [name for name in saved.keys() | wanted.keys()
             if name not in saved or name not in wanted or saved[name] != list(wanted[name])]
    if wrong or not seen:
        raise UserError(f"{file} does not belong to this model: look at "
                        f"{', '.join(sorted(wrong)[:3]) or 'its tensors, there are none'}. "
                        f"Move {step_folder} away; the same command then continues from the one before")
    with safe_open(file, "pt") as opened:
        for full_name in saved:
            key, name = full_name.split(".", 1)
            tensor, parameter = opened.get_tensor(full_name), trained[name]
            optimizer.state[parameter][key] = (tensor.to(parameter.device) if key == "step"
                                               else like(tensor, parameter))
        return {name[7:]: opened.get_tensor(name) for name in random}


def gather_random_states():
    """The random state of every rank: {"random.0": tensor, "random.1": tensor, ...}. Every rank calls it."""
    state = torch.get_rng_state()                           # what dropout draws from, uint8
    if torch.accelerator.is_available():
        state = torch.cat([state, torch.get_device_module().get_rng_state()])
    states = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(states, state, group=ranks.cpu_group)
    return {f"random.{rank}": state for rank, state in enumerate(states)}


def set_random_state(state):
    if state is None:                                       # the run did not have this rank before
        return
    cpu = len(torch.get_rng_state())
    torch.set_rng_state(state[:cpu])
    if len(state) > cpu and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state[cpu:])
