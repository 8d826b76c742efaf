"""BabyAI's PickupLoc: a room where only the words say what to do. Records an expert; lets a policy act.

    pip install minigrid==3.2.0
    python examples/babyai.py data/babyai --episodes 6000
    torchrun train.py --stage finetune --ckpt runs/toy-finetune-x7 --train_json ...   # docs/robot.md has all
    torchrun train.py --stage vla --ckpt runs/babyai-talk --train_json ...            # the flags
    python examples/babyai.py --ckpt runs/babyai --rollouts 100 --who policy,black,wrong,expert,random

Eight balls, boxes and keys in six colors lie in a room; "pick up the grey key on your left" (arXiv
1810.08272). A fifth of all missions, decided by their words, is in no demonstration and in no conversation;
rollouts are of those only. The first thing that is picked up ends a rollout, as nothing can be put down.

train_talk.json asks about the pictures of the demonstrations, in LLaVA's form: "Where is the grey key on your
left?", "c4 left": column c, row 4, and leave to the left. A picture has several such questions, but only
one action; so a model that is to look up things by words sees more examples of it. Half of the questions are
no missions: "Where is the grey key left of e?", "... above 5?". Of the 18 plain missions with a color and a
kind, 14 are for training, and 14 pairs can be learned by heart. With all these ends they are hundreds of
sentences, and to put a color and a kind together is then what is learned. What is learned as an answer is not
yet known as an action; so train.json has single steps, too, for two of the questions about each picture:
"pick up the grey key left of e", and what the expert would do.

"Left" and "behind" are meant from where the agent stood at the start, which a picture of now does not show.
So a black outline stays there, and the room is drawn so that the agent looked up then.

An action is seven numbers. Only the last one moves the agent: 0 turn left, 1 turn right, 2 forward, 3 pick
up. The first six say why, so that a policy looks before it acts: its own column, row and direction (0 right,
1 down, 2 left, 3 up), column and row of the thing that it is after, and in which direction it wants to leave.
Each number is a token that the next ones have read (the idea: arXiv 2201.11903).

The expert sees all of the room, as the policy does, and remembers nothing. What BabyAI's own bot does depends
on what it has seen so far: it sees 7 x 7 cells and turns to look around.
"""
import collections
import contextlib
import io
import itertools
import json
import sys
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse  # noqa: E402
from examples import episodes, rollouts  # noqa: E402

# Pixels, and cells. Without its walls a room has 96 x 96 pixels: one patch of the toy's vision for each cell.
CELL, INSIDE = 16, 6
NUMBERS, ACTIONS, PICK_UP = 7, 4, 3
KINDS = "ball", "box", "key"
WAYS = "right", "bottom", "left", "top"                     # directions, in words that the toy's LLM knows
SIDES = ("left of", "right of"), ("above", "below")         # of a column, of a row
THINGS = 8                                                  # in a room, as PickupLoc has it
PAPER = 240, 240, 234                                       # the toy's vision knows things on bright paper
SLIPS = 0.15                                                # how often a demonstration does something else
QUESTIONS = 3                                               # of each sort, about a picture with enough things
OTHERWISE = 2                                               # of these, which become steps of one action too
ROLLOUTS_FROM = 1_000_000                                   # seeds below belong to demonstrations


@dataclass(frozen=True)
class BabyConfig:
    folder: str = knob("", "where the expert's episodes are written; it must not exist")
    episodes: int = knob(2000, "how many to write for training; a twentieth more for val.json", "episodes")
    ckpt: str = knob("", "run folder or step folder of a policy: it acts, and no episodes are written")
    rollouts: int = knob(100, "rooms with unseen missions, in which each of --who acts", "episodes")
    who: str = knob("policy", "who acts: policy, black, wrong, expert, random, joined by commas")
    execute: int = knob(0, "actions of a chunk that are done before the policy is asked again; 0 = all")
    steps: int = knob(20, "longest rollout; the expert needs 6 on average", "steps")
    unnorm_key: str = knob("", "the dataset whose units are meant; needed if the policy knows several")
    out: str = knob("", "where rollouts are written; empty = babyai.jsonl in the run folder")

    def __post_init__(self):
        if bool(self.folder) == bool(self.ckpt or self.out):
            raise UserError("give a FOLDER, and episodes are written; or --ckpt RUN, and a policy acts "
                            "(--out FILE.jsonl for --who expert,random alone)")
        unread = ("rollouts", "who", "execute", "steps", "unnorm_key") if self.folder else ("episodes",)
        for f in fields(self):
            if f.name in unread and getattr(self, f.name) != f.default:
                raise UserError(f"--{f.name} is of no use {'with' if self.folder else 'without'} a FOLDER")
        check_limits(self, {"episodes": (1, 10 ** 5), "rollouts": (1, 10 ** 5), "execute": (0, 1000),
                            "steps": (1, 64)})
        if not self.folder:
            rollouts.pick_who(self.who, self.ckpt)


def unseen(mission):
    """One mission in five never occurs in training: decided by its words, so whatever the seed. "a grey key"
    and "the grey key" are one."""
    return zlib.crc32(mission.replace(" a ", " the ").encode()) % 5 == 0


class Room:
    """The simulator, an expert, and what a policy sees."""

    def __init__(self):
        import gymnasium
        from minigrid.core import grid
        self.env = gymnasium.make("BabyAI-PickupLoc-v0").unwrapped
        self.floor = grid.Grid(INSIDE, INSIDE).render(CELL, (-1, -1))

    def start(self, seed, things=THINGS):
        self.env.num_dists = things
        with contextlib.redirect_stdout(io.StringIO()):     # it prints each room that it throws away
            self.env.reset(seed=seed)
        self.home, self.turns = self.pose, (int(self.env.agent_dir) + 1) % 4      # until it looks up

    @property
    def pose(self):
        """Column, row, direction: 0 right, 1 down, 2 left, 3 up."""
        return *map(int, self.env.agent_pos), int(self.env.agent_dir)

    @property
    def mission(self):
        return self.env.mission

    def other_missions(self):
        """Missions for things that lie in this room, too, but look unlike all that count."""
        wanted = {(thing.color, thing.type) for thing in self.env.instrs.desc.obj_set}
        there = {(thing.color, thing.type) for thing in self.env.grid.grid
                 if thing is not None and thing.type in KINDS}
        return [f"pick up the {color} {kind}" for color, kind in sorted(there - wanted)]

    def missions(self, want_unseen):
        """At the start: missions that the simulator could have given here -> the things that count."""
        found = {}
        for _ in range(40):                                 # draws; many are drawn twice
            with contextlib.suppress(RecursionError):       # a hundred draws, and nothing lies here so
                mission = self.env.rand_instr(["pickup"], ["action"])
                words = mission.surface(self.env)
                if unseen(words) == want_unseen:
                    found.setdefault(words, mission.desc.obj_set)
        return found

    def beside_a_line(self, rng):
        """A thing by its looks, or some of them, and a line on one side of which it lies: no mission says so.
        -> words, the things that are meant: none, perhaps, if it lies on the line."""
        places = {thing: self.turned(at % self.env.width, at // self.env.width)[:2]
                  for at, thing in enumerate(self.env.grid.grid) if thing is not None and thing.type in KINDS}
        one, axis, line = rng.choice(list(places)), rng.integers(2), rng.integers(INSIDE)
        color, kind = one.color * (rng.random() < 0.75), one.type if rng.random() < 0.75 else "object"
        side = int(places[one][axis] > line)
        meant = {thing for thing, place in places.items() if color in ("", thing.color)
                 and kind in ("object", thing.type) and place[axis] != line and (place[axis] > line) == side}
        name = "abcdef"[line] if axis == 0 else str(line + 1)
        return f"pick up the {f'{color} {kind}'.strip()} {SIDES[axis][side]} {name}", meant

    def turned(self, x, y, direction=0):
        """A place of the simulator -> column, row and direction in the picture."""
        x, y = x - 1, y - 1                                 # the first cells, 0, are walls
        for _ in range(self.turns):
            x, y = y, INSIDE - 1 - x
        return x, y, (direction - self.turns) % 4

    def expert(self, things=None):
        """-> column and row of the nearest thing that is wanted, the direction in which to leave, the action:
        the first one on a shortest way, by breadth-first search. Of equal ways, forward first, then left."""
        things = self.env.instrs.desc.obj_set if things is None else things
        queue, seen = collections.deque([(self.pose, None, None)]), {self.pose}
        while queue:
            (x, y, d), first, leave = queue.popleft()
            ahead = x + (1, 0, -1, 0)[d], y + (0, 1, 0, -1)[d]
            thing = self.env.grid.get(*ahead)
            if any(thing is one for one in things):
                column, row, leave = self.turned(*ahead, d if leave is None else leave)
                return column, row, leave, PICK_UP if first is None else first
            for pose, action in (((*ahead, d), 2), ((x, y, (d - 1) % 4), 0), ((x, y, (d + 1) % 4), 1)):
                if pose not in seen and (action < 2 or thing is None):
                    seen.add(pose)
                    queue.append((pose, action if first is None else first,
                                  d if action == 2 and leave is None else leave))

    def numbers(self, things=None):
        """An action, as the expert would do it."""
        return *self.turned(*self.pose), *self.expert(things)

    def step(self, action):
        """-> whether the mission is done, whether the rollout is over."""
        last = self.env.actions(int(np.clip(np.round(action), 0, ACTIONS - 1)))
        _, reward, done, out_of_time, _ = self.env.step(last)
        return bool(done and reward > 0), bool(done or out_of_time or self.env.carrying)

    @property
    def taken(self):
        """The mission that was done, in words, whichever was meant. "" = nothing was picked up."""
        thing = self.env.carrying
        return f"pick up the {thing.color} {thing.type}" if thing else ""

    def picture(self):
        """The room from above without its walls (PIL, RGB), and in black where the agent was at the start."""
        grid, (x, y, direction) = self.env.grid.slice(1, 1, INSIDE, INSIDE), self.turned(*self.pose)
        for _ in range(self.turns):
            grid = grid.rotate_left()
        pixels = grid.render(CELL, (x, y), direction)
        pixels[(pixels == self.floor).all(-1) | (pixels == 0).all(-1)] = PAPER
        image = Image.fromarray(pixels)
        column, row, _ = self.turned(*self.home)
        corners = np.array([(2, 14), (8, 2), (14, 14)]) + np.array([column, row]) * CELL
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], outline="black")
        return image


def seeds_of(room, first, want_unseen):
    """Endless: from `first` on, the seeds whose mission is unseen, or is not. The room is then started.
    In rooms for training lie one to eight things, in half of them eight: where there are few, words are easy
    to learn."""
    for seed in itertools.count(first):
        room.start(seed, THINGS if want_unseen else min(THINGS, 1 + seed % (2 * THINGS - 2)))
        if unseen(room.mission) == want_unseen and (room.other_missions() or not want_unseen):
            yield seed


def questions(room, missions, rng):
    """-> the words of a few missions, and as many that are none -> what they mean. No two mean the same: else
    the second answer could be read off the first."""
    sorts = [list(missions.items()), [room.beside_a_line(rng) for _ in range(2 * QUESTIONS)]]
    asked = {}
    for each in sorts:
        rng.shuffle(each)
        new = {frozenset(meant): (words, meant) for words, meant in each if meant}
        asked |= dict([(key, value) for key, value in new.items() if key not in asked][:QUESTIONS])
    return dict(asked.values())


def talk(room, image, things, rng):
    """A conversation about a picture: where the agent stands and looks, where things lie, and in which
    direction to leave for them."""
    column, row, looks = room.turned(*room.pose)
    turns = [("Where are you?", (column, row, looks))]
    for words, wanted in things.items():
        turns.append((words.replace("pick up", "Where is") + "?", room.expert(wanted)[:3]))
    rng.shuffle(turns)
    turns[0] = "<image>\n" + turns[0][0], turns[0][1]
    said = [{"from": who, "value": value} for question, (column, row, way) in turns for who, value in
            (("human", question), ("gpt", f"{'abcdef'[column]}{row + 1} {WAYS[way]}"))]
    return {"id": image, "image": image, "conversations": said}


def demonstration(room, seed, slips=0.0):
    """From where the room stands: pictures, and what the expert would do. Now and then the agent turns or
    goes at random instead, so that there are examples of what to do after a mistake (arXiv 1703.09327)."""
    rng, over = np.random.default_rng(seed), False
    while not over:
        action = room.numbers()
        yield room.picture(), action
        slip = rng.random() < slips
        _, over = room.step(rng.integers(PICK_UP) if slip else action[-1])


def told_otherwise(room, image, things, rng):
    """Episodes of one step: what the expert would do here, had it been told something else. (To ask it where
    somebody else has led: arXiv 1011.0686; to learn from one way for other goals: arXiv 1707.01495.)"""
    for words in rng.permutation(list(things))[:OTHERWISE].tolist():
        action = list(map(float, room.numbers(things[words])))
        yield {"id": f"{image}: {words}", "instruction": words, "steps": [{"image": image, "action": action}]}


def record(cfg):
    room = Room()
    with episodes.appearing(cfg.folder) as folder:
        for split, count, first in (("val", max(1, cfg.episodes // 20), ROLLOUTS_FROM // 2),
                                    ("train", cfg.episodes, 0)):
            rows, others, talks, seeds = [], [], [], seeds_of(room, first, split == "val")
            for seed in tqdm(itertools.islice(seeds, count), total=count, desc=split, disable=None):
                name, steps, missions = f"{split}_{seed:06d}", [], room.missions(split == "val")
                (folder / name).mkdir()
                rng = np.random.default_rng(seed)
                for picture, action in demonstration(room, seed, SLIPS if split == "train" else 0):
                    image = f"{name}/{len(steps):03d}.png"
                    picture.save(folder / image, compress_level=1)
                    steps.append({"image": image, "action": list(map(float, action))})
                    things = questions(room, missions, rng)
                    talks.append(talk(room, image, things, rng))
                    others.extend(told_otherwise(room, image, things, rng) if split == "train" else ())
                rows.append({"id": name, "instruction": room.mission, "steps": steps})
            (folder / f"{split}.json").write_text(json.dumps(rows + others))
            (folder / f"{split}_talk.json").write_text(json.dumps(talks))
            print(f"{cfg.folder}/{split}.json: {len(rows)} episodes, "
                  f"{sum(len(row['steps']) for row in rows)} steps, "
                  f"{len({row['instruction'] for row in rows})} missions; "
                  f"{len(others)} steps for other words")
    print(f"next     python check.py {cfg.folder}/train.json --image_dir {cfg.folder} --stage vla")


def rollout(room, steps, act):
    """act() -> (E,) numbers. -> whether the mission is done, how many steps it took."""
    plan, taken, over = [], 0, False
    while taken < steps and not over:
        plan = plan or list(np.atleast_2d(act())[:, -1])
        done, over = room.step(plan.pop(0))
        taken += 1
    return done, taken


def actor(who, room, policy, told, seed):
    rng = np.random.default_rng(seed)
    size = (INSIDE * CELL,) * 2
    return {"expert": lambda: [room.expert()], "random": lambda: [rng.integers(ACTIONS)],
            "black": lambda: policy.act_blind([size], told, []),
            }.get(who, lambda: policy.act([room.picture()], told, []))


def let_act(cfg):
    room, policy, step, who = Room(), None, "", rollouts.pick_who(cfg.who, cfg.ckpt)
    if cfg.ckpt:
        import checkpoint
        from generate import Assistant
        step = checkpoint.find(cfg.ckpt).name
        policy = rollouts.Policy(Assistant(cfg.ckpt), NUMBERS, cfg.execute, cfg.unnorm_key)
    answers = rollouts.Answers(cfg.out or Path(cfg.ckpt) / "babyai.jsonl", {
        "ckpt": cfg.ckpt, "step": step, "steps": cfg.steps, "execute": cfg.execute,
        "unnorm_key": cfg.unnorm_key})
    seeds = list(itertools.islice(seeds_of(room, ROLLOUTS_FROM, True), cfg.rollouts))
    missing = answers.missing([(w, "PickupLoc", seed) for w in who for seed in seeds])
    for w, task, seed in tqdm(missing, desc="rollouts", disable=None):
        room.start(seed)
        told = room.other_missions()[0] if w == "wrong" else room.mission
        done, steps = rollout(room, cfg.steps, actor(w, room, policy, told, seed))
        answers.add(w, task, seed, done, steps, told=told, did_as_told=room.taken == told)
    report(answers, who, seeds)


def report(answers, who, seeds):
    scores = {}
    for w in who:
        rows = [answers.rows[w, "PickupLoc", seed] for seed in seeds]
        scores[w] = rollouts.rate(rows)
        print(f"{w:<10}{rollouts.cell(scores[w]):>12}", end="")
        if w == "wrong":                                    # the other thing, which it was told to take
            scores[w]["did_as_told"] = sum(row["did_as_told"] for row in rows)
            print(f"   took what it was told to: {scores[w]['did_as_told']} of {len(rows)}", end="")
        print(flush=True)
    rollouts.write_scores(answers.path, scores)


def main(cfg):
    record(cfg) if cfg.folder else let_act(cfg)


if __name__ == "__main__":
    cfg = parse(BabyConfig, description=__doc__.split("\n\n")[0], positional=("folder",))
    if cfg.folder:
        episodes.ending_well(cfg, main)
    else:
        import ranks                                        # behind the flags: it imports torch
        ranks.run(main, cfg)
