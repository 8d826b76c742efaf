"""toy_robot.py: the expert does what it is told, noise and slips included; guessing does not."""
import json
import random

import numpy as np
import pytest

import toy_robot
from toy_robot import MOST_STEPS, STEP, Table, record, rollout, unseen_pair


def expert_run(seed, noise, told=None):
    """Whether the expert reaches its goal. `told`: it pursues another task of the same scene instead."""
    rng = random.Random(seed)
    table = Table(rng)
    thing, target = table.thing, table.target
    for _ in range(MOST_STEPS):
        if told:
            table.thing, table.target = target, thing
        action = table.expert() + [rng.gauss(0, noise), rng.gauss(0, noise), 0]
        table.step(action)
        table.thing, table.target = thing, target
        if table.success():
            return True
    return False


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_expert_succeeds(noise):
    assert sum(expert_run(seed, noise) for seed in range(200)) >= 198


def test_a_random_policy_fails():
    rng = np.random.default_rng(0)
    results = rollout(lambda pictures, _: rng.uniform([-STEP, -STEP, 0], [STEP, STEP, 1], (len(pictures), 3)), 50)
    assert sum(result["success"] for result in results) <= 5


def test_same_seed_same_files_and_unseen_pairs_stay_unseen(tmp_path):
    for name in "ab":
        toy_robot.write(tmp_path / name, seed=3, episodes=40)
    one, two = ((tmp_path / name / "train.json").read_bytes() for name in "ab")
    assert one == two
    episodes = json.loads(one)
    for episode in episodes:
        thing, target = episode["instruction"].removeprefix("put the ").split(" on the ")
        assert not unseen_pair(thing, target)
        for step in episode["steps"]:
            assert (tmp_path / "a" / "images" / step["image"]).exists() and len(step["action"]) == 3
            assert max(map(abs, step["action"][:2])) <= STEP and step["action"][2] in (0, 1)
    assert {(tmp_path / name / "images" / "train_00007" / "000.png").read_bytes() for name in "ab"} == {
        (tmp_path / "a" / "images" / "train_00007" / "000.png").read_bytes()}
    assert all(unseen_pair(*r["instruction"].removeprefix("put the ").split(" on the "))
               for r in rollout(lambda pictures, _: np.zeros((len(pictures), 3)), 5, unseen=True))


def test_open_and_closed_and_held_can_be_seen():
    table = Table(random.Random(0))
    open_picture = np.asarray(table.picture())
    table.open = False
    assert (open_picture != np.asarray(table.picture())).any()


def test_film_strips_show_successes_and_failures(tmp_path):
    results = rollout(lambda pictures, _: np.zeros((len(pictures), 3)), 4)
    results[0]["success"] = True
    toy_robot.film_strips(results, tmp_path / "film.png")
    assert (tmp_path / "film.png").stat().st_size > 1000


def test_an_episode_ends_with_the_task_done():
    assert sum(len(record(random.Random(seed))[1]) < MOST_STEPS for seed in range(100)) >= 95
