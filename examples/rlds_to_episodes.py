"""From an RLDS data set (Open X-Embodiment, LIBERO for OpenVLA) to episodes, the form `--stage vla` reads.

    python examples/rlds_to_episodes.py DATASET OUT
    python examples/rlds_to_episodes.py DATASET OUT --cameras image,wrist_image --gripper libero

Neither TensorFlow nor TFDS is needed. DATASET is the folder that holds dataset_info.json and features.json.
Its files (shards) are TFRecords, that is, records one after the other:

    8 bytes     length of the record          4 bytes     checksum of these 8 bytes
    bytes       the record                    4 bytes     checksum of the record

A record is one episode, as a protocol buffer (`tf.train.Example`): lists of bytes, floats or integers.
"steps/action" has A numbers for each step, "steps/observation/image" one JPEG or PNG file for each step.
Actions are written as they are stored. OpenVLA changes those of many data sets while it reads them; for
LIBERO, --gripper libero does the same.
"""
import functools
import json
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, knob, parse, printable  # noqa: E402
from examples.episodes import ConversionConfig, chosen, pick, reading, run  # noqa: E402

TEXTS = ("language_instruction", "observation/natural_language_instruction")


@dataclass(frozen=True)
class RldsConfig(ConversionConfig):
    split: str = knob("train", "which part of the data set")
    language: str = knob("", f"feature that holds the instruction; empty = {' or '.join(TEXTS)}")


# -- TFRecord: checksums -------------------------------------------------------------------------------------

LANE = 1024                                                 # bytes that are read one after the other
# What one byte does to a CRC-32C (Castagnoli), RFC 3720, appendix B.4.
TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = np.where(TABLE & 1, TABLE >> 1 ^ np.uint32(0x82F63B78), TABLE >> 1)


@functools.cache
def over_a_lane():
    """4 x 256 numbers: what LANE zero bytes make of a CRC, for each value of each of its four bytes."""
    crc = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(LANE):
        crc = TABLE[crc & 255] ^ crc >> 8
    return crc.tolist()


def crc32c(data):
    """The checksum of bytes.

    A CRC is linear: that of two parts is that of the first, moved over as many zeros as the second has bytes,
    XOR that of the second. So the lanes are read side by side, in numpy, and then joined: 100 times as fast
    as byte after byte in Python.
    """
    data, crc, table = np.frombuffer(data, np.uint8), 0xFFFFFFFF, TABLE.tolist()
    head = len(data) % LANE
    for byte in data[:head].tolist():
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    lanes = data[head:].reshape(-1, LANE)
    each = np.zeros(len(lanes), np.uint32)
    for column in lanes.T:
        each = TABLE[(each ^ column) & 255] ^ each >> 8
    by_byte = over_a_lane()
    for lane in each.tolist():
        crc = (by_byte[0][crc & 255] ^ by_byte[1][crc >> 8 & 255] ^ by_byte[2][crc >> 16 & 255]
               ^ by_byte[3][crc >> 24] ^ lane)
    return crc ^ 0xFFFFFFFF


def masked(crc):
    """As TFRecord stores it, so that the checksum of data that holds checksums stays a good one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    """The records of a shard, one at a time (bytes). Raises UserError where the file was damaged or cut."""
    with reading(path), open(path, "rb") as file:
        size, number = path.stat().st_size, 0
        while head := file.read(12):
            length, crc = struct.unpack("<QI", head.ljust(12, b"\0"))
            sound = len(head) < 12 or masked(crc32c(head[:8])) == crc
            if sound and file.tell() + length + 4 > size:
                raise UserError(f"{path}: record {number} is cut off. Copy the file again")
            record = file.read(length) if sound else b""
            if not sound or struct.unpack("<I", file.read(4))[0] != masked(crc32c(record)):
                raise UserError(f"{path}: the checksum of record {number} is wrong. Copy the file again")
            yield record
            number += 1


# -- tf.train.Example: a protocol buffer ---------------------------------------------------------------------

def varint(data, at):
    """A number in steps of seven bits, the lowest first -> the number, where the next byte is."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """Each field of a message -> its number, its value: int, or bytes as a view."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
        else:
            length, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + length], at + length
            if at > len(data):
                raise ValueError("a field is longer than its message")
        yield key >> 3, value


def features_of(record):
    """-> {name: the list of its values, as it lies in the record}

    Example {features = 1}; Features {a map = 1, each entry {name = 1, Feature = 2}}.
    """
    found = {}
    for _, features in fields(memoryview(record)):
        for _, entry in fields(features):
            of = dict(fields(entry))
            found[bytes(of[1]).decode()] = of.get(2, memoryview(b""))
    return found


def values(feature):
    """Feature {bytes = 1, floats = 2 or integers = 3}; in each, the values = 1 -> list of bytes, or array.
    Numbers lie one by one, or packed into one field."""
    texts, floats, integers = [], [], []
    for kind, of in fields(feature):
        for _, value in fields(of):
            if kind == 1:
                texts.append(bytes(value))
            elif kind == 2:
                floats.append(np.frombuffer(value, "<f4"))
            else:
                integers += [value] if isinstance(value, int) else varints(value)
    if floats:
        return np.concatenate(floats)
    # A negative number is stored as if it were 2 ** 64 larger.
    return texts or np.array([n - 2 ** 64 * (n >= 2 ** 63) for n in integers], np.int64)


def varints(data):
    numbers, at = [], 0
    while at < len(data):
        number, at = varint(data, at)
        numbers.append(number)
    return numbers


# -- a data set ----------------------------------------------------------------------------------------------

class DataSet:
    """What dataset_info.json and features.json say. Raises UserError where it is none that can be read.

    shards: [(file, its number of episodes)]; cameras, numbers, texts: the features of a step, by their paths.
    """

    def __init__(self, root, split):
        folders = [file.parent for file in sorted(Path(root).glob("**/dataset_info.json"))]
        if len(folders) != 1:
            raise UserError(f"{root} must hold one dataset_info.json, found "
                            f"{', '.join(map(str, folders)) or 'none'}. Give the folder of one version")
        self.folder = folders[0]
        file = self.folder / "dataset_info.json"
        with reading(file):
            self.shards = self._shards(json.loads(file.read_text(encoding="utf-8")), split)
        file = self.folder / "features.json"
        with reading(file):
            whole = json.loads(file.read_text(encoding="utf-8"))
            step = whole["featuresDict"]["features"]["steps"]["sequence"]["feature"]
            self.features = dict(leaves(step))
            self._sort_features()

    def _sort_features(self):
        self.cameras, self.numbers, self.texts = [], {}, []
        for name, about in self.features.items():
            tensor, image = about.get("tensor"), about.get("image")
            if image and shape_of(image)[-1:] == [3]:
                self.cameras.append(name)
            elif "text" in about or tensor and tensor["dtype"] in ("string", "object"):
                self.texts.append(name)
            elif tensor and tensor.get("encoding", "none") == "none" and len(shape_of(tensor)) <= 1:
                self.numbers[name] = (shape_of(tensor) or [1])[0]

    def _shards(self, info, split):
        of = {found["name"]: found for found in info["splits"]}
        if split not in of:
            raise UserError(f"--split {split}: there is none of this name, only {', '.join(of)}")
        kind = info.get("fileFormat", "tfrecord")
        if kind != "tfrecord":
            raise UserError(f"{self.folder} is stored as {kind!r}, only 'tfrecord' can be read")
        lengths = [int(length) for length in of[split]["shardLengths"]]
        template = of[split].get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        shards = []
        for i, length in enumerate(lengths):
            name = template
            for key, value in {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": kind,
                               "SHARD_X_OF_Y": f"{i:05d}-of-{len(lengths):05d}"}.items():
                name = name.replace(f"{{{key}}}", value)
            if not re.fullmatch(r"[\w.+-]+", name) or not (self.folder / name).is_file():
                raise UserError(f"{self.folder}: the file {name} is missing")
            shards.append((self.folder / name, length))
        return shards


def leaves(feature, path=""):
    """The features of a step, which lie in each other as dicts -> (path, what features.json says)."""
    if "featuresDict" not in feature:
        yield path, feature
        return
    for name, inner in feature["featuresDict"]["features"].items():
        yield from leaves(inner, f"{path}/{name}" if path else name)


def shape_of(about):
    return [int(n) for n in about["shape"].get("dimensions", [])]


def numbers_of(example, data, names, steps, where):
    """The named features side by side -> (T, sum of their sizes), float64. None without names."""
    parts = []
    for name in names:
        found, size = values(example[f"steps/{name}"]), data.numbers[name]
        if len(found) != steps * size:
            raise UserError(f"{where}: lengths differ: {steps} pictures, but {len(found)} numbers of {name}, "
                            f"{size} a step")
        parts.append(np.array(found, np.float64).reshape(steps, size))
    return np.concatenate(parts, axis=1) if parts else None


def instruction(example, name, steps, where):
    """The one text that all steps have."""
    texts = values(example[f"steps/{name}"])
    if len(texts) != steps:
        raise UserError(f"{where}: lengths differ: {steps} pictures, but {len(texts)} of {name}")
    changes = [i for i, text in enumerate(texts) if text != texts[0]]
    if changes:
        raise UserError(f"{where}: the task changes at step {changes[0]}, from {texts[0].decode()!r} to "
                        f"{texts[changes[0]].decode()!r}. One instruction is needed for a whole episode")
    return texts[0].decode()


def write_episode(number, record, data, keys, writer, where):
    example = features_of(record)
    missing = [name for name in sum(keys.values(), []) if f"steps/{name}" not in example]
    if missing:
        raise UserError(f"{where}: there is no {missing[0]}")
    files = [values(example[f"steps/{camera}"]) for camera in writer.cameras]
    steps = len(files[0])
    if len(set(map(len, files))) > 1 or not steps:
        raise UserError(f"{where}: lengths differ: the cameras have {list(map(len, files))} pictures")
    actions, states = (numbers_of(example, data, keys[kind], steps, where) for kind in ("action", "state"))
    text = "".join(instruction(example, name, steps, where) for name in keys["text"])
    names = [[writer.encoded(number, camera, step, of[step], where)
              for camera, of in zip(writer.cameras, files)] for step in range(steps)]
    writer.episode(f"{number:06d}", text, names, actions, states, where)


def read(cfg):
    data = DataSet(cfg.dataset, cfg.split)
    cameras = pick(cfg.cameras, sorted(data.cameras), "camera") or sorted(data.cameras)
    if not cameras:
        raise UserError(f"{cfg.dataset} has no camera: no encoded picture with three colors")
    keys = {"action": chosen(cfg.action, [["action"]], data.numbers, "feature"),
            "state": chosen(cfg.state, [["observation/state"]], data.numbers, "feature"),
            "text": chosen("none" if cfg.instruction else cfg.language, [[name] for name in TEXTS],
                           data.texts, "text"),
            "image": cameras}
    if not keys["action"]:
        raise UserError(f"{cfg.dataset} has no feature 'action' of numbers. Name what makes it up with "
                        f"--action; there are: {', '.join(data.numbers) or 'none'}")
    unused = [printable(name, 80) for name in data.features if name not in sum(keys.values(), [])]
    if unused:
        print(f"not used {', '.join(unused)}")
    total = sum(length for _, length in data.shards)

    def write(writer):
        number = 0
        for path, length in data.shards:
            before = number
            for record in records(path):
                where = f"{path}, record {number - before}"
                with reading(where):
                    write_episode(number, record, data, keys, writer, where)
                number += 1
                writer.expect(number, total)
            if number - before != length:
                raise UserError(f"{path} holds {number - before} episodes, but dataset_info.json says "
                                f"{length}")
    return cameras, 0, write


if __name__ == "__main__":
    run(parse(RldsConfig, description=__doc__.split("\n\n")[0], positional=("dataset", "out")), read)
