"""train.py as a user runs it: real torchrun, real files, the embedded toy world made small."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import config
import generate
import toy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """About 60 captions and 70 conversations: text only, one picture, two pictures."""
    folder = tmp_path_factory.mktemp("world")
    toy.write(folder, seed=5, scale=0.01)
    return folder


def train_command(world, root, *flags, ranks=1, stage="finetune"):
    file = "align.json" if stage == "align" else "finetune.json"
    start = ["--stage", stage] + (["--no_align"] if stage == "finetune" and "--ckpt" not in flags else [])
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "train.py"), *start,
            "--train_json", str(world / file), "--image_dir", str(world / "images"), "--val_json", "",
            "--run_root", str(root), "--run_id", "r", "--global_batch_size", "8", "--per_device_batch_size", "4",
            "--num_workers", "0", *flags]


def run_train(world, root, *flags, ranks=1, ok=True, stage="finetune"):
    """One run on the small world: torchrun, or plain `python train.py` for one rank, which starts faster.

    Returns (metrics, run folder, everything it printed).
    """
    command = train_command(world, root, *flags, ranks=ranks, stage=stage)
    if ranks == 1:
        command = [sys.executable, *command[command.index(str(ROOT / "train.py")):]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    run = Path(root) / "r"
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines], run, done.stdout + done.stderr


def weights(run):
    return load_file(sorted(run.glob("step-*"))[-1] / "model.safetensors")


def assert_same_up_to_rounding(got, want):
    """Without GPT-2's key biases (the middle third of c_attn.bias): a softmax does not change when all its inputs shift,
    so their true gradient is zero, and Adam turns the rounding noise in its place into steps of full size."""
    assert got.keys() == want.keys()
    for name in want:
        parts = [tensor.chunk(3)[::2] if name.endswith("c_attn.bias") else [tensor] for tensor in (got[name], want[name])]
        for a, b in zip(*parts):
            assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="session")
def one_rank(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    return run_train(world, root, "--max_steps", "20", "--save_every", "10", "--keep", "5")


def test_a_run_writes_one_line_per_step_and_mixes_modalities(one_rank):
    metrics, run, printed = one_rank
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert {line["modality"] for line in metrics} == {"image", "text"}
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "positions", "padding", "data_wait",
            "tokens_per_second", "modality"} <= metrics[0].keys()
    assert sorted(folder.name for folder in run.glob("step-*")) == ["step-00000010", "step-00000020"]
    assert "trains   projector" in printed and ">>" in printed and "20/20" in printed
    assert f"next     python generate.py --ckpt {run}" in printed


@pytest.mark.parametrize("ranks,per_device", [(2, 2), (4, 2)])
def test_the_loss_curve_does_not_depend_on_how_the_batch_is_cut(world, one_rank, tmp_path, ranks, per_device):
    metrics, run, _ = run_train(world, tmp_path, "--max_steps", "20", "--per_device_batch_size", str(per_device),
                                ranks=ranks)
    for got, want in zip(metrics, one_rank[0], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)     # fp32 sums in another order
        assert (got["tokens"], got["modality"], got["lr"]) == (want["tokens"], want["modality"], want["lr"])
    assert_same_up_to_rounding(weights(run), weights(one_rank[1]))


def test_text_only_training_works_on_two_ranks_and_leaves_the_projector_alone(world, tmp_path):
    rows = [row for row in json.loads((world / "finetune.json").read_text()) if "image" not in row]
    (world / "text.json").write_text(json.dumps(rows))
    _, run, _ = run_train(world, tmp_path, "--train_json", str(world / "text.json"), "--max_steps", "3",
                          "--save_every", "1", "--keep", "5", ranks=2)
    first, last = (load_file(run / f"step-0000000{i}" / "model.safetensors") for i in (1, 3))
    for name in first:
        assert torch.equal(first[name], last[name]) == name.startswith("projector"), name


def test_a_lost_run_continues_bit_for_bit(world, one_rank, tmp_path):
    """As if killed after step 10 was saved and five more steps were logged."""
    metrics, run, _ = one_rank
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "step-00000020")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:20])
    again, continued, _ = run_train(world, tmp_path, "--max_steps", "20", "--save_every", "10", "--keep", "5")
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in again] == [(m["step"], m["loss"], m["grad_norm"]) for m in metrics]
    want, got = weights(run), weights(continued)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_a_finished_run_says_so_and_a_changed_flag_is_named(world, one_rank, tmp_path):
    shutil.copytree(one_rank[1], tmp_path / "r")
    flags = ["--max_steps", "20", "--save_every", "10", "--keep", "5"]
    _, _, printed = run_train(world, tmp_path, *flags)
    assert "this run is finished" in printed
    _, _, printed = run_train(world, tmp_path, *flags, "--learning_rate", "0.5", ok=False)
    assert "--learning_rate was 0.0005, is 0.5" in printed


def test_align_trains_and_saves_the_projector_only_and_finetune_starts_from_it(world, tmp_path):
    _, run, printed = run_train(world, tmp_path / "a", "--max_steps", "4", stage="align")
    assert {name.split(".")[0] for name in weights(run)} == {"projector"}
    assert f"next     torchrun train.py --stage finetune --ckpt {run}" in printed
    _, tuned, _ = run_train(world, tmp_path / "f", "--ckpt", str(run), "--max_steps", "2", "--learning_rate", "0")
    assert {name.split(".")[0] for name in weights(tuned)} == {"projector", "llm"}
    for name, tensor in weights(run).items():
        assert torch.equal(weights(tuned)[name], tensor), name


def test_a_bad_example_stops_all_ranks_with_its_name(world, tmp_path):
    rows = json.loads((world / "finetune.json").read_text())
    picture = next(row for row in rows if "image" in row)
    picture["image"] = "nowhere.png" if isinstance(picture["image"], str) else ["nowhere.png"] * 2
    (world / "broken.json").write_text(json.dumps(rows))
    _, _, printed = run_train(world, tmp_path, "--train_json", str(world / "broken.json"), "--max_steps", "20", ranks=2,
                              ok=False)
    assert f"id='{picture['id']}': picture {world / 'images' / 'nowhere.png'} does not exist" in printed
    assert "Original Traceback" not in printed


def test_python_train_py_is_a_world_of_one(world, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--train_json", str(world / "align.json"), "--image_dir",
                           str(world / "images"), "--val_json", str(world / "val_align.json"), "--run_root",
                           str(tmp_path), "--max_steps", "2"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "toy-align-x7"
    scores = json.loads((run / "val.json").read_text())
    assert scores["count"] == 1 and scores["by_type"]["caption"]["count"] == 1
    assert (run / "samples.png").exists()


def test_generate_answers_from_the_command_line(world, one_rank, capsys):
    a, b = (str(world / "images" / f"test_0000{i}.png") for i in (1, 2))
    flags = ["--ckpt", str(one_rank[1]), "--prompt", "How many?", "--max_new_tokens", "3"]
    for images in ([], ["--image", a], ["--image", a, b], ["--image", a, "--image", b]):
        generate.main(config.parse(generate.GenerateConfig, [*flags, *images]))
        assert capsys.readouterr().out.strip(), images
    done = subprocess.run([sys.executable, "generate.py", *flags, "--image", a], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
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
