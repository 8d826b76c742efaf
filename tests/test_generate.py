"""generate.py: what is printed, answers that are drawn, several turns."""
import io
import sys

import pytest
import torch
from helpers import language, talk

import config
import generate
from config import BadExample, UserError
from data import Conversations
from generate import Assistant, GenerateConfig, Printer, drawn
from images import Pictures, read_image
from test_train import run_train, world  # noqa: F401


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):  # noqa: F811
    return str(run_train(world, tmp_path_factory.mktemp("run"), "--max_steps", "1")[1])


@pytest.fixture(scope="module")
def image(world):  # noqa: F811
    return str(world / "images" / "test_00001.png")


@pytest.fixture
def say(run, capsys, monkeypatch):
    """generate.py's flags, and what is typed -> what is printed."""
    def said(*flags, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        generate.main(config.parse(GenerateConfig, ["--ckpt", run, *map(str, flags)]))
        return capsys.readouterr().out
    return said


@pytest.mark.parametrize("kind, prompt, captions", [
    ("gpt2", "plain", False),                               # the format's space
    ("llama", "plain", False),                              # the tokenizer's
    ("gpt2", "plain", True), ("qwen", "chatml", False)])    # none
def test_the_space_before_an_answer_is_not_printed_and_no_other_is_lost(kind, prompt, captions, capsys):
    lang = language(kind, prompt)
    lang.captions = captions
    for text in ("A cat.", " A cat.", "  1  2\n\n 3"):
        written = lang.gap * (not captions) + text          # as `to_pieces` writes it for training
        printer = Printer(lang)
        for token in [*lang.ids([written])[0], lang.end_id]:
            printer.put(torch.tensor([token]))
        printer.end()
        # Llama's tokenizer gives a text that begins with one space the same ids as without it.
        assert capsys.readouterr().out == (text.removeprefix(" ") if kind == "llama" else text) + "\n"


def test_drawn_answers_follow_their_seed(say, image):
    ask = ["--image", image, "--max_new_tokens", 12]
    greedy = say(*ask)
    assert say(*ask) == greedy
    assert say(*ask, "--temperature", 1e-4, "--seed", 5) == greedy      # so cold that one token is left
    assert say(*ask, "--temperature", 3, "--top_p", 1e-6) == greedy     # and here, too
    hot = [say(*ask, "--temperature", 3, "--seed", seed) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1] and len(set(hot)) == 3 and greedy not in hot


def test_drawing_says_all_to_transformers():
    """Its own default of top_k is 50, which would silently cut the draw."""
    def options(*flags):
        return drawn(config.parse(GenerateConfig, ["--ckpt", "x", *flags]))
    assert options() == {}
    assert options("--temperature", "0.7", "--top_p", "0.9") == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


@pytest.mark.parametrize("flags, said", [
    (["--top_p", "0.5"], "--top_p draws answers, so it needs a --temperature above 0"),
    (["--temperature", "-1"], "--temperature is -1.0, but must lie between 0 and 100"),
    (["--temperature", "1", "--top_p", "0"], "--top_p is 0.0, but must lie between 1e-06 and 1")])
def test_flags_that_can_not_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        config.parse(GenerateConfig, ["--ckpt", "x", *flags])
    assert said in capsys.readouterr().err


def test_a_chat_asks_on_with_all_that_was_said(say, run, image, monkeypatch):
    """What the model reads at the third question is what a file with these turns would give."""
    read, answer_ids = [], Assistant.answer_ids
    def spy(self, examples, *args, **options):
        read.append(examples[0])
        return answer_ids(self, examples, *args, **options)
    monkeypatch.setattr(Assistant, "answer_ids", spy)
    out = say("--chat", "--image", image, "--max_new_tokens", 4, "--prompt", "What is it?",
              typed="How many?\nWhat color?\n\nnever asked\n")
    first, second, third = (line.removeprefix("> ") for line in out.splitlines()[:3])
    assert out.count("> ") == 3 and len(read) == 3
    assistant = Assistant(run)
    row = {"image": ["x"], "conversations": talk(
        "<image>\nWhat is it?", first.strip(), "How many?", second.strip(), "What color?")}
    want, _ = Conversations.tokens(
        type("Data", (), {"language": assistant.language, "max_length": 2048,
                          "pictures": Pictures("", assistant.transforms)}), row, ask=True)
    assert read[2]["input_ids"].tolist() == want and third is not None
    assert torch.equal(read[2]["images"][0][0], assistant.transforms[0].resized(read_image(image)))


def test_a_chat_without_a_first_question_begins_with_what_is_typed(say):
    assert say("--chat", "--max_new_tokens", 2, typed="") == "> "
    assert say("--chat", "--max_new_tokens", 2, typed="How many?\n").count("\n") == 1


def test_a_question_that_is_refused_does_not_end_the_chat(say):
    out = say("--chat", "--max_new_tokens", 2, typed="What is <image>?\nHow many?\n\n")
    assert "0 pictures under 'image', but 1 <image> tags" in out
    assert out.count("\n> ") == 2
    with pytest.raises(BadExample, match="1 <image> tags"):
        say("--prompt", "What is <image>?")


def test_an_align_run_does_not_chat(world, tmp_path):  # noqa: F811
    _, run, _ = run_train(world, tmp_path, "--max_steps", "1", stage="align")
    with pytest.raises(UserError, match="is of stage align: --chat is for runs that answer questions"):
        generate.main(config.parse(GenerateConfig, ["--ckpt", str(run), "--chat"]))


def test_a_state_is_given_in_numbers_as_python_prints_them():
    cfg = config.parse(GenerateConfig, ["--ckpt", "r", "--prompt", "go", "--state", "0.1", "-3.2e-05", "-1."])
    assert list(map(float, cfg.state)) == [0.1, -3.2e-05, -1.0]


@pytest.mark.parametrize("flag", ["--state", "--unnorm_key"])
def test_a_flag_of_policies_is_refused_where_nothing_reads_it(say, flag):
    with pytest.raises(UserError, match=f"{flag}: .* is no policy that reads it. Leave the flag out"):
        say("--prompt", "What is it?", flag, "1")


def test_words_are_not_asked_for_where_there_is_nothing_else(say):
    with pytest.raises(UserError, match="--words: .* is no policy and answers in words anyway"):
        say("--prompt", "What is it?", "--words")
