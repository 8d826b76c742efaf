"""prompts.py: formats, labels, what is learned, where pictures stand."""
import json
import types

import pytest
from helpers import KINDS, PATCHES, ROWS, dataset, every_kind, language, make_tokenizer, talk, transform
from PIL import Image

import prompts
from chat import PROMPTS, find_prompt
from check import show
from config import BadExample, UserError
from generate import Assistant
from prompts import IGNORE, IMAGE, Language, check_supervised, load_language

# prismatic-phi begins with BOS, whatever the tokenizer does by itself; Qwen's has none.
FORMATS = [(kind, prompt) for kind in KINDS for prompt in PROMPTS
           if (kind, prompt) != ("qwen", "prismatic-phi")]
every_format = pytest.mark.parametrize("kind,prompt", FORMATS)
KEEP_SPACE = ("openvla", "openvla-v01", "prismatic-phi")


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

@every_format
@pytest.mark.parametrize("add_bos", [False, True])
def test_training_and_inference_read_the_same_ids_up_to_the_reply(kind, prompt, add_bos, tmp_path):
    lang = language(kind, prompt, add_bos)
    assert lang.bos == ([lang.tokenizer.bos_token_id] if add_bos or prompt == "prismatic-phi" else [])
    data = dataset(tmp_path, ROWS, lang)
    for row in ROWS:
        input_ids, labels = data.tokens(row)
        reply = supervised(input_ids, labels)[-1]
        assert input_ids == data.tokens(row, ask=True)[0] + reply
        assert reply[-1] == lang.end_id


@every_format
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_question_to_generate_is_read_as_in_training(kind, prompt, add_bos, tmp_path):
    lang = language(kind, prompt, add_bos)
    assistant = object.__new__(Assistant)                   # without a run folder: only what an example needs
    assistant.cfg = types.SimpleNamespace(max_length=512)
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
    data = dataset(tmp_path, ROWS, lang, captions=True)
    caption, _ = data.tokens(ROWS[1])
    assert (data.tokens(ROWS[1], ask=True)[0] == lang.bos + [IMAGE] * PATCHES
            == caption[:len(lang.bos) + PATCHES])


def test_a_format_that_begins_with_bos_needs_a_tokenizer_that_has_one():
    with pytest.raises(UserError, match="begins with a begin-of-sequence token, but the tokenizer has none"):
        language("qwen", "prismatic-phi")
    assert len(language("qwen", "prismatic-phi", add_bos=True).bos) == 1


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
PRISMATIC = ("[INST] <<SYS>\nYou are a helpful language and vision assistant. You are able to understand the "
             "visual content that the user provides, and assist the user with a variety of tasks using "
             "natural language.\n<</SYS>>\n\n")
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
RENDERED = {
    "plain": "In: What is it?\nOut: A cat.</s>In: How many?\nOut: Two.</s>",
    "openvla": "In: What is it?\nOut: A cat.</s>In: How many?\nOut: Two.</s>",
    "vicuna": VICUNA + "USER: What is it? ASSISTANT: A cat.</s>USER: How many? ASSISTANT: Two.</s>",
    "openvla-v01": VICUNA + "USER: What is it? ASSISTANT: A cat.</s>USER: How many? ASSISTANT: Two.</s>",
    "llava": "USER: What is it? ASSISTANT: A cat.</s>USER: How many? ASSISTANT: Two.</s>",
    "llama2": LLAMA2 + "What is it? [/INST] A cat. </s><s>[INST] How many? [/INST] Two. </s>",
    "prismatic-llama2": PRISMATIC + "What is it? [/INST] A cat.</s>[INST] How many? [/INST] Two.</s>",
    "mistral": "[INST] What is it? [/INST] A cat.</s>[INST] How many? [/INST] Two.</s>",
    "phi": "Instruct: What is it?\nOutput: A cat.</s>Instruct: How many?\nOutput: Two.</s>",
    "prismatic-phi": "<s>Input: What is it?\nOutput: A cat.\n</s>Input: How many?\nOutput: Two.\n</s>",
    "chatml": CHATML + "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
                       "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>"}
# Sentencepiece puts a space before each text that does not begin with a control token, here too. OpenVLA's
# own space is a token of its own in front of it.
RENDERED_LLAMA = {
    "plain": "<s> In: What is it?\nOut: A cat.</s> In: How many?\nOut: Two.</s>",
    "openvla": "<s> In: What is it?\nOut:  A cat.</s> In: How many?\nOut:  Two.</s>",
    "vicuna": "<s> " + VICUNA + "USER: What is it? ASSISTANT: A cat.</s> USER: How many? ASSISTANT: Two.</s>",
    "llava": "<s> USER: What is it? ASSISTANT: A cat.</s> USER: How many? ASSISTANT: Two.</s>",
    "prismatic-llama2": f"<s> {PRISMATIC}What is it? [/INST] A cat.</s> [INST] How many? [/INST] Two.</s>",
    "prismatic-phi": "<s> Input: What is it?\nOutput:  A cat.\n</s> Input: How many?\nOutput:  Two.\n</s>",
    "llama2": "<s> " + LLAMA2 + "What is it? [/INST] A cat. </s><s>[INST] How many? [/INST] Two. </s>",
    "mistral": "<s> [INST] What is it? [/INST] A cat.</s> [INST] How many? [/INST] Two.</s>"}
TWO_TURNS = {"conversations": talk("What is it?", "A cat.", "How many?", "Two.")}


@pytest.mark.parametrize("kind,prompt", [(kind, prompt) for kind, prompt in FORMATS if kind != "llama"])
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


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind,space", [("llama", "▁"), ("gpt2", "Ġ")])
def test_openvla_and_prismatics_phi_end_a_question_with_the_space_as_a_token(kind, space, prompt, tmp_path):
    lang = language(kind, prompt)
    ids, _ = dataset(tmp_path, [TWO_TURNS], lang).tokens(TWO_TURNS, ask=True)
    assert (lang.tokenizer.convert_ids_to_tokens(ids)[-1] == space) == (prompt in KEEP_SPACE)


@every_kind
def test_a_format_is_known_from_the_tokens(kind):
    want = "chatml" if kind in ("qwen", "smollm") else "plain"
    assert find_prompt("auto", "some/model", make_tokenizer(kind)) == PROMPTS[want]


@pytest.mark.parametrize("name,prompt", [
    ("lmsys/vicuna-7b-v1.5", "vicuna"), ("liuhaotian/llava-v1.5-7b", "vicuna"), ("microsoft/phi-2", "phi"),
    ("microsoft/phi-1_5", "phi"), ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    ("mistralai/Mistral-7B-v0.1", "plain"), ("meta-llama/Llama-2-7b-hf", "plain"), ("gpt2", "plain")])
def test_a_format_is_known_from_the_name(name, prompt):
    assert find_prompt("auto", name, make_tokenizer("llama")) == PROMPTS[prompt]


@every_kind
def test_a_tokenizer_folder_gives_the_same_ids(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    want, got = Language(tokenizer, find_prompt("auto", "", tokenizer)), load_language(str(tmp_path))
    assert ((got.prompt, got.bos, got.end_id, got.adds_space)
            == (want.prompt, want.bos, want.end_id, want.adds_space))
    assert got.ids(["A cat.</s>\n", "  naïve 🐈"]) == want.ids(["A cat.</s>\n", "  naïve 🐈"])


# -- what is learned -----------------------------------------------------------------------------------------

@every_format
def test_the_replies_and_their_ends_are_learned_and_nothing_else(kind, prompt, tmp_path):
    lang = language(kind, prompt)
    # The questions are texts that are also replies: a mask that searches for the replies would find them.
    row = {"image": "a.png", "conversations": talk("<image>\nTwo.", "A cat.", "A cat.", "Two.")}
    runs = supervised(*dataset(tmp_path, [row], lang).tokens(row))
    space = "" if kind != "llama" and prompt in ("chatml", *KEEP_SPACE) else " "
    want = [space + reply + lang.prompt.end for reply in ("A cat.", "Two.")]
    assert [lang.tokenizer.decode(run) for run in runs] == want
    assert all(run.count(lang.end_id) == 1 and run[-1] == lang.end_id for run in runs)


@every_kind
@pytest.mark.parametrize("prompt", ["plain", "chatml"])
def test_an_empty_reply_teaches_the_end_token_alone(kind, prompt, tmp_path):
    lang = language(kind, prompt)
    row = {"conversations": talk("What is it?", " \n")}
    assert supervised(*dataset(tmp_path, [row], lang).tokens(row)) == [[lang.end_id]]


def test_the_first_label_is_nobodys_target():
    with pytest.raises(BadExample, match="no token to learn"):
        check_supervised([7, IGNORE, IGNORE], 3, 10)
    check_supervised([IGNORE, 7], 2, 10)


@every_kind
def test_align_drops_the_human_turn(kind, tmp_path):
    lang = language(kind)
    row = {"image": "a.png", "conversations": talk("<image>\nWhat is it?", " A cat. ", "How many?", "Two.")}
    input_ids, labels = dataset(tmp_path, [row], lang, captions=True).tokens(row)
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


@pytest.mark.parametrize("kind,text", [
    ("gpt2", "USER: [4 patches]\nWhat is it? ASSISTANT:>> A cat.<|endoftext|><<"),
    ("llama", "<s> USER: [4 patches] \nWhat is it? ASSISTANT:>> A cat.</s><<")])
def test_in_the_place_tag_one_picture_stands_where_llava_has_it(kind, text, tmp_path):
    lang = language(kind, "llava", place="tag")
    assert show(*dataset(tmp_path, ROWS, lang).tokens(ROWS[1]), lang.tokenizer) == text


@every_format
def test_in_the_place_tag_a_picture_moves_and_nothing_else_changes(kind, prompt, tmp_path):
    first, tag = language(kind, prompt), language(kind, prompt, place="tag")
    row = {"image": "a.png", "conversations": talk("What is it?", "A cat.", "Is it\n<image>\nred?", "Two.")}
    (ids, labels), (moved, same) = (dataset(tmp_path, [row], lang).tokens(row) for lang in (first, tag))
    assert supervised(moved, same) == supervised(ids, labels)
    assert places(ids)[0] == len(first.bos) and places(moved)[0] > moved.index(first.end_id, len(first.bos))
    texts = [first.tokenizer.decode([i for i in each if i != IMAGE]) for each in (ids, moved)]
    assert texts[0] == texts[1].replace("Is it\n \nred?", "Is it\n\nred?")     # Sentencepiece's space


def test_an_aligned_model_sees_its_picture_first_in_either_place(tmp_path):
    row = {"image": "a.png", "conversations": talk("What is it?\n<image>", "A cat.")}
    for place in ("first", "tag"):
        lang = Language(make_tokenizer("llama"), PROMPTS["plain"], captions=True, place=place)
        assert places(dataset(tmp_path, [row], lang).tokens(row)[0]) == [1, 2, 3, 4]


def test_several_pictures_stand_at_their_tags(tmp_path):
    lang = language()
    row = {"image": ["a.png", "b.png", "c.png"],
           "conversations": talk("Is <image> like <image>?", "A cat.", "<image>\nHow many?", "Two.")}
    input_ids, labels = dataset(tmp_path, [row], lang).tokens(row)
    assert show(input_ids, labels, lang.tokenizer) == (
        "In: Is [4 patches] like [4 patches]?\nOut:>> A cat.<|endoftext|><<In: [4 patches]\nHow many?\nOut:"
        ">> Two.<|endoftext|><<")


@pytest.mark.parametrize("kind,text", [
    ("gpt2", "[4 patches]In: What is it?\nOut:>> A cat.<|endoftext|><<"),
    ("llama", "<s>[4 patches] In: What is it?\nOut:>> A cat.</s><<"),
    ("qwen", "[4 patches]In: What is it?\nOut:>> A cat.<|im_end|><<")])
def test_show_marks_the_patches_and_what_is_learned(kind, text, tmp_path):
    lang = language(kind)
    assert show(*dataset(tmp_path, ROWS, lang).tokens(ROWS[1]), lang.tokenizer) == text


def test_the_example_at_the_top_of_prompts_is_true(tmp_path):
    text, promised = prompts.__doc__.split("becomes")
    row, lang = json.loads(text[text.index("{"):]), language("llama")
    runs = supervised(*dataset(tmp_path, [row], lang).tokens(row))
    assert [lang.tokenizer.decode(run) for run in runs] == [" A cat.</s>"]
    assert '" A cat.</s>"' in promised
