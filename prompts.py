"""A conversation -> what the language model reads (input_ids), and what it is to learn of it (labels).

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}
becomes
    input_ids  <s> [P patches] In: What is it?\\nOut: A cat. </s>
    labels     what the loss sees: " A cat.</s>", and IGNORE everywhere else

A token whose label is not IGNORE is called supervised: the model is trained to say it. The questions are
there to be read only.

Each turn is tokenised once, and its labels travel with it. Others tokenise the whole conversation, and then
search for the replies in the ids; where a tokenizer joins the border of two turns, the search fails, and
nothing of the example is learned. Training and inference build their prompts by the same function,
`to_pieces`.
"""
import re
from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer

from config import BadExample, UserError

IGNORE = -100                               # a label that the loss skips
IMAGE = -200                                # stands in input_ids where a patch will be; no vocabulary entry
TAG = "<image>"


def find_places(input_ids, labels):         # (B, T), (B, T)
    """-> where patches stand, (N P,); where the next token is supervised, (S,). Counted row behind row."""
    learned = labels.roll(-1, dims=1) != IGNORE
    learned[:, -1] = False                  # behind the last position of a row stands nothing
    return [mask.flatten().nonzero().flatten() for mask in (input_ids == IMAGE, learned)]


class Prompt(NamedTuple):
    """A conversation is first + question + before_reply + (reply) + end,
    then user + question + before_reply + (reply) + end ...  The formats stand in chat.py.

    {bos} and {eos} stand for the tokenizer's own tokens for the begin and the end of a text. A space at the
    end of `before_reply` goes with the reply: " cat" is one token, and after a lone space the model would see
    something it has hardly ever read.
    """
    first: str                              # system text and what stands before the first question
    user: str                               # what stands before each later question
    before_reply: str                       # what stands between question and reply
    end: str                                # what ends the reply; learned, so the model learns to stop
    bos: bool | None = None                 # does BOS stand in front? None: as the tokenizer does by itself
    keep_space: bool = False                # the space at the end of before_reply stays there, as a token
    in_place: bool = False                  # pieces are read as parts of one text, see `Piece.behind`
    note: str = ""                          # what a person should know about it


class Language:
    """A tokenizer together with the prompt format: everything that turns text into ids.

    captions: examples are read as stage align does, the picture and then the first reply, no question.
    rows:     size of the model's table of embeddings, if it is known.
    place:    where one picture stands: "first", or at its "tag" (see `to_pieces`).
    Raises UserError where the tokenizer lacks a token that the prompt needs.
    """

    def __init__(self, tokenizer, prompt, captions=False, rows=None, place="first"):
        self.tokenizer, self.captions, self.rows, self.place = tokenizer, captions, rows, place
        # All added tokens count, except runs of spaces, which some tokenizers have for program code.
        control = {token.content for token in tokenizer.added_tokens_decoder.values()
                   if token.special or token.content.strip()} - {TAG}
        self.control = re.compile("|".join(map(re.escape, control)) or "(?!)")      # (?!) is found nowhere
        special = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end-of-sequence token, so the model could never learn "
                            "to stop. Set `eos_token` in its tokenizer_config.json")
        self.prompt = Prompt(*(text.replace("{bos}", special["bos"]).replace("{eos}", special["eos"])
                               for text in prompt[:4]), *prompt[4:])
        # Whether a text begins with BOS is tried out: many tokenizers have one and do not use it.
        bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id if prompt.bos is None else prompt.bos
        if bos and tokenizer.bos_token is None:
            raise UserError("this --prompt begins with a begin-of-sequence token, but the tokenizer has "
                            "none. Set `bos_token` in its tokenizer_config.json, or take another --prompt")
        self.bos = [tokenizer.bos_token_id] if bos else []
        # Sentencepiece puts a space in front of each text by itself ("cat" is read as "▁cat"). With other
        # tokenizers we write the space between prompt and reply.
        self.adds_space = tokenizer.convert_ids_to_tokens(self.ids(["cat"])[0])[0].startswith("▁")
        # Generation ends when this id comes. A caption ends with EOS, whatever ends a reply.
        self.end_id = self.ids([tokenizer.eos_token if captions else self.prompt.end])[0][-1]

    @property
    def gap(self):
        """What is written between before_reply and the reply."""
        writes = self.prompt.before_reply.endswith(" ") and not self.prompt.keep_space
        return " " if writes and (self.prompt.in_place or not self.adds_space) else ""

    @property
    def before_reply(self):
        text = self.prompt.before_reply
        return text if self.prompt.keep_space else text.rstrip(" ")

    def ids(self, texts):
        """Texts -> lists of ids, without BOS. One call for many texts: the tokenizer works on all cores."""
        # Not building attention masks makes tokenizing 25 % faster.
        no = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids = self.tokenizer(texts, **no)["input_ids"] if texts else []
        if self.rows and max((max(each) for each in ids if each), default=0) >= self.rows:
            raise UserError("the tokenizer gives ids that the language model has no embedding for (it has "
                            f"{self.rows}): they are not of one model. Look at the folder of --llm_backbone")
        return ids

    def piece_ids(self, pieces):
        """The ids of those pieces that are texts, in their order."""
        texts = [piece for piece in pieces if piece.text]
        ids = self.ids([piece.behind + piece.text for piece in texts])
        behind = {text: self.ids([text])[0] for text in {piece.behind for piece in texts} - {""}}
        for i, piece in enumerate(texts):
            if piece.plain:
                # Cut behind the first letter of each control token's name: read apart, the two are letters.
                cut = self.control.sub(lambda name: f"{name[0][0]}\0{name[0][1:]}", piece.text).split("\0")
                ids[i] = [token for part in self.ids(cut) for token in part]
            elif piece.behind:
                # Where letters have joined across the border, "]" and "(", the piece is read on its own.
                start = behind[piece.behind]
                ids[i] = ids[i][len(start):] if ids[i][:len(start)] == start else self.ids([piece.text])[0]
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_language(name, prompt="auto", captions=False, place="first"):
    """Folder or hub id of a language model -> Language."""
    from chat import find_prompt
    from foreign import loading_options
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **loading_options(name))
        if not tokenizer("a")["input_ids"]:         # transformers makes one up where the files are missing
            raise ValueError("it knows no word; are its files missing?")
    except Exception as e:                          # transformers raises many kinds here; each means the same
        raise UserError(f"--llm_backbone {name}: no tokenizer can be loaded from it "
                        f"({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e
    try:
        rows = AutoConfig.from_pretrained(name, **loading_options(name)).get_text_config().vocab_size
    except Exception:                               # only a check is lost; load_llm tells what is wrong
        rows = None
    return Language(tokenizer, find_prompt(prompt, name, tokenizer), captions, rows, place)


class Piece(NamedTuple):
    """A stretch of the prompt: a text, a picture (neither text nor ids), or ids that were never text."""
    text: str = ""
    learn: bool = False
    ids: tuple = ()                                         # a robot's action
    plain: bool = False                                     # control tokens in it are text
    # What stands in front of it. Some tokenizers read the start of a text in another way than the same words
    # in its middle. So a piece is tokenised together with this text, whose ids are then left out.
    behind: str = ""

    @property
    def is_picture(self):
        return not self.text and not self.ids


def text_pieces(before, said, after, language, learn=False, behind=""):
    """What somebody said, between two texts of the format -> pieces.

    Usually one piece, tokenised as a whole. But only the format may write control tokens. Somebody who writes
    </s> or <|im_end|> could end a turn and forge the next; so such a text is read on its own, as letters.
    """
    if not language.control.search(said):
        return [Piece(before + said + after, learn, behind=behind)]
    texts = (before, False, behind), (said, True, ""), (after, False, "")
    return [Piece(text, learn, plain=plain, behind=b) for text, plain, b in texts if text]


def to_pieces(example, language, ask=False, reply=()):
    """The texts and pictures of an example, in the order the language model reads them.
    BOS is not among them.

    ask:   stop where the model is to reply: the last reply, if there is one, is left out.
    reply: ids that stand in place of the last reply's text.
    Raises BadExample (without the place: the caller knows it).

    One picture stands at the very start, wherever its tag was: Prismatic (arXiv 2402.07865) found it best,
    and a frozen language model sees pictures at one place only. Several pictures stand at their tags, and
    with language.place "tag", as in LLaVA, one picture does, too.
    """
    images, turns, prompt = images_of(example), turns_of(example), language.prompt
    at_start = len(images) == 1 and language.place == "first"
    # What follows a picture or BOS is read as behind a control token; eos is one. And a turn follows `end`.
    control, end = (language.tokenizer.eos_token, prompt.end) if prompt.in_place else ("", "")
    if language.captions:
        if len(images) != 1:
            raise BadExample(f"stage align needs exactly one picture per example, found {len(images)}")
        replies = [turn["value"].strip() for turn in turns if turn["from"] == "gpt"][:not ask]
        return [Piece()] + [piece for reply in replies for piece in
                            text_pieces("", reply, language.tokenizer.eos_token, language, learn=True)]
    if ask and turns[-1]["from"] == "gpt":
        turns = turns[:-1]
    if not ask and turns[-1]["from"] == "human":
        raise BadExample("the last turn is from 'human', so its reply is missing. Add it, or drop the turn")
    pieces = [Piece()] if at_start else []
    for i, turn in enumerate(turns):
        value = turn["value"].strip()
        if turn["from"] == "gpt" and reply and i == len(turns) - 1:
            pieces.append(Piece(ids=(*reply, language.end_id), learn=True))
        elif turn["from"] == "gpt":
            pieces += text_pieces(language.gap if value else "", value, prompt.end, language, learn=True,
                                  behind=language.before_reply if prompt.in_place else "")
        else:
            opening = prompt.first if i == 0 else prompt.user
            if at_start:
                value = value.replace(TAG, "").strip()
            behind = end if i else control if pieces or language.bos else ""
            for piece in text_pieces(opening, value, language.before_reply, language, behind=behind):
                first, *rest = piece.text.split(TAG)
                pieces += [piece._replace(text=first)] if first else []
                for text in rest:
                    pieces += ([Piece(), piece._replace(text=text, behind=control)] if text else [Piece()])
    return pieces


def tokenize(example, language, patches, max_length, ask=False, reply=()):
    """An example -> input_ids (T,), labels (T,), as lists. `patches`: positions of one picture."""
    pieces = to_pieces(example, language, ask, reply)
    ids = language.piece_ids(pieces)
    return assemble(pieces, ids, language.bos, patches, max_length, ask)


def images_of(example):
    images = example.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadExample(f"'image' must be a file name or a list of them, found {str(images)[:60]!r}")
    return images


def turns_of(example):
    """The checked conversation: human and gpt in turn,
    and one <image> tag per picture, in human turns only."""
    turns = example.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadExample('\'conversations\' must be a list of {"from": "human" | "gpt", "value": TEXT}, '
                         f"found {str(turns)[:60]!r}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadExample(f"turn {i} must have a text under 'value', found {str(turn)[:60]!r}")
        half = re.search("[\ud800-\udfff]", turn["value"])
        if half:                                # JSON can write half of a pair; tokenizers and files can't
            raise BadExample(f"turn {i} holds {half[0]!r}, half a character, perhaps of a cut emoji. "
                             "Remove it")
        expected = ("human", "gpt")[i % 2]
        if turn.get("from") != expected:
            raise BadExample(f"turn {i} must be from {expected!r}, found {turn.get('from')!r}: "
                             "human and gpt take turns, human begins")
        if TAG in turn["value"].replace(TAG, ""):           # "<ima<image>ge>": what is taken out leaves one
            raise BadExample(f"turn {i} has a tag inside of a tag, {turn['value'][:60]!r}. Remove it")
        if expected == "gpt" and TAG in turn["value"]:
            raise BadExample(f"turn {i} is a reply and contains {TAG}; pictures stand in human turns only")
    tags, images = sum(turn["value"].count(TAG) for turn in turns), len(images_of(example))
    if tags != images:
        raise BadExample(f"{images} pictures under 'image', but {tags} {TAG} tags in the human turns. "
                         "There must be one tag for each picture")
    return turns


def assemble(pieces, piece_ids, bos, patches, max_length, ask=False):
    """Pieces and the ids of their texts -> input_ids (T,), labels (T,), as lists.
    Labels travel with their piece.

    ask: nothing is cut. A model that reads half a question would write its other half, not an answer.
    """
    input_ids, labels = list(bos), [IGNORE] * len(bos)
    ids = iter(piece_ids)
    for piece in pieces:
        new = [IMAGE] * patches if piece.is_picture else list(piece.ids) or next(ids)
        input_ids += new
        labels += new if piece.learn else [IGNORE] * len(new)
    if IMAGE in input_ids[max_length:]:
        raise BadExample(f"it takes {len(input_ids)} positions, and cutting it to --max_length {max_length} "
                         f"would cut a picture ({patches} positions each). "
                         "Raise --max_length or drop the example")
    if ask and len(input_ids) > max_length:
        raise BadExample(f"the question takes {len(input_ids)} positions, --max_length is {max_length}. "
                         "Shorten it")
    if not ask:
        check_supervised(labels[:max_length], len(input_ids), max_length)
    return input_ids[:max_length], labels[:max_length]


def check_supervised(labels, length, max_length):
    # The model guesses each token from those before it (see VLM.forward), so the first one is never guessed.
    if all(label == IGNORE for label in labels[1:]):
        raise BadExample(f"no token to learn is left after cutting {length} positions to "
                         f"--max_length {max_length}. Raise --max_length, or drop the example"
                         if length > max_length else
                         "there is no token to learn in it. Add a reply, or drop the example")
