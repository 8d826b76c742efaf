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
    run.mkdir(exist_ok=True)
    return checkpoint.save(run, step, weights, {"random.0": torch.zeros(3)}, state, keep)


# ---- killed while it saves ----

def killed_at(line, function):
    """Runs it in a child that ends, as after SIGKILL, before the given line of checkpoint.py
    -> was it stopped?"""
    left = [line]

    def trace(frame, event, _):
        if frame.f_code.co_filename != checkpoint.__file__:
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
        newest = checkpoint.newest(run)
        assert newest == checkpoint.step_folders(run)[-1], f"killed at line {line}"
        seen.add(checkpoint.read_state(newest)["step"])
        assert load_file(newest / "model.safetensors").keys() == {"projector.0.weight", "projector.0.bias"}
        save(run, 3)                                        # the run continues, and leaves nothing behind
        assert os.listdir(run) == ["step-00000003"]
        shutil.rmtree(run)
        line += stride
    assert line > 60 and seen == {1, 2}


def test_saving_in_place_would_be_caught(tmp_path):
    """The same check, with files written under the final name."""
    def in_place():
        (tmp_path / "step-00000002").mkdir()
        save_file({"a": torch.zeros(3)}, tmp_path / "step-00000002" / "model.safetensors")
        checkpoint.write_text(tmp_path / "step-00000002" / "state.json", '{"step": 2}')

    save(tmp_path, 1)
    assert killed_at(2, in_place)
    assert checkpoint.newest(tmp_path) != checkpoint.step_folders(tmp_path)[-1]


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
    assert done == ["model.safetensors", "optimizer.safetensors", "state.unfinished", "unfinished-00000003",
                    "-> step-00000003", "r"]


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
    assert checkpoint.newest(tmp_path).name == "step-100000000"


def test_a_damaged_one_does_not_push_a_whole_one_out(tmp_path):
    for step in (4, 8, 12):
        save(tmp_path, step, keep=9)
    for step in (8, 12):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    save(tmp_path, 6, keep=1)                               # the run went on from step 4
    assert checkpoint.newest(tmp_path).name == "step-00000006"
    assert names(tmp_path) == ["step-00000006", "step-00000008", "step-00000012"]


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "a folder"])
def test_a_folder_that_is_not_whole_is_named_and_the_one_before_is_used(name, how, tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    file = tmp_path / "step-00000002" / name
    whole = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(whole[:-1] if how == "cut" else b"")
    newest = checkpoint.newest(tmp_path)
    assert newest.name == "step-00000001"
    said = f"{tmp_path / 'step-00000002'} is damaged and left aside ({name}: "
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(UserError, match=f"step-00000002 is damaged .{name}"):
        checkpoint.find(tmp_path / "step-00000002")
    assert checkpoint.find(tmp_path) == newest
    assert checkpoint.newest(tmp_path, aside=True) == newest            # as a run that continues does it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set-aside-step-00000002", "step-00000001"]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def tell_of_step(folder, step):
    state = checkpoint.read_state(folder) | {"step": step}
    (folder / "state.json").write_text(checkpoint.json.dumps(state))


CHANGED = {     # what was done to step 2 of a run -> what is said of it
    "a bit of the weights": (lambda run: flip(run / "step-00000002" / "model.safetensors", -1),
                             "model.safetensors: its bytes are not those that were written"),
    "a bit of the optimizer": (lambda run: flip(run / "step-00000002" / "optimizer.safetensors", -1),
                               "optimizer.safetensors: its bytes are not"),
    "weights of another run": (lambda run: save_file({"projector.0.weight": torch.zeros(16, 8)},
                                                     run / "step-00000002" / "model.safetensors"),
                               "model.safetensors: its bytes are not"),
    "the state of another step": (lambda run: tell_of_step(run / "step-00000002", 999),
                                  "state.json: it tells of step 999"),
    "a state that is a list": (lambda run: (run / "step-00000002" / "state.json").write_text("[]"),
                               "state.json: TypeError"),
    "a pipe": (lambda run: ((run / "step-00000002" / "state.json").unlink(),
                            os.mkfifo(run / "step-00000002" / "state.json")),
               "state.json: it is missing, or no file"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_checkpoint_is_checked_whole(kind, tmp_path, capsys):
    change, said = CHANGED[kind]
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    change(tmp_path)
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert said in capsys.readouterr().err


def test_what_can_not_be_read_now_stops_the_start_and_nothing_is_touched(tmp_path, monkeypatch):
    """A network share that stutters once must not cost a run."""
    def stutter(*_, **__):
        raise OSError(5, "Input/output error")

    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="can't be read now .*Nothing was"):
        patch.setattr(Path, "read_text", stutter)
        checkpoint.newest(tmp_path, aside=True)
    assert sorted(tmp_path.rglob("*")) == before and checkpoint.newest(tmp_path).name == "step-00000001"


def test_a_run_without_a_whole_checkpoint_does_not_start_over_by_itself(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001" / "model.safetensors", -1)
    said = "there is no whole step-. folder in it: step-00000001 is damaged.*"
    with pytest.raises(UserError, match=said + "--overwrite starts the run over"):
        checkpoint.newest(tmp_path, aside=True)
    with pytest.raises(UserError, match=said + "Give --ckpt another run"):      # which is not to be replaced
        checkpoint.find(tmp_path)
    assert (tmp_path / "step-00000001").exists()
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_folder_of_an_older_version_has_no_checksums_and_still_loads(tmp_path):
    folder = save(tmp_path, 1)
    state = checkpoint.read_state(folder)
    del state["files"]
    (folder / "state.json").write_text(checkpoint.json.dumps(state))
    assert checkpoint.newest(tmp_path) == folder
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors" in checkpoint.damage(folder)


def test_keep_touches_only_step_folders_that_train_py_wrote(tmp_path):
    run, elsewhere = tmp_path / "r", tmp_path / "elsewhere"
    save(elsewhere, 1)
    run.mkdir()
    (run / "step-00000001").symlink_to(elsewhere / "step-00000001")
    (run / "step-00000002").write_text("a file")
    (run / "step-²").mkdir()
    (run / "unfinished-0007").mkdir()
    (run / "unfinished-0007" / "notes.txt").write_text("the user's")
    for step in (3, 4, 5):
        save(run, step, keep=1)
    assert sorted(path.name for path in run.iterdir()) == [
        "step-00000001", "step-00000002", "step-00000005", "step-²", "unfinished-0007"]
    assert (elsewhere / "step-00000001" / "state.json").exists()
    assert (run / "unfinished-0007" / "notes.txt").exists()


def test_a_step_folder_of_another_run_is_not_taken_for_one_of_this(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(checkpoint.json.dumps({"started": name}))
        save(tmp_path / name, 1)
    shutil.copytree(tmp_path / "b" / "step-00000001", tmp_path / "a" / "step-00000002")
    tell_of_step(tmp_path / "a" / "step-00000002", 2)
    assert checkpoint.newest(tmp_path / "a").name == "step-00000001"
    assert "state.json: it belongs to another run" in capsys.readouterr().err
    folder = tmp_path / "b" / "step-00000001"
    state = checkpoint.read_state(folder)
    del state["files"]                                      # without checksums anything could be in it
    (folder / "state.json").write_text(checkpoint.json.dumps(state))
    assert "it belongs to another run" in checkpoint.damage(folder)


def test_a_run_folder_that_was_moved_away_is_not_made_anew(tmp_path):
    weights = checkpoint.tensors_of(projector(), ["projector"])
    with pytest.raises(UserError, match="the checkpoint of step 1 can't be written to .*nowhere"):
        checkpoint.save(tmp_path / "nowhere", 1, weights, {}, {"parts": ["projector"]}, keep=1)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_in_the_way_of_a_checkpoint_is_set_aside(tmp_path):
    (tmp_path / "step-00000003").write_text("a file")
    assert save(tmp_path, 3).is_dir()
    assert (tmp_path / "set-aside-step-00000003").read_text() == "a file"


@pytest.mark.parametrize("junk", [
    "\n", "garbage\n", '{"step": 2', "[]\n", '{"step": "x"}\n', "\x00\xff\n", "7\n"])
def test_lines_of_metrics_that_are_none_do_not_stop_a_run(junk, tmp_path):
    file, good = tmp_path / "metrics.jsonl", '{"step": 1}\n'
    file.write_text(good + junk + '{"step": 2}\n{"step": 9}\n' if junk.endswith("\n") else good + junk)
    checkpoint.drop_lost_lines(file, 2)
    assert file.read_text() == good + '{"step": 2}\n' * junk.endswith("\n")
    checkpoint.drop_lost_lines(tmp_path / "nowhere.jsonl", 2)


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
    "not a number": (SAVED | {"projector.2.bias": BIAS * float("nan")},
                     ": projector.2.bias holds values that are not finite. Use"),
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


MOMENTS = {"exp_avg.projector.2.bias": BIAS, "exp_avg_sq.projector.2.bias": BIAS,
           "step.projector.2.bias": torch.tensor(3.0)}
OPTIMIZERS = {  # kind: (what the file holds, the tensors that the sentence names)
    "of another parameter": (MOMENTS | {"exp_avg.projector.9.bias": BIAS}, "exp_avg.projector.9.bias"),
    "another shape": (MOMENTS | {"exp_avg.projector.2.bias": BIAS[:5]}, "exp_avg.projector.2.bias"),
    "a scalar": (MOMENTS | {"exp_avg.projector.2.bias": torch.tensor(0.0)}, "exp_avg.projector.2.bias"),
    "steps for each number": (MOMENTS | {"step.projector.2.bias": BIAS}, "step.projector.2.bias"),
    "a moment missing": ({name: tensor for name, tensor in MOMENTS.items() if "_sq" not in name},
                         "exp_avg_sq.projector.2.bias"),
    "nothing": ({"random.0": torch.zeros(3)}, "its tensors, there are none")}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_does_not_belong_to_the_model_is_named(kind, tmp_path):
    """A scalar moment would end fused AdamW with a segmentation fault."""
    tensors, said = OPTIMIZERS[kind]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model, folder = projector(kind="gelu-mlp"), folder_with(tmp_path, SAVED, tensors)
    with pytest.raises(UserError, match=f"does not belong to this model: look at {said}"):
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
    """Neither written nor read: a checkpoint from a stranger can't run code. Of Prismatic's files, which are
    pickles, only tensors are taken."""
    unsafe = r"torch\.save\(|torch\.load\((?![^)]*weights_only=True)|import pickle|allow_pickle=True"
    for file in Path(checkpoint.__file__).parent.glob("*.py"):
        assert not re.search(unsafe, file.read_text()), file
