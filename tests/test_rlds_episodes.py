"""examples/rlds_to_episodes.py, on data sets that are written here, byte by byte. A picture shows its own
number, as in test_lerobot_episodes.py."""
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from config import UserError
from examples.episodes import convert
from examples.rlds_to_episodes import RldsConfig, crc32c, masked, read
from helpers import converter

SIZE, BITS = 60, 10
SHARDS = [[6, 3], [4], [1, 5]]                              # the lengths of their episodes
IMAGE, WRIST = "observation/image", "observation/wrist_image"


def picture_file(n, kind="JPEG"):
    bits = np.array([n >> bit & 1 for bit in reversed(range(BITS))], np.uint8)
    row, file = np.repeat(bits * 190 + 30, SIZE // BITS), io.BytesIO()
    Image.fromarray(np.broadcast_to(row[None, :, None], (SIZE, SIZE, 3)).copy()).save(file, format=kind)
    return file.getvalue()


def shown(path):
    levels = np.asarray(Image.open(path).convert("L"), np.float64).reshape(SIZE, BITS, -1).mean((0, 2))
    return int("".join("01"[int(level > 127)] for level in levels), 2)


# -- a writer of protocol buffers and TFRecords, as plain as can be --

def varint(n):
    n, out = n % 2 ** 64, b""
    while n > 127:
        n, out = n >> 7, out + bytes([n & 127 | 128])
    return out + bytes([n])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value, packed=True):
    if isinstance(value[0], bytes):
        return field(1, b"".join(field(1, text) for text in value))
    if isinstance(value[0], float):
        each = [struct.pack("<f", n) for n in value]
        return field(2, field(1, b"".join(each)) if packed else b"".join(b"\x0d" + one for one in each))
    each = [varint(n) for n in value]
    return field(3, field(1, b"".join(each)) if packed else b"".join(b"\x08" + one for one in each))


def example(features, packed=True):
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, feature(value, packed)))
                             for name, value in features.items()))


def slow_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def record(data):
    def checksum(part):
        crc = slow_crc(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2 ** 32)
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def tensor(dtype, *shape):
    return {"tensor": {"dtype": dtype, "encoding": "none", "shape": {"dimensions": list(map(str, shape))}}}


def picture_feature(channels):
    return {"image": {"dtype": "uint8", "encodingFormat": "jpeg",
                      "shape": {"dimensions": [str(SIZE), str(SIZE), str(channels)]}}}


def nested(**features):
    return {"featuresDict": {"features": features}}


FEATURES = nested(
    episode_metadata=nested(file_path={"text": {}}),
    steps={"sequence": {"length": "-1", "feature": nested(
        action=tensor("float32", 3), reward=tensor("float32"), is_first=tensor("bool"),
        language_instruction={"text": {}}, language_embedding=tensor("float32", 2, 4),
        observation=nested(image=picture_feature(3), wrist_image=picture_feature(3), depth=picture_feature(1),
                           state=tensor("float32", 2), joints=tensor("int64", 2)))}})


def episode(number, length):
    steps, n = range(length), number * 20
    return {"steps/action": [x for s in steps for x in (float(n + s), -1.0 + s / 4, 0.5)],
            f"steps/{IMAGE}": [picture_file(n + s) for s in steps],
            f"steps/{WRIST}": [picture_file(n + s + 500, "PNG") for s in steps],
            f"steps/{IMAGE[:-5]}state": [x for s in steps for x in (float(n + s), 0.25)],
            f"steps/{IMAGE[:-5]}joints": [x for s in steps for x in (n + s, -3)],
            "steps/is_first": [int(s == 0) for s in steps], "steps/reward": [0.0] * length,
            "steps/language_instruction": [f"task {number % 2}".encode()] * length,
            "episode_metadata/file_path": [b"/x"]}


def write_set(folder, change=lambda episodes: None, packed=True, **info):
    folder.mkdir(parents=True)
    lengths = [length for shard in SHARDS for length in shard]
    episodes = [episode(number, length) for number, length in enumerate(lengths)]
    change(episodes)
    (folder / "features.json").write_text(json.dumps(FEATURES))
    (folder / "dataset_info.json").write_text(json.dumps({
        "name": "arm", "fileFormat": "tfrecord", "splits": [
            {"name": "train", "shardLengths": [str(len(shard)) for shard in SHARDS],
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"},
            {"name": "test", "shardLengths": []}]} | info))
    rest = iter(episodes)
    for i, shard in enumerate(SHARDS):
        (folder / f"arm-train.tfrecord-{i:05d}-of-00003").write_bytes(
            b"".join(record(example(next(rest), packed)) for _ in shard))
    return folder


def converted(source, out, **flags):
    convert(RldsConfig(str(source), str(out), **flags), read)
    return json.loads((out / "train.json").read_text())


@pytest.mark.parametrize("packed", [True, False])
def test_each_picture_is_its_actions(tmp_path, capsys, packed):
    write_set(tmp_path / "set/1.0.0", packed=packed)
    out = tmp_path / "out"
    episodes = converted(tmp_path / "set", out)
    assert [(e["id"], e["instruction"], len(e["steps"])) for e in episodes] == [
        ("000000", "task 0", 6), ("000001", "task 1", 3), ("000002", "task 0", 4), ("000003", "task 1", 1),
        ("000004", "task 0", 5)]
    for e, of in enumerate(episodes):
        for s, step in enumerate(of["steps"]):
            n = 20 * e + s
            assert step["action"] == [n, -1 + s / 4, 0.5] and step["state"] == [n, 0.25]
            assert [shown(out / "images" / name) for name in step["image"]] == [n, n + 500]
    image, wrist = episodes[2]["steps"][3]["image"]
    assert (image, wrist) == ("000002/image/000003.jpg", "000002/wrist_image/000003.png")
    assert (out / "images" / image).read_bytes() == picture_file(43)       # the very bytes of the record
    assert (out / "images" / wrist).read_bytes() == picture_file(543, "PNG")
    assert "not used reward, is_first, language_embedding, observation/depth" in capsys.readouterr().out


def test_actions_and_state_are_put_together_by_flags(tmp_path):
    write_set(tmp_path / "set")
    episodes = converted(tmp_path / "set", tmp_path / "out", cameras=WRIST, action="reward,action",
                         state="observation/joints,observation/state", instruction="wave")
    assert episodes[1]["steps"][2] == {"image": "000001/000002.png", "action": [0.0, 22.0, -0.5, 0.5],
                                       "state": [22.0, -3.0, 22.0, 0.25]}
    assert {e["instruction"] for e in episodes} == {"wave"}
    without = converted(tmp_path / "set", tmp_path / "without", state="none")
    assert set(without[0]["steps"][0]) == {"image", "action"}


@pytest.mark.parametrize("gripper, stored, expected", [
    ("as_it_is", [-1.0, -0.5, 0.0, 1.0], [-1.0, -0.5, 0.0, 1.0]),
    ("libero", [-1.0, -0.5, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]),              # OpenVLA: 1 - clip(gripper, 0, 1)
    ("inverted", [0.0, 0.25, 1.0, 1.0], [1.0, 0.75, 0.0, 0.0])])
def test_gripper_conventions(tmp_path, gripper, stored, expected):
    def change(episodes):
        for e in episodes:
            count = len(e["steps/action"]) // 3
            e["steps/action"][2::3] = (stored * 2)[:count]
    write_set(tmp_path / "set", change)
    episodes = converted(tmp_path / "set", tmp_path / "out", gripper=gripper)
    assert [step["action"][2] for step in episodes[2]["steps"]] == expected
    assert [step["action"][0] for step in episodes[2]["steps"]] == [40.0, 41.0, 42.0, 43.0]


def test_a_gripper_convention_that_can_not_be_meant_is_refused(tmp_path):
    write_set(tmp_path / "set", lambda episodes: episodes[2]["steps/action"].__setitem__(5, 40.0))
    with pytest.raises(UserError, match="libero is for numbers from -1 to 1, but .* from 0.5 to 40"):
        converted(tmp_path / "set", tmp_path / "out", gripper="libero")


def test_pictures_can_be_turned(tmp_path):
    write_set(tmp_path / "set")
    out = tmp_path / "out"
    episodes = converted(tmp_path / "set", out, turn="180")
    name = episodes[2]["steps"][3]["image"][0]
    assert name == "000002/image/000003.png"
    assert shown(out / "images" / name) == int(f"{43:010b}"[::-1], 2)


@pytest.mark.parametrize("change, message", [
    (lambda es: es[1]["steps/action"].append(1.0),
     "lengths differ: 3 pictures, but 10 numbers of action, 3 a step"),
    (lambda es: es[1][f"steps/{WRIST}"].pop(), r"lengths differ: the cameras have \[3, 2\] pictures"),
    (lambda es: es[1]["steps/language_instruction"].pop(), "3 pictures, but 2 of language_instruction"),
    (lambda es: es[1]["steps/language_instruction"].__setitem__(2, b"other"),
     "the task changes at step 2, from 'task 1' to 'other'"),
    (lambda es: es[1].update({"steps/language_instruction": [b" "] * 3}),
     "has no instruction. Give one: --instruction"),
    (lambda es: es[1]["steps/action"].__setitem__(4, float("nan")), "step 1: number 1 of its action is nan"),
    (lambda es: es[1].pop("steps/action"), "there is no action"),
    (lambda es: es[1][f"steps/{IMAGE}"].__setitem__(1, b"GIF89a"), "step 1, is no PNG or JPEG file"),
    (lambda es: es[1][f"steps/{IMAGE}"].__setitem__(1, b""), "step 1, is no PNG or JPEG file"),
])
def test_what_does_not_add_up_leaves_nothing(tmp_path, change, message):
    write_set(tmp_path / "set", change)
    with pytest.raises(UserError, match=message) as e:
        converted(tmp_path / "set", tmp_path / "out")
    assert "arm-train.tfrecord-00000-of-00003, record 1" in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-1], "record 1 is cut off"), (lambda data: data[:-5], "record 1 is cut off"),
    (lambda data: data + b"\0" * 7, "record 2 is cut off"),
    (lambda data: data[:len(data) // 2], "record 0 is cut off"), (lambda data: b"", "holds 0 episodes, but"),
    (lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:], "the checksum of record 0 is wrong"),
    (lambda data: bytes([data[0] ^ 1]) + data[1:], "the checksum of record 0 is wrong"),
    (lambda data: data + data, "holds 4 episodes, but dataset_info.json says 2"),
    (lambda data: data + record(b"\x0a\xff\x01"), "record 2"),
    (lambda data: None, "the file arm-train.tfrecord-00000-of-00003 is missing"),
])
def test_a_damaged_shard_is_named(tmp_path, damage, message):
    shard = write_set(tmp_path / "set") / "arm-train.tfrecord-00000-of-00003"
    data = damage(shard.read_bytes())
    shard.unlink()
    if data is not None:
        shard.write_bytes(data)
    with pytest.raises(UserError, match=message) as e:
        converted(tmp_path / "set", tmp_path / "out")
    assert shard.name in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("info, flags, message", [
    ({}, {"split": "val"}, "--split val: there is none of this name, only train, test"),
    ({}, {"split": "test"}, "holds no episode for training"),
    ({}, {"action": "observation/image"}, "there is no feature 'observation/image' here. There are: action"),
    ({"fileFormat": "array_record"}, {}, "is stored as 'array_record'"),
    ({"name": "../arm"}, {}, "../arm-train.tfrecord-00000-of-00003 is missing"),
])
def test_what_can_not_be_read_is_said(tmp_path, info, flags, message):
    write_set(tmp_path / "set", **info)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "set", tmp_path / "out", **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("old, new", [
    ('"dtype"', '"type"'), ('"dimensions"', '"d"'), ("steps", "step"), ("{", "[")])
def test_features_that_are_damaged_are_named(tmp_path, old, new):
    file = write_set(tmp_path / "set") / "features.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match="features.json can't be read|there is no|has no camera"):
        converted(tmp_path / "set", tmp_path / "out")


def test_no_data_set_or_two(tmp_path):
    with pytest.raises(UserError, match="must hold one dataset_info.json, found none"):
        converted(tmp_path, tmp_path / "out")
    write_set(tmp_path / "set/1.0.0")
    write_set(tmp_path / "set/2.0.0")
    with pytest.raises(UserError, match="Give the folder of one version"):
        converted(tmp_path / "set", tmp_path / "out")


def test_the_command_needs_numpy_and_pillow_only(tmp_path):
    packages = ("torch", "tensorflow", "tensorflow_datasets", "google", "pyarrow", "av", "h5py")
    write_set(tmp_path / "set")
    result = converter("rlds", tmp_path / "set", tmp_path / "out", without=packages)
    assert result.returncode == 0 and "out/train.json: 5 episodes, 19 steps" in result.stdout, result.stderr
    (tmp_path / "set/arm-train.tfrecord-00002-of-00003").unlink()
    result = converter("rlds", tmp_path / "set", tmp_path / "again", without=packages)
    assert result.returncode == 1 and "arm-train.tfrecord-00002-of-00003 is missing" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_checksums_are_those_of_the_standard():
    """RFC 3720, appendix B.4, and a plain implementation, at lengths around those of a lane."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43 and crc32c(b"") == 0
    data = np.random.default_rng(0).bytes(5000)
    for length in (1, 1023, 1024, 1025, 2048, 3000, 5000):
        assert crc32c(data[:length]) == slow_crc(data[:length])
    assert masked(0xE3069283) == ((0xE3069283 >> 15 | 0xE3069283 << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2 ** 32
