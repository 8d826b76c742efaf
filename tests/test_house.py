"""The house: imports point one way, and no room outgrows its concept.

It reads the source; nothing is imported. The README names the rooms, and says in which order to read them.
"""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What `torchrun train.py --stage align` runs, in the order in which imports may point: to the left.
STORY = ["config", "ranks", "sampler", "prompts", "images", "data", "model", "checkpoint", "train"]
# Behind a flag or a command of its own. The story may ask for one inside a function, where the flag is read.
LEAVES = ["presets", "places", "lengths", "archives", "foreign", "errors", "chat", "trackers", "owner",
          "slices", "shard", "restarts", "parallel", "actions", "lora", "sheets", "generate", "answers",
          "scores", "evaluate", "check", "metrics", "report", "validation", "ledger", "plan", "weights",
          "llava", "openvla", "convert", "desk", "protocols", "serve", "toy", "examples"]
NAMED_BY_THE_LOOP = "profiling"                             # the one leaf that the story imports
# Which room of the story asks for which leaf, inside a function. Three of these are guards: what a foreign
# folder may ask for, what an error says, who may write into a run. The story is read without them.
ASKS_FOR = {"config": {"presets"}, "ranks": {"errors", "restarts"}, "images": {"archives", "foreign"},
            "prompts": {"chat", "foreign"}, "data": {"lengths", "places"}, "model": {"foreign", "parallel"},
            "checkpoint": {"lora", "parallel", "shard", "slices"},
            "train": {"actions", "check", "lora", "report", "owner", "shard", "slices", "validation"}}
ROOMS = [*STORY[:-1], NAMED_BY_THE_LOOP, "train", *LEAVES]


def files_of(room):
    file = ROOT / f"{room}.py"
    return [file] if file.exists() else sorted((ROOT / room).glob("*.py"))


def rooms_in(nodes):
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & set(ROOMS)


def imports(source):
    """-> rooms imported at the top of a file, rooms imported inside its functions."""
    tree = ast.parse(source)
    inside = [node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)]
    return rooms_in(node for node in ast.walk(tree) if node not in inside), rooms_in(inside)


def wrong_imports(room, source):
    top, inside = imports(source)
    above = set(ROOMS[:ROOMS.index(room)]) | ({room} if room in ("toy", "examples") else set())
    return (top - above) | (inside - above - ASKS_FOR.get(room, set()))


def test_every_python_file_at_the_top_is_a_room():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ROOMS) - {"toy", "examples"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_to_rooms_above(room):
    for file in files_of(room):
        assert not wrong_imports(room, file.read_text()), file.name


@pytest.mark.parametrize("room, line", [
    ("data", "import actions"), ("data", "from model import VLM"), ("config", "from ranks import run"),
    ("evaluate", "from toy import robot"), ("train", "import actions"),
    ("data", "def f():\n    import actions")])
def test_an_import_that_points_down_would_be_caught(room, line):
    assert wrong_imports(room, line)
    assert not wrong_imports("train", "def load_data():\n    import actions")


@pytest.mark.parametrize("room", STORY)
def test_the_story_imports_no_leaf(room):
    top, inside = imports(files_of(room)[0].read_text())
    assert not top & set(LEAVES)
    assert inside <= ASKS_FOR.get(room, set())


def test_the_story_can_be_read_in_an_evening():
    lines = {room: len((ROOT / f"{room}.py").read_text().splitlines()) for room in STORY}
    assert lines["train"] <= 400
    assert sum(lines.values()) <= 2400, lines


def test_lines_are_short_enough_to_read():
    for file in (file for room in (*ROOMS, "tests") for file in files_of(room)):
        for i, line in enumerate(file.read_text().splitlines(), start=1):
            assert len(line) <= 110, f"{file.name}, line {i}"


def test_no_room_needs_a_package_beyond_the_six():
    """--tracker asks for another one, inside a function."""
    known = {"torch", "transformers", "safetensors", "numpy", "PIL", "tqdm"} | set(ROOMS)
    for room in (room for room in ROOMS if room not in ("toy", "examples")):
        tree = ast.parse((ROOT / f"{room}.py").read_text())
        asked = {"tensorboard", "wandb"} if room == "trackers" else set()
        for nodes, more in ((tree.body, set()), (ast.walk(tree), asked)):
            nodes = list(nodes)
            names = {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import)
                     for name in node.names}
            names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
            assert names - known - more <= set(sys.stdlib_module_names), room
