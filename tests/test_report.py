"""report.py: what a person reads, on a terminal and in a log file."""
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import report
from report import columns_of, progress, wrapped

LINE = {"step": 120, "loss": 2.4131, "lr": 9.7e-4, "grad_norm": 0.817, "tokens_per_second": 11234.5,
        "data_wait": 0.041, "mfu": 0.382, "peak_memory_gb": 61.24, "seconds_left": 6420.0}


@pytest.mark.parametrize("change, said", [
    ({}, "loss 2.413, lr 9.7e-04, norm 0.82, 11.2k tok/s, data 4%, mfu 38%, 61.2 GB, 1h47 left"),
    ({"mfu": None, "seconds_left": 65.9, "tokens_per_second": 987.6, "val_loss": 2.5},
     "loss 2.413, val 2.500, lr 9.7e-04, norm 0.82, 988 tok/s, data 4%, 61.2 GB, 1m05 left"),
    ({"mfu": None, "peak_memory_gb": None, "seconds_left": None, "grad_norm": None},
     "loss 2.413, lr 9.7e-04, skipped, 11.2k tok/s, data 4%")])
def test_a_person_reads_on_one_line_how_it_goes(change, said):
    assert progress(LINE | change, "align") == f"align, {said}"


def test_a_line_that_is_too_long_leaves_out_what_matters_least():
    start, long = "full-finetune 105198/105198 100%", LINE | {"val_loss": 2.5, "grad_norm": 1234.5}
    assert progress(long, start) == f"{start}, loss 2.413, val 2.500, lr 9.7e-04, 11.2k tok/s, 1h47 left"
    assert progress(long, start, columns=60) == f"{start}, loss 2.413, val 2.500"
    for columns in range(56, 140):
        assert len(progress(long, start, columns)) <= columns


def told(monkeypatch, steps, seconds, terminal=False):
    """What Progress writes to stderr for these steps of 40, each `seconds` after the other."""
    out, now = io.StringIO(), [1000.0]
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report.dist, "get_rank", lambda: 0)
    with report.Progress(SimpleNamespace(stage="align", tracker="", run_folder=Path("nowhere")), 40) as shown:
        for step, more in steps.items():
            shown.show(LINE | {"step": step} | more)
            now[0] += seconds
    return out.getvalue()


def test_a_log_file_gets_a_line_now_and_then(monkeypatch):
    steps = {step: {"val_loss": 3.0} if step == 7 else {} for step in range(1, 41)}
    lines = told(monkeypatch, steps, seconds=3).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "align 1/40 2%", "align 7/40 18%", "align 17/40 42%", "align 27/40 68%", "align 37/40 92%",
        "align 40/40 100%"]
    assert all(len(line) <= 100 for line in lines)
    assert ["val 3.000" in line for line in lines] == [False] + [True] * 5      # the last one known


def test_on_a_terminal_one_line_is_written_over(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    text = told(monkeypatch, {1: {}, 2: {}, 3: {}, 40: {}}, seconds=0.06, terminal=True)
    rest = "loss 2.413, 11.2k tok/s"
    assert text == (f"\ralign 1/40 2%, {rest}, 1h47 left\x1b[K\ralign 3/40 8%, {rest}, 1h47 left\x1b[K"
                    "\ralign 40/40 100%, loss 2.413, 1h47 left\x1b[K\n")
    assert told(monkeypatch, {}, 1, terminal=True) == ""    # a run that is finished


def test_text_is_wrapped_at_100_columns():
    text = "batch    " + "word " * 40
    lines = wrapped(text)
    assert [len(line) for line in lines] == [98, 98, 28]
    assert all(line.startswith(" " * 9) for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == text.strip()
    assert wrapped("x" * 250) == ["x" * 100, " " * 9 + "x" * 91, " " * 9 + "x" * 59]
    assert wrapped("short") == ["short"]


def test_chinese_takes_two_columns_a_character():
    assert columns_of("猫 is é e\u0301") == 9
    lines = wrapped("sample 0 " + "红色的圆在左上角。" * 20)
    assert [columns_of(line) for line in lines] == [99, 99, 99, 99]     # 9 columns, 45 characters
    assert "".join(line.strip() for line in lines) == "sample 0 " + "红色的圆在左上角。" * 20


@pytest.mark.parametrize("lines, said", [([], None), ([{"step": 1}], None),
                                         ([{"step": 1, "total": 9}, {"step": 2, "total": 20}], 20)])
def test_how_long_the_run_was_is_read_from_its_last_line(lines, said, tmp_path):
    assert report.last_total(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.last_total(tmp_path) == said
