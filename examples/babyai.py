"""BabyAI's PickupLoc: a room where only the words say what to do. Records its bot, and lets a policy act.

    pip install minigrid==3.2.0
    python examples/babyai.py data/babyai --episodes 2000
    torchrun train.py --stage vla --ckpt runs/toy-finetune-x7 --train_json data/babyai/train.json \
        --val_json data/babyai/val.json --image_dir data/babyai --trains vision,projector,llm --run_id babyai
    python examples/babyai.py --ckpt runs/babyai --rollouts 100 --who policy,black,wrong,expert,random

Eight or nine balls, boxes and keys in six colors lie in a room; "pick up the grey key on your left"
(arXiv 1810.08272). A fifth of all missions, decided by their words, is in no demonstration; rollouts are of
those only. The first thing that is picked up ends a rollout, as nothing can be put down.

An action is one number: 0 turn left, 1 turn right, 2 forward, 3 pick up. "Left" and "behind" are meant from
where the agent stood at the start, which a picture of now does not show. So a white outline of the agent
stays there, in each picture. The bot sees the 7 x 7 cells before it and turns to look around; the policy
sees the whole room.
"""
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
ACTIONS = 4
ROLLOUTS_FROM = 1_000_000                                   # seeds below belong to demonstrations


@dataclass(frozen=True)
class BabyConfig:
    folder: str = knob("", "where the bot's episodes are written; it must not exist")
    episodes: int = knob(2000, "how many to write for training; a twentieth more for val.json", "episodes")
    ckpt: str = knob("", "run folder or step folder of a policy: it acts, and no episodes are written")
    rollouts: int = knob(100, "rooms with unseen missions, in which each of --who acts", "episodes")
    who: str = knob("policy", "who acts: policy, black, wrong, expert, random, joined by commas")
    execute: int = knob(0, "actions of a chunk that are done before the policy is asked again; 0 = all")
    steps: int = knob(20, "longest rollout; the bot needs 6 on average, 15 at most", "steps")
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
    """One mission in five never occurs in training: decided by its words, so whatever the seed."""
    return zlib.crc32(mission.encode()) % 5 == 0


class Room:
    """The simulator, its bot, and what a policy sees."""

    def __init__(self):
        import gymnasium
        import minigrid.utils.baby_ai_bot as bots
        self.env, self.make_bot = gymnasium.make("BabyAI-PickupLoc-v0").unwrapped, bots.BabyAIBot

    def start(self, seed):
        with contextlib.redirect_stdout(io.StringIO()):     # it prints each room that it throws away
            self.env.reset(seed=seed)
        self.home = tuple(map(int, self.env.agent_pos)), int(self.env.agent_dir)
        self.bot, self.last = self.make_bot(self.env), None

    @property
    def mission(self):
        return self.env.mission

    def other_missions(self):
        """Missions for things that lie in this room, too, but look unlike all that count."""
        wanted = {(thing.color, thing.type) for thing in self.env.instrs.desc.obj_set}
        there = {(thing.color, thing.type) for thing in self.env.grid.grid
                 if thing is not None and thing.type in ("ball", "box", "key")}
        return [f"pick up the {color} {kind}" for color, kind in sorted(there - wanted)]

    def expert(self):
        return int(self.bot.replan(self.last))

    def step(self, action):
        """-> whether the mission is done, whether the rollout is over."""
        self.last = self.env.actions(int(np.clip(np.round(action), 0, ACTIONS - 1)))
        _, reward, done, out_of_time, _ = self.env.step(self.last)
        return bool(done and reward > 0), bool(done or out_of_time or self.env.carrying)

    @property
    def taken(self):
        """The mission that was done, in words, whichever was meant. "" = nothing was picked up."""
        thing = self.env.carrying
        return f"pick up the {thing.color} {thing.type}" if thing else ""

    def picture(self):
        """The room from above without its walls (PIL, RGB), and in white where the agent was at the start."""
        frame = self.env.get_frame(highlight=False, tile_size=CELL)
        image = Image.fromarray(np.ascontiguousarray(frame[CELL:-CELL, CELL:-CELL]))
        (x, y), direction = self.home
        corners = np.array([(-6, -6), (6, 0), (-6, 6)])     # a triangle that points to the right
        turn = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), direction)       # clockwise, y goes down
        corners = corners @ turn + (np.array([x, y]) - 0.5) * CELL      # the first cells, 0, are walls
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.round().tolist()], outline="white")
        return image


def seeds_of(room, first, want_unseen):
    """Endless: from `first` on, the seeds whose mission is unseen, or is not. The room is then started."""
    for seed in itertools.count(first):
        room.start(seed)
        if unseen(room.mission) == want_unseen and room.other_missions():
            yield seed


def record(cfg):
    room = Room()
    with episodes.appearing(cfg.folder) as folder:
        for split, count, first in (("val", max(1, cfg.episodes // 20), ROLLOUTS_FROM // 2),
                                    ("train", cfg.episodes, 0)):
            rows, seeds = [], seeds_of(room, first, split == "val")
            for seed in tqdm(itertools.islice(seeds, count), total=count, desc=split, disable=None):
                name, steps, over = f"{split}_{seed:06d}", [], False
                (folder / name).mkdir()
                while not over:
                    image, action = f"{name}/{len(steps):03d}.png", room.expert()
                    room.picture().save(folder / image)
                    steps.append({"image": image, "action": [float(action)]})
                    done, over = room.step(action)
                if done:                # not where the bot takes up what stands in its way, to put it aside
                    rows.append({"id": name, "instruction": room.mission, "steps": steps})
            (folder / f"{split}.json").write_text(json.dumps(rows))
            print(f"{cfg.folder}/{split}.json: {len(rows)} episodes, "
                  f"{sum(len(row['steps']) for row in rows)} steps, "
                  f"{len({row['instruction'] for row in rows})} missions")
    print(f"next     python check.py {cfg.folder}/train.json --image_dir {cfg.folder} --stage vla")


def rollout(room, steps, act):
    """act() -> (E,) numbers. -> whether the mission is done, how many steps it took."""
    plan, taken, over = [], 0, False
    while taken < steps and not over:
        plan = plan or list(np.ravel(act()))
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
        policy = rollouts.Policy(Assistant(cfg.ckpt), 1, cfg.execute, cfg.unnorm_key)
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
