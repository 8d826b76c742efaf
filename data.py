"""One example: JSON + pictures -> tensors.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}
becomes
    input_ids  <s> [P patches] In: What is it?\\nOut: A cat. </s>
    labels     what the loss sees: " A cat.</s>", and IGNORE everywhere else

Prompts of training and of inference come from the same function, `to_pieces`.

    python data.py --check FILE --image_dir DIR     # what is wrong in my data, how long is it,
                                                      what will the loss see?
"""
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor

import actions
from config import PRESETS, Config, UserError, knob, parse

IGNORE = -100                               # a label that the loss skips
IMAGE = -200                                # stands in input_ids where a patch will be; no vocabulary entry
TAG = "<image>"


class BadExample(UserError):
    """An example that can't be trained on: which file, which example, what is wrong, what to do."""


# -- prompts -------------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """A conversation is first + question + answer + (reply) + end,
    then user + question + answer + (reply) + end ...

    {bos} and {eos} stand for the tokenizer's own tokens. A space at the end of `answer` goes with the reply:
    " cat" is one token, and after a lone space the model would see something it has hardly ever read.
    """
    first: str                              # system text and what stands before the first question
    user: str                               # what stands before each later question
    answer: str                             # what stands between question and reply
    end: str                                # what ends the reply; learned, so the model learns to stop


PROMPTS = {
    "plain": Prompt("In: ", "In: ", "\nOut: ", "{eos}"),    # Prismatic's, for models without a chat format
    "vicuna": Prompt("A chat between a curious user and an artificial intelligence assistant. The assistant "
                     "gives helpful, detailed, and polite answers to the user's questions. USER: ",
                     "USER: ", " ASSISTANT: ", "{eos}"),
    "llama2": Prompt("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n",
                     "{bos}[INST] ", " [/INST] ", " {eos}"),
    "mistral": Prompt("[INST] ", "[INST] ", " [/INST] ", "{eos}"),
    "phi": Prompt("Instruct: ", "Instruct: ", "\nOutput: ", "{eos}"),
    "chatml": Prompt("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
                     "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
}


def known_prompt(name, tokenizer):
    """The prompt format that a language model was made for: by its chat template, then by its name."""
    template, name = str(getattr(tokenizer, "chat_template", None) or ""), name.lower()
    if "<|im_start|>" in template or {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
        return "chatml"
    if "<<SYS>>" in template:
        return "llama2"
    if "[INST]" in template or ("mistral" in name and "instruct" in name):
        return "mistral"
    return next((prompt for key, prompt in (("vicuna", "vicuna"), ("llava", "vicuna"),
                                            ("phi-1", "phi"), ("phi-2", "phi")) if key in name), "plain")


class Language:
    """A tokenizer together with the prompt format: everything that turns text into ids.

    Raises UserError where the tokenizer lacks a token that the prompt needs.
    """

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.name = tokenizer, prompt
        special = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end-of-sequence token, so the model could never learn "
                            "to stop. Set `eos_token` in its tokenizer_config.json")
        self.prompt = Prompt(*(text.replace("{bos}", special["bos"]).replace("{eos}", special["eos"])
                               for text in PROMPTS[prompt]))
        # Asked, not assumed: many tokenizers have a BOS but add none.
        first_id = tokenizer("a")["input_ids"][0]
        self.bos = [tokenizer.bos_token_id] if first_id == tokenizer.bos_token_id else []
        # Sentencepiece writes "cat" as "▁cat" by itself;
        # for the others the space before a reply is ours to write.
        self.adds_space = tokenizer.convert_ids_to_tokens(self.ids(["cat"])[0])[0].startswith("▁")
        end = self.ids([self.prompt.end])[0]
        self.stop = end[-1]                                 # generation ends when this id comes
        if prompt == "chatml" and len(end) != 1:
            raise UserError("--prompt chatml needs a tokenizer that has <|im_end|> as one token; "
                            "this one has not. Try --prompt plain")

    def ids(self, texts):
        """Texts -> lists of ids, without BOS. One call for many texts: the tokenizer works on all cores."""
        no = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, **no)["input_ids"] if texts else []    # masks: a quarter of the time

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_language(name, prompt="auto"):
    """Folder or hub id of a language model -> Language."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer("a")["input_ids"]:         # transformers makes one up where the files are missing
            raise ValueError("it knows no word; are its files missing?")
    except Exception as e:                          # transformers raises many kinds here; each means the same
        raise UserError(f"--llm_backbone {name}: no tokenizer can be loaded from it "
                        f"({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e
    return Language(tokenizer, known_prompt(name, tokenizer) if prompt == "auto" else prompt)


class Piece(NamedTuple):
    text: str = ""                                          # neither text nor ids: a picture
    learn: bool = False
    ids: tuple = ()                                         # an action, which is never written as text

    @property
    def is_picture(self):
        return not self.text and not self.ids


def to_pieces(example, language, caption_only=False, ask=False, action=()):
    """The texts and pictures of an example, in the order the language model reads them.
    BOS is not among them.

    caption_only: the human turn is dropped and the reply follows the picture (stage align).
    ask:          stop where the model is to reply: the last reply, if there is one, is left out.
    action:       ids that stand in place of the last reply's text (stage vla).
    Raises BadExample (without the place: the caller knows it).

    One picture stands at the very start, wherever its tag was: Prismatic (arXiv 2402.07865) found it best,
    and a frozen language model sees pictures at one place only. Several pictures stand at their tags.
    """
    images, turns = images_of(example), turns_of(example)
    prompt, space = language.prompt, "" if language.adds_space else " "
    gap = space if prompt.answer.endswith(" ") else ""
    if caption_only:
        if len(images) != 1:
            raise BadExample(f"stage align needs exactly one picture per example, found {len(images)}")
        replies = [Piece(turn["value"].strip() + language.tokenizer.eos_token, True)
                   for turn in turns if turn["from"] == "gpt"]
        return [Piece()] + ([] if ask else replies[:1])
    if ask and turns[-1]["from"] == "gpt":
        turns = turns[:-1]
    if not ask and turns[-1]["from"] == "human":
        raise BadExample("the last turn is from 'human', so its reply is missing. Add it, or drop the turn")
    pieces = [Piece()] if len(images) == 1 else []
    for i, turn in enumerate(turns):
        value = turn["value"].strip()
        if turn["from"] == "gpt" and action:
            pieces.append(Piece(ids=(*action, language.stop), learn=True))
            continue
        if turn["from"] == "gpt":
            pieces.append(Piece((gap + value if value else "") + prompt.end, True))
            continue
        opening = prompt.first if i == 0 else prompt.user
        if len(images) == 1:
            value = value.replace(TAG, "").strip()
        first, *rest = (opening + value + prompt.answer.rstrip(" ")).split(TAG)
        pieces.append(Piece(first))
        for text in rest:
            pieces += [Piece(), Piece(text)] if text else [Piece()]
    return pieces


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

    ask: nothing is cut, because behind the cut the model would go on with the question
    instead of answering it.
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
    # The first label is nobody's target: position t predicts t + 1.
    if all(label == IGNORE for label in labels[1:]):
        raise BadExample(f"no token to learn is left after cutting {length} positions to "
                         f"--max_length {max_length}. Raise --max_length, or drop the example"
                         if length > max_length else
                         "there is no token to learn in it. Add a reply, or drop the example")


# -- pictures ------------------------------------------------------------------------------------------------

class ImageTransform:
    """A picture -> (3, size, size) float tensor for one backbone, by that backbone's own preprocessor file.

    resize: resize-naive squashes to a square; resize-crop cuts the longer side; letterbox pads with the
    mean color. `patches` is the number of patches that the backbone makes of it. center_crop: see `distort`.
    """

    def __init__(self, size, patch_size, mean, std, resample=3, resize="resize-naive", center_crop=False):
        self.center_crop = center_crop
        self.size, self.resize, self.resample = size, resize, Image.Resampling(resample)
        self.patches = (size // patch_size) ** 2
        self.fill = tuple(round(255 * value) for value in mean)
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))

    def __call__(self, image):
        square = (self.size, self.size)
        if self.center_crop:
            image = crop(image, 0.5, 0.5)
        if self.resize == "resize-crop":
            image = ImageOps.fit(image, square, self.resample)
        elif self.resize == "letterbox":
            image = ImageOps.pad(image, square, self.resample, color=self.fill)
        else:
            image = image.resize(square, self.resample)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                 # (3, size, size) uint8
        return (pixels.float() / 255 - self.mean) / self.std


AREA = 0.9                                              # of a picture that a random crop keeps, as OpenVLA


def crop(image, x, y):
    """The part of AREA at (x, y), both in 0..1, of all its places. (0.5, 0.5) is the center."""
    width, height = (round(side * AREA ** 0.5) for side in image.size)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


def distort(image, rng):
    """OpenVLA's augmentation: a random crop, then brightness, contrast, saturation and hue.

    The policy has then never seen a whole picture:
    at inference it must get the central crop, or it misses its aim.
    """
    image = crop(image, *rng.random(2))
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(rng.uniform(0.8, 1.2))
    hue, saturation, value = image.convert("HSV").split()
    shift = round(255 * rng.uniform(-0.05, 0.05))
    return Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")


def load_image_transforms(names, resize, center_crop=False):
    """One ImageTransform for each backbone of a comma-separated list."""
    transforms = []
    for name in names.split(","):
        try:
            settings, _ = BaseImageProcessor.get_image_processor_dict(name)
            config = AutoConfig.from_pretrained(name)
            config = getattr(config, "vision_config", config)
            size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
            if isinstance(size, dict):
                size = size.get("height") or size["shortest_edge"]
            transforms.append(ImageTransform(
                size, config.patch_size, settings["image_mean"], settings["image_std"],
                settings.get("resample", 3), resize, center_crop))
        except Exception as e:                          # also what is missing in them: KeyError 'image_mean'
            raise UserError(f"--vision_backbone {name}: config.json and preprocessor_config.json can't be "
                            f"loaded from it ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e
    if len({transform.patches for transform in transforms}) > 1:
        found = " and ".join(f"{name} makes {t.patches}" for name, t in zip(names.split(","), transforms))
        raise UserError("--vision_backbone: joined backbones must make the same number of patches, "
                        f"but {found}. Choose versions whose (picture size / patch size) agree")
    return transforms


def read_image(path):
    """A picture file as RGB, the way a person sees it:
    rotated by its EXIF tag, on white where it is transparent.

    Of an animation, the first frame. Raises BadExample where the file is missing or can't be decoded.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):      # 16 bit: `convert` would clip everything above 255 to white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise BadExample(f"picture {path} does not exist. Paths are relative to --image_dir") from None
    except Exception as e:                              # decoders raise many kinds here; each means the same
        raise BadExample(f"picture {path} can't be read ({type(e).__name__}: {e}). "
                         "Replace it or drop the example") from e


# -- the dataset ---------------------------------------------------------------------------------------------

LENGTHS = 1                                                 # raise it when examples become other ids
SPACE = re.compile(r"[ \t\r\n]*")


def find_rows(path):
    """LLaVA JSON (a list), JSON lines, or episodes -> (n, 3) the first byte of each example, the one behind
    its last, and the step of the episode (-1: no episode).

    Raises UserError with the file and the line.
    """
    def wrong(at, what):
        return UserError(f"{path}, line {text.count(chr(10), 0, at) + 1}: {what}. "
                         "Expected a JSON list of examples, or one example per line")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist. It should be a LLaVA JSON or JSON-lines file")
    # One character for each byte: JSON's own signs are ASCII, so what is found is also the place in the file.
    raw = Path(path).read_bytes()
    text = raw.decode("latin-1")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise wrong(e.start, "this is no UTF-8 text") from e
    at = SPACE.match(text, 3 * text.startswith("\xef\xbb\xbf")).end()               # behind a byte order mark
    is_list, places, decoder = text.startswith("[", at), [], json.JSONDecoder()
    at += is_list
    while (at := SPACE.match(text, at).end()) < len(text) and not (is_list and text[at] == "]"):
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            # A number of 5000 digits, brackets without end: no position.
            raise wrong(getattr(e, "pos", at), f"this is no JSON ({getattr(e, 'msg', e)})") from e
        if not isinstance(row, dict):
            raise wrong(at, f"example {len(places)} must be an object with 'conversations', "
                            f"found {str(row)[:60]!r}")
        if "steps" in row:                                  # an episode: each step is an example
            problem = actions.episode_problem(row)
            if problem:
                raise wrong(at, f"episode id={row.get('id')!r}: {problem}")
            places += [(at, end, step) for step in range(len(row["steps"]))]
        else:
            places.append((at, end, -1))
        at = SPACE.match(text, end).end()
        if is_list and text[at:at + 1] not in (",", "]"):
            raise wrong(at, f"a comma or the end of the list is missing behind example {len(places) - 1}")
        at += is_list and text[at] == ","
    if is_list and at == len(text):
        raise wrong(at, "the list does not end; the file was cut off")
    if is_list and (at := SPACE.match(text, at + 1).end()) < len(text):
        raise wrong(at, "there is more behind the end of the list")
    if not places:
        raise UserError(f"{path} holds no example")
    return np.array(places, np.int64)


class Conversations(torch.utils.data.Dataset):
    """Map-style dataset over one file.

    `data[i]` is {input_ids (T,), labels (T,), images, id, replaced}, or a BadExample. It returns the error
    instead of raising it: raised inside a DataLoader worker, it would arrive wrapped in that worker's
    traceback. The loop raises it.

    caption_only, ask: see `to_pieces`.
    skip_bad: a bad example is replaced by the next good one of its modality.
    policy:   ActionTokens; the file must then hold episodes, and must not otherwise.
    augment:  a seed; pictures are then cropped and colored at random, differently in each `epoch`.
    """

    def __init__(self, path, image_dir, language, transforms, max_length, caption_only=False, ask=False,
                 skip_bad=False, policy=None, augment=None):
        self.path, self.image_dir = Path(path), Path(image_dir)
        self.language, self.transforms, self.max_length = language, transforms, max_length
        self.caption_only, self.ask, self.skip_bad = caption_only, ask, skip_bad
        self.policy, self.key, self.augment = policy, actions.dataset_name(path), augment
        # Data workers live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.cache = self._read_cache()         # (n, 5) first byte, end, step, length (0 = bad), has picture
        self.places = find_rows(path) if self.cache is None else self.cache[:, :3]
        if (self.places[:, 2] >= 0).any() != bool(policy) or (self.places[:, 2] >= 0).all() != bool(policy):
            raise UserError(f"{path} must hold "
                            f"{'episodes, for --stage vla' if policy else 'conversations'} only"
                            f"{'' if policy else '; episodes are for --stage vla'}")
        # The file is mapped, so all workers and ranks share it. A list of dicts would be copied into every
        # worker page by page, because Python writes a reference count into each object it looks at.
        self.bytes = np.memmap(path, np.uint8, "r")

    def __getstate__(self):
        """For a worker that is started afresh, not forked: it maps the file itself, and gets no copy."""
        return self.__dict__ | {"bytes": None}

    def __setstate__(self, state):
        self.__dict__ = state | {"bytes": np.memmap(state["path"], np.uint8, "r")}

    def __len__(self):
        return len(self.places)

    def row(self, i):
        start, end, step = self.places[i]
        row = json.loads(self.bytes[start:end].tobytes())
        return row if step < 0 else actions.as_conversation(row, step)

    def pieces(self, row):
        action = self.policy.encode(row["action"], self.key).tolist() if self.policy and not self.ask else ()
        return to_pieces(row, self.language, self.caption_only, self.ask, action)

    def named(self, i, error):
        """The error with its place."""
        row = self.row(i)
        return BadExample(f"{self.path}[{i}] id={row.get('id')!r}: {error}. "
                          f"It begins {self.beginning(row)!r}")

    @staticmethod
    def beginning(row):
        turns = row.get("conversations")
        first = turns[0] if isinstance(turns, list) and turns else row
        return str(first.get("value") if isinstance(first, dict) else first)[:40]

    def tokens(self, row):
        pieces = self.pieces(row)
        ids = self.language.ids([piece.text for piece in pieces if piece.text])
        return assemble(pieces, ids, self.language.bos, self.transforms[0].patches, self.max_length, self.ask)

    def image_path(self, name):
        path = self.image_dir / name
        try:
            inside = path.resolve().is_relative_to(self.image_dir.resolve())
        except (OSError, ValueError, RuntimeError) as e:    # a link to itself, a zero byte, half a character
            raise BadExample(f"picture {name!r} can't be read ({type(e).__name__}: {e}). "
                             "Correct its name") from e
        if not inside:
            raise BadExample(f"picture {name} lies outside of --image_dir {self.image_dir}; "
                             "such paths are refused")
        return path

    def __getitem__(self, i):
        example = self._read(i)
        if self.skip_bad and isinstance(example, BadExample):
            for j in self._next_good(i):
                other = self._read(j)
                if not isinstance(other, BadExample):
                    return other | {"replaced": 1}
        return example

    def _read(self, i):
        row = self.row(i)
        try:
            input_ids, labels = self.tokens(row)
            pictures = [read_image(self.image_path(name)) for name in images_of(row)]
            if self.augment is not None:
                rng = np.random.default_rng((self.augment, int(self.epoch), i))
                pictures = [distort(picture, rng) for picture in pictures]
        except BadExample as e:
            return self.named(i, e)
        return {"id": str(row.get("id", i)),
                "input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels),
                "images": [[transform(picture) for transform in self.transforms] for picture in pictures],
                "replaced": 0, "key": self.key}

    def _next_good(self, i):
        """Indices of the examples behind i that can be tokenised and have i's modality,
        around the end of the file."""
        _, has_image = self.lengths()
        good = np.flatnonzero((self.cache[:, 3] > 0) & (has_image == has_image[i]))
        return [int(j) for j in np.roll(good, -np.searchsorted(good, i + 1)) if j != i]

    def lengths(self):
        """-> lengths (n,) in positions, has_image (n,). Exact: every text is tokenised.

        Kept in a file beside the data. The file's name holds a hash of everything that the lengths depend on,
        so an old one is never taken for a new one. Raises BadExample for the first example that can't be
        trained on; with skip_bad it gets the values of the next good one.
        """
        if self.cache is None:
            self.cache = self._read_cache()                 # by now another rank may have counted
        if self.cache is None:
            self.cache = np.column_stack([self.places, self._count()])
            self._write_cache()
        lengths, has_image = self.cache[:, 3].copy(), self.cache[:, 4].astype(bool)
        good = np.flatnonzero(lengths)
        if len(good) < len(lengths):
            first = int(np.flatnonzero(lengths == 0)[0])
            if not self.skip_bad or len(good) == 0:
                raise self._read(first)
            next_good = good[np.searchsorted(good, np.arange(len(lengths))) % len(good)]
            lengths, has_image = lengths[next_good], has_image[next_good]
        return lengths, has_image

    def _count(self):
        """-> (n, 2) length and has picture, length 0 where the example is bad."""
        counted, chunk = np.zeros((len(self), 2), np.int64), 1000
        for start in tqdm(range(0, len(self), chunk), desc="counting tokens", unit_scale=chunk,
                          disable=len(self) < 10000):
            indices, pieces = range(start, min(start + chunk, len(self))), []
            for i in indices:
                try:
                    pieces.append(self.pieces(self.row(i)))
                except BadExample as e:
                    pieces.append(self._bad(i, e))
            ids = iter(self.language.ids([piece.text for row in pieces for piece in row if piece.text]))
            for i, row in zip(indices, pieces):
                texts = [next(ids) for piece in row if piece.text]
                try:
                    counted[i] = (self._length(row, texts) if row else 0,
                                  any(piece.is_picture for piece in row))
                except BadExample as e:
                    self._bad(i, e)
        return counted

    def _bad(self, i, error):
        """Without skip_bad the first bad example ends the count:
        nobody wants to wait for the rest of 665,000."""
        if not self.skip_bad:
            raise self.named(i, error) from None
        return []

    def _length(self, pieces, texts):
        return len(assemble(pieces, texts, self.language.bos, self.transforms[0].patches, self.max_length)[0])

    def _cache_file(self):
        with open(self.path, "rb") as file:
            h = hashlib.file_digest(file, "sha256")
        tokenizer = self.language.tokenizer
        rules = (tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast
                 else repr(sorted(tokenizer.get_vocab().items())))
        h.update(repr((rules, self.language.prompt, self.language.bos,
                       self.transforms[0].patches, self.max_length, self.caption_only,
                       tokenizer.eos_token, self.policy is not None, LENGTHS)).encode())
        return self.path.with_name(f".{self.path.name}.{h.hexdigest()[:16]}.lengths.npy")

    def _read_cache(self):
        try:
            return np.load(self._cache_file(), mmap_mode="r", allow_pickle=False)       # shared by all
        except (OSError, ValueError, EOFError):             # not there, or cut off: then it is made again
            return None

    def _write_cache(self):
        try:
            part = self._cache_file().with_suffix(f".part{os.getpid()}.npy")
            np.save(part, self.cache)
            part.replace(self._cache_file())
        except OSError as e:                                # a folder one may not write into
            print(f"the token counts can't be kept beside {self.path} ({e.strerror}); "
                  "the next start counts again")


def collate(examples):
    """Examples -> one batch, padded on the right. A BadExample among them is returned in place of the batch.

    input_ids (B, T), labels (B, T), attention_mask (B, T) bool, pixel_values: one (N, C, H, W) per backbone,
    N pictures in the order of the examples (no tensor at all for text only), ids and keys (the files' names):
    list of str, replaced: how many (see skip_bad).
    """
    for example in examples:
        if isinstance(example, BadExample):
            return example
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    images = [image for example in examples for image in example["images"]]
    input_ids = pad([example["input_ids"] for example in examples], batch_first=True)
    return {"ids": [example["id"] for example in examples],
            "replaced": sum(example["replaced"] for example in examples),
            "keys": [example["key"] for example in examples],
            "input_ids": input_ids,
            "labels": pad([example["labels"] for example in examples], batch_first=True,
                          padding_value=IGNORE),
            # From the lengths. `input_ids != pad` would also hide every end token where the two share an id.
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "pixel_values": [torch.stack(views) for views in zip(*images)]}


def show(input_ids, labels, tokenizer):
    """An example as text: patches counted, >> << around what the loss sees."""
    text, i = "", 0
    while i < len(input_ids):
        learned, picture, j = labels[i] != IGNORE, input_ids[i] == IMAGE, i
        while j < len(input_ids) and (labels[j] != IGNORE, input_ids[j] == IMAGE) == (learned, picture):
            j += 1
        words = f"[{j - i} patches]" if picture else tokenizer.decode(input_ids[i:j])
        text += f">>{words}<<" if learned else words
        i = j
    return text


# -- python data.py --check ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class CheckConfig:
    check: str = knob("", "file to check: LLaVA JSON or JSON lines")
    image_dir: str = knob("", "folder that the pictures' paths start from")
    stage: Literal["align", "finetune", "vla"] = knob(
        "finetune", "align drops the human turns; vla reads episodes")
    preset: str = knob("toy", "takes the backbones from this preset")
    vision_backbone: str = knob("", "folder or hub id; empty = the preset's")
    llm_backbone: str = knob("", "folder or hub id; empty = the preset's")
    image_resize: Config.__annotations__["image_resize"] = knob("resize-naive", "as in train.py")
    prompt: Config.__annotations__["prompt"] = knob("auto", "as in train.py")
    max_length: int = knob(2048, "as in train.py")
    show_errors: int = knob(20, "errors to print; all are counted")

    def __post_init__(self):
        if not self.check:
            raise UserError("--check FILE is missing")
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset}: there is none of this name. "
                            f"Choose from {', '.join(PRESETS)}")

    def backbone(self, name):
        default = next(f.default for f in Config.__dataclass_fields__.values() if f.name == name)
        return getattr(self, name) or PRESETS[self.preset].get("", {}).get(name, default)


def check(cfg):
    """Reads every example and every picture, prints what is wrong and what there is.
    Returns the number of errors."""
    language = load_language(cfg.backbone("llm_backbone"), cfg.prompt)
    transforms = load_image_transforms(cfg.backbone("vision_backbone"), cfg.image_resize)
    policy = (actions.ActionTokens(actions.end_of_actions(language.tokenizer), {})
              if cfg.stage == "vla" else None)
    data = Conversations(cfg.check, cfg.image_dir, language, transforms, cfg.max_length, cfg.stage == "align",
                         policy=policy)
    if policy:
        policy.learn_units(data)
        print(json.dumps(policy.statistics, indent=1))
    modality, lengths, supervised, errors, samples = Counter(), [], 0, [], []
    for i in tqdm(range(len(data)), desc="checking", disable=None):
        example = data[i]
        if isinstance(example, BadExample):
            errors.append(str(example))
            continue
        pictures = len(example["images"])
        modality[("text only", "one picture")[pictures] if pictures < 2 else "several pictures"] += 1
        lengths.append(len(example["input_ids"]))
        supervised += int((example["labels"][1:] != IGNORE).sum())
        if len(samples) < 3:
            samples.append(show(example["input_ids"].tolist(), example["labels"].tolist(),
                                language.tokenizer))
    for error in errors[:cfg.show_errors]:
        print("wrong:", error)
    if len(errors) > cfg.show_errors:
        print(f"... and {len(errors) - cfg.show_errors} more")
    print(f"{len(data)} examples, {len(errors)} wrong ·",
          ", ".join(f"{n} {name}" for name, n in modality.most_common()))
    if lengths:
        low, middle, high = np.percentile(lengths, (0, 50, 100)).astype(int)
        print(f"positions: shortest {low}, median {middle}, longest {high}; "
              f"{transforms[0].patches} per picture; "
              f"{supervised / len(lengths):.1f} supervised per example; prompt {language.name}")
    for sample in samples:
        print("sample:", sample)
    return len(errors)


if __name__ == "__main__":
    try:
        raise SystemExit(1 if check(parse(CheckConfig, description="Check a data file.")) else 0)
    except UserError as e:
        raise SystemExit(f"error: {e}")
