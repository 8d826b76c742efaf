"""From a flat list of recorded steps to episodes, the form that `--stage vla` reads.

    python examples/steps_to_episodes.py steps.json --folder data/metaworld

Input: a JSON list of steps, in order, each {"image", "action", "episode", "instruction",
"state" (optional)}, as scripted experts of Meta-World were recorded. Output: train.json, and val.json with
each tenth episode of each task.
"""
import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, knob, parse  # noqa: E402


@dataclass(frozen=True)
class StepsConfig:
    source: str = knob("", "JSON list of steps")
    folder: str = knob("", "where train.json and val.json are written")

    def __post_init__(self):
        if not self.source or not self.folder:
            raise UserError("give two names: python examples/steps_to_episodes.py STEPS.json --folder FOLDER")
        for name in ("train.json", "val.json"):
            if (Path(self.folder) / name).exists():
                raise UserError(f"{Path(self.folder) / name} exists. Move it away, or change --folder")


def read_steps(source):
    """The checked list of steps. Raises UserError with the step's number."""
    try:
        if not Path(source).is_file():
            raise OSError("there is no such file")
        steps = json.loads(Path(source).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{source} can't be read ({e})") from e
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{source} must be a JSON list with at least one step")
    for i, step in enumerate(steps):
        kinds = {"image": str, "action": list, "episode": (int, str), "instruction": str}
        for name, kind in kinds.items():
            if not isinstance(step, dict) or not isinstance(step.get(name), kind) or step[name] in ("", []):
                raise UserError(f"{source}, step {i}: {name!r} is missing or of a wrong kind, "
                                f"found {str(step)[:60]!r}")
    return steps


def main(cfg):
    steps = read_steps(cfg.source)
    seen, files = Counter(), {"train": [], "val": []}
    for (instruction, episode), group in itertools.groupby(
            steps, key=lambda step: (step["instruction"], step["episode"])):
        split = "val" if seen[instruction] % 10 == 9 else "train"
        seen[instruction] += 1
        files[split].append({
            "id": f"{instruction.replace(' ', '-')}-{episode}", "instruction": instruction,
            "steps": [{name: step[name] for name in ("image", "action", "state") if name in step}
                      for step in group]})
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    for split, episodes in files.items():
        (Path(cfg.folder) / f"{split}.json").write_text(json.dumps(episodes))
        print(f"{cfg.folder}/{split}.json: {len(episodes)} episodes, "
              f"{sum(len(e['steps']) for e in episodes)} steps")


if __name__ == "__main__":
    cfg = parse(StepsConfig, description=__doc__.split("\n\n")[0], positional=("source",))
    import ranks                                            # behind the flags: it imports torch
    ranks.run(main, cfg)
