"""Look at a data file before training on it: what is wrong, how long is it, what will the loss see?

    python check.py FILE --image_dir DIR
    python check.py FILE --image_dir DIR --sheet sheet.png  # pictures as the model gets them, and texts
    python check.py FILE --image_dir DIR --stage vla        # episodes, and the statistics of their actions

Every example is tokenised and every picture opened. Ends with 1 if something is wrong.
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from config import BadExample, Config, UserError, check_limits, knob, parse, printable
from presets import PRESETS


def or_empty(name):
    return Literal[("", *get_args(Config.__annotations__[name]))]


@dataclass(frozen=True)
class CheckConfig:
    file: str = knob("", "file to check: LLaVA JSON, JSON lines, or episodes")
    image_dir: str = knob("", "where the pictures' paths start: a folder, an uncompressed .zip or .tar")
    stage: Literal["align", "finetune", "vla"] = knob(
        "finetune", "align drops the human turns; vla reads episodes")
    preset: str = knob("toy", "takes the model's flags from this preset")
    vision_backbone: str = knob("", "folder or hub id; empty = the preset's")
    llm_backbone: str = knob("", "folder or hub id; empty = the preset's")
    image_resize: or_empty("image_resize") = knob("", "as in train.py; empty = the preset's")
    prompt: or_empty("prompt") = knob("", "as in train.py; empty = the preset's")
    picture_place: or_empty("picture_place") = knob("", "as in train.py; empty = the preset's")
    max_length: int = knob(2048, "as in train.py")
    chunk: int = knob(1, "vla: as in train.py", "actions")
    state: bool = knob(False, "vla: as in train.py; the states are then checked, too")
    show_errors: int = knob(20, "errors to print; all are counted")
    sheet: str = knob("", "draw 24 examples, spread over the file, into this .png")

    def __post_init__(self):
        if not self.file:
            raise UserError("which file? python check.py FILE --image_dir DIR")
        if self.sheet and not self.sheet.endswith(".png"):
            raise UserError(f"--sheet {self.sheet}: give a name that ends with .png")
        check_limits(self, {"max_length": (1, 10 ** 7), "show_errors": (0, 10 ** 6), "chunk": (1, 999)})
        if self.stage != "vla" and (self.chunk > 1 or self.state):
            raise UserError("--chunk and --state are for --stage vla")
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset}: there is none of this name. "
                            f"Choose from {', '.join(PRESETS)}")

    def of_model(self, name):
        default = next(f.default for f in Config.__dataclass_fields__.values() if f.name == name)
        return getattr(self, name) or PRESETS[self.preset].get("", {}).get(name, default)


if __name__ == "__main__":
    cfg = parse(CheckConfig, description="Check a data file.", positional=("file",))

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig

import chat
import ranks
from data import Conversations
from model import load
from images import Pictures, load_image_transforms
from parallel import SLOT
from prompts import IGNORE, IMAGE, load_language


def show(input_ids, labels, tokenizer):
    """An example as text: its patches are counted, >> << stand around what the loss sees."""
    slots, text, i = input_ids.count(SLOT), "", 0
    if slots:                               # at the end; what is learned there stands one further
        learned = tokenizer.decode([label for label in labels if label != IGNORE])
        return show(input_ids[:-1 - slots], labels, tokenizer) + f"[{slots} slots]>>{learned}<<"
    while i < len(input_ids):
        learned, picture, j = labels[i] != IGNORE, input_ids[i] == IMAGE, i
        while j < len(input_ids) and (labels[j] != IGNORE, input_ids[j] == IMAGE) == (learned, picture):
            j += 1
        words = f"[{j - i} patches]" if picture else tokenizer.decode(input_ids[i:j])
        text += f">>{words}<<" if learned else words
        i = j
    return text


def open_file(cfg):
    """-> the dataset that train.py would make of the file."""
    language = load_language(cfg.of_model("llm_backbone"), cfg.of_model("prompt"), cfg.stage == "align",
                             cfg.of_model("picture_place"))
    transforms = load_image_transforms(cfg.of_model("vision_backbone"), cfg.of_model("image_resize"))
    about = cfg.file, language, Pictures(cfg.image_dir, transforms), cfg.max_length
    if cfg.stage != "vla":
        return Conversations(*about)
    import actions
    policy = actions.ActionTokens(actions.end_of_actions(language.tokenizer), {}, chunk=cfg.chunk,
                                  state=cfg.state)
    data = actions.Episodes(*about, policy)
    policy.learn_units(data)
    print(json.dumps(policy.statistics, indent=1))
    return data


def cell(data, i, example):
    """Example i for the sheet: its pictures as the first backbone gets them, its first question and reply."""
    if isinstance(example, BadExample):
        return [], f"example {i}", str(example), "firebrick"
    row = data.row(i)
    asked, reply = (turn["value"] for turn in row["conversations"][:2])
    pictures = [Image.fromarray(views[0].permute(1, 2, 0).numpy()) for views in example["images"]]
    return pictures, "" if data.language.captions else asked, reply or str(row["actions"][0]), "darkgreen"


def known_positions(llm_backbone):
    config = load(AutoConfig, llm_backbone, "--llm_backbone").get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_fits(llm, longest, trained, pictures_only):
    """Raises UserError where the data asks for what this model can't do.
    longest: example [positions]; trained: parts."""
    known = getattr(llm.config, "max_position_embeddings", None) or longest
    if longest > known:
        raise UserError(f"the longest example takes {longest} positions, but the language model knows "
                        f"{known}. Set --max_length {known}")
    if not pictures_only and "llm" not in trained:
        raise UserError(f"--trains {','.join(sorted(trained))}: a text-only example can train only the "
                        "language model, and the data holds such examples. Leave them out, or add llm")


def check(cfg):
    """Reads every example and every picture, prints what is wrong and what there is.
    Returns the number of errors."""
    data = open_file(cfg)
    modality, lengths, supervised, errors, samples, cells = Counter(), [], 0, [], [], []
    drawn = set(np.linspace(0, len(data) - 1, 24).astype(int).tolist() if cfg.sheet else [])
    for i in tqdm(range(len(data)), desc="checking", disable=None):
        example = data[i]
        if i in drawn:
            cells.append(cell(data, i, example))
        if isinstance(example, BadExample):
            errors.append(str(example))
            continue
        pictures = len(example["images"])
        modality[("text only", "one picture")[pictures] if pictures < 2 else "several pictures"] += 1
        lengths.append(len(example["input_ids"]))
        supervised += int((example["labels"][1:] != IGNORE).sum())
        if len(samples) < 3:
            samples.append(show(example["input_ids"].tolist(), example["labels"].tolist(),
                                data.language.tokenizer))
    for error in errors[:cfg.show_errors]:
        print("wrong:", error)
    if len(errors) > cfg.show_errors:
        print(f"... and {len(errors) - cfg.show_errors} more")
    print(f"{len(data)} examples, {len(errors)} wrong ·",
          ", ".join(f"{n} {name}" for name, n in modality.most_common()))
    if lengths:
        low, middle, high = np.percentile(lengths, (0, 50, 100)).astype(int)
        print(f"positions: shortest {low}, median {middle}, longest {high}; "
              f"{data.pictures.patches} per picture; "
              f"{supervised / len(lengths):.1f} supervised per example")
        print(f"prompt: {printable(chat.describe(data.language))}")
        known = known_positions(cfg.of_model("llm_backbone"))
        if known and high > known:
            errors.append("too long")
            print(f"wrong: the language model knows {known} positions only. Set --max_length {known}")
    for sample in samples:
        print("sample:", printable(sample))
    if cells:
        import sheets
        sheets.write(cells, Path(cfg.sheet))
    return len(errors)


if __name__ == "__main__":
    ranks.run(lambda: 1 if check(cfg) else 0)
