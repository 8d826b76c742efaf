"""Whatever happens to a run, the same command continues it. Real torchrun, real signals, real files.

`python -m pytest tests/test_faults.py --kills 200` kills 200 times instead of 3.
"""
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import forked
from config import BadExample
from test_train import (ROOT, SHORT, assert_bit_for_bit, assert_same_curve,  # noqa: F401
                        assert_same_up_to_rounding, one_rank, run_train, train_command,
                        train_here, weights, world)

@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """16 steps, one epoch is 12.
    The language model has dropout: the random state of each rank decides the losses."""
    folder = tmp_path_factory.mktemp("llm")
    shutil.copytree(ROOT / "toy" / "llm", folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    drop = {name: 0.1 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    (folder / "config.json").write_text(json.dumps(settings | drop))
    return ("--max_steps", "16", "--save_every", "4", "--keep", "9", "--llm_backbone", str(folder))


@pytest.fixture(scope="session")
def undisturbed(world, flags, tmp_path_factory):
    """Two ranks, never interrupted."""
    return run_train(world, tmp_path_factory.mktemp("undisturbed"), *flags, ranks=2)


def test_each_rank_has_its_own_random_state_in_a_checkpoint(undisturbed):
    seen = set()
    for folder in checkpoint.step_folders(undisturbed[1]):
        tensors = load_file(folder / "optimizer.safetensors")
        seen |= {tensors[f"random.{rank}"].numpy().tobytes() for rank in (0, 1)}
    assert len(seen) == 8                                   # four checkpoints of two ranks, all different


def test_a_run_that_continues_with_another_random_state_would_be_caught(world, flags, tmp_path, monkeypatch):
    few = (*flags, "--max_steps", "4", "--save_every", "2")
    whole = train_here(monkeypatch, world, tmp_path, *few)
    for kept in ("random.0", "nothing"):
        lose_steps_after(whole[1], tmp_path / kept, 2)
        file = tmp_path / kept / "r" / "step-00000002" / "optimizer.safetensors"
        tensors = load_file(file)
        if kept == "nothing":
            del tensors["random.0"]
        save_file(tensors, file)
        state = checkpoint.read_state(file.parent)          # its checksum is that of the file before
        state["files"][file.name] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                                     "tensors": checkpoint.tensors_in(file)}
        (file.parent / "state.json").write_text(json.dumps(state))
        train_here(monkeypatch, world, tmp_path / kept, *few)
    assert_same_run(tmp_path / "random.0", whole)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "nothing", whole)


def lose_steps_after(run, root, step):
    shutil.copytree(run, root / "r")
    for folder in checkpoint.step_folders(root / "r"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def start(world, root, *flags, ranks=2, stage="finetune", **env):
    """By torchrun, or by plain `python train.py` where there is one rank."""
    command = train_command(world, root, *flags, ranks=ranks, stage=stage)
    if ranks == 1:
        command = [sys.executable, *command[command.index(str(ROOT / "train.py")):]]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*") for child in
            (task / "children").read_text().split()]


def family(pid):
    """The process and all below it."""
    return [pid] + [member for child in children(pid) for member in family(child)]


def kill_all(process):
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:                          # ended by itself in between
            continue
    process.communicate()


def wait_for_step(root, step, process):
    file = Path(root) / "r" / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def assert_same_run(root, undisturbed):
    lines = [json.loads(line) for line in (Path(root) / "r" / "metrics.jsonl").read_text().splitlines()]
    same = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "positions", "modality")
    assert ([[line[key] for key in same] for line in lines]
            == [[line[key] for key in same] for line in undisturbed[0]])
    want, got = weights(undisturbed[1]), weights(Path(root) / "r")
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(world, flags, undisturbed, tmp_path, request):
    """Also in the first seconds, while a checkpoint is written and between epochs: a moment is any moment.
    But none is lost to imports: the ranks of this torchrun are forked.

    With `-s` it says what each kill met.
    """
    begin = functools.partial(start, world, tmp_path, *flags, PYTHON_EXEC=forked.python())
    rng, kills, rounds = random.Random(0), request.config.getoption("--kills"), 0
    process, began = begin(), time.time()
    for kill in range(kills):
        # Half of the kills come while the run is training or saving, the others at any time since the start.
        if rng.random() < 0.5:
            wait_or_end(tmp_path, process)
            time.sleep(rng.uniform(0, 1.5))
        else:
            time.sleep(rng.uniform(0, 5))
        if process.poll() is None:
            kill_all(process)
        else:
            assert process.communicate() and process.returncode == 0
        print(f"kill {kill + 1}, {time.time() - began:.1f} s after the start, round {rounds}, "
              f"step {metrics_text(tmp_path).count(chr(10))}",
              "while it saved" if list((tmp_path / "r").glob("unfinished-*")) else "", flush=True)
        if (tmp_path / "r" / "step-00000016").exists():     # the last one: begin again, there are kills left
            assert_same_run(tmp_path, undisturbed)
            shutil.rmtree(tmp_path / "r")
            rounds += 1
        process, began = begin(), time.time()
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    assert_same_run(tmp_path, undisturbed)
    assert not list((tmp_path / "r").glob("unfinished-*"))


def metrics_text(root):
    file = Path(root) / "r" / "metrics.jsonl"
    return file.read_text() if file.exists() else ""


def wait_or_end(root, process):
    """Until this start has made a step."""
    file = Path(root) / "r" / "metrics.jsonl"
    began = time.time()
    while process.poll() is None and not (file.exists() and file.stat().st_mtime > began):
        time.sleep(0.01)


def test_a_signal_to_one_rank_saves_and_ends_all_with_success(world, flags, tmp_path):
    process = start(world, tmp_path, *flags, "--max_steps", "500", PYTHON_EXEC=forked.python())
    wait_for_step(tmp_path, 2, process)
    began = time.time()
    os.kill(children(process.pid)[1], signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by a signal after step" in printed, printed
    assert time.time() - began < 20
    newest = checkpoint.newest(tmp_path / "r")
    assert checkpoint.read_state(newest)["step"] == len(metrics_text(tmp_path).splitlines())


CTRL_C = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
os.setsid()                                                 # a group of processes, as a terminal has one
signal.signal(signal.SIGINT, signal.default_int_handler)    # what a shell starts with & ignores it
import train
exact = train.stop_unless_finite
def pressed(loss, norm, step, *others):
    if step == 3:
        os.killpg(0, signal.SIGINT)
    return exact(loss, norm, step, *others)
train.stop_unless_finite = pressed
train.ranks.run(train.main, train.config.parse(train.Config))
"""


def test_ctrl_c_saves_and_ends_with_success_and_the_run_continues(world, one_rank, tmp_path, monkeypatch):
    """It reaches all processes of the terminal, data workers too."""
    (tmp_path / "pressed.py").write_text(CTRL_C)
    command = train_command(world, tmp_path, *SHORT, "--num_workers", "1")
    flags = command[command.index(str(ROOT / "train.py")) + 1:]
    done = forked.run([sys.executable, str(tmp_path / "pressed.py"), *flags])
    since = time.time() - (tmp_path / "r" / "metrics.jsonl").stat().st_mtime
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and since < 20, printed
    steps = len(metrics_text(tmp_path).splitlines())
    assert f"stopped by a signal after step {steps} and saved; the same command continues" in printed
    assert 3 <= steps < 20 and checkpoint.step_folders(tmp_path / "r")[-1].name == f"step-{steps:08d}"
    assert_bit_for_bit(train_here(monkeypatch, world, tmp_path, *SHORT), one_rank)


def test_a_signal_to_torchrun_reaches_all_processes_and_the_run_still_saves(world, flags, tmp_path):
    process = start(world, tmp_path, *flags, "--max_steps", "500", "--num_workers", "1")
    wait_for_step(tmp_path, 2, process)
    process.terminate()
    printed = process.communicate(timeout=60)[0]
    assert "stopped by a signal after step" in printed and "was killed from outside" not in printed, printed
    metrics = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    newest = checkpoint.newest(tmp_path / "r")
    assert newest == checkpoint.step_folders(tmp_path / "r")[-1] and newest.name == f"step-{len(metrics):08d}"


def test_max_restarts_goes_on_by_itself_when_a_rank_dies(world, flags, undisturbed, tmp_path):
    """A random one, at a random moment. --overwrite is for the user's start, not for the restarts. The ranks
    are forked."""
    rng = random.Random()
    command = train_command(world, tmp_path, *flags, "--overwrite", ranks=2)
    command.insert(command.index("--master_port=0"), "--max_restarts=3")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": forked.python()})
    wait_for_step(tmp_path, 5, process)
    mark = tmp_path / "r" / "mark"
    mark.touch()
    time.sleep(rng.uniform(0, 0.3))
    os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert_same_run(tmp_path, undisturbed)
    assert mark.exists(), "a restart began from the beginning"


FAILS = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import model
calls, forward = 0, model.VLM.forward
def failing(*args):
    global calls
    calls += 1
    if calls == 5 and os.environ["RANK"] == "1":
        raise RuntimeError("cosmic ray")
    return forward(*args)
model.VLM.forward = failing
runpy.run_path("train.py", run_name="__main__")
"""


def test_an_exception_on_one_rank_ends_all_and_is_shown_last(world, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    command = train_command(world, tmp_path, "--max_steps", "500", ranks=2)
    command[command.index(str(ROOT / "train.py"))] = str(tmp_path / "fails.py")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": forked.python()})
    wait_for_step(tmp_path, 4, process)                     # it happens in the fifth
    began = time.time()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.time() - began < 30
    shown = [line for line in printed.splitlines() if line.strip("= ")]
    said = "error (rank 1): this is a bug of this program (RuntimeError: cosmic ray). Please report it "
    assert f"traceback : {said}" in shown[-1], printed
    trace = Path(shown[-1].rsplit(" ", 1)[1])
    assert 'raise RuntimeError("cosmic ray")' in trace.read_text()
    trace.unlink()


def test_another_layout_continues_it_up_to_rounding(world, one_rank, tmp_path):
    lose_steps_after(one_rank[1], tmp_path, 10)
    metrics, run, _ = run_train(world, tmp_path, *SHORT, "--per_device_batch_size", "1", "--num_workers", "1",
                                ranks=2)
    assert_same_curve(metrics, one_rank[0])
    assert_same_up_to_rounding(weights(run), weights(one_rank[1]))


FULL = """
import os, resource, runpy, sys
sys.path.insert(0, os.getcwd())
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))       # no file larger than 1 MB
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(world, one_rank, tmp_path):
    lose_steps_after(one_rank[1], tmp_path, 10)
    (tmp_path / "full.py").write_text(FULL)
    command = train_command(world, tmp_path, *SHORT)
    flags = command[command.index(str(ROOT / "train.py")) + 1:]
    done = forked.run([sys.executable, str(tmp_path / "full.py"), *flags])
    said = f"error: the checkpoint of step 20 can't be written to {tmp_path / 'r'} ("
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(said), done.stderr
    assert "Older ones are intact" in done.stderr and not list((tmp_path / "r").glob("unfinished-*"))
    folder, = checkpoint.step_folders(tmp_path / "r")
    assert folder.name == "step-00000010" and not checkpoint.damage(folder)


def test_skip_bad_examples_replaces_and_counts_them(world, tmp_path, monkeypatch):
    rows = json.loads((world / "finetune.json").read_text())
    bad = [row for row in rows if isinstance(row.get("image"), str)][:3]
    bad[0]["image"], bad[1]["image"], bad[2]["conversations"] = "nowhere.png", "../outside.png", []
    (world / "three_bad.json").write_text(json.dumps(rows))
    flags = ("--train_json", str(world / "three_bad.json"), "--max_steps", "12", "--num_workers", "1")
    metrics, _ = train_here(monkeypatch, world, tmp_path, *flags, "--skip_bad_examples")
    # Some come twice, where a last batch is filled up.
    assert 3 <= sum(line["replaced"] for line in metrics) <= 6
    with pytest.raises(BadExample, match=f"id='{bad[2]['id']}': 'conversations' must be a list"):
        train_here(monkeypatch, world, tmp_path / "strict", *flags)


def test_a_loss_that_is_not_finite_stops_before_the_update(world, tmp_path):
    metrics, run, printed = run_train(world, tmp_path, "--max_steps", "9", "--learning_rate", "1e30",
                                      "--warmup_ratio", "0", "--save_every", "1", "--keep", "9",
                                      ranks=2, ok=False)
    assert "step 2: loss nan, gradient norm nan. The update was not made, checkpoints are" in printed, printed
    assert [folder.name for folder in run.glob("step-*")] == ["step-00000001"] and len(metrics) == 1
    ids = re.search("rank 0 had the examples (.*); rank 1 had the examples (.*). Look at them",
                    printed).groups()
    first, second = (names.split(", ") for names in ids)
    assert len(first) == len(second) == 4 and first != second
    assert set(first + second) <= {row["id"] for row in json.loads((world / "finetune.json").read_text())}


def test_a_killed_data_worker_is_named(world, tmp_path):
    process = start(world, tmp_path, "--max_steps", "500", "--num_workers", "1", ranks=1)
    wait_for_step(tmp_path, 2, process)
    worker = next(pid for pid in children(process.pid)
                  if "train.py" in Path(f"/proc/{pid}/cmdline").read_text())
    began = time.time()
    os.kill(worker, signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "a process that reads data was killed" in printed, printed
    assert time.time() - began < 30 and 'train.py", line' not in printed


def test_two_machines_find_each_other_also_after_a_rank_has_died(world, flags, undisturbed, tmp_path):
    """Two agents on one host. Torchruns as they are, whose ranks are forked."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = []
    for _ in range(2):
        command = train_command(world, tmp_path, *flags, ranks=1)
        command[command.index("--rdzv_endpoint=localhost:0")] = f"--rdzv_endpoint=localhost:{port}"
        command[command.index("--master_port=0")] = "--nnodes=2"
        command.insert(command.index("--nnodes=2"), "--max_restarts=3")
        agents.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       text=True, env=os.environ | {"OMP_NUM_THREADS": "1",
                                                                    "PYTHON_EXEC": forked.python()}))
    wait_for_step(tmp_path, 5, agents[0])
    os.kill(children(agents[random.randrange(2)].pid)[0], signal.SIGKILL)
    printed = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)
    assert_same_run(tmp_path, undisturbed)


def test_keep_removes_the_oldest_but_not_the_ends_of_epochs(world, tmp_path, monkeypatch):
    metrics, run = train_here(monkeypatch, world, tmp_path, "--epochs", "2", "--save_every", "5",
                              "--keep", "1", "--keep_epochs", stage="align")
    ends = len(metrics) // 2
    assert (sorted(int(folder.name[5:]) for folder in run.glob("step-*"))
            == sorted({ends, len(metrics) // 5 * 5, 2 * ends}))


def test_a_run_folder_that_cant_be_written_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("")
    printed = run_train(world, tmp_path / "file", "--max_steps", "1", ok=False)[2]
    assert "can't be written" in printed and 'train.py", line' not in printed


def memory(pid):
    """Bytes of the process and all below it; what they share is counted once (PSS)."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith("Pss:") else 0
    return total


def test_memory_stays_flat_over_epochs(world, tmp_path):
    process = start(world, tmp_path, "--epochs", "20", "--num_workers", "1", "--save_every", "1000",
                    stage="align", ranks=1)
    steps = 20 * 8
    wait_for_step(tmp_path, steps // 4, process)
    early = memory(process.pid)
    wait_for_step(tmp_path, steps - 10, process)
    late = memory(process.pid)
    kill_all(process)
    assert late < early * 1.05, f"{early / 1e6:.0f} MB, then {late / 1e6:.0f} MB"
