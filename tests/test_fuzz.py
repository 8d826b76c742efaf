"""Random damage to everything that is read. Each try ends in a good result or in one sentence for the user.

`python -m pytest tests/test_fuzz.py --fuzz 20000` makes so many tries for each reader instead of 200.
"""
import dataclasses
import io
import json
import random
import shutil
import typing

import numpy as np
import pytest
import torch
from helpers import language, opened, picture, talk
from PIL import Image
from torch import nn

import checkpoint
import config
from config import BadExample, UserError
from images import FORMATS, read_image
from model import VLM, make_projector


@pytest.fixture
def tries(request):
    """(number, random generator) of each try; the number alone gives the same damage again."""
    return [(i, random.Random(i)) for i in range(request.config.getoption("--fuzz"))]


def damaged(data, rng, words=()):
    """Bytes with one to four places changed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + length] = b""
        elif kind == 2:
            data[at:at] = rng.randbytes(length)
        elif kind == 3:
            data[at:at] = data[at:at + length]
        elif kind == 4 and words:
            data[at:at] = rng.choice(words)
        elif kind == 5 and rng.random() < 0.3:
            del data[at:]
        if not data:
            break
    return bytes(data)


ROWS = [{"id": "1", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.")},
        {"id": 2, "conversations": talk("How many?", "Two.", "naïve 猫?", "Yes.")},
        {"image": ["a.png", "a.png"], "type": "two", "conversations": talk("<image><image> Same?", "Yes.")}]
JSON_WORDS = [b"null", b"[", b"]", b"{", b"}", b'"', b",", b":", b"1e999", b"-1", b"NaN", b"true", b"\\ud800",
              b"\x00", b"\xff", b"<image>", b"..", b"/", b'"steps"', b"[" * 2000, b"9" * 5000,
              b"<|endoftext|>"]


def test_a_file_of_examples(tries, tmp_path):
    picture(tmp_path / "a.png")
    lang, good = language(), 0
    written = [json.dumps(ROWS).encode(), "\n".join(json.dumps(row) for row in ROWS).encode()]
    for i, rng in tries:
        (tmp_path / "d.json").write_bytes(damaged(rng.choice(written), rng, JSON_WORDS))
        try:
            data = opened(tmp_path / "d.json", lang)
            examples = [data[j] for j in range(len(data))]
        except UserError as e:
            assert str(tmp_path / "d.json") in str(e), i
            continue
        for example in examples:
            good += isinstance(example, dict)
            assert isinstance(example, (dict, BadExample)), i
            if isinstance(example, BadExample):
                assert str(example).isprintable() and len(str(example)) < 2000, i
    assert good > len(tries) / 10, "the damage is so great that nothing is tested"


def test_pictures(tries, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))
    written, good = [], 0
    for name in FORMATS:
        noise.save(stream := io.BytesIO(), name)
        written.append(stream.getvalue())
    for i, rng in tries:
        (tmp_path / "a.png").write_bytes(damaged(rng.choice(written), rng))
        try:
            assert read_image(tmp_path / "a.png").mode == "RGB", i
            good += 1
        except BadExample as e:
            assert str(tmp_path / "a.png") in str(e), i
    assert good > len(tries) / 10


def test_step_folders(tries, tmp_path):
    torch.manual_seed(0)
    model = VLM(nn.Identity(), make_projector("linear", 8, 16), nn.Identity())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.projector(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    want = {name: tensor.clone() for name, tensor in checkpoint.tensors_of(model, ["projector"]).items()}
    (tmp_path / "r").mkdir()
    saved = checkpoint.save(tmp_path / "r", 1, want, checkpoint.optimizer_tensors(model, optimizer),
                            {"parts": ["projector"]}, keep=1)
    for i, rng in tries:
        run = tmp_path / str(i)
        shutil.copytree(saved, run / saved.name)
        file = run / saved.name / rng.choice(checkpoint.FILES)
        file.write_bytes(damaged(file.read_bytes(), rng, JSON_WORDS))
        fresh = VLM(nn.Identity(), make_projector("linear", 8, 16), nn.Identity())
        try:
            folder = checkpoint.newest(run, aside=True)
            checkpoint.load_weights(fresh, folder)
            checkpoint.load_optimizer(fresh, torch.optim.AdamW(fresh.parameters(), fused=True), folder)
            got = checkpoint.tensors_of(fresh, ["projector"])
            assert all(torch.equal(got[name], want[name]) for name in want), i
        except UserError as e:
            assert str(run) in str(e), i
            assert list(run.iterdir()), "what could not be read is gone"
        shutil.rmtree(run)


def test_the_cache_of_lengths(tries, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(ROWS[1:2] * 7))
    lang = language()
    want = opened(tmp_path / "d.json", lang).lengths()[0].tolist()
    kept, = tmp_path.glob(".d.json.*.lengths.npy")
    whole = kept.read_bytes()
    for i, rng in tries:
        kept.write_bytes(damaged(whole, rng))
        assert opened(tmp_path / "d.json", lang).lengths()[0].tolist() == want, i


VALUES = ["", "0", "1", "-1", "7", "nan", "inf", "1e999", "1e-9", "99999999999999999999", "a", "toy", "align",
          "vla", "finetune", "../x", "/", "a,b", "3,1", "\ud800", "\x1b[31m", "x" * 5000, "True", "llm",
          "projector,llm"]


def test_flags(tries, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, good = [f.name for f in dataclasses.fields(config.Config)], 0
    kinds = typing.get_type_hints(config.Config)
    for i, rng in tries:
        argv = []
        for name in rng.sample(names, rng.randint(1, 3)):
            argv += [f"--{name}"] if kinds[name] is bool else [f"--{name}", rng.choice(VALUES)]
        try:
            config.parse(config.Config, argv)
            good += 1
        except SystemExit as e:
            last = capsys.readouterr().err.splitlines()[-1]
            assert e.code == 2 and ": error: " in last and last.isprintable() and len(last) < 2000, (i, argv)
    assert good > len(tries) / 20
