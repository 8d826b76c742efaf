"""chat.py: what is learned from a chat template is the template's own, id for id."""
import json
from datetime import date
from typing import NamedTuple

import pytest
from helpers import PATCHES, ROWS, dataset, make_tokenizer, talk
from test_prompts import places, supervised
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chat import PROMPTS, describe, find_prompt
from config import UserError
from prompts import IMAGE, TAG, Language, Prompt, load_language

# -- the templates, in short, of well-known models -----------------------------------------------------------

def asks(opening):
    """What a template writes where a reply is to come."""
    return "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"


HEADERS = ("{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
           " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
           + asks("<|start_header_id|>assistant<|end_header_id|>\n\n"))
NOW = "strftime_now('%d %b %Y')"
DATED = ("{{ bos_token }}{% if strftime_now is defined %}{% set day = " + NOW + " %}"
         "{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
         "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n<|eot_id|>' }}")
THOUGHT = "<think>\n\n</think>\n\n"
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
         "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
         "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + asks("<|im_start|>assistant\n") +
         "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Roles must alternate') }}{% endif %}"
         "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
         " + '<end_of_turn>\n' }}{% endfor %}" + asks("<start_of_turn>model\n"))
PHI3 = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + asks("<|assistant|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
PHI4 = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        "{% endfor %}" + asks("<|im_start|>assistant<|im_sep|>"))
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
           "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
           "{% endfor %}")
MISTRAL3 = MISTRAL.replace("' [/INST]'", "'[/INST]'").replace("{{ m.content", "{{ ' ' + m.content")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}"
          "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
ZEPHYR = ("{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
OLMO2 = ("{{ bos_token }}{% for m in messages %}"
         "{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}"
         "{% else %}{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}{% endif %}"
         "{% endfor %}" + asks("<|assistant|>\n"))
NEXT = ("{% for m in messages %}{% if m.role == 'user' %}"
        "{{ ('' if loop.first else eos_token) + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content }}{% endif %}{% endfor %}")
CHANNELS = ("{% for m in messages %}{% set reply = m.role == 'assistant' %}"
            "{{ '<|start|>' + m.role + ('<|channel|>final' if reply else '') + '<|message|>' + m.content"
            " + ('<|return|>' if loop.last and reply else '<|end|>') }}{% endfor %}"
            + asks("<|start|>assistant"))


def chatml(system):
    return ("{% for m in messages %}{% if loop.first and m.role != 'system' %}"
            "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}{% endif %}"
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
            "{% endfor %}" + asks("<|im_start|>assistant\n"))


def vocabulary(kind, *control, scheme=None, rstrip=False, **special):
    """A tokenizer with these control tokens more. scheme: how a Metaspace tokenizer writes spaces."""
    tokenizer = make_tokenizer(kind, **special)
    how = {"special": True, "normalized": False, "rstrip": rstrip}
    tokenizer.add_tokens([AddedToken(token, **how) for token in control])
    backend = tokenizer.backend_tokenizer
    if scheme in ("first", "always"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    elif scheme:                                            # the oldest Llama files, and Gemma's
        spaces = [normalizers.Prepend("▁")] * (scheme == "old") + [normalizers.Replace(" ", "▁")]
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), pre_tokenizers.Sequence([])
    return tokenizer


class Chat(NamedTuple):
    make: object                                            # () -> tokenizer
    template: str
    want: tuple                                             # first, user, before_reply, end, bos
    tail: str                                               # what the template writes behind the last reply
    thought: str = ""                                       # what the template writes of thoughts


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def llama3():
    return vocabulary("gpt2", "<|start_header_id|>", "<|end_header_id|>", bos_token="<|begin_of_text|>",
                      eos_token="<|eot_id|>")


def metaspace(scheme, *control, **how):
    return lambda: vocabulary("llama", *control, scheme=scheme, **how)


IM = ("\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", False)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HEADED = header("user"), "<|eot_id|>" + header("assistant"), "<|eot_id|>", True
CHATS = {
    "llama-3": Chat(llama3, "{{ bos_token }}" + HEADERS, (header("user"), *HEADED), ""),
    "llama-3.2": Chat(llama3, DATED + HEADERS, (
        f"{header('system')}Today Date: 26 Jul 2024\n\n<|eot_id|>{header('user')}", *HEADED), ""),
    "qwen2.5": Chat(lambda: make_tokenizer("qwen"), chatml(QWEN), (
        f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\n", *IM), "\n"),
    "qwen3": Chat(lambda: vocabulary("qwen", "<think>", "</think>"), QWEN3, (
        "<|im_start|>user\n", *IM), "\n", THOUGHT),
    "smollm2": Chat(lambda: make_tokenizer("smollm"), chatml(SMOL), (
        f"<|im_start|>system\n{SMOL}<|im_end|>\n<|im_start|>user\n", *IM), "\n"),
    "phi-4": Chat(lambda: vocabulary("qwen", "<|im_sep|>"), PHI4, (
        "<|im_start|>user<|im_sep|>", "<|im_start|>user<|im_sep|>",
        "<|im_end|><|im_start|>assistant<|im_sep|>", "<|im_end|>", False), ""),
    "olmo2": Chat(lambda: make_tokenizer("gpt2"), OLMO2, (
        "<|user|>\n", "\n<|user|>\n", "\n<|assistant|>\n", "<|endoftext|>", True), ""),
    "gemma": Chat(metaspace("never", "<start_of_turn>", "<end_of_turn>", add_bos=False, bos_token="<bos>",
                            eos_token="<eos>"), GEMMA, (
        "<start_of_turn>user\n", "\n<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>", True), "\n"),
    "mistral-v0.3": Chat(metaspace("always", "[INST]", "[/INST]"), MISTRAL3, (
        "[INST] ", "[INST] ", "[/INST] ", "</s>", True), "")}
for scheme in ("first", "always", "old"):
    plain = metaspace(scheme)
    CHATS[f"zephyr, {scheme}"] = Chat(plain, ZEPHYR, (
        "<|user|>\n", "\n<|user|>\n", "</s>\n<|assistant|>\n", "</s>", False), "\n")
    CHATS[f"mistral, {scheme}"] = Chat(plain, MISTRAL, ("[INST] ", "[INST] ", " [/INST]", "</s>", True), "")
    CHATS[f"llama-2, {scheme}"] = Chat(plain, LLAMA2, (
        "[INST] ", "<s>[INST] ", " [/INST] ", " </s>", True), "")
    CHATS[f"phi-3, {scheme}"] = Chat(
        metaspace(scheme, "<|user|>", "<|assistant|>", "<|end|>", eos_token="<|endoftext|>", rstrip=True),
        PHI3, ("<|user|>\n", "\n<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>", False),
        "<|endoftext|>")
every_chat = pytest.mark.parametrize("name", CHATS)
TALKS = [("What is it?", "A cat.", "How many?", "2 of them."),
         ("猫在哪里？", "(1) naïve 🐈", "Name one.\n\n  Then stop", "One.\n\tTwo.\n\n3"),
         ("[USER]: (a)", "▁b  c", "<|user", "In: Out:")]


def with_template(name):
    tokenizer = CHATS[name].make()
    tokenizer.chat_template = CHATS[name].template
    return tokenizer


def learned(name, **changed):
    tokenizer = with_template(name)
    return Language(tokenizer, find_prompt("auto", "some/model", tokenizer)._replace(**changed))


def written(name, tokenizer, texts, ask=False):
    """What the template itself writes, without its thoughts, and on 26 July 2024."""
    chat = CHATS[name]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(
        messages, chat_template=chat.template.replace(NOW, "'26 Jul 2024'"), add_generation_prompt=ask,
        tokenize=False, enable_thinking=False).replace(chat.thought, "")


def read(tokenizer, text):
    """Ids of a text that is read as a whole; one picture is so many places."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = tokenizer.get_vocab().get(TAG)
    return [i for token in ids for i in ([IMAGE] * PATCHES if token == image else [token])]


def same_ids(name, lang, tmp_path):
    """Of conversations of two turns, and of their second questions."""
    tokenizer, same = lang.tokenizer, []
    for texts in TALKS:
        row = {"conversations": talk(*texts)}
        data = dataset(tmp_path, [row], lang)
        ours, theirs = data.tokens(row)[0], read(tokenizer, written(name, tokenizer, texts))
        same.append(ours == theirs[:len(ours)])
        same.append(tokenizer.decode(theirs[len(ours):]).strip(" ") == CHATS[name].tail)
        asked = read(tokenizer, written(name, tokenizer, texts[:3], ask=True))
        same.append(data.tokens(row, ask=True)[0] == asked)
    return all(same)


# -- the same strings, the same ids --------------------------------------------------------------------------

@every_chat
def test_a_template_is_cut_into_its_four_strings(name):
    prompt = learned(name).prompt
    assert (*prompt[:4], prompt.bos) == CHATS[name].want
    assert prompt.in_place and not prompt.keep_space


@every_chat
def test_a_conversation_and_a_question_get_the_ids_that_the_template_gives(name, tmp_path):
    assert same_ids(name, learned(name), tmp_path)


@pytest.mark.parametrize("name", [
    "zephyr, first", "mistral, first", "mistral, always", "mistral, old", "mistral-v0.3"])
def test_pieces_read_each_on_its_own_would_be_caught(name, tmp_path):
    assert not same_ids(name, learned(name, in_place=False), tmp_path)


# -- what is learned, and where pictures stand ---------------------------------------------------------------

@every_chat
def test_each_reply_is_learned_with_its_stop_token_once_and_no_question(name, tmp_path):
    lang = learned(name)
    for texts in (("Two.", "A cat.", "A cat.", "Two."), TALKS[1]):      # questions that are also replies
        row = {"image": "a.png", "conversations": talk(TAG + texts[0], *texts[1:])}
        data = dataset(tmp_path, [row], lang)
        runs = supervised(*data.tokens(row))
        assert [lang.tokenizer.decode(run).strip() for run in runs] == [
            (reply + lang.prompt.end).strip() for reply in texts[1::2]]
        assert all(run.count(lang.end_id) == 1 and run[-1] == lang.end_id for run in runs)
        assert data.tokens(row)[0] == data.tokens(row, ask=True)[0] + runs[-1]


PICTURES = [("<image>\nWhat is it?", "A cat.", "How many?", "Two."), ("What is it?\n<image>", "A cat."),
            ("What is it?", "A cat.", "Is <image> red?", "Two.")]
SEVERAL = [("<image><image>\nWhat is it?", "A cat."),
           ("Is <image> like <image>?", "A cat.", "<image>\nHow many?", "Two.")]


def with_pictures(name, place, talks, tmp_path):
    """-> ids, labels, texts of each, and the language, whose tokenizer knows <image> as LLaVA's does."""
    tokenizer = with_template(name)
    tokenizer.add_tokens([AddedToken(TAG, special=True, normalized=False)])
    lang = Language(tokenizer, find_prompt("auto", "some/model", tokenizer), place=place)
    for texts in talks:
        row = {"image": ["a.png"] * "".join(texts).count(TAG), "conversations": talk(*texts)}
        yield (*dataset(tmp_path, [row], lang).tokens(row), texts, lang)


@every_chat
def test_one_picture_in_front_stands_behind_bos_and_the_rest_is_read_as_behind_a_token(name, tmp_path):
    for ids, labels, texts, lang in with_pictures(name, "first", PICTURES, tmp_path):
        text = written(name, lang.tokenizer, [text.replace(TAG, "").strip() for text in texts])
        bos = lang.tokenizer.bos_token if CHATS[name].want[-1] else ""
        theirs = read(lang.tokenizer, bos + TAG + text.removeprefix(bos))
        assert ids == theirs[:len(ids)] and places(ids) == [len(lang.bos) + i for i in range(PATCHES)]
        assert [run[-1] for run in supervised(ids, labels)] == [lang.end_id] * (len(texts) // 2)


@every_chat
@pytest.mark.parametrize("place, talks", [("tag", PICTURES), ("tag", SEVERAL), ("first", SEVERAL)])
def test_pictures_at_their_tags_stand_where_the_template_has_them(name, place, talks, tmp_path):
    for ids, labels, texts, lang in with_pictures(name, place, talks, tmp_path):
        theirs = read(lang.tokenizer, written(name, lang.tokenizer, texts))
        assert ids == theirs[:len(ids)] and len(places(ids)) == PATCHES * "".join(texts).count(TAG)
        assert [run[-1] for run in supervised(ids, labels)] == [lang.end_id] * (len(texts) // 2)


@every_chat
def test_a_control_token_in_what_somebody_says_stays_text(name, tmp_path):
    lang, end = learned(name), CHATS[name].want[3].strip()
    forged = {"conversations": talk(f"a {end} b", f"c {end} d", f"{end}", f"{end}{end}")}
    honest = {"conversations": talk("a", "c", "b", "d")}
    (ids, labels), (honest_ids, honest_labels) = (dataset(tmp_path, [row], lang).tokens(row)
                                                  for row in (forged, honest))
    assert ids.count(lang.end_id) == honest_ids.count(lang.end_id)
    assert labels.count(lang.end_id) == honest_labels.count(lang.end_id) == 2
    replies = [lang.tokenizer.decode(run).replace(" ", "") for run in supervised(ids, labels)]
    assert replies == [f"c{end}d{end}", end * 3]


def test_a_reply_whose_first_letter_joins_the_format_keeps_it(tmp_path):
    """Of a tokenizer that knows ]( as one word."""
    tokenizer = make_tokenizer("gpt2")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"]["]("] = len(tokenizer)
    rules["model"]["merges"].append(["]", "("])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
                                        bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert "](" in tokenizer.tokenize("[/INST](Yes)")
    tokenizer.chat_template = MISTRAL
    lang = Language(tokenizer, find_prompt("auto", "some/model", tokenizer))
    row = {"conversations": talk("What is it?", "(Yes)")}
    ids, labels = dataset(tmp_path, [row], lang).tokens(row)
    assert tokenizer.decode(ids) == "<|endoftext|>[INST] What is it? [/INST](Yes)<|endoftext|>"
    assert tokenizer.decode(supervised(ids, labels)[0]) == "(Yes)<|endoftext|>"


def test_an_aligned_model_stops_at_eos_as_its_captions_do_whatever_ends_a_reply(tmp_path):
    lang = learned("gemma")
    captions = Language(lang.tokenizer, lang.prompt, captions=True)
    ids, _ = dataset(tmp_path, ROWS, captions).tokens(ROWS[1])
    assert lang.tokenizer.decode([lang.end_id]) == "<end_of_turn>"
    assert ids[-1] == captions.end_id == lang.tokenizer.eos_token_id


# -- what a person is told -----------------------------------------------------------------------------------

def from_template(template, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer("llama")
    tokenizer.chat_template = template
    return find_prompt("auto", "some/model", tokenizer)


def test_the_date_is_the_same_every_day():
    prompt, today = learned("llama-3.2").prompt, date.today().strftime("%d %b %Y")
    assert "Today Date: 26 Jul 2024\n" in prompt.first and today not in prompt.first
    assert prompt.note == "its date is always 26 Jul 2024"
    assert learned("llama-3").prompt.note == ""


def test_thoughts_are_left_out_and_a_note_says_so():
    prompt = learned("qwen3").prompt
    assert "think" not in "".join(prompt[:4])
    assert prompt.note == r"'<think>\n\n</think>', which it writes where a reply is to come, is left out"


def test_what_a_model_would_say_itself_in_front_of_a_reply_is_written_and_a_note_says_so():
    """As in GPT-OSS, whose replies begin with the name of a channel, and whose last ends differently."""
    control = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
    prompt = from_template(CHANNELS, vocabulary("gpt2", *control, eos_token="<|return|>"))
    assert prompt[:4] == ("<|start|>user<|message|>", "<|start|>user<|message|>",
                          "<|end|><|start|>assistant<|channel|>final<|message|>", "<|end|>")
    assert prompt.note == (
        "each reply ends with '<|end|>', also the last, where it has '<|return|>'; "
        "'<|channel|>final<|message|>' is written before each reply, also one that is to come")


def test_a_stop_token_that_the_template_gives_to_the_next_question_is_learned_with_each_reply(tmp_path):
    tokenizer = make_tokenizer("llama")
    prompt = from_template(NEXT, tokenizer)
    assert prompt[:4] == ("[INST] ", "[INST] ", " [/INST] ", "</s>")
    assert prompt.note == "each reply ends with '</s>', also the last, where it has ''"
    row = {"conversations": talk("What is it?", "A cat.")}
    runs = supervised(*dataset(tmp_path, [row], Language(tokenizer, prompt)).tokens(row))
    assert [tokenizer.decode(run) for run in runs] == [" A cat.</s>"]


def test_a_format_can_be_shown():
    lang, noted = learned("zephyr, first"), learned("qwen3")
    assert describe(lang) == (
        r"'<|user|>\n' QUESTION '</s>\n<|assistant|>\n' REPLY '</s>' | '\n<|user|>\n' ... "
        "(from the tokenizer's chat template)")
    assert describe(Language(lang.tokenizer, PROMPTS["plain"])) == (
        r"'<s>In: ' QUESTION '\nOut: ' REPLY '</s>' | 'In: ' ...")
    nothing_between = Prompt("", "", "\n", "{eos}", bos=False)
    assert describe(Language(lang.tokenizer, nothing_between)) == r"QUESTION '\n' REPLY '</s>' | ..."
    assert describe(noted).endswith(f" (from the tokenizer's chat template; {noted.prompt.note})")


# -- which format is taken -----------------------------------------------------------------------------------

@pytest.mark.parametrize("folder, prompt", [
    ("vicuna-7b", "vicuna"), ("llava-project/models/llama-7b", "plain"), ("vicuna/phi-2", "phi"),
    ("models--lmsys--vicuna-7b-v1.5/snapshots/3321f76e3f527bd14065daf69dad9344000a201d", "vicuna")])
def test_a_folder_goes_by_its_own_name_and_not_by_those_around_it(folder, prompt, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    assert find_prompt("auto", str(tmp_path / folder), make_tokenizer("llama")) == PROMPTS[prompt]
    (tmp_path / "vicuna-link").symlink_to(tmp_path / folder)
    assert find_prompt("auto", str(tmp_path / "vicuna-link"), make_tokenizer("llama")) == PROMPTS["vicuna"]
    assert find_prompt("auto", "lmsys/vicuna-7b-v1.5", make_tokenizer("llama")) == PROMPTS["vicuna"]


def test_a_format_that_is_named_is_taken_though_there_is_a_template():
    assert find_prompt("plain", "some/model", with_template("zephyr, first")) == PROMPTS["plain"]


@pytest.mark.parametrize("opening", ["\n  Hi\n", "  {% if true %}\nHi {% endif %}", "{{ '' }}\n"])
def test_a_template_may_begin_with_spaces_and_lines(opening):
    tokenizer = make_tokenizer("gpt2")
    prompt = from_template(opening + ZEPHYR, tokenizer)
    question = tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False)
    assert question == prompt.first + "What?<|endoftext|>\n"
    assert prompt.first != CHATS["zephyr, first"].want[0]


def test_of_several_templates_the_default_is_taken():
    templates = {"default": ZEPHYR, "tool_use": MISTRAL}
    assert from_template(templates)[:4] == CHATS["zephyr, first"].want[:4]


@every_chat
def test_a_folder_gives_the_same_format_and_ids(name, tmp_path):
    want = learned(name)
    want.tokenizer.save_pretrained(tmp_path)
    got = load_language(str(tmp_path))
    assert (got.prompt, got.bos, got.end_id) == (want.prompt, want.bos, want.end_id)
    row = {"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.", *TALKS[1])}
    assert dataset(tmp_path, [row], got).tokens(row) == dataset(tmp_path, [row], want).tokens(row)


TURN = "{{ '<|' + m.role + '|>' + m.content + eos_token }}"
ORDER = "it does not write each question and each reply once, in their order"
STOP = "so the model could not learn to stop"
REFUSED = {     # kind: (template, the reason)
    "no control token": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
                         f"no control token ends a reply, {STOP}"),
    "a control token in front of turns only": (
        "{% for m in messages %}{{ '<unk>' + m.role + ' ' + m.content }}{% endfor %}",
        f"no control token ends the last reply, {STOP}"),
    "a question written twice": ("{{ messages[0].content }}{% for m in messages %}" + TURN + "{% endfor %}",
                                 ORDER),
    "no first question": ("{% for m in messages[1:] %}" + TURN + "{% endfor %}", ORDER),
    "another order": ("{% for m in messages | reverse %}" + TURN + "{% endfor %}", ORDER),
    "content as a list": ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}"
                          "{{ eos_token }}{% endfor %}", ORDER),
    "content as a list, its first": ("{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}", ORDER),
    "nothing": ("{# #}", ORDER),
    **{f"a number in front of the turns of each {role}": (
        "{% for m in messages %}{{ loop.index if m.role == '" + role + "' else '' }}" + TURN + "{% endfor %}",
        "it does not write all turns alike") for role in ("user", "assistant")},
    "what nobody said": (
        "{% for m in messages %}{{ m.content | replace('cat', 'dog') + eos_token }}{% endfor %}",
        "cut into turns, ' What is it?</s>A dog.</s>How many?</s>2 ' of it would become other ids"),
    "one that raises": ("{{ raise_exception('Only with\ntools') }}", r"Only with\ntools"),
    "one that calls what is not there": ("{{ nothing() }}", "'nothing' is undefined"),
    "a broken one": ("{% for m in messages %}", "Unexpected end of template."),
    "more memory than there is": ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
    "one that leads out": ("{{ ''.__class__.__mro__ }}",
                           "access to attribute '__class__' of 'str' object is unsafe."),
    "one that starts programs": ("{{ cycler.__init__.__globals__.os.system('touch mark') }}",
                                 "access to attribute '__init__' of 'type' object is unsafe."),
    "one that changes what it is given": ("{{ messages.append(1) }}",
                                          "access to attribute 'append' of 'list' object is unsafe."),
    "one that reads files": ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
}


def test_a_template_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("chat.SECONDS", 0.2)
    with pytest.raises(UserError, match="it takes longer than 0.2 seconds"):
        from_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(UserError, match="a million characters"):
        from_template("{{ 'a' * 2000000 }}")



@pytest.mark.parametrize("kind", REFUSED)
def test_a_template_that_can_not_be_used_is_refused_in_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template, reason = REFUSED[kind]
    with pytest.raises(UserError) as e:
        from_template(template)
    said, _, rest = str(e.value).partition(f"({reason}")
    assert said == "--prompt auto: the chat template of some/model can't be used "
    assert rest.endswith("). Name a format: --prompt plain, openvla, vicuna, openvla-v01, llava, llama2, "
                         "mistral, phi, chatml, prismatic-llama2, prismatic-phi")
    assert not list(tmp_path.iterdir())                     # the mark of the program that it wanted to start
