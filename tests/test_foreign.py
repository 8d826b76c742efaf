"""Nothing foreign runs, nothing foreign is obeyed: folders, pictures and names that somebody else made."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import dataset, language, picture, talk
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import foreign
import model
from config import BadExample, UserError, printable
from images import load_image_transforms, read_image
from prompts import load_language

ROOT = Path(__file__).resolve().parent.parent
SPY = "open({mark!r}, 'w').write('run')\nclass Anything: pass\n"


def with_code(folder, name, settings):
    """A copy of a model folder whose config asks for code of its own, which would leave a mark."""
    shutil.copytree(ROOT / "toy" / name, folder / name)
    (folder / name / "spy.py").write_text(SPY.format(mark=str(folder / "mark")))
    for file, keys in settings.items():
        path = folder / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(folder / name)


AUTO = {f"Auto{kind}": "spy.Anything" for kind in ("Config", "Model", "ModelForCausalLM", "ImageProcessor")}
KINDS = {"a type that nobody knows": {"model_type": "spy", "auto_map": AUTO},
         "a known type": {"auto_map": AUTO}}


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_model_folder_is_never_run(kind, tmp_path, monkeypatch):
    """Nor is anybody asked: transformers would wait on stdin for a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    tokens = {"auto_map": {"AutoTokenizer": ["spy.Anything", None]}}
    llm = with_code(tmp_path, "llm", {"config.json": KINDS[kind], "tokenizer_config.json": tokens})
    pixels = {"auto_map": AUTO}
    vit = with_code(tmp_path, "vit", {"config.json": KINDS[kind], "preprocessor_config.json": pixels})
    for load in (lambda: load_language(llm), lambda: model.load_llm(llm), lambda: model.load_vision(vit),
                 lambda: load_image_transforms(vit, "letterbox")):
        try:
            load()
        except UserError as e:
            assert kind == "a type that nobody knows" and str(tmp_path) in str(e)
    assert not (tmp_path / "mark").exists()


def test_generation_follows_our_flags_not_the_folder(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    theirs = {"repetition_penalty": 1.05, "do_sample": True, "temperature": 0.7, "max_new_tokens": 3,
              "bad_words_ids": [[5]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(theirs))
    ours = model.load_llm(str(tmp_path)).generation_config
    assert ours.repetition_penalty in (None, 1.0) and not ours.do_sample and ours.bad_words_ids is None


@pytest.mark.parametrize("name", ["llm", "vit"])
def test_a_pipe_in_a_model_folder_is_named(name, tmp_path):
    shutil.copytree(ROOT / "toy" / name, tmp_path / name)
    (tmp_path / name / "model.safetensors").unlink()
    os.mkfifo(tmp_path / name / "model.safetensors")
    load = model.load_llm if name == "llm" else model.load_vision
    with pytest.raises(UserError, match="model.safetensors is neither a file nor a folder"):
        load(str(tmp_path / name))


def test_an_offline_hub_id_is_refused_at_once(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    foreign.hub_is_there.cache_clear()
    monkeypatch.setattr(foreign.socket, "create_connection", no_network)
    monkeypatch.setattr(foreign, "getproxies", dict)
    with pytest.raises(UserError, match="--llm_backbone some/model"):
        load_language("some/model")
    foreign.hub_is_there.cache_clear()


def test_a_folder_never_asks_the_hub(monkeypatch):
    monkeypatch.setattr(foreign, "hub_is_there", lambda: pytest.fail("the network was asked"))
    assert foreign.loading_options(str(ROOT / "toy" / "llm"))["local_files_only"] is True


# -- pictures ------------------------------------------------------------------------------------------------

def eps(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def float_tiff(path):
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(path, "tiff")


def int_tiff(path):
    Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4) * 100_000).save(path, "tiff")


PICTURES = {"an EPS": (eps, "cannot identify image file"), "a pipe": (os.mkfifo, "this is no file"),
            "floats": (float_tiff, "its pixels have 32 bits; save it with 8 or 16"),
            "32 bit": (int_tiff, "its pixels have 32 bits; save it with 8 or 16")}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_none_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("another program was started"))
    make, said = PICTURES[kind]
    make(tmp_path / "photo.png")
    with pytest.raises(BadExample, match=f"photo.png can't be read .*{said}"):
        read_image(tmp_path / "photo.png")


# -- what reaches the terminal -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "\x1b[2Jred", "a\nerror: forged", "a\rb", "x" * 10 ** 6, "\u202egnp", "\ud800"])
def test_a_name_from_data_is_escaped_and_cut(name, tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"id": name, "image": name + ".png", "conversations": talk(f"<image>{name[:50]}", "A cat.")}]
    sentence = str(dataset(tmp_path, rows, language())[0])
    assert sentence.isprintable() and len(sentence) < 2000
    assert any(said in sentence for said in ("does not exist", "can't be read", "half a character"))


def test_printable_keeps_the_end_of_a_long_text_and_all_letters():
    assert printable("naïve 猫 🐈") == "naïve 猫 🐈"
    assert printable("\x1b[31m\n") == "\\x1b[31m\\n"
    text = printable("a" * 10 ** 6 + "the end")
    assert len(text) < 1600 and text.startswith("aaa") and text.endswith("the end")


def test_a_tokenizer_that_does_not_fit_its_model_is_named(tmp_path):
    shutil.copytree(ROOT / "toy" / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="ids that the language model has no embedding for .it has 300."):
        load_language(str(tmp_path / "llm")).ids(["red circle, blue star"])
