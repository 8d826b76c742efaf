"""Bad input gets one sentence: where, what was found, what to do. Odd input that is right is read rightly."""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from helpers import (dataset, make_tokenizer, opened, picture, save_preprocessor, save_vision, square, talk,
                     transform)
from PIL import Image, features
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, Siglip2Config, ViTConfig

import checkpoint
import config
import foreign
import train
from chat import PROMPTS
from check import CheckConfig
from config import BadExample
from data import Conversations
from generate import Assistant
from images import Pictures, load_image_transforms, read_image
from model import VLM, load_vision, make_projector
from prompts import Language, load_language
from sampler import SplitModalitySampler

ONE = talk("<image>\nWhat is it?", "A cat.")
TWO = talk("<image> <image>\nWhat is it?", "A cat.")


def language(kind="gpt2", prompt="plain", **special):
    return Language(make_tokenizer(kind, **special), PROMPTS[prompt])


# -- one example in a file -----------------------------------------------------------------------------------

CONVERSATIONS = """'conversations' must be a list of {"from": "human" | "gpt", "value": TEXT}, found """
IMAGE = "'image' must be a file name or a list of them, found "
VALUE = "must have a text under 'value', found "
EXAMPLES = {    # kind: (the example, what the sentence says, how it is read)
    "no conversations": ({}, CONVERSATIONS + "'None'"),
    "conversations is an object": ({"conversations": {"a": 1}}, CONVERSATIONS + '"{\'a\': 1}"'),
    "conversations is a text": ({"conversations": "What is it?"}, CONVERSATIONS + "'What is it?'"),
    "conversations is empty": ({"conversations": []}, CONVERSATIONS + "'[]'"),
    "a turn is a text": ({"conversations": ["What is it?"]}, f"turn 0 {VALUE}'What is it?'"),
    "a turn is null": ({"conversations": [*talk("a"), None]}, f"turn 1 {VALUE}'None'"),
    "a value is a number": ({"conversations": [{"value": 7}]}, f"""turn 0 {VALUE}"{{'value': 7}}\""""),
    "a value is missing": ({"conversations": [{"from": 1}]}, f"""turn 0 {VALUE}"{{'from': 1}}\""""),
    "an unknown from": ({"conversations": [{"from": "user", "value": "a"}]},
                        "turn 0 must be from 'human', found 'user': human and gpt take turns, human begins"),
    "no from": ({"conversations": [{"value": "a"}]}, "turn 0 must be from 'human', found None"),
    "gpt begins": ({"conversations": talk("a", "b")[::-1]}, "turn 0 must be from 'human', found 'gpt'"),
    "human twice": ({"conversations": talk("a") + talk("b", "c")},
                    "turn 1 must be from 'gpt', found 'human'"),
    "human is last": ({"conversations": talk("a", "b", "c")},
                      "the last turn is from 'human', so its reply is missing. Add it, or drop the turn"),
    "half a character": ({"conversations": talk("a\ud83d", "b")}, "turn 0 holds '\\ud83d', half a character"),
    "image is a number": ({"image": 5, "conversations": ONE}, IMAGE + "'5'"),
    "image is an object": ({"image": {"a": 1}, "conversations": ONE}, IMAGE + '"{\'a\': 1}"'),
    "an image is a number": ({"image": ["a.png", 5], "conversations": TWO}, IMAGE + '"[\'a.png\', 5]"'),
    "no tag": ({"image": "a.png", "conversations": talk("a", "b")},
               "1 pictures under 'image', but 0 <image> tags in the human turns. "
               "There must be one tag for each picture"),
    "one tag too few": ({"image": ["a.png", "a.png"], "conversations": ONE},
                        "2 pictures under 'image', but 1 <image> tags"),
    "one tag too many": ({"image": "a.png", "conversations": TWO},
                         "1 pictures under 'image', but 2 <image> tags"),
    "a tag without a picture": ({"conversations": ONE}, "0 pictures under 'image', but 1 <image> tags"),
    "a tag in a reply": ({"image": "a.png", "conversations": talk("a", "<image>")},
                         "turn 1 is a reply and contains <image>; pictures stand in human turns only"),
    "a tag in a tag": ({"image": "a.png", "conversations": talk("What <ima<image>ge> is it?", "b")},
                       "turn 0 has a tag inside of a tag, 'What <ima<image>ge> is it?'. Remove it"),
    "align, two pictures": ({"image": ["a.png", "a.png"], "conversations": TWO},
                            "stage align needs exactly one picture per example, found 2",
                            {"captions": True}),
    "align, text only": ({"conversations": talk("a", "b")},
                         "stage align needs exactly one picture per example, found 0",
                         {"captions": True}),
    "align, no caption": ({"image": "a.png", "conversations": ONE[:1]},
                          "there is no token to learn in it. Add a reply, or drop the example",
                          {"captions": True}),
    "nothing left to learn": ({"conversations": talk("a" * 50, "b")},
                              "no token to learn is left after cutting 58 positions to --max_length 20. "
                              "Raise --max_length, or drop the example", {"max_length": 20}),
    "a picture is cut": ({"image": ["a.png"] * 2,
                          "conversations": talk("<image>" + "a" * 20 + "<image>", "b")},
                         "it takes 37 positions, and cutting it to --max_length 30 would cut a picture "
                         "(4 positions each). Raise --max_length or drop the example", {"max_length": 30}),
}
WITH_PICTURE = {
    "no such picture": ("b.png", "b.png does not exist. Paths are relative to --image_dir"),
    "image is empty": ("", "can't be read (IsADirectoryError"),
    "a picture is a folder": ("folder", "folder can't be read (IsADirectoryError"),
    "an absolute path": ("/etc/hostname", "picture /etc/hostname lies outside of --image_dir"),
    "a path that climbs out": ("../outside.png", "images; such paths are refused"),
    "a path that climbs out and back to a neighbour": ("../images2/a.png", "lies outside of --image_dir"),
    "a link that leads out": ("link.png", "outside.png. Such links are refused: copy what is there"),
    "a linked folder that leads out": ("linked/outside.png", "lies outside of --image_dir"),
    "a link to itself": ("loop.png", "can't be read ("),
    "a name too long": ("a" * 5000 + ".png", "can't be read ("),
    "a name with a zero byte": ("a\0.png", "can't be read (ValueError: embedded null"),
    "half a character in a name": ("\ud83d.png", "can't be read (UnicodeEncodeError"),
}


@pytest.fixture
def images(tmp_path):
    """image_dir, with a good a.png in it, and a picture outside."""
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    picture(folder / "a.png"), picture(tmp_path / "outside.png")
    (tmp_path / "images2").mkdir()
    picture(tmp_path / "images2" / "a.png")
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    (folder / "loop.png").symlink_to("loop.png")
    return folder


def read_bad(images, example, said, **how):
    """The example stands at place 1 of a file, behind a good one. Its error names it and can be printed."""
    good = {"image": "a.png", "conversations": ONE}
    data = dataset(images, [good, {"id": "x7", **example}], language(), name="my.json", **how)
    assert not isinstance(data[0], BadExample)
    error = data[1]
    assert isinstance(error, BadExample), "no error"
    assert str(error).startswith(f"{images / 'my.json'}[1] id='x7': ")
    assert said in str(error)
    assert "It begins " in str(error)
    str(error).encode()
    return data, str(error)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_bad_example_is_named_and_stops_the_run_before_its_first_step(kind, images):
    example, said, *how = EXAMPLES[kind]
    data, sentence = read_bad(images, example, said, **(how[0] if how else {}))
    with pytest.raises(BadExample) as e:
        data.lengths()
    assert str(e.value) == sentence


@pytest.mark.parametrize("kind", WITH_PICTURE)
def test_a_picture_that_can_not_be_found_or_may_not_be_read_is_named(kind, images):
    name, said = WITH_PICTURE[kind]
    read_bad(images, {"image": [name], "conversations": ONE}, said)


def test_what_looks_odd_but_is_right_is_read(images):
    """Same id twice, an id that is a number, none at all; image null, empty or a list of one; a link inside,
    a path that goes out and back in, the absolute path of a picture inside; more keys than we know."""
    (images / "inside.png").symlink_to("a.png")
    text = talk("a", "b")
    names = ["a.png", "inside.png", "folder/../a.png", "../images/a.png", str(images / "a.png")]
    rows = [*({"id": name, "conversations": text} for name in ("1", "1", 1)), {"conversations": text},
            *({"image": nothing, "conversations": text} for nothing in (None, [], "")),
            *({"image": [name], "conversations": ONE} for name in names),
            {"type": "color", "width": 3, "conversations": [turn | {"more": 1} for turn in text]}]
    data = dataset(images, rows, language())
    assert [example["id"] for example in data] == ["1", "1", "1", *(str(i) for i in range(3, 13))]
    assert data.lengths()[1].tolist() == [False] * 7 + [True] * 5 + [False]


def test_image_dir_itself_may_be_a_link(images):
    (images.parent / "alias").symlink_to(images)
    file = write(images, [{"image": "a.png", "conversations": ONE}])
    data = Conversations(file, language(), Pictures(images.parent / "alias", [transform()]), 512)
    assert len(data[0]["images"]) == 1


def write(folder, rows):
    (folder / "d.json").write_text(json.dumps(rows))
    return folder / "d.json"


# -- control text inside a turn ------------------------------------------------------------------------------

@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2", "smollm"])
def test_a_control_token_in_what_somebody_wrote_is_text(kind, captions, tmp_path):
    """Else a question could end itself and forge a reply, and a reply would teach to stop in its middle."""
    picture(tmp_path / "a.png")
    lang = language(kind, "chatml" if kind in ("qwen", "smollm") else "plain")
    end = lang.tokenizer.eos_token
    turns = talk(f"<image>a {end} b", f"c {end} d", f"{end}", f"{end}{end}")
    rows = [{"image": "a.png", "conversations": turns}]
    data = dataset(tmp_path, rows, lang, captions=captions)
    input_ids, labels = data.tokens(rows[0])
    honest = dataset(tmp_path, [{"image": "a.png", "conversations": talk("<image>a", "c", "b", "d")}], lang,
                     captions=captions, name="honest.json")
    for ids, want in zip((input_ids, labels), honest.tokens(honest.row(0))):
        assert ids.count(lang.end_id) == want.count(lang.end_id)
    learned = lang.tokenizer.decode([i for i in labels if i >= 0])
    assert f"c {end} d" in learned.replace("< /s>", "</s>")             # Sentencepiece puts a space there
    assert data.lengths()[0].tolist() == [len(input_ids)]
    if not captions:
        assert data.question(0)["input_ids"].tolist() == input_ids[:len(data.question(0)["input_ids"])]


@pytest.mark.parametrize("text", [
    "</s>", "<image >", "<Image>", "<img>", "[4 patches]", "-200", "<|im_start|>", "In: Out:"])
def test_text_that_only_looks_like_control_text_stays_text(text, tmp_path):
    lang = language()
    rows = [{"conversations": talk(f"{text} a", f"{text} b")}]
    input_ids, _ = dataset(tmp_path, rows, lang).tokens(rows[0])
    assert min(input_ids) >= 0 and input_ids.count(lang.end_id) == 1
    assert lang.tokenizer.decode(input_ids) == f"In: {text} a\nOut: {text} b<|endoftext|>"


# -- the file ------------------------------------------------------------------------------------------------

GOOD = json.dumps({"conversations": talk("a", "b")}).encode()
HINT = ". Expected a JSON list of examples, or one example per line"
OBJECT = "must be an object with 'conversations', found "
COMMA = "a comma or the end of the list is missing behind example 0"
FILES = {       # kind: (what the file holds, what the sentence says behind its name)
    "empty": (b"", " holds no example"),
    "spaces only": (b" \n\t\r\n ", " holds no example"),
    "an empty list": (b"[ ]", " holds no example"),
    "a number": (b"5", ", line 1: example 0 " + OBJECT + "'5'" + HINT),
    "a text": (b'"a"', ", line 1: example 0 " + OBJECT + "'a'" + HINT),
    "null": (b"null", ", line 1: example 0 " + OBJECT + "'None'" + HINT),
    "a number in the list": (b"[\n" + GOOD + b",\n5]", ", line 3: example 1 " + OBJECT + "'5'" + HINT),
    "a list in the list": (b"[[1, 2]]", ", line 1: example 0 " + OBJECT + "'[1, 2]'" + HINT),
    "no JSON": (b"id,image\n1,a.png\n", ", line 1: this is no JSON (Expecting value)" + HINT),
    "cut off in an example": (b"[" + GOOD + b",\n" + GOOD[:-9], ", line 2: this is no JSON ("),
    "cut off behind an example": (b"[" + GOOD, ", line 1: " + COMMA + HINT),
    "cut off behind a comma": (b"[" + GOOD + b",\n", ", line 2: the list does not end; the file was cut off"),
    "no comma": (b"[" + GOOD + b"\n" + GOOD + b"]", ", line 2: " + COMMA + HINT),
    "two lists": (b"[" + GOOD + b"]\n[" + GOOD + b"]", ", line 2: "),
    "text behind the list": (b"[" + GOOD + b"] and more", ", line 1: "),
    "a broken line": (b"\n".join([GOOD, b"", GOOD, GOOD[:-5], GOOD]), ", line 4: this is no JSON ("),
    "a comma behind a line": (GOOD + b",\n" + GOOD, ", line 1: this is no JSON (Expecting value)"),
    "single quotes": (b"[{'conversations': []}]", ", line 1: this is no JSON (Expecting property name"),
    "Latin-1": (GOOD + b"\n" + GOOD.replace(b'"a"', b'"\xe9"'), ", line 2: this is no UTF-8 text" + HINT),
    "UTF-16": (GOOD.decode().encode("utf-16"), ", line 1: this is no UTF-8 text"),
    "zipped": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", ", line 1: this is no UTF-8 text"),
    "nested without end": (b"[" * 100_000, ", line 1: this is no JSON ("),
    "a number of 5000 digits": (b'[{"id": ' + b"1" * 5000 + b"}]", ", line 1: this is no JSON ("),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named_with_the_line(kind, tmp_path):
    content, said = FILES[kind]
    (tmp_path / "my.json").write_bytes(content)
    with pytest.raises(config.UserError) as e:
        opened(tmp_path / "my.json", language())
    assert str(e.value).startswith(f"{tmp_path / 'my.json'}{said}")


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(config.UserError, match="does not exist, or is no file. It should be a LLaVA JSO"):
        opened(tmp_path / name, language())


# -- pictures that can't be read -----------------------------------------------------------------------------

def cut(kind, share=0.5):
    def write(path):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
        image.save(path, kind)
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return write


def holed(path):
    """The pixels of an AVIF are zeros, as after a download into a full disk."""
    Image.new("RGB", (40, 40), RED).save(path, "avif")
    head, pixels = path.read_bytes().split(b"mdat")
    path.write_bytes(head + b"mdat" + bytes(len(pixels)))


def content(data):
    return lambda path: path.write_bytes(data)


def png(width, height):
    """A PNG that says it is so large."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
CUT = "can't be read ("
UNKNOWN = "can't be read (UnidentifiedImageError: cannot identify image file"
BROKEN_PICTURES = {
    "no bytes": (content(b""), UNKNOWN),
    "a text": (content(b"<html>404 not found</html>"), UNKNOWN),
    "zero bytes of a full disk": (content(b"\0" * 5000), UNKNOWN),
    "a cut JPEG": (cut("jpeg"), "can't be read (OSError: image file is truncated"),
    "a cut PNG": (cut("png"), CUT), "a cut head": (cut("png", 0.02), CUT), "a cut GIF": (cut("gif"), CUT),
    "a cut WEBP": (cut("webp"), CUT), "a cut BMP": (cut("bmp"), CUT), "a cut TIFF": (cut("tiff"), CUT),
    "a cut AVIF": (cut("avif", 0.8), CUT), "an AVIF with a hole": (holed, CUT),
    "huge": (content(png(30_000, 30_000)), "can't be read (DecompressionBombError: Image size (900000000"),
    "no pixels": (content(png(0, 5)), CUT),
    "a PPM without pixels": (content(b"P6 0 0 255\n"), CUT),
}


@pytest.mark.parametrize("kind", BROKEN_PICTURES)
def test_a_broken_picture_is_named(kind, tmp_path):
    make, said = BROKEN_PICTURES[kind]
    if "AVIF" in kind and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    make(tmp_path / "my.png")
    with pytest.raises(BadExample) as e:
        read_image(tmp_path / "my.png")
    assert str(e.value).startswith(f"picture {tmp_path / 'my.png'} {said}")
    assert str(e.value).endswith(". Replace it or drop the example")


def test_a_broken_picture_is_named_with_its_example(images):
    (images / "b.png").write_bytes(b"")
    example = {"image": ["a.png", "b.png"], "conversations": TWO}
    _, sentence = read_bad(images, example, f"picture {images / 'b.png'} {UNKNOWN}")
    assert sentence.endswith("It begins '<image> <image>\\nWhat is it?'")


# -- odd pictures are read rightly ---------------------------------------------------------------------------

def of(mode, values, **save):
    """A one-row picture of these values."""
    def write(path):
        image = Image.new(mode, (len(values), 1))
        image.putdata(values)
        image.save(path, **save)
    return write


def palette(**save):
    def write(path):
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        image.save(path, **save)
    return write


def animated(path):
    frames = [Image.new("RGB", (2, 1), color) for color in (RED, GREEN)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def rotated(orientation):
    """Red left, blue right as stored; the tag says how to hold it."""
    def write(path):
        image, exif = Image.new("RGB", (2, 1)), Image.Exif()
        image.putdata([RED, BLUE])
        exif[0x0112] = orientation
        image.save(path, exif=exif)
    return write


ODD_PICTURES = {    # kind: (file name, how it is made, its pixels)
    "CMYK": ("a.tif", of("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]), [[RED, BLACK, WHITE]]),
    "palette": ("a.png", palette(), [[RED, GREEN, BLUE]]),
    "palette, one color transparent": ("a.png", palette(transparency=1), [[RED, WHITE, BLUE]]),
    "palette, half transparent": ("a.png", palette(transparency=bytes([255, 51, 0])),
                                  [[RED, (204, 255, 204), WHITE]]),
    "GIF, one color transparent": ("a.gif", palette(transparency=2), [[RED, GREEN, WHITE]]),
    **{f"16 bit {kind}": (f"a.{kind}", of("I;16", [0, 257, 32896, 65535]),
                          [[BLACK, (1, 1, 1), (128, 128, 128), WHITE]]) for kind in ("png", "tif")},
    "1 bit": ("a.png", of("1", [0, 255]), [[BLACK, WHITE]]),
    "grey": ("a.png", of("L", [0, 7, 255]), [[BLACK, (7, 7, 7), WHITE]]),
    "grey, one value transparent": ("a.png", of("L", [0, 7], transparency=0), [[WHITE, (7, 7, 7)]]),
    "grey and alpha": ("a.png", of("LA", [(0, 0), (7, 255), (0, 51)]), [[WHITE, (7, 7, 7), (204, 204, 204)]]),
    "RGB, one color transparent": ("a.png", of("RGB", [RED, BLUE], transparency=RED), [[WHITE, BLUE]]),
    "RGBA": ("a.png", of("RGBA", [(*RED, 255), (*RED, 0), (*RED, 51)]), [[RED, WHITE, (255, 204, 204)]]),
    "animated GIF: the first frame": ("a.gif", animated, [[RED, RED]]),
    "animated PNG: the first frame": ("a.png", animated, [[RED, RED]]),
    "EXIF 1: as it is": ("a.png", rotated(1), [[RED, BLUE]]),
    "EXIF 2: mirrored": ("a.png", rotated(2), [[BLUE, RED]]),
    "EXIF 3: upside down": ("a.png", rotated(3), [[BLUE, RED]]),
    "EXIF 6: to the right": ("a.png", rotated(6), [[RED], [BLUE]]),
    "EXIF 8: to the left": ("a.png", rotated(8), [[BLUE], [RED]]),
    "EXIF 99: nonsense": ("a.png", rotated(99), [[RED, BLUE]]),
    "a JPEG called PNG": ("a.png", lambda path: Image.new("RGB", (1, 1)).save(path, "jpeg"), [[BLACK]]),
}


@pytest.mark.parametrize("kind", ODD_PICTURES)
def test_an_odd_picture_is_read_as_a_person_sees_it(kind, tmp_path):
    name, make, want = ODD_PICTURES[kind]
    make(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), want)


def test_a_cmyk_jpeg_is_not_read_inside_out(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.array(read_image(tmp_path / "a.jpg"), int) - RED).max() <= 3            # JPEG rounds


# -- a question to a trained model ---------------------------------------------------------------------------

def asked(question, pictures=0, stage="finetune", max_length=30):
    assistant = object.__new__(Assistant)
    assistant.cfg = type("Cfg", (), {"max_length": max_length})()
    assistant.transforms = [transform()]
    assistant.language = Language(make_tokenizer("gpt2"), PROMPTS["plain"], captions=stage == "align")
    return assistant.example(question, [Image.new("RGB", (5, 5))] * pictures)


def test_a_question_too_long_for_the_model_is_refused_not_cut(tmp_path):
    said = r"the question takes \d+ positions, --max_length is 30"
    with pytest.raises(BadExample, match=said):
        asked("a" * 50)
    rows = [{"conversations": talk("a" * 50, "b")}]
    error = dataset(tmp_path, rows, language(), max_length=30).question(0)
    assert isinstance(error, BadExample) and re.search(said, str(error))


def test_more_tags_than_pictures_in_a_question_are_refused():
    with pytest.raises(BadExample, match="1 pictures under 'image', but 2 <image> tags"):
        asked("<image> <image>", pictures=1)


def test_an_aligned_model_is_asked_about_one_picture_only():
    with pytest.raises(BadExample, match="stage align needs exactly one picture per example, found 0"):
        asked("What is it?", stage="align")


# -- backbones -----------------------------------------------------------------------------------------------

def with_config(folder, cls, size=16):
    cls().save_pretrained(folder)
    return save_preprocessor(folder, square(16) | {"size": size})


def vision(folder):
    return load_image_transforms(str(folder), "letterbox")


def vision_without(key):
    def make(folder):
        save_vision(folder, preprocessor={k: v for k, v in square(16).items() if k != key})
        vision(folder)
    return make


def vision_file(name, text):
    def make(folder):
        save_vision(folder)
        (folder / name).write_text(text)
        vision(folder)
    return make


def other_patches(folder):
    two = [save_vision(folder / "a"), save_vision(folder / "b", "clip", image_size=32)]
    load_image_transforms(",".join(two), "letterbox")


def tokenizer_file(name, text):
    def make(folder):
        make_tokenizer("gpt2").save_pretrained(folder)
        (folder / name).write_text(text)
        load_language(str(folder))
    return make


def saved_language(folder, prompt):
    make_tokenizer("llama").save_pretrained(folder)
    load_language(str(folder), prompt)


def no_tokenizer(kind):
    """transformers makes one up that knows no word."""
    def make(folder):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        load_language(str(folder))
    return make


FILES_OF = "config.json and preprocessor_config.json can't be loaded from it"
NO_TOKENIZER = "no tokenizer can be loaded from it"
BACKBONES = {   # kind: (what is done in an empty folder, what the sentence says)
    "vision: nothing there": (vision, FILES_OF),
    "vision: no such folder": (lambda folder: vision(folder / "nowhere"), FILES_OF),
    "vision: broken config.json": (vision_file("config.json", "{"), FILES_OF),
    "vision: broken preprocessor file": (vision_file("preprocessor_config.json", "{"), FILES_OF),
    "vision: a list as preprocessor file": (vision_file("preprocessor_config.json", "[]"), FILES_OF),
    "vision: no size in it": (vision_without("size"), FILES_OF),
    "vision: no image_mean in it": (vision_without("image_mean"), FILES_OF),
    "vision: a size of another kind":
        (lambda folder: vision(with_config(folder, ViTConfig, {"longest_edge": 9})), FILES_OF),
    "vision: no patches (ResNet)": (lambda folder: vision(with_config(folder, ResNetConfig)), FILES_OF),
    "vision: an unknown type": (lambda folder: load_vision(with_config(folder, ViTConfig)),
                                "is of type 'vit'. Known types: clip,"),
    "vision: SigLIP2 of any size (NaFlex)": (lambda folder: load_vision(with_config(folder, Siglip2Config)),
                                             "is of type 'siglip2'. Known types: clip,"),
    "vision: a language model": (lambda folder: load_vision("toy/llm"), "is of type 'gpt2'. Known types: "),
    "vision: two with other patches": (other_patches, "must make the same number of patches, but "),
    "llm: nothing there": (lambda folder: load_language(str(folder)), NO_TOKENIZER),
    "llm: no tokenizer files, GPT-2": (no_tokenizer("gpt2"), NO_TOKENIZER),
    "llm: no tokenizer files, Llama": (no_tokenizer("llama"), NO_TOKENIZER),
    "llm: no tokenizer files, Qwen": (no_tokenizer("qwen2"), NO_TOKENIZER),
    "llm: broken tokenizer.json": (tokenizer_file("tokenizer.json", "{"), NO_TOKENIZER),
    "llm: broken settings": (tokenizer_file("tokenizer_config.json", "{"), NO_TOKENIZER),
    "llm: no end token": (lambda folder: language(eos_token=None),
                          "the tokenizer has no end-of-sequence token"),
    "llm: no begin token": (lambda folder: language("qwen", "prismatic-phi"),
                            "this --prompt begins with a begin-of-sequence token, but the tokenizer has"),
    "llm: chatml without its tokens": (lambda folder: saved_language(folder, "chatml"),
                                       "--prompt chatml needs a tokenizer that has <|im_end|> as one token"),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_that_can_not_be_used_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(train.__file__).parent)      # toy/ is there
    use, said = BACKBONES[kind]
    with pytest.raises(config.UserError) as e:
        use(tmp_path)
    assert said in str(e.value)


def test_a_relative_folder_is_told_from_where_it_was_meant(tmp_path, monkeypatch):
    """A run made in the repository has "toy/llm" in its config.json, and is used from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foreign, "hub_is_there", lambda: False)     # no test uses the network
    for use in (vision, load_language):
        with pytest.raises(config.UserError, match=f"no such folder in {tmp_path.resolve()}; as a hub id: "):
            use("toy/llm")


def test_the_sentence_about_other_patches_has_both_numbers(tmp_path):
    with pytest.raises(config.UserError, match=f"{tmp_path / 'a'} makes 4 and {tmp_path / 'b'} makes 16"):
        other_patches(tmp_path)


# -- flags ---------------------------------------------------------------------------------------------------

RUN = object()                                              # in its place stands a good run folder
FLAGS = {
    "an unknown stage": (["--stage", "tune"], "argument --stage: invalid choice: 'tune'"),
    "an unknown flag": (["--batch", "3"], "unrecognized arguments: --batch 3"),
    "a shortened flag": (["--global_batch", "3"], "unrecognized arguments: --global_batch 3"),
    "an unknown preset": (["--preset", "gpt5"], "--preset gpt5: there is none of this name. Choose from toy"),
    "an unknown projector": (["--projector", "mlp"], "argument --projector: invalid choice: 'mlp'"),
    "an unknown prompt": (["--prompt", "alpaca"], "argument --prompt: invalid choice: 'alpaca'"),
    "no number": (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "finetune from nothing": (["--stage", "finetune"],
                              "--stage finetune starts from an aligned projector, or a trained VLM: give"),
    "full-finetune from nothing": (["--stage", "full-finetune"],
                                   "--stage full-finetune starts from an aligned projector, or a trained "),
    "vla from nothing": (["--stage", "vla", "--no_align"],
                         "--stage vla starts from a trained VLM: give --ckpt"),
    "from a checkpoint and from nothing": (["--stage", "finetune", "--ckpt", RUN, "--no_align"],
                                           "--ckpt and --no_align exclude each other"),
    "no examples": (["--preset", "single-gpu"],
                    "--train_json is missing: preset 'single-gpu' brings no data of its own"),
    "no pictures": (["--preset", "single-gpu", "--train_json", "a.json"], "--image_dir is missing"),
    "a checkpoint that is not there": (["--ckpt", "nowhere"],
                                       "--ckpt nowhere: neither a run folder nor a step folder"),
    "a checkpoint of another preset": (["--ckpt", RUN, "--preset", "single-gpu"], "made with --preset toy"),
    **{f"{name} {value}": ([f"--{name}", value], f"--{name} is {value}, but must lie between 1 and ")
       for value in ("0", "-1") for name in
       ("global_batch_size", "per_device_batch_size", "epochs", "save_every", "keep", "max_length")},
    **{f"{name} -1": ([f"--{name}", "-1"], f"--{name} is -1, but must lie between 0 and ")
       for name in ("max_steps", "num_workers", "length_window", "seed")},
    **{f"{name} -0.1": ([f"--{name}", "-0.1"], f"--{name} is -0.1, but must lie between 0 and ")
       for name in ("learning_rate", "weight_decay", "warmup_ratio")},
    "max_grad_norm 0.0": (["--max_grad_norm", "0"], "--max_grad_norm is 0.0, but must lie between 1e-30 and"),
    **{f"{name} {value}": ([f"--{name}", value], f"--{name} is {value}, but must lie between ")
       for value in ("nan", "inf") for name in
       ("learning_rate", "weight_decay", "warmup_ratio", "max_grad_norm")},
    "warmup_ratio 5": (["--warmup_ratio", "5"], "--warmup_ratio is 5.0, but must lie between 0 and 1"),
    "a slip of the hand": (["--global_batch_size", "10" * 6], "must lie between 1 and 1000000"),
    "seed 2 ** 64": (["--seed", str(2 ** 64)], f"--seed is {2 ** 64}, but must lie between 0 and"),
    **{f"run_id {name}": (["--run_id", name], f"--run_id {name}: give a name for a folder")
       for name in ("../x", "a/b", "..", ".", "step-00000001", "unfinished-1", "a b", "x" * 101)},
}


def refused(capsys, argv):
    """The last line on stderr. A wrong flag ends the program with 2."""
    with pytest.raises(SystemExit) as e:
        config.parse(config.Config, argv)
    printed = capsys.readouterr()
    assert e.value.code == 2 and printed.out == "" and "Traceback" not in printed.err
    return printed.err.splitlines()[-1]


@pytest.mark.parametrize("kind", FLAGS)
def test_a_wrong_flag_ends_the_program_with_one_line(kind, capsys, tmp_path):
    argv, said = FLAGS[kind]
    saved = config.Config(train_json="a.json", image_dir="images")
    (tmp_path / "config.json").write_text(json.dumps(saved.__dict__))
    line = refused(capsys, [str(tmp_path) if flag is RUN else flag for flag in argv])
    assert "error: " in line and said in line


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"preset": "toy"}', "\xff"])
def test_a_broken_config_of_a_checkpoint_is_named(text, capsys, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    said = f"{tmp_path / 'config.json'} can't be read"
    assert said in refused(capsys, ["--stage", "finetune", "--ckpt", str(tmp_path)])
    with pytest.raises(config.UserError, match=said):
        config.read_config(tmp_path)


def test_the_checker_refuses_unknown_formats(capsys):
    for flag in ("--prompt", "--image_resize"):
        with pytest.raises(SystemExit) as e:
            config.parse(CheckConfig, ["a.json", flag, "nonsense"])
        assert e.value.code == 2 and f"argument {flag}: invalid choice: 'nonsense'" in capsys.readouterr().err


# -- checkpoints ---------------------------------------------------------------------------------------------

def with_projector(kind="linear", width=16):
    return VLM(nn.Identity(), make_projector(kind, 8, width), nn.Identity())


def saved(folder):
    (folder / "state.json").write_text('{"parts": ["projector"]}')
    save_file(checkpoint.tensors_of(with_projector(), ["projector"]), folder / "model.safetensors")
    return folder / "model.safetensors"


def truncated(folder):
    file = saved(folder)
    file.write_bytes(file.read_bytes()[:-10])
    checkpoint.load_weights(with_projector(), folder)


def emptied(folder):
    saved(folder).write_bytes(b"")
    checkpoint.load_weights(with_projector(), folder)


def into_another(**other):
    def make(folder):
        saved(folder)
        checkpoint.load_weights(with_projector(**other), folder)
    return make


CHECKPOINTS = {
    "nothing saved yet": (checkpoint.find, "step-* folder"),
    "no weights": (lambda folder: checkpoint.load_weights(with_projector(), folder),
                   "model.safetensors can't be read"),
    "cut weights": (truncated, "model.safetensors can't be read"),
    "empty weights": (emptied, "model.safetensors can't be read"),
    "another width": (into_another(width=32),
                      "is the checkpoint of another model: projector.0.weight is (16, 8), the model has "
                      "(32, 8); projector.0.bias is (16,), the model has (32,). Use the flags of the run"),
    "another projector": (into_another(kind="gelu-mlp"),
                          "is the checkpoint of another model: missing projector.2.weight"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_named(kind, tmp_path):
    use, said = CHECKPOINTS[kind]
    with pytest.raises(config.UserError) as e:
        use(tmp_path)
    assert said in str(e.value) and str(tmp_path) in str(e.value)


# -- a batch size that does not divide -----------------------------------------------------------------------

def test_the_sampler_refuses_a_batch_size_that_does_not_divide():
    said = "global_batch_size 10 is no multiple of per_device_batch_size 4 x 2 ranks = 8"
    with pytest.raises(ValueError, match=said):
        SplitModalitySampler([1] * 20, [True] * 20, global_batch_size=10, per_device_batch_size=4,
                             world_size=2, rank=0, seed=0)


def test_training_with_a_batch_size_that_does_not_divide_is_refused(tmp_path):
    picture(tmp_path / "a.png")
    make_tokenizer("gpt2").save_pretrained(tmp_path / "llm")
    file = write(tmp_path, [{"image": "a.png", "conversations": ONE}])
    cfg = config.Config(train_json=str(file), image_dir=str(tmp_path), run_root=str(tmp_path / "runs"),
                        vision_backbone=save_vision(tmp_path / "vit"), llm_backbone=str(tmp_path / "llm"),
                        num_workers=0, global_batch_size=10, per_device_batch_size=4)
    try:
        with pytest.raises(config.UserError, match="--global_batch_size 10 can't be cut into micro-batches"):
            train.main(cfg)
    finally:
        dist.destroy_process_group()
