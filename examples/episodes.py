"""What the converters of robot data share: their flags, their checks, and a folder that appears whole or not
at all. It needs numpy, pillow and tqdm, but no torch.

    OUT/train.json                        one episode a line, as `--stage vla` reads them (see actions.py)
    OUT/val.json                          with --val_every 10: each tenth episode of each task
    OUT/images/000012/wrist/000034.png    episode 12, camera "wrist", step 34; one camera has no folder

A step holds what was seen before it and what was then done: {"image": name or names, "action": numbers,
"state": numbers}. Whatever does not add up ends the conversion with one sentence, and nothing is left.
"""
import io
import json
import os
import re
import secrets
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, last_words, printable  # noqa: E402

KINDS = {"PNG": ".png", "JPEG": ".jpg"}                     # how PIL names a kind of file -> its ending


@dataclass(frozen=True)
class ConversionConfig:
    dataset: str = knob("", "folder of the data set (HDF5: or one file)")
    out: str = knob("", "folder to be written; it must not exist")
    cameras: str = knob("", "cameras joined by commas, in the order in which the policy shall see them; "
                            "empty = all, by name")
    action: str = knob("", "what makes up the action, joined by commas; empty = what the format calls so")
    state: str = knob("", "what makes up the state, joined by commas; empty = what the format calls so; "
                          "none = no state")
    instruction: str = knob("", "the instruction of all episodes, in place of the data's own")
    gripper: Literal["as_it_is", "libero", "inverted"] = knob(
        "as_it_is", "the last number of an action. libero: from -1 open, 1 close to 1 open, 0 close, "
                    "as OpenVLA trains; inverted: from 0 open, 1 close to 1 open, 0 close")
    turn: Literal["0", "180"] = knob("0", "turn each picture; LIBERO's HDF5 files hold them upside down",
                                     "degrees")
    jpeg: int = knob(0, "quality of JPEG files, 1 to 95, for pictures that are not stored as files yet: "
                        "less than half of the room; 0 = PNG files, which are exact")
    val_every: int = knob(0, "10 = each tenth episode of each task goes to val.json; 0 = all are to train on")

    def __post_init__(self):
        if not self.dataset or not self.out:
            raise UserError("give two names: the data set, and the folder to be written")
        check_limits(self, {"jpeg": (0, 95), "val_every": (0, 10 ** 6)})


@contextmanager
def reading(path):
    """Whatever a reader raises about a damaged or foreign file becomes one sentence with the file's name.

    The kinds of errors are many: pyarrow, av, h5py and json each have their own, and a file that lacks
    a field ends in KeyError.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as e:
        raise UserError(f"{path} can't be read ({type(e).__name__}: {printable(str(e), 300)})") from e


@contextmanager
def appearing(out):
    """A new folder beside `out`. It gets this name when all is written, and is removed if anything fails.
    A process that is killed with SIGKILL leaves it behind: .NAME.unfinished-... can be deleted."""
    out = Path(out)
    folder = out.parent / f".{out.name}.unfinished-{secrets.token_hex(4)}"
    check_free(out)
    folder.mkdir(parents=True)
    try:
        yield folder
        check_free(out)                                     # hours may have passed
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(out):
    if os.path.lexists(out):
        raise UserError(f"{out} exists. Move it away, or give another name")


def pick(asked, known, what):
    """A comma-separated flag -> its names, each of which must be known; an empty flag -> []. The last part of
    a name is enough where only one has it: top for observation.images.top."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for i, name in enumerate(names):
        ending_so = [one for one in known if last_part(one) == name]
        names[i] = name = ending_so[0] if len(ending_so) == 1 and name not in known else name
        if name not in known:
            raise UserError(f"there is no {what} {name!r} here. There are: {', '.join(known) or 'none'}")
    if len(set(names)) < len(names):
        raise UserError(f"a {what} is named twice: {asked}")
    return names


def last_part(name):
    return re.split(r"[./]", name)[-1]


def chosen(asked, usual, known, what):
    """-> the names that a flag asks for; where it is empty, the first of the `usual` lists that is known, or
    []. "none" asks for none."""
    if asked == "none":
        return []
    return pick(asked, known, what) or next((names for names in usual if set(names) <= set(known)), [])


def check_numbers(place, what, array):
    """array: one row for each step. Raises UserError where a number is NaN, infinite or beyond use."""
    bad = np.argwhere(~(np.abs(array) < 1e9))               # this way round, NaN is found, too
    if len(bad):
        step, d = bad[0]
        raise UserError(f"{place}, step {step}: number {d} of its {what} is {array[step, d]:g}")


def invert_gripper(convention, place, actions):
    """(T, A) with the last number as the flag --gripper says. Raises UserError where it can't be meant."""
    grip = actions[:, -1]
    least = {"libero": -1, "inverted": 0}[convention]
    if grip.min() < least or grip.max() > 1:
        raise UserError(f"{place}: --gripper {convention} is for numbers from {least} to 1, but the last one "
                        f"of its actions goes from {grip.min():g} to {grip.max():g}")
    return np.column_stack([actions[:, :-1], 1 - np.clip(grip, 0, 1)])


class Writer:
    """Episodes and their pictures -> files of `folder`. steps: of all episodes, for the progress bar; 0 = the
    format does not say."""

    def __init__(self, folder, cfg, cameras, steps):
        self.folder, self.cfg, self.cameras = Path(folder), cfg, cameras
        short = [re.sub(r"[^\w-]+", "_", last_part(name))[:80] for name in cameras]
        if len(set(short)) < len(short):
            short = [str(i) for i in range(len(cameras))]
        self.short = dict(zip(cameras, short if len(cameras) > 1 else [""]))
        self.files, self.counts, self.of_task, self.sizes = {}, Counter(), Counter(), None
        self.bar = tqdm(total=steps * len(cameras) or None, desc="pictures", unit_scale=True, disable=None)

    def name(self, episode, camera, step, ending=""):
        """Where the picture lies, from OUT/images on."""
        return str(Path(f"{episode:06d}", self.short[camera], f"{step:06d}{ending or self.ending}"))

    def expect(self, done, episodes):
        """For the progress bar: so many of so many episodes are done, so there will be about ... pictures."""
        self.bar.total = self.bar.n * episodes // done

    @property
    def ending(self):
        """Of pictures that come as pixels."""
        return ".jpg" if self.cfg.jpeg else ".png"

    def pixels(self, episode, camera, step, image):
        """Writes a picture (PIL) -> its name."""
        name = self.name(episode, camera, step)
        image = image.convert("RGB")
        if self.cfg.turn == "180":
            image = image.transpose(Image.Transpose.ROTATE_180)
        # The lowest level of PNG's compression: hardly larger, and twice as fast.
        self._write(name, lambda file: image.save(file, quality=self.cfg.jpeg, subsampling=0)
                    if self.cfg.jpeg else image.save(file, compress_level=1))
        return name

    def encoded(self, episode, camera, step, data, where):
        """Writes a picture that is a PNG or JPEG file already, unchanged -> its name.
        Raises UserError where it can't be opened."""
        try:
            with Image.open(io.BytesIO(data), formats=list(KINDS)) as image:
                image.load()
                if self.cfg.turn == "180":
                    return self.pixels(episode, camera, step, image)
                name = self.name(episode, camera, step, KINDS[image.format])
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{where}: the picture of {camera}, step {step}, is no PNG or JPEG file that can "
                            f"be opened ({type(e).__name__}: {printable(str(e), 200)})") from e
        self._write(name, lambda file: file.write_bytes(data))
        return name

    def _write(self, name, save):
        file = self.folder / "images" / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save(file)
        except OSError as e:
            raise UserError(f"{file} can't be written ({e}). Nothing is left of {self.cfg.out}") from e
        self.bar.update()

    def episode(self, id, instruction, pictures, actions, states, where):
        """Writes one episode. pictures: T lists of names, one for each camera; actions (T, A); states (T, S)
        or None. where: how an error names it. Raises UserError where it does not add up."""
        instruction = self.cfg.instruction or instruction
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"{where} has no instruction. Give one: --instruction 'pick up the cup'. It is "
                            "then that of all episodes; convert those of another task on their own")
        check_numbers(where, "action", actions)
        lengths, sizes = [len(pictures), len(actions)], [actions.shape[1]]
        if states is not None:
            check_numbers(where, "state", states)
            lengths, sizes = [*lengths, len(states)], [*sizes, states.shape[1]]
        if len(set(lengths)) > 1 or not all(len(names) == len(self.cameras) for names in pictures):
            raise UserError(f"{where}: lengths differ: pictures, actions, states: {lengths}")
        if not lengths[0] or not actions.shape[1]:
            raise UserError(f"{where} has no steps, or no numbers in its actions")
        if self.sizes not in (None, sizes):
            raise UserError(f"{where}: action and state have {sizes} numbers, before they had {self.sizes}")
        self.sizes = sizes
        if self.cfg.gripper != "as_it_is":
            actions = invert_gripper(self.cfg.gripper, where, actions)
        steps = [{"image": names[0] if len(names) == 1 else names, "action": action}
                 for names, action in zip(pictures, actions.tolist())]
        for step, state in zip(steps, [] if states is None else states.tolist()):
            step["state"] = state
        self._add({"id": id, "instruction": instruction.strip(), "steps": steps})

    def _add(self, episode):
        """One line more in train.json, or in val.json."""
        self.of_task[episode["instruction"]] += 1
        held_out = self.cfg.val_every and self.of_task[episode["instruction"]] % self.cfg.val_every == 0
        split = "val" if held_out else "train"
        if split not in self.files:
            self.files[split] = open(self.folder / f"{split}.json", "w", encoding="utf-8")
        self.files[split].write((",\n" if self.counts[split] else "[\n") + json.dumps(episode))
        self.counts[split] += 1
        self.counts[f"steps of {split}"] += len(episode["steps"])

    def finish(self):
        self.bar.close()
        if not self.counts["train"]:
            raise UserError(f"{self.cfg.dataset} holds no episode for training")
        for file in self.files.values():
            file.write("\n]\n")
            file.close()

    def report(self):
        """What was written, and what comes next."""
        out = Path(self.cfg.out)
        for split in self.files:
            print(f"{out / split}.json: {self.counts[split]} episodes, "
                  f"{self.counts['steps of ' + split]} steps")
        print(f"a step   action of {self.sizes[0]} numbers, "
              + (f"state of {self.sizes[1]}" if len(self.sizes) > 1 else "no state")
              + f", pictures in this order: {', '.join(self.cameras)}")
        if self.cfg.gripper != "as_it_is":
            print(f"gripper  1 open, 0 close: as it needs no units, train with --keep_dimensions "
                  f"{self.sizes[0] - 1}")
        print(f"next     python check.py {out / 'train.json'} --image_dir {out / 'images'} --stage vla")


def convert(cfg, read):
    """`read(cfg)` -> cameras, number of steps (0 = unknown), a function that hands a Writer all episodes."""
    check_free(cfg.out)
    cameras, steps, write = read(cfg)
    with appearing(cfg.out) as folder:
        writer = Writer(folder, cfg, cameras, steps)
        with writer.bar:
            write(writer)
        writer.finish()
    writer.report()


def run(cfg, read):
    """The life of a converter's process."""
    ending_well(cfg, lambda cfg: convert(cfg, read))


def ending_well(cfg, main):
    """`main(cfg)`, and errors of the user's become one sentence. As `ranks.run`, which would import torch."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: what was begun is removed
    try:
        main(cfg)
    except UserError as e:
        last_words(str(e))
    except ModuleNotFoundError as e:
        last_words(f"the package {e.name} is missing. What to install stands in the head of {sys.argv[0]}")
    except OSError as e:
        last_words(f"a file can't be read or written ({printable(str(e))}). Nothing was left in {cfg.out}")
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    sys.exit(1)
