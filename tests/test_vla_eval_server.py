"""examples/vla_eval_server.py: the harness itself runs the toy robot, in this process, without Docker."""
from types import SimpleNamespace

import numpy as np
import pytest

from config import UserError
from toy import robot

pytest.importorskip("vla_eval")
from examples.vla_eval_server import PolicyServer, ServerConfig, run_toy  # noqa: E402


class Expert:
    """Acts as an Assistant whose policy is perfect: it knows the expert's answer to each picture that was
    drawn, by the bytes of the picture, so it is lost if one bit differs."""

    def __init__(self, monkeypatch, clumsy=False):
        # The clumsy one was trained with --state, too.
        self.policy, self.answers, self.clumsy = SimpleNamespace(pictures=1, state=clumsy), {}, clumsy
        draw = robot.Table.picture

        def picture(table):
            image = draw(table)
            self.answers[image.tobytes(), str(table.task)] = table.expert()
            self.answers[image.tobytes()] = list(table.state())
            return image
        monkeypatch.setattr(robot.Table, "picture", picture)

    def act(self, pictures, instructions, key="", states=None):
        assert states == ([self.answers[image.tobytes()] for image, in pictures] if self.clumsy else None)
        right = [self.answers[image.tobytes(), text] for (image,), text in zip(pictures, instructions)]
        # The clumsy one never opens its gripper on some tables: these fail.
        return np.array([a * [1, 1, len(text) % 3 > 0] if self.clumsy else a
                         for a, text in zip(right, instructions)])


def directly(policy, tables):
    return {kind: [result["success"] for result in robot.rollout(policy, tables, kind == "unseen pairs")]
            for kind in ("unseen layouts", "unseen pairs")}


@pytest.mark.parametrize("clumsy", [False, True])
def test_the_harness_sees_the_tables_that_the_robot_sees(monkeypatch, clumsy):
    expert = Expert(monkeypatch, clumsy)
    done = run_toy(PolicyServer(expert, ServerConfig("x")), 6)
    assert done == directly(lambda pictures, texts, states: expert.act(
        [[p] for p in pictures], texts, states=list(map(list, states)) if clumsy else None), 6)
    assert {True: {True, False}, False: {True}}[clumsy] == {success for of in done.values() for success in of}


class Recorder:
    """Answers each question with chunks of 3 actions of 7 numbers, and remembers what it was asked."""
    policy = SimpleNamespace(pictures=2, state=True)

    def act(self, pictures, instructions, key="", states=None):
        self.asked = [[np.asarray(p)[0, 0, 0] for p in of] for of in pictures], instructions, key, states
        chunk = np.array([[0.1] * 6 + [1.0], [0.2] * 6 + [0.0], [0.3] * 6 + [0.5]])
        return np.tile(chunk, (len(pictures), 1, 1))


def observation(level):
    names = ["agentview", "wrist", "far"]
    return {"images": {name: np.full((8, 8, 3), level + i, np.uint8) for i, name in enumerate(names)},
            "task_description": f"task {level}", "states": np.arange(3.0) + level}


def test_cameras_states_and_grippers():
    assistant = Recorder()
    server = PolicyServer(assistant, ServerConfig("x", unnorm_key="arm", gripper="libero", execute=2))
    first, second = server.predict_batch([observation(10), observation(20)], [None, None])
    assert assistant.asked == ([[10, 11], [20, 21]], ["task 10", "task 20"], "arm",
                               [[10.0, 11.0, 12.0], [20.0, 21.0, 22.0]])
    assert first["actions"][:, -1].tolist() == [-1.0, 1.0, 0.0]             # 1 open -> -1, 0 close -> 1
    assert first["actions"][:, 0].tolist() == second["actions"][:, 0].tolist() == [0.1, 0.2, 0.3]
    assert server.get_observation_params() == {"send_wrist_image": True, "send_state": True}
    server = PolicyServer(assistant, ServerConfig("x", cameras="far,agentview"))
    assert server.predict(observation(10), None)["actions"][:, -1].tolist() == [1.0, 0.0, 0.5]
    assert assistant.asked[0] == [[12, 10]]
    server = PolicyServer(assistant, ServerConfig("x", cameras="left"))
    with pytest.raises(UserError, match="--cameras left: the simulator sends agentview, wrist, far"):
        server.predict(observation(10), None)


def test_a_policy_of_one_picture_gets_the_first_and_no_state():
    def act(pictures, instructions, key):
        return np.full((len(pictures), 7), len(pictures[0]))
    server = PolicyServer(SimpleNamespace(policy=SimpleNamespace(pictures=1), act=act), ServerConfig("x"))
    assert server.predict(observation(10), None)["actions"].tolist() == [1.0] * 7
    assert server.get_observation_params() == {}
