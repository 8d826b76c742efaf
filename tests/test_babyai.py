"""examples/babyai.py with the simulator itself: missions that training never shows, and the controls."""
import json
import re
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
    babyai.record(BabyConfig(folder=str(folder), episodes=60))
    return folder


def rows_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


MISSION = r"Where is (?:the|a) (?:(?:red|green|blue|purple|yellow|grey) )?(?:ball|box|key|object)"
ENDS = " in front of you", " behind you", " on your left", " on your right"


def asked_in(folder, split):
    """The questions of its conversations, but "Where are you?": missions, as missions; others."""
    asked = {turn["value"].removeprefix("<image>\n") for row in rows_of(folder, f"{split}_talk")
             for turn in row["conversations"] if turn["from"] == "human"} - {"Where are you?"}
    missions = {words for words in asked
                if re.fullmatch(MISSION + "(" + "|".join(ENDS) + r")?\?", words)}
    return {"pick up" + words[len("Where is"):-1] for words in missions}, asked - missions


def of_one(row):
    """Is it one step that was told otherwise? Then its words are in its id."""
    return ":" in row["id"]


def demonstrations(folder, split):
    return [row for row in rows_of(folder, split) if not of_one(row)]


def test_training_and_held_out_missions_share_no_words(folder):
    """Nor do conversations ask for what is held out. What they ask besides is no mission: a line in the room,
    named by a column or a row, ends it."""
    for split, held_out in (("train", False), ("val", True)):
        missions, others = asked_in(folder, split)
        for told in (missions, {row["instruction"] for row in demonstrations(folder, split)}):
            assert len(told) > (1 if held_out else 10)
            assert all(babyai.unseen(mission) == held_out for mission in told)
        assert len(others) > 10
        for words in others:
            assert re.fullmatch(MISSION + r" (left of|right of) [a-f]\?|" + MISSION
                                + r" (above|below) [1-6]\?", words), words
    assert babyai.unseen("pick up a grey key")              # an article makes no other mission of it
    assert babyai.unseen("pick up the grey key") and not babyai.unseen("pick up the red ball")


def test_each_picture_is_also_a_step_for_other_words(folder):
    """What the expert would do there for two of the questions; never for what is held out."""
    whole, others = demonstrations(folder, "train"), [row for row in rows_of(folder, "train") if of_one(row)]
    assert len(whole) == 60 and len(others) > 1.8 * sum(len(row["steps"]) for row in whole)
    missions, lines = asked_in(folder, "train")
    lines = {"pick up" + words[len("Where is"):-1] for words in lines}
    told = {row["instruction"] for row in others}
    assert told <= missions | lines and told & missions and told & lines
    assert not any(babyai.unseen(mission) for mission in told & missions)
    by_image = {step["image"]: step["action"] for row in whole for step in row["steps"]}
    assert all(len(row["steps"]) == 1 for row in others)
    same = [(by_image[step["image"]], step["action"]) for row in others for step in row["steps"]]
    assert all(here[:3] == there[:3] for here, there in same)               # the agent stands where it stands
    assert sum(here[3:] != there[3:] for here, there in same) > len(same) / 2   # but is after something else
    assert not any(map(of_one, rows_of(folder, "val")))


def test_recorded_actions_do_the_mission_and_recorded_pictures_are_those_of_rollouts(folder):
    room = Room()
    for episode in rows_of(folder, "val"):                  # none of its steps is a slip
        room.start(int(episode["id"].split("_")[1]))
        assert room.mission == episode["instruction"]
        for step in episode["steps"]:
            with Image.open(folder / step["image"]) as image:
                assert np.array_equal(np.asarray(image), np.asarray(room.picture()))
            done, over = room.step(step["action"][-1])
        assert done and over


def test_after_a_slip_the_expert_finds_its_way(folder):
    room, slips = Room(), 0
    for episode in demonstrations(folder, "train"):
        *before, last = [step["action"][-1] for step in episode["steps"]]
        assert last == 3
        seed = int(episode["id"].split("_")[1])
        room.start(seed, min(8, 1 + seed % 14))             # in half of the rooms for training lie eight
        assert room.mission == episode["instruction"]
        direct = sum(1 for _ in babyai.demonstration(room, 0))
        assert len(before) + 1 >= direct
        slips += len(before) + 1 > direct
    assert slips > 10


def arrange(things, agent):
    """A room with these things only, {(column, row): thing}, places of the simulator, walls included."""
    room = Room()
    room.start(0)
    room.env.grid.grid = [thing if thing is not None and thing.type == "wall" else None
                          for thing in room.env.grid.grid]
    for place, thing in things.items():
        room.env.grid.set(*place, thing)
    room.env.agent_pos, room.env.agent_dir = np.array(agent[:2]), agent[2]
    room.home, room.turns = room.pose, (agent[2] + 1) % 4
    return room


def test_the_expert_goes_round_what_lies_in_its_way():
    from minigrid.core.world_object import Ball, Box
    ball, box = Ball("red"), Box("red")
    room = arrange({(5, 3): ball}, (2, 3, 0))               # it looks right: the picture is turned
    assert room.expert([ball]) == (2, 1, 3, 2)              # third column, second row; up; forward
    room.env.instrs.desc.obj_set = [ball]
    assert room.numbers() == (2, 4, 3, 2, 1, 3, 2)          # before it: third column, fifth row, looks up
    room.step(2)
    room.step(2)
    assert room.expert([ball]) == (2, 1, 3, 3)
    room.step(0)
    assert room.expert([ball]) == (2, 1, 3, 1)
    room = arrange({(5, 3): ball, (3, 3): box}, (2, 3, 0))
    assert room.expert([ball]) == (2, 1, 2, 0)              # the box is in its way: to the left
    assert room.expert([box, ball]) == (2, 3, 3, 3)         # the nearest one
    assert room.expert([]) is None


def test_what_a_conversation_says():
    from minigrid.core.world_object import Ball, Key
    ball, key = Ball("red"), Key("grey")
    room = arrange({(5, 3): ball, (2, 5): key}, (2, 3, 0))
    things = {"pick up the red ball": [ball], "pick up a key on your right": [key]}
    first = set()
    for seed in range(20):
        row = babyai.talk(room, "0.png", things, np.random.default_rng(seed))
        turns = [turn["value"] for turn in row["conversations"]]
        assert (row["id"], row["image"]) == ("0.png", "0.png") and turns[0].startswith("<image>\n")
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * 3
        turns[0] = turns[0].removeprefix("<image>\n")
        assert dict(zip(turns[::2], turns[1::2])) == {
            "Where are you?": "c5 top", "Where is the red ball?": "c2 top",
            "Where is a key on your right?": "e5 right"}
        first.add(turns[0])
    assert len(first) == 3                                  # a policy is asked without a question before


def test_a_line_tells_things_apart():
    from minigrid.core.world_object import Ball, Key
    ball, red, grey = Ball("red"), Key("red"), Key("grey")  # in the turned picture: c2, a6 and e5
    room = arrange({(5, 3): ball, (1, 1): red, (2, 5): grey}, (2, 3, 0))
    rng, found = np.random.default_rng(0), {}
    for _ in range(3000):
        words, meant = room.beside_a_line(rng)
        assert found.setdefault(words, meant) == meant
    assert found["pick up the red object left of c"] == {red}
    assert found["pick up the red object left of d"] == {ball, red}
    assert found["pick up the key right of b"] == {grey}
    assert found["pick up the key below 5"] == {red}
    assert found["pick up the object above 6"] == {ball, grey}
    assert not found["pick up the grey key left of e"]      # it stands in e


def test_no_two_questions_mean_the_same_things():
    from minigrid.core.world_object import Ball, Key
    ball, key = Ball("red"), Key("grey")
    room = arrange({(5, 3): ball, (2, 5): key}, (2, 3, 0))
    missions = {"pick up the red ball": {ball}, "pick up a ball": {ball}, "pick up the key": {key}}
    for seed in range(20):
        asked = babyai.questions(room, missions, np.random.default_rng(seed))
        meant = [frozenset(things) for things in asked.values()]
        assert len(meant) == len(set(meant)) and {frozenset([ball]), frozenset([key])} <= set(meant)
        assert "pick up the key" in asked                   # a mission stays, if a line means the same


def test_the_outline_stays_where_the_agent_stood():
    room = arrange({}, (2, 3, 0))
    x, y = 2 * 16, 4 * 16                                   # of its cell in the turned picture
    assert room.picture().size == (96, 96)

    def outline(image):
        return {(int(c), int(r)) for r, c in np.argwhere((np.asarray(image) == 0).all(-1))}
    before = outline(room.picture())
    assert {(x + 8, y + 2), (x + 2, y + 14), (x + 14, y + 14)} <= before    # it points up, as it looked then
    room.step(1)
    assert outline(room.picture()) == before
    room.step(2)
    pixels = np.asarray(room.picture())
    assert outline(room.picture()) == before and tuple(pixels[y + 8, x + 16 + 8]) == (255, 0, 0)


def test_a_thing_of_another_kind_ends_the_rollout_without_success():
    room = Room()
    for seed in babyai.seeds_of(room, 500_000, True):
        other = room.other_missions()[0]
        wanted = room.env.instrs.desc.obj_set
        thing = next(thing for thing in room.env.grid.grid if thing is not None
                     and other == f"pick up the {thing.color} {thing.type}")
        assert all((thing.color, thing.type) != (one.color, one.type) for one in wanted)
        room.env.carrying = thing                           # as if it had been picked up
        assert room.step(0) == (False, True)
        assert room.taken == other
        if seed > 500_020:
            break


class Follower:
    """Acts as an Assistant that follows its words: it knows the bot's way from each picture of a room whose
    own mission it is told, and turns left for ever where it is told something else."""

    def __init__(self, chunk=1):
        self.policy = SimpleNamespace(dimensions=7, state=False, state_size=0, chunk=chunk)
        self.ways, room = {}, Room()
        seeds = babyai.seeds_of(room, babyai.ROLLOUTS_FROM, True)
        for _ in range(6):
            next(seeds)
            steps, over = [], False
            while not over:
                steps.append((room.picture().tobytes(), room.numbers()))
                over = room.step(steps[-1][1][-1])[1]
            plan = [action for _, action in steps] + [(0,) * 7] * chunk
            for t, (picture, _) in enumerate(steps):
                self.ways[picture, room.mission] = plan[t:t + chunk]

    def act(self, pictures, instructions, key=""):
        way = self.ways.get((pictures[0][0].tobytes(), instructions[0]), [(0,) * 7] * self.policy.chunk)
        return np.array(way, float).reshape(1, -1, 7)


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
