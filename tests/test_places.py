"""places.py: where examples stand in a file that is read in blocks."""
import json
import random
import tracemalloc

import numpy as np
import pytest
from helpers import ROWS

import places
from config import BadExample, UserError

SPECIAL = {"id": 1, "conversations": [{"from": "human", "value": "naïve 猫 🐈\u2028]}, {"}]}
FILES = {"a list": json.dumps([*ROWS, SPECIAL]), "a list of many lines": json.dumps(ROWS, indent=3),
         "lines": "\n".join(json.dumps(row) for row in [*ROWS, SPECIAL]),
         "its characters as they are": json.dumps([SPECIAL] * 3, ensure_ascii=False),
         "a byte order mark": "\ufeff \n" + json.dumps(ROWS), "spaces": "  [ \n\n {} \t,\r\n{ } ]  \n\n"}


def found(path, count=lambda row: 1):
    return places.find_examples(path, count).tolist()


@pytest.mark.parametrize("block", [3, 4, 7, 64, 1000])
@pytest.mark.parametrize("how", FILES)
def test_where_a_block_ends_does_not_matter(how, block, tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text(FILES[how])
    whole = found(tmp_path / "d.json")
    raw = (tmp_path / "d.json").read_bytes()
    rows = [json.loads(raw[start:end]) for start, end, _ in whole]
    text = FILES[how].strip("\ufeff \n")
    assert rows == (json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.split("\n")])
    monkeypatch.setattr(places, "BLOCK", block)
    assert found(tmp_path / "d.json") == whole


def test_the_places_of_a_worked_example(tmp_path):
    (tmp_path / "d.json").write_text('[{"a": 1}, {},\n{"é": 2}]')
    assert found(tmp_path / "d.json") == [[1, 9, 0], [11, 13, 0], [15, 24, 0]]      # é has two bytes
    assert found(tmp_path / "d.json", lambda row: 2 * len(row)) == [
        [1, 9, 0], [1, 9, 1], [15, 24, 0], [15, 24, 1]]


WRONG = {   # what stands in the file, in three lines -> the line that is named, what is said
    '[{},\n{},\n{}': (3, "a comma or the end of the list is missing behind example 2"),
    '[{},\n{},\n': (3, "the list does not end; the file was cut off"),
    '[{}\n,{} {}\n]': (2, "a comma or the end of the list is missing behind example 1"),
    '[{}\n,{}]\n{}': (3, "there is more behind the end of the list"),
    '{}\n7\n{}': (2, "example 1 must be an object with 'conversations', found '7'"),
    '{}\n{"a": "b\n{}': (2, "this is no JSON (Invalid control character at)"),
    '{}\n{}\n{"a": tru}': (3, "this is no JSON (Expecting value)"),
    '{}\n{"a": "\udcff"}\n{}': (2, "this is no UTF-8 text"),
    '{}\n{}\n{"a": "\udce7\udc8c': (3, "this is no UTF-8 text")}


@pytest.mark.parametrize("block", [3, 5, 2 ** 24])
@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_its_line(text, block, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "BLOCK", block)
    (tmp_path / "d.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as e:
        found(tmp_path / "d.json")
    line, said = WRONG[text]
    assert str(e.value).startswith(f"{tmp_path / 'd.json'}, line {line}: {said}")


def test_an_object_that_can_not_be_an_example_is_named_with_its_line(tmp_path):
    def count(row):
        raise BadExample("this is an episode")
    (tmp_path / "d.json").write_text("[\n{}]")
    with pytest.raises(UserError, match="line 2: this is an episode. Expected a JSON list"):
        found(tmp_path / "d.json", count)


def test_an_object_without_end_is_not_sought_through_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "BLOCK", 100), monkeypatch.setattr(places, "LONGEST", 1000)
    rows = [json.dumps({"a": "x" * 900})] * 3
    (tmp_path / "d.json").write_text("\n".join(rows))
    assert len(found(tmp_path / "d.json")) == 3             # longer than a block, and not too long
    (tmp_path / "d.json").write_text(rows[0] + '\n{"a": "' + "x" * 10 ** 6)
    with pytest.raises(UserError, match="line 2: this is no JSON .*, or of more than 1,000 bytes"):
        found(tmp_path / "d.json")


def test_damage_gives_the_same_result_in_any_blocks(tmp_path, monkeypatch):
    """A file is read or refused, and for the same reason, wherever its blocks end."""
    rng, path, read = random.Random(0), tmp_path / "d.json", 0
    for _ in range(150):
        raw = bytearray(FILES[rng.choice(list(FILES))].encode())
        for _ in range(rng.randint(0, 2)):
            raw[rng.randrange(len(raw))] = rng.choice(b'{}[],:"\\ \n\xe7x')
        path.write_bytes(raw)
        results = []
        for block in (2 ** 24, rng.randint(3, 50)):
            monkeypatch.setattr(places, "BLOCK", block)
            try:
                results.append(found(path))
            except UserError as e:
                results.append(str(e))
        if "UTF-8" not in results[0]:                       # of two errors, the first block names this one
            assert results[0] == results[1]
        read += isinstance(results[0], list)
    assert 25 < read < 125


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Three numbers of eight bytes for each example, and a few blocks."""
    monkeypatch.setattr(places, "BLOCK", 2 ** 20)
    line = json.dumps({"conversations": "x" * 5000}) + "\n"
    (tmp_path / "d.json").write_text(line * 10_000)         # 50 MB
    tracemalloc.start()
    try:
        rows = places.find_examples(tmp_path / "d.json", lambda row: 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.shape == (10_000, 3) and rows.dtype == np.int64
    assert peak < 6 * places.BLOCK                          # as one text it would take 100 MB
