"""examples/babyai.py with the simulator itself: missions that training never shows, and the controls."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from config import UserError

pytest.importorskip("minigrid")
from examples import babyai, rollouts  # noqa: E402
from examples.babyai import BabyConfig, Room  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babyai") / "data"
    babyai.record(BabyConfig(folder=str(folder), episodes=40))
    return folder


def test_training_and_held_out_missions_share_no_words(folder):
    missions = {}
    for split in ("train", "val"):
        episodes = json.loads((folder / f"{split}.json").read_text())
        missions[split] = {episode["instruction"] for episode in episodes}
    assert len(missions["train"]) > 10
    assert not any(babyai.unseen(mission) for mission in missions["train"])
    assert all(babyai.unseen(mission) for mission in missions["val"])
    assert babyai.unseen("pick up the grey key") and not babyai.unseen("pick up the red ball")


def test_recorded_actions_do_the_mission_and_recorded_pictures_are_those_of_rollouts(folder):
    room = Room()
    for episode in json.loads((folder / "train.json").read_text())[:10]:
        room.start(int(episode["id"].split("_")[1]))
        assert room.mission == episode["instruction"]
        for step in episode["steps"]:
            with Image.open(folder / step["image"]) as image:
                assert np.array_equal(np.asarray(image), np.asarray(room.picture()))
            done, over = room.step(step["action"][0])
        assert done and over


def test_the_outline_stays_where_the_agent_stood():
    room, seed = Room(), 0
    room.start(seed)
    room.env.agent_dir = 0                                  # it looks to the right
    room.home = tuple(room.env.agent_pos), 0
    x, y = ((place - 1) * 16 for place in room.env.agent_pos)       # of its cell; the walls are not shown
    assert room.picture().size == (96, 96)

    def white(image):
        return {(int(c), int(r)) for r, c in np.argwhere((np.asarray(image) == 255).all(-1))}
    before = white(room.picture())
    assert {(x + 2, y + 2), (x + 14, y + 8), (x + 2, y + 14)} <= before     # 8 +- 6: the three corners
    room.step(1)
    assert white(room.picture()) == before
    room.home = room.home[0], 1                             # had it looked down, the tip would be below
    assert {(x + 14, y + 2), (x + 8, y + 14), (x + 2, y + 2)} <= white(room.picture())


def test_a_thing_of_another_kind_ends_the_rollout_without_success():
    room = Room()
    for seed in babyai.seeds_of(room, 0, False):
        other = room.other_missions()[0]
        wanted = room.env.instrs.desc.obj_set
        thing = next(thing for thing in room.env.grid.grid if thing is not None
                     and other == f"pick up the {thing.color} {thing.type}")
        assert all((thing.color, thing.type) != (one.color, one.type) for one in wanted)
        room.env.carrying = thing                           # as if it had been picked up
        assert room.step(0) == (False, True)
        assert room.taken == other
        if seed > 20:
            break


class Follower:
    """Acts as an Assistant that follows its words: it knows the bot's way from each picture of a room whose
    own mission it is told, and turns left for ever where it is told something else."""

    def __init__(self, chunk=1):
        self.policy = SimpleNamespace(dimensions=1, state=False, state_size=0, chunk=chunk)
        self.ways, room = {}, Room()
        seeds = babyai.seeds_of(room, babyai.ROLLOUTS_FROM, True)
        for _ in range(6):
            next(seeds)
            steps, over = [], False
            while not over:
                steps.append((room.picture().tobytes(), room.expert()))
                over = room.step(steps[-1][1])[1]
            plan = [action for _, action in steps] + [0] * chunk
            for t, (picture, _) in enumerate(steps):
                self.ways[picture, room.mission] = plan[t:t + chunk]

    def act(self, pictures, instructions, key=""):
        way = self.ways.get((pictures[0][0].tobytes(), instructions[0]), [0] * self.policy.chunk)
        return np.array(way, float).reshape(1, -1, 1)


@pytest.mark.parametrize("chunk, execute", [(1, 0), (4, 0), (4, 2)])
def test_rollouts_and_their_controls(tmp_path, monkeypatch, capsys, chunk, execute):
    import checkpoint
    import generate
    monkeypatch.setattr(generate, "Assistant", lambda ckpt: Follower(chunk))
    monkeypatch.setattr(checkpoint, "find", lambda ckpt: tmp_path / "step-00000001")
    cfg = BabyConfig(ckpt="runs/x", rollouts=4, who="policy", execute=execute, out=str(tmp_path / "a.jsonl"))
    babyai.main(cfg)
    lines = len((tmp_path / "a.jsonl").read_text().splitlines())
    assert lines == 1 + 4
    babyai.main(BabyConfig(ckpt="runs/x", rollouts=6, who="policy,black,wrong,expert", execute=execute,
                           out=str(tmp_path / "a.jsonl")))  # the four are not done again
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1 + 4 * 6
    scores = json.loads((tmp_path / "a.json").read_text())
    assert {who: score["done"] for who, score in scores.items()} == {
        "policy": 6, "black": 0, "wrong": 0, "expert": 6}
    assert scores["wrong"]["did_as_told"] == 0
    assert "expert          6 of 6" in capsys.readouterr().out


def test_chance_is_far_from_the_bot(tmp_path):
    babyai.main(BabyConfig(rollouts=30, who="random,expert", out=str(tmp_path / "a.jsonl")))
    scores = json.loads((tmp_path / "a.json").read_text())
    assert scores["expert"]["done"] == 30 and scores["random"]["done"] <= 9
    rows = rollouts.Answers(tmp_path / "a.jsonl", {"ckpt": ""}).rows
    assert max(row["steps"] for row in rows.values()) == 20


@pytest.mark.parametrize("flags, text", [
    ({}, "give a FOLDER"), ({"folder": "a", "ckpt": "b"}, "give a FOLDER"),
    ({"folder": "a", "rollouts": 5}, "--rollouts is of no use with a FOLDER"),
    ({"ckpt": "a", "episodes": 5}, "--episodes is of no use without a FOLDER")])
def test_flags_that_contradict_each_other(flags, text):
    with pytest.raises(UserError, match=text):
        BabyConfig(**flags)
