"""Break one line at a time: do the tests see it?

    python tests/mutate.py --rooms sampler,prompts --tries 20     # 20 lines of each, drawn at random
    python tests/mutate.py --known                                # the lines that tests once missed

Works on a copy of the repository. For each broken line it runs the tests of that room, and prints what
survives: a survivor is a law without a test, or a line without a use. Some are harmless (another wording of
an error, a faster path), so read them; nothing here is a pass or a fail by itself.
"""
import argparse
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# room -> test files that know its laws
TESTS = {"config": "errors fuzz", "sampler": "sampler", "prompts": "prompts chat errors foreign",
         "images": "images errors foreign", "data": "data errors fuzz", "model": "model errors foreign",
         "checkpoint": "checkpoint errors fuzz", "train": "model train", "actions": "actions", "lora": "lora",
         "owner": "owner", "ranks": "train faults owner", "errors": "train faults",
         "chat": "chat prompts", "weights": "convert", "llava": "convert", "openvla": "convert",
         "convert": "convert", "desk": "serve", "protocols": "serve", "serve": "serve", "plan": "plan",
         "ledger": "plan", "evaluate": "evaluate", "generate": "model actions", "profiling": "profiling",
         "restarts": "faults", "validation": "validation", "metrics": "metrics", "trackers": "trackers",
         "report": "report", "presets": "config", "toy/world": "toy", "toy/robot": "toy_robot"}
SWAPS = {"+": "-", "-": "+", "*": "+", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
         "and": "or", "or": "and", "True": "False", "False": "True", "min": "max", "max": "min",
         "ceil": "floor", "any": "all", "all": "any", "//": "/", "not": ""}
KNOWN = [       # room, a line's part, what it becomes: all five passed the tests of their room once
    ("train", "clip_grad_norm_(model.parameters(), cfg.max_grad_norm)",
     "clip_grad_norm_(model.parameters(), 1e9)"),
    ("train", "math.ceil(cfg.warmup_ratio", "math.floor(cfg.warmup_ratio"),
    ("train", "torch.manual_seed(cfg.seed + dist.get_rank())", "torch.manual_seed(cfg.seed)"),
    ("train", "nullcontext() if last else model.no_sync()", "nullcontext()"),
    ("actions", "1e-6)", "1e-9)"),
]


def mutations(source):
    """-> [(line number, column, old word, new word)] of code, not of comments, texts and docstrings."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), word = token.start, token.string
        if word in SWAPS and token.type in (tokenize.OP, tokenize.NAME):
            found.append((row, column, word, SWAPS[word]))
        elif token.type == tokenize.NUMBER and re.fullmatch(r"\d+", word):
            found.append((row, column, word, str(int(word) + 1)))
    return found


def broken(source, row, column, old, new):
    lines = source.splitlines(keepends=True)
    line = lines[row - 1]
    lines[row - 1] = line[:column] + new + line[column + len(old):]
    return "".join(lines)


def survives(copy, room, source, seconds):
    """Runs the tests of the room on the broken source -> whether all pass."""
    (copy / f"{room}.py").write_text(source)
    files = [f"tests/test_{name}.py" for name in TESTS[room].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, timeout=seconds,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:                       # it hangs: seen
        return False
    return done.returncode == 0


def main(args):
    rng, seen, left = random.Random(args.seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "data", "runs", "__pycache__"))
        rooms = sorted({room for room, *_ in KNOWN}) if args.known else args.rooms.split(",")
        for room in rooms:
            source = (ROOT / f"{room}.py").read_text()
            if args.known:
                chosen = [(f"{old} -> {new}", source.replace(old, new))
                          for where, old, new in KNOWN if where == room]
                assert all(text != source for _, text in chosen), "a known line is not there any more"
            else:
                found = mutations(source)
                lines = source.splitlines()
                chosen = [(f"line {row}: {old} -> {new or '(nothing)'}   {lines[row - 1].strip()}",
                           broken(source, row, column, old, new))
                          for row, column, old, new in rng.sample(found, min(args.tries, len(found)))]
            for what, text in chosen:
                if survives(copy, room, text, args.seconds):
                    left.append(f"{room}.py, {what}")
                    print("SURVIVES", left[-1], flush=True)
                seen += 1
            (copy / f"{room}.py").write_text(source)
    print(f"{seen} lines broken, {len(left)} survive")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", default="sampler,prompts,images,data,checkpoint",
                        help=f"of {', '.join(TESTS)}")
    parser.add_argument("--tries", type=int, default=10, help="broken lines for each room (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=300, help="longer than this counts as seen")
    parser.add_argument("--known", action="store_true", help="the lines that tests once missed")
    main(parser.parse_args())
