"""sheets.py, and the sheet that check.py draws with it."""
import json

import numpy as np
import pytest
from helpers import picture, talk
from PIL import Image

import check
import sheets
from config import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(path):
    return np.array(Image.open(path), dtype=int)


def test_each_example_has_its_cell(tmp_path):
    """Six in a row; a picture keeps its proportions; two share a cell."""
    one, two = Image.new("RGB", (10, 10), RED), Image.new("RGB", (10, 10), BLUE)
    sheets.draw([([one], "", "", "black")] * 7 + [([one, two], "", "", "black")], tmp_path / "a.png")
    drawn = pixels(tmp_path / "a.png")
    assert drawn.shape == (500, 1032, 3)
    assert drawn[100, 90].tolist() == drawn[100, 950].tolist() == drawn[350, 90].tolist() == list(RED)
    assert drawn[400, 200].tolist() == list(RED) and drawn[400, 300].tolist() == list(BLUE)
    assert drawn[300, 200].tolist() == drawn[300, 600].tolist() == [255, 255, 255]


def test_long_texts_are_cut_and_stay_in_their_cell(tmp_path):
    words = "a long text of many words " * 40
    sheets.draw([([Image.new("RGB", (9, 9), RED)], words, words, "darkgreen"), ([], "", "", "black"),
                 ([], words, words, "black")], tmp_path / "a.png")
    dark = pixels(tmp_path / "a.png").min(2) < 100
    assert dark[170:245, 6:168].any() and not dark[:, 178:345].any() and dark[:240, 350:].any()
    assert not dark[-4:].any()


def test_a_sheet_replaces_a_sheet_and_nothing_else(tmp_path, capsys):
    cells = [([Image.new("RGB", (9, 9), RED)], "", "", "black")]
    sheets.write(cells, tmp_path / "a.png")
    sheets.write(cells, tmp_path / "a.png")
    (tmp_path / "b.png").write_text("my notes")
    sheets.write(cells, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_text() == "my notes"
    assert "b.png is no picture, so no sheet is drawn over it" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_check_draws_what_the_model_gets(tmp_path, capsys):
    """The toy squashes pictures: a wide one fills its cell. What can't be read is there in red."""
    picture(tmp_path / "wide.png", RED, (60, 20))
    rows = [{"image": "wide.png", "conversations": talk("<image>\nWhat is it?", "A cat.")},
            {"image": "none.png", "conversations": talk("<image>\nWhat is it?", "A cat.")}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    flags = {"file": str(tmp_path / "d.json"), "image_dir": str(tmp_path)}
    assert check.check(check.CheckConfig(**flags, sheet=str(tmp_path / "sheet.png"))) == 1
    drawn = pixels(tmp_path / "sheet.png")
    assert (drawn[10:160, 10:160] == RED).all()
    red, green, blue = drawn[:240, 178:340].reshape(-1, 3).T
    assert (red > np.maximum(green, blue) + 60).sum() > 200
    assert f"pictures {tmp_path / 'sheet.png'}" in capsys.readouterr().out


def test_another_ending_is_refused_before_the_work():
    with pytest.raises(UserError, match="--sheet a.jpg: give a name that ends with .png"):
        check.CheckConfig(file="d.json", sheet="a.jpg")
