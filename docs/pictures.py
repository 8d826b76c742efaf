"""Draws the pictures of the pages, from the code and the data that they speak of.

    python docs/pictures.py                 # writes docs/*.png; needs data/toy (python toy/world.py)
    python docs/pictures.py --folder out
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import Config, knob, parse  # noqa: E402


@dataclass(frozen=True)
class PicturesConfig:
    folder: str = knob(str(ROOT / "docs"), "where to write")


if __name__ == "__main__":
    cfg = parse(PicturesConfig, description="Draw the pictures of docs/.")

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from data import Conversations  # noqa: E402
from images import Pictures, load_image_transforms  # noqa: E402
from prompts import IGNORE, IMAGE, load_language  # noqa: E402
from sampler import SplitModalitySampler  # noqa: E402
from train import learning_rate  # noqa: E402

INK, GRAY, PALE, GREEN, BLUE, RED = "#222222", "#888888", "#dddddd", "#2f9e4c", "#2c60d6", "#d62d30"


def canvas(width, height):
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def write(draw, x, y, text, size=15, color=INK, anchor="lm"):
    draw.text((x, y), text, fill=color, font=ImageFont.load_default(size), anchor=anchor)


def arrow(draw, x, y, to):
    draw.line((x, y, to - 6, y), fill=GRAY, width=2)
    draw.polygon([(to, y), (to - 8, y - 5), (to - 8, y + 5)], fill=GRAY)


def toy(name):
    """A file of the toy world as a run reads it."""
    pictures = Pictures("data/toy/images", load_image_transforms("toy/vit", "resize-naive"))
    return Conversations(f"data/toy/{name}.json", load_language("toy/llm"), pictures, 512)


def padding():
    """Four batches in random order, and four grouped by length: what is read, and what is filled up."""
    lengths, has_image = toy("finetune").lengths()
    image, draw = canvas(900, 430)
    for panel, (window, name) in enumerate(((0, "--length_window 0: random order"),
                                            (64, "--length_window 64: grouped by length"))):
        sampler = SplitModalitySampler(lengths, has_image, global_batch_size=32, per_device_batch_size=32,
                                       world_size=1, rank=0, seed=7, window=window)
        rows = lengths[np.array(list(sampler))]                                     # (batches, 32)
        share, top = 1 - rows.sum() / (rows.max(1) * 32).sum(), panel * 215
        write(draw, 20, top + 20, f"{name}, {share:.1%} of all positions are padding")
        for k, batch in enumerate(rows[1:5]):                                       # the first is the longest
            for i, length in enumerate(batch):
                x, y = 20 + k * 220, top + 42 + i * 5
                draw.rectangle((x, y, x + batch.max() * 1.5, y + 3), fill=PALE)
                draw.rectangle((x, y, x + length * 1.5, y + 3), fill=BLUE)
    return image


def rate():
    """The learning rate of the toy's align: 752 steps, warm-up, half a cosine."""
    image, draw = canvas(640, 300)
    total, run = 752, parse(Config, ["--stage", "align"])
    left, right, bottom, top = 80, 610, 250, 40
    place = [(left + (right - left) * step / total,
              bottom - (bottom - top) * learning_rate(step, total, run) / run.learning_rate)
             for step in range(total)]
    warmup = next(i for i in range(total) if learning_rate(i, total, run) == run.learning_rate)
    edge = place[warmup][0]
    draw.rectangle((left, top, edge, bottom), fill="#fbe9d0")
    draw.line((left, top, left, bottom, right, bottom), fill=GRAY, width=2)
    draw.line(place, fill=BLUE, width=3)
    write(draw, edge + 8, top - 16, f"warm-up ends: step {warmup}")
    write(draw, left - 8, top, f"{run.learning_rate:g}", anchor="rm")
    write(draw, left - 8, bottom, "0", anchor="rm")
    write(draw, left, bottom + 18, "step 0", anchor="mm")
    write(draw, right - 10, bottom + 18, f"{total}", anchor="mm")
    write(draw, 400, 110, "half a cosine down to zero", color=BLUE)
    return image


def words(example, tokenizer):
    """(text, supervised) of each position, all patches as one."""
    shown, ids, labels = [], example["input_ids"].tolist(), example["labels"].tolist()
    for i, token in enumerate(ids):
        if token == IMAGE and ids[i - 1] == IMAGE:
            continue
        text = f"{ids.count(IMAGE)} patches" if token == IMAGE else tokenizer.decode([token]).strip(" ")
        shown.append((text.replace("\n", "\\n"), labels[i] != IGNORE))
    return shown


def row_of_boxes(draw, x, y, boxes, size=15):
    """-> the middle of each box"""
    middles = []
    for text, color in boxes:
        width = max(26, int(ImageFont.load_default(size).getlength(text)) + 12) if text else 26
        draw.rounded_rectangle((x, y, x + width, y + 28), 4, fill=color)
        write(draw, x + width / 2, y + 14, text, size, "white" if color != PALE else INK, "mm")
        middles.append(x + width / 2)
        x += width + 5
    return middles


def mask():
    """One example: what is read, and below each position the token that its output is compared with."""
    data = toy("val")
    shown = words(data[0], data.language.tokenizer)
    image, draw = canvas(860, 190)
    write(draw, 20, 22, "input_ids: what the model reads")
    colors = [BLUE if "patches" in text else GREEN if learned else PALE for text, learned in shown]
    texts = [text for text, _ in shown]
    middles = row_of_boxes(draw, 20, 40, list(zip(texts, colors, strict=True)))
    for i, (text, learned) in enumerate(shown[1:]):
        if learned:                                     # the output at position i is the guess for i + 1
            draw.line((middles[i], 72, middles[i], 100), fill=GREEN, width=2)
            draw.polygon([(middles[i], 106), (middles[i] - 5, 96), (middles[i] + 5, 96)], fill=GREEN)
            write(draw, middles[i], 118, text, 15, GREEN, "mm")
        else:
            write(draw, middles[i], 118, "-", 15, GRAY, "mm")
    write(draw, 20, 155, "what the output at this position is compared with: the next token, if it is "
          "supervised; - is ignored", 14, GRAY)
    return image


def accumulation():
    """The share of each token in the gradient: an answer of 3 tokens, one of 300."""
    image, draw = canvas(760, 210)
    for i, (name, share) in enumerate((("sum / all 303 tokens", 3 / 303), ("mean of the two means", 1 / 2))):
        y = 50 + i * 85
        write(draw, 20, y - 18, f"{name}: the 3 tokens have {share:.0%} of the weight")
        draw.rectangle((20, y, 740, y + 34), fill=BLUE)
        draw.rectangle((20, y, 20 + 720 * share, y + 34), fill=RED)
    write(draw, 20, 188, "red: the answer of 3 tokens; blue: that of 300", 14, GRAY)
    return image


def overview():
    """The whole machine in one row: picture, vision backbone, projector, language model, answer."""
    data = toy("test")
    row = next(i for i in range(len(data)) if data.row(i)["id"].startswith("test_color_"))
    said = data.row(row)
    image, draw = canvas(1000, 330)
    picture = Image.open(f"data/toy/images/{said['image']}").resize((192, 192))
    image.paste(picture, (20, 60))
    for i in range(7):                                  # 6 x 6 patches of 16 x 16 pixels
        draw.line((20 + i * 32, 60, 20 + i * 32, 252), fill="white", width=2)
        draw.line((20, 60 + i * 32, 212, 60 + i * 32), fill="white", width=2)
    write(draw, 116, 40, "a picture, 36 patches", anchor="mm")
    for x, name, size, kind, color in ((250, "vision\nbackbone", 90, "frozen", GRAY),
                                       (400, "projector", 50, "trains", GREEN)):
        draw.rounded_rectangle((x, 156 - size, x + 110, 156 + size), 8, outline=color, width=3)
        draw.multiline_text((x + 55, 150), name, fill=INK, font=ImageFont.load_default(17), anchor="mm",
                            align="center")
        write(draw, x + 55, 156 + size + 16, kind, 14, color, "mm")
    arrow(draw, 216, 156, 248)
    arrow(draw, 364, 156, 398)
    arrow(draw, 514, 156, 548)
    draw.rounded_rectangle((550, 96, 980, 156), 8, outline=GREEN, width=3)
    write(draw, 765, 126, "language model: what comes next?", 17, anchor="mm")
    write(draw, 765, 78, "frozen in align, trains in finetune", 14, GREEN, "mm")
    question, answer = (turn["value"].replace("<image>\n", "") for turn in said["conversations"][:2])
    row_of_boxes(draw, 550, 172, [("36 patches", BLUE)])
    row_of_boxes(draw, 645, 172, [(f"In: {question} Out:", PALE)])
    row_of_boxes(draw, 550, 208, [(word, GREEN) for word in (*answer.split(), "</s>")])
    write(draw, 550, 256, "blue: patches as words; gray: is read; green: is learned, then said", 14, GRAY)
    write(draw, 20, 300, "stage vla: the words are a robot's action, one token for each number", 15, GRAY)
    return image


PICTURES = {"overview": overview, "padding": padding, "mask": mask, "accumulation": accumulation,
            "learning_rate": rate}


def main(cfg):
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        path = Path(cfg.folder) / f"{name}.png"
        make().quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(cfg)
