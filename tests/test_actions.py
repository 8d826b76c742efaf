"""actions.py, and the stage that trains on episodes."""
import functools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import actions as actions_module
import check
import config
import forked
from chat import PROMPTS
from actions import BINS, ActionTokens, compute_statistics, distort, end_of_actions
from config import BadExample, UserError
from data import collate
from prompts import IGNORE, IMAGE, Language
from helpers import PATCHES, dataset, make_tokenizer, picture, talk, world_of_one
from test_train import ROOT, drawn, run_train, weights, world                              # noqa: F401

UNIT = {"arm": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}}}
KINDS = ("llama", "qwen", "gpt2", "phi", "smollm")


def episodes(count=3, steps=4, dimensions=3):
    rng = np.random.default_rng(0)
    return [{"id": f"e{e}", "instruction": "Push the button.", "steps": [
        {"image": "a.png", "action": rng.uniform(-2, 5, dimensions).round(3).tolist()} for _ in range(steps)]}
        for e in range(count)]


def policy_and_data(folder, rows, kind="llama", chunk=1, state=False, **how):
    folder.mkdir(exist_ok=True)
    picture(folder / "a.png")
    language = Language(make_tokenizer(kind, filler=300), PROMPTS["plain"])
    policy = ActionTokens(end_of_actions(language.tokenizer), {}, chunk=chunk, state=state)
    data = dataset(folder, rows, language, policy=policy, **how)
    policy.learn_units(data)
    return policy, data


# ---- ids ----

def test_ids_are_those_of_openvla_with_llama():
    """vocabulary 32,000: bin 1 is id 31999, bin 256 is 31744; 256 edges make 255 centers, 2/255 apart."""
    policy = ActionTokens(32000, UNIT)
    assert policy.encode([[-1.0], [-0.999], [0.0], [0.5], [0.999], [1.0], [7.0]], "arm").ravel().tolist() == [
        31999, 31999, 31872, 31808, 31745, 31744, 31744]
    assert policy.decode([[31999], [31872], [31744]], "arm").ravel() == pytest.approx(
        [-254 / 255, 0.0, 254 / 255])


@pytest.mark.parametrize("kind", KINDS)
def test_every_bin_survives_the_round_trip_and_is_no_control_token(kind):
    tokenizer = make_tokenizer(kind, filler=300)
    policy = ActionTokens(end_of_actions(tokenizer), UNIT)
    ids = np.arange(policy.end - BINS, policy.end)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids) and ids.min() > 0
    centers = policy.decode(ids[:, None], "arm")
    again = policy.encode(centers, "arm").ravel()
    assert (again[1:] == ids[1:]).all() and again[0] == ids[1]      # the last edge has no center of its own
    assert (np.abs(policy.decode(policy.encode(centers + 0.003, "arm"), "arm") - centers).max()
            < 2 / 255 + 1e-9)


def test_control_tokens_at_the_end_of_the_vocabulary_are_left_alone():
    """GPT-2's end of text is its last id.
    With id = vocabulary size - bin, the end and a far left would be one."""
    class Gpt2:
        vocab_size, all_special_ids = 50257, [50256]

    class Llama:
        vocab_size, all_special_ids = 32000, [0, 1, 2]
    assert (end_of_actions(Gpt2()), end_of_actions(Llama())) == (50256, 32000)


def test_a_vocabulary_that_is_too_small_is_an_error():
    class Small:
        vocab_size, all_special_ids = 300, [299]
    with pytest.raises(UserError, match="cannot spare 256"):
        end_of_actions(Small())


# ---- units ----

def test_statistics_are_openvlas_and_hardly_moving_dimensions_are_named(capsys):
    actions = np.stack([np.linspace(0, 10, 101), np.full(101, 0.5), np.arange(101) % 2], axis=1)
    of = compute_statistics(actions, 7, keep=(2,))
    assert of["action"]["q01"] == pytest.approx([0.1, 0.5 - 5e-7, 0.0])
    assert of["action"]["q99"] == pytest.approx([9.9, 0.5 + 5e-7, 1.0])
    assert (of["action"]["min"] == [0, 0.5, 0] and of["action"]["max"] == [10, 0.5, 1]
            and of["action"]["mean"][0] == 5)
    assert of["action"]["q99"][1] - of["action"]["q01"][1] == pytest.approx(1e-6, rel=1e-3)     # the floor
    assert of["action"]["mask"] == [True, True, False]
    assert (of["num_transitions"], of["num_trajectories"]) == (101, 7)
    assert "action dimension 1 hardly moves" in capsys.readouterr().err
    policy = ActionTokens(1000, {"arm": of})
    back = policy.decode(policy.encode(actions, "arm"), "arm")
    assert np.abs(back - actions)[1:-1, 0].max() < 9.8 / 255                # a bin is 9.8 / 255 wide
    assert np.abs(back - actions)[:, 1].max() < 1e-6 and np.abs(back - actions)[:, 2].max() < 1 / 128


def test_several_datasets_need_a_key_and_a_wrong_one_lists_them():
    policy = ActionTokens(1000, {"arm": UNIT["arm"], "leg": UNIT["arm"]})
    assert policy.key("leg") == "leg" and ActionTokens(1000, UNIT).key() == "arm"
    for wrong in ("", "tail"):
        with pytest.raises(UserError, match="knows the datasets arm, leg"):
            policy.key(wrong)


# ---- episodes ----

@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_step_is_an_example_whose_reply_is_its_action(tmp_path, kind):
    policy, data = policy_and_data(tmp_path, episodes(), kind)
    assert len(data) == 12
    example = data[5]
    learned = example["labels"][example["labels"] != IGNORE].tolist()
    action = policy.encode(episodes()[1]["steps"][1]["action"], "d").tolist()
    assert learned == [*action, data.language.end_id]
    assert example["id"] == "e1/1" and data.row(5)["conversations"][0]["value"] == (
        "<image>\nWhat action should the robot take to push the button?")
    lengths, has_image = data.lengths()
    assert lengths[5] == len(example["input_ids"]) and has_image.all()
    question = data.question(5)["input_ids"].tolist()
    assert example["input_ids"].tolist() == question + learned          # training = inference + action
    assert question.count(IMAGE) == PATCHES


@pytest.mark.parametrize("chunk", [1, 3])
def test_actions_may_stand_in_a_list_of_the_episode(chunk, tmp_path):
    """The statistics and the replies are those of the same numbers in the steps."""
    rows = episodes()
    policy, data = policy_and_data(tmp_path / "a", rows, chunk=chunk)
    replies = [data[i]["labels"].tolist() for i in range(12)]
    for row in rows:
        row["action"] = [step.pop("action") for step in row["steps"]]
    listed, data = policy_and_data(tmp_path / "b", rows, chunk=chunk)
    assert listed.statistics["d"] == policy.statistics["d"]
    assert [data[i]["labels"].tolist() for i in range(12)] == replies and len(set(map(tuple, replies))) > 9


@pytest.mark.parametrize("change, message", [
    (dict(instruction=3), "'instruction' must be a text, found '3'"),
    (dict(steps=[]), "'steps' must be a list with at least one step"),
    (dict(steps=[{"action": [1]}]), "step 0 must have a file name, or a list of them, under 'image'"),
    (dict(steps=[{"image": "a.png", "action": [1, 2]}]),
     "step 0: 'action' must be 3 finite numbers, found [1, 2]"),
    (dict(steps=[{"image": "a.png", "action": [1, 2, float("nan")]}]),
     "must be 3 finite numbers, found [1, 2, nan]"),
    (dict(steps=[{"image": "a.png", "action": "left"}]), "must be 3 finite numbers, found left"),
])
def test_a_bad_episode_is_named(tmp_path, change, message):
    rows = episodes()
    rows[1] |= change
    with pytest.raises(UserError) as e:
        policy_and_data(tmp_path, rows)
    assert "d.json" in str(e.value) and "id='e1'" in str(e.value) and message in str(e.value)


def test_conversations_and_episodes_are_not_mixed_up(tmp_path):
    language = Language(make_tokenizer("llama", filler=300), PROMPTS["plain"])
    with pytest.raises(UserError, match="episodes are for --stage vla"):
        dataset(tmp_path, episodes(), language)
    with pytest.raises(UserError, match="must hold episodes only"):
        dataset(tmp_path, [{"conversations": talk("a", "b")}], language, policy=ActionTokens(400, {}))


def test_augmentation_depends_on_seed_epoch_and_example_only(tmp_path):
    _, data = policy_and_data(tmp_path, episodes(), augment=distort)
    Image.effect_noise((12, 8), 90).convert("RGB").save(tmp_path / "a.png")
    first, other = data[0]["images"][0][0], data[1]["images"][0][0]
    assert torch.equal(first, data[0]["images"][0][0]) and not torch.equal(first, other)
    data.pictures.epoch.fill_(1)
    assert not torch.equal(first, data[0]["images"][0][0])


def test_the_center_crop_keeps_nine_tenths_of_the_area():
    image = Image.new("RGB", (100, 200), "red")
    image.paste("blue", (3, 6, 97, 194))
    assert actions_module.crop(image, 0.5, 0.5).size == (95, 190)
    assert actions_module.crop(image, 0.5, 0.5).getpixel((47, 95)) == (0, 0, 255)
    assert actions_module.crop(image, 0.0, 0.0).getpixel((0, 0)) == (255, 0, 0)


def test_the_score_is_the_error_in_physical_units(tmp_path):
    policy, data = policy_and_data(tmp_path, episodes())
    batch = collate([data[i] for i in range(3)])
    assert not isinstance(batch, BadExample)
    targets = batch["labels"][:, 1:]
    predicted = targets[targets != IGNORE].clone()
    assert policy.metrics(policy.measure(batch, predicted).tolist()) == {
        "accuracy": 1.0, "accuracies": [1.0, 1.0, 1.0], "l1": [0.0, 0.0, 0.0]}
    predicted[1] += 10                          # the second dimension of the first example, ten bins lower
    metrics = policy.metrics(policy.measure(batch, predicted).tolist())
    of = policy.statistics["d"]["action"]
    assert (metrics["accuracy"] == pytest.approx(8 / 9)
            and metrics["accuracies"] == pytest.approx([1, 2 / 3, 1]))
    assert metrics["l1"] == pytest.approx([0, 10 / 255 * (of["q99"][1] - of["q01"][1]) / 3, 0])
    predicted[0] += 1
    assert (policy.metrics(policy.measure(batch, predicted).tolist())["accuracies"]
            == pytest.approx([2 / 3, 2 / 3, 1]))


# ---- chunks ----

@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_ends_with_its_episode_and_no_repeat_is_learned(tmp_path, kind):
    """Episodes of 4 steps, chunks of 3: step 1 has its three actions, step 2 two, step 3 one."""
    policy, data = policy_and_data(tmp_path, episodes(), kind, chunk=3)
    ids = [policy.encode(step["action"], "d").tolist() for step in episodes()[1]["steps"]]
    end, no = [data.language.end_id], [IGNORE] * 3
    for step, said, learned in (
            (1, ids[1] + ids[2] + ids[3], ids[1] + ids[2] + ids[3]),
            (2, ids[2] + ids[3] + ids[3], ids[2] + ids[3] + no),
            (3, ids[3] * 3, ids[3] + no + no)):
        example = data[4 + step]
        assert example["input_ids"].tolist()[-10:] == said + end
        assert example["labels"].tolist()[-10:] == learned + end
        assert example["input_ids"].tolist()[:-10] == data.question(4 + step)["input_ids"].tolist()
        assert set(example["labels"].tolist()[:-10]) == {IGNORE}
    assert data.lengths()[0].tolist() == [len(data[i]["input_ids"]) for i in range(12)]
    actions, there = data.chunks()
    assert actions.shape == (12, 3, 3) and there.sum(1).tolist() == [3, 3, 2, 1] * 3
    assert actions[6].tolist() == [episodes()[1]["steps"][i]["action"] for i in (2, 3, 3)]


def test_lengths_of_single_actions_are_not_taken_for_those_of_chunks(tmp_path):
    for chunk in (1, 3, 1):
        data = policy_and_data(tmp_path, episodes(), chunk=chunk)[1]
        assert data.lengths()[0][0] == len(data[0]["input_ids"])
        assert (data.lengths()[0] == len(data.question(0)["input_ids"]) + 3 * chunk + 1).all()


def test_actions_that_max_length_would_cut_are_refused(tmp_path):
    whole = len(policy_and_data(tmp_path, episodes(), chunk=3)[1][0]["input_ids"])
    data = policy_and_data(tmp_path, episodes(), chunk=3, max_length=whole)[1]
    assert not isinstance(data[0], BadExample) and (data.lengths()[0] == whole).all()
    data = policy_and_data(tmp_path, episodes(), chunk=3, max_length=whole - 1)[1]
    message = f"it takes more than --max_length {whole - 1} positions, so its actions would be cut"
    assert message in str(data[0])
    with pytest.raises(BadExample, match=message):
        data.lengths()


def test_errors_are_told_for_each_place_of_a_chunk(tmp_path):
    """Two examples, steps 0 and 3 of an episode: two actions at the first place, one at each other."""
    policy, data = policy_and_data(tmp_path, episodes(), chunk=3)
    batch = collate([data[0], data[3]])
    targets = batch["labels"][:, 1:]
    predicted = targets[targets != IGNORE].clone()          # 9 actions' tokens, end, 3 actions' tokens, end
    assert len(predicted) == 14
    predicted[0] += 10                                      # place 1, dimension 0, ten bins lower
    predicted[8] += 20                                      # place 3, dimension 2
    metrics = policy.metrics(policy.measure(batch, predicted).tolist())
    of = policy.statistics["d"]["action"]
    width = (np.array(of["q99"]) - of["q01"]) / 255
    assert metrics["accuracies"] == pytest.approx([3 / 4, 1, 3 / 4])
    assert metrics["accuracy"] == pytest.approx(10 / 12)
    assert metrics["l1"] == pytest.approx([10 * width[0] / 4, 0, 20 * width[2] / 4])
    assert metrics["l1_by_place"] == [pytest.approx([10 * width[0] / 2, 0, 0]), [0, 0, 0],
                                      pytest.approx([0, 0, 20 * width[2]])]
    last = collate([data[3]])
    assert policy.metrics(policy.measure(last, last["labels"][last["labels"] != IGNORE]).tolist())[
        "l1_by_place"] == [[0, 0, 0], None, None]           # nothing was there: no error, and no zero


# ---- state ----

def with_states(inside=True):
    """Episodes whose steps have states, 2 numbers each, from 0 to 11 and from 0 to -11."""
    rows = episodes()
    for e, row in enumerate(rows):
        states = [[4.0 * e + s, -4.0 * e - s] for s in range(4)]
        if inside:
            for step, state in zip(row["steps"], states):
                step["state"] = state
        else:
            row["state"] = states
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_state_stands_behind_the_picture_in_its_own_units(tmp_path, kind, inside):
    policy, data = policy_and_data(tmp_path, with_states(inside), kind, state=True)
    of = policy.statistics["d"]["state"]
    assert of["q01"] == pytest.approx([0.11, -10.89]) and of["q99"] == pytest.approx([10.89, -0.11])
    assert of["min"] == [0, -11] and of["mask"] == [True, True]
    ids, asked = data[5]["input_ids"].tolist(), data.question(5)["input_ids"].tolist()
    place = ids.index(IMAGE) + PATCHES
    assert ids[:len(asked)] == asked and ids[place - 1] == IMAGE
    # Step 1 of episode 1: 5 and -5, bins of (5 - 0.11) / 10.78 of the range, and of the rest of it.
    normal = 2 * (5 - 0.11) / 10.78 - 1
    assert [policy.end - id for id in ids[place:place + 2]] == np.digitize(
        [normal, -normal], np.linspace(-1, 1, 256)).tolist()
    lengths = data.lengths()[0]
    assert lengths.tolist() == [len(data[i]["input_ids"]) for i in range(12)]
    plain = policy_and_data(tmp_path, with_states(inside), kind)[1]
    assert plain[5]["input_ids"].tolist() == ids[:place] + ids[place + 2:]
    assert (lengths == plain.lengths()[0] + 2).all()


def test_with_several_cameras_the_state_stands_behind_the_last(tmp_path):
    rows = with_states()
    for step in (step for row in rows for step in row["steps"]):
        step["image"] = ["a.png", "a.png"]
    policy, data = policy_and_data(tmp_path, rows, state=True)
    ids = data.question(0)["input_ids"].tolist()
    last = len(ids) - ids[::-1].index(IMAGE)
    assert ids.count(IMAGE) == 2 * PATCHES
    assert ids[last:last + 2] == policy.encode([0, 0], "d", "state").tolist()


def test_a_fifth_of_the_examples_does_not_know_its_state_in_each_epoch_another(tmp_path):
    """By seed, epoch and example alone, and only where a run trains: questions always know it."""
    policy, data = policy_and_data(tmp_path, with_states(), state=True)
    place, unknown = data[5]["input_ids"].tolist().index(IMAGE) + PATCHES, [data.language.end_id] * 2

    def knows(i):
        ids, known = data[i]["input_ids"].tolist(), data.question(i)["input_ids"].tolist()
        assert len(ids) == len(known) + 4                   # 3 dimensions, end: the length does not change
        assert ids[place:place + 2] in (unknown, known[place:place + 2]) and unknown != known[place:place + 2]
        assert ids[:place] + ids[place + 2:len(known)] == known[:place] + known[place + 2:]
        return ids[place:place + 2] != unknown

    assert all(map(knows, range(12)))                       # without a seed
    found = {}
    for seed, epoch in ((7, 0), (7, 1), (8, 0), (7, 0)):
        data.seed = seed
        data.pictures.epoch.fill_(epoch)
        drawn = [data.knows_state(i) for i in range(2000)]
        assert drawn[:12] == [knows(i) for i in range(12)]
        assert sum(drawn) == pytest.approx(1600, abs=72)    # four standard deviations
        assert found.setdefault((seed, epoch), drawn) == drawn
    assert len({tuple(drawn) for drawn in found.values()}) == 3


@pytest.mark.parametrize("change, said", [
    (lambda row: row["steps"][2].pop("state"), "step 2: 'state' must be 2 finite numbers, found None"),
    (lambda row: row["steps"][2].update(state=[1]), "step 2: 'state' must be 2 finite numbers, found [1]"),
    (lambda row: row.update(state=[[1, 2]] * 3), "'state' must be a list of 4 lists, one for each step"),
    (lambda row: row.update(state=None), "'state' must be a list of 4 lists, one for each step, found None")])
def test_an_episode_whose_state_can_not_be_is_named(change, said, tmp_path):
    rows = with_states()
    change(rows[1])
    policy_and_data(tmp_path, rows)                         # without --state nobody looks at it
    with pytest.raises(UserError) as e:
        policy_and_data(tmp_path, rows, state=True)
    assert "d.json, episode id='e1'" in str(e.value) and said in str(e.value)


# ---- the stage ----

@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """Twelve episodes of four steps: the brightness of the picture is the action."""
    folder = tmp_path_factory.mktemp("robot")
    (folder / "images").mkdir()
    rows = []
    for e in range(12):
        steps = []
        for s in range(4):
            bright = (e * 4 + s) / 48
            Image.new("RGB", (96, 96), (int(255 * bright),) * 3).save(folder / "images" / f"{e}_{s}.png")
            steps.append({"image": f"{e}_{s}.png", "action": [bright, -bright], "state": [bright, e, 0.5]})
        rows.append({"id": str(e), "instruction": "show it", "steps": steps})
    (folder / "lamp.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained VLM of the toy's backbones, as a checkpoint to start from. Do not write into it."""
    return after_one_step(tmp_path_factory.getbasetemp())


@functools.cache
def after_one_step(root):
    return run_train(drawn(root), root / "base", "--max_steps", "1")[1]


def train_robot(robot, base, root, *flags, **how):
    return run_train(robot, root, "--ckpt", str(base), "--train_json", str(robot / "lamp.json"),
                     "--learning_rate", "1e-3", *flags, stage="vla", **how)


def test_a_policy_trains_the_same_on_one_rank_and_on_two_and_acts(robot, base, tmp_path):
    one, run, _ = train_robot(robot, base, tmp_path / "1", "--max_steps", "20")
    two, _, _ = train_robot(robot, base, tmp_path / "2", "--max_steps", "20", "--per_device_batch_size", "2",
                            ranks=2)
    for got, want in zip(two, one, strict=True):
        assert (got["loss"] == pytest.approx(want["loss"], rel=1e-4)
                and got["tokens"] == want["tokens"] == 8 * 3)
        assert len(got["l1"]) == 2
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    state = json.loads((run / "step-00000020" / "state.json").read_text())
    assert (state["actions"]["bins"] == 256
            and state["actions"]["statistics"]["lamp"]["num_trajectories"] == 12)
    assert json.loads((run / "dataset_statistics.json").read_text()) == state["actions"]["statistics"]

    from generate import Assistant
    assistant = Assistant(run)
    seen = [[Image.open(robot / "images" / f"{e}_0.png").convert("RGB")] for e in (0, 5, 11)]
    actions = assistant.act(seen, ["show it"] * 3)
    assert actions.shape == (3, 1, 2)                       # robots, actions of a chunk, dimensions
    low, high = (np.array(state["actions"]["statistics"]["lamp"]["action"][q]) for q in ("q01", "q99"))
    assert (actions >= low).all() and (actions <= high).all()
    for i in range(3):                                      # batched = one by one
        assert (assistant.act(seen[i:i + 1], ["show it"])[0] == actions[i]).all()
    command = [sys.executable, "generate.py", "--ckpt", run, "--image", robot / "images" / "5_0.png",
               "--prompt", "Show it."]
    printed = forked.run(command, check=True).stdout
    assert re.fullmatch(rf"{actions[1, 0, 0]:.4f} {actions[1, 0, 1]:.4f} \(\d+ ms\)\n", printed)


def fresh(known=None):
    """Stands for answers.Answers: what is known from before, and what is written."""
    return SimpleNamespace(known=known or {}, written=(written := []), write=written.append)


def test_recorded_steps_are_scored_beside_two_policies_that_do_not_look(robot, base, tmp_path, capsys):
    from evaluate import EvaluateConfig, open_loop
    from generate import Assistant
    assistant = Assistant(train_robot(robot, base, tmp_path, "--max_steps", "1")[1])
    with world_of_one():
        scores, unread = open_loop(assistant, assistant.dataset(robot / "lamp.json", robot / "images"),
                                   EvaluateConfig(ckpt="x", json="x", max_examples=6, batch_size=4), fresh())
    bright = np.arange(6) / 48
    assert not unread
    assert scores["count"] == 6 and len(scores["l1"]["policy"]) == 2
    assert scores["l1"]["mean action"] == pytest.approx([np.abs(bright - 23.5 / 48).mean()] * 2)
    first = 23.5 / 48 + (23.5 - 4) / 48                     # there is no action before: the mean one counts
    assert scores["l1"]["action before"] == pytest.approx([(first + 4 / 48) / 6] * 2)
    assert "mean action" in capsys.readouterr().out
    # A policy of two robots: the file's name, or its folder's, says whose units are meant.
    assistant.policy.statistics["other"] = assistant.policy.statistics["lamp"]
    (tmp_path / "other").mkdir()
    for name, key in (("lamp.json", "lamp"), ("other/val.json", "other"), ("val.json", None)):
        shutil.copy(robot / "lamp.json", tmp_path / name)
        data = assistant.dataset(tmp_path / name, robot / "images")
        if key:
            assert data.units() == key
            continue
        with world_of_one(), pytest.raises(UserError, match="knows the datasets lamp, other. Choose the one"):
            open_loop(assistant, data, EvaluateConfig(ckpt="x", json="x"), fresh())
    with world_of_one():
        again, _ = open_loop(assistant, assistant.dataset(tmp_path / "lamp.json", robot / "images"),
                             EvaluateConfig(ckpt="x", json="x", max_examples=6, batch_size=4), fresh())
    assert again == scores


def test_pictures_of_held_out_episodes_lie_where_those_of_their_robot_do(tmp_path):
    files = [tmp_path / name for name in ("talk.json", "a/train.json", "b/train.json", "b/more.json")]
    for file in (*files, tmp_path / "b/val.json", tmp_path / "val.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("[{}]" if file.name == "talk.json" else json.dumps([{"steps": []}]))
    cfg = config.Config(stage="vla", ckpt="x", train_json=",".join(map(str, files)), image_dir="t,a,b,m")
    found = [actions_module.image_dir_of(cfg, path)
             for path in (*map(str, files), tmp_path / "b/val.json", tmp_path / "val.json")]
    assert found == ["t", "a", "b", "m", "b", "a"]


def test_a_policy_of_chunks_trains_acts_and_is_scored_at_each_place(robot, base, tmp_path, capsys):
    from evaluate import EvaluateConfig, open_loop
    from generate import Assistant
    metrics, run, _ = train_robot(robot, base, tmp_path, "--max_steps", "12", "--chunk", "3")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [len(place) for place in metrics[0]["l1_by_place"]] == [2, 2, 2]
    assert all(8 * 3 <= line["tokens"] <= 8 * 7 for line in metrics)        # 1 to 3 actions, and the end
    assistant = Assistant(run)
    seen = [[Image.open(robot / "images" / f"{e}_0.png").convert("RGB")] for e in (0, 5, 11)]
    actions = assistant.act(seen, ["show it"] * 3)
    assert actions.shape == (3, 3, 2)
    for i in range(3):                                      # batched = one by one
        assert (assistant.act(seen[i:i + 1], ["show it"])[0] == actions[i]).all()
    data = assistant.dataset(robot / "lamp.json", robot / "images")
    with world_of_one():
        scores, unread = open_loop(assistant, data, EvaluateConfig(ckpt="x", json="x", batch_size=20),
                                   answers := fresh())
    wanted, there = data.chunks()
    error = np.abs(assistant.act_on([data.question(i) for i in range(48)]) - wanted)
    assert not unread and scores["count"] == 48
    assert scores["l1"]["policy"] == pytest.approx(error[there].mean(0))
    for k in range(3):
        assert scores["l1"][f"policy, place {k + 1}"] == pytest.approx(error[there[:, k], k].mean(0))
    # What was done before the chunk: at its places 1, 2, 3 that is 1, 2, 3 steps ago, and 1/48 each.
    assert scores["l1"]["action before"][0] > 1.5 / 48
    assert "policy, place 3" in capsys.readouterr().out
    asked, data.question = [], lambda i, question=data.question: asked.append(i) or question(i)
    with world_of_one():                                    # a start that was killed after 30 steps
        answers = fresh({row["index"]: row["answer"] for row in answers.written[:30]})
        again, _ = open_loop(assistant, data, EvaluateConfig(ckpt="x", json="x", num_workers=0), answers)
    assert again == scores and asked == list(range(30, 48))
    refused = forked.run([sys.executable, "evaluate.py", "--ckpt", run, "--json", robot / "lamp.json",
                          "--image_dir", robot / "images", "--unnorm_key", "nope"])
    assert refused.returncode == 1 and "nope" in refused.stderr
    assert not list(run.glob("*unfinished*"))               # nothing was answered
    command = [sys.executable, "generate.py", "--ckpt", run, "--image", robot / "images" / "5_0.png",
               "--prompt", "Show it."]
    printed = forked.run(command, check=True).stdout
    assert re.fullmatch(r"(-?\d\.\d{4} -?\d\.\d{4}\n){2}-?\d\.\d{4} -?\d\.\d{4} \(\d+ ms\)\n", printed)


def test_a_policy_that_knows_its_state_asks_for_it(robot, base, tmp_path):
    from evaluate import EvaluateConfig, open_loop
    from generate import Assistant
    _, run, printed = train_robot(robot, base, tmp_path, "--max_steps", "12", "--state")
    assert "state dimension 2 hardly moves (0.5 to 0.5)" in printed
    assistant = Assistant(run)
    assert assistant.policy.state_size == 3
    data = assistant.dataset(robot / "lamp.json", robot / "images")
    seen, states = [], []
    for e in (0, 5, 11):
        seen.append([Image.open(robot / "images" / f"{e}_0.png").convert("RGB")])
        states.append([e * 4 / 48, e, 0.5])
    actions = assistant.act(seen, ["show it"] * 3, states=states)
    assert (actions == assistant.act_on([data.question(4 * e) for e in (0, 5, 11)])).all()  # one prompt
    for i in range(3):                                      # batched = one by one
        assert (assistant.act(seen[i:i + 1], ["show it"], states=states[i:i + 1])[0] == actions[i]).all()
    example = assistant.example(assistant.policy.question("show it"), seen[0], state=states[0])
    hidden = assistant.example(assistant.policy.question("show it"), seen[0])
    assert (example["input_ids"] != hidden["input_ids"]).sum() == 3         # None: it is not known
    assert assistant.act(seen, ["show it"] * 3, states=[states[0], None, states[2]]).shape == (3, 1, 2)
    with pytest.raises(UserError, match="was trained with --state: it needs 3 numbers"):
        assistant.act(seen, ["show it"] * 3)
    with pytest.raises(BadExample, match=r"'state' must be 3 finite numbers, found \[1, 2\]"):
        assistant.act(seen[:1], ["show it"], states=[[1, 2]])
    with world_of_one():                                    # a held-out file has another name than its units
        (robot / "held_out.json").write_text((robot / "lamp.json").read_text())
        scores, unread = open_loop(assistant, assistant.dataset(robot / "held_out.json", robot / "images"),
                                   EvaluateConfig(ckpt="x", json="x"), fresh())
    assert not unread and scores["count"] == 48
    command = [sys.executable, "generate.py", "--ckpt", run, "--image", robot / "images" / "5_0.png",
               "--prompt", "Show it.", "--state", str(20 / 48), "5", "0.5"]
    printed = forked.run(command, check=True).stdout
    assert printed.startswith(f"{actions[1, 0, 0]:.4f} {actions[1, 0, 1]:.4f} (")


COTRAINED = "--chunk", "2", "--max_steps", "16", "--length_window", "64"


@pytest.mark.parametrize("flags", [("--decode", "parallel"), ("--state",)])
def test_a_policy_trains_on_conversations_too_the_same_on_one_rank_and_on_two(
        flags, robot, base, world, tmp_path, capsys):       # noqa: F811
    import generate
    files = ("--train_json", f"{robot / 'lamp.json'},{world / 'finetune.json'}", "--mixture", "2,1",
             "--image_dir", f"{robot / 'images'},{world / 'images'}", *COTRAINED, *flags)
    one, run, printed = train_robot(robot, base, tmp_path / "1", *files)
    two, _, _ = train_robot(robot, base, tmp_path / "2", *files, "--per_device_batch_size", "2", ranks=2)
    kinds = []
    for got, want in zip(two, one, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4) and got["tokens"] == want["tokens"]
        kinds.append("robot" if "l1" in want else want["modality"])
        assert set(want) & {"l1", "l1_by_place", "accuracies"} == (
            {"l1", "l1_by_place", "accuracies"} if kinds[-1] == "robot" else set())
        assert 0 <= want["accuracy"] <= 1
    # Twice the 48 steps of the robot, 12 batches of 8; and once the conversations, which are of two kinds.
    rows = json.loads((world / "finetune.json").read_text())
    pictures = sum("image" in row for row in rows)
    epoch = 12 + -(-pictures // 8) + -(-(len(rows) - pictures) // 8)
    assert f"{96 + len(rows)} examples ({96 + pictures} with pictures)" in printed
    assert f"{epoch} an epoch" in printed and set(kinds) == {"robot", "image", "text"}
    assistant = generate.Assistant(run)
    talks = assistant.dataset(world / "finetune.json", world / "images")
    acts = assistant.dataset(robot / "lamp.json", robot / "images")
    assert not hasattr(talks, "chunks") and len(talks) == len(rows) and len(acts) == 48
    assert [type(text) for text in assistant.answer([talks.question(i) for i in range(3)], 4)] == [str] * 3
    capsys.readouterr()
    generate.main(generate.GenerateConfig(ckpt=str(run), prompt="How many?", words=True, max_new_tokens=4))
    assistant.policy = None                                 # or the question would be about an action
    assert capsys.readouterr().out == assistant.answer([assistant.example("How many?", [])], 4)[0] + "\n"
    command = [sys.executable, "evaluate.py", "--ckpt", run, "--json", world / "finetune.json", "--image_dir",
               world / "images", "--max_examples", "4", "--num_workers", "0", "--out", tmp_path / "s.json"]
    forked.run(command, check=True)
    assert json.loads((tmp_path / "s.json").read_text())["count"] == 4


def test_conversations_that_are_called_like_episodes_are_refused(robot, base, world, tmp_path):  # noqa: F811
    (tmp_path / "lamp.json").write_text((world / "finetune.json").read_text())
    printed = train_robot(robot, base, tmp_path, "--train_json",
                          f"{robot / 'lamp.json'},{tmp_path / 'lamp.json'}", ok=False)[2]
    assert "lamp.json: a file of episodes is called 'lamp', too. Rename one of them" in printed
    printed = train_robot(robot, base, tmp_path, "--train_json", str(world / "finetune.json"), ok=False)[2]
    assert "this is no episode, there are no 'steps'" in printed


def test_a_file_is_told_by_its_first_object_however_long_it_is(tmp_path):
    file = tmp_path / "a.json"
    long = {"id": "x" * 200_000}
    for text, want in ((json.dumps([long | {"steps": []}]), True), (json.dumps([long]), False),
                       ("\ufeff \n" + json.dumps(long) + "\n" + json.dumps({"steps": []}), False),
                       (json.dumps({"conversations": []}), False), ("[", True), ("[3]", True), ("", True)):
        file.write_text(text, encoding="utf-8")
        assert actions_module.holds_episodes(file) == want, text[-40:]
    assert actions_module.holds_episodes(tmp_path / "none.json")        # its reader says that it is not there


def test_one_image_dir_is_for_all_files_or_there_are_as_many_as_files():
    def of(stage, folders):
        return actions_module.image_dirs(config.Config(stage=stage, ckpt="x", train_json="a.json,b.json",
                                                       image_dir=folders))
    assert of("vla", "x") == ["x", "x"] and of("vla", "x,y.tar") == ["x", "y.tar"]
    assert of("finetune", "x,y") == ["x,y", "x,y"]          # a name with a comma in it
    with pytest.raises(UserError, match="--image_dir x,y,z: give one for all files of --train_json, or one "
                                        "for each of them: 2, joined by commas"):
        of("vla", "x,y,z")


def test_the_check_of_a_file_understands_episodes(robot, tmp_path, capsys):
    cfg = check.CheckConfig(
        file=str(robot / "lamp.json"), image_dir=str(robot / "images"), stage="vla",
        sheet=str(tmp_path / "sheet.png"),
        vision_backbone=str(ROOT / "toy/vit"), llm_backbone=str(ROOT / "toy/llm"))
    assert check.check(cfg) == 0
    printed = capsys.readouterr().out
    assert ('"num_trajectories": 12' in printed and "48 examples, 0 wrong" in printed
            and "to show it?" in printed)
    assert Image.open(tmp_path / "sheet.png").width == 6 * 172              # six cells in a row


def test_the_check_of_a_file_reads_states_too_where_it_is_asked(robot, tmp_path):
    rows = json.loads((robot / "lamp.json").read_text())
    for row in rows:
        for step in row["steps"]:
            step["state"] = [0.5, 1.0]
    rows[2]["steps"][1]["state"] = [0.5]
    (tmp_path / "lamp.json").write_text(json.dumps(rows))
    about = dict(file=str(tmp_path / "lamp.json"), image_dir=str(robot / "images"), stage="vla",
                 vision_backbone=str(ROOT / "toy/vit"), llm_backbone=str(ROOT / "toy/llm"))
    assert check.check(check.CheckConfig(**about, chunk=2)) == 0
    with pytest.raises(UserError, match=rf"id={rows[2]['id']!r}, step 1: 'state' must be 2 finite numbers"):
        check.check(check.CheckConfig(**about, state=True))


def test_a_continued_policy_is_the_one_that_was_never_stopped(robot, base, tmp_path):
    """Augmentation included: a picture's crop, and whether a state is known, depend on seed, epoch and
    example, not on how often a run began."""
    flags = ("--max_steps", "8", "--save_every", "7", "--augment", "--state", "--chunk", "2")
    _, run, _ = train_robot(robot, base, tmp_path, *flags)
    want = weights(run)
    shutil.rmtree(run / "step-00000008")
    _, run, _ = train_robot(robot, base, tmp_path, *flags)
    assert all(torch.equal(weights(run)[name], want[name]) for name in want)


def test_fresh_rows_are_like_their_neighbors_and_leave_all_others_alone():
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2))
    before = llm.get_input_embeddings().weight.detach().clone()
    before[300:556] = 4.0
    llm.get_input_embeddings().weight.data.copy_(before)    # as if nothing had ever told them apart
    ActionTokens(556, UNIT).fresh_rows(llm, seed=7)
    after = llm.get_output_embeddings().weight              # tied
    assert torch.equal(after[:300], before[:300]) and torch.equal(after[556:], before[556:])
    rows = torch.nn.functional.normalize(after[300:556], dim=1)
    like = rows @ rows.T
    assert like.diagonal(1).min() > 0.99 and like.mean() < 0.3


def test_only_the_named_parts_train(robot, base, tmp_path):
    _, run, printed = train_robot(robot, base, tmp_path, "--max_steps", "2", "--trains", "projector,llm.last")
    before, after = weights(base), weights(run)
    assert before.keys() == after.keys()
    for name in before:
        trains = name.startswith("projector") or ".h.3." in name or ".wte." in name
        assert torch.equal(before[name], after[name]) != trains, name
    assert "frozen vision 0.93M, llm 0.7" in printed
    printed = train_robot(robot, base, tmp_path, "--trains", "projector,hands", ok=False)[2]
    assert "--trains projector,hands: choose from vision, projector, llm, llm.last" in printed


def test_a_mixture_repeats_a_file_within_an_epoch(robot, base, tmp_path):
    files = f"{robot / 'lamp.json'},{robot / 'lamp.json'}"
    metrics, _, printed = train_robot(robot, base, tmp_path, "--train_json", files, "--mixture", "3,1",
                                      "--max_steps", "2")
    assert len(metrics) == 2 and "192 examples" in printed and "24 an epoch" in printed


def test_one_action_costs_one_token_per_dimension(tmp_path):
    policy, data = policy_and_data(tmp_path, episodes(dimensions=7))
    assert policy.dimensions == 7 and data.numbers("action").shape == (12, 7)
    assert (data[0]["labels"] != IGNORE).sum() == 8


@pytest.mark.parametrize("value", ["1", True, None, [1.0], float("inf"), 1e308, -1e10])
def test_what_is_no_number_in_an_action_is_named(value, tmp_path):
    rows = episodes()
    rows[1]["steps"][2]["action"][1] = value
    with pytest.raises(UserError, match=r"d.json, episode id='e1', step 2: 'action' must be 3 finite num"):
        policy_and_data(tmp_path, rows)


@pytest.mark.parametrize("keep, said", [
    ([3], "--keep_dimensions 3: the actions of .*d.json have 3 dimensions, counted from 0"),
    ([1], "--keep_dimensions 1: its values in .* go from .* only what lies in -1 to 1 can stay as it is")])
def test_a_dimension_that_can_not_be_kept_is_named(keep, said, tmp_path):
    policy, data = policy_and_data(tmp_path, episodes())
    with pytest.raises(UserError, match=said):
        policy.learn_units(data, keep)


@pytest.mark.parametrize("images, said", [
    (["a.png"] * 2, r"d.json: a step has 1 \(episode id='e0', step 0\) or 2 \(episode id='e1', step 0\) "
     "pictures, but must always have the same number"),
    ([], "must have a file name, or a list of them, under 'image'")])
def test_steps_of_different_numbers_of_pictures_are_refused(images, said, tmp_path):
    rows = episodes()
    rows[1]["steps"][0]["image"] = images
    with pytest.raises(UserError, match=said):
        policy_and_data(tmp_path, rows)


def test_a_policy_does_not_act_on_another_number_of_pictures(tmp_path):
    policy, _ = policy_and_data(tmp_path, episodes())
    policy = ActionTokens.load(json.loads(json.dumps(policy.saved())))
    policy.check_pictures({1})
    for found in ({0}, {3}, {1, 2}):
        with pytest.raises(UserError, match="but must always have 1"):
            policy.check_pictures(found)
    with pytest.raises(UserError, match="a step has 0 pictures"):
        ActionTokens(1000, UNIT).check_pictures({0})        # of a checkpoint that does not know the number


@pytest.mark.parametrize("wrong", [
    {"end": 10}, {"end": "x"}, {"end": 10 ** 9}, {"statistics": {}}, {"statistics": []}, {"pictures": 0},
    {"decode": "all"}, {"chunk": 0}, {"chunk": True}, {"chunk": 2.0}, {"chunk": 10 ** 6},
    {"statistics": {"arm": {"action": {"q01": [-1.0], "q99": [float("nan")], "mask": [True]}}}},
    {"statistics": {"arm": {"action": {"q01": [-1.0, 0.0], "q99": [1.0], "mask": [True]}}}},
    {"statistics": {"arm": {"action": {"q01": [-1.0], "q99": [1.0]}}}},
    {"statistics": {"arm": UNIT["arm"] | {"state": {"q01": [-1.0], "q99": [float("inf")], "mask": [True]}}}},
    {"statistics": {"arm": UNIT["arm"] | {"state": UNIT["arm"]["action"]}, "leg": UNIT["arm"]}}])
def test_actions_of_a_stranger_that_can_not_be_are_refused(wrong):
    saved = ActionTokens(1000, UNIT, pictures=1).saved()
    assert ActionTokens.load(saved).end == 1000
    with pytest.raises(UserError, match="state.json holds no actions that can be used"):
        ActionTokens.load(saved | wrong)
