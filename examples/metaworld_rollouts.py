"""Closed loop in Meta-World: how often a policy does its tasks in the simulator of its demonstrations.

    pip install metaworld==3.1.1 mujoco==3.3.0
    python examples/metaworld_rollouts.py --ckpt runs/mw3 --rollouts 10 --who policy,black,expert,random \
        --tasks button-press-topdown-v3,drawer-close-v3,reach-v3
    python examples/metaworld_rollouts.py --ckpt runs/mt50 --rollouts 10      # all fifty tasks

The protocol is the published one (metaworld_world.py), and pictures are drawn as the demonstrations were.
Each rollout is written down when it is over; the same command goes on where it was stopped. Beside the policy
may act: its expert; chance; the policy with black pictures; the policy with the words of the next task.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse, read_config  # noqa: E402
from examples import rollouts  # noqa: E402
from examples.metaworld_episodes import ROLLOUTS_FROM  # noqa: E402


@dataclass(frozen=True)
class RolloutConfig:
    ckpt: str = knob("", "run folder or step folder of a policy; not needed for --who expert,random")
    tasks: str = knob("all", "all, or groups (easy, medium, hard, very_hard) or tasks, joined by commas")
    rollouts: int = knob(10, "of each task", "episodes")
    who: str = knob("policy", "who acts: policy, black, wrong, expert, random, joined by commas")
    execute: int = knob(0, "actions of a chunk that are done before the policy is asked again; 0 = all")
    steps: int = knob(500, "longest rollout; published: 500", "steps")
    drawing: Literal["", "published", "fast"] = knob(
        "", "how pictures are drawn; empty = as recorded.json beside the run's demonstrations says")
    size: int = knob(0, "each side of a picture; 0 = as recorded.json says", "pixels")
    instructions: str = knob("", "JSON file {task: words}, for a policy that learned other words than ours")
    unnorm_key: str = knob("", "the dataset whose units are meant; needed if the policy knows several")
    seed: int = knob(ROLLOUTS_FROM, "of the first start; demonstrations lie below 100000")
    out: str = knob("", "where the rollouts are written; empty = metaworld.jsonl in the run folder")

    def __post_init__(self):
        rollouts.pick_who(self.who, self.ckpt)
        if not self.ckpt and not self.out:
            raise UserError("give --out FILE.jsonl: without --ckpt there is no run folder to write into")
        check_limits(self, {"rollouts": (1, 10 ** 5), "execute": (0, 1000), "steps": (1, 500),
                            "size": (0, 1024), "seed": (0, 2 ** 31)})


def find_drawing(cfg):
    """How the demonstrations were drawn, unless flags say it. Raises UserError where neither is known."""
    from examples.metaworld_world import Drawing
    recorded = {}
    if cfg.ckpt:
        file = Path(read_config(cfg.ckpt).train_json.split(",")[0]).parent / "recorded.json"
        recorded = json.loads(file.read_text()) if file.exists() else {}
    way, size = cfg.drawing or recorded.get("drawing"), cfg.size or recorded.get("size")
    if not way or not size:
        if set(rollouts.pick_who(cfg.who, cfg.ckpt)) <= {"expert", "random"}:
            return Drawing("fast", 96)                      # no one will look
        raise UserError("how the demonstrations were drawn is not known: there is no recorded.json beside "
                        "the run's --train_json. Give --drawing and --size")
    return Drawing(way, size)


def read_instructions(file, tasks):
    """-> {task: words}, ours where the file has none."""
    from examples.metaworld_world import INSTRUCTIONS
    own = {}
    if file:
        try:
            own = json.loads(Path(file).read_text())
            if not isinstance(own, dict) or not all(isinstance(words, str) for words in own.values()):
                raise ValueError("it must be a JSON object, {task: words}")
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"--instructions {file} can't be read ({e})") from e
    return {task: own.get(task, INSTRUCTIONS[task]) for task in tasks}


def rollout(world, seed, steps, act):
    """act(known) -> (E, 4) actions that are done one after the other; then it is asked again.
    -> whether the task was done at any step, and how many steps that took."""
    known, plan = world.start(seed), []
    for t in range(steps):
        if not plan:
            plan = list(act(known))
        known, done = world.step(plan.pop(0))
        if done:
            return True, t + 1
    return False, steps


def actor(who, world, policy, instruction, seed):
    """-> act(known) for a rollout."""
    from examples.metaworld_world import state_of
    rng = np.random.default_rng(seed)
    size = (world.drawing.size,) * 2
    return {"expert": lambda known: [world.expert(known)],
            "random": lambda known: rng.uniform(-1, 1, (1, 4)),
            "black": lambda known: policy.act_blind([size], instruction, state_of(known)),
            }.get(who, lambda known: policy.act([world.picture()], instruction, state_of(known)))


def roll_out(cfg, policy, answers, words, drawing):
    """All rollouts that are missing: task by task, so that each simulator is made once."""
    from examples.metaworld_world import World
    tasks, seeds = list(words), range(cfg.seed, cfg.seed + cfg.rollouts)
    missing = answers.missing([(who, task, seed) for task in tasks
                               for who in rollouts.pick_who(cfg.who, cfg.ckpt) for seed in seeds])
    with tqdm(total=len(missing), desc="rollouts", disable=None) as bar:
        for i, task in enumerate(tasks):
            todo = [(who, seed) for who, of, seed in missing if of == task]
            if not todo:
                continue
            with World(task, drawing) as world:
                for who, seed in todo:
                    told = words[tasks[(i + 1) % len(tasks)] if who == "wrong" else task]
                    act = actor(who, world, policy, told, seed)
                    answers.add(who, task, seed, *rollout(world, seed, cfg.steps, act))
                    bar.update()


def scores_of(cfg, answers, tasks):
    """-> {who: {"tasks": {task: rate}, "groups": {group: mean of its tasks}, "mean of groups": ...,
    "mean of tasks": ...}}. The literature's average is the mean of the four groups over all fifty tasks:
    5 very hard tasks then weigh as much as 28 easy ones."""
    from examples.metaworld_world import GROUPS
    seeds, scores = range(cfg.seed, cfg.seed + cfg.rollouts), {}
    for who in rollouts.pick_who(cfg.who, cfg.ckpt):
        of = {task: rollouts.rate([answers.rows[who, task, seed] for seed in seeds]) for task in tasks}
        groups = {group: float(np.mean([of[task]["success"] for task in in_group if task in of]))
                  for group, in_group in GROUPS.items() if set(in_group) & set(of)}
        scores[who] = {"tasks": of, "groups": groups, "mean of groups": float(np.mean(list(groups.values()))),
                       "mean of tasks": float(np.mean([score["success"] for score in of.values()]))}
    return scores


def table(scores, tasks):
    """Lines of text: each task, each group, both means; one column for each who."""
    from examples.metaworld_world import GROUPS
    who, lines = list(scores), []

    def line(name, cells):
        lines.append(f"{name:<30}" + "".join(f"{text:>12}" for text in cells))
    line("", who)
    for group, in_group in GROUPS.items():
        for task in in_group:
            if task in tasks:
                line(task, [rollouts.cell(scores[w]["tasks"][task]) for w in who])
        if group in scores[who[0]]["groups"]:
            asked = len(set(in_group) & set(tasks))
            line(f"  {group}: {asked} of {len(in_group)} tasks",
                 [f"{scores[w]['groups'][group]:.1%}" for w in who])
    for mean, text in (("mean of groups", f"mean of {len(scores[who[0]]['groups'])} groups of 4"),
                       ("mean of tasks", f"mean of {len(tasks)} tasks of 50")):
        line(text, [f"{scores[w][mean]:.1%}" for w in who])
    return lines


def main(cfg):
    from examples import metaworld_world
    words = read_instructions(cfg.instructions, metaworld_world.pick_tasks(cfg.tasks))
    if "wrong" in cfg.who and len(words) < 2:
        raise UserError("--who wrong needs two tasks or more: the policy is told the words of the next one")
    drawing, policy, step = find_drawing(cfg), None, ""
    if cfg.ckpt:
        import checkpoint
        from generate import Assistant
        step = checkpoint.find(cfg.ckpt).name
        policy = rollouts.Policy(Assistant(cfg.ckpt), 4, cfg.execute, cfg.unnorm_key, state_size=4)
    answers = rollouts.Answers(cfg.out or Path(cfg.ckpt) / "metaworld.jsonl", {
        "ckpt": cfg.ckpt, "step": step, "drawing": drawing.way, "size": drawing.size, "steps": cfg.steps,
        "execute": cfg.execute, "unnorm_key": cfg.unnorm_key, "simulator": metaworld_world.version(),
        "instructions": cfg.instructions})
    roll_out(cfg, policy, answers, words, drawing)
    scores = scores_of(cfg, answers, list(words))
    print("\n".join(table(scores, list(words))))
    if policy:
        policy.show_speed()
    rollouts.write_scores(answers.path, scores)


if __name__ == "__main__":
    cfg = parse(RolloutConfig, description=__doc__.split("\n\n")[0])
    import ranks                                            # behind the flags: it imports torch
    ranks.run(main, cfg)
