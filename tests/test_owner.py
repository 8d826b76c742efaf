"""owner.py: a run folder has one writer, and --overwrite loses nothing by a mistake."""
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import config
import forked
import owner
from config import UserError
from test_train import train_here

ROOT = Path(__file__).resolve().parent.parent


def cfg_of(folder, **flags):
    flags = dict(train_json="a.json", image_dir="b", run_root=str(folder), run_id="r") | flags
    return config.Config(**flags)


def start(folder, restarted=False, epoch=10, **flags):
    """What train.py does on rank zero before its first step -> the run folder."""
    cfg = cfg_of(folder, **flags)
    lock = owner.claim_alone(cfg, cfg.run_folder)
    owner.begin_alone(cfg, cfg.run_folder, restarted, epoch)
    lock.close()
    return cfg.run_folder


def save(run, step):
    checkpoint.save(run, step, {"projector.0.bias": torch.zeros(3)}, {"random.0": torch.zeros(3)},
                    {"parts": ["projector"]}, keep=9)
    if (run / "replaces.json").exists():                    # as train.save does it
        owner.forget(run)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_run_is_begun_once_and_then_continued(tmp_path):
    run = start(tmp_path)
    save(run, 1)
    assert start(tmp_path) == run and names(run) == ["config.json", "step-00000001"]
    assert names(tmp_path) == ["r"]


@pytest.mark.parametrize("before, now", [        # an epoch is 10 steps
    ({"max_steps": 20}, {"max_steps": 21}), ({"epochs": 2}, {"epochs": 3}),
    ({"epochs": 2}, {"max_steps": 20}), ({"max_steps": 20}, {"epochs": 2}),
    ({"max_steps": 20}, {"max_steps": 20, "epochs": 9})])
def test_a_run_can_be_extended_and_config_json_says_so(before, now, tmp_path):
    run = start(tmp_path, **before)
    saved = json.loads((run / "config.json").read_text())
    start(tmp_path, **now)
    want = saved | {"epochs": 1, "max_steps": 0} | now
    assert json.loads((run / "config.json").read_text()) == want and want["started"]
    assert start(tmp_path, **now) == run                    # and is as long from then on
    with pytest.raises(UserError, match="A run can be extended, not cut short"):
        start(tmp_path, max_steps=19)


@pytest.mark.parametrize("before, now, said", [
    ({"max_steps": 20}, {"max_steps": 19}, "holds a longer run: --max_steps was 20, is 19. A run can be"),
    ({"epochs": 3}, {"epochs": 2}, "--epochs was 3, is 2"),
    ({"epochs": 2}, {"max_steps": 19}, "--epochs was 2, is 1; --max_steps was 0, is 19"),
    ({"max_steps": 20}, {"max_steps": 0}, "--max_steps was 20, is 0")])
def test_a_run_can_not_be_cut_short(before, now, said, tmp_path):
    run = start(tmp_path, **before)
    text = (run / "config.json").read_text()
    with pytest.raises(UserError, match=said):
        start(tmp_path, **now)
    assert (run / "config.json").read_text() == text
    with pytest.raises(UserError, match="--seed was 7, is 8"):      # nothing else may change with it
        start(tmp_path, seed=8, max_steps=10 ** 6)


def test_fewer_steps_than_before_are_refused_before_a_model_is_loaded_where_that_can_be_told(tmp_path):
    start(tmp_path, max_steps=20)
    with pytest.raises(UserError, match="not cut short"):
        owner.claim_alone(cfg_of(tmp_path, max_steps=19), tmp_path / "r")


def test_overwrite_moves_the_old_run_away_and_the_first_checkpoint_deletes_it(tmp_path):
    save(start(tmp_path), 1)
    run = start(tmp_path, overwrite=True, seed=8)
    assert names(tmp_path) == ["r", "r.overwritten"]
    assert names(tmp_path / "r.overwritten") == ["config.json", "step-00000001"]
    assert names(run) == ["config.json", "replaces.json"]
    save(run, 2)
    assert names(tmp_path) == ["r"] and names(run) == ["config.json", "step-00000002"]


def test_a_new_run_that_ends_before_its_first_checkpoint_still_remembers_what_it_replaces(tmp_path):
    save(start(tmp_path), 1)
    start(tmp_path, overwrite=True)
    start(tmp_path)                                         # killed, and continued without the flag
    run = start(tmp_path, overwrite=True)                   # killed, and overwritten
    assert names(tmp_path) == ["r", "r.overwritten", "r.overwritten-2"]
    save(run, 1)
    assert names(tmp_path) == ["r"]


def test_after_a_restart_by_torchrun_or_slurm_nothing_is_overwritten(tmp_path):
    save(start(tmp_path), 1)
    run = start(tmp_path, restarted=True, overwrite=True)
    assert names(run) == ["config.json", "step-00000001"] and names(tmp_path) == ["r"]


def test_a_job_that_ended_before_it_overwrote_overwrites_when_it_is_restarted(tmp_path, monkeypatch):
    """A rank that dies while it loads, a job that is put back into the queue: nothing was obeyed yet, and the
    run that lies there is that of another job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    save(start(tmp_path), 1)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    run = start(tmp_path, restarted=True, overwrite=True, seed=9)
    assert names(tmp_path) == ["r", "r.overwritten"] and config.read_config(run).seed == 9
    save(run, 2)
    assert start(tmp_path, restarted=True, overwrite=True, seed=9) == run   # its own: it goes on
    assert names(run) == ["config.json", "step-00000002"]
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")       # torchrun's word for no name: it is believed,
    with pytest.raises(UserError, match="other flags: --seed was 9, is 5"):     # but not with other flags
        start(tmp_path, restarted=True, overwrite=True, seed=5)


def test_overwrite_keeps_data_of_the_user_that_is_called_like_scores(tmp_path):
    run = start(tmp_path)
    save(run, 1)
    (run / "val.json").write_text('[{"image": "a.png"}]')
    (run / "scores.json").write_text('{"accuracy": 0.5}')
    (run / "scores.unfinished.jsonl").write_text('{"asked": {}}\n{"index": 3}\n')
    (run / "mine.unfinished.jsonl").write_text("my notes")
    (run / "folder.unfinished.jsonl").mkdir()
    save(start(tmp_path, overwrite=True), 1)
    assert names(tmp_path / "r.overwritten") == ["folder.unfinished.jsonl", "mine.unfinished.jsonl",
                                                 "val.json"]


def test_overwrite_deletes_only_what_train_py_wrote(tmp_path):
    run = start(tmp_path)
    save(run, 1)
    (run / "part-0001").mkdir()
    (run / "part-0001" / "notes.txt").write_text("mine")
    (run / "step-00000001" / "mine.txt").write_text("mine")
    (tmp_path / "r.overwritten").mkdir()                    # a neighbor that happens to have this name
    (tmp_path / "r.overwritten" / "a.txt").write_text("mine")
    save(start(tmp_path, overwrite=True), 1)
    assert (tmp_path / "r.overwritten" / "a.txt").exists()
    left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "r.overwritten-2").rglob("*"))
    assert left == ["r.overwritten-2/part-0001", "r.overwritten-2/part-0001/notes.txt",
                    "r.overwritten-2/step-00000001", "r.overwritten-2/step-00000001/mine.txt"]


@pytest.mark.parametrize("text", ['["/precious"]', '["../precious"]', '["r"]', '["r.overwritten/.."]', "[7]",
                                  "7", "garbage", '{"a": 1}', '"r.overwritten"'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_of_replaced_runs_that_this_program_did_not_write_deletes_nothing(text, overwrite, tmp_path):
    run = start(tmp_path)
    save(start(tmp_path, run_id="precious"), 1)
    save(run, 1)
    (run / "replaces.json").write_text(text)
    with pytest.raises(UserError, match="replaces.json can't be read"):
        start(tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="replaces.json can't be read"):
        owner.forget(run)
    assert names(tmp_path / "precious") == ["config.json", "step-00000001"]
    assert names(tmp_path) == ["precious", "r"]


def test_a_run_that_is_about_to_be_deleted_is_no_place_to_start_from(tmp_path):
    save(start(tmp_path), 1)
    start(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="the next checkpoint of .* would delete it"):
        start(tmp_path, ckpt=str(tmp_path / "r.overwritten"), overwrite=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "replaces.json"])
def test_a_pipe_in_a_run_folder_is_named(name, tmp_path):
    run = start(tmp_path)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(UserError, match=f"{name} is no file|exists and holds no run"):
        start(tmp_path)


def test_a_link_to_a_run_has_the_same_lock_and_a_linked_lock_is_refused(tmp_path):
    run = start(tmp_path)
    (tmp_path / "alias").symlink_to(run)
    owner.lock(tmp_path / "alias").close()
    assert [path.name for path in tmp_path.glob(".*.lock")] == [".r.lock"]
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".r.lock").unlink()
    (tmp_path / ".r.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="can't be written"):
        start(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make, said", [
    (lambda run: (run / "config.json").write_text('{"model_type": "llama"}'), "config.json can't be read"),
    (lambda run: (run / "notes.txt").write_text("mine"), "exists and holds no run of this program")])
def test_a_folder_that_is_no_run_is_left_alone(make, said, overwrite, tmp_path):
    (tmp_path / "r").mkdir()
    make(tmp_path / "r")
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with pytest.raises(UserError, match=said):
        start(tmp_path, overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_a_file_in_the_place_of_the_run_is_left_alone(tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no run of this program|can't be written"):
        start(tmp_path, overwrite=True)
    assert (tmp_path / "r").read_text() == "mine"


def test_a_link_to_a_run_is_continued_but_not_overwritten(tmp_path):
    save(start(tmp_path / "elsewhere"), 1)
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere" / "r")
    flags = dict(run_root=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="is a link to"):
        start(tmp_path, overwrite=True)
    assert names(tmp_path / "elsewhere" / "r") == ["config.json", "step-00000001"]
    assert start(tmp_path, **flags).exists()


WRONG = {   # flags of a start that can't begin -> what is said, before the old run is touched
    "no such data": (["--train_json", "nowhere.json"], "nowhere.json does not exist"),
    "no such pictures": (["--image_dir", "nowhere"], "does not exist. Paths are relative to --image_dir"),
    "no such language model": (["--llm_backbone", "nowhere"], "--llm_backbone nowhere"),
    "no such held-out data": (["--val_json", "nowhere.json"], "nowhere.json does not exist"),
    "a batch that can't be cut": (["--global_batch_size", "9"], "can't be cut into micro-batches"),
    "examples longer than the model knows": (["--max_length", "100000", "--train_json", "LONG"],
                                             "but the language model knows"),
    "text for the projector alone": (["--trains", "projector"], "a text-only example can train only the"),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    from toy import world
    folder = tmp_path_factory.mktemp("small")
    world.write(folder / "world", seed=5, scale=0.01)
    words = " ".join(["red"] * 3000)
    rows = [{"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": "red"}]}]
    (folder / "long.json").write_text(json.dumps(rows))
    done = forked.run(command(folder, folder))
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, root, *flags):
    world = folder / "world"
    return [sys.executable, str(ROOT / "train.py"), "--stage", "finetune", "--no_align", "--train_json",
            str(world / "finetune.json"), "--image_dir", str(world / "images"), "--val_json", "",
            "--run_root", str(root), "--run_id", "r", "--global_batch_size", "8",
            "--per_device_batch_size", "4", "--num_workers", "0", "--max_steps", "2", *flags]


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_beside_overwrite_loses_nothing(kind, small_run, tmp_path, monkeypatch):
    flags, said = WRONG[kind]
    flags = [str(small_run / "long.json") if flag == "LONG" else flag for flag in flags]
    shutil.copytree(small_run / "r", tmp_path / "r")
    before = contents(tmp_path / "r")
    with pytest.raises(UserError, match=re.escape(said)):
        train_here(monkeypatch, small_run / "world", tmp_path, "--max_steps", "2", "--overwrite", *flags)
    # A picture is missed in the first batch. Then the old run stands beside the new one.
    assert contents(tmp_path / ("r.overwritten" if kind == "no such pictures" else "r")) == before


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_starts_at_once_the_second_says_who_holds_the_run(small_run, tmp_path):
    first = subprocess.Popen(command(small_run, tmp_path, "--max_steps", "100000"), cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: (tmp_path / "r" / "metrics.jsonl").exists())
        second = forked.run(command(small_run, tmp_path, "--max_steps", "100000"))
        assert second.returncode == 1
        said = f"is being written by another start of it: process {first.pid} on "
        assert said in second.stderr.strip().splitlines()[-1], second.stderr
    finally:
        first.kill()                                        # SIGKILL: the lock dies with it
        first.communicate()
    owner.lock(tmp_path / "r").close()


def test_ranks_end_when_torchrun_is_killed_and_the_run_is_free_again(small_run, tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
             "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    process = subprocess.Popen([*ranks, *command(small_run, tmp_path, "--max_steps", "100000")[1:]], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: (tmp_path / "r" / "metrics.jsonl").exists()
             and (tmp_path / "r" / "metrics.jsonl").stat().st_size)
    children = [int(pid) for task in Path(f"/proc/{process.pid}/task").glob("*")
                for pid in (task / "children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) == 2
    wait_for(lambda: not any(alive(pid) for pid in children), seconds=20)
    owner.lock(tmp_path / "r").close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what, seconds=60):
    began = time.time()
    while not what():
        assert time.time() - began < seconds
        time.sleep(0.05)


def test_a_file_system_without_locks_says_so_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert start(tmp_path).exists()
    assert "has no locks (Function not implemented): do not start this run twice" in capsys.readouterr().err
