"""From a flat list of recorded steps to episodes, the form that `--stage vla` reads.

    python examples/steps_to_episodes.py steps.json data/metaworld

Input: a JSON list of steps, in order, each {"image", "action", "episode", "instruction",
"state" (optional)}, as scripted experts of Meta-World were recorded. Output: train.json, and val.json with
each tenth episode of each task.
"""
import argparse
import itertools
import json
from collections import Counter
from pathlib import Path


def main(source, folder):
    steps = json.loads(Path(source).read_text())
    seen, files = Counter(), {"train": [], "val": []}
    for (instruction, episode), group in itertools.groupby(
            steps, key=lambda step: (step["instruction"], step["episode"])):
        split = "val" if seen[instruction] % 10 == 9 else "train"
        seen[instruction] += 1
        files[split].append({
            "id": f"{instruction.replace(' ', '-')}-{episode}", "instruction": instruction,
            "steps": [{name: step[name] for name in ("image", "action", "state") if name in step}
                      for step in group]})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, episodes in files.items():
        (Path(folder) / f"{split}.json").write_text(json.dumps(episodes))
        print(f"{folder}/{split}.json: {len(episodes)} episodes, "
              f"{sum(len(e['steps']) for e in episodes)} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="JSON list of steps")
    parser.add_argument("folder", help="where to write")
    main(**vars(parser.parse_args()))
