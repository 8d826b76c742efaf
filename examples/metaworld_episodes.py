"""Records demonstrations of Meta-World's experts, as episodes for `--stage vla`.

    pip install metaworld==3.1.1 mujoco==3.3.0
    python examples/metaworld_episodes.py data/mt50 --episodes 50
    python examples/metaworld_episodes.py data/mw3 --tasks button-press-topdown-v3,drawer-close-v3,reach-v3 \
        --episodes 30 --drawing fast --size 96

    OUT/recorded.json           how it was recorded; the rollouts read from it how to draw
    OUT/reach-v3/               the episodes of one task: there whole or not at all
    OUT/train.json, val.json    those of all tasks so far; their pictures are named from OUT on

The same command again goes on with the tasks that are missing. An episode ends when its task is done; where
the expert fails, the next start is taken. Pictures are PNG files: what a rollout shows has the same bits.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse  # noqa: E402
from examples import episodes  # noqa: E402

ROLLOUTS_FROM = 100_000                                     # seeds below belong to demonstrations


@dataclass(frozen=True)
class RecordConfig:
    out: str = knob("", "folder of the episodes; one that this command began is continued")
    tasks: str = knob("all", "all, or groups (easy, medium, hard, very_hard) or tasks, joined by commas")
    episodes: int = knob(50, "of each task", "episodes")
    drawing: Literal["published", "fast"] = knob("published", "with shadows at 480 x 480, or fast without")
    size: int = knob(480, "each side of a picture", "pixels")
    noise: float = knob(0.0, "what is done misses what is written down by so much (standard deviation, of "
                             "-1..1): the data then shows how to recover; 0 = as published")
    steps: int = knob(500, "an expert who is not done by then has failed", "steps")
    val_every: int = knob(10, "10 = each tenth episode of each task goes to val.json; 0 = none")
    seed: int = knob(0, "of the first start; others follow by one")

    def __post_init__(self):
        if not self.out:
            raise UserError("give a folder: python examples/metaworld_episodes.py OUT")
        check_limits(self, {"episodes": (1, 10 ** 4), "size": (16, 1024), "noise": (0, 2),
                            "steps": (1, 500), "val_every": (0, 10 ** 4), "seed": (0, ROLLOUTS_FROM // 2)})

    @property
    def settings(self):
        """All that decides what an episode holds."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "tasks")}


def demonstrate(world, seed, cfg, save):
    """One episode of the expert -> T names of pictures, (T, 4) actions, (T, 4) states, whether the task was
    done. save(t, picture) -> name. Written down is the expert's answer to what the picture shows; with
    --noise something else is done."""
    from examples.metaworld_world import state_of
    known, rng, names, actions, states = world.start(seed), np.random.default_rng(seed), [], [], []
    for t in range(cfg.steps):
        names.append(save(t, world.picture()))
        actions.append(world.expert(known))
        states.append(state_of(known))
        known, done = world.step(actions[-1] + rng.normal(0, 1, 4) * cfg.noise * [1, 1, 1, 0])
        if done:
            break
    return names, np.array(actions), np.array(states), done


def record(task, cfg):
    """All episodes of one task, in a folder that appears when they are complete."""
    from examples import metaworld_world
    out = Path(cfg.out) / task
    form = episodes.ConversionConfig(dataset=task, out=str(out), val_every=cfg.val_every)
    with (episodes.appearing(out) as folder,
          metaworld_world.World(task, metaworld_world.Drawing(cfg.drawing, cfg.size)) as world):
        writer, recorded, seed = episodes.Writer(folder, form, ["corner"], 0), 0, cfg.seed
        writer.bar.set_description(task)
        with writer.bar:
            while recorded < cfg.episodes:
                if seed - cfg.seed > 2 * cfg.episodes + 10:
                    raise UserError(f"{task}: the expert did it {recorded} times of {seed - cfg.seed} only. "
                                    "Give more --steps, or less --noise")
                names, actions, states, done = demonstrate(
                    world, seed, cfg, partial(writer.pixels, recorded, "corner"))
                if done:
                    writer.episode(f"{task}/{seed}", metaworld_world.INSTRUCTIONS[task],
                                   [[name] for name in names], actions, states, f"{task}, seed {seed}")
                    recorded += 1
                    writer.expect(recorded, cfg.episodes)
                else:                                       # its pictures are no one's
                    for name in names:
                        (folder / "images" / name).unlink()
                seed += 1
        writer.finish()


def join(out, tasks):
    """train.json and val.json of all tasks -> how many episodes each has. Each file appears whole."""
    counts = {}
    for split in ("train", "val"):
        unfinished = out / f".{split}.unfinished"
        counts[split] = 0
        with open(unfinished, "w", encoding="utf-8") as file:
            for task in tasks:
                part = out / task / f"{split}.json"
                for episode in json.loads(part.read_text()) if part.exists() else []:
                    for step in episode["steps"]:
                        step["image"] = f"{task}/images/{step['image']}"
                    file.write((",\n" if counts[split] else "[\n") + json.dumps(episode))
                    counts[split] += 1
            file.write("\n]\n" if counts[split] else "[]\n")
        os.replace(unfinished, out / f"{split}.json")
    return counts


def begin(cfg, version):
    """OUT/recorded.json, in a new folder or one of the same settings. Raises UserError."""
    out, file = Path(cfg.out), Path(cfg.out) / "recorded.json"
    settings = cfg.settings | {"simulator": version}
    if file.exists():
        before = json.loads(file.read_text())
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            raise UserError(f"{out} was recorded with {changed[0]} {before.get(changed[0])}, this command "
                            f"says {settings[changed[0]]}. Give another folder, or the same flags")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists, and this command did not make it. Give another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))


def main(cfg):
    from examples import metaworld_world
    tasks = metaworld_world.pick_tasks(cfg.tasks)
    begin(cfg, metaworld_world.version())
    for i, task in enumerate(tasks):
        if not (Path(cfg.out) / task).exists():
            record(task, cfg)
        print(f"{i + 1} of {len(tasks)} {task}", flush=True)
    there = [task for task in metaworld_world.INSTRUCTIONS if (Path(cfg.out) / task).exists()]
    for split, count in join(Path(cfg.out), there).items():
        print(f"{Path(cfg.out) / split}.json: {count} episodes of {len(there)} tasks")
    print(f"next     python check.py {cfg.out}/train.json --image_dir {cfg.out} --stage vla")


if __name__ == "__main__":
    cfg = parse(RecordConfig, description=__doc__.split("\n\n")[0], positional=("out",))
    episodes.ending_well(cfg, main)
