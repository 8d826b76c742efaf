"""evaluate.py and answers.py: what is right, the table by type, the sheet, killed and started again."""
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import evaluate
import forked
import pytest
import torch.distributed as dist
from helpers import world_of_one
from PIL import Image

import checkpoint
from config import BadExample, UserError
from answers import Answers
from generate import Assistant
from evaluate import EvaluateConfig, cell, contact_sheet, other_pictures, question, score, summary
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


def score_of(rows, answers, known=None, data=None, **flags):
    """-> what `score` gives for these answers: results, what could not be scored."""
    assistant = SimpleNamespace(language=SimpleNamespace(captions=False),
                                answer=lambda examples, _: [answers.pop(0) for _ in examples])
    written = []
    cfg = EvaluateConfig(ckpt="x", json="x", batch_size=2, num_workers=0, **flags)
    with world_of_one():
        results, unread = score(assistant, data or Recorded(rows), cfg,
                                SimpleNamespace(known=known or {}, write=written.append))
    assert written == [result for result in results if result["index"] not in (known or {})]
    return results, unread


def scored(*args, **how):
    results, unread = score_of(*args, **how)
    if unread:
        raise unread[0]
    return results


def test_case_outer_spaces_and_a_final_dot_do_not_count_and_nothing_else_is_forgiven():
    results = scored(rows_of(*[{}] * 5), ["A star", " a  STAR. ", "star", "a star, blue", ""])
    assert [result["right"] for result in results] == [True, True, False, False, False]


def test_each_type_has_its_row_under_either_name():
    results = scored(rows_of({"type": "shape", "category": "z"}, {"category": "z"}, {}, {"type": "shape"}),
                     ["a star", "a star", "no", "no"])
    assert summary(results) == {"accuracy": 0.5, "count": 4, "interval": [0.0, 1.0], "by_type": {
        "all": {"accuracy": 0.0, "count": 1, "interval": [0.0, 0.0]},
        "shape": {"accuracy": 0.5, "count": 2, "interval": [0.0, 1.0]},
        "z": {"accuracy": 1.0, "count": 1, "interval": [1.0, 1.0]}}}


def test_a_last_turn_of_the_human_is_no_expected_answer():
    rows = rows_of({})
    rows[0]["conversations"] = rows[0]["conversations"][:1]
    with pytest.raises(UserError, match="the last turn must be the expected answer"):
        scored(rows, ["a star"])


def test_each_metric_scores_the_answers():
    """Of "A star": a half of the letters is not enough for ANLS, the letter names it, 0.3 of ten people."""
    rows = rows_of(*[{}] * 3)
    answers = "a star", "A", "a stir"
    points = {metric: [result["score"] for result in scored(rows, list(answers), metric=metric)]
              for metric in ("exact", "vqa", "anls", "relaxed", "choice")}
    assert points == {"exact": [1, 0, 0], "vqa": [1, 0, 0], "anls": [1, 0, pytest.approx(5 / 6)],
                      "relaxed": [1, 0, 0], "choice": [1, 1, 0]}
    people = [row | {"answers": ["star"] * 9 + ["heart"]} for row in rows[:1]]
    assert scored(people, ["heart"], metric="vqa")[0]["score"] == pytest.approx(0.3)
    assert scored(people, ["heart"])[0]["score"] == 1       # exact: any of the answers


def test_what_a_metric_can_not_score_is_named_before_it_is_answered():
    rows = rows_of({"options": "none"})
    with pytest.raises(BadExample, match="example 0: 'options' must be a list"):
        scored(rows, [], metric="choice")


def test_a_yes_no_set_has_more_numbers():
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    results = scored([{"conversations": turns}] * 2, ["yes", "no"])
    assert summary(results)["yes_no"] == pytest.approx(
        {"accuracy": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3, "yes": 0.5})
    assert "yes_no" not in summary(scored(rows_of({}), ["a star"]))


# -- another example's pictures ------------------------------------------------------------------------------

class WithPictures(Recorded):
    path = "d.json"

    def __init__(self, names):
        super().__init__([row | {"image": name} for row, name in zip(rows_of(*[{}] * len(names)), names)])
        self.pictures = SimpleNamespace(tensors=lambda names, i: [f"pixels of {name}" for name in names])


def test_each_question_gets_the_pictures_of_another(capsys):
    names = ["a", "a", "b", ["a", "b"], ["b", "a"], "c", [], ["a", "b"]]
    data, seen = WithPictures(names), {}
    shown = other_pictures(data, list(range(8)))
    assert sorted(shown) == [0, 1, 2, 3, 4, 5, 7]
    for i, j in shown.items():
        mine, other = ([names[k]] if isinstance(names[k], str) else names[k] for k in (i, j))
        assert len(mine) == len(other) and mine != other, (i, j)
        seen[i] = question(data, "exact", shown, i)["images"]
        assert seen[i] == [f"pixels of {name}" for name in other]
    assert question(data, "exact", shown, 6)["images"] == []
    assert other_pictures(data, list(range(8))) == shown    # the same each time
    results = scored(data.rows, ["x"] * 8, data=data, shuffle_images=True)
    assert [result.get("pictures_of") for result in results] == [shown.get(i) for i in range(8)]


def test_an_example_whose_pictures_are_no_names_is_no_reason_to_stop():
    """It is named when it is asked, as without shuffling."""
    data = WithPictures(["a", "b", {"file": "c"}])
    assert other_pictures(data, [0, 1, 2]) == {0: 1, 1: 0}


def test_where_there_are_no_other_pictures_shuffling_is_refused():
    with pytest.raises(UserError, match="needs other pictures, but all examples with 1 have the same"):
        other_pictures(WithPictures(["a", "a", ["b", "c"], ["c", "b"]]), [0, 1, 2, 3])
    with pytest.raises(UserError, match="exclude each other"):
        EvaluateConfig(ckpt="x", json="x", blank_images=True, shuffle_images=True)


# -- killed, and started again -------------------------------------------------------------------------------

def test_answers_that_are_there_are_not_asked_again():
    rows = rows_of({}, {}, {})
    results = scored(rows, ["wrong"], known={0: "a star", 2: "A star."})
    assert [result["answer"] for result in results] == ["a star", "wrong", "A star."]
    assert [result["right"] for result in results] == [True, False, True]


def test_an_answer_that_another_metric_can_not_score_is_left_out_and_named():
    rows = rows_of({"options": "none"}, {"options": ["a star", "a dog"]})
    results, unread = score_of(rows, [], known={0: "a star", 1: "a star"}, metric="choice")
    assert [(result["index"], result["score"]) for result in results] == [(1, 1.0)]
    assert [str(each) for each in unread] == ["example 0: 'options' must be a list of at most 26 texts, "
                                              "found 'none'"]


def begun(out, asked, *rows):
    """A file of answers as a killed evaluation leaves it."""
    with world_of_one():
        answers = Answers(out, asked)
    for row in rows:
        answers.write(row)
    answers.file.close()
    return answers


def test_an_evaluation_takes_over_what_a_killed_one_has_answered(tmp_path, capsys):
    out, asked = tmp_path / "s.json", {"weights": "w", "flag": False}
    first = begun(out, asked, {"index": 3, "answer": "a"}, {"index": 1, "answer": "b"})
    with open(first.path, "a") as file:
        file.write('{"index": 2, "answ')                    # killed in the middle of a line
    second = begun(out, asked, {"index": 5, "answer": "c"})
    assert first.known == {} and second.known == {3: "a", 1: "b"}
    assert "2 answers are there from before" in capsys.readouterr().out
    with world_of_one():
        third = Answers(out, asked)
        assert third.known == {3: "a", 1: "b", 5: "c"}
        third.remove()
    assert not list(tmp_path.iterdir())                     # of all three


def test_answers_to_other_questions_are_left_alone(tmp_path, capsys):
    """Other weights, examples or flags; another evaluation's file; no file of answers at all."""
    out = tmp_path / "s.json"
    other = begun(out, {"weights": "other"}, {"index": 3, "answer": "a"})
    (tmp_path / "s.unfinished-notes.jsonl").write_text("my notes")
    begun(tmp_path / "t.json", {"weights": "w"}, {"index": 3, "answer": "a"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with world_of_one():
        answers = Answers(out, {"weights": "w"})
        assert answers.known == {} and answers.path != other.path
        answers.remove()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert capsys.readouterr().out.count("is of other weights, examples or flags, and is left as it is") == 2


def test_two_evaluations_into_one_file_at_once_are_refused(tmp_path):
    (tmp_path / "begin.py").write_text(
        f"import sys, pathlib; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        "import config, ranks; from answers import Answers; from helpers import *\n"
        "with world_of_one():\n    held = Answers(pathlib.Path(sys.argv[1]), {})\n"
        "    print('there', flush=True); sys.stdin.read()\n")
    command = forked.forked([sys.executable, str(tmp_path / "begin.py"), str(tmp_path / "s.json")])
    other = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "there\n"
    with pytest.raises(UserError, match="s.unfinished.jsonl is being written by another evaluation"):
        begun(tmp_path / "s.json", {})
    other.communicate()                                     # it ends with its input
    assert begun(tmp_path / "s.json", {}).known == {}


def test_two_ranks_score_as_one_process_does_and_in_the_same_order(world, tmp_path):  # noqa: F811
    """At the end of a run of two ranks one process scores; then two do, each every second example."""
    file, images, out = str(world / "val.json"), str(world / "images"), tmp_path / "two.json"
    _, run, printed = run_train(world, tmp_path, "--max_steps", "1", "--val_json", file, ranks=2)
    done = forked.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
         "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "evaluate.py", "--ckpt", str(run),
         "--json", file, "--image_dir", images, "--out", str(out), "--batch_size", "3"])
    assert done.returncode == 0 and done.stdout.count("all together") == 1, done.stderr
    one, two = (json.loads(path.read_text()) for path in (run / "val.json", out))
    assert one == two and [row["index"] for row in two["answers"]] == list(range(12))
    assert not list(tmp_path.glob("*unfinished*"))


def test_answers_are_kept_where_a_picture_is_missing_and_it_alone_is_asked_later(
        world, tmp_path, monkeypatch, capsys):  # noqa: F811
    _, run, _ = run_train(world, tmp_path, "--max_steps", "1")
    rows = [row for row in json.loads((world / "val.json").read_text()) if isinstance(row.get("image"), str)]
    (tmp_path / "v.json").write_text(json.dumps(rows[:3]))
    shutil.copytree(world / "images", tmp_path / "images")
    lost = tmp_path / "images" / rows[1]["image"]
    lost.rename(tmp_path / "lost")
    monkeypatch.chdir(ROOT)
    cfg = EvaluateConfig(ckpt=str(run), json=str(tmp_path / "v.json"), image_dir=str(tmp_path / "images"),
                         out=str(tmp_path / "s.json"), num_workers=0)
    def and_then_the_run_saves_another_step(*how):
        later = shutil.copytree(run / "step-00000001", run / "step-00000002")
        state = json.loads((later / "state.json").read_text())
        (later / "state.json").write_text(json.dumps(state | {"step": 2}))
        return Assistant(*how)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Assistant", and_then_the_run_saves_another_step)
        with pytest.raises(UserError, match="1 examples could not be scored .*asks for these alone"):
            evaluate.main(cfg)
    dist.destroy_process_group()
    asked = json.loads((tmp_path / "s.unfinished.jsonl").read_text().split("\n")[0])["asked"]
    assert asked["weights"][0] == str(run / "step-00000001")            # that is what has answered
    shutil.rmtree(run / "step-00000002")
    assert json.loads((tmp_path / "s.json").read_text())["count"] == 2
    with pytest.raises(UserError, match="1 examples could not be scored"):      # still; nothing new is kept
        evaluate.main(cfg)
    dist.destroy_process_group()
    assert [path.name for path in tmp_path.glob("*unfinished*")] == ["s.unfinished.jsonl"]
    checkpoint.keep_forever(run / "step-00000001")          # changes no answer
    (tmp_path / "lost").rename(lost)
    evaluate.main(cfg)
    dist.destroy_process_group()
    assert "2 answers are there from before" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["count"] == 3
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_killed_evaluation_goes_on_and_gives_the_same_scores(world, tmp_path):  # noqa: F811
    """A real one, killed with SIGKILL while it answers; it goes on in other batches."""
    _, run, _ = run_train(world, tmp_path, "--max_steps", "1")
    command = [sys.executable, "evaluate.py", "--ckpt", str(run), "--json", str(world / "val.json"),
               "--image_dir", str(world / "images"), "--num_workers", "0"]
    whole = forked.run([*command, "--out", str(tmp_path / "whole.json")])
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed.json"
    first = subprocess.Popen([*command, "--out", str(out), "--batch_size", "1"], cwd=ROOT,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    so_far = tmp_path / "killed.unfinished.jsonl"
    while not (so_far.exists() and so_far.read_text().count("\n") > 3):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = so_far.read_text().count("\n") - 1
    assert 3 <= done < 12 and not out.exists()
    again = forked.run([*command, "--out", str(out), "--batch_size", "5"])
    assert again.returncode == 0 and f"{done} answers are there from before" in again.stdout, again.stderr
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
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


def test_a_long_answer_leaves_room_for_the_expected_one():
    result = {"index": 0, "type": "all", "question": ASK, "expected": "yes " * 30, "answer": "no " * 40,
              "right": False}
    answer = "no " * 16 + "n…"                              # 50 letters, the expected one alike
    assert cell(result, Recorded(rows_of({})), False)[2] == f"{answer}\n(expected: {'yes ' * 12}y…)"
