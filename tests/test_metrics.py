"""metrics.py: what is read, where it is drawn, what the table says. Looked at by eye: docs/curves.png."""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metrics
import report
from config import UserError
from metrics import linear_axis, log_axis, smoothed, written

ROOT = Path(__file__).resolve().parent.parent


def make_run(folder, n=120, start=3.0, total=None, val=0, **columns):
    """A run whose loss falls from `start` as 1 / step does. columns: step -> more of a line."""
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, n + 1):
            line = {"step": step, "loss": start / step, "lr": 1e-3 * step / n, "grad_norm": 1.0,
                    "accuracy": step / n, "padding": 0.1, "tokens_per_second": 1000.0, "skipped": 0,
                    "start": 0, "total": total or n}
            if val and step % val == 0:
                line |= {"val_loss": 2 * start / step, "val_accuracy": 0.5}
            for name, more in columns.items():
                line[name] = more(step)
            file.write(json.dumps(line) + "\n")
    return folder


def run_of(folder):
    run, = metrics.read_run(folder)
    return run


# -- reading -------------------------------------------------------------------------------------------------

def test_restarts_extensions_checkpoints_and_skipped_steps_are_found(tmp_path):
    folder = make_run(tmp_path / "r", 30, val=10, skipped=lambda step: int(step in (1, 7)),
                      grad_norm=lambda step: None if step in (1, 7) else 2.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["start"] = 0 if line["step"] <= 5 else 5 if line["step"] <= 20 else 20
        line["total"] = 20 if line["step"] <= 20 else 30
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("step-00000010", "step-00000030", "step-1", "unfinished-00000020"):
        (folder / name).mkdir()
    run = run_of(folder)
    assert (run.restarts, run.extended, run.checkpoints, run.skipped) == ([5], [20], [10, 30], [1, 7])
    assert run.columns["val_loss"][0].tolist() == [10, 20, 30] and len(run.columns["grad_norm"][0]) == 28


def test_a_policy_that_trains_on_conversations_has_two_curves(tmp_path):
    def steps(kind):
        return make_run(tmp_path / kind, 6, val=3, loss=lambda step: 1.0 if step % 2 else 0.1)
    folder = steps("both")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line["accuracies"] = [0.5]                          # steps 1, 3 and 5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    robot, talk = metrics.read_run(folder)
    assert (robot.name, talk.name) == ("both robot", "both talk")
    assert [run.columns["loss"][0].tolist() for run in (robot, talk)] == [[1, 3, 5], [2, 4, 6]]
    assert [set(run.columns["loss"][1]) for run in (robot, talk)] == [{1.0}, {0.1}]
    # The held-out episodes are the robot's, whatever the step is after which they were scored.
    assert [run.columns["val_loss"][0].tolist() for run in (robot, talk)] == [[3, 6], []]
    metrics.draw([robot, talk], tmp_path / "a.png")
    assert [name[-11:] for name in metrics.short_names([robot, robot, talk, talk])] == [
        "/both robot"] * 2 + [f"{folder} talk"[-11:]] * 2
    assert metrics.read_run(steps("talk"))[0].name == "talk"


def test_a_run_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    folder = make_run(tmp_path / "r", 5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[]\n{"step": "x"}\n{"loss": 1}\n{"step": 6, "loss": NaN}\n{"step": 7, "loss": 9.5')
    run = run_of(folder)
    assert run.step == 6 and run.columns["loss"][0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", [None, "", "no json\n"])
def test_a_folder_without_a_step_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}: there is no metrics.jsonl with a step in it"):
        run_of(tmp_path)


def test_a_smooth_curve_keeps_a_line_a_constant_and_a_short_run(tmp_path):
    assert smoothed(np.array([3.0, 1.0, 2.0])).tolist() == [3.0, 1.0, 2.0]
    assert smoothed(np.full(999, 0.3)) == pytest.approx(0.3)
    line = smoothed(np.arange(2000.0))                      # away from its ends it lags neither way
    assert line[100:-100] == pytest.approx(np.arange(100.0, 1900.0))
    noisy = np.random.default_rng(0).normal(size=4000)
    assert smoothed(noisy).std() < 0.15


# -- axes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("low, high, want", [
    (0, 10, (0, 10, [0, 2, 4, 6, 8, 10])), (0.31, 2.9, (0, 3, [0, 1, 2, 3])),
    (0, 9.7e-4, (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])), (0, 0, (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1])),
    (2, 2, (1, 3, [1, 1.5, 2, 2.5, 3])), (0, 0.08, (0, 0.08, [0, 0.02, 0.04, 0.06, 0.08]))])
def test_ticks_are_round_and_hold_the_data(low, high, want):
    got = linear_axis(low, high)
    assert got[:2] == pytest.approx(want[:2]) and got[2] == pytest.approx(want[2])


def test_a_log_axis_has_ticks_at_decades_and_between_few_of_them():
    low, high, ticks = log_axis(0.3, 11)
    assert low < 0.3 and high > 11 and ticks == pytest.approx([0.5, 1, 2, 5, 10])
    assert log_axis(1e-6, 1e4)[2] == pytest.approx([10.0 ** d for d in range(-6, 5)], rel=1e-9)


@pytest.mark.parametrize("values, kind, want", [
    ([0, 0.5, 1.0], "number", ["0", "0.5", "1.0"]), ([1.85, 1.9], "number", ["1.85", "1.90"]),
    ([0, 2e-5, 1.5e-5], "number", ["0", "2e-5", "1.5e-5"]), ([0, 1e-3], "number", ["0", "1e-3"]),
    ([0, 500, 1000], "number", ["0", "500", "1000"]), ([0, 5000, 15000], "number", ["0", "5k", "15k"]),
    ([0, 2.5e6], "number", ["0", "2.5M"]), ([0, 0.05, 0.1], "percent", ["0 %", "5 %", "10 %"]),
    ([0.8, 0.825], "percent", ["80.0 %", "82.5 %"]), ([0.5, 2, 10], "log", ["0.5", "2", "10"])])
def test_numbers_are_short_and_differ(values, kind, want):
    assert [written(value, kind, values) for value in values] == want


def axes_of(tmp_path, name, **how):
    run = run_of(make_run(tmp_path / "r", **how))
    panel = next(panel for panel in metrics.PANELS if panel[1] == name)
    return metrics.Axes(metrics.Sheet(500, 300), 0, 0, panel, [run], (1, run.step)), run


def test_a_value_lies_where_the_axis_says(tmp_path):
    axes, _ = axes_of(tmp_path, "tokens_per_second", n=101, tokens_per_second=lambda step: 495.0 + 5 * step)
    assert (axes.low, axes.high, axes.log) == (0, 1000, False)
    places = axes.at([1, 51, 101], [0, 500, 1000]).tolist()
    width, height = axes.x1 - axes.x0, axes.y0 - axes.y1
    assert places == [[axes.x0, axes.y0], [axes.x0 + width / 2, axes.y0 - height / 2], [axes.x1, axes.y1]]
    assert axes.at([1], [1e9])[0, 1] >= axes.y1 - 0.011 * height        # a wild value stays inside


def test_a_loss_that_falls_far_is_drawn_on_a_log_axis(tmp_path):
    axes, _ = axes_of(tmp_path, "loss", n=120, start=11.0)  # from 11 to 0.09
    below, whole = -math.log10(axes.low), math.log10(axes.high) - math.log10(axes.low)
    want = axes.y0 - below / whole * (axes.y0 - axes.y1)    # of log(1) = 0
    assert axes.log and axes.at([1], [1.0])[0, 1] == pytest.approx(want)
    shutil.rmtree(tmp_path / "r")
    assert not axes_of(tmp_path, "loss", n=10)[0].log


def test_one_wild_gradient_does_not_flatten_the_rest(tmp_path):
    axes, _ = axes_of(tmp_path, "grad_norm", n=2000,
                      grad_norm=lambda step: 900.0 if step == 1000 else 1.0 + step % 5)
    assert axes.high <= 30


# -- the picture ---------------------------------------------------------------------------------------------

def has(path, color, box=None):
    """Whether a pixel of the picture has this color. (Edges are mixed with what lies beside them.)"""
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.crop(box) if box else image).reshape(-1, 3).astype(int)
    want = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - want).max(1) <= 8).any())


@pytest.mark.parametrize("n", [1, 2, 3, 40, 5000])
def test_runs_of_any_length_are_drawn(n, tmp_path):
    run = run_of(make_run(tmp_path / "r", n, val=1 if n == 3 else 0))
    metrics.draw([run], tmp_path / "a.png")
    assert has(tmp_path / "a.png", metrics.COLORS[0])
    assert has(tmp_path / "a.png", metrics.HELD_OUT) == (n == 3)
    assert Image.open(tmp_path / "a.png").width == 3 * 400 + 4 * 20
    assert [path.name for path in tmp_path.glob("*.png")] + list(tmp_path.glob(".*")) == ["a.png"]


def test_each_run_has_its_color_in_each_panel_and_in_the_legend(tmp_path):
    runs = [run_of(make_run(tmp_path / f"r{i}", 60 + 20 * i, start=3.0 + i,
                            padding=lambda s, i=i: 0.1 * (i + 1),
                            accuracy=lambda s, i=i: 0.2 + 0.2 * i, grad_norm=lambda s, i=i: 1.0 + i,
                            tokens_per_second=lambda s, i=i: 1000.0 * (i + 1))) for i in range(3)]
    metrics.draw(runs, tmp_path / "a.png")
    head = metrics.legend(None, runs, metrics.short_names(runs), 1280)
    boxes = [(0, 0, 1280, head)] + [(20 + 420 * (i % 3), head + 270 * (i // 3), 420 + 420 * (i % 3),
                                     head + 270 * (i // 3) + 250) for i in range(6)]
    for box in boxes:
        assert all(has(tmp_path / "a.png", metrics.COLORS[i], box) for i in range(3)), box


def test_a_legend_that_is_too_long_for_a_line_goes_on_below(tmp_path):
    runs = [run_of(make_run(tmp_path / f"{'long-name-' * 3}{i}", 3)) for i in range(8)]
    one, many = (metrics.legend(None, some, metrics.short_names(some), 1280) for some in (runs[:1], runs))
    assert many - one == 2 * 22                             # three entries a line


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    runs = [run_of(make_run(tmp_path / folder / "r", 2)) for folder in ("a", "b")]
    names = metrics.short_names(runs)
    assert names[0] != names[1] and names[0].endswith("a/r") and max(map(len, names)) <= 61
    assert metrics.short_names(runs[:1]) == ["r"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.mkdir(),
                                  lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_picture_is_not_written_over(make, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(UserError, match="is no picture that may be written over"):
        metrics.draw([run_of(make_run(tmp_path / "r", 2))], tmp_path / "a.png")


# -- the table and the command -------------------------------------------------------------------------------

def test_the_table_of_a_run_worked_out_by_hand(tmp_path):
    """100 steps: the last 20th are steps 96 to 100. The held-out loss is lowest at step 50."""
    def val_loss(step):
        return {25: 2.0, 50: 0.75, 75: 1.25, 100: 1.5}.get(step)
    run = run_of(make_run(tmp_path / "r", 100, total=200, loss=lambda s: float(s), val_loss=val_loss,
                       tokens_per_second=lambda s: 1000.0 + s, skipped=lambda s: int(s < 3)))
    head, row = metrics.table([run])
    assert head.split() == ["run", "steps", "loss", "held-out", "lowest", "right", "tok/s", "padding",
                            "starts", "skipped"]
    assert row.split() == ["r", "100/200", "98.0000", "1.5000", "0.7500", "@", "50", "98.0%", "1,050",
                           "10.0%", "1", "2"]


def test_the_table_fits_100_columns(tmp_path):
    runs = [run_of(make_run(tmp_path / ("x" * 90 + str(i)), 50, total=1234567, val=10)) for i in range(2)]
    assert all(len(line) <= 100 for line in metrics.table(runs))


def command(*args, **how):
    return subprocess.run([sys.executable, str(ROOT / "metrics.py"), *map(str, args)], capture_output=True,
                          text=True, timeout=60, **how)


def test_the_command_draws_one_run_into_its_folder_and_several_here(tmp_path):
    a, b = make_run(tmp_path / "a", 20), make_run(tmp_path / "b", 30, total=90)
    one = command(a, cwd=tmp_path)
    assert one.returncode == 0 and one.stdout.splitlines()[-1] == f"curves   {a / 'curves.png'}", one.stderr
    assert (a / "curves.png").exists() and not (tmp_path / "curves.png").exists()
    two = command(a, b, cwd=tmp_path)
    assert two.stdout.splitlines()[-1] == "curves   curves.png" and (tmp_path / "curves.png").exists()
    assert re.search(r"^b +30/90", two.stdout, re.MULTILINE)
    assert command(a, b, "--out", tmp_path / "c.png").returncode == 0 and (tmp_path / "c.png").exists()


@pytest.mark.parametrize("flags, said", [
    (["nowhere"], "nowhere: there is no metrics.jsonl"), ([], "required: RUN"),
    (["A", "--out", "a.jpg"], "--out a.jpg: give a name that ends with .png")])
def test_a_wrong_command_is_one_sentence(flags, said, tmp_path):
    run = make_run(tmp_path / "r", 3)
    done = command(*[run if flag == "A" else flag for flag in flags], cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_torch_is_not_needed():
    code = "import sys; sys.modules['torch'] = None; import metrics"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_run_draws_its_curves_at_its_end_and_a_failure_ends_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "r", 5)
    report.draw(run)
    assert f"curves   {run / 'curves.png'}" in capsys.readouterr().out and (run / "curves.png").exists()
    (run / "curves.png").write_text("mine")
    report.draw(run)
    assert "the curves can't be drawn: " in capsys.readouterr().err
