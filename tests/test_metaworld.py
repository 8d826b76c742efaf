"""examples/metaworld_*.py with the simulator itself: demonstrations and rollouts are drawn alike."""
import gc
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from config import UserError

# Not mujoco itself: when it is imported it asks the environment how to draw, and this module says it before.
metaworld_world = pytest.importorskip("examples.metaworld_world")
from examples import metaworld_episodes, metaworld_rollouts  # noqa: E402
from examples.metaworld_episodes import RecordConfig  # noqa: E402
from examples.metaworld_rollouts import RolloutConfig  # noqa: E402
from examples.metaworld_world import Drawing, World  # noqa: E402

FAST = Drawing("fast", 48)
TASKS = "door-close-v3,reach-v3"
pytestmark = pytest.mark.filterwarnings("ignore:Constant")   # an expert of the package warns of itself


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("metaworld") / "data"
    metaworld_episodes.main(RecordConfig(str(out), TASKS, episodes=2, drawing="fast", size=48, val_every=2))
    return out


def episodes_of(out, split="train"):
    return json.loads((out / f"{split}.json").read_text())


def pixels(image):
    return np.asarray(image).astype(int)


class Replay:
    """Acts as an Assistant: it answers recorded actions, K at once, and keeps the pictures it was shown."""

    def __init__(self, steps, chunk):
        self.policy = SimpleNamespace(dimensions=4, state=True, state_size=4, chunk=chunk)
        self.steps, self.shown, self.states, self.words = list(steps), [], [], set()

    def act(self, pictures, instructions, key="", states=None):
        self.shown.append(pictures[0][0])
        self.states += states
        self.words |= set(instructions)
        now, self.steps = self.steps[:self.policy.chunk], self.steps[self.policy.chunk:]
        return np.array([(now + now[-1:] * self.policy.chunk)[:self.policy.chunk]])


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_rollout_shows_what_the_demonstration_shows_to_the_bit(recorded, tmp_path, monkeypatch, chunk):
    import checkpoint
    import generate
    for episode in episodes_of(recorded):
        task, seed = episode["id"].split("/")
        replay = Replay([step["action"] for step in episode["steps"]], chunk)
        monkeypatch.setattr(generate, "Assistant", lambda ckpt: replay)
        monkeypatch.setattr(checkpoint, "find", lambda ckpt: tmp_path / "step-00000001")
        monkeypatch.setattr(metaworld_rollouts, "read_config",
                            lambda ckpt: SimpleNamespace(train_json=str(recorded / "train.json")))
        # Nothing is said of the drawing: it is that of recorded.json.
        metaworld_rollouts.main(RolloutConfig(ckpt="runs/x", tasks=task, rollouts=1, seed=int(seed),
                                              out=str(tmp_path / f"{task}.jsonl")))
        steps = episode["steps"][::chunk]
        assert len(replay.shown) == len(steps)
        for shown, step in zip(replay.shown, steps):
            with Image.open(recorded / step["image"]) as image:
                assert np.array_equal(pixels(image), pixels(shown))
        assert replay.states == [step["state"] for step in steps]
        assert replay.words == {episode["instruction"]}
        row = json.loads((tmp_path / f"{task}.jsonl").read_text().splitlines()[1])
        assert row["success"] and row["steps"] == len(episode["steps"])


def picture_of(drawing, task="reach-v3", seed=3):
    with World(task, drawing) as world:
        world.start(seed)
        return pixels(world.picture())


def test_another_drawing_would_be_seen():
    """What this is about: the same state with and without shadows. 4 of 255 levels, where JPEG alone is 3."""
    published, fast = (picture_of(Drawing(way, 96)) for way in ("published", "fast"))
    assert published.shape == fast.shape == (96, 96, 3)
    assert np.abs(published - fast).mean() > 4


def test_the_published_picture_is_that_of_the_published_protocol():
    """As LeRobot makes it: the package's own render(), the camera corner2 moved, both axes flipped."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    env = ALL_V3_ENVIRONMENTS["reach-v3"](render_mode="rgb_array", camera_name="corner2")
    env.model.cam_pos[2] = [0.75, 0.075, 0.7]
    env._freeze_rand_vec, env._set_task_called, env.seeded_rand_vec = False, True, True
    env.seed(3)
    env.reset()
    theirs = np.flip(env.render(), (0, 1)).astype(int)
    env.close()
    assert np.array_equal(theirs, picture_of(Drawing("published", 480)))


def test_a_simulator_that_is_collected_as_garbage_does_not_blacken_the_next():
    first = picture_of(FAST)
    with World("reach-v3", FAST) as world:
        world.start(3)
        other = World("door-close-v3", FAST)
        other.__exit__()
        del other
        gc.collect()
        assert np.array_equal(pixels(world.picture()), first) and first.mean() > 50


@pytest.mark.parametrize("task", ["reach-v3", "pick-place-v3", "stick-push-v3"])
def test_a_start_depends_on_its_seed_only(task):
    def run(world, seed):
        known = [world.start(seed)]
        for _ in range(5):
            known.append(world.step(world.expert(known[-1]))[0])
        return np.array(known)
    with World(task, FAST) as world:
        first, other, again = (run(world, seed) for seed in (5, 6, 5))
    with World(task, FAST) as world:
        fresh = run(world, 5)
    assert np.array_equal(first, again) and np.array_equal(first, fresh)
    assert not np.array_equal(first, other)


def test_the_expert_is_told_the_goal():
    with World("reach-v3", FAST) as world:
        goal = world.start(5)[-3:]
        known, _ = world.step([0, 0, 0, 0])
    assert np.array_equal(known[-3:], goal) and np.abs(goal).min() > 0.01


def test_what_is_recorded(recorded):
    assert {episode["instruction"] for episode in episodes_of(recorded)} == {
        "close the door", "move the gripper to the goal"}
    assert [episode["id"] for split in ("train", "val") for episode in episodes_of(recorded, split)] == [
        "door-close-v3/0", "reach-v3/0", "door-close-v3/1", "reach-v3/1"]
    for episode in episodes_of(recorded):
        for step in episode["steps"]:
            assert len(step["state"]) == len(step["action"]) == 4
            assert np.abs(step["action"]).max() <= 1


def test_recording_goes_on_with_the_tasks_that_are_missing(recorded, tmp_path, monkeypatch):
    out, begun = tmp_path / "data", []
    demonstrate = metaworld_episodes.demonstrate

    def killed(world, seed, cfg, save):
        begun.append(seed)
        if len(begun) == 4:                                 # in the second episode of the second task
            save(0, world.picture())
            raise KeyboardInterrupt
        return demonstrate(world, seed, cfg, save)
    monkeypatch.setattr(metaworld_episodes, "demonstrate", killed)
    cfg = RecordConfig(str(out), TASKS, episodes=2, drawing="fast", size=48, val_every=2)
    with pytest.raises(KeyboardInterrupt):
        metaworld_episodes.main(cfg)
    assert sorted(file.name for file in out.iterdir()) == ["door-close-v3", "recorded.json"]
    metaworld_episodes.main(cfg)
    assert begun == [0, 1, 0, 1, 0, 1]                      # the first task is not recorded again
    for split in ("train", "val"):
        assert episodes_of(out, split) == episodes_of(recorded, split)


def test_a_folder_recorded_otherwise_is_refused(recorded, tmp_path):
    with pytest.raises(UserError, match="was recorded with size 48, this command says 96"):
        metaworld_episodes.main(RecordConfig(str(recorded), TASKS, episodes=2, drawing="fast", size=96,
                                             val_every=2))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="this command did not make it"):
        metaworld_episodes.main(RecordConfig(str(tmp_path), TASKS))


def test_where_the_expert_fails_the_next_start_is_taken(tmp_path, monkeypatch):
    demonstrate = metaworld_episodes.demonstrate
    monkeypatch.setattr(metaworld_episodes, "demonstrate", lambda world, seed, cfg, save: (
        *demonstrate(world, seed, cfg, save)[:3], seed > 1 and cfg.steps > 1))
    metaworld_episodes.main(RecordConfig(str(tmp_path / "data"), "reach-v3", episodes=1, drawing="fast",
                                         size=48))
    episode, = episodes_of(tmp_path / "data")
    assert episode["id"] == "reach-v3/2"
    there = sorted(Path(tmp_path, "data", "reach-v3", "images", "000000").iterdir())
    assert len(there) == len(episode["steps"])              # none is left of longer failures
    with pytest.raises(UserError, match="reach-v3: the expert did it 0 times of 13 only"):
        metaworld_episodes.main(RecordConfig(str(tmp_path / "two"), "reach-v3", episodes=1, drawing="fast",
                                             size=48, steps=1))


def test_expert_and_chance(tmp_path, capsys):
    cfg = RolloutConfig(tasks=TASKS, rollouts=2, who="expert,random", steps=100,
                        out=str(tmp_path / "a.jsonl"))
    metaworld_rollouts.main(cfg)
    text = capsys.readouterr().out
    assert "reach-v3                            2 of 2      0 of 2" in text
    assert "easy: 2 of 28 tasks               100.0%        0.0%" in text
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2 * 2
    (tmp_path / "a.jsonl").write_text("".join(lines[:6]))   # as after a kill
    metaworld_rollouts.main(cfg)
    assert (tmp_path / "a.jsonl").read_text() == "".join(lines)


def test_the_mean_of_groups_is_not_that_of_tasks():
    tasks = metaworld_world.pick_tasks("reach-v3,door-close-v3,door-open-v3,push-v3")
    rows = {("expert", task, 7): {"success": task != "push-v3"} for task in tasks}
    cfg = RolloutConfig(who="expert", rollouts=1, seed=7, out="x")
    scores = metaworld_rollouts.scores_of(cfg, SimpleNamespace(rows=rows), tasks)["expert"]
    assert scores["groups"] == {"easy": 1.0, "hard": 0.0}
    assert scores["mean of groups"] == 0.5 and scores["mean of tasks"] == 0.75


def test_words_and_pictures_of_the_controls():
    told, policy = [], SimpleNamespace(
        act=lambda pictures, words, state: told.append(("sees", pictures[0].size, words)) or [[0, 0, 0, 0]],
        act_blind=lambda sizes, words, state: told.append(("blind", sizes[0], words)) or [[0, 0, 0, 0]])
    answers = SimpleNamespace(missing=lambda asked: asked, add=lambda *row: None)
    words = metaworld_rollouts.read_instructions("", ["reach-v3", "door-close-v3"])
    cfg = RolloutConfig(ckpt="runs/x", rollouts=1, who="policy,black,wrong", steps=1)
    metaworld_rollouts.roll_out(cfg, policy, answers, words, FAST)
    reach, door = "move the gripper to the goal", "close the door"
    assert told == [("sees", (48, 48), reach), ("blind", (48, 48), reach), ("sees", (48, 48), door),
                    ("sees", (48, 48), door), ("blind", (48, 48), door), ("sees", (48, 48), reach)]


def test_words_of_other_demonstrations(tmp_path):
    file = tmp_path / "words.json"
    file.write_text('{"reach-v3": "go there"}')
    assert metaworld_rollouts.read_instructions(str(file), ["reach-v3", "door-close-v3"]) == {
        "reach-v3": "go there", "door-close-v3": "close the door"}
    file.write_text("[]")
    with pytest.raises(UserError, match="words.json can't be read"):
        metaworld_rollouts.read_instructions(str(file), ["reach-v3"])


def test_fifty_tasks_in_four_groups():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    assert [len(tasks) for tasks in metaworld_world.GROUPS.values()] == [28, 11, 6, 5]
    words = metaworld_world.INSTRUCTIONS
    assert set(words) == set(ALL_V3_ENVIRONMENTS) == set(metaworld_world.ENV_POLICY_MAP)
    assert len(set(words.values())) == 50
    assert metaworld_world.pick_tasks("all") == list(words)
    assert metaworld_world.pick_tasks("very_hard, reach-v3")[:2] == ["reach-v3", "shelf-place-v3"]
    with pytest.raises(UserError, match="there is no 'reach'"):
        metaworld_world.pick_tasks("reach")


def test_where_the_drawing_is_not_known_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld_rollouts, "read_config",
                        lambda ckpt: SimpleNamespace(train_json=str(tmp_path / "train.json")))
    with pytest.raises(UserError, match="how the demonstrations were drawn is not known"):
        metaworld_rollouts.find_drawing(RolloutConfig(ckpt="runs/x"))
    assert metaworld_rollouts.find_drawing(RolloutConfig(ckpt="runs/x", drawing="published", size=96)) == (
        "published", 96)
