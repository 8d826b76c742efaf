"""examples/hdf5_to_episodes.py, on files that are made here as LIBERO and robomimic make them. The number of
a picture is its level of red; green is the row of pixels, so that a turned one shows."""
import json

import numpy as np
import pytest
from PIL import Image

from config import UserError
from examples.episodes import convert
from examples.hdf5_to_episodes import Hdf5Config, read
from helpers import converter

h5py = pytest.importorskip("h5py")
LENGTHS = {"demo_10": 4, "demo_2": 70, "demo_1": 5}         # in alphabetical order 1, 10, 2


def pictures(numbers):
    """(T, 16, 16, 3): red says which, green says which row of pixels."""
    of = np.zeros((len(numbers), 16, 16, 3), np.uint8)
    of[..., 0], of[..., 1] = np.array(numbers)[:, None, None], np.arange(16)[:, None]
    return of


def write_file(path, cameras, states, change=lambda data: None, **attributes):
    """The picture and the state in row t say t, the action says t, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"num_demos": len(LENGTHS), "total": sum(LENGTHS.values())} | attributes)
        for name, length in LENGTHS.items():
            demo, rows = data.create_group(name), np.arange(length)
            demo.attrs["num_samples"] = length
            demo["actions"] = np.stack([rows, rows * 0 + 0.5, 1 - 2 * (rows % 2)], axis=1)
            demo["dones"], demo["states"] = np.uint8(rows == length - 1), np.zeros((length, 9))
            for c, camera in enumerate(cameras):
                demo[f"obs/{camera}"] = pictures(rows + 100 * c)
            for key, size in states.items():
                demo[f"obs/{key}"] = np.repeat(rows[:, None] / 4, size, axis=1)
        file.create_dataset("mask/train", data=np.array(["demo_1"], dtype="S8"))
        change(data)
    return path


def libero(path, text="put the bowl on the plate", change=lambda data: None):
    return write_file(path, ["agentview_rgb", "eye_in_hand_rgb"],
                      {"ee_states": 6, "gripper_states": 2, "joint_states": 7}, change,
                      problem_info=json.dumps({"problem_name": "x", "language_instruction": text}))


def robomimic(path, change=lambda data: None):
    return write_file(path, ["robot0_eye_in_hand_image", "agentview_image"],
                      {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10},
                      change, env_args="{}")


def converted(source, out, **flags):
    convert(Hdf5Config(str(source), str(out), **flags), read)
    return json.loads((out / "train.json").read_text())


def red_and_top_green(out, name):
    return np.asarray(Image.open(out / "images" / name))[0, 0, :2].tolist()


@pytest.mark.parametrize("text", ["put the bowl on the plate", list("put the bowl on the plate")])
def test_liberos_pictures_are_those_of_the_row_before(tmp_path, capsys, text):
    libero(tmp_path / "set/put_the_bowl.hdf5", text)
    out = tmp_path / "out"
    episodes = converted(tmp_path / "set", out, turn="180", gripper="libero")
    assert [(e["id"], e["instruction"], len(e["steps"])) for e in episodes] == [
        ("put_the_bowl/demo_1", "put the bowl on the plate", 4),
        ("put_the_bowl/demo_2", "put the bowl on the plate", 69),
        ("put_the_bowl/demo_10", "put the bowl on the plate", 3)]
    for episode in episodes:
        for i, step in enumerate(episode["steps"]):
            assert step["action"] == [i + 1, 0.5, float((i + 1) % 2)]           # stored: 1 closes, -1 opens
            assert step["state"] == [i / 4] * 8
            assert [red_and_top_green(out, name) for name in step["image"]] == [[i, 15], [i + 100, 15]]
    assert episodes[1]["steps"][68]["image"][1] == "000001/eye_in_hand_rgb/000068.png"
    printed = capsys.readouterr().out
    assert "those of the row before" in printed and "upside down" not in printed
    assert "train with --keep_dimensions 2" in printed


def test_robomimics_pictures_are_those_of_their_action(tmp_path, capsys):
    out = tmp_path / "out"
    episodes = converted(robomimic(tmp_path / "image.hdf5"), out, instruction="lift the cube")
    assert [(e["id"], e["instruction"], len(e["steps"])) for e in episodes] == [
        ("image/demo_1", "lift the cube", 5), ("image/demo_2", "lift the cube", 70),
        ("image/demo_10", "lift the cube", 4)]
    for episode in episodes:
        for i, step in enumerate(episode["steps"]):
            assert step["action"] == [i, 0.5, 1 - 2 * (i % 2)] and step["state"] == [i / 4] * 9
            assert [red_and_top_green(out, name) for name in step["image"]] == [[i + 100, 0], [i, 0]]
    assert "not used object" in capsys.readouterr().out


def test_which_row_and_which_arrays_are_flags(tmp_path):
    libero(tmp_path / "set/a.hdf5")
    episodes = converted(tmp_path / "set", tmp_path / "out", pictures="before", cameras="eye_in_hand_rgb",
                         state="gripper_states", action="actions,dones")
    assert episodes[2]["steps"][3] == {"image": "000002/000003.png", "action": [3, 0.5, -1, 1],
                                       "state": [0.75] * 2}
    episodes = converted(robomimic(tmp_path / "b.hdf5"), tmp_path / "late", pictures="after", state="none",
                         instruction="lift")
    assert [len(e["steps"]) for e in episodes] == [4, 69, 3]
    assert set(episodes[0]["steps"][0]) == {"image", "action"}


def test_a_folder_of_tasks_and_a_held_out_part(tmp_path):
    for name in ("task_10", "task_9"):
        libero(tmp_path / f"set/{name}.hdf5", f"do {name}")
    episodes = converted(tmp_path / "set", tmp_path / "out", val_every=3)
    assert [e["id"] for e in episodes] == ["task_9/demo_1", "task_9/demo_2",
                                           "task_10/demo_1", "task_10/demo_2"]
    assert [e["id"] for e in json.loads((tmp_path / "out/val.json").read_text())] == [
        "task_9/demo_10", "task_10/demo_10"]


def replace(data, name, value):
    del data[name]
    data[name] = value


@pytest.mark.parametrize("change, message", [
    (lambda data: replace(data, "demo_2/obs/agentview_rgb", pictures(range(69))),
     "demo_2: lengths differ: 70 actions, but 69 of agentview_rgb"),
    (lambda data: replace(data, "demo_2/obs/ee_states", np.zeros((71, 6))),
     "demo_2: lengths differ: 70 actions, but 71 of ee_states"),
    (lambda data: data["demo_2/actions"].__setitem__((6, 1), np.nan),
     "demo_2, step 5: number 1 of its action is nan"),
    (lambda data: replace(data, "demo_2/actions", np.zeros((70, 4))), "action and state have"),
    (lambda data: data["demo_2"].attrs.update(num_samples=71), "demo_2: num_samples is 71, but there are 70"),
    (lambda data: data.pop("demo_2"), "num_demos is 3, but 2 are there"),
    (lambda data: data.attrs.update(total=80), "total is 80, but 79 are there"),
    (lambda data: data.pop("demo_2/obs/eye_in_hand_rgb"), "demo_2 can't be read (KeyError"),
    (lambda data: [data.pop(f"{name}/obs") for name in LENGTHS], "obs has no pictures"),
    (lambda data: data.attrs.update(problem_info='{"language_instruction": " "}'), "has no instruction"),
    (lambda data: data.attrs.update(problem_info="{"), "a.hdf5 can't be read (JSONDecodeError"),
    (lambda data: replace(data, "demo_2/obs/agentview_rgb", h5py.ExternalLink("b.hdf5", "data/actions")),
     "a.hdf5"),
])
def test_what_does_not_add_up_leaves_nothing(tmp_path, change, message):
    libero(tmp_path / "set/a.hdf5", change=change)
    with pytest.raises(UserError) as e:
        converted(tmp_path / "set", tmp_path / "out")
    assert message in str(e.value) and "a.hdf5" in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_numbers_that_lie_in_another_file_are_refused(tmp_path):
    """A raw file as the place of an array: whoever made the data set chose its path."""
    (tmp_path / "secret").write_bytes(bytes(70 * 3 * 8))

    def change(data):
        del data["demo_2/actions"]
        data["demo_2"].create_dataset("actions", (70, 3), np.float64, external=[(str(tmp_path / "secret"), 0,
                                                                                 70 * 3 * 8)])
    libero(tmp_path / "set/a.hdf5", change=change)
    with pytest.raises(UserError, match="/data/demo_2/actions does not lie in the file itself"):
        converted(tmp_path / "set", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 100, 20000])
def test_a_file_that_was_cut_is_named(tmp_path, keep):
    file = libero(tmp_path / "set/a.hdf5")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="a.hdf5 can't be read"):
        converted(tmp_path / "set", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_command_needs_no_torch(tmp_path):
    libero(tmp_path / "set/a.hdf5")
    args = tmp_path / "set", tmp_path / "out", "--turn", "180"
    result = converter("hdf5", *args, without=("torch", "tensorflow"))
    assert result.returncode == 0 and "out/train.json: 3 episodes, 76 steps" in result.stdout, result.stderr
    again = converter("hdf5", *args, without=("torch", "tensorflow", "h5py"))
    assert again.returncode == 1 and "out exists. Move it away" in again.stderr
    other = converter("hdf5", tmp_path / "set", tmp_path / "other", without=("torch", "h5py"))
    assert other.returncode == 1 and "the package h5py is missing" in other.stderr


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="is no HDF5 file, and no folder that holds one"):
        converted(tmp_path / "nowhere", tmp_path / "out")
