"""data.py: prompts, labels, lengths, batches, pictures."""
import json
import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (KINDS, PATCHES, dataset, make_tokenizer, picture, save_preprocessor, save_vision, square,
                     talk, transform)
from PIL import Image
from transformers import CLIPConfig

import data
from data import (IGNORE, IMAGE, PROMPTS, BadExample, Conversations, Language, check_supervised, collate,
                  known_prompt, load_image_transforms, load_language, show)
from generate import Assistant

ROWS = [{"conversations": talk("What is it?", "A cat.")},
        {"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.")},
        {"image": "a.png", "conversations": talk("What is it?\n<image>", "A cat.")},
        {"image": ["a.png", "b.png"], "conversations": talk("<image>\n<image>\nWhat is it?", "A cat.")},
        {"image": ["a.png", "b.png"],
         "conversations": talk("Is <image> like <image>?", "A cat.", "How many?", "Two.")},
        {"image": "a.png",
         "conversations": talk("<image>\nWhat is it?", "A cat.", "  How many?\n", " Two. ")},
        {"conversations": talk("\tdef f():\n    pass", "naïve 猫 🐈", "▁ [INST] USER: In:", "1  2\n\n3")}]
every_prompt = pytest.mark.parametrize("prompt", PROMPTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def language(kind="gpt2", prompt="plain", add_bos=None):
    return Language(make_tokenizer(kind, add_bos, chat=prompt == "chatml"), prompt)


def supervised(input_ids, labels):
    """The runs of learned ids."""
    runs, before = [], IGNORE
    for token, label in zip(input_ids, labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE and before == IGNORE:
            runs.append([])
        if label != IGNORE:
            runs[-1].append(token)
        before = label
    return runs


# -- one prompt: training and inference ----------------------------------------------------------------------

@every_prompt
@every_kind
@pytest.mark.parametrize("add_bos", [False, True])
def test_training_and_inference_read_the_same_ids_up_to_the_reply(kind, prompt, add_bos, tmp_path):
    lang = language(kind, prompt, add_bos)
    assert lang.bos == ([lang.tokenizer.bos_token_id] if add_bos else [])
    train, ask = (dataset(tmp_path, ROWS, lang, ask=ask) for ask in (False, True))
    for row in ROWS:
        input_ids, labels = train.tokens(row)
        reply = supervised(input_ids, labels)[-1]
        assert input_ids == ask.tokens(row)[0] + reply
        assert reply[-1] == lang.stop


@every_prompt
@every_kind
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_question_to_generate_is_read_as_in_training(kind, prompt, add_bos, tmp_path):
    lang = language(kind, prompt, add_bos)
    assistant = object.__new__(Assistant)                   # without a run folder: only what an example needs
    assistant.cfg = types.SimpleNamespace(stage="finetune", max_length=512)
    assistant.language, assistant.transforms = lang, [transform()]
    train = dataset(tmp_path, ROWS, lang)
    for i, pictures in ((0, 0), (1, 1), (2, 1), (3, 2)):    # each asks "What is it?" about so many pictures
        input_ids, labels = train.tokens(ROWS[i])
        got = assistant.example("What is it?", [Image.new("RGB", (5, 5))] * pictures)
        assert got["input_ids"].tolist() + supervised(input_ids, labels)[0] == input_ids
        assert len(got["images"]) == pictures


@every_kind
@pytest.mark.parametrize("add_bos", [False, True])
def test_an_aligned_model_is_asked_as_it_was_trained(kind, add_bos, tmp_path):
    lang = language(kind, "plain", add_bos)
    train, ask = (dataset(tmp_path, ROWS, lang, caption_only=True, ask=ask) for ask in (False, True))
    caption, _ = train.tokens(ROWS[1])
    assert ask.tokens(ROWS[1])[0] == lang.bos + [IMAGE] * PATCHES == caption[:len(lang.bos) + PATCHES]


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_a_space_left_on_the_prompt_would_be_caught(kind, tmp_path):
    lang = language(kind)
    whole = lang.ids(["In: What is it?\nOut: A cat." + lang.prompt.end])[0]
    assert dataset(tmp_path, ROWS, lang).tokens(ROWS[0])[0] == whole
    broken = lang.ids(["In: What is it?\nOut: "])[0]        # read by a prompt that is built apart
    assert whole[:len(broken)] != broken


# -- the text of each format, as the model cards write it ----------------------------------------------------

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
LLAMA2 = "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n"
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
RENDERED = {
    "plain": "In: What is it?\nOut: A cat.</s>In: How many?\nOut: Two.</s>",
    "vicuna": VICUNA + "USER: What is it? ASSISTANT: A cat.</s>USER: How many? ASSISTANT: Two.</s>",
    "llama2": LLAMA2 + "What is it? [/INST] A cat. </s><s>[INST] How many? [/INST] Two. </s>",
    "mistral": "[INST] What is it? [/INST] A cat.</s>[INST] How many? [/INST] Two.</s>",
    "phi": "Instruct: What is it?\nOutput: A cat.</s>Instruct: How many?\nOutput: Two.</s>",
    "chatml": CHATML + "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
                       "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>"}
# Sentencepiece puts a space before each text that does not begin with a control token, here too.
RENDERED_LLAMA = {
    "plain": "<s> In: What is it?\nOut: A cat.</s> In: How many?\nOut: Two.</s>",
    "vicuna": "<s> " + VICUNA + "USER: What is it? ASSISTANT: A cat.</s> USER: How many? ASSISTANT: Two.</s>",
    "llama2": "<s> " + LLAMA2 + "What is it? [/INST] A cat. </s><s>[INST] How many? [/INST] Two. </s>",
    "mistral": "<s> [INST] What is it? [/INST] A cat.</s> [INST] How many? [/INST] Two.</s>"}
TWO_TURNS = {"conversations": talk("What is it?", "A cat.", "How many?", "Two.")}


@every_prompt
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama"])
def test_a_format_renders_as_its_model_card_says(kind, prompt, tmp_path):
    lang = language(kind, prompt)
    text = lang.tokenizer.decode(dataset(tmp_path, [TWO_TURNS], lang).tokens(TWO_TURNS)[0])
    bos, eos = lang.tokenizer.bos_token or "", lang.tokenizer.eos_token
    assert text == RENDERED[prompt].replace("<s>", bos).replace("</s>", eos)


@pytest.mark.parametrize("prompt", RENDERED_LLAMA)
def test_a_format_renders_as_its_model_card_says_with_a_llama_tokenizer(prompt, tmp_path):
    lang = language("llama", prompt)
    text = lang.tokenizer.decode(dataset(tmp_path, [TWO_TURNS], lang).tokens(TWO_TURNS)[0])
    assert text == RENDERED_LLAMA[prompt]


@every_kind
def test_a_format_is_known_from_the_tokens(kind):
    want = "chatml" if kind in ("qwen", "smollm") else "plain"
    assert known_prompt("some/model", make_tokenizer(kind)) == want


@pytest.mark.parametrize("template,prompt", [
    ("{{ '<|im_start|>' + role + '\n' }}", "chatml"), ("{{ '[INST] <<SYS>>\n' + system }}", "llama2"),
    ("{{ '[INST] ' + question + ' [/INST]' }}", "mistral"), ("{{ question }}", "plain")])
def test_a_format_is_known_from_the_chat_template(template, prompt):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = template
    assert known_prompt("some/model", tokenizer) == prompt


@pytest.mark.parametrize("name,prompt", [
    ("lmsys/vicuna-7b-v1.5", "vicuna"), ("liuhaotian/llava-v1.5-7b", "vicuna"), ("microsoft/phi-2", "phi"),
    ("microsoft/phi-1_5", "phi"), ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    ("mistralai/Mistral-7B-v0.1", "plain"), ("meta-llama/Llama-2-7b-hf", "plain"), ("gpt2", "plain")])
def test_a_format_is_known_from_the_name(name, prompt):
    assert known_prompt(name, make_tokenizer("llama")) == prompt


@every_kind
def test_a_tokenizer_folder_gives_the_same_ids(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    want, got = Language(tokenizer, known_prompt("", tokenizer)), load_language(str(tmp_path))
    assert (got.name, got.bos, got.stop, got.adds_space) == (want.name, want.bos, want.stop, want.adds_space)
    assert got.ids(["A cat.</s>\n", "  naïve 🐈"]) == want.ids(["A cat.</s>\n", "  naïve 🐈"])


# -- what is learned -----------------------------------------------------------------------------------------

@every_prompt
@every_kind
def test_the_replies_and_their_ends_are_learned_and_nothing_else(kind, prompt, tmp_path):
    lang = language(kind, prompt)
    # The questions are texts that are also replies: a mask that searches for the replies would find them.
    row = {"image": "a.png", "conversations": talk("<image>\nTwo.", "A cat.", "A cat.", "Two.")}
    runs = supervised(*dataset(tmp_path, [row], lang).tokens(row))
    space = " " if kind == "llama" or prompt != "chatml" else ""
    want = [space + reply + lang.prompt.end for reply in ("A cat.", "Two.")]
    assert [lang.tokenizer.decode(run) for run in runs] == want
    assert all(run.count(lang.stop) == 1 and run[-1] == lang.stop for run in runs)


@every_kind
@pytest.mark.parametrize("prompt", ["plain", "chatml"])
def test_an_empty_reply_teaches_the_end_token_alone(kind, prompt, tmp_path):
    lang = language(kind, prompt)
    row = {"conversations": talk("What is it?", " \n")}
    assert supervised(*dataset(tmp_path, [row], lang).tokens(row)) == [[lang.stop]]


def test_the_first_label_is_nobodys_target():
    with pytest.raises(BadExample, match="no token to learn"):
        check_supervised([7, IGNORE, IGNORE], 3, 10)
    check_supervised([IGNORE, 7], 2, 10)


@every_kind
def test_align_drops_the_human_turn(kind, tmp_path):
    lang = language(kind)
    row = {"image": "a.png", "conversations": talk("<image>\nWhat is it?", " A cat. ", "How many?", "Two.")}
    input_ids, labels = dataset(tmp_path, [row], lang, caption_only=True).tokens(row)
    caption = lang.ids(["A cat." + lang.tokenizer.eos_token])[0]
    assert input_ids == lang.bos + [IMAGE] * PATCHES + caption
    assert labels == [IGNORE] * (len(lang.bos) + PATCHES) + caption


# -- where the pictures stand --------------------------------------------------------------------------------

def places(input_ids):
    return [i for i, token in enumerate(input_ids) if token == IMAGE]


@every_kind
@pytest.mark.parametrize("add_bos", [False, True])
def test_one_picture_stands_right_after_bos_wherever_its_tag_was(kind, add_bos, tmp_path):
    lang = language(kind, add_bos=add_bos)
    rows = [{"image": ["a.png"], "conversations": talk(*texts)} for texts in
            (("<image>\nWhat is it?", "A cat."), ("What is it?\n<image>", "A cat."),
             ("What is it?", "A cat.", "How many?<image>", "Two."))]
    got = [dataset(tmp_path, rows, lang).tokens(row)[0] for row in rows]
    assert all(places(ids) == list(range(add_bos, add_bos + PATCHES)) for ids in got)
    assert got[0] == got[1]


def test_several_pictures_stand_at_their_tags(tmp_path):
    lang = language()
    row = {"image": ["a.png", "b.png", "c.png"],
           "conversations": talk("Is <image> like <image>?", "A cat.", "<image>\nHow many?", "Two.")}
    input_ids, labels = dataset(tmp_path, [row], lang).tokens(row)
    assert show(input_ids, labels, lang.tokenizer) == (
        "In: Is [4 patches] like [4 patches]?\nOut:>> A cat.<|endoftext|><<In: [4 patches]\nHow many?\nOut:"
        ">> Two.<|endoftext|><<")


def test_pictures_come_in_the_order_of_their_names(tmp_path):
    for name, color in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        picture(tmp_path / f"{name}.png", color)
    rows = [{"image": list(names), "conversations": talk("<image>" * len(names), "Two.")}
            for names in (("b.png", "a.png"), ("c.png",), ("a.png", "c.png"))]
    batch = collate([dataset(tmp_path, rows, language())[i] for i in range(3)])
    colors = [int(view.mean((1, 2)).argmax()) for view in batch["pixel_values"][0]]
    assert colors == [1, 0, 2, 0, 2]


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


def test_a_text_only_batch_has_no_pixels(tmp_path):
    assert collate([dataset(tmp_path, ROWS, language())[i] for i in (0, 6)])["pixel_values"] == []


def test_the_mask_keeps_the_end_token_where_pad_is_the_same_id(tmp_path):
    lang = language("smollm", "chatml")
    pad = lang.tokenizer.pad_token_id
    assert pad == lang.tokenizer.eos_token_id == lang.stop
    batch = collate([dataset(tmp_path, ROWS, lang)[0]])
    assert batch["attention_mask"].all() and batch["input_ids"][0, -1] == pad
    assert not (batch["input_ids"] != pad).all()            # the usual formula would hide it


def test_a_bad_example_comes_in_place_of_its_batch(tmp_path):
    examples = [dataset(tmp_path, ROWS, language())[i] for i in (0, 1)]
    assert isinstance(examples[1], BadExample) and collate(examples) is examples[1]     # there is no a.png


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
@pytest.mark.parametrize("caption_only", [False, True])
def test_lengths_are_those_of_the_real_examples(kind, caption_only, tmp_path):
    rows = [row for row in ROWS if not caption_only or row.get("image") == "a.png"]
    rows = [row | {"id": i} for i in range(60) for row in rows]
    rows += [{"image": "a.png", "conversations": talk("<image>" + "What " * n, "A cat. " * n)}
             for n in range(1, 60)]
    whole = dataset(tmp_path, rows, language(kind), max_length=100, caption_only=caption_only)
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
    return lambda: monkeypatch.setattr(data.Language, "ids", fail)


def test_lengths_are_counted_once_and_kept(tmp_path, no_counting):
    lang = language()
    before = dataset(tmp_path, ROWS, lang).lengths()
    no_counting()
    after = dataset(tmp_path, ROWS, lang).lengths()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_lengths_that_another_rank_has_counted_are_read(tmp_path, no_counting):
    """All ranks open the file at the same time, then rank zero counts."""
    lang = language()
    ranks = [dataset(tmp_path, ROWS, lang) for _ in range(2)]
    want = ranks[0].lengths()[0].tolist()
    no_counting()
    assert ranks[1].lengths()[0].tolist() == want


OTHER_TEXT = [{"conversations": talk("What is it?", "A  cat")}, *ROWS[1:4]]     # as many bytes as before


@pytest.mark.parametrize("change", [
    {"rows": OTHER_TEXT}, {"rows": ROWS[3::-1]}, {"lang": language("phi")},
    {"lang": language(add_bos=True)}, {"lang": language(prompt="vicuna")}, {"max_length": 25},
    {"transforms": [transform(size=8)]}, {"caption_only": True}, {"lang": language("smollm", "chatml")}],
    ids=["text", "order", "tokenizer", "bos", "prompt", "max_length", "patches", "stage", "chat tokenizer"])
def test_kept_lengths_are_never_stale(change, tmp_path):
    rows = ROWS[1:3] if "caption_only" in change else ROWS[:4]
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
        captions = dataset(tmp_path, ROWS[1:3], lang, caption_only=True)
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
            before = private_memory()
            function()
            os.write(start, str(private_memory() - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(start)
    return int(os.read(end, 99))


def test_a_large_file_is_mapped_and_no_worker_copies_it(tmp_path):
    texts = "What is it?", *["A cat."] * 10, "x" * 600
    rows = [{"id": i, "conversations": talk(*texts)} for i in range(20_000)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    assert (tmp_path / "d.json").stat().st_size > 20e6
    data = Conversations(tmp_path / "d.json", tmp_path, language(), [transform()], 512)
    data.cache = np.column_stack([data.places, np.ones((20_000, 2), np.int64)])     # not counted: it is slow
    data._write_cache()
    data = Conversations(tmp_path / "d.json", tmp_path, data.language, [transform()], 512)
    assert all(isinstance(array, np.memmap) for array in (data.bytes, data.cache, data.places))
    assert grows_by(lambda: all(data.row(i) for i in range(len(data)))) < 6e6      # Python itself, 3 MB
    assert grows_by(lambda: all(str(row) for row in rows)) > 12e6   # reading an object writes its count
    assert len(pickle.dumps(data)) < 2e6                            # what a worker gets that is not forked


def test_a_worker_that_is_not_forked_reads_the_same(tmp_path):
    data = dataset(tmp_path, ROWS, language())
    data.lengths()
    other = pickle.loads(pickle.dumps(data))
    assert [other.row(i) for i in range(len(ROWS))] == ROWS and isinstance(other.bytes, np.memmap)
    assert [a.tolist() for a in other.lengths()] == [a.tolist() for a in data.lengths()]


def test_a_broken_file_of_lengths_is_made_again(tmp_path):
    lengths = dataset(tmp_path, ROWS, language()).lengths()[0].tolist()
    kept, = tmp_path.glob(".d.json.*.lengths.npy")
    whole = kept.read_bytes()
    for broken in (b"", whole[:-8], whole[:20], b"nonsense" * 9):
        kept.write_bytes(broken)
        assert dataset(tmp_path, ROWS, language()).lengths()[0].tolist() == lengths
        assert kept.read_bytes() == whole


def test_in_a_read_only_folder_lengths_are_counted_each_time(tmp_path, monkeypatch):
    def refuse(*_, **__):                                   # not by chmod: root may write everywhere
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "save", refuse)
    for _ in range(2):
        one = dataset(tmp_path, ROWS, language())
        assert one.lengths()[0].tolist() == real_lengths(one)
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


# -- pictures ------------------------------------------------------------------------------------------------

def red(resize, image, size, mean=(0.5,) * 3):
    """The red channel of what the backbone gets, back in 0..255."""
    view = transform(resize, size, 1, mean, (0.25,) * 3, resample=0)(image)
    assert view.shape == (3, size, size) and view.dtype == torch.float32
    return ((view[0] * 0.25 + mean[0]) * 255).round().int().tolist()


def columns(*values):
    """A picture of two rows."""
    return Image.fromarray(np.array([[[value] * 3 for value in values]] * 2, np.uint8))


def test_each_way_to_make_a_picture_square():
    wide = columns(10, 20, 30, 40)
    assert red("resize-naive", wide, 2) == [[20, 40], [20, 40]]                             # squashed
    assert red("resize-crop", wide, 2) == [[20, 30], [20, 30]]                              # the sides cut
    assert red("letterbox", wide, 4, (0.2, 0.4, 0.6)) == [[51] * 4, *[[10, 20, 30, 40]] * 2, [51] * 4]
    tall = wide.transpose(Image.Transpose.ROTATE_270)                                       # 10 is on top
    assert red("resize-naive", tall, 2) == [[20, 20], [40, 40]]
    assert red("resize-crop", tall, 2) == [[20, 20], [30, 30]]
    assert red("letterbox", tall, 4, (0.2, 0.4, 0.6)) == [[51, n, n, 51] for n in (10, 20, 30, 40)]


def test_a_letterbox_is_filled_with_the_mean_color_which_becomes_zero():
    view = transform("letterbox", 4, 1, (0.2, 0.4, 0.6))(columns(10, 20, 30, 40))
    assert view[:, 0].tolist() == [[0.0] * 4] * 3           # 51, 102, 153 are 0.2, 0.4, 0.6 exactly


@pytest.mark.parametrize("resize", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_a_picture_of_any_shape_becomes_square(resize, size):
    assert transform(resize)(Image.new("RGB", size)).shape == (3, 16, 16)


def test_pixels_are_normalized_by_mean_and_std():
    view = transform(mean=(0.5, 0.0, 1.0), std=(0.5, 0.25, 2.0))(Image.new("RGB", (3, 3), (255, 255, 0)))
    assert view[:, 0, 0].tolist() == [1.0, 4.0, -0.5]


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PREPROCESSORS = {                                           # as the models' files say it, but all 16 pixels
    "siglip": square(16) | {"resample": 3},
    "clip": {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "size": {"shortest_edge": 16},
             "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "clip, older file": {"crop_size": 16, "do_center_crop": True, "size": 16, "resample": 3,
                         "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "dinov2": {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True,
               "size": {"shortest_edge": 18}, "resample": 2,
               "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "no crop": {"size": {"shortest_edge": 16}, "do_center_crop": False, "image_mean": [0.1] * 3,
                "image_std": [0.2] * 3}}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_size_mean_and_std_come_from_the_preprocessor_file(name, tmp_path):
    settings = PREPROCESSORS[name]
    folder = save_vision(tmp_path, name.split(",")[0], preprocessor=settings)
    got, = load_image_transforms(folder, "letterbox")
    assert (got.size, got.patches, got.resize) == (16, 4, "letterbox")
    assert got.resample == settings.get("resample", 3)
    for tensor, key in ((got.mean, "image_mean"), (got.std, "image_std")):
        assert torch.equal(tensor.flatten(), torch.tensor(settings[key]))


def test_a_whole_clip_folder_serves_as_a_vision_backbone(tmp_path):
    CLIPConfig(vision_config={"patch_size": 4, "image_size": 16}).save_pretrained(tmp_path)
    folder = save_preprocessor(tmp_path, PREPROCESSORS["clip"])
    assert load_image_transforms(folder, "resize-naive")[0].patches == 16


def test_two_backbones_may_have_different_sizes_but_the_same_patches(tmp_path):
    one = save_vision(tmp_path / "a")
    two = save_vision(tmp_path / "b", "clip", image_size=32, patch_size=16)
    got = load_image_transforms(f"{one},{two}", "letterbox")
    assert [(t.size, t.patches) for t in got] == [(16, 4), (32, 4)]


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
        read = Conversations(tmp_path / "d.json", tmp_path, language(), [transform()], 512)
        assert [read.row(i) for i in range(len(read))] == rows
        assert read.lengths()[0].tolist() == real_lengths(read)


@pytest.mark.parametrize("kind,text", [
    ("gpt2", "[4 patches]In: What is it?\nOut:>> A cat.<|endoftext|><<"),
    ("llama", "<s>[4 patches] In: What is it?\nOut:>> A cat.</s><<"),
    ("qwen", "[4 patches]In: What is it?\nOut:>> A cat.<|im_end|><<")])
def test_show_marks_the_patches_and_what_is_learned(kind, text, tmp_path):
    lang = language(kind)
    assert show(*dataset(tmp_path, ROWS, lang).tokens(ROWS[1]), lang.tokenizer) == text


def test_the_example_at_the_top_of_data_is_true(tmp_path):
    text, promised = data.__doc__.split("becomes")
    row, lang = json.loads(text[text.index("{"):]), language("llama")
    runs = supervised(*dataset(tmp_path, [row], lang).tokens(row))
    assert [lang.tokenizer.decode(run) for run in runs] == [" A cat.</s>"]
    assert '" A cat.</s>"' in promised
