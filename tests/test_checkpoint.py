"""checkpoint.py: a step folder is there whole or not at all, wherever a kill falls; loading is strict."""
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from config import UserError
from model import VLM, make_projector


def projector(width=16, kind="linear"):
    torch.manual_seed(0)
    return VLM(nn.Identity(), make_projector(kind, 8, width), nn.Identity())


def save(run, step, keep=1, **state):
    weights = checkpoint.tensors_of(projector(), ["projector"])
    state |= {"parts": ["projector"]}
    return checkpoint.save(run, step, weights, {"random.0": torch.zeros(3)}, state, keep)


# ---- killed while it saves ----

def killed_at(line, function):
    """Runs it in a child that ends, as after SIGKILL, before the given line of checkpoint.py or of what
    removes folders. -> was it stopped?"""
    left = [line]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (checkpoint.__file__, shutil.__file__):
            return None
        left[0] -= event == "line"
        if left[0] < 0:
            os._exit(9)
        return trace

    child = os.fork()
    if child == 0:
        try:
            sys.settrace(trace)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_killed_at_any_line_of_saving_the_old_or_the_new_one_is_whole(tmp_path, monkeypatch, request):
    """At every third line (with --kills 100, each) that runs while step 2 is saved, step 1 removed, and the
    rest of an older kill tidied up."""
    stride = 1 if request.config.getoption("--kills") >= 100 else 3
    monkeypatch.setattr(os, "fsync", lambda _: None)        # slow, and only a power cut would show it
    line, seen, run = 0, set(), tmp_path / "r"
    while True:
        save(run, 1)
        (run / "unfinished-00000007").mkdir()
        if not killed_at(line, lambda: save(run, 2)):
            break
        newest, damaged = checkpoint.newest(run)
        assert newest and not damaged, f"killed at line {line}: {damaged}"
        seen.add(checkpoint.read_state(newest)["step"])
        assert load_file(newest / "model.safetensors").keys() == {"projector.0.weight", "projector.0.bias"}
        save(run, 2)                                        # the run continues, and leaves nothing behind
        assert os.listdir(run) == ["step-00000002"]
        shutil.rmtree(run)
        line += stride
    assert line > 100 and seen == {1, 2}


def test_saving_in_place_would_be_caught(tmp_path):
    """The same check, with files written under the final name."""
    def in_place():
        (tmp_path / "step-00000002").mkdir()
        save_file({"a": torch.zeros(3)}, tmp_path / "step-00000002" / "model.safetensors")
        checkpoint.write_text(tmp_path / "step-00000002" / "state.json", '{"step": 2}')

    save(tmp_path, 1)
    assert killed_at(2, in_place)
    assert checkpoint.newest(tmp_path)[1]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    def flushed(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path, to):
        done.append(f"-> {to.name}")
        return rename(path, to)

    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "r", 3)
    assert done == ["state.unfinished", "model.safetensors", "optimizer.safetensors", "state.json",
                    "unfinished-00000003", "-> step-00000003", "r"]


# ---- which ones stay ----

def names(run):
    return [folder.name for folder in checkpoint.step_folders(run)]


def test_the_newest_stay_and_those_for_ever(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep=2, forever=step == 3)
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]


def test_steps_are_ordered_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):                  # one digit more than the names are padded to
        save(tmp_path, step, keep=2)
    assert checkpoint.newest(tmp_path)[0].name == "step-100000000"


def test_a_damaged_one_does_not_push_a_whole_one_out(tmp_path):
    for step in (4, 8, 12):
        save(tmp_path, step, keep=9)
    for step in (8, 12):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    save(tmp_path, 6, keep=1)                               # the run went on from step 4
    assert checkpoint.newest(tmp_path)[0].name == "step-00000006"
    assert names(tmp_path) == ["step-00000006", "step-00000008", "step-00000012"]


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "a folder"])
def test_a_folder_that_is_not_whole_is_named_and_the_one_before_is_used(name, how, tmp_path):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    file = tmp_path / "step-00000002" / name
    whole = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(whole[:-1] if how == "cut" else b"")
    newest, (sentence,) = checkpoint.newest(tmp_path)
    assert newest.name == "step-00000001"
    assert sentence.startswith(f"{tmp_path / 'step-00000002'} is damaged and left aside ({name}: ")
    with pytest.raises(UserError, match=f"step-00000002 is damaged .{name}"):
        checkpoint.find(tmp_path / "step-00000002")
    assert checkpoint.find(tmp_path) == newest


# ---- strict loading ----

SAVED = checkpoint.tensors_of(projector(kind="gelu-mlp"), ["projector"])
BIAS = SAVED["projector.2.bias"]
STRICT = {      # kind: (what the file holds, what the sentence says)
    "one missing": ({name: tensor for name, tensor in SAVED.items() if name != "projector.2.bias"},
                    ": missing projector.2.bias. Use"),
    "one too many": (SAVED | {"projector.4.bias": BIAS.clone()}, ": surplus projector.4.bias. Use"),
    "one of no part": (SAVED | {"critic.bias": BIAS.clone()}, ": surplus critic.bias. Use"),
    "another shape": (SAVED | {"projector.2.bias": BIAS[:5]},
                      ": projector.2.bias is (5,), the model has (16,). Use"),
    "turned": (SAVED | {"projector.0.weight": SAVED["projector.0.weight"].T.contiguous()},
               ": projector.0.weight is (8, 16), the model has (16, 8). Use"),
    "whole numbers": (SAVED | {"projector.2.bias": BIAS.to(torch.int8)},
                      ": projector.2.bias is of type torch.int8. Use"),
    "a part that the state promises": ({}, ": missing projector.0.weight; missing projector.0.bias; missing"),
    "many": ({f"projector.{i}.bias": BIAS.clone() for i in range(5, 14)} | SAVED,
             ": surplus projector.10.bias; surplus projector.11.bias; surplus projector.12.bias; "
             "surplus projector.13.bias; surplus projector.5.bias; and 4 more. Use"),
}


def folder_with(folder, weights, optimizer=()):
    return checkpoint.save(folder, 1, weights, dict(optimizer), {"parts": ["projector"]}, keep=1)


@pytest.mark.parametrize("kind", STRICT)
def test_a_tensor_that_does_not_fit_is_listed_by_name(kind, tmp_path):
    weights, said = STRICT[kind]
    model = projector(kind="gelu-mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = re.escape(f"model.safetensors is the checkpoint of another model{said}")
    with pytest.raises(UserError, match=said):
        checkpoint.load_weights(model, folder_with(tmp_path, weights))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "half of it was loaded"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_another_width_are_read_as_the_model_has_them(dtype, tmp_path):
    model = projector(kind="gelu-mlp")
    with torch.no_grad():
        model.projector[2].bias.fill_(7)
    checkpoint.load_weights(model, folder_with(tmp_path, {name: t.to(dtype) for name, t in SAVED.items()}))
    assert model.projector[2].bias.dtype == torch.float32
    assert torch.equal(model.projector[2].bias, BIAS.to(dtype).float())


@pytest.mark.parametrize("name, tensor, said", [
    ("exp_avg.projector.9.bias", BIAS, "exp_avg.projector.9.bias (16,) has no such parameter"),
    ("exp_avg.projector.2.bias", BIAS[:5], "exp_avg.projector.2.bias (5,) has no such parameter")])
def test_an_optimizer_of_another_model_is_named(name, tensor, said, tmp_path):
    model, folder = projector(kind="gelu-mlp"), folder_with(tmp_path, SAVED, {name: tensor})
    with pytest.raises(UserError, match=re.escape(said)):
        checkpoint.load_optimizer(model, torch.optim.AdamW(model.parameters()), folder)


def test_the_optimizer_comes_back_as_it_was(tmp_path):
    model = projector()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        model.projector(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    saved = checkpoint.optimizer_tensors(model, optimizer) | {"random.1": torch.arange(3)}
    folder, other = folder_with(tmp_path, checkpoint.tensors_of(model, ["projector"]), saved), projector()
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    assert checkpoint.load_optimizer(other, fresh, folder)["1"].tolist() == [0, 1, 2]
    again = checkpoint.optimizer_tensors(other, fresh)
    assert len(again) == 6 and again["step.projector.0.bias"] == 3      # 2 parameters: step, two moments
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())


def test_nothing_is_pickled():
    """Neither written nor read: a checkpoint from a stranger can't run code."""
    for file in Path(checkpoint.__file__).parent.glob("*.py"):
        assert not re.search(r"torch\.(save|load)\(|import pickle|allow_pickle=True", file.read_text()), file
