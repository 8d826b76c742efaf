"""From the parquet files of a Hugging Face data set, which hold pictures and texts, to what train.py reads.

    pip install pyarrow
    python examples/parquet_to_llava.py --parquet DATASET/train-*.parquet --out FOLDER
    python check.py FOLDER/train.json --image_dir FOLDER/images.tar --sheet sheet.png

Two layouts are known:

    LLaVA-OneVision   id, image {bytes, path} or none, conversations [{from, value}]
    the Cauldron      images [{bytes, path}], texts [{user, assistant, source}]: turns about the same pictures

FOLDER gets train.json (one example a line) and images.tar (for --image_dir, as it is). The bytes of the
pictures are not changed, and only a few rows are in memory. Where a conversation has no <image> tag, all tags
are put before its first question; where it has some, there must be one for each picture. A data source
becomes the "category" of the example, which makes a row of evaluate.py's table.
"""
import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import BadExample, UserError, knob, parse, printable  # noqa: E402

TAG = "<image>"
ROWS = 16                                                   # in memory at once; pictures may be large
# How a picture file begins -> how its name shall end. Data sets often have no name, or a wrong one.
ENDINGS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif",
           b"MM\0*": "tif", b"RIFF": "webp"}


@dataclass(frozen=True)
class ParquetConfig:
    parquet: tuple = knob((), "parquet files, in the order of the examples")
    out: str = knob("", "folder that is written: train.json and images.tar")
    skip_bad_rows: bool = knob(False, "leave out rows that can't become an example, and count them")

    def __post_init__(self):
        if not self.parquet or not self.out:
            raise UserError("give files and a folder: python examples/parquet_to_llava.py --parquet FILE "
                            "[FILE ...] --out FOLDER")
        if Path(self.out).exists():
            raise UserError(f"--out {self.out} exists. Move it away, or choose another name")


def rows_of(path):
    """Yields the rows of a parquet file as dictionaries. Raises UserError where it can't be read."""
    import pyarrow
    from pyarrow import parquet
    from tqdm import tqdm
    try:
        # Without a buffer pyarrow reads the compressed pictures of a whole row group at once.
        with parquet.ParquetFile(path, buffer_size=2 ** 20, pre_buffer=False) as file:
            names = set(file.schema_arrow.names)
            if not ({"images", "texts"} <= names or "conversations" in names):
                raise UserError(f"{path} has the columns {', '.join(sorted(names))}; expected image and "
                                "conversations, or images and texts")
            columns = sorted(names & {"id", "image", "conversations", "images", "texts", "data_source"})
            with tqdm(total=file.metadata.num_rows, desc=Path(path).name, unit=" rows", disable=None) as bar:
                for batch in file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                    yield from batch.to_pylist()
                    bar.update(len(batch))
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} can't be read as a parquet file ({type(e).__name__}: "
                        f"{printable(str(e), 300)}). Download it again") from e


def fields_of(turn, field):
    if not isinstance(turn, dict):
        raise BadExample(f"'{field}' must be a turn, found {str(turn)[:60]!r}")
    return turn


def example_of(row):
    """A row -> the example without its pictures' names, the pictures' bytes. BadExample names the field."""
    if "texts" in row:
        pictures, turns, kind = row["images"] or [], [], ""
        for k, text in enumerate(row["texts"] or []):
            text = fields_of(text, f"texts[{k}]")
            turns += [("human", f"texts[{k}].user", text.get("user")),
                      ("gpt", f"texts[{k}].assistant", text.get("assistant"))]
            kind = kind or text.get("source")
    else:
        pictures, kind = row.get("image") or row.get("images") or [], row.get("data_source")
        pictures = pictures if isinstance(pictures, list) else [pictures]
        said = [fields_of(turn, f"conversations[{k}]") for k, turn in enumerate(row["conversations"] or [])]
        turns = [(turn.get("from"), f"conversations[{k}].value", turn.get("value"))
                 for k, turn in enumerate(said)]
    if not turns:
        raise BadExample(f"'{'texts' if 'texts' in row else 'conversations'}' is empty")
    for k, (speaker, field, value) in enumerate(turns):
        if not isinstance(value, str):
            raise BadExample(f"'{field}' must be a text, found {str(value)[:60]!r}")
        if speaker != ("human", "gpt")[k % 2]:
            raise BadExample(f"'{field}' must be from {('human', 'gpt')[k % 2]!r}, found {speaker!r}")
        if k % 2 and TAG in value:
            raise BadExample(f"'{field}' is a reply and contains {TAG}")
    tags = sum(value.count(TAG) for _, _, value in turns)
    if tags not in (0, len(pictures)):
        raise BadExample(f"it has {len(pictures)} pictures, but {tags} {TAG} tags")
    lead = "" if tags else (TAG + "\n") * len(pictures)
    said = [{"from": speaker, "value": (lead if k == 0 else "") + value}
            for k, (speaker, _, value) in enumerate(turns)]
    example = {"conversations": said} | ({"category": kind} if kind else {})
    return example, [bytes_of(picture, k) for k, picture in enumerate(pictures)]


def bytes_of(picture, k):
    data = picture.get("bytes") if isinstance(picture, dict) else None
    if not data:
        path = picture.get("path") if isinstance(picture, dict) else picture
        raise BadExample(f"picture {k} has no 'bytes', only the path {str(path)[:200]!r}; the file must hold "
                         "the pictures")
    if not any(data.startswith(start) for start in ENDINGS):
        raise BadExample(f"picture {k} is of no known format; its 'bytes' begin {data[:16]!r}")
    return data


def add(tar, name, data):
    head = tarfile.TarInfo(name)
    head.size = len(data)
    tar.addfile(head, io.BytesIO(data))
    tar.members.clear()                                     # tarfile keeps what it has written


def convert(cfg, folder):
    """-> how many examples were written, how many pictures, and the rows that were left out."""
    examples, pictures, bad = 0, 0, []
    with open(folder / "train.json", "w") as out, tarfile.open(folder / "images.tar", "w") as tar:
        for number, source in enumerate(cfg.parquet):
            for i, row in enumerate(rows_of(source)):
                try:
                    example, found = example_of(row)
                except BadExample as e:
                    bad.append(f"{source}, row {i} (id {row.get('id')!r}): {e}")
                    if not cfg.skip_bad_rows:
                        raise UserError(f"{bad[0]}. Drop the row, or leave such rows out with "
                                        "--skip_bad_rows") from e
                    continue
                ids = {"id": str(row.get("id") or f"{Path(source).stem}-{i}")}
                names = [f"{number:05}/{i:08}-{k}.{ending(data)}" for k, data in enumerate(found)]
                for name, data in zip(names, found):
                    add(tar, name, data)
                image = {} if not names else {"image": names[0] if len(names) == 1 else names}
                out.write(json.dumps(ids | image | example, ensure_ascii=False) + "\n")
                examples, pictures = examples + 1, pictures + len(names)
    return examples, pictures, bad


def ending(data):
    return next(name for start, name in ENDINGS.items() if data.startswith(start))


def main(cfg):
    """Everything is written into a folder of another name first: FOLDER appears whole or not at all."""
    from checkpoint import unused_name
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("this needs pyarrow: pip install pyarrow") from None
    out = Path(cfg.out)
    unfinished = unused_name(out.with_name(f"{out.name}.unfinished"))
    unfinished.mkdir(parents=True)
    try:
        examples, pictures, bad = convert(cfg, unfinished)
        if not examples:
            raise UserError(f"{cfg.parquet[0]}: no row could become an example"
                            + (f", first: {bad[0]}" if bad else ""))
        unfinished.rename(out)
    finally:
        for name in ("train.json", "images.tar"):           # what this process wrote, and nothing else
            (unfinished / name).unlink(missing_ok=True)
        if unfinished.exists():
            unfinished.rmdir()
    if bad:
        print(f"left out {len(bad)} rows, first: {printable(bad[0])}")
    print(f"{out}: {examples:,} examples, {pictures:,} pictures")
    print(f"next     python check.py {out}/train.json --image_dir {out}/images.tar --sheet {out}/sheet.png")


if __name__ == "__main__":
    cfg = parse(ParquetConfig, description=__doc__.split("\n\n")[0])
    import ranks                                            # behind the flags: it imports torch
    ranks.run(main, cfg)
