"""examples/parquet_to_llava.py: the two layouts, with real parquet files."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as pq  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from parquet_to_llava import ParquetConfig, main  # noqa: E402

from archives import Archive  # noqa: E402


def picture(color, kind="PNG"):
    Image.new("RGB", (6, 4), color).save(out := io.BytesIO(), kind)
    return {"bytes": out.getvalue(), "path": "whatever.bin"}


def said(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


RED, GREEN, BLUE = picture("red"), picture("green", "JPEG"), picture("blue", "WEBP")
ONEVISION = [{"id": "x1", "image": RED, "data_source": "colors",
              "conversations": said("<image>\nWhat?", "Red.")},
             {"id": "x2", "image": None, "data_source": "texts",
              "conversations": said("2 + 2?", "4", "猫?", "Cat.")},
             {"id": "x3", "image": GREEN, "data_source": "colors", "conversations": said("What?", "Green.")}]
CAULDRON = [{"images": [RED, BLUE], "texts": [{"user": "Same?", "assistant": "No.", "source": "pairs"},
                                              {"user": "Sure?", "assistant": "Yes.", "source": "pairs"}]},
            {"images": [BLUE], "texts": [{"user": "What?", "assistant": "Blue.", "source": "one"}]}]


def write(path, rows, **how):
    pq.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return str(path)


def converted(tmp_path, *files, **flags):
    main(ParquetConfig(parquet=files, out=str(tmp_path / "out"), **flags))
    lines = (tmp_path / "out" / "train.json").read_text().splitlines()
    return [json.loads(line) for line in lines], Archive(tmp_path / "out" / "images.tar")


def test_the_layout_of_llava_onevision(tmp_path, capsys):
    rows, pictures = converted(tmp_path, write(tmp_path / "a.parquet", ONEVISION[:2]),
                               write(tmp_path / "b.parquet", ONEVISION[2:]))
    assert rows == [
        {"id": "x1", "image": "00000/00000000-0.png", "conversations": said("<image>\nWhat?", "Red."),
         "category": "colors"},
        {"id": "x2", "conversations": said("2 + 2?", "4", "猫?", "Cat."), "category": "texts"},
        {"id": "x3", "image": "00001/00000000-0.jpg", "conversations": said("<image>\nWhat?", "Green."),
         "category": "colors"}]
    assert pictures.open(rows[0]["image"]).read_bytes() == RED["bytes"]             # not a byte is changed
    assert pictures.open(rows[2]["image"]).read_bytes() == GREEN["bytes"] and len(pictures) == 2
    assert "3 examples, 2 pictures" in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.parquet", "b.parquet", "out"]


def test_the_layout_of_the_cauldron(tmp_path):
    rows, pictures = converted(tmp_path, write(tmp_path / "c.parquet", CAULDRON))
    assert rows == [
        {"id": "c-0", "image": ["00000/00000000-0.png", "00000/00000000-1.webp"], "category": "pairs",
         "conversations": said("<image>\n<image>\nSame?", "No.", "Sure?", "Yes.")},
        {"id": "c-1", "image": "00000/00000001-0.webp", "category": "one",
         "conversations": said("<image>\nWhat?", "Blue.")}]
    assert [pictures.open(name).read_bytes() for name in rows[0]["image"]] == [RED["bytes"], BLUE["bytes"]]


def changed(row, **fields):
    return {"id": "bad", **row, **fields}


BAD = {"no bytes": (changed(ONEVISION[0], image={"bytes": None, "path": "a.png"}),
                    "picture 0 has no 'bytes', only the path 'a.png'"),
       "no picture": (changed(ONEVISION[0], image={"bytes": b"<html>", "path": "a.png"}),
                      "picture 0 is of no known format; its 'bytes' begin b'<html>'"),
       "tags": (changed(ONEVISION[0], conversations=said("<image><image>?", "No.")),
                "it has 1 pictures, but 2 <image> tags"),
       "a tag without picture": (changed(ONEVISION[1], conversations=said("<image>?", "No.")),
                                 "it has 0 pictures, but 1 <image> tags"),
       "order": (changed(ONEVISION[0], conversations=said("?", "No.")[::-1]),
                 "'conversations[0].value' must be from 'human', found 'gpt'"),
       "a text": (changed(ONEVISION[0], conversations=[{"from": "human", "value": None}]),
                  "'conversations[0].value' must be a text, found 'None'"),
       "no turn": (changed(ONEVISION[0], conversations=[*said("?", "No."), None]),
                   "'conversations[2]' must be a turn, found 'None'"),
       "a reply": (changed(ONEVISION[0], conversations=said("?", "<image>")),
                   "'conversations[1].value' is a reply and contains <image>"),
       "empty": (changed(ONEVISION[0], conversations=[]), "'conversations' is empty")}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_nothing_is_left(kind, tmp_path):
    row, what = BAD[kind]
    file = write(tmp_path / "a.parquet", [ONEVISION[0], row])
    with pytest.raises(UserError) as e:
        converted(tmp_path, file)
    assert str(e.value).startswith(f"{file}, row 1 (id {row['id']!r}): {what}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_bad_rows_can_be_left_out(tmp_path, capsys):
    rows, pictures = converted(tmp_path, write(tmp_path / "a.parquet", [BAD["tags"][0], *ONEVISION]),
                               skip_bad_rows=True)
    assert [row["id"] for row in rows] == ["x1", "x2", "x3"] and len(pictures) == 2
    assert f"left out 1 rows, first: {tmp_path / 'a.parquet'}, row 0" in capsys.readouterr().out


def test_files_that_are_none_of_the_two_layouts_are_named(tmp_path):
    other = write(tmp_path / "o.parquet", [{"question": "?", "picture": b""}])
    with pytest.raises(UserError, match="o.parquet has the columns picture, question; expected image and"):
        converted(tmp_path, other)
    whole = Path(write(tmp_path / "a.parquet", ONEVISION)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="cut.parquet can't be read as a parquet file"):
        converted(tmp_path, str(tmp_path / "cut.parquet"))
    with pytest.raises(UserError, match="out exists. Move it away"):
        (tmp_path / "out").mkdir()
        converted(tmp_path, other)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """300 pictures of 1 MB in one row group. Of its own process, the most it ever had."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 10 ** 6), np.uint8)
    rows = [{"id": str(i), "image": {"bytes": RED["bytes"] + noise[i].tobytes(), "path": None},
             "conversations": said("What?", "Red.")} for i in range(300)]
    write(tmp_path / "large.parquet", rows, compression="none")
    script = ("import sys, resource\nsys.path.insert(0, 'examples')\n"
              "import pyarrow.parquet, checkpoint\nfrom parquet_to_llava import *\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "main(ParquetConfig(parquet=(sys.argv[1],), out=sys.argv[2]))\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n")
    files = [str(tmp_path / name) for name in ("large.parquet", "out")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 150_000, "KB"        # of 300 MB
