"""trackers.py: what TensorBoard and Weights & Biases get is metrics.jsonl, each step once, also after a kill.

Their packages are in requirements-dev.txt as far as they are small; what is not installed is not tested.
"""
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import ROOT, assert_bit_for_bit, train_here, world  # noqa: F401

import report
import trackers
from config import Config, UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def steps_in_tensorboard(run):
    """tag -> [(step, value), ...] of all event files of a folder, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


def records_of(file):
    """The records of a .wandb file: 7 bytes in front, then LevelDB's log format in blocks of 32 KiB."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:                          # no room for a head: zeros up to the next block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                                  # a whole record, or the last part of one
            yield whole
            whole = b""


def steps_in_wandb(root):
    """The same of all folders of runs that were written offline, and the ids of these runs."""
    from wandb.proto import wandb_internal_pb2
    found, ids = {}, set()
    for file in sorted(Path(root).glob("wandb/offline-run-*/run-*.wandb")):
        for data in records_of(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return found, ids


READERS = {"tensorboard": lambda run: steps_in_tensorboard(run),
           "wandb": lambda run: steps_in_wandb(run.parent)[0]}
both = pytest.mark.parametrize("name", READERS)

KILLED = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
import trackers
from config import Config
run, name = Path(sys.argv[1]), sys.argv[2]
cfg = Config(train_json="a", image_dir="b", tracker=name)
tracker = trackers.begin(cfg, run)
for step in range(11, 16):
    line = {"step": step, "loss": 1 / step, "l1": [step, 2.5], "modality": "text", "mfu": None, "total": 20}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    tracker.log(line)
if sys.argv[3] == "killed":
    os._exit(9)
tracker.end(failed=False)
"""


def start(run, name, how):
    """A start of a run in a process of its own, which does steps 11 to 15."""
    return subprocess.run([sys.executable, "-c", KILLED, str(run), name, how], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"started": "2026-11-26 10:12:33 0a1b2c3d"}))
    write(folder, range(1, 11))
    return folder


def write(run, steps):
    lines = [{"step": step, "loss": 1 / step, "l1": [step, 2.5], "start": 0, "total": 20} for step in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@both
def test_after_a_kill_no_step_is_there_twice_and_none_is_missing(name, run):
    pytest.importorskip(name)
    (run / "events.out.tfevents.1.mine").write_text("mine")     # not ours: it stays
    for _ in range(2):
        killed = start(run, name, "killed")
        assert killed.returncode == 9, killed.stderr
        write(run, range(1, 11))                            # cut back to the checkpoint of step 10
    (run / "events.out.tfevents.1.mine").unlink()
    done = start(run, name, "to the end")
    assert done.returncode == 0, done.stderr
    found = READERS[name](run)
    assert found.keys() == {"loss", "l1/0", "l1/1"}
    assert found["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 16)]
    assert found["l1/0"] == [(step, step) for step in range(1, 16)]


def test_each_start_is_the_same_run_of_wandb(run):
    pytest.importorskip("wandb")
    start(run, "wandb", "killed")
    (theirs := run.parent / "wandb" / "offline-run-20261126_000000-another").mkdir()
    write(run, range(1, 11))
    start(run, "wandb", "to the end")
    assert steps_in_wandb(run.parent)[1] == {"202611261012330a1b2c3d"} and theirs.exists()
    assert len(list(run.parent.glob("wandb/offline-run-*"))) == 2


def test_what_wandb_has_online_is_not_sent_again(run, monkeypatch):
    """Their run goes on behind the last step that they have. Here that is step 13, of a killed start."""
    sent = []
    fake = SimpleNamespace(step=14, log=lambda values, step: sent.append(step), finish=lambda exit_code: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **how: fake, Settings=lambda **how: None))
    tracker = trackers.begin(cfg_of(run, "wandb"), run)
    for step in range(11, 18):
        tracker.log({"step": step, "loss": 1.0})
    assert sent == [14, 15, 16, 17]


def cfg_of(run, name):
    return Config(train_json="a", image_dir="b", tracker=name, run_root=str(run.parent), run_id=run.name)


# -- a tracker and a run -------------------------------------------------------------------------------------

@both
def test_a_tracker_changes_no_bit_of_a_run_and_gets_its_metrics(name, world, tmp_path, monkeypatch):
    pytest.importorskip(name)
    few = ("--max_steps", "4", "--val_json", str(world / "val.json"), "--val_every", "2")
    monkeypatch.setattr(report, "closing", lambda cfg, run: None)
    without = train_here(monkeypatch, world, tmp_path / "without", *few)
    metrics, run = with_it = train_here(monkeypatch, world, tmp_path, *few, "--tracker", name)
    assert_bit_for_bit(with_it, without)
    found = READERS[name](run)
    for column in ("loss", "lr", "accuracy", "grad_norm", "val_loss", "tokens_per_second"):
        want = [(line["step"], pytest.approx(line[column], rel=1e-6)) for line in metrics if column in line]
        assert found[column] == want and len(want) == (2 if column == "val_loss" else 4)
    train_here(monkeypatch, world, tmp_path, *few, "--tracker", name)   # finished: nothing is added
    assert READERS[name](run)["loss"] == found["loss"]


class Fails:
    def __init__(self, *_):
        self.logged = Counter()

    def log(self, line):
        self.logged[line["step"]] += 1
        if line["step"] == 2:
            raise ConnectionError("no route to host\nand more")

    def end(self, failed):
        raise AssertionError("it has failed before")


def test_a_tracker_that_fails_ends_no_run(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "closing", lambda cfg, run: None)
    monkeypatch.setattr(trackers, "check", lambda name: None)
    monkeypatch.setattr(trackers, "TensorBoard", Fails)
    metrics, _ = train_here(monkeypatch, world, tmp_path, "--max_steps", "4", "--tracker", "tensorboard")
    said = capsys.readouterr().err
    assert len(metrics) == 4 and said.count("--tracker tensorboard has failed") == 1
    assert "(ConnectionError: no route to host); the run goes on without" in said


def broken(*_):
    raise OSError("not logged in")


def test_a_new_run_does_not_begin_without_its_tracker_but_an_old_one_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "WandB", broken)
    assert trackers.begin(cfg_of(run, "wandb"), run) is None
    said = "--tracker wandb can't begin (OSError: not logged in); the run goes on without"
    assert said in capsys.readouterr().err
    write(run, [])
    with pytest.raises(UserError, match=r"can't begin \(OSError: not logged in\).*WANDB_MODE=offline needs"):
        trackers.begin(cfg_of(run, "wandb"), run)


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tracker wandb: this package is not installed here. pip install w"):
        train_here(monkeypatch, world, tmp_path, "--tracker", "wandb")
    assert not os.listdir(tmp_path)
    trackers.check("")


def test_numbers_are_what_a_curve_can_show():
    line = {"step": 3, "total": 9, "start": 0, "loss": 0.5, "mfu": None, "modality": "text", "l1": [1, 2.5],
            "skipped": 0, "accuracies": []}
    assert trackers.numbers(line) == {"loss": 0.5, "l1/0": 1, "l1/1": 2.5, "skipped": 0}


def test_overwrite_takes_the_event_files_of_this_program_along(tmp_path):
    import owner
    (old := tmp_path / "r.overwritten").mkdir()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "replaces.json").write_text('["r.overwritten"]')
    (old / "events.out.tfevents.1.host.7.0.metrics").write_text("ours")
    owner.forget(tmp_path / "r")
    assert not old.exists()
