"""A small drawn world: the default data of this project. Nothing is downloaded.

A scene is two to four colored shapes on a 3 x 3 grid. From a seed come the pictures, their captions,
questions about one or two pictures, and tasks that are text only, all as LLaVA JSON + PNG:

    python toy/world.py           # writes data/toy (seconds); `train.py` does it by itself on the first run

The two small backbones in `toy/` were trained on this world by `toy/pretrain.py`.
"""
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

# `python toy/world.py` puts this file's folder on the path, but the modules are found from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, check_limits, knob, parse  # noqa: E402

COLORS = {"red": (214, 45, 48), "green": (48, 158, 76), "blue": (44, 96, 214),
          "yellow": (242, 205, 48), "purple": (136, 62, 178), "orange": (242, 132, 32)}
SHAPES = ("circle", "square", "triangle", "star", "heart")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
PIXELS = 96                                         # width and height of a picture; a cell is a third of it


def check_folder(folder, names):
    """Raises UserError where a file of these names lies in the folder that this program did not write."""
    if not folder:
        raise UserError("--folder is empty: which folder?")
    for file in (Path(folder) / f"{name}.json" for name in names):
        try:
            rows = json.loads(file.read_text()) if file.is_file() else []
            ours = not os.path.lexists(file) or all(
                re.fullmatch(r"(test|val|train)_[a-z_]*\d+", row["id"]) for row in rows)
        except (OSError, ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise UserError(f"{file} is not from this program; it would be lost. Choose another --folder")


@dataclass(frozen=True)
class WorldConfig:
    folder: str = knob("data/toy", "where to write")
    seed: int = knob(0, "another seed is another world")
    scale: float = knob(1.0, "times as many examples")

    def __post_init__(self):
        check_folder(self.folder, ("align", "finetune", "val_align", "val", "test"))
        check_limits(self, {"scale": (0, 100), "seed": (0, 2 ** 32)})


class Thing(NamedTuple):
    color: str
    shape: str
    cell: int                                       # index into CELLS: reading order

    def __str__(self):
        return f"{self.color} {self.shape}"


# -- scenes and pictures -------------------------------------------------------------------------------------

def random_scene(rng):
    """Two to four things, no two of the same color and shape, in reading order.

    Not one: there are only 270 such scenes, and the held-out files would take them all.
    """
    count = rng.randint(2, 4)
    kinds = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
    return tuple(Thing(*kind, cell) for kind, cell in zip(kinds, sorted(rng.sample(range(9), count))))


def outline(shape, x, y, radius, angle):
    """Corner points of a shape around (x, y); None for the circle, which has none."""
    turned = lambda r, a: (x + r * math.sin(a + angle), y - r * math.cos(a + angle))
    if shape == "square":
        return [turned(radius * 1.15, math.pi / 4 + i * math.pi / 2) for i in range(4)]
    if shape == "triangle":
        return [turned(radius * 1.15, i * math.tau / 3) for i in range(3)]
    if shape == "star":
        return [turned(radius * (1.15 if i % 2 == 0 else 0.45), i * math.tau / 10) for i in range(10)]
    if shape == "heart":                            # the classic curve: 16 sin^3 t, 13 cos t - 5 cos 2t - ...
        points = []
        for i in range(40):
            t = i * math.tau / 40
            dx = 16 * math.sin(t) ** 3
            dy = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append(turned(radius * math.hypot(dx, dy) / 15, math.atan2(dx, dy)))
        return points
    return None


def draw_shape(canvas, shape, color, x, y, radius, angle=0.0):
    edge = tuple(int(c * 0.6) for c in color)
    points = outline(shape, x, y, radius, angle)
    if points is None:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=edge, width=3)
    else:
        canvas.polygon(points, fill=color)
        canvas.line([*points, points[0]], fill=edge, width=3, joint="curve")


def draw(scene, rng):
    """A picture of the scene. Place in the cell, size, tilt and shade vary:
    what the vision model must ignore."""
    fine = 3                                        # drawn three times larger, then averaged: smooth edges
    paper = rng.randint(225, 250)
    image = Image.new("RGB", (PIXELS * fine, PIXELS * fine), (paper, paper, paper - rng.randint(0, 12)))
    canvas = ImageDraw.Draw(image)
    cell = PIXELS * fine / 3
    for thing in scene:
        x = cell * (thing.cell % 3 + 0.5) + rng.uniform(-3, 3) * fine
        y = cell * (thing.cell // 3 + 0.5) + rng.uniform(-3, 3) * fine
        shade = rng.uniform(0.88, 1.05)
        color = tuple(min(255, int(c * shade) + rng.randint(-8, 8)) for c in COLORS[thing.color])
        draw_shape(canvas, thing.shape, color, x, y, rng.uniform(9.5, 12.5) * fine, rng.uniform(-0.25, 0.25))
    return image.reduce(fine)


# -- what can be said about a scene --------------------------------------------------------------------------

def caption(scene):
    """
    >>> caption((Thing("red", "circle", 0), Thing("blue", "star", 4)))
    'red circle top left, blue star center'
    """
    return ", ".join(f"{thing} {CELLS[thing.cell]}" for thing in scene)


def a_or_an(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def yes_or_no(truth):
    return "yes" if truth else "no"


def only(scene, name, value):
    return sum(getattr(thing, name) == value for thing in scene) == 1


def ask_color(scene, rng):
    thing = rng.choice(scene)
    if rng.random() < 0.5 and only(scene, "shape", thing.shape):
        return f"What color is the {thing.shape}?", thing.color
    return f"What color is the shape at {CELLS[thing.cell]}?", thing.color


def ask_shape(scene, rng):
    thing = rng.choice(scene)
    if rng.random() < 0.5 and only(scene, "color", thing.color):
        return f"What shape is {thing.color}?", thing.shape
    return f"What shape is at {CELLS[thing.cell]}?", thing.shape


def ask_count(scene, rng):
    if rng.random() < 0.5:
        return "How many shapes are there?", NUMBERS[len(scene)]
    # Three times in four a color that the scene has: or most answers would be `zero`.
    color = rng.choice(scene).color if rng.random() < 0.75 else rng.choice(list(COLORS))
    return f"How many {color} shapes are there?", NUMBERS[sum(thing.color == color for thing in scene)]


def ask_position(scene, rng):
    thing = rng.choice(scene)
    return f"Where is the {thing}?", CELLS[thing.cell]


def ask_comparison(scene, rng):
    a, b = rng.sample(scene, 2)
    if a.cell // 3 == b.cell // 3 or (a.cell % 3 != b.cell % 3 and rng.random() < 0.5):
        return f"Is the {a} left of the {b}?", yes_or_no(a.cell % 3 < b.cell % 3)
    return f"Is the {a} above the {b}?", yes_or_no(a.cell // 3 < b.cell // 3)


def ask_yes_no(scene, rng):
    """Half the answers are yes; a wrong thing shares its color or its shape with one that is there."""
    thing = rng.choice(scene)
    if rng.random() < 0.5:
        return f"Is there {a_or_an(str(thing))}?", "yes"
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:
        color = rng.choice([c for c in COLORS if c != color])
    else:
        shape = rng.choice([s for s in SHAPES if s != shape])
    return (f"Is there {a_or_an(color)} {shape}?",
            yes_or_no(any((t.color, t.shape) == (color, shape) for t in scene)))


def ask_plan(scene, rng):
    """What a robot would be asked (see toy/robot.py), answered in words: from where to where."""
    a, b = rng.sample(scene, 2)
    return (f"What action should the robot take to put the {a} on the {b}?",
            f"{CELLS[a.cell]} to {CELLS[b.cell]}")


ASK = {"color": ask_color, "shape": ask_shape, "count": ask_count, "position": ask_position,
       "comparison": ask_comparison, "yes_no": ask_yes_no, "plan": ask_plan}


def ask_two(first, second, rng):
    """A question about two scenes."""
    kind = rng.randrange(3)
    if kind == 0:
        n, m = len(first), len(second)
        return "Which picture has more shapes?", "same" if n == m else "first" if n > m else "second"
    thing = rng.choice(first + second)
    what = f"{a_or_an(thing.color)} {thing.shape}"
    one, two = (any((t.color, t.shape) == (thing.color, thing.shape) for t in scene)
                for scene in (first, second))
    if kind == 1:
        return f"Which picture has {what}?", "both" if one and two else "first" if one else "second"
    name, truth = rng.choice((("first", one), ("second", two)))
    return f"Is there {what} in the {name} picture?", yes_or_no(truth)


def ask_reverse(rng):
    words = rng.sample([*COLORS, *SHAPES], rng.randint(2, 5))
    return f"Reverse: {' '.join(words)}", " ".join(reversed(words))


def ask_odd(rng):
    colors, shapes = rng.sample(list(COLORS), 3), rng.sample(SHAPES, 3)
    odd, words = (shapes[0], colors) if rng.random() < 0.5 else (colors[0], shapes)
    words = [odd, *words]
    rng.shuffle(words)
    return f"Odd one out: {' '.join(words)}", odd


def ask_text_scene(rng):
    """A question about a scene that is told in words."""
    scene = random_scene(rng)
    question, answer = rng.choice((ask_color, ask_shape, ask_position, ask_yes_no))(scene, rng)
    return f"There is {caption(scene)}. {question}", answer


ASK_TEXT = {"text_reverse": ask_reverse, "text_odd": ask_odd, "text_scene": ask_text_scene}


# -- the files -----------------------------------------------------------------------------------------------

def turns(pairs, images=0):
    """[(question, answer), ...] as LLaVA turns, the picture tags in the first."""
    tags = "<image>\n" * images
    return [turn for i, (question, answer) in enumerate(pairs) for turn in
            ({"from": "human", "value": (tags if i == 0 else "") + question},
             {"from": "gpt", "value": answer})]


class Writer:
    """Draws scenes that no other file has, and collects examples about them."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.used = Path(folder), random.Random(seed), set()
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

    def scene(self, split):
        scene = random_scene(self.rng)
        while scene in self.used:
            scene = random_scene(self.rng)
        self.used.add(scene)
        name = f"{split}_{len(self.used):05d}.png"
        draw(scene, self.rng).save(self.folder / "images" / name)
        return scene, name

    def captions(self, split, count):
        rows = []
        for i in range(count):
            scene, name = self.scene(split)
            rows.append({"id": f"{split}_caption_{i}", "image": name, "type": "caption",
                         "conversations": turns([("Describe the picture.", caption(scene))], images=1)})
        return rows

    def questions(self, split, count, kinds, pairs=1):
        """`count` examples of one picture and `pairs` questions of the given kinds."""
        rows = []
        for i in range(count):
            scene, name = self.scene(split)
            chosen = self.rng.sample(kinds, pairs)
            asked = [ASK[kind](scene, self.rng) for kind in chosen]
            row = {"id": f"{split}_{'_'.join(chosen)}_{i}", "image": name,
                   "conversations": turns(asked, images=1)}
            rows.append(row | ({"type": chosen[0]} if pairs == 1 else {}))
        return rows

    def two_pictures(self, split, count):
        rows = []
        for i in range(count):
            (first, a), (second, b) = self.scene(split), self.scene(split)
            rows.append({"id": f"{split}_two_{i}", "image": [a, b], "type": "two_pictures",
                         "conversations": turns([ask_two(first, second, self.rng)], images=2)})
        return rows

    def text(self, split, count, kind):
        return [{"id": f"{split}_{kind}_{i}", "type": kind,
                 "conversations": turns([ASK_TEXT[kind](self.rng)])} for i in range(count)]

    def save(self, name, rows):
        self.rng.shuffle(rows)
        # Under its own name the file appears whole. Whatever has the other name, a named pipe perhaps, goes.
        unfinished = self.folder / f".{name}.unfinished"
        unfinished.unlink(missing_ok=True)
        unfinished.write_text(json.dumps(rows, indent=0))
        unfinished.replace(self.folder / name)
        print(f"{self.folder / name}: {len(rows)} examples")


def write(folder, seed=0, scale=1.0):
    """align.json, finetune.json (training),
    val_align.json, val.json (scored by a run), test.json (for you)."""
    n = lambda count: max(1, round(count * scale))
    writer = Writer(folder, seed)
    # First, so that they do not depend on the training size.
    for split, each in (("test", n(100)), ("val", n(50))):
        rows = writer.captions(split, each)
        if split == "val":
            writer.save("val_align.json", writer.captions("val", n(100)))
        for kind in ASK:
            rows += writer.questions(split, each, [kind])
        for kind in ASK_TEXT:
            rows += writer.text(split, each, kind)
        writer.save(f"{split}.json", rows + writer.two_pictures(split, each))
    writer.save("finetune.json", writer.captions("train", n(300)) + writer.two_pictures("train", n(2000))
                # Comparisons twice as often: they are the hardest.
                + writer.questions("train", n(2800), [*ASK, "comparison"], pairs=4)
                + [row for kind, count in (("text_reverse", 300), ("text_odd", 300), ("text_scene", 900))
                   for row in writer.text("train", n(count), kind)])
    writer.save("align.json", writer.captions("train", n(6000)))    # last: whoever finds it finds all of them


if __name__ == "__main__":
    cfg = parse(WorldConfig, description=__doc__.split("\n\n")[0])
    import ranks                                            # behind the flags: it imports torch
    ranks.run(write, cfg.folder, cfg.seed, cfg.scale)
