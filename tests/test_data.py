"""data.py: batches, lengths, caches, files, workers."""
import gc
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROWS, dataset, every_kind, language, opened, picture, talk, transform

from config import BadExample, UserError
from data import collate
from prompts import IGNORE, IMAGE, Language


# -- a batch -------------------------------------------------------------------------------------------------

def test_a_batch_has_the_promised_shapes_and_is_padded_on_the_right(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    two = [transform(), transform(size=32, patch_size=16)]  # two backbones, the same number of patches
    examples = [dataset(tmp_path, ROWS, language(), two)[i] for i in (3, 1, 5)]
    batch, longest = collate(examples), max(len(example["input_ids"]) for example in examples)
    assert all(batch[name].shape == (3, longest) for name in ("input_ids", "labels", "attention_mask"))
    assert [tuple(views.shape) for views in batch["pixel_values"]] == [(4, 3, 16, 16), (4, 3, 32, 32)]
    assert batch["ids"] == ["3", "1", "5"]                  # examples without an id are called by their place
    for i, example in enumerate(examples):
        n = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], example["input_ids"])
        assert torch.equal(batch["labels"][i, :n], example["labels"])
        assert (batch["labels"][i, n:] == IGNORE).all() and (batch["input_ids"][i, n:] != IMAGE).all()
        assert batch["attention_mask"][i].tolist() == [True] * n + [False] * (longest - n)


def test_a_batch_says_where_its_patches_stand_and_where_something_is_learned():
    """Counted over the whole batch, row behind row. Learned is where the next token is supervised."""
    rows = [([1, IMAGE, IMAGE, 7, 8], [IGNORE, IGNORE, IGNORE, IGNORE, 8]), ([7, 8, 9], [7, IGNORE, 9]),
            ([IMAGE, IMAGE, 7, 8], [IGNORE, IGNORE, 7, 8])]
    batch = collate([{"id": "", "source": "", "replaced": 0, "images": [], "input_ids": torch.tensor(ids),
                      "labels": torch.tensor(labels)} for ids, labels in rows])
    patches, learned = batch["places"]
    assert patches.tolist() == [1, 2, 10, 11]
    assert learned.tolist() == [3, 6, 11, 12]               # row 1 begins with a label: nobody predicts it


def test_pictures_travel_as_bytes(tmp_path):
    picture(tmp_path / "a.png", (255, 0, 7))
    batch = collate([dataset(tmp_path, ROWS, language())[1]])
    assert batch["pixel_values"][0].dtype == torch.uint8
    assert batch["pixel_values"][0][0, :, 0, 0].tolist() == [255, 0, 7]


def test_a_text_only_batch_has_no_pixels(tmp_path):
    assert collate([dataset(tmp_path, ROWS, language())[i] for i in (0, 6)])["pixel_values"] == []


def test_the_mask_keeps_the_end_token_where_pad_is_the_same_id(tmp_path):
    lang = language("smollm", "chatml")
    pad = lang.tokenizer.pad_token_id
    assert pad == lang.tokenizer.eos_token_id == lang.end_id
    batch = collate([dataset(tmp_path, ROWS, lang)[0]])
    assert batch["attention_mask"].all() and batch["input_ids"][0, -1] == pad
    assert not (batch["input_ids"] != pad).all()            # the usual formula would hide it


def test_a_bad_example_comes_in_place_of_its_batch(tmp_path):
    examples = [dataset(tmp_path, ROWS, language())[i] for i in (0, 1)]
    assert isinstance(examples[1], BadExample) and collate(examples) is examples[1]     # there is no a.png


def test_pictures_come_in_the_order_of_their_names(tmp_path):
    for name, color in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        picture(tmp_path / f"{name}.png", color)
    rows = [{"image": list(names), "conversations": talk("<image>" * len(names), "Two.")}
            for names in (("b.png", "a.png"), ("c.png",), ("a.png", "c.png"))]
    batch = collate([dataset(tmp_path, rows, language())[i] for i in range(3)])
    colors = [int(view.float().mean((1, 2)).argmax()) for view in batch["pixel_values"][0]]
    assert colors == [1, 0, 2, 0, 2]


# -- lengths -------------------------------------------------------------------------------------------------

def real_lengths(dataset):
    return [len(dataset.tokens(dataset.row(i))[0]) for i in range(len(dataset))]


@every_kind
def test_a_longer_example_is_cut_at_its_end(kind, tmp_path):
    row = {"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat. " * 100)}
    lang = language(kind)
    whole, labels = dataset(tmp_path, [row], lang, max_length=1000).tokens(row)
    cut = dataset(tmp_path, [row], lang, max_length=40)
    assert len(whole) > 40 and cut.tokens(row) == (whole[:40], labels[:40])
    assert cut.lengths()[0].tolist() == [40]


@every_kind
@pytest.mark.parametrize("captions", [False, True])
def test_lengths_are_those_of_the_real_examples(kind, captions, tmp_path):
    rows = [row for row in ROWS if not captions or row.get("image") == "a.png"]
    rows = [row | {"id": i} for i in range(60) for row in rows]
    rows += [{"image": "a.png", "conversations": talk("<image>" + "What " * n, "A cat. " * n)}
             for n in range(1, 60)]
    whole = dataset(tmp_path, rows, language(kind), max_length=100, captions=captions)
    lengths, has_image = whole.lengths()
    assert lengths.tolist() == real_lengths(whole) and lengths.max() == 100
    assert has_image.tolist() == ["image" in row for row in rows]


def test_lengths_are_right_across_the_chunks_they_are_counted_in(tmp_path):
    rows = [{"conversations": talk("What " * (i % 7), "A cat. " * (i % 5))} for i in range(2003)]
    whole = dataset(tmp_path, rows, language())
    assert whole.lengths()[0].tolist() == real_lengths(whole)


@pytest.fixture
def no_counting(monkeypatch):
    """From its call on, counting tokens fails."""
    def fail(*_):
        raise AssertionError("tokens were counted again")
    return lambda: monkeypatch.setattr(Language, "ids", fail)


def test_lengths_are_counted_once_and_kept(tmp_path, no_counting):
    lang = language()
    before = dataset(tmp_path, ROWS, lang).lengths()
    no_counting()
    after = dataset(tmp_path, ROWS, lang).lengths()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_lengths_that_another_rank_has_counted_are_read(tmp_path, no_counting):
    """All ranks open the file at the same time, then rank zero counts."""
    lang = language()
    ranks = [dataset(tmp_path, ROWS, lang), opened(tmp_path / "d.json", lang)]
    want = ranks[0].lengths()[0].tolist()
    no_counting()
    assert ranks[1].lengths()[0].tolist() == want


OTHER_TEXT = [{"conversations": talk("What is it?", "A  cat")}, *ROWS[1:4]]     # as many bytes as before


@pytest.mark.parametrize("change", [
    {"rows": OTHER_TEXT}, {"rows": ROWS[3::-1]}, {"lang": language("phi")},
    {"lang": language(add_bos=True)}, {"lang": language(prompt="vicuna")}, {"max_length": 25},
    {"transforms": [transform(size=8)]}, {"captions": True}, {"lang": language("smollm", "chatml")}],
    ids=["text", "order", "tokenizer", "bos", "prompt", "max_length", "patches", "stage", "chat tokenizer"])
def test_kept_lengths_are_never_stale(change, tmp_path):
    rows = ROWS[1:3] if "captions" in change else ROWS[:4]
    base = {"rows": rows, "lang": language(), "max_length": 512}

    def make(rows, lang, **how):
        return dataset(tmp_path, rows, lang, **how)

    make(**base).lengths()
    changed = make(**base | change)
    assert changed.lengths()[0].tolist() == real_lengths(changed)
    assert len(list(tmp_path.glob(".d.json.*.lengths.npy"))) == 2
    again = make(**base)
    assert again.lengths()[0].tolist() == real_lengths(again)


def test_kept_lengths_of_captions_know_their_end_token(tmp_path):
    """It ends a caption, whatever the prompt format: here an end of one token, or a word of several."""
    for eos in ("<|im_end|>", "the very end"):
        lang = language("qwen", "chatml")
        lang.tokenizer.eos_token = eos
        captions = dataset(tmp_path, ROWS[1:3], lang, captions=True)
        assert captions.lengths()[0].tolist() == real_lengths(captions)


def test_kept_lengths_tell_16_patches_and_64_positions_from_1_patch_and_664(tmp_path):
    for size, max_length in ((32, 64), (8, 664)):           # the digits 1664, both times
        one = dataset(tmp_path, ROWS[1:2], language(), [transform(size=size)], max_length=max_length)
        assert one.lengths()[0].tolist() == real_lengths(one)


def private_memory():
    """Bytes that this process alone has written into memory. Pages of a mapped data file are not among them:
    they are the system's, and shared with whoever maps it too."""
    total, ours = 0, True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):               # a mapping's head; its file stands at the end
            ours = not line.endswith((".json", ".npy"))
        elif ours and line.startswith("Private_Dirty:"):
            total += 1024 * int(line.split()[1])
    return total


def grows_by(function):
    """Private bytes that a forked child, as a data worker is one, gets by calling the function."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            gc.disable()                                    # it would write into every object of this process
            private_memory()    # the first look takes 3 to 10 MB itself, the longer pytest has run
            before = private_memory()
            function()
            os.write(start, str(private_memory() - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(start)
    return int(os.read(end, 99))


def test_a_large_file_is_not_kept_in_memory_and_no_worker_copies_it(tmp_path):
    texts = "What is it?", *["A cat."] * 10, "x" * 600
    rows = [{"id": i, "conversations": talk(*texts)} for i in range(20_000)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    assert (tmp_path / "d.json").stat().st_size > 20e6
    data = opened(tmp_path / "d.json", language())
    data.cache = np.column_stack([data.places, np.ones((20_000, 2), np.int64)])     # not counted: it is slow
    data.store.save(data.cache)
    data = opened(tmp_path / "d.json", data.language)
    assert isinstance(data.cache, np.ndarray) and data.places.base is not None      # no list of objects
    assert grows_by(lambda: all(data.row(i) for i in range(len(data)))) < 2e6      # seen: 0.3 MB
    assert grows_by(lambda: all(str(row) for row in rows)) > 12e6   # reading an object writes its count
    assert len(pickle.dumps(data)) < 2e6                            # what a worker gets that is not forked


def test_a_worker_that_is_not_forked_reads_the_same(tmp_path):
    data = dataset(tmp_path, ROWS, language())
    data.lengths()
    other = pickle.loads(pickle.dumps(data))
    assert [other.row(i) for i in range(len(ROWS))] == ROWS
    assert [a.tolist() for a in other.lengths()] == [a.tolist() for a in data.lengths()]


def as_npy(array):
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def wrong(place, value, n=7):
    """Rows of a cache, as they could be, except for one value."""
    starts = np.arange(n) * 2
    rows = np.column_stack([starts, starts + 1, 0 * starts, starts + 1, 0 * starts])
    rows[place] = value
    return rows


WRONG_CACHES = [*(np.zeros(shape, np.int64) for shape in ((7, 4), (0, 5), 7, (7, 5, 1))), np.zeros((7, 5)),
                np.array([["a"] * 5]), wrong((3, 1), 10 ** 9), wrong((3, 0), 0)]


def test_a_broken_file_of_lengths_is_made_again(tmp_path):
    lengths = dataset(tmp_path, ROWS, language()).lengths()[0].tolist()
    kept, = tmp_path.glob(".d.json.*.lengths.npy")
    whole = kept.read_bytes()
    for broken in (b"", whole[:-8], whole[:20], b"nonsense" * 9, *(as_npy(array) for array in WRONG_CACHES)):
        kept.write_bytes(broken)
        assert dataset(tmp_path, ROWS, language()).lengths()[0].tolist() == lengths
        assert kept.read_bytes() == whole


def test_where_lengths_can_not_be_kept_they_are_counted_and_a_line_says_so(tmp_path, capsys):
    """As on a disk that may only be read; here the name of the hidden file would be too long."""
    name = "a" * 235 + ".json"
    want = dataset(tmp_path, ROWS, language()).lengths()[0].tolist()
    assert dataset(tmp_path, ROWS, language(), name=name).lengths()[0].tolist() == want
    said = " ".join(capsys.readouterr().out.split())
    assert "(File name too long); the next start counts again" in said
    assert not list(tmp_path.glob(".aaa*"))


def test_an_object_is_parsed_once_for_examples_in_a_row_and_a_changed_file_is_still_noticed(tmp_path):
    data = dataset(tmp_path, ROWS, language())
    assert data.stored(1)[0] is data.stored(1)[0] and data.stored(1)[0] == ROWS[1]
    assert data.stored(0)[0] == ROWS[0] and data.stored(1)[0] == ROWS[1]
    data.path.write_text(json.dumps([*ROWS, ROWS[0]]))
    with pytest.raises(BadExample, match="was changed since the start"):
        data.stored(1)


def test_a_count_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = [{"conversations": talk("What " * (i % 7), "A cat. " * (i % 5))} for i in range(3500)]
    want = dataset(tmp_path, rows, language(), name="whole.json").lengths()[0].tolist()
    lang = language()
    counting = dataset(tmp_path, rows, lang)
    calls, tokenize = [], Language.piece_ids
    monkeypatch.setattr("lengths.KEEP_EVERY", -1)

    def killed_in_the_third_chunk(self, pieces):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokenize(self, pieces)

    monkeypatch.setattr(Language, "piece_ids", killed_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        counting.lengths()
    assert opened(tmp_path / "d.json", lang).lengths()[0].tolist() == want
    assert len(calls) == 3 + 2                              # of four chunks, two were kept
    assert not list(tmp_path.glob("*.counting.npy"))


def test_in_a_read_only_folder_lengths_are_counted_each_time(tmp_path, monkeypatch):
    def refuse(*_, **__):                                   # not by chmod: root may write everywhere
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "save", refuse)
    for _ in range(2):
        one = dataset(tmp_path, ROWS, language())
        assert one.lengths()[0].tolist() == real_lengths(one)
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


# -- files ---------------------------------------------------------------------------------------------------

def as_lines(rows, end="\n", **how):
    return "".join(json.dumps(row, **how) + end for row in rows)


# str.splitlines would end a line in the middle of this; JSON does not.
SPECIAL = [{"id": 1, "conversations": talk("a\u2028b\u0085c\x0bd", "naïve 猫 🐈")}]
WRITTEN = {"a list": lambda rows: json.dumps(rows),
           "a list of many lines": lambda rows: json.dumps(rows, indent=2),
           "a list with its characters as they are": lambda rows: json.dumps(rows, ensure_ascii=False),
           "lines": lambda rows: as_lines(rows),
           "lines with their characters as they are": lambda rows: as_lines(rows, ensure_ascii=False),
           "lines of Windows, and empty ones": lambda rows: "\r\n" + as_lines(rows, "\r\n\r\n"),
           "no end of line at the end": lambda rows: as_lines(rows).rstrip("\n"),
           "a list behind a byte order mark": lambda rows: "\ufeff" + json.dumps(rows),
           "lines behind a byte order mark": lambda rows: "\ufeff" + as_lines(rows)}


@pytest.mark.parametrize("how", WRITTEN)
def test_json_and_json_lines_give_the_same_rows(how, tmp_path):
    rows = ROWS + SPECIAL
    (tmp_path / "d.json").write_bytes(WRITTEN[how](rows).encode())
    for _ in range(2):                                      # counted, then from what was kept
        read = opened(tmp_path / "d.json", language())
        assert [read.row(i) for i in range(len(read))] == rows
        assert read.lengths()[0].tolist() == real_lengths(read)


@pytest.mark.parametrize("change", [
    lambda file: file.write_bytes(file.read_bytes()[:40]), lambda file: file.unlink(),
    lambda file: file.write_text(file.read_text().replace("cat", "dog"))], ids=["cut", "gone", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_named(change, tmp_path):
    """A mapped file that is cut would kill the process with SIGBUS."""
    data = dataset(tmp_path, ROWS[:1], language())
    assert not isinstance(data[0], BadExample)
    change(tmp_path / "d.json")
    os.utime(tmp_path, (0, 0))
    assert isinstance(data[0], BadExample)
    assert re.match(f"{tmp_path / 'd.json'} (was changed since the start|can't be read now)", str(data[0]))


def test_a_pipe_is_no_file_of_examples(tmp_path):
    os.mkfifo(tmp_path / "d.json")
    with pytest.raises(UserError, match="d.json does not exist, or is no file"):
        opened(tmp_path / "d.json", language())
