"""toy/world.py: the questions have true answers, and nothing that is held out occurs in training."""
import json
import random

import pytest

from toy import world
from toy.world import Thing

SCENE = (Thing("red", "circle", 0), Thing("blue", "star", 4), Thing("red", "heart", 8))
MOVE = "What action should the robot take to put the {} on the {}?"
ANSWERS = {
    "position": {"Where is the red circle?": "top left", "Where is the blue star?": "center",
                 "Where is the red heart?": "bottom right"},
    "color": {"What color is the circle?": "red", "What color is the star?": "blue",
              "What color is the heart?": "red", "What color is the shape at top left?": "red",
              "What color is the shape at center?": "blue",
              "What color is the shape at bottom right?": "red"},
    "shape": {"What shape is blue?": "star", "What shape is at top left?": "circle",
              "What shape is at center?": "star", "What shape is at bottom right?": "heart"},
    "comparison": {f"Is the {a} {how} the {b}?": answer for how in ("left of", "above") for a, b, answer in (
        ("red circle", "blue star", "yes"), ("red circle", "red heart", "yes"),
        ("blue star", "red heart", "yes"), ("blue star", "red circle", "no"),
        ("red heart", "red circle", "no"), ("red heart", "blue star", "no"))},
    "plan": {MOVE.format("red circle", "blue star"): "top left to center",
             MOVE.format("red circle", "red heart"): "top left to bottom right",
             MOVE.format("blue star", "red circle"): "center to top left",
             MOVE.format("blue star", "red heart"): "center to bottom right",
             MOVE.format("red heart", "red circle"): "bottom right to top left",
             MOVE.format("red heart", "blue star"): "bottom right to center"},
}
SOME = {"count": {"How many shapes are there?": "three", "How many red shapes are there?": "two",
                  "How many blue shapes are there?": "one", "How many green shapes are there?": "zero"},
        "yes_no": {"Is there a red circle?": "yes", "Is there a blue star?": "yes",
                   "Is there a red heart?": "yes", "Is there a blue circle?": "no",
                   "Is there an orange circle?": "no", "Is there a red star?": "no"}}


def asked(kind):
    rng = random.Random(0)
    pairs = [world.ASK[kind](SCENE, rng) for _ in range(500)]
    assert all(dict(pairs)[question] == answer for question, answer in pairs)   # one answer to each question
    return dict(pairs)


@pytest.mark.parametrize("kind", ANSWERS)
def test_all_questions_about_a_scene(kind):
    assert asked(kind) == ANSWERS[kind]


@pytest.mark.parametrize("kind", SOME)
def test_some_of_many_questions_about_a_scene(kind):
    got = asked(kind)
    assert {question: got[question] for question in SOME[kind]} == SOME[kind]


def test_every_kind_of_question_is_tested():
    assert {*ANSWERS, *SOME} == set(world.ASK)


def test_a_scene_is_drawn_only_once_even_if_there_are_few(tmp_path, monkeypatch):
    pool = [(Thing(color, shape, 0), Thing("red", "heart", 8))
            for color in world.COLORS for shape in world.SHAPES]
    monkeypatch.setattr(world, "random_scene", lambda rng: rng.choice(pool))
    writer = world.Writer(tmp_path, seed=0)
    scenes, names = zip(*(writer.scene("test") for _ in pool))
    assert set(scenes) == set(pool) and len(set(names)) == len(pool)


def test_no_held_out_scene_occurs_in_training(tmp_path):
    world.write(tmp_path, seed=3, scale=0.02)
    captions, pictures = {}, {}
    for name in ("align", "finetune", "val_align", "val", "test"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        captions[name] = {row["conversations"][1]["value"] for row in rows if row.get("type") == "caption"}
        pictures[name] = {str(row["image"]) for row in rows if "image" in row}
        assert pictures[name]
    for held_out in ("val_align", "val", "test"):
        for training in ("align", "finetune"):
            assert not pictures[held_out] & pictures[training]
            assert not captions[held_out] & captions[training]
