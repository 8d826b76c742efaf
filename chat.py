"""How a language model's makers write a conversation: known formats, and any chat model's own.

A chat model's tokenizer brings a template, a small program in Jinja that writes a conversation down. It is
rendered, in transformers' sandbox, with marks in place of the texts:

    <|user|>\\nQUESTION-MARK-A</s>\\n<|assistant|>\\nREPLY-MARK-A</s>\\n<|user|>\\nQUESTION-MARK-B ...

What stands between the marks are the four strings of a Prompt. They are right if the ids that they give are
those of the template itself; that is checked. Where it can't be, the start ends with a sentence. A format
that is only nearly right costs a chat model some of what it knows, and no error tells of it.
"""
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from config import UserError
from prompts import Language, Prompt, tokenize

LLAMA2 = "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n"
PRISMATIC = ("You are a helpful language and vision assistant. You are able to understand the visual content "
             "that the user provides, and assist the user with a variety of tasks using natural language.")
PROMPTS = {
    "plain": Prompt("In: ", "In: ", "\nOut: ", "{eos}"),    # Prismatic's, for models without a chat format
    # OpenVLA's data is tokenised as one text, whose last space became a token in front of the actions.
    "openvla": Prompt("In: ", "In: ", "\nOut: ", "{eos}", keep_space=True),
    "vicuna": Prompt("A chat between a curious user and an artificial intelligence assistant. The assistant "
                     "gives helpful, detailed, and polite answers to the user's questions. USER: ",
                     "USER: ", " ASSISTANT: ", "{eos}"),
    "openvla-v01": Prompt("A chat between a curious user and an artificial intelligence assistant. The "
                          "assistant gives helpful, detailed, and polite answers to the user's questions. "
                          "USER: ", "USER: ", " ASSISTANT: ", "{eos}", keep_space=True),
    "llava": Prompt("USER: ", "USER: ", " ASSISTANT: ", "{eos}"),           # Vicuna's without the first text
    "llama2": Prompt(LLAMA2, "{bos}[INST] ", " [/INST] ", " {eos}"),
    "mistral": Prompt("[INST] ", "[INST] ", " [/INST] ", "{eos}"),
    "phi": Prompt("Instruct: ", "Instruct: ", "\nOutput: ", "{eos}"),
    "chatml": Prompt("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
                     "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    # Prismatic's own forms of two formats. One of the brackets is missing there, so here, too.
    "prismatic-llama2": Prompt(f"[INST] <<SYS>\n{PRISMATIC}\n<</SYS>>\n\n", "[INST] ", " [/INST] ", "{eos}"),
    "prismatic-phi": Prompt("Input: ", "Input: ", "\nOutput: ", "\n{eos}", bos=True, keep_space=True),
}
MARKS = [f"{kind}-MARK-{turn}" for turn in "ABC" for kind in ("QUESTION", "REPLY")]
PROBES = [("What is it?", "A cat.", "How many?", "2 of them.", "Why?"),
          ("猫在哪里？", "在桌子上。", "Name one.\n\nThen stop.", "One.\nTwo.", "3 + 4")]
# A template that asks for today's date always gets this day: a prompt is the same today and tomorrow.
SECONDS = 5                                                 # that a template may take
FIXED_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}\n"


def find_prompt(choice, name, tokenizer):
    """--prompt, and a language model's name and tokenizer -> Prompt. Raises UserError."""
    if choice == "auto" and tokenizer.chat_template:
        try:
            return learn(tokenizer)
        except Exception as e:                              # templates are programs: they can raise anything
            raise UserError(f"--prompt auto: the chat template of {name} can't be used ("
                            f"{str(e) or type(e).__name__}). Name a format: --prompt "
                            f"{', '.join(PROMPTS)}") from e
    choice = known(own_name(name), tokenizer) if choice == "auto" else choice
    if choice == "chatml" and len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) != 1:
        raise UserError("--prompt chatml needs a tokenizer that has <|im_end|> as one token; "
                        "this one has not. Try --prompt plain")
    return PROMPTS[choice]


def own_name(name):
    """Folder or hub id -> what a model is called. The folders around it may have names of other models; but
    in the hub's cache its own folder is a number, and its name is above."""
    parts = Path(name).absolute().parts if Path(name).is_dir() else (name,)
    return next((part for part in parts if part.startswith("models--")), parts[-1]).lower()


def known(name, tokenizer):
    """The format of a language model that brings no chat template."""
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
        return "chatml"
    if "mistral" in name and "instruct" in name:
        return "mistral"
    return next((prompt for key, prompt in (("vicuna", "vicuna"), ("llava", "vicuna"),
                                            ("phi-1", "phi"), ("phi-2", "phi")) if key in name), "plain")


def learn(tokenizer):
    """A tokenizer with a chat template -> Prompt. Raises ValueError with what can't be done."""
    text = render(tokenizer, MARKS)
    if [text.count(mark) for mark in MARKS] != [1] * 6 or re.findall("|".join(MARKS), text) != MARKS:
        raise ValueError("it does not write each question and each reply once, in their order")
    first, reply, turn, reply2, turn2, _, last = re.split("|".join(MARKS), text)
    if (reply, turn) != (reply2, turn2):
        raise ValueError("it does not write all turns alike")
    end, notes = end_of_reply(tokenizer, turn, last)
    bos = tokenizer.bos_token
    # SmolLM2 calls <|im_start|> its BOS, which it writes in front of each turn, also of the replies.
    has_bos = bool(bos) and first.startswith(bos) and bos not in reply
    prompt = Prompt(first.removeprefix(bos) if has_bos else first, turn.removeprefix(end), reply, end,
                    bos=has_bos, in_place=True)
    if render(tokenizer, MARKS, day="") != text:
        notes.append("its date is always 26 Jul 2024")
    return prompt._replace(note="; ".join(notes + check(tokenizer, prompt)))


def render(tokenizer, texts, ask=False, day=FIXED_DAY):
    """human, gpt, human ... -> what the template writes. No tools, no thoughts, no system text of ours."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    with within(SECONDS):
        text = tokenizer.apply_chat_template(messages, chat_template=day + tokenizer.get_chat_template(),
                                             tokenize=False, add_generation_prompt=ask, enable_thinking=False)
    if len(text) > 10 ** 6:
        raise ValueError("it writes a million characters")
    return text


@contextmanager
def within(seconds):
    """A template may be a stranger's, and loop for ever. (Only a process's main thread can set a timer.)"""
    def too_long(*_):
        raise ValueError(f"it takes longer than {seconds} seconds")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_of_reply(tokenizer, turn, last):
    """What stands between two turns, and what behind the last reply -> what ends a reply, notes.

    It is everything up to the first control token. Some templates write this token in front of the next
    question only: then the last reply, often the only one, would never teach the model to stop.
    """
    control = Language(tokenizer, PROMPTS["plain"]).control
    found = control.search(turn)
    if not found:
        raise ValueError("no control token ends a reply, so the model could not learn to stop")
    end, ends_last = turn[:found.end()], control.match(last.lstrip())
    if last.startswith(end):
        return end, []
    if found[0] == tokenizer.eos_token or ends_last:
        return end, [f"each reply ends with {end!r}, also the last, where it has {last!r}"]
    raise ValueError("no control token ends the last reply, so the model could not learn to stop")


def check(tokenizer, prompt):
    """Compares ids with those of the template, for two turns and for a question -> notes."""
    language = Language(tokenizer, prompt)
    for texts in PROBES:
        for part, ask in ((texts[:4], False), (texts, True)):
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(part)]
            ours, _ = tokenize({"conversations": turns}, language, 0, 10 ** 6, ask)
            # With a third turn behind them: some templates write something else into the last reply.
            theirs = render(tokenizer, part if ask else (*part, "Why?", "So."), ask)
            theirs = tokenizer(theirs, add_special_tokens=False)["input_ids"]
            same = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]),
                        min(len(ours), len(theirs)))
            # A conversation must be the beginning of theirs. Of two questions one may be longer: see below.
            if same < len(ours) and not (ask and same == len(theirs)):
                place = tokenizer.decode(theirs[max(0, same - 8):same + 8])
                raise ValueError(f"cut into turns, {place!r} of it would become other ids")
        left, added = (tokenizer.decode(ids[same:]).strip() for ids in (theirs, ours))      # of the question
    if left:                                                # a mark behind which the model would think
        return [f"{left!r}, which it writes where a reply is to come, is left out"]
    if added:                                               # a word that the model would have to say itself
        return [f"{added!r} is written before each reply, also one that is to come"]
    return []


def check_same(state, language, ckpt, llm):
    """state: of a checkpoint. Raises UserError where its run was trained with another format than is read now
    from the template: the model would be asked in words that it does not know."""
    before, now = state.get("prompt"), list(language.prompt[:5])
    if before is None and language.prompt.in_place:
        raise UserError(f"{ckpt} is older than formats that are learned from chat templates. Say in its "
                        f'config.json which it was trained with: "prompt": "chatml" for a template with '
                        "<|im_start|>, else llama2, mistral or plain")
    if before not in (None, now):
        raise UserError(f"{ckpt} was trained with the prompt format {before}, but the chat template of {llm} "
                        f"gives {now}. Was the template changed?")


def changed(state, language):
    """state: of the checkpoint that a run starts from -> a word about the format that it was trained with, if
    the run uses another one; "" if it is the same. A run may change it, but not without knowing."""
    before = state.get("prompt")
    if before in (None, list(language.prompt[:5])):         # None: an older version did not write it down
        return ""
    first, _, before_reply, end, _ = before
    return (f"changed: the checkpoint was trained with {first!r} QUESTION {before_reply!r} REPLY {end!r}, "
            "and has to learn another one now. Leave --prompt out to keep it")


def describe(language):
    """The format for a person to read."""
    prompt, bos = language.prompt, language.tokenizer.decode(language.bos)
    parts = (bos + prompt.first, "QUESTION", prompt.before_reply, "REPLY", prompt.end, "|", prompt.user,
             "...")
    origin = "from the tokenizer's chat template" if prompt.in_place else ""
    about = "; ".join(text for text in (origin, prompt.note) if text)
    return " ".join(part if part in ("QUESTION", "REPLY", "|", "...") else repr(part)
                    for part in parts if part) + (f" ({about})" if about else "")
