"""A robot in the drawn world: the default data of stage `vla`. Nothing is downloaded.

A table seen from above, two to four colored shapes as in world.py, and a gripper. The task is one sentence,
such as "put the red circle on the blue square". Places are in pixels of the picture, row first: (0, 0) is the
top left corner. An action is (row, column, grip): where to move, of which one action does at most STEP on
each axis; grip 1 = open, 0 = close. The state of the robot (--state) is where its gripper is, and its grip.

    python toy/robot.py       # writes data/toy_robot: episodes of an expert; `train.py` does it by itself
    python toy/robot.py --ckpt runs/toy-vla-x7 --rollouts 100       # lets a policy act: how often is it done?

The arm is not exact: each move misses its place a little. The expert's next action depends only on what the
picture shows, so a policy can learn it from single pictures. While it is recorded, the gripper sometimes
opens or closes at the wrong time, too: so the data shows how to recover.
"""
import json
import random
import sys
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# `python toy/robot.py` puts this file's folder on the path, but the modules are found from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse  # noqa: E402
from toy import world  # noqa: E402

STEP = 20.0                                         # one action moves so far on each axis, at most [pixels]
REACH = 12.0                                        # a closing gripper takes what is so near [pixels]
GRID = 8.0                                          # the expert names places in multiples of it [pixels]
NEAR = 12.0                                         # the expert closes, opens from here [pixels]
ON = 12.0                                           # "on" = centers so near [pixels]
HELD = 0.6                                          # a held thing looks smaller, or it would hide the target
NOISE = 4.0                                         # a move misses by so much (standard deviation) [pixels]
MARGIN = 13.0                                       # the gripper stays so far from the edge [pixels]
MOST_STEPS = 30


@dataclass(frozen=True)
class RobotConfig:
    folder: str = knob("data/toy_robot", "where the episodes are written")
    seed: int = knob(0, "another seed writes other episodes")
    episodes: int = knob(4000, "how many to write for training", "episodes")
    ckpt: str = knob("", "run folder or step folder of a policy: it acts, and no episodes are written")
    rollouts: int = knob(100, "with --ckpt: unseen scenes of each kind, in which the policy acts", "episodes")
    execute: int = knob(
        0, "with --ckpt: how many actions of a chunk are done before the policy is asked again; 0 = all")
    batch_size: int = knob(50, "with --ckpt: pictures that the policy is asked about at once", "pictures")
    unnorm_key: str = knob(
        "", "with --ckpt: the dataset whose units the actions are in; needed if the policy knows several")
    wrong_instruction: bool = knob(
        False, "with --ckpt: tell the policy another task than the one that counts")
    blank_images: bool = knob(
        False, "with --ckpt: replace every picture by a black one: does the policy look at all?")
    hide_state: bool = knob(False, "with --ckpt, of a policy with --state: don't tell it the robot's state")
    out: str = knob("", "with --ckpt: where the scores go; empty = rollouts.json in the run folder. "
                        "A picture and a GIF of the same name are drawn beside it")

    def __post_init__(self):
        if not self.ckpt:
            world.check_folder(self.folder, ("val", "train"))
        check_limits(self, {"episodes": (1, 10 ** 7), "rollouts": (1, 10 ** 6), "batch_size": (1, 10 ** 5),
                            "execute": (0, 1000)})
        # Otherwise --rollouts without --ckpt would write thousands of episodes, which nobody asked for.
        unread = ("folder", "seed", "episodes") if self.ckpt else (
            "rollouts", "execute", "batch_size", "unnorm_key", "wrong_instruction", "blank_images",
            "hide_state", "out")
        for f in fields(self):
            if f.name in unread and getattr(self, f.name) != f.default:
                raise UserError(f"--{f.name} is of no use {'with' if self.ckpt else 'without'} --ckpt: "
                                "with it a policy acts, without it episodes are written")


class Task(NamedTuple):
    """What is to be done in which scene: `thing` and `target` are indices into the scene."""
    scene: tuple
    thing: int
    target: int

    def __str__(self):
        return f"put the {self.scene[self.thing]} on the {self.scene[self.target]}"


def unseen_layout(scene):
    """One scene in five never occurs in training: decided by its words, so whatever the seed."""
    return zlib.crc32(world.caption(scene).encode()) % 5 == 0


def unseen_pair(thing, target):
    """In training nothing is put on the color that follows its own in world.COLORS: no red on green, ...

    So a sixth of the pairs of colors is new, while every thing was moved and was a target. There are more
    pairs of things than episodes: to leave out some of those would not differ much from chance.

    >>> unseen_pair("red circle", "green star"), unseen_pair("green star", "red circle")
    (True, False)
    """
    colors = list(world.COLORS)
    first, second = (colors.index(name.split()[0]) for name in (thing, target))
    return second == (first + 1) % len(colors)


def random_task(rng, kind="training"):
    """`kind`: "training", "unseen layouts" or "unseen pairs", whose layouts are unseen as well."""
    while True:
        scene = world.random_scene(rng)
        thing, target = rng.sample(range(len(scene)), 2)
        if (unseen_layout(scene) == (kind != "training")
                and unseen_pair(str(scene[thing]), str(scene[target])) == (kind == "unseen pairs")):
            return Task(scene, thing, target)


def anywhere(rng):
    return np.array([rng.uniform(MARGIN, world.PIXELS - MARGIN) for _ in range(2)])


class Table:
    """A task's scene on a table, and a gripper over it."""

    def __init__(self, task, rng):
        self.task = task
        cell, paper = world.PIXELS / 3, rng.randint(225, 250)
        self.paper = (paper, paper, paper - rng.randint(0, 12))
        self.places = np.array([((t.cell // 3 + 0.5) * cell + rng.uniform(-3, 3),           # (things, 2)
                                 (t.cell % 3 + 0.5) * cell + rng.uniform(-3, 3)) for t in task.scene])
        self.looks = []                                     # color, radius, angle: varied as by world.draw
        for thing in task.scene:
            shade = rng.uniform(0.88, 1.05)
            color = tuple(min(255, int(c * shade) + rng.randint(-8, 8)) for c in world.COLORS[thing.color])
            self.looks.append((color, rng.uniform(9.5, 12.5), rng.uniform(-0.25, 0.25)))
        self.stack = list(range(len(task.scene)))           # from below: what was taken last lies on top
        self.gripper, self.open, self.held = anywhere(rng), True, None

    def state(self):
        """(row, column, grip): what a robot knows of itself without a look."""
        return [round(float(number), 3) for number in (*self.gripper, self.open)]

    def take(self, i):
        self.open, self.held = False, i
        self.places[i] = self.gripper                       # the fingers center it: it looks held
        self.stack.remove(i)
        self.stack.append(i)

    def step(self, action):
        """(row, column, grip): first the gripper moves, with what it holds, then it opens or closes."""
        move = np.clip(action[:2] - self.gripper, -STEP, STEP)
        self.gripper = np.clip(self.gripper + move, MARGIN, world.PIXELS - MARGIN)
        if self.held is not None:
            self.places[self.held] = self.gripper
        self.open = bool(action[2] > 0.5)
        if self.open:
            self.held = None
        elif self.held is None:
            far = np.linalg.norm(self.places - self.gripper, axis=1)
            nearest = min(reversed(self.stack), key=lambda i: far[i])       # of equally near ones: the upper
            if far[nearest] <= REACH:
                self.take(nearest)

    def success(self, task=None):
        """The thing lies on the target and nothing is held. The target on the thing is another task."""
        thing, target = (task or self.task)[1:]
        on_top = self.stack.index(thing) > self.stack.index(target)
        far = np.linalg.norm(self.places[thing] - self.places[target])
        return bool(self.held is None and on_top and far <= ON)

    def expert(self, task=None):
        """The next action towards the goal of the task (its own, if not told another)."""
        thing, target = (task or self.task)[1:]
        if self.success(task) or self.held not in (None, thing):
            return np.array([*self.on_grid(self.places[thing]), 1.0])   # done, or the wrong thing is held
        holds = self.held == thing
        goal = self.places[target if holds else thing]
        near = np.linalg.norm(goal - self.gripper) <= NEAR
        # Near: close on the thing, open over the target.
        return np.array([*self.on_grid(goal), float(near == holds)])

    @staticmethod
    def on_grid(place):
        """Few places are learned from fewer examples; what is lost is well within REACH and ON."""
        return np.round(place / GRID) * GRID

    def picture(self):
        fine = 3                                            # as world.draw: drawn larger, then averaged
        image = Image.new("RGB", (world.PIXELS * fine,) * 2, self.paper)
        canvas = ImageDraw.Draw(image)
        for i in self.stack:
            color, radius, angle = self.looks[i]
            y, x = self.places[i] * fine
            size = radius * (HELD if i == self.held else 1) * fine
            world.draw_shape(canvas, self.task.scene[i].shape, color, x, y, size, angle)
        # Open or closed decides what comes next, so a lamp shows it too. Nothing else has these two colors.
        y, x = self.gripper * fine
        gap, color = (15 * fine, (30, 30, 34)) if self.open else (7 * fine, (255, 90, 200))
        thick, up, down = 3 * fine, y - 11 * fine, y + 8 * fine
        for side in (x - gap, x + gap):                 # two fingers and, above the thing, what joins them
            canvas.rectangle((side - thick, up, side + thick, down), fill=color)
        canvas.rectangle((x - gap, up, x + gap, up + thick), fill=color)
        return image.reduce(fine)


def random_start(table, rng):
    """Sometimes begins where the expert seldom comes: with the thing held, with a wrong one, or closed."""
    luck = rng.random()
    if luck < 0.25:
        table.take(table.task.thing)
    elif luck < 0.35:
        table.take(rng.choice([i for i in table.stack if i != table.task.thing]))
    elif luck < 0.40:
        table.step([*table.gripper, 0])


def inexact(action, rng):
    """What the arm makes of an action, while episodes are recorded and in rollouts."""
    return action + [rng.gauss(0, NOISE), rng.gauss(0, NOISE), 0]


def record(task, rng, slip=0.06):
    """One episode of the expert: [(picture, state, action), ...].

    Written down is its answer to what the picture shows. What happens is inexact, and slips.
    """
    table, steps = Table(task, rng), []
    random_start(table, rng)
    while len(steps) < MOST_STEPS and not table.success():
        action = table.expert()
        steps.append((table.picture(), table.state(), action))
        moved = inexact(action, rng)
        if rng.random() < slip:
            moved[2] = 1 - moved[2]
        table.step(moved)
    return steps


def write(folder, seed=0, episodes=4000):
    folder, rng = Path(folder), random.Random(seed)
    for split, count in (("val", max(1, episodes // 20)), ("train", episodes)):  # train last: all is there
        rows = []
        for e in range(count):
            task = random_task(rng, "training" if split == "train" else "unseen layouts")
            steps = record(task, rng)
            name = f"{split}_{e:05d}"
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for i, (picture, _, _) in enumerate(steps):
                picture.save(folder / "images" / name / f"{i:03d}.png")
            rows.append({"id": name, "instruction": str(task), "steps": [
                {"image": f"{name}/{i:03d}.png", "action": [round(float(a), 3) for a in action],
                 "state": state} for i, (_, state, action) in enumerate(steps)]})
        unfinished = folder / f".{split}.unfinished"
        unfinished.unlink(missing_ok=True)
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(folder / f"{split}.json")
        print(f"{folder / split}.json: {count} episodes, {sum(len(row['steps']) for row in rows)} steps")


def swapped(task):
    """The same two things, the other way round."""
    return task._replace(thing=task.target, target=task.thing)


def rollout(policy, count, unseen=False, swap=False, seed=1000):
    """Lets `policy(pictures, instructions, states) -> (n, 3)` act on `count` tables, each until done or time
    is up. Or (n, K, 3): K actions that are done one after the other, and meanwhile nothing is asked.

    No layout is one of training's; `unseen`: nor is a pair of thing and target. `swap`: the policy is told
    the task the other way round; when that is done, the table ends, too. Returns a dict per table:
    instruction and success (of the table's own task), pictures.
    """
    kind = "unseen pairs" if unseen else "unseen layouts"
    rngs = [random.Random(seed + i) for i in range(count)]  # table i is the same for any count
    tables = [Table(random_task(rng, kind), rng) for rng in rngs]
    told = [swapped(table.task) if swap else table.task for table in tables]
    films, running, plans = [[] for _ in tables], list(range(count)), {}
    for _ in range(MOST_STEPS):
        pictures = [tables[i].picture() for i in running]
        for i, picture in zip(running, pictures):
            films[i].append(picture)
        if not plans.get(running[0]):                       # all of them, then: plans are equally long
            actions = policy(pictures, [str(told[i]) for i in running], [tables[i].state() for i in running])
            plans = {i: list(np.reshape(chunk, (-1, 3))) for i, chunk in zip(running, actions)}
        for i in running:
            tables[i].step(inexact(plans[i].pop(0), rngs[i]))
        running = [i for i in running if not (tables[i].success() or tables[i].success(told[i]))]
        if not running:
            break
    for table, film in zip(tables, films):
        film.append(table.picture())
    return [{"instruction": str(table.task), "success": table.success(), "pictures": film}
            for table, film in zip(tables, films)]


def some_of(results, count):
    """Successes and failures; no more than half are failures."""
    good = [r for r in results if r["success"]]
    bad = [r for r in results if not r["success"]]
    return (good[:max(count - len(bad), count // 2)] + bad)[:count]


def film_strips(results, path, rows=8, columns=10):
    """Some successes and some failures, one per row, frames evenly spread over each."""
    shown = some_of(results, rows)
    font, height = ImageFont.load_default(12), world.PIXELS + 22
    sheet = Image.new("RGB", (columns * (world.PIXELS + 4), len(shown) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for row, result in enumerate(shown):
        color = "darkgreen" if result["success"] else "firebrick"
        steps = len(result["pictures"]) - 1
        end = "done" if result["success"] else "not done"
        text = f"{result['instruction']}: {end} after {steps} steps"
        canvas.text((4, row * height + 3), text, fill=color, font=font)
        for column, i in enumerate(np.linspace(0, steps, min(columns, steps + 1)).astype(int)):
            sheet.paste(result["pictures"][i], (column * (world.PIXELS + 4), row * height + 19))
    sheet.save(path)


def animation(results, path, rows=2, columns=4, seconds=0.4):
    """The same as a GIF: some tables side by side. Each stops where it ended, in a green or a red frame."""
    shown, font, width, text = some_of(results, rows * columns), ImageFont.load_default(11), 136, 44
    frames = []
    for t in range(max(len(result["pictures"]) for result in shown)):
        sheet = Image.new("RGB", (columns * width, rows * (world.PIXELS + text)), "white")
        canvas = ImageDraw.Draw(sheet)
        for i, result in enumerate(shown):
            x, y = i % columns * width, i // columns * (world.PIXELS + text)
            words = result["instruction"].replace(" on the ", "\non the ")
            canvas.text((x + 4, y + 2), words, fill="black", font=font)
            place, last = (x + (width - world.PIXELS) // 2, y + text - 10), len(result["pictures"]) - 1
            if t >= last:
                color = "darkgreen" if result["success"] else "firebrick"
                canvas.rectangle((place[0] - 4, place[1] - 4, place[0] + world.PIXELS + 3,
                                  place[1] + world.PIXELS + 3), fill=color)
            sheet.paste(result["pictures"][min(t, last)], place)
        frames.append(sheet)
    # One palette for all frames, and no dithering: then what did not move stays the same and takes no room.
    seen = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[::3]]))
    palette = seen.quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[round(1000 * seconds)] * (len(frames) - 1) + [2500])


def success_rates(assistant, cfg):
    """-> {kind: {"success", "count"}}, and every table's result for the film strips."""
    def policy(pictures, instructions, states):
        if cfg.blank_images:
            pictures = [Image.new("RGB", picture.size) for picture in pictures]
        if cfg.hide_state:
            states = [None] * len(states)
        chunks = []
        for i in range(0, len(pictures), cfg.batch_size):
            some = slice(i, i + cfg.batch_size)
            chunks.append(assistant.act([[picture] for picture in pictures[some]], instructions[some],
                                        cfg.unnorm_key, states[some]))
        return np.concatenate(chunks)[:, :cfg.execute or None]                              # (n, E, 3)
    scores, shown = {}, []
    for kind, unseen in (("unseen layouts", False), ("unseen pairs", True)):
        results = rollout(policy, cfg.rollouts, unseen, cfg.wrong_instruction)
        scores[kind] = {"success": sum(result["success"] for result in results) / len(results),
                        "count": len(results)}
        print(f"{kind:<16} {scores[kind]['success']:7.1%}   of {len(results)}", flush=True)
        shown += results
    return scores, shown


def let_act(cfg):
    """Scores the policy of --ckpt in unseen scenes, and writes the scores, the film strips and a GIF."""
    from errors import check_writable   # only here: they import torch, which writing episodes does not need
    from generate import Assistant
    assistant = Assistant(cfg.ckpt)
    if not assistant.policy:
        raise UserError(f"--ckpt {cfg.ckpt} is no policy: give a run that was trained by --stage vla")
    if assistant.policy.dimensions != 3:
        raise UserError(f"--ckpt {cfg.ckpt}: its actions have {assistant.policy.dimensions} dimensions, "
                        "those of this robot 3. It is the policy of another robot")
    if cfg.execute and cfg.execute > assistant.policy.chunk:
        raise UserError(f"--execute {cfg.execute}: this policy answers with {assistant.policy.chunk} actions "
                        "(--chunk of its training). Give no more than that")
    if assistant.policy.state_size not in ((3,) if cfg.hide_state else (0, 3)):
        raise UserError(f"--ckpt {cfg.ckpt}: it reads a state of {assistant.policy.state_size} numbers, that "
                        "of this robot has 3 (0: trained without --state, so there is nothing to hide)")
    out = Path(cfg.out) if cfg.out else Path(cfg.ckpt) / "rollouts.json"
    check_writable(out)
    scores, shown = success_rates(assistant, cfg)
    out.write_text(json.dumps(scores, indent=1))
    print(f"scores   {out}")
    film_strips(shown, out.with_suffix(".png"))
    animation(shown, out.with_suffix(".gif"))
    print(f"pictures {out.with_suffix('.png')}, {out.with_suffix('.gif')}")


def main(cfg):
    if cfg.ckpt:
        let_act(cfg)
    else:
        write(cfg.folder, cfg.seed, cfg.episodes)


if __name__ == "__main__":
    cfg = parse(RobotConfig, description=__doc__.split("\n\n")[0])
    import ranks                                            # behind the flags: it imports torch
    ranks.run(main, cfg)
