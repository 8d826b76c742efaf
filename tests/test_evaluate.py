"""evaluate.py: what counts as right, the table by type, the sheet that people look at."""
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import world_of_one
from PIL import Image

from config import BadExample, UserError
from evaluate import EvaluateConfig, contact_sheet, score, summary
from test_train import ROOT, run_train, world  # noqa: F401

ASK = "<image>\nWhich is shown?\nA. a star\nB. a heart"


class Recorded:
    """Rows of a JSON file, without pictures; an example of them is never looked at."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def question(self, i):
        return {"images": []}

    def row(self, i):
        return self.rows[i]

    def named(self, i, what):
        return BadExample(f"example {i}: {what}")


def rows_of(*types):
    turns = [{"from": "human", "value": ASK}, {"from": "gpt", "value": "A star"}]
    return [kind | {"conversations": turns} for kind in types]


def scored(rows, answers):
    assistant = SimpleNamespace(language=SimpleNamespace(captions=False),
                                answer=lambda examples, _: [answers.pop(0) for _ in examples])
    written = io.StringIO()
    cfg = EvaluateConfig(ckpt="x", json="x", batch_size=2, num_workers=0)
    with world_of_one():
        results, unread = score(assistant, Recorded(rows), cfg, written)
    assert [json.loads(line) for line in written.getvalue().splitlines()] == results
    if unread:
        raise unread[0]
    return results


def test_case_outer_spaces_and_a_final_dot_do_not_count_and_nothing_else_is_forgiven():
    results = scored(rows_of(*[{}] * 5), ["A star", " a  STAR. ", "star", "a star, blue", ""])
    assert [result["right"] for result in results] == [True, True, False, False, False]


def test_each_type_has_its_row_under_either_name():
    results = scored(rows_of({"type": "shape", "category": "z"}, {"category": "z"}, {}, {"type": "shape"}),
                     ["a star", "a star", "no", "no"])
    assert summary(results) == {"accuracy": 0.5, "count": 4, "by_type": {
        "all": {"accuracy": 0.0, "count": 1}, "shape": {"accuracy": 0.5, "count": 2},
        "z": {"accuracy": 1.0, "count": 1}}}


def test_a_last_turn_of_the_human_is_no_expected_answer():
    rows = rows_of({})
    rows[0]["conversations"] = rows[0]["conversations"][:1]
    with pytest.raises(UserError, match="the last turn must be the expected answer"):
        scored(rows, ["a star"])


def test_two_ranks_score_as_one_process_does_and_in_the_same_order(world, tmp_path):  # noqa: F811
    """At the end of a run of two ranks one process scores; then two do, each every second example."""
    file, images, out = str(world / "val.json"), str(world / "images"), tmp_path / "two.json"
    _, run, printed = run_train(world, tmp_path, "--max_steps", "1", "--val_json", file, ranks=2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
         "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "evaluate.py", "--ckpt", str(run),
         "--json", file, "--image_dir", images, "--out", str(out), "--batch_size", "3"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("all together") == 1, done.stderr
    one, two = (json.loads(path.read_text()) for path in (run / "val.json", out))
    assert one == two and [row["index"] for row in two["answers"]] == list(range(12))
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("answer, right, color", [
    ("", True, ""), ("yes", True, "green"), ("no", False, "red")])
def test_on_the_sheet_only_the_answer_has_a_color(tmp_path, answer, right, color):
    """Of a question of several lines, too."""
    result = {"index": 0, "type": "all", "question": ASK, "expected": "yes", "answer": answer, "right": right}
    contact_sheet([result], Recorded(rows_of({})), tmp_path / "sheet.png")
    red, green, blue = np.array(Image.open(tmp_path / "sheet.png"), dtype=int).reshape(-1, 3).T
    assert (green > np.maximum(red, blue) + 20).any() == (color == "green")
    assert (red > np.maximum(green, blue) + 20).any() == (color == "red")
