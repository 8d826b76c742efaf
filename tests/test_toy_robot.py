"""toy/robot.py: the expert does what it is told, noise included; guessing or being told wrong fails."""
import doctest
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import generate
from config import UserError
from toy import robot
from toy.robot import (MOST_STEPS, STEP, RobotConfig, Table, Task, random_task, record, rollout, swapped,
                       unseen_layout, unseen_pair)
from toy.world import PIXELS, Thing

KINDS = ("training", "unseen layouts", "unseen pairs")


def expert_succeeds(seed, noise=0.0, kind="training", told=None, start=None):
    """Whether the table's task gets done. `told`: makes of it the task that the expert pursues instead."""
    rng = random.Random(seed)
    table = Table(random_task(rng, kind), rng)
    if start:
        start(table)
    for _ in range(MOST_STEPS):
        table.step(table.expert(told and told(table.task)) + [rng.gauss(0, noise), rng.gauss(0, noise), 0])
        if table.success():
            return True
    return False


def other_thing(task):
    return task._replace(thing=next((i for i in range(len(task.scene)) if i not in task[1:]), task.target),
                         target=task.thing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_the_expert_succeeds(noise, kind):
    assert sum(expert_succeeds(seed, noise, kind) for seed in range(200)) >= 198


@pytest.mark.parametrize("told", [swapped, other_thing])
@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_who_is_told_another_task_fails(noise, told):
    assert sum(expert_succeeds(seed, noise, told=told) for seed in range(200)) <= 4


def test_from_any_start_the_expert_recovers():
    def wrong_thing(table):
        table.take(table.task.target)

    def closed_on_nothing(table):
        table.gripper, table.open = np.array([48.0, 28.0]), False

    for start in (wrong_thing, closed_on_nothing, lambda table: table.take(table.task.thing)):
        assert sum(expert_succeeds(seed, 4.0, start=start) for seed in range(100)) >= 99


def test_a_random_policy_fails():
    rng = np.random.default_rng(0)
    low, high = [0, 0, 0], [PIXELS, PIXELS, 1]
    results = rollout(lambda pictures, *_: rng.uniform(low, high, (len(pictures), 3)), 50)
    assert sum(result["success"] for result in results) <= 2


@pytest.mark.parametrize("swap", [False, True])
def test_in_a_rollout_the_expert_does_what_it_is_told_and_the_table_ends(swap, monkeypatch):
    tables, told = [], set()

    class Seen(Table):
        def __init__(self, *args):
            super().__init__(*args)
            tables.append(self)

    def wanted(table):
        return swapped(table.task) if swap else table.task

    def expert(pictures, instructions, states):
        assert len(states) == len(pictures)
        running = [table for table in tables if not table.success(wanted(table))]
        assert [str(wanted(table)) for table in running] == list(instructions)      # the others have ended
        told.update(instructions)
        return [table.expert(wanted(table)) for table in running]

    monkeypatch.setattr(robot, "Table", Seen)
    results = rollout(expert, 50, swap=swap)
    assert [result["success"] for result in results] == [not swap] * 50
    assert [result["instruction"] for result in results] == [str(table.task) for table in tables]
    assert told == {str(wanted(table)) for table in tables}


def test_in_a_rollout_a_move_misses_by_the_noise_and_the_grip_does_not(monkeypatch):
    seen = []
    monkeypatch.setattr(Table, "step", lambda table, action: seen.append(action))
    rollout(lambda pictures, *_: np.tile([48.0, 40.0, 1.0], (len(pictures), 1)), 20)
    moves = np.array(seen)
    assert moves.shape == (20 * MOST_STEPS, 3)
    assert moves[:, :2].mean(0) == pytest.approx([48, 40], abs=0.7)     # 4 standard errors of 600 draws
    assert moves[:, :2].std(0) == pytest.approx([4, 4], abs=0.5)        # likewise
    assert (moves[:, 2] == 1).all()


@pytest.mark.parametrize("execute", [1, 3, 4])
def test_in_a_rollout_the_actions_of_a_chunk_are_done_in_their_order(execute, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(robot, "inexact", lambda action, rng: action)
    monkeypatch.setattr(Table, "step", lambda table, action: seen.append(action.tolist()))

    def policy(pictures, *_):
        asked.append(len(pictures))
        return np.tile(np.arange(execute)[:, None] + [0, 10, 20], (len(pictures), 1, 1))        # (n, E, 3)

    results = rollout(policy, 2)
    assert asked == [2] * -(-MOST_STEPS // execute)
    assert seen == [[k % execute, k % execute + 10, k % execute + 20]
                    for k in range(MOST_STEPS) for _ in range(2)]
    assert [len(result["pictures"]) for result in results] == [MOST_STEPS + 1] * 2


def test_a_table_that_ends_within_a_chunk_leaves_the_others_their_actions(monkeypatch):
    """Table 0 is done after its second action; table 1 goes on with the third, and is asked alone then."""
    asked, done = [], {}
    monkeypatch.setattr(Table, "step", lambda table, action: done.setdefault(table, []).append(action[0]))
    monkeypatch.setattr(Table, "success", lambda table, task=None: table is next(iter(done)) and len(
        done[table]) == 2)
    monkeypatch.setattr(robot, "inexact", lambda action, rng: action)

    def policy(pictures, *_):
        asked.append(len(pictures))
        return np.arange(9).reshape(1, 3, 3).repeat(len(pictures), 0)

    rollout(policy, 2)
    first, second = done.values()
    assert first == [0, 3] and second == [0, 3, 6] * (MOST_STEPS // 3) and asked == [2] + [1] * 9


def test_one_action_moves_no_further_than_a_step():
    table = Table(random_task(random.Random(0)), random.Random(0))
    table.gripper = np.array([40.0, 40.0])
    table.step([500, 41, 1])
    assert table.gripper.tolist() == [40 + STEP, 41]


def test_success_is_the_thing_let_go_on_top_of_the_target():
    table = Table(random_task(random.Random(0)), random.Random(0))
    thing, target = table.task[1:]
    table.gripper = table.places[target].copy()
    table.take(thing)
    assert not table.success()                              # still held
    table.step([*table.gripper, 1])
    assert table.success()
    table.take(target)
    table.step([*table.gripper, 1])
    assert not table.success()                              # the same place, but the target lies on the thing


def test_same_seed_same_files_and_what_is_held_out_stays_out(tmp_path):
    for name in "ab":
        robot.write(tmp_path / name, seed=3, episodes=40)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*.*"))
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    for split, count in (("train", 40), ("val", 2)):
        episodes = json.loads((tmp_path / "a" / f"{split}.json").read_text())
        assert len(episodes) == count
        for episode in episodes:
            assert set(episode) == {"id", "instruction", "steps"}
            assert not unseen_pair(*episode["instruction"].removeprefix("put the ").split(" on the "))
            for i, step in enumerate(episode["steps"]):
                assert step["image"] == f"{episode['id']}/{i:03d}.png"
                assert (tmp_path / "a" / "images" / step["image"]).exists() and len(step["action"]) == 3
                assert all(13 <= place <= PIXELS - 13 for place in step["state"][:2])
                assert step["state"][2] in (0, 1) and len(step["state"]) == 3
                assert (all(0 <= place <= PIXELS for place in step["action"][:2])
                        and step["action"][2] in (0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_kinds_of_tasks_share_no_layout_and_no_held_out_pair(kind):
    rng = random.Random(0)
    for task in (random_task(rng, kind) for _ in range(200)):
        assert unseen_layout(task.scene) == (kind != "training")
        assert unseen_pair(*(str(task.scene[i]) for i in task[1:])) == (kind == "unseen pairs")
    def stay(pictures, *_):
        return np.zeros((len(pictures), 3))
    three = [result["instruction"] for result in rollout(stay, 3)]
    assert three == [result["instruction"] for result in rollout(stay, 5)][:3]


def test_open_closed_and_held_can_be_seen():
    """Where in the picture something changes is near the gripper, and more than a few pixels of it."""
    table = Table(random_task(random.Random(0)), random.Random(0))
    table.gripper = np.array([48.0, 30.0])
    pictures = [table.picture()]
    table.open = False
    pictures.append(table.picture())
    table.take(table.task.thing)
    pictures.append(table.picture())
    open_, closed, held = (np.asarray(picture).astype(int) for picture in pictures)
    for one, other in ((open_, closed), (closed, held)):
        assert (np.abs(one - other).max(-1) > 60)[33:63, 10:50].sum() > 60


def test_what_is_held_does_not_hide_the_target():
    task = Task((Thing("red", "circle", 0), Thing("blue", "square", 8)), 0, 1)
    for seed in range(20):
        table = Table(task, random.Random(seed))
        table.gripper = table.places[1].copy()
        table.take(0)
        red, _, blue = np.moveaxis(np.asarray(table.picture()).astype(int), -1, 0)                  # (H, W)
        assert (blue > red + 60).sum() >= 20                # drawn at full size, the circle leaves 0 of some


def test_film_strips_show_successes_and_failures(tmp_path):
    results = rollout(lambda pictures, *_: np.zeros((len(pictures), 3)), 4)
    results[0]["success"] = True
    robot.film_strips(results, tmp_path / "film.png")
    assert (tmp_path / "film.png").stat().st_size > 1000


def test_the_animation_plays_each_table_until_its_end(tmp_path):
    rng = np.random.default_rng(0)                          # it moves always: Pillow joins equal frames
    results = rollout(lambda pictures, *_: rng.uniform(0, [96, 96, 0], (len(pictures), 3)), 3)
    results[0].update(success=True, pictures=results[0]["pictures"][:4])
    robot.animation(results, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.size) == (MOST_STEPS + 1, (4 * 136, 2 * 140))
        assert film.info["loop"] == 0                       # for ever
        for t, frames in ((2, {}), (3, {0: "green"}), (MOST_STEPS, {0: "green", 1: "red", 2: "red"})):
            film.seek(t)
            for i, result in enumerate(results):
                red, green, blue = film.convert("RGB").getpixel((136 * i + 18, 80))     # beside the picture
                color = "green" if green > red + 50 else "red" if red > green + 50 else None
                assert color == frames.get(i), (t, i)
                table = film.convert("RGB").crop((136 * i + 20, 34, 136 * i + 116, 130))
                shown = result["pictures"][min(t, len(result["pictures"]) - 1)]
                off = np.abs(np.asarray(table).astype(int) - np.asarray(shown))
                assert off.mean() < 4                       # what a palette of 128 colors changes


class Stub:
    """An assistant whose policy only notes what it is asked. It always does the same."""

    def __init__(self, policy=True, chunk=1, state_size=0):
        about = SimpleNamespace(dimensions=3, chunk=chunk, state_size=state_size)
        self.policy, self.asked = policy and about, []

    def act(self, pictures, instructions, key, states):
        self.asked.append(SimpleNamespace(pictures=[picture for picture, in pictures], states=states,
                                          instructions=list(instructions), key=key))
        return np.zeros((len(pictures), self.policy.chunk, 3))


def let_act(monkeypatch, assistant, *flags):
    monkeypatch.setattr(generate, "Assistant", lambda ckpt: assistant)
    robot.main(robot.parse(RobotConfig, [str(flag) for flag in flags]))


@pytest.mark.parametrize("blank", [False, True])
def test_the_scores_of_a_policy_are_written_and_it_sees_black_only_if_asked(
        blank, tmp_path, monkeypatch, capsys):
    def known_results(policy, count, unseen, swap):
        result = rollout(policy, count, unseen, swap)
        for i, one in enumerate(result):
            one["success"] = unseen or i == 0
        return result

    monkeypatch.setattr(robot, "rollout", known_results)
    stub = Stub()
    let_act(monkeypatch, stub, "--ckpt", tmp_path, "--rollouts", 4, "--batch_size", 3,
            "--unnorm_key", "mine", *["--blank_images"] * blank)
    assert json.loads((tmp_path / "rollouts.json").read_text()) == {
        "unseen layouts": {"success": 0.25, "count": 4}, "unseen pairs": {"success": 1.0, "count": 4}}
    assert all((tmp_path / f"rollouts.{end}").stat().st_size > 1000 for end in ("png", "gif"))
    assert capsys.readouterr().out.splitlines() == [
        "unseen layouts     25.0%   of 4", "unseen pairs      100.0%   of 4",
        f"scores   {tmp_path / 'rollouts.json'}",
        f"pictures {tmp_path / 'rollouts.png'}, {tmp_path / 'rollouts.gif'}"]
    assert [len(call.pictures) for call in stub.asked] == [3, 1] * MOST_STEPS * 2
    assert {call.key for call in stub.asked} == {"mine"}
    for call in stub.asked:
        assert all((picture.getbbox() is None) == blank and picture.size == (PIXELS, PIXELS)
                   for picture in call.pictures)            # getbbox: None = all black


def test_told_the_wrong_task_a_policy_gets_every_instruction_the_other_way_round(tmp_path, monkeypatch):
    told = {}
    for flag in ("--no-wrong_instruction", "--wrong_instruction"):
        stub = Stub()
        let_act(monkeypatch, stub, "--ckpt", "run", "--rollouts", 2, flag,
                "--out", tmp_path / "new" / "s.json")
        told[flag] = [call.instructions for call in stub.asked]
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["s.gif", "s.json", "s.png"]
    for right, wrong in zip(*told.values(), strict=True):
        for one, other in zip(right, wrong, strict=True):
            thing, target = one.removeprefix("put the ").split(" on the ")
            assert other == f"put the {target} on the {thing}"


@pytest.mark.parametrize("execute, times", [(0, 8), (1, 30), (3, 10), (4, 8)])
def test_so_many_actions_of_a_chunk_are_executed(execute, times, tmp_path, monkeypatch):
    stub = Stub(chunk=4)
    let_act(monkeypatch, stub, "--ckpt", tmp_path, "--rollouts", 2, "--execute", execute)
    assert len(stub.asked) == 2 * times                     # 30 steps in each of two kinds


@pytest.mark.parametrize("hide", [False, True])
def test_a_policy_is_told_where_its_gripper_is_unless_that_is_hidden(hide, tmp_path, monkeypatch):
    stub = Stub(state_size=3)
    let_act(monkeypatch, stub, "--ckpt", tmp_path, "--rollouts", 2, *["--hide_state"] * hide)
    if hide:
        assert all(call.states == [None] * 2 for call in stub.asked)
        return
    first, second = stub.asked[0].states
    assert first != second and all(13 <= place <= PIXELS - 13 for place in (*first[:2], *second[:2]))
    assert first[2] == second[2] == 1                       # a rollout begins with an open gripper
    # An action of zeros: towards the corner, and closed.
    assert [call.states[0] for call in stub.asked[6:30]] == [[13, 13, 0]] * 24


@pytest.mark.parametrize("size, flags", [(4, []), (0, ["--hide_state"])])
def test_a_state_of_another_robot_is_refused(size, flags, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"it reads a state of {size} numbers, that of this robot has 3"):
        let_act(monkeypatch, Stub(state_size=size), "--ckpt", tmp_path, *flags)


def test_more_than_the_chunk_can_not_be_executed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--execute 5: this policy answers with 4 actions"):
        let_act(monkeypatch, Stub(chunk=4), "--ckpt", tmp_path, "--execute", 5)


def test_a_run_that_is_no_policy_is_refused(monkeypatch):
    with pytest.raises(UserError, match="^--ckpt runs/x is no policy: give a run that was trained by"):
        let_act(monkeypatch, Stub(policy=None), "--ckpt", "runs/x")


@pytest.mark.parametrize("flags, says", [
    ({"episodes": 0}, "--episodes is 0, but must lie between 1 and"),
    ({"ckpt": "run", "rollouts": 0}, "--rollouts is 0, but must lie between 1 and"),
    ({"ckpt": "run", "batch_size": -1}, "--batch_size is -1, but must lie between 1 and"),
    ({"rollouts": 5}, "--rollouts is of no use without --ckpt"),
    ({"ckpt": "run", "episodes": 5}, "--episodes is of no use with --ckpt")])
def test_flags_that_make_no_sense_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        RobotConfig(**flags)


def test_writing_episodes_does_not_wait_for_torch():
    code = "import sys; from toy import robot; assert not {'torch', 'generate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(robot.__file__).parent.parent, check=True)


def test_episodes_end_with_the_task_done_and_begin_in_all_kinds_of_states():
    episodes = [record(random_task(rng), rng) for rng in map(random.Random, range(100))]
    assert sum(len(steps) < MOST_STEPS for steps in episodes) >= 95
    starts = []
    for rng in map(random.Random, range(200)):
        table = Table(random_task(rng), rng)
        robot.random_start(table, rng)
        starts.append("open" if table.open else "nothing" if table.held is None else
                      "thing" if table.held == table.task.thing else "wrong")
    assert min(starts.count(kind) for kind in ("open", "nothing", "thing", "wrong")) >= 4


def test_worked_examples():
    assert doctest.testmod(robot).attempted >= 1 and doctest.testmod(robot).failed == 0
