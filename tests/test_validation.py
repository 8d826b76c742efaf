"""validation.py: exact over all ranks and cuts, and the run does not notice it."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import talk, world_of_one
from test_actions import base, robot, train_robot  # noqa: F401
from test_faults import flags  # noqa: F401  (a language model with dropout)
from test_train import assert_bit_for_bit, exactly, run_train, train_here, world  # noqa: F401

import checkpoint
import config
import generate
import validation
from prompts import IGNORE


@pytest.fixture(scope="session")
def held_out(world):
    """13 conversations, so that nothing divides them: pictures and texts, of many lengths."""
    rows = json.loads((world / "finetune.json").read_text())
    text = [row for row in rows if "image" not in row][:4]
    (world / "held_out.json").write_text(json.dumps([row for row in rows if "image" in row][:9] + text))
    return ("--val_json", str(world / "held_out.json"), "--val_every", "3")


@pytest.fixture(autouse=True)
def no_score(monkeypatch):
    """The score with greedy answers, which a run with --val_json gets at its end, is another matter."""
    import report
    monkeypatch.setattr(report, "closing", lambda cfg, run: None)


def of_val(metrics):
    return [{name: line[name] for name in line if name.startswith("val_")} for line in metrics]


# -- which example goes where --------------------------------------------------------------------------------

def cut(n_pictures, n_texts, size, world, most=0):
    """Per rank, the micro-batches of so many examples; the later an example, the longer."""
    held = validation.HeldOut.__new__(validation.HeldOut)
    n = n_pictures + n_texts
    held.data, held.cfg = range(n), SimpleNamespace(per_device_batch_size=size, val_examples=most)
    held.lengths, held.modality = np.arange(n), np.arange(n) < n_pictures
    batches = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda: world)
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            batches.append(list(held.micro_batches()))
    return batches


def test_a_worked_example():
    """5 with pictures, 2 texts; 2 ranks, 2 in a micro-batch. Longest first; rank 1 has nothing in round 2."""
    assert cut(5, 2, size=2, world=2) == [
        [[(4, True), (3, True)], [(0, True)], [(6, True), (5, True)]],
        [[(2, True), (1, True)], [(0, False)], [(5, False)]]]


@pytest.mark.parametrize("pictures, texts", [(13, 4), (0, 7), (1, 0), (8, 8)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_each_example_counts_once_and_all_ranks_make_the_same_forwards(pictures, texts, world, size):
    batches = cut(pictures, texts, size, world)
    counted = [i for rank in batches for batch in rank for i, counts in batch if counts]
    assert sorted(counted) == list(range(pictures + texts))
    for together in zip(*batches, strict=True):
        assert len({i < pictures for batch in together for i, _ in batch}) == 1     # one modality at a time
        assert all(1 <= len(batch) <= size for batch in together)


def test_val_examples_are_spread_over_the_file():
    counted = [i for batch in cut(10, 10, 4, 1, most=5)[0] for i, counts in batch if counts]
    assert sorted(counted) == [0, 4, 8, 12, 16]
    assert len([i for batch in cut(3, 3, 4, 1, most=50)[0] for i, _ in batch]) == 6


# -- the run does not notice ---------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", ["0", "2"])
def test_validation_in_between_changes_no_bit_of_the_run(workers, world, flags, held_out, tmp_path,
                                                         monkeypatch):
    """With dropout, which draws from the random state in each forward."""
    few = (*flags, "--max_steps", "7", "--num_workers", workers)
    without = train_here(monkeypatch, world, tmp_path / "without", *few)
    with_it = train_here(monkeypatch, world, tmp_path / "with", *few, *held_out)
    assert_bit_for_bit(with_it, without)
    assert [line["step"] for line in with_it[0] if "val_loss" in line] == [3, 6, 7]         # and at the end
    ours, theirs = (checkpoint.newest(run) / "optimizer.safetensors" for _, run in (with_it, without))
    assert ours.read_bytes() == theirs.read_bytes()         # moments and random state


def loader_without_generator(*args, generator, **options):
    return torch.utils.data.DataLoader(*args, **options)


BREAKS = {"a loader that draws from the run's random state":
          lambda patch: patch.setattr(validation, "DataLoader", loader_without_generator),
          "dropout in validation": lambda patch: patch.setattr(torch.nn.Module, "eval", lambda self: self),
          "a model that stays in eval mode": lambda patch: patch.setattr(
              validation, "at_rest", lambda model: torch.no_grad() if model.eval() else None)}


@pytest.mark.parametrize("what", BREAKS)
def test_what_the_run_would_notice_would_be_caught(what, world, flags, held_out, tmp_path, monkeypatch):
    few = (*flags, "--max_steps", "4")
    without = train_here(monkeypatch, world, tmp_path / "without", *few)
    with monkeypatch.context() as patch:
        BREAKS[what](patch)
        broken = train_here(patch, world, tmp_path / "with", *few, *held_out)
    assert exactly(broken[0])[:3] == exactly(without[0])[:3]
    assert exactly(broken[0])[3] != exactly(without[0])[3]


def test_modules_come_back_in_the_mode_that_they_were_in():
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model = torch.nn.Sequential(torch.nn.Dropout(), inner)
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), validation.at_rest(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]


# -- the number is exact -------------------------------------------------------------------------------------

def score_here(world, run, *held_out, **changes):
    """The score of a run's newest checkpoint, in this process; and by hand, one example at a time."""
    assistant = generate.Assistant(run)
    cfg = SimpleNamespace(**vars(assistant.cfg) | {"val_json": held_out[1], "val_every": 1} | changes)
    held = validation.HeldOut(cfg, assistant.language, assistant.transforms, None, torch.device("cpu"))
    loss = tokens = right = 0
    with torch.no_grad():
        for i in range(len(held.data)):
            example = held.data[i]
            pixels = [torch.stack(views) for views in zip(*example["images"])]
            labels = example["labels"][None]
            one, predicted = assistant.model(example["input_ids"][None], labels, pixels)
            targets = labels[:, 1:][labels[:, 1:] != IGNORE]
            loss, tokens = loss + one.item(), tokens + len(targets)
            right += int((predicted == targets).sum())
    with world_of_one():
        return held.score(assistant.model), {"val_loss": pytest.approx(loss / tokens, rel=1e-5),
                                             "val_tokens": tokens, "val_accuracy": right / tokens}


def test_the_loss_is_that_of_each_example_read_alone(world, held_out, tmp_path, monkeypatch):
    metrics, run = train_here(monkeypatch, world, tmp_path, "--max_steps", "6", *held_out)
    got, want = score_here(world, run, *held_out)
    assert got == want and metrics[-1]["val_tokens"] == want["val_tokens"] > 13
    assert of_val(metrics)[-1] == {**want, "val_loss": pytest.approx(got["val_loss"], rel=1e-5)}
    some, _ = score_here(world, run, *held_out, val_examples=3)
    assert 3 <= some["val_tokens"] < got["val_tokens"]


@pytest.mark.parametrize("ranks, more", [(2, ["--per_device_batch_size", "3", "--global_batch_size", "6"]),
                                         (2, ["--shard", "all"]),
                                         (1, ["--per_device_batch_size", "1", "--num_workers", "2"])])
def test_ranks_and_cuts_do_not_change_it(ranks, more, world, held_out, tmp_path, monkeypatch):
    """At a learning rate of 0, so the weights are the same everywhere."""
    still = ("--max_steps", "3", "--learning_rate", "0", *held_out)
    want = of_val(train_here(monkeypatch, world, tmp_path / "want", *still)[0])[2]
    got = of_val(run_train(world, tmp_path, *still, *more, ranks=ranks)[0])[2]
    assert got == want | {"val_loss": pytest.approx(want["val_loss"], rel=1e-5)} and want["val_loss"] > 0.1


# -- data that can't be used ---------------------------------------------------------------------------------

def test_a_picture_that_can_not_be_read_is_left_out_and_said_once(world, held_out, tmp_path, monkeypatch,
                                                                  capsys):
    _, run = train_here(monkeypatch, world, tmp_path / "whole", "--max_steps", "1", *held_out)
    rows = json.loads((world / "held_out.json").read_text())
    whole, rows[2] = rows[2], rows[2] | {"image": "gone.png" if isinstance(rows[2]["image"], str)
                                         else ["gone.png"] * len(rows[2]["image"])}
    for name, part in (("broken.json", rows), ("shorter.json", [row for row in rows if row is not rows[2]])):
        (world / name).write_text(json.dumps(part))
    without, _ = score_here(world, run, "", str(world / "shorter.json"))
    assistant = generate.Assistant(run)
    cfg = SimpleNamespace(**vars(assistant.cfg) | {"val_json": str(world / "broken.json"), "val_every": 1})
    held = validation.HeldOut(cfg, assistant.language, assistant.transforms, None, torch.device("cpu"))
    with world_of_one():
        for _ in range(2):
            got = held.score(assistant.model)
            assert got == without | {"val_loss": pytest.approx(without["val_loss"], rel=1e-5)}
    assert capsys.readouterr().err.count("1 examples of") == 1 and whole != rows[2]


@pytest.mark.parametrize("row, said", [
    ({"conversations": talk("What is it?")}, "broken.json"),
    ({"conversations": talk("What is it?", "red " * 1100)}, "example takes .* Set --max_length 1024")])
def test_held_out_examples_are_looked_at_before_the_first_step(row, said, world, tmp_path, monkeypatch):
    (world / "broken.json").write_text(json.dumps([row]))
    with pytest.raises(config.UserError, match=said):
        train_here(monkeypatch, world, tmp_path, "--val_json", str(world / "broken.json"), "--val_every", "5",
                   "--max_length", "2000", "--max_steps", "1")
    assert not (tmp_path / "r").exists()


def test_val_every_needs_val_json():
    with pytest.raises(config.UserError, match="--val_every needs held-out examples: give --val_json FILE"):
        config.Config(train_json="a", image_dir="b", val_every=5)


# -- a policy ------------------------------------------------------------------------------------------------

def test_the_units_of_held_out_actions_are_those_of_the_only_file_or_of_the_named_one(tmp_path):
    def of(*known, file="val.json"):
        data = SimpleNamespace(name=file.split(".")[0], path=tmp_path / "b" / file)
        return validation.units_of(SimpleNamespace(statistics=dict.fromkeys(known)), data,
                                   SimpleNamespace(val_json=file))
    assert of("a") == "a" and of("a", "b") == "b" and of("a", "val") == "val"
    with pytest.raises(config.UserError, match="Put it into a folder named as one of a, c"):
        of("a", "c")


@pytest.mark.parametrize("flags", [(), ("--chunk", "3", "--decode", "parallel")])
def test_a_policy_tells_its_accuracy_and_its_error_on_held_out_episodes(flags, robot, base, tmp_path):
    """All 48 steps in one batch and held out at the same time, at a learning rate of 0: both say the same."""
    metrics, _, _ = train_robot(robot, base, tmp_path, "--max_steps", "2", "--learning_rate", "0",
                                "--val_every", "1", "--val_json", str(robot / "lamp.json"),
                                "--global_batch_size", "48", "--per_device_batch_size", "8", *flags, ranks=2)
    for line in metrics:
        assert line["val_tokens"] == line["tokens"]
        for name in ("loss", "accuracy", "accuracies", "l1"):
            assert line[f"val_{name}"] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name


def test_a_policy_that_trains_on_conversations_may_be_scored_on_held_out_ones(robot, base, world, held_out,
                                                                              tmp_path):
    """With the accuracy of tokens in between, with answers at the end; its pictures are those of talk."""
    metrics, run, printed = train_robot(
        robot, base, tmp_path, "--train_json", f"{robot / 'lamp.json'},{world / 'finetune.json'}",
        "--image_dir", f"{robot / 'images'},{world / 'images'}", "--decode", "parallel", "--max_steps", "3",
        *held_out)
    assert 0 <= metrics[2]["val_accuracy"] <= 1 and "val_l1" not in metrics[2]
    assert f"--json {held_out[1]} --image_dir {world / 'images'} --out" in printed
    assert json.loads((run / "val.json").read_text())["count"] == 13


# -- what else a run does at the same time -------------------------------------------------------------------

def test_a_profile_counts_validation_apart(world, held_out, tmp_path):
    _, _, printed = run_train(world, tmp_path, "--max_steps", "6", "--profile", "3", *held_out)
    table = {name: float(share) for share, name in re.findall(r"^ *([\d.]+)%  (.+)$", printed, re.MULTILINE)}
    del table["all-reduce, while the others run"]
    assert table["validation"] > 0 and sum(table.values()) == pytest.approx(100, abs=0.5), table
    assert table["other: the loop itself"] >= 0
