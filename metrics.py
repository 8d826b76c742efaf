"""The curves of one or several runs as one picture, and a short table.

    python metrics.py RUN                       # RUN/curves.png; a run draws it at its end, too
    python metrics.py RUN RUN ... --out a.png   # to compare; without --out: curves.png in this folder

All comes from metrics.jsonl, also while the run still writes it. Torch is not needed.
"""
import argparse
import json
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import Parser, UserError, printable

# title, column of metrics.jsonl, the same on held-out examples, how its numbers are written, scale of the
# axis: "zero" begins at 0, "near" where the data does, "far" is logarithmic where the data spans a factor of
# FAR.
PANELS = (("loss per token", "loss", "val_loss", "number", "far"),
          ("right tokens", "accuracy", "val_accuracy", "percent", "near"),
          ("learning rate", "lr", None, "number", "zero"),
          ("gradient norm", "grad_norm", None, "number", "far"),
          ("tokens a second", "tokens_per_second", None, "number", "zero"),
          ("padding", "padding", None, "percent", "zero"))
FAR = 30
COLORS = ("#2563eb", "#e8590c", "#0a8f60", "#8b3fd6", "#c2255c", "#0b7285", "#8a6d00", "#555555")
HELD_OUT = "#e8590c"                                        # of one run, whose own color is blue
WIDTH, HEIGHT, MARGIN = 400, 250, 20                        # of a panel, with what stands around it [pixels]
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 26                   # of that: what stands around its axes
SCALE = 3                                                   # drawn so many times larger: smooth lines


# -- reading -------------------------------------------------------------------------------------------------

def read_run(folder):
    """-> [Run]: two for a policy that trains on conversations, too. A step holds one kind, and their losses
    are far apart: one curve of both would show how often each comes."""
    lines = list(read_lines(Path(folder) / "metrics.jsonl"))
    if not lines:
        raise UserError(f"{folder}: there is no metrics.jsonl with a step in it. Give the folder of a "
                        "run, such as runs/toy-align-x7")
    robot = [line for line in lines if "accuracies" in line]
    talk = [line for line in lines if "accuracies" not in line]
    if robot and talk:
        return [Run(folder, robot, lines, " robot"), Run(folder, talk, [], " talk")]
    return [Run(folder, lines, lines)]


class Run:
    """What lines of metrics.jsonl and the folder of a run tell. columns: name -> (steps, values), both (n,).
    scored: the lines whose held-out scores are its own. what: which lines they are, if not all."""

    def __init__(self, folder, lines, scored, what=""):
        self.folder, self.what = Path(folder), what
        self.name = self.folder.resolve().name + what
        self.columns = {name: column(of, name) for panel in PANELS
                        for name, of in zip(panel[1:3], (lines, scored)) if name}
        self.step, self.total = lines[-1]["step"], lines[-1].get("total") or lines[-1]["step"]
        self.skipped = [line["step"] for line in lines if line.get("skipped") == 1]
        starts = [(line.get("start"), line.get("total")) for line in lines]
        changes = [(here, before) for before, here in zip(starts, starts[1:]) if here != before and here[0]]
        self.extended = [start for (start, total), (_, before) in changes if before and total > before]
        self.restarts = [start for (start, _), _ in changes if start not in self.extended]
        # As in checkpoint.py, which would need torch.
        self.checkpoints = sorted(int(path.name[5:]) for path in self.folder.glob("step-*")
                                  if re.fullmatch("step-[0-9]{8,}", path.name))

    def last(self, name, share=0.05):
        """The mean of the last values; nan if there are none."""
        values = self.columns[name][1]
        return values[-max(1, round(share * len(values))):].mean() if len(values) else math.nan


def read_lines(file):
    """Lines that are none are left out: the last one may not be written yet."""
    if not file.is_file():
        return
    with open(file, errors="replace") as lines:
        for line in lines:
            try:
                line = json.loads(line)
                if isinstance(line["step"], int) and not isinstance(line["step"], bool):
                    yield line
            except (ValueError, KeyError, TypeError, RecursionError):
                continue


def column(lines, name):
    pairs = [(line["step"], line[name]) for line in lines
             if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])]
    return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)


def smoothed(values):
    """(n,) -> (n,): a moving average over a fortieth of the run, taken twice, so that it has no corners. It
    looks as far ahead as back: unlike an exponential one it does not lag behind."""
    half, n = len(values) // 80, len(values)
    first = np.maximum(np.arange(n) - half, 0)              # of the values that are averaged
    end = np.minimum(np.arange(n) + half + 1, n)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[first]) / (end - first)
    return values


# -- axes ----------------------------------------------------------------------------------------------------

def round_step(span, most):
    """The smallest of 1, 2, 2.5, 5, 10, 20 ... that cuts the span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * m for m in (1, 2, 2.5, 5, 10, 20) if span / (power * m) <= most)


def linear_axis(low, high, most=5):
    """-> (low, high, ticks), the ends rounded outwards to ticks."""
    if high - low <= 1e-9 * max(abs(high), abs(low)):       # one value: room above and below it
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = round_step(high - low, most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def log_axis(low, high):
    """-> (low, high, ticks), for positive numbers. Few decades get ticks at 2 and 5, too."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    each = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [m * 10.0 ** d for d in decades for m in each]
    ticks = ticks[::max(1, len(ticks) // 9)] if each == (1,) else ticks
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return low / 1.1, high * 1.1, inside


def written(value, kind, ticks):
    """A number on an axis, with as many digits as its neighbors need."""
    if kind == "percent":
        return f"{100 * value:.{digits([100 * tick for tick in ticks])}f} %"
    top = max(map(abs, ticks))
    if value == 0:
        return "0"
    if kind == "log" and 1e-2 < value < 1e3:
        return f"{value:g}"
    if top < 1e-2:
        return re.sub(r"\.?0*e([+-])0?", r"e\1", f"{value:.2e}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if top >= 2 * unit and value >= unit / 10:
            return f"{value / unit:g}{letter}"
    return f"{value:.{digits(ticks)}f}" if top < 1e3 else f"{value:g}"


def digits(ticks):
    """Decimals in which all ticks can be told apart."""
    return next(n for n in range(12) if n == 11 or all(abs(round(tick, n) - tick) < 1e-9 * max(1, abs(tick))
                                                       for tick in ticks))


# -- the picture ---------------------------------------------------------------------------------------------

class Sheet:
    """A canvas in pixels of the finished picture; what is drawn is SCALE times larger."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.canvas = ImageDraw.Draw(self.image)

    def line(self, points, color, width=1.0, dash=0):
        """dash: length of a dash and of the gap behind it [pixels], of a straight line"""
        points = [(x * SCALE, y * SCALE) for x, y in points]
        if dash:
            (x0, y0), (x1, y1) = points
            length = math.hypot(x1 - x0, y1 - y0) or 1
            cuts = [min(1, i * dash * SCALE / length) for i in range(int(length / dash / SCALE) + 2)]
            for a, b in zip(cuts[::2], cuts[1::2]):
                self.canvas.line([(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)], fill=color,
                                 width=round(width * SCALE))
        elif len(points) > 1:
            self.canvas.line(points, fill=color, width=round(width * SCALE), joint="curve")

    def shade(self, points, color, share):
        """Lines that what lies under them shines through."""
        points = np.array(points) * SCALE
        corner, far = points.min(0).astype(int) - SCALE, points.max(0).astype(int) + 2 * SCALE
        mask = Image.new("L", tuple((far - corner).tolist()))
        ImageDraw.Draw(mask).line([tuple(p) for p in (points - corner).tolist()], round(255 * share), SCALE)
        self.image.paste(color, tuple(corner.tolist()), mask)

    def dot(self, x, y, radius, color, edge=None):
        box = [(v * SCALE) for v in (x - radius, y - radius, x + radius, y + radius)]
        self.canvas.ellipse(box, fill=color, outline=edge, width=SCALE if edge else 0)

    def shape(self, points, color):
        self.canvas.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=color)

    def text(self, x, y, text, size=12, color="#333333", anchor="lm"):
        self.canvas.text((x * SCALE, y * SCALE), text, font=font(size), fill=color, anchor=anchor)

    def save(self, path):
        width, height = self.image.size
        self.image.resize((width // SCALE, height // SCALE), Image.Resampling.BOX).save(path, optimize=True)


def font(size):
    return ImageFont.load_default(size * SCALE)


def width_of(text, size):
    return font(size).getlength(text) / SCALE


def pale(color, share=0.68):
    """The color, mixed with so much white."""
    values = (int(color[i:i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(v + (255 - v) * share):02x}" for v in values)


class Axes:
    """One panel: where a step and a value lie on the sheet."""

    def __init__(self, sheet, x, y, panel, runs, steps):
        self.sheet, (title, name, held_out, self.kind, scale) = sheet, panel
        self.x0, self.x1, self.y0, self.y1 = x + LEFT, x + WIDTH - RIGHT, y + HEIGHT - BOTTOM, y + TOP
        shown = [part for run in runs for part in limits(run.columns[name][1])]
        shown += [value for run in runs if held_out for value in run.columns[held_out][1]]
        low, high = min(shown), max(shown)
        self.log = scale == "far" and low > 0 and high / low > FAR
        self.low, self.high, self.ticks = (log_axis(low, high) if self.log else
                                           linear_axis(0.0 if scale == "zero" else low, high))
        if self.kind == "percent":                          # there is no less than nothing, no more than all
            self.low, self.high = max(self.low, 0.0), min(self.high, 1.0)
            self.ticks = [tick for tick in self.ticks if self.low <= tick <= self.high + 1e-9]
        # An axis of steps has whole numbers, and ends where the longest run does.
        self.first, self.last = steps
        step = max(1, math.ceil(round_step(max(self.last - self.first, 1), 5)))
        self.steps = [i for i in range(0, self.last + 1, step) if i >= self.first] or [self.last]
        self.frame(title + (" (log)" if self.log else ""))

    def at(self, steps, values):
        """(n,), (n,) -> (n, 2) places; what lies outside is put on the edge."""
        value, low, high = (np.log10(np.maximum(v, 1e-30)) if self.log else np.asarray(v, np.float64)
                            for v in (values, self.low, self.high))
        x = self.x0 + (np.asarray(steps) - self.first) / max(self.last - self.first, 1) * (self.x1 - self.x0)
        y = self.y0 - np.clip((value - low) / (high - low), -0.01, 1.01) * (self.y0 - self.y1)
        return np.column_stack([x, y])

    def frame(self, title):
        self.sheet.text(self.x0, self.y1 - 17, title, size=14, color="#111111")
        for tick in self.ticks:
            (_, y), = self.at([self.first], [tick])
            self.sheet.line([(self.x0, y), (self.x1, y)], "#e8e8e8")
            kind = "log" if self.log else self.kind
            self.sheet.text(self.x0 - 6, y, written(tick, kind, self.ticks), 11, "#666666", "rm")
        for step in self.steps:
            (x, _), = self.at([step], [self.low])
            self.sheet.line([(x, self.y0), (x, self.y0 + 4)], "#999999")
            self.sheet.text(x, self.y0 + 14, written(step, "number", self.steps), 11, "#666666", "mm")
        self.sheet.text(self.x0 - 10, self.y0 + 14, "step", 11, "#999999", "rm")
        self.sheet.line([(self.x0, self.y0), (self.x1, self.y0)], "#999999")

    def faint(self, steps, values, color, share):
        """Each step. Of more steps than pixels, the smallest and the largest value in each column of them."""
        places = self.at(steps, values)                                                     # (n, 2)
        if len(places) > 2 * WIDTH:
            columns = np.round(2 * places[:, 0])
            starts = np.flatnonzero(np.diff(columns, prepend=-1))
            ends = [of.reduceat(places[:, 1], starts) for of in (np.minimum, np.maximum)]
            places = np.column_stack([np.repeat(columns[starts] / 2, 2), np.column_stack(ends).flatten()])
        self.sheet.shade(places, color, share)

    def curve(self, steps, values, color, width=2.0, dots=30):
        """dots: up to so many values, each gets one."""
        places = self.at(steps, values)
        if len(places) > 3 * WIDTH:                         # more can't be seen
            places = places[np.linspace(0, len(places) - 1, 3 * WIDTH).round().astype(int)]
        self.sheet.line(places.tolist(), color, width)
        for x, y in places if len(places) <= dots else ():
            self.sheet.dot(x, y, 1.2 * width, color)

    def upright(self, step, color, dash):
        (x, _), = self.at([step], [self.low])
        self.sheet.line([(x, self.y0), (x, self.y1)], color, 1, dash)


def limits(values):
    """What must be seen of a column: the smooth curve, and the raw values but for the wildest."""
    if not len(values):
        return []
    smooth = smoothed(values)
    return [smooth.min(), smooth.max(), *np.quantile(values, (0.01, 0.99))]


def triangle(sheet, x, y, color, size=7):
    sheet.shape([(x - size / 2, y), (x + size / 2, y), (x, y - size)], color)


def cross(sheet, x, y, color):
    for turn in (1, -1):
        sheet.line([(x - 3, y - 3 * turn), (x + 3, y + 3 * turn)], color, 1.4)


def draw_back(axes, panel, run, color, alone):
    """What lies behind all curves of a panel: where a run was started again, and the value of each step."""
    for marks, dash in ((run.restarts, 3), (run.extended, 0)):
        for step in marks:
            axes.upright(step, "#999999" if alone else pale(color, 0.4), dash)
    if panel[1] != "lr":
        axes.faint(*run.columns[panel[1]], color, 0.32 if alone else 0.16)


def draw_run(axes, panel, run, color, i, of):
    """The curves of one run in one panel. i: which of so many runs it is."""
    _, name, held_out, _, _ = panel
    steps, values = run.columns[name]
    # Learning rates are often the same. The first ones are drawn wider, so that all can be seen.
    wide = 2 + min(2.2, 8 / of) * (of - 1 - i)
    axes.curve(steps, *((values, color, wide) if name == "lr" else (smoothed(values), color)))
    if held_out:
        axes.curve(*run.columns[held_out], HELD_OUT if of == 1 else color, 1.3, dots=60)
    for step in run.checkpoints if name == "loss" else ():
        if axes.first <= step <= axes.last:
            x, size = axes.at([step], [axes.low])[0, 0], 7 if of == 1 else 5
            triangle(axes.sheet, x, axes.y0 - (size + 1) * i, color, size)
    for step in run.skipped if name == "grad_norm" else ():
        cross(axes.sheet, axes.at([step], [axes.low])[0, 0], axes.y1 + 5 + 8 * i, color)


def legend(sheet, runs, names, width):
    """Colors of the runs, and what the signs mean. -> how high it is [pixels]. sheet None: only measured."""
    alone, items = len(runs) == 1, []
    for i, (run, name) in enumerate(zip(runs, names)):
        done = f"{run.step:,} of {run.total:,} steps" if run.step < run.total else f"{run.total:,} steps"
        items.append((f"{name}  ({done})", lambda x, y, c=COLORS[i % len(COLORS)]: sheet.line(
            [(x, y), (x + 18, y)], c, 2.5)))
    gray = COLORS[0] if alone else "#777777"
    signs = [("each step", True, lambda x, y: sheet.line([(x, y + 4), (x + 6, y - 4), (x + 12, y + 3),
                                                          (x + 18, y - 2)], pale(gray), 1)),
             ("held-out examples", any(len(run.columns["val_loss"][0]) for run in runs), lambda x, y: (
                 sheet.line([(x, y), (x + 18, y)], HELD_OUT if alone else gray, 1.3),
                 sheet.dot(x + 9, y, 2.6, HELD_OUT if alone else gray))),
             ("checkpoint", any(run.checkpoints for run in runs),
              lambda x, y: triangle(sheet, x + 9, y + 4, gray)),
             ("started again", any(run.restarts for run in runs),
              lambda x, y: sheet.line([(x + 9, y - 8), (x + 9, y + 8)], "#777777", 1, 3)),
             ("extended", any(run.extended for run in runs),
              lambda x, y: sheet.line([(x + 9, y - 8), (x + 9, y + 8)], "#777777", 1)),
             ("update skipped", any(run.skipped for run in runs), lambda x, y: cross(sheet, x + 9, y, gray))]
    x, y = LEFT, MARGIN
    for row in (items, [(text, sign) for text, there, sign in signs if there]):
        for text, sign in row:
            room = 26 + width_of(text, 13) + 26
            if x + room > width and x > LEFT:
                x, y = LEFT, y + 22
            if sheet:
                sign(x, y)
                sheet.text(x + 26, y, text, 13)
            x += room
        x, y = LEFT, y + 22
    return y


def draw(runs, path):
    """The picture of some runs, written whole or not at all."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path} exists and is no picture that may be written over. Choose another --out")
    panels = [panel for panel in PANELS if any(len(run.columns[panel[1]][0]) for run in runs)]
    across = min(3, len(panels))
    width, names = across * WIDTH + (across + 1) * MARGIN, short_names(runs)
    head = legend(None, runs, names, width)
    sheet = Sheet(width, head + -(-len(panels) // across) * (HEIGHT + MARGIN))
    legend(sheet, runs, names, width)
    ends = [step for run in runs for name in ("loss", "lr") for step in run.columns[name][0][[0, -1]]]
    for place, panel in enumerate(panels):
        row, column = divmod(place, across)
        there = [run for run in runs if len(run.columns[panel[1]][0])]
        axes = Axes(sheet, MARGIN + column * (WIDTH + MARGIN), head + row * (HEIGHT + MARGIN), panel, there,
                    (int(min(ends)), int(max(ends))))
        colors = [(run, COLORS[runs.index(run) % len(COLORS)]) for run in there]
        for run, color in colors:
            draw_back(axes, panel, run, color, len(runs) == 1)
        for i, (run, color) in enumerate(colors):
            draw_run(axes, panel, run, color, i, len(runs))
    unfinished = path.with_name(f".{path.name}.unfinished.png")
    sheet.save(unfinished)
    unfinished.replace(path)


def short_names(runs):
    """Names that tell the runs apart, with more of the path where two folders are called alike."""
    alike = [run.name for run in runs]
    names = [run.name if alike.count(run.name) == 1 else f"{run.folder}{run.what}" for run in runs]
    return [printable(name if len(name) <= 60 else f"{name[:28]} ... {name[-28:]}", 100) for name in names]


# -- the table -----------------------------------------------------------------------------------------------

def table(runs):
    """-> lines. Losses, accuracy and padding are means of the last 20th of the steps, a speed is a median."""
    rows = [("run", "steps", "loss", "held-out", "lowest", "right", "tok/s", "padding", "starts", "skipped")]
    for run, name in zip(runs, short_names(runs)):
        steps, losses = run.columns["val_loss"]
        best = int(losses.argmin()) if len(losses) else 0
        speed = run.columns["tokens_per_second"][1]
        rows.append((name if len(name) <= 20 else f"{name[:10]}...{name[-7:]}",
                     f"{run.step}/{run.total}", f"{run.last('loss'):.4f}",
                     f"{losses[-1]:.4f}" if len(losses) else "-",
                     f"{losses[best]:.4f} @ {steps[best]:.0f}" if len(losses) else "-",
                     f"{run.last('accuracy'):.1%}", f"{np.median(speed):,.0f}" if len(speed) else "-",
                     f"{run.last('padding'):.1%}", str(1 + len(run.restarts) + len(run.extended)),
                     str(len(run.skipped))))
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    gap = "  " if sum(widths) + 2 * len(widths) <= 100 else " "
    return [gap.join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))])
            for row in rows]


def main():
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", default="", metavar="FILE.png", help="where the picture goes")
    flags = parser.parse_args()
    try:
        runs = [run for folder in flags.runs for run in read_run(folder)]
        path = Path(flags.out or ("curves.png" if len(flags.runs) > 1 else runs[0].folder / "curves.png"))
        if path.suffix != ".png":
            raise UserError(f"--out {path}: give a name that ends with .png")
        draw(runs, path)
    except (UserError, OSError) as e:
        parser.error(str(e))
    print("\n".join(table(runs)))
    print(f"curves   {path}")


if __name__ == "__main__":
    main()
