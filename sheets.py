"""Pictures with a few lines of text below each, on one sheet: to be looked at before a number is trusted."""
from PIL import Image, ImageDraw, ImageFont, ImageOps

from checkpoint import unused_name

COLUMNS, CELLS, SIZE, LINE = 6, 24, 160, 13                 # the last two in pixels
LINES, LINES_ALONE = 6, 18                                  # of text, below pictures and without any


def draw(cells, path):
    """cells: (pictures (PIL, RGB), text, second text, its color). Draws the first CELLS of them."""
    font, height = ImageFont.load_default(11), SIZE + LINE * LINES + 12
    cells = cells[:CELLS]
    sheet = Image.new("RGB", (COLUMNS * (SIZE + 12), -(-len(cells) // COLUMNS) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, (pictures, text, second, color) in enumerate(cells):
        x, y = place % COLUMNS * (SIZE + 12) + 6, place // COLUMNS * height + 6
        for k, picture in enumerate(pictures):
            picture = ImageOps.contain(picture, (max(1, SIZE // len(pictures) - 2), SIZE))
            sheet.paste(picture, (x + k * SIZE // len(pictures), y + SIZE - picture.height))
        second = wrap(second, font)[:4 if pictures else LINES_ALONE - 4]
        first = wrap(text.replace("<image>", ""), font)[:(LINES if pictures else LINES_ALONE) - len(second)]
        for i, line in enumerate(first + second):
            canvas.text((x, y + (SIZE if pictures else 4) + 2 + LINE * i), line, font=font,
                        fill="black" if i < len(first) else color)
    sheet.save(path)


def wrap(text, font):
    """-> lines that are as wide as a cell; empty ones are left out."""
    lines = []
    for each in text.split("\n"):
        lines.append("")
        for word in each.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) > SIZE and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
    return [line for line in lines if line]


def write(cells, path):
    """The same into a file that appears whole. It may replace another PNG, but nothing else."""
    if path.exists() and not is_png(path):
        print(f"{path} is no picture, so no sheet is drawn over it")
        return
    unfinished = unused_name(path.with_name(f"{path.stem}.unfinished.png"))
    draw(cells, unfinished)
    unfinished.replace(path)
    print(f"pictures {path}")


def is_png(path):
    return path.is_file() and not path.is_symlink() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
