"""train.py as a user runs it: real torchrun, real files, the embedded toy world made small."""
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

import checkpoint
import config
import errors
import forked
import generate
import train
import ranks
import report
from config import BadExample
from helpers import world_of_one
from prompts import IGNORE
from toy import world as toy_world

ROOT = Path(__file__).resolve().parent.parent
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)      # as in fp32 and bf16


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """About 60 captions and 70 conversations: text only, one picture, two pictures."""
    return drawn(tmp_path_factory.getbasetemp())


@functools.cache                                            # else anew for each file that imports the fixture
def drawn(root):
    (root / "world").mkdir()
    toy_world.write(root / "world", seed=5, scale=0.01)
    return root / "world"


def train_command(world, root, *flags, ranks=1, stage="finetune"):
    file = "align.json" if stage == "align" else "finetune.json"
    start = ["--stage", stage] + (["--no_align"] if stage == "finetune" and "--ckpt" not in flags else [])
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "train.py"), *start,
            "--train_json", str(world / file), "--image_dir", str(world / "images"), "--val_json", "",
            "--run_root", str(root), "--run_id", "r", "--global_batch_size", "8",
            "--per_device_batch_size", "4", "--num_workers", "0", *flags]


def run_train(world, root, *flags, ranks=1, ok=True, stage="finetune", fresh=False):
    """One run on the small world: torchrun, or plain `python train.py` for one rank, which starts faster.
    fresh: each process imports everything itself, as a user's does; else it is forked.py's.

    Returns (metrics, run folder, everything it printed).
    """
    command = train_command(world, root, *flags, ranks=ranks, stage=stage)
    if ranks == 1:
        command = [sys.executable, *command[command.index(str(ROOT / "train.py")):]]
    done = forked.run(command, fresh)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    run = Path(root) / "r"
    return metrics_of(run), run, done.stdout + done.stderr


def train_here(monkeypatch, world, root, *flags, stage="finetune"):
    """The same in this process, seconds faster. Without DDP, which does nothing for one rank but start
    threads, and without the picture of the curves."""
    command = train_command(world, root, *flags, stage=stage)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda *args, **how: ranks.alone(*args, **how))
    monkeypatch.setattr(report, "draw", lambda run: None)
    monkeypatch.chdir(ROOT)                                 # toy/ is there
    if dist.is_initialized():                               # a module's own group of one
        dist.destroy_process_group()
    try:
        train.main(config.parse(config.Config, command[command.index(str(ROOT / "train.py")) + 1:]))
    finally:
        if dist.is_initialized():                           # a run that raised has left it on
            dist.destroy_process_group()
        ranks.cpu_group = None
        ranks.HELD.clear()                                  # the lock of the run, too
    return metrics_of(Path(root) / "r"), Path(root) / "r"


def metrics_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def weights(run):
    return load_file(sorted(run.glob("step-*"))[-1] / "model.safetensors")


def assert_same_up_to_rounding(got, want):
    """Without GPT-2's key biases (the middle third of c_attn.bias): a softmax does not change when all
    its inputs shift, so their true gradient is zero, and Adam turns the rounding noise in its place
    into steps of full size."""
    assert got.keys() == want.keys()
    for name in want:
        parts = [tensor.chunk(3)[::2] if name.endswith("c_attn.bias") else [tensor]
                 for tensor in (got[name], want[name])]
        for a, b in zip(*parts):
            assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


SHORT = ("--max_steps", "20", "--save_every", "10", "--keep", "5")


@pytest.fixture(scope="session")
def one_rank(world, tmp_path_factory):
    """Do not write into it."""
    return by_one_rank(world, tmp_path_factory.getbasetemp() / "one")


@functools.cache
def by_one_rank(world, root):
    return run_train(world, root, *SHORT)


def test_a_run_writes_one_line_per_step_and_mixes_modalities(one_rank):
    metrics, run, printed = one_rank
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert {line["modality"] for line in metrics} == {"image", "text"}
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "positions", "padding", "data_wait",
            "tokens_per_second", "modality"} <= metrics[0].keys()
    assert all(line["mfu"] is None and line["skipped"] == 0 for line in metrics)    # a CPU, in fp32
    assert metrics[0]["seconds_left"] is None and metrics[-1]["seconds_left"] == 0
    assert 0.2 < metrics[0]["peak_memory_gb"] <= metrics[-1]["peak_memory_gb"] < 5
    assert sorted(folder.name for folder in run.glob("step-*")) == ["step-00000010", "step-00000020"]
    assert "trains   projector" in printed and ">>" in printed and "20/20" in printed
    assert f"next     python generate.py --ckpt {run}" in printed
    paths = ("run ", "curves ", "next ")                    # they are as long as they are
    assert max(len(line) for line in printed.splitlines() if not line.startswith(paths)) <= 100, printed
    assert (run / "curves.png").exists()


def assert_same_curve(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)      # fp32 sums in another order
        for name in ("tokens", "modality", "lr"):
            assert ours[name] == theirs[name]


SAVE_ALL = ["--save_every", "1", "--keep", "20"]


@pytest.mark.parametrize("ranks,size,more", [(2, "1", ["--gradient_checkpointing", *SAVE_ALL]), (4, "2", [])])
def test_the_loss_curve_does_not_depend_on_how_the_batch_is_cut(world, one_rank, tmp_path, ranks, size, more):
    """one_rank is 1 rank x 2 micro-batches; here are 2 x 4, with recomputed activations, and 4 x 1. The two
    ranks are started exactly as users do it."""
    metrics, run, _ = run_train(world, tmp_path, "--max_steps", "20", "--per_device_batch_size", size, *more,
                                ranks=ranks, fresh=ranks == 2)
    assert_same_curve(metrics, one_rank[0])
    assert_same_up_to_rounding(weights(run), weights(one_rank[1]))
    if more:
        assert_text_only_steps_leave_the_projector_alone(run, metrics)


def assert_text_only_steps_leave_the_projector_alone(run, metrics):
    """Its weights and its Adam state, bit for bit, from each step to the next."""
    before, kinds = None, set()
    for folder, line in zip(checkpoint.step_folders(run), metrics, strict=True):
        tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
        now = {name: tensor for name, tensor in tensors.items() if "projector." in name}
        assert len(now) == 16                           # 4 parameters, each with 2 moments and a step count
        if before:
            kinds.add(line["modality"])
            assert all(torch.equal(now[name], before[name]) for name in now) == (line["modality"] == "text")
        before = now
    assert kinds == {"text", "image"}


def test_the_curve_of_a_mean_of_means_would_be_caught(world, one_rank, tmp_path, monkeypatch):
    def mean_of_means(model, optimizer, scaler, micro_batches, tokens, *others):
        def forward(input_ids, labels, *others):
            loss, predicted = model(input_ids, labels, *others)
            own = (labels[:, 1:] != IGNORE).sum()
            return loss / own * tokens / len(micro_batches), predicted      # `exact` divides by tokens
        forward.no_sync, forward.parameters = model.no_sync, model.parameters
        return exact(forward, optimizer, scaler, micro_batches, tokens, *others)

    exact = train.train_step
    monkeypatch.setattr(train, "train_step", mean_of_means)
    metrics, run = train_here(monkeypatch, world, tmp_path, "--max_steps", "20")
    with pytest.raises(AssertionError):
        assert_same_curve(metrics, one_rank[0])
    with pytest.raises(AssertionError):
        assert_same_up_to_rounding(weights(run), weights(one_rank[1]))


def test_text_only_training_works_on_two_ranks_and_leaves_the_projector_alone(world, tmp_path):
    rows = [row for row in json.loads((world / "finetune.json").read_text()) if "image" not in row]
    (world / "text.json").write_text(json.dumps(rows))
    _, run, _ = run_train(world, tmp_path, "--train_json", str(world / "text.json"), "--max_steps", "3",
                          "--save_every", "1", "--keep", "5", ranks=2)
    first, last = (load_file(run / f"step-0000000{i}" / "model.safetensors") for i in (1, 3))
    for name in first:
        assert torch.equal(first[name], last[name]) == name.startswith("projector"), name
    assert not any("projector" in name for name in load_file(run / "step-00000003" / "optimizer.safetensors"))


def lost_after_15_steps(run, root):
    """A copy of the run as if it had been killed while it logged step 16: checkpoint 10 is the last."""
    shutil.copytree(run, root / "r")
    shutil.rmtree(root / "r" / "step-00000020")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "r" / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:20])
    return root / "r" / "step-00000010"


def exactly(metrics):
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in metrics]


def assert_bit_for_bit(got, want):
    assert exactly(got[0]) == exactly(want[0])
    ours, theirs = weights(got[1]), weights(want[1])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_lost_run_continues_bit_for_bit(world, one_rank, tmp_path, monkeypatch):
    lost_after_15_steps(one_rank[1], tmp_path)
    assert_bit_for_bit(train_here(monkeypatch, world, tmp_path, *SHORT), one_rank)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_damaged_checkpoint_is_named_and_not_used(name, world, one_rank, tmp_path, monkeypatch, capsys):
    shutil.copytree(one_rank[1], tmp_path / "r")
    file = tmp_path / "r" / "step-00000020" / name
    file.write_bytes(file.read_bytes()[:-10])
    assert_bit_for_bit(train_here(monkeypatch, world, tmp_path, *SHORT), one_rank)
    assert f"{file.parent} is damaged and left aside ({name}: " in capsys.readouterr().err
    assert (tmp_path / "r" / "set-aside-step-00000020").exists()


def test_a_bad_example_found_late_saves_first_and_can_be_mended(world, one_rank, tmp_path, monkeypatch):
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)

    def break_them_after_step_3(loss, norm, step, *_):
        for file in images.glob("*.png") if step == 3 else ():
            file.write_bytes(b"no picture")
        return False

    flags = (*SHORT, "--image_dir", str(images))
    with monkeypatch.context() as patch, pytest.raises(BadExample, match=r"finetune.json\[.*can't be read"):
        patch.setattr(train, "stop_unless_finite", break_them_after_step_3)
        train_here(monkeypatch, world, tmp_path, *flags)
    newest = checkpoint.newest(tmp_path / "r")
    assert checkpoint.read_state(newest)["step"] == len(metrics_of(tmp_path / "r")) >= 3
    shutil.copytree(world / "images", images, dirs_exist_ok=True)
    assert_bit_for_bit(train_here(monkeypatch, world, tmp_path, *flags), one_rank)


def test_a_disk_that_is_full_between_two_checkpoints_is_explained(world, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(train, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError) as e:
        train_here(monkeypatch, world, tmp_path, "--max_steps", "1")
    said = "a file can't be read or written ([Errno 28] No space left on device: 'metrics.jsonl')"
    assert errors.explain(e.value)[0].startswith(said)


def test_a_run_that_continues_without_its_optimizer_would_be_caught(world, one_rank, tmp_path, monkeypatch):
    """As Prismatic and LLaVA do: the weights alone."""
    def random_states_only(model, optimizer, folder):
        tensors = load_file(folder / "optimizer.safetensors")
        return {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("random.")}

    lost_after_15_steps(one_rank[1], tmp_path)
    monkeypatch.setattr(checkpoint, "load_optimizer", random_states_only)
    again, _ = train_here(monkeypatch, world, tmp_path, *SHORT)
    assert exactly(again)[:11] == exactly(one_rank[0])[:11]     # the loss of step 11 is before its update
    with pytest.raises(AssertionError):
        assert_same_curve(again, one_rank[0])


def test_a_finished_run_says_so_and_a_changed_flag_is_named(world, one_rank, tmp_path, monkeypatch, capsys):
    shutil.copytree(one_rank[1], tmp_path / "r")
    train_here(monkeypatch, world, tmp_path, *SHORT)
    assert "this run is finished, all 20 steps are done" in capsys.readouterr().out
    with pytest.raises(config.UserError) as e:
        train_here(monkeypatch, world, tmp_path, *SHORT, "--learning_rate", "0.5", "--max_length", "99")
    said = "holds a run with other flags: --max_length was 512, is 99; --learning_rate was 0.0005, is 0.5. "
    assert said in str(e.value)


def test_a_run_that_fewer_examples_make_shorter_says_so(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world, tmp_path / "w")
    flags = ("--epochs", "2", "--max_steps", "0", "--save_every", "5", "--keep", "9")
    _, run = train_here(monkeypatch, tmp_path / "w", tmp_path, *flags)
    for step in run.glob("step-*"):
        if step.name != "step-00000005":
            shutil.rmtree(step)
    data = tmp_path / "w/finetune.json"
    data.write_text(json.dumps(json.loads(data.read_text())[::2]))
    capsys.readouterr()
    lines, _ = train_here(monkeypatch, tmp_path / "w", tmp_path, *flags)
    said = " ".join(capsys.readouterr().out.split())
    assert "shorter from 18 to 10 steps: the data has fewer examples" in said
    assert (lines[-1]["step"], lines[-1]["total"]) == (10, 10)


TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}In: {{ m['content'] }}\nOut:"
            "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")


def test_a_run_does_not_go_on_in_another_prompt_format(world, tmp_path, monkeypatch):
    """As when a model's makers change the template of their tokenizer between two starts."""
    llm = tmp_path / "llm"
    shutil.copytree(ROOT / "toy/llm", llm)
    (llm / "chat_template.jinja").write_text(TEMPLATE)
    flags = ("--llm_backbone", str(llm), "--vision_backbone", str(ROOT / "toy/vit"))
    train_here(monkeypatch, world, tmp_path, "--max_steps", "1", *flags)
    (llm / "chat_template.jinja").write_text(TEMPLATE.replace("In: ", "Question: "))
    with pytest.raises(config.UserError, match=r"'In: '.* gives .*'Question: '.* Was the template changed"):
        train_here(monkeypatch, world, tmp_path, "--max_steps", "2", *flags)
    assert config.read_config(tmp_path / "r").max_steps == 1            # nothing was written


CONSTANT = ("--schedule", "constant", "--warmup_ratio", "0")


@pytest.mark.parametrize("schedule", [CONSTANT, ()])
def test_a_finished_run_can_be_extended(schedule, world, tmp_path, monkeypatch, capsys):
    """A constant rate exactly as if it had been so from the start, over the end of an epoch of 12 steps; a
    cosine from where the new schedule has it."""
    whole = train_here(monkeypatch, world, tmp_path / "whole", "--max_steps", "16", *schedule)
    train_here(monkeypatch, world, tmp_path, "--max_steps", "6", *schedule)
    capsys.readouterr()
    got = train_here(monkeypatch, world, tmp_path, "--max_steps", "16", *schedule)
    said = " ".join(capsys.readouterr().out.split())
    assert "extended from 6 to 16 steps, 6 are done; the learning rate goes on at " in said
    assert [(line["start"], line["total"]) for line in got[0]] == [(0, 6)] * 6 + [(6, 16)] * 10
    assert [line["lr"] for line in got[0]][6:] == [line["lr"] for line in whole[0]][6:]
    if schedule:
        assert "at 0.0005, where the constant schedule of 16 steps has it" in said
        assert_bit_for_bit(got, whole)
    else:
        assert got[0][5]["lr"] < 1e-4 < 3e-4 < got[0][6]["lr"] and exactly(got[0]) != exactly(whole[0])
    train_here(monkeypatch, world, tmp_path, "--max_steps", "16", *schedule)    # finished: it is one run now
    assert "this run is finished, all 16 steps are done" in capsys.readouterr().out


def test_starting_from_a_run_and_continuing_it_can_not_be_confused(world, one_rank, tmp_path, monkeypatch):
    shutil.copytree(one_rank[1], tmp_path / "r")
    for ckpt in (tmp_path / "r", tmp_path / "r" / "step-00000010"):     # weights of itself
        said = f"--ckpt {ckpt} is the folder of this run. To continue it, leave --ckpt"
        with pytest.raises(config.UserError, match=said):
            train_here(monkeypatch, world, tmp_path, *SHORT, "--ckpt", str(ckpt))
        with pytest.raises(config.UserError, match="is the folder of this run"):
            train_here(monkeypatch, world, tmp_path, *SHORT, "--ckpt", str(ckpt), "--overwrite")
    with pytest.raises(config.UserError, match="--ckpt was '', is .*one.*; --no_align was True, is False"):
        train_here(monkeypatch, world, tmp_path, *SHORT, "--ckpt", str(one_rank[1]))    # of another run
    assert len(list((tmp_path / "r").glob("step-*"))) == 2 and len(metrics_of(tmp_path / "r")) == 20
    # A new run takes the weights only: its first step is step 1, its optimizer is fresh.
    metrics, run = train_here(monkeypatch, world, tmp_path / "new", "--ckpt", str(one_rank[1]),
                              "--max_steps", "1", "--learning_rate", "0")
    assert [line["step"] for line in metrics] == [1]
    assert load_file(run / "step-00000001" / "optimizer.safetensors")["step.projector.0.bias"] == 1
    assert all(torch.equal(tensor, weights(one_rank[1])[name]) for name, tensor in weights(run).items())


def test_align_trains_and_saves_the_projector_only_and_finetune_starts_from_it(world, tmp_path, monkeypatch):
    _, run, printed = run_train(world, tmp_path / "a", "--max_steps", "4", stage="align")
    assert {name.split(".")[0] for name in weights(run)} == {"projector"}
    assert f"next     torchrun train.py --stage finetune --ckpt {run}" in printed
    _, tuned = train_here(monkeypatch, world, tmp_path / "f", "--ckpt", str(run), "--max_steps", "2",
                          "--learning_rate", "0")
    assert {name.split(".")[0] for name in weights(tuned)} == {"projector", "llm"}
    for name, tensor in weights(run).items():
        assert torch.equal(weights(tuned)[name], tensor), name


def test_full_finetune_starts_from_a_fresh_projector_too(world, tmp_path, monkeypatch):
    _, run = train_here(monkeypatch, world, tmp_path, "--no_align", "--max_steps", "1", stage="full-finetune")
    assert {name.split(".")[0] for name in weights(run)} == {"vision", "projector", "llm"}


@pytest.mark.parametrize("stage, flags, said", [
    ("finetune", ("--prompt", "vicuna"), True), ("finetune", (), False),
    ("align", ("--prompt", "vicuna"), False)])              # a caption stands behind no prompt
def test_another_prompt_than_that_of_the_checkpoint_is_said(stage, flags, said, world, one_rank, tmp_path,
                                                            monkeypatch, capsys):
    base = one_rank[1]
    if stage == "align":
        _, base = train_here(monkeypatch, world, tmp_path / "a", "--max_steps", "1", stage="align")
    train_here(monkeypatch, world, tmp_path / "f", "--ckpt", str(base), "--max_steps", "1", *flags)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("changed: the checkpoint was trained with 'In: ' QUESTION '\\nOut: ' REPLY '</s>', and has to "
            "learn another one now" in printed) == said


def test_a_bad_example_stops_all_ranks_with_its_name(world, tmp_path):
    rows = json.loads((world / "finetune.json").read_text())
    picture = next(row for row in rows if "image" in row)
    picture["image"] = "nowhere.png" if isinstance(picture["image"], str) else ["nowhere.png"] * 2
    (world / "broken.json").write_text(json.dumps(rows))
    began = time.time()
    metrics, run, printed = run_train(world, tmp_path, "--train_json", str(world / "broken.json"),
                                      "--max_steps", "20", ranks=2, ok=False)
    assert time.time() - began < 60                         # its start included
    newest = checkpoint.newest(run)
    assert (checkpoint.read_state(newest)["step"] if newest else 0) == len(metrics)
    assert f"id='{picture['id']}': picture {world / 'images' / 'nowhere.png'} does not exist" in printed
    assert "Original Traceback" not in printed
    shown = [line for line in printed.splitlines() if line.strip("= ")]
    assert "traceback : error (rank " in shown[-1] and f"id='{picture['id']}'" in shown[-1], printed


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)])
def test_a_loss_or_a_norm_that_is_not_finite_names_the_step_and_the_examples(loss, norm):
    batches = [{"ids": ["a", "b"]}, {"ids": ["c"]}]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        said = (f"^step 7: loss {loss}, gradient norm {norm}. The update was not made, checkpoints are "
                "intact. rank 0 had the examples a, b, c. Look at them")
        with pytest.raises(config.UserError, match=said):
            train.stop_unless_finite(loss, norm, 7, batches, NO_SCALER)
        assert train.stop_unless_finite(1.0, 1.0, 7, batches, NO_SCALER) is False
    finally:
        dist.destroy_process_group()


READER_DIED = "a process that reads data was killed from outside, most often because memory ran out "
ENDS = {        # error: how its explanation begins, whether it is an echo
    "DataLoader worker (pid(s) 7) exited": (
        RuntimeError, READER_DIED + "(DataLoader worker (pid(s) 7)", False),
    "": (EOFError, READER_DIED + "(EOFError()). Lower --num_workers", False),
    "Connection reset by peer": (
        ConnectionResetError, READER_DIED + "(Connection reset by peer). Lower", False),
    "gloo: Connection closed by peer": (RuntimeError, "gloo: Connection closed by peer", True),
    "another rank met a bad example": (ranks.OtherRank, "another rank met a bad example", True),
    "one sentence": (config.UserError, "one sentence", False),
    "turn 0 is 'Connection reset by peer'": (config.BadExample, "turn 0 is 'Connection reset", False),
    "turn 0 is 'DataLoader worker (pid 7'": (config.BadExample, "turn 0 is 'DataLoader worker", False),
    "out of memory": (MemoryError, "memory ran out (out of memory). Halve --per_device_batch_size", False),
    "a bug": (RuntimeError, "this is a bug of this program (RuntimeError: a bug). Please report it ", False)}


@pytest.mark.parametrize("said", ENDS)
def test_an_error_is_explained(said):
    kind, begins, echo = ENDS[said]
    error = kind(said) if said else kind()
    text, is_echo = errors.explain(error)
    assert text.startswith(begins) and is_echo == echo


@pytest.mark.parametrize("number", errors.DISK)
def test_a_disk_that_refuses_is_explained(number):
    text, echo = errors.explain(OSError(number, os.strerror(number), "r/metrics.jsonl"))
    assert text.startswith(f"a file can't be read or written ([Errno {number}] ") and not echo
    assert "r/metrics.jsonl" in text and errors.DISK[number] in text


def test_the_traceback_of_a_bug_lies_in_the_file_that_is_named():
    try:
        raise RuntimeError("cosmic ray")
    except RuntimeError as e:
        sentence = errors.explain(e)[0]
    file = Path(sentence.rsplit(" ", 1)[1])
    assert 'raise RuntimeError("cosmic ray")' in file.read_text()
    file.unlink()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = SimpleNamespace(learning_rate=2.0, warmup_ratio=0.03, schedule="cosine")
    rates = [train.learning_rate(step, 102, cfg) for step in range(103)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])        # 3 % of 102 steps: 4, rounded up
    assert rates[53] == pytest.approx(1.0)                              # half-way between step 4 and step 102
    assert rates[102] == pytest.approx(0.0) and rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    cfg.schedule = "constant"
    assert [train.learning_rate(step, 102, cfg) for step in (3, 50, 101)] == [2.0] * 3
    cfg.warmup_ratio = 0
    assert train.learning_rate(0, 102, cfg) == 2.0


def test_gradients_are_sent_once_a_step():
    """no_sync around all micro-batches but the last. Without it the result is the same, but each is sent."""
    class Model(torch.nn.Linear):
        quiet, calls = False, []

        @contextmanager
        def no_sync(self):
            self.quiet = True
            yield
            self.quiet = False

        def forward(self, input_ids, labels, pixel_values, places):
            self.calls.append(self.quiet)
            return super().forward(torch.ones(1, 1)).sum(), torch.zeros(1)

    nothing = torch.zeros(1, 2)
    batch = {"input_ids": nothing, "labels": nothing, "pixel_values": [], "places": (nothing, nothing)}
    model, cfg = Model(1, 1), SimpleNamespace(precision="fp32", max_grad_norm=1.0, shard="no")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train.train_step(model, torch.optim.SGD(model.parameters(), 0.1, fused=True), NO_SCALER,
                         [batch] * 3, 3, cfg, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert model.calls == [True, True, False]


def test_the_next_batch_is_read_and_counted_while_the_gpu_works(world, tmp_path, monkeypatch):
    """Between the moment when a step is queued and the moment when its results are waited for."""
    calls, options = [], {}
    for name in ("count_together", "train_step", "look"):
        def noted(*args, name=name, inner=getattr(train, name)):
            calls.append(name)
            return inner(*args)
        monkeypatch.setattr(train, name, noted)
    alone = ranks.alone
    monkeypatch.setattr(ranks, "alone", lambda model, **kwargs: options.update(kwargs) or alone(model))
    train_here(monkeypatch, world, tmp_path, "--max_steps", "3")
    assert calls == ["count_together", *["train_step", "count_together", "look"] * 2, "train_step", "look"]
    assert options["forward_sync_buffers"] is False and options["gradient_as_bucket_view"] is True


@pytest.mark.parametrize("device, precision, want", [
    ("cpu", "auto", torch.float32), ("cpu", "bf16", torch.float32), ("cuda", "bf16", torch.bfloat16),
    ("cuda", "fp16", torch.float16), ("cuda", "fp32", torch.float32), ("mps", "auto", torch.float32)])
def test_frozen_parts_are_kept_in_the_type_that_the_card_computes_in(device, precision, want, monkeypatch):
    """On a CPU in fp32: it computes in that, or rounds what it is given."""
    cfg = config.Config(no_align=False, train_json="a", image_dir="b", precision=precision)
    monkeypatch.chdir(ROOT)
    sampler = SimpleNamespace(lengths=torch.tensor([9]), has_image=torch.tensor([True]))
    with world_of_one():
        model = train.prepare(cfg, None, (), {"projector"}, None, sampler, torch.device(device))
    assert {parameter.dtype for parameter in model.llm.parameters()} == {want}
    assert {parameter.dtype for parameter in model.vision.parameters()} == {want}
    assert {parameter.dtype for parameter in model.projector.parameters()} == {torch.float32}       # trains


def test_a_part_that_the_checkpoint_brings_is_not_rounded_though_it_is_frozen_now(monkeypatch):
    """It would be saved so: the next stage that trains it would start from rounded weights."""
    cfg = config.Config(no_align=False, train_json="a", image_dir="b", precision="bf16")
    monkeypatch.chdir(ROOT)
    sampler = SimpleNamespace(lengths=torch.tensor([9]), has_image=torch.tensor([True]))
    with world_of_one():
        model = train.prepare(cfg, None, ["projector", "llm"], {"projector"}, None, sampler,
                              torch.device("cuda"))
    assert {parameter.dtype for parameter in model.llm.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.llm.parameters())


@pytest.mark.parametrize("found, local_rank, want", [
    ("cuda", "3", torch.device("cuda", 3)), ("mps", "", torch.device("mps", 0)),
    ("xpu", "1", torch.device("xpu", 1)), (None, "2", torch.device("cpu"))])
def test_the_device_is_what_torch_calls_the_accelerator(found, local_rank, want, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: found and torch.device(found))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank) if local_rank else monkeypatch.delenv("LOCAL_RANK", False)
    assert ranks.find_device() == want
    assert chosen == ([] if found is None else [want.index])


SPOILS = """
import hashlib, os, sys
sys.path.insert(0, os.getcwd())
import torch, torch.distributed as dist
import config, model, ranks, train
forward, step, calls, digests = model.VLM.forward, train.train_step, [], sys.argv.pop()
where, scale = sys.argv.pop(), 2.0 ** 12

def digest(optimizer):
    state = hashlib.sha256()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for tensor in (parameter, *optimizer.state[parameter].values()):
                state.update(tensor.detach().numpy().tobytes())
    return state.hexdigest()

def spoiled(self, *args):
    loss, predicted = forward(self, *args)
    calls.append(1)
    if len(calls) == 3 and dist.get_rank() == 1:
        if where == "loss":
            loss = loss + float("inf")                      # its gradient is finite
        else:
            loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss, predicted

def watched(ddp, optimizer, *rest):
    before = digest(optimizer) if calls else ""
    queued = step(ddp, optimizer, *rest)
    with open(f"{digests}{dist.get_rank()}", "a") as file:
        file.write(f"{before} {digest(optimizer)}\\n")
    return queued

model.VLM.forward, train.train_step = spoiled, watched
scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda *args, **kwargs: scaler(*args, init_scale=scale, **kwargs)
ranks.run(train.main, config.parse(config.Config))
"""


def spoiled_run(world, root, where, *flags, ok):
    """One of two ranks meets a number that is not finite in its third step -> metrics, what was printed, and,
    of each rank, (state before, state after) each step: weights, moments, counts of steps."""
    root.mkdir(exist_ok=True)
    (root / "spoils.py").write_text(SPOILS)
    command = train_command(world, root, "--max_steps", "5", *flags, ranks=2)
    command[command.index(str(ROOT / "train.py"))] = str(root / "spoils.py")
    done = forked.run([*command, where, str(root / "digests")])
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return metrics_of(root / "r"), done.stdout + done.stderr, [
        [line.split(" ") for line in (root / f"digests{rank}").read_text().splitlines()] for rank in (0, 1)]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_on_one_of_two_ranks_changes_nothing_on_both(world, tmp_path, where):
    """The update was queued before anybody looked."""
    metrics, printed, states = spoiled_run(world, tmp_path, where, ok=False)
    assert len(metrics) == 2 and "step 3: loss" in printed and "The update was not made" in printed
    for mine, other in zip(*states, strict=True):
        assert mine[1] == other[1]
    (_, one), (_, two), (before, after) = states[0]
    assert before == after == two != one


def test_an_overflow_on_one_of_two_ranks_skips_the_step_on_both_and_is_no_error(world, tmp_path):
    metrics, _, states = spoiled_run(world, tmp_path, "gradient", "--precision", "fp16", ok=True)
    assert [line["skipped"] for line in metrics] == [0, 0, 1, 0, 0]
    assert [line["grad_norm"] is None for line in metrics] == [False, False, True, False, False]
    for mine, other in zip(*states, strict=True):
        assert mine[1] == other[1]
    assert [before == after for before, after in states[0]] == [False, False, True, False, False]
    state = json.loads((tmp_path / "r" / "step-00000005" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** 11 and state["scaler"]["_growth_tracker"] == 2


def test_in_fp16_a_loss_that_is_not_finite_stops_the_run_before_the_update(world, tmp_path):
    """The scale can't help there. Its gradient is finite: GradScaler alone would make the update."""
    metrics, printed, states = spoiled_run(world, tmp_path, "loss", "--precision", "fp16", ok=False)
    assert len(metrics) == 2 and "step 3: loss inf" in printed and "The update was not made" in printed
    assert states[0][2][0] == states[0][2][1] == states[1][2][1]


FP16 = ("--precision", "fp16", "--max_steps", "12", "--save_every", "6")


def test_in_fp16_a_lost_run_continues_with_its_scale_bit_for_bit(world, tmp_path, monkeypatch):
    """The scale begins too high, so that steps are skipped, and grows every third step."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *args, **how: scaler(*args, init_scale=2.0 ** 19, growth_interval=3, **how))
    whole, run = train_here(monkeypatch, world, tmp_path, *FP16)
    assert whole[0]["skipped"] == 1 and 1 < sum(line["skipped"] for line in whole) < 6
    want, state = weights(run), checkpoint.read_state(run / "step-00000012")
    for kept in (True, False):
        shutil.rmtree(run / "step-00000012")
        with monkeypatch.context() as patch:
            if not kept:                                    # it would be caught
                patch.setattr(scaler, "load_state_dict", lambda self, state: None)
            again, _ = train_here(patch, world, tmp_path, *FP16)
        assert (exactly(again) == exactly(whole)) == kept
        if kept:
            assert [line["skipped"] for line in again] == [line["skipped"] for line in whole]
            assert checkpoint.read_state(run / "step-00000012")["scaler"] == state["scaler"]
            assert all(torch.equal(weights(run)[name], want[name]) for name in want)


def test_a_gradient_that_is_not_finite_without_scaling_either_is_an_error():
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with world_of_one():
        assert train.stop_unless_finite(1.0, math.inf, 7, [{"ids": ["a"]}], scaler) is True
        scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
        for loss, norm in ((1.0, math.inf), (math.nan, math.nan)):
            with pytest.raises(config.UserError, match="step 7: loss .* The update was not made"):
                train.stop_unless_finite(loss, norm, 7, [{"ids": ["a"]}], scaler)
        with pytest.raises(config.UserError, match="step 7: loss nan"):
            train.stop_unless_finite(math.nan, math.nan, 7, [{"ids": ["a"]}],
                                     torch.amp.GradScaler("cpu", init_scale=1.0))


def test_each_rank_drops_other_activations(world, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = config.Config(stage="finetune", no_align=True, train_json="a", image_dir="b", seed=7)
    sampler = SimpleNamespace(lengths=torch.tensor([9]), has_image=torch.tensor([True]))
    seeds = []
    for rank in (0, 1, 5):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        train.load_model(cfg, None, sampler, torch.device("cpu"))
        seeds.append(torch.initial_seed())
    assert seeds == [7, 8, 12]


def test_python_train_py_is_a_world_of_one(world, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--train_json", str(world / "align.json"),
                           "--image_dir", str(world / "images"), "--val_json", str(world / "val_align.json"),
                           "--run_root", str(tmp_path), "--max_steps", "2"],
                          cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "toy-align-x7"
    scores = json.loads((run / "val.json").read_text())
    assert scores["count"] == 1 and scores["by_type"]["caption"]["count"] == 1
    assert (run / "val.png").exists()


def test_generate_answers_from_the_command_line(world, one_rank, capsys):
    a, b = (str(world / "images" / f"test_0000{i}.png") for i in (1, 2))
    flags = ["--ckpt", str(one_rank[1]), "--prompt", "How many?", "--max_new_tokens", "3"]
    for images in ([], ["--image", a], ["--image", a, b], ["--image", a, "--image", b]):
        generate.main(config.parse(generate.GenerateConfig, [*flags, *images]))
        assert capsys.readouterr().out.strip(), images
    done = forked.run([sys.executable, "generate.py", *flags, "--image", a])
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_profile_writes_a_trace_and_parts_that_add_up(world, tmp_path):
    _, run, printed = run_train(world, tmp_path, "--max_steps", "5", "--profile", "2")
    names = {event.get("name") for event in json.loads((run / "trace.json").read_text())["traceEvents"]}
    assert {"data wait", "vision", "projector", "LLM forward", "backward", "optimizer"} <= names
    table = {name: float(share) for share, name in re.findall(r"^ *([\d.]+)%  (.+)$", printed, re.MULTILINE)}
    assert table.pop("all-reduce, while the others run") >= 0
    assert sum(table.values()) == pytest.approx(100, abs=0.5) and min(table.values()) >= 0, table


def test_help_is_there_without_torch():
    code = ("import sys; sys.argv = ['train.py', '--help']\nimport config\n"
            "try: config.parse(config.Config)\nexcept SystemExit: pass\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--gradient_checkpointing" in done.stdout, done.stderr
