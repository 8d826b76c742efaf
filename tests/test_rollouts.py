"""examples/rollouts.py: answers that outlive the process, and how a policy is asked. No simulator."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from config import UserError
from examples import rollouts
from examples.rollouts import Answers, Policy

SETTINGS = {"ckpt": "runs/x", "step": "step-00000600", "steps": 20}


def test_answers_are_there_after_each_one_and_again_after_a_restart(tmp_path):
    file = tmp_path / "deep" / "a.jsonl"
    Answers(file, SETTINGS).add("policy", "reach", 7, np.bool_(True), 31, told="reach it")
    again = Answers(file, SETTINGS)
    assert again.missing([("policy", "reach", 7), ("expert", "reach", 7)]) == [("expert", "reach", 7)]
    again.add("expert", "reach", 7, False, 20)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        SETTINGS,
        {"who": "policy", "task": "reach", "seed": 7, "success": True, "steps": 31, "told": "reach it"},
        {"who": "expert", "task": "reach", "seed": 7, "success": False, "steps": 20}]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_that_was_cut_by_a_kill_is_done_again(tmp_path, cut):
    file = tmp_path / "a.jsonl"
    answers = Answers(file, SETTINGS)
    for seed in (7, 8):
        answers.add("policy", "reach", seed, True, 31)
    whole = file.read_text()
    file.write_text(whole[:-cut])
    again = Answers(file, SETTINGS)
    assert list(again.rows) == [("policy", "reach", 7)]
    again.add("policy", "reach", 8, True, 31)
    assert file.read_text() == whole


def test_answers_of_something_else_are_not_continued(tmp_path):
    file = tmp_path / "a.jsonl"
    Answers(file, SETTINGS)
    with pytest.raises(UserError, match="a.jsonl was begun with step step-00000600, now it is step-00000900"):
        Answers(file, SETTINGS | {"step": "step-00000900"})
    file.write_text("no json\n")
    with pytest.raises(UserError, match="a.jsonl holds no rollouts"):
        Answers(file, SETTINGS)


class Stub:
    """Acts as generate.Assistant. Answers chunks of 3 actions of 2 numbers, and keeps what it is asked."""

    def __init__(self, state=False, chunk=3):
        self.policy = SimpleNamespace(dimensions=2, state=state, state_size=4 * state, chunk=chunk)
        self.asked = []

    def act(self, pictures, instructions, key="", states=None):
        self.asked.append((np.asarray(pictures[0][0]).max(), instructions, key, states))
        return np.arange(6.0).reshape(1, 3, 2)


def test_how_many_actions_of_a_chunk_are_done():
    white = Image.new("RGB", (4, 4), "white")
    for execute, rows in ((0, 3), (1, 1), (2, 2)):
        stub = Stub()
        actions = Policy(stub, 2, execute, "arm").act([white], "go", [1, 2, 3, 4])
        assert actions.tolist() == [[0, 1], [2, 3], [4, 5]][:rows]
        assert stub.asked == [(255, ["go"], "arm", None)]           # it knows no state
    stub = Stub(state=True)
    Policy(stub, 2, state_size=4).act([white], "go", [1, 2, 3, 4])
    assert stub.asked == [(255, ["go"], "", [[1, 2, 3, 4]])]


def test_how_long_a_policy_thinks(monkeypatch, capsys):
    """A clock of its own: each call takes 30 ms. Of each chunk of three, two actions are done."""
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(process_time=lambda: next(clock) / 1000))
    policy = Policy(Stub(), 2, execute=2)
    policy.show_speed()
    assert capsys.readouterr().out == ""                    # nothing was asked, nothing is divided
    for _ in range(4):
        policy.act([Image.new("RGB", (4, 4))], "go", [])
    policy.show_speed()
    assert capsys.readouterr().out == "policy   4 answers, 30.0 CPU ms each; 15.0 an action that was done\n"


def test_black_pictures_are_answered_once_for_each_text_and_state():
    stub = Stub(state=True)
    policy = Policy(stub, 2, state_size=4)
    for text, state in (("go", [1]), ("go", [1]), ("go", [2]), ("stop", [2])):
        assert policy.act_blind([(4, 4)], text, state).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert stub.asked == [(0, ["go"], "", [[1]]), (0, ["go"], "", [[2]]), (0, ["stop"], "", [[2]])]


@pytest.mark.parametrize("stub, flags, text", [
    (Stub(), {"dimensions": 4}, "its actions have 2 dimensions, those of this robot 4"),
    (Stub(), {"dimensions": 2, "execute": 4}, "--execute 4: this policy answers with 3 actions"),
    (Stub(state=True), {"dimensions": 2}, "it reads a state of 4 numbers, that of this robot has 0"),
    (SimpleNamespace(policy=None), {"dimensions": 2}, "is no policy")])
def test_a_policy_that_does_not_fit_is_refused(stub, flags, text):
    with pytest.raises(UserError, match=text):
        Policy(stub, **flags)


def test_who_acts():
    assert rollouts.pick_who("expert, policy", "runs/x") == ["policy", "expert"]
    assert rollouts.pick_who("random", "") == ["random"]
    with pytest.raises(UserError, match="--ckpt RUN is missing"):
        rollouts.pick_who("black", "")
    with pytest.raises(UserError, match="--who me: choose from policy, black, wrong, expert, random"):
        rollouts.pick_who("me", "runs/x")


def test_rates():
    rows = [{"success": True}, {"success": False}, {"success": True}, {"success": False}]
    assert rollouts.rate(rows) == {"done": 2, "count": 4, "success": 0.5}
    assert rollouts.rate([]) is None
    assert rollouts.cell(rollouts.rate(rows)) == "2 of 4"
