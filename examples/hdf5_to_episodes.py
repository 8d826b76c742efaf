"""From HDF5 files of LIBERO or robomimic to episodes, the form that `--stage vla` reads.

    pip install h5py
    python examples/hdf5_to_episodes.py LIBERO/libero_spatial OUT --turn 180 --gripper libero
    python examples/hdf5_to_episodes.py robomimic/lift/ph/image.hdf5 OUT --instruction "lift the cube"

The first argument is a file, or a folder of them (.hdf5, .h5); LIBERO has one for each task. Both kinds hold

    data/demo_7/actions (T, A), data/demo_7/obs/agentview_rgb (T, H, W, 3), data/demo_7/obs/ee_states (T, 6)

robomimic's `mask` (names of subsets) is not read, and it has no language. LIBERO's pictures are upside down:
--turn 180, as OpenVLA does. And they are late: LIBERO was played again, and what was written beside an action
is what the simulator showed after it. So here an action gets the picture and the state of the row before, and
an episode becomes one step shorter.
"""
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, knob, parse, printable  # noqa: E402
from examples.episodes import ConversionConfig, chosen, pick, reading, run  # noqa: E402

# LIBERO: place, rotation, both fingers, as OpenVLA-OFT; then robomimic's names of the same.
STATES = [["ee_states", "gripper_states"], ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]]
BLOCK = 32                                                  # pictures that are read at once


@dataclass(frozen=True)
class Hdf5Config(ConversionConfig):
    pictures: Literal["auto", "before", "after"] = knob(
        "auto", "the stored pictures and states show what was before or after their action; auto = after for "
                "LIBERO's own files, before for others")


class Demo(NamedTuple):
    """One episode in a file: its group's name, rows, the file's instruction,
    shift: how many rows earlier the picture of an action lies."""
    file: Path
    name: str
    rows: int
    instruction: str
    shift: int

    def __str__(self):
        return f"{self.file}, {self.name}"


def in_order(names):
    """By their numbers: demo_2 comes before demo_10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part
                                           for part in re.split(r"(\d+)", name)])


def find_files(dataset):
    path = Path(dataset)
    files = [path] if path.is_file() else [*path.rglob("*.hdf5"), *path.rglob("*.h5")]
    if not files:
        raise UserError(f"{dataset} is no HDF5 file, and no folder that holds one (.hdf5, .h5)")
    return [Path(name) for name in in_order(map(str, files))]


def array(group, name):
    """A dataset of a group. Raises UserError where its numbers would come from elsewhere: a file may name any
    other file of the machine as the place of its data."""
    found = group[name]
    if found.is_virtual or found.external or found.file.filename != group.file.filename:
        raise UserError(f"{found.name} does not lie in the file itself")
    return found


def find_demos(file, data, cfg):
    """-> the episodes of an open file (its group "data"). Raises UserError where their number is wrong."""
    info = json.loads(data.attrs["problem_info"]) if "problem_info" in data.attrs else {}
    text = info.get("language_instruction", "")
    text = "".join(text) if isinstance(text, list) else text        # sometimes a list of characters
    late = cfg.pictures == "after" or (cfg.pictures == "auto" and bool(info))
    demos = [Demo(file, name, len(array(data[name], "actions")), text, int(late)) for name in in_order(data)]
    for demo in demos:
        said = data[demo.name].attrs.get("num_samples", demo.rows)
        if said != demo.rows:
            raise UserError(f"{demo}: num_samples is {said}, but there are {demo.rows} actions")
        if demo.rows <= demo.shift:
            raise UserError(f"{demo} has {demo.rows} steps")
    for name, number in {"num_demos": len(demos), "total": sum(demo.rows for demo in demos)}.items():
        if data.attrs.get(name, number) != number:
            raise UserError(f"{file}: {name} is {data.attrs[name]}, but {number} are there. Is it whole?")
    return demos


def features(demo):
    """-> cameras; names of what can be the action, the state: the arrays of an episode by their shapes."""
    obs = demo["obs"] if "obs" in demo else {}
    def named(group, *dimensions):
        return [name for name, of in group.items()
                if getattr(of, "ndim", 0) in dimensions and of.dtype.kind in "fiu"]
    cameras = [name for name in named(obs, 4) if obs[name].shape[3] == 3 and obs[name].dtype == np.uint8]
    return sorted(cameras), named(demo, 1, 2), named(obs, 1, 2)


def joined(group, names, rows, where):
    """The named arrays side by side -> (T, sum of their sizes), float64. None without names."""
    parts = [array(group, name)[()].astype(np.float64) for name in names]
    for name, part in zip(names, parts):
        if len(part) != rows:
            raise UserError(f"{where}: lengths differ: {rows} actions, but {len(part)} of {name}")
    return np.concatenate([part.reshape(rows, -1) for part in parts], axis=1) if parts else None


def write_demo(number, demo, group, keys, writer):
    names = []
    for camera in writer.cameras:
        pictures = array(group["obs"], camera)
        if len(pictures) != demo.rows:
            raise UserError(f"{demo}: lengths differ: {demo.rows} actions, but {len(pictures)} of {camera}")
        steps = demo.rows - demo.shift
        names.append([writer.pixels(number, camera, start + i, Image.fromarray(picture))
                      for start in range(0, steps, BLOCK)
                      for i, picture in enumerate(pictures[start:min(start + BLOCK, steps)])])
    actions = joined(group, keys["action"], demo.rows, demo)[demo.shift:]
    states = joined(group["obs"], keys["state"], demo.rows, demo)
    writer.episode(f"{demo.file.stem}/{demo.name}", demo.instruction, list(zip(*names)), actions,
                   None if states is None else states[:len(actions)], str(demo))


def read(cfg):
    import h5py
    demos, known = [], None
    for file in find_files(cfg.dataset):
        with reading(file), h5py.File(file, "r") as opened:
            found = find_demos(file, opened["data"], cfg)
            if found and known is None:
                known = features(opened["data"][found[0].name])
            demos += found
    if not demos:
        raise UserError(f"{cfg.dataset} holds no episode")
    cameras, of_demo, of_obs = known
    keys = {"action": chosen(cfg.action, [["actions"]], of_demo, "array"),
            "state": chosen(cfg.state, STATES, of_obs, "array")}
    unused = [printable(name, 80) for name in [*cameras, *of_obs] if name not in keys["state"]]
    cameras = pick(cfg.cameras, cameras, "camera") or cameras
    if not cameras:
        raise UserError(f"{demos[0]}: obs has no pictures, (T, H, W, 3) of uint8. robomimic adds them by its "
                        "script dataset_states_to_obs.py")
    unused = [name for name in unused if name not in cameras]
    if unused:
        print(f"not used {', '.join(unused)}")
    if demos[0].shift:
        print("pictures and states are those of the row before: stored is what was seen after an action"
              + (". LIBERO's are upside down: --turn 180 makes them upright" if cfg.turn == "0" else ""))

    def write(writer):
        for file, group in itertools.groupby(enumerate(demos), key=lambda each: each[1].file):
            with h5py.File(file, "r") as opened:
                for number, demo in group:
                    with reading(demo):
                        write_demo(number, demo, opened["data"][demo.name], keys, writer)
    return cameras, sum(demo.rows - demo.shift for demo in demos), write


if __name__ == "__main__":
    run(parse(Hdf5Config, description=__doc__.split("\n\n")[0], positional=("dataset", "out")), read)
