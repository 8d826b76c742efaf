"""examples/lerobot_to_episodes.py, on data sets that are made here. A picture shows its own number, in eleven
black or white stripes that survive any codec, and this number is also the first one of its action.
"""
import io
import json
import os
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from config import UserError
from examples.episodes import ConversionConfig, convert
from examples.lerobot_to_episodes import read
from helpers import converter

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FPS, SIZE, STRIPES = 10, 88, 11
TOP, HAND = "observation.images.top", "observation.images.hand"
LENGTHS = (7, 12, 5, 9, 3)
TEXTS = ["push the button", "close the drawer"]


def number(episode, step, camera=0):
    return camera * 1000 + episode * 100 + step


def drawn(n):
    """A picture of n, as stripes from left (the highest bit) to right."""
    bits = [n >> bit & 1 for bit in reversed(range(STRIPES))]
    row = np.repeat(np.array(bits, np.uint8) * 190 + 30, SIZE // STRIPES)
    return np.broadcast_to(row[None, :, None], (SIZE, SIZE, 3)).copy()


def shown(path):
    """The number that a picture shows."""
    levels = np.asarray(Image.open(path).convert("L"), np.float64).reshape(SIZE, STRIPES, -1).mean((0, 2))
    return int("".join("01"[int(level > 127)] for level in levels), 2)


@contextmanager
def ordinary_priority():
    """The encoder SVT-AV1, if root runs it, gives real-time priority to the thread that calls it, and so to
    all that this one starts later: tests with several ranks would let nothing else run, not even each other.
    """
    if not hasattr(os, "sched_getscheduler"):               # not Linux
        yield
        return
    policy, how = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, how)


def write_video(path, numbers, codec="mpeg4", times=None, **options):
    """times: when each frame is shown, in frames; None = 0, 1, 2 ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ordinary_priority(), av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.codec_context.max_b_frames = "yuv420p", 2
        stream.bit_rate = 4_000_000
        for time, n in zip(times or range(len(numbers)), numbers):
            frame = av.VideoFrame.from_ndarray(drawn(n), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path)


def row(episode, step, index, text):
    n = number(episode, step)
    return {"action": [float(n), step / 10], "observation.state": [0.1, 0.2, float(n)],
            "timestamp": float(np.float32(step / FPS)), "frame_index": step, "episode_index": episode,
            "index": index, "task_index": text}


def all_rows():
    rows = []
    for episode, length in enumerate(LENGTHS):
        rows += [row(episode, step, len(rows) + step, episode % 2) for step in range(length)]
    return rows


def feature(dtype, *shape, **more):
    return {"dtype": dtype, "shape": list(shape), "names": None, **more}


def features(cameras, kind):
    places = {"timestamp": feature("float32", 1)} | {
        key: feature("int64", 1) for key in ("frame_index", "episode_index", "index", "task_index")}
    return {**{camera: feature(kind, SIZE, SIZE, 3) for camera in cameras},
            "action": feature("float32", 2), "observation.state": feature("float32", 3),
            # What a newer LeRobot may add.
            "observation.depth": feature("image", SIZE, SIZE, 1), "language_events": {"dtype": "language"},
            "observation.images.far": feature("video", SIZE, SIZE, 3, info={"video.is_depth_map": True}),
            **places}


def write_info(folder, version, cameras, kind, **changes):
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 2, "total_episodes": len(LENGTHS),
            "total_frames": sum(LENGTHS), "features": features(cameras, kind),
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    if version < "v3":
        info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                 "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


# Which episodes lie in which file, in this order: rows, and the videos of each camera.
DATA = [[1, 0, 3], [2, 4]]
VIDEOS = {TOP: [[0, 1], [2, 3, 4]], HAND: [[3, 0, 2], [4], [1]]}


def write_v3(folder, codec="mpeg4", videos=VIDEOS, change=lambda made: None):
    """Writes a set of version 3.0. `change` may damage what is going to be written."""
    made = SimpleNamespace(rows=all_rows(), episodes=[], texts=TEXTS, info={},
                           frames={(camera, i): [number(e, s, list(videos).index(camera))
                                                 for e in file for s in range(LENGTHS[e])]
                                   for camera, files in videos.items() for i, file in enumerate(files)})
    for e, length in enumerate(LENGTHS):
        about = {"episode_index": e, "tasks": [TEXTS[e % 2]], "length": length, "stats/action/min": [0.0],
                 "dataset_from_index": sum(LENGTHS[:e]), "dataset_to_index": sum(LENGTHS[:e + 1]),
                 "data/chunk_index": 0, "data/file_index": next(i for i, f in enumerate(DATA) if e in f)}
        for camera, files in videos.items():
            i = next(i for i, file in enumerate(files) if e in file)
            start = 0.0
            for before in files[i][:files[i].index(e)]:
                start += LENGTHS[before] * 0.1              # as LeRobot: 0.7000000000000001 and the like
            about |= {f"videos/{camera}/chunk_index": 1, f"videos/{camera}/file_index": i,
                      f"videos/{camera}/from_timestamp": start,
                      f"videos/{camera}/to_timestamp": start + length * 0.1}
        made.episodes.append(about)
    change(made)
    write_info(folder, "v3.0", videos, "video", **made.info)
    write_table(folder / "meta/tasks.parquet", [{"task_index": i, "__index_level_0__": text}
                                                for i, text in reversed(list(enumerate(made.texts)))])
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", made.episodes[:2])
    write_table(folder / "meta/episodes/chunk-000/file-001.parquet", made.episodes[2:])
    for i, file in enumerate(DATA):
        rows = [r for e in file for r in made.rows if r["episode_index"] == e]
        write_table(folder / f"data/chunk-000/file-{i:03d}.parquet", rows)
    for (camera, i), numbers in made.frames.items():
        write_video(folder / f"videos/{camera}/chunk-001/file-{i:03d}.mp4", numbers, codec)
    return folder


def write_v2(folder):
    """Version 2.1: a file for each episode, two episodes in a chunk."""
    write_info(folder, "v2.1", [TOP, HAND], "video")
    lines = [{"episode_index": e, "tasks": [TEXTS[e % 2]], "length": n} for e, n in enumerate(LENGTHS)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "meta/tasks.jsonl").write_text("\n".join(
        json.dumps({"task_index": i, "task": text}) for i, text in enumerate(TEXTS)))
    for e, length in enumerate(LENGTHS):
        where = f"chunk-{e // 2:03d}"
        write_table(folder / f"data/{where}/episode_{e:06d}.parquet",
                    [r for r in all_rows() if r["episode_index"] == e])
        for c, camera in enumerate([TOP, HAND]):
            write_video(folder / f"videos/{where}/{camera}/episode_{e:06d}.mp4",
                        [number(e, s, c) for s in range(length)])
    return folder


def picture_file(n, kind):
    file = io.BytesIO()
    Image.fromarray(drawn(n)).save(file, format=kind)
    return file.getvalue()


def write_stills(folder, kinds=("PNG", "JPEG"), change=lambda rows: None):
    """Version 3.0 with pictures in the rows, the rows of a file in a wild order."""
    write_info(folder, "v3.0", [TOP, HAND], "image", video_path=None)
    write_table(folder / "meta/tasks.parquet", [{"task_index": i, "task": t} for i, t in enumerate(TEXTS)])
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", [
        {"episode_index": e, "tasks": [TEXTS[e % 2]], "length": n, "data/chunk_index": 0,
         "data/file_index": next(i for i, file in enumerate(DATA) if e in file)}
        for e, n in enumerate(LENGTHS)])
    rows = all_rows()
    for r in rows:
        for c, (camera, kind) in enumerate(zip([TOP, HAND], kinds)):
            n = number(r["episode_index"], r["frame_index"], c)
            r[camera] = {"bytes": picture_file(n, kind), "path": f"frame-{n:06d}.png"}
    change(rows)
    for i, file in enumerate(DATA):
        mixed = sorted((r for r in rows if r["episode_index"] in file), key=lambda r: r["index"] * 7 % 11)
        write_table(folder / f"data/chunk-000/file-{i:03d}.parquet", mixed)
    return folder


def converted(source, out, **flags):
    convert(ConversionConfig(str(source), str(out), **flags), read)
    return json.loads((out / "train.json").read_text())


def assert_each_picture_is_its_actions(out, episodes, cameras=(1, 0)):
    """cameras: what stands in the place of each picture of a step, as a number of `write_v3`."""
    assert sorted((e["id"], e["instruction"], len(e["steps"])) for e in episodes) == [
        ("000000", TEXTS[0], 7), ("000001", TEXTS[1], 12), ("000002", TEXTS[0], 5), ("000003", TEXTS[1], 9),
        ("000004", TEXTS[0], 3)]
    for episode in episodes:
        for i, step in enumerate(episode["steps"]):
            n = number(int(episode["id"]), i)
            images = [step["image"]] if isinstance(step["image"], str) else step["image"]
            assert step["action"] == [n, float(np.float64(i / 10))]
            assert step["state"] == [0.1, 0.2, n]
            assert [shown(out / "images" / name) for name in images] == [n + 1000 * c for c in cameras]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libx265", "libvpx-vp9", "libsvtav1"])
def test_two_cameras_with_files_of_their_own(tmp_path, codec):
    try:
        av.codec.Codec(codec, "w")
    except Exception:
        pytest.skip(f"this build of av has no {codec}")
    source = write_v3(tmp_path / "set", codec)
    with av.open(str(source / f"videos/{HAND}/chunk-001/file-000.mp4")) as container:
        kinds = {int(frame.pict_type) for frame in container.decode(video=0)}
    assert 3 in kinds or codec in ("libvpx-vp9", "libsvtav1")               # B-frames: decoded out of order
    out = tmp_path / "out"
    assert_each_picture_is_its_actions(out, converted(source, out))
    assert not hasattr(os, "sched_getscheduler") or os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_cameras_and_their_order_are_a_flag(tmp_path, capsys):
    source = write_v3(tmp_path / "set")
    both = converted(source, tmp_path / "both", cameras=f"{TOP},{HAND}")
    assert_each_picture_is_its_actions(tmp_path / "both", both, (0, 1))
    assert sorted(both, key=lambda e: e["id"])[0]["steps"][3]["image"] == [
        "000000/top/000003.png", "000000/hand/000003.png"]
    hand = converted(source, tmp_path / "hand", cameras="hand")             # the last part is enough
    assert_each_picture_is_its_actions(tmp_path / "hand", hand, (1,))
    shown_text = capsys.readouterr().out
    assert "not used observation.depth, language_events, observation.images.far" in shown_text
    assert f"pictures in this order: {TOP}, {HAND}" in shown_text
    with pytest.raises(UserError, match="there is no camera 'left' here. There are: observation.images.hand"):
        converted(source, tmp_path / "left", cameras="left")


def test_a_file_for_each_episode(tmp_path):
    out = tmp_path / "out"
    assert_each_picture_is_its_actions(out, converted(write_v2(tmp_path / "set"), out))


def test_an_instruction_of_the_users_stands_in_place_of_the_tasks(tmp_path):
    source = write_v3(tmp_path / "set", change=change_task)
    (source / "meta/tasks.parquet").unlink()
    episodes = converted(source, tmp_path / "out", instruction="lift it")
    assert {episode["instruction"] for episode in episodes} == {"lift it"}


def test_places_may_be_lists_of_one_number(tmp_path):
    source = write_stills(tmp_path / "set")
    for file in source.glob("data/*/*.parquet"):
        rows = parquet.read_table(file).to_pylist()
        for row in rows:
            row |= {key: [row[key]] for key in ("episode_index", "frame_index", "timestamp", "task_index")}
        write_table(file, rows)
    assert_each_picture_is_its_actions(tmp_path / "out", converted(source, tmp_path / "out"))


def test_pictures_in_the_rows_stay_as_they_are(tmp_path):
    out = tmp_path / "out"
    episodes = converted(write_stills(tmp_path / "set"), out)
    assert_each_picture_is_its_actions(out, episodes)
    hand, top = next(e for e in episodes if e["id"] == "000003")["steps"][8]["image"]
    assert (hand, top) == ("000003/hand/000008.jpg", "000003/top/000008.png")
    assert (out / "images" / top).read_bytes() == picture_file(308, "PNG")
    assert (out / "images" / hand).read_bytes() == picture_file(1308, "JPEG")


def test_an_action_of_one_number_is_stored_without_a_list(tmp_path):
    def change(made):
        made.info["features"] = features(VIDEOS, "video") | {"action": feature("float32", 1)}
        for r in made.rows:
            r["action"] = r["action"][0]
    episodes = converted(write_v3(tmp_path / "set", change=change), tmp_path / "out")
    assert [[step["action"] for step in e["steps"][:2]] for e in episodes if e["id"] == "000003"] == [
        [[300], [301]]]


def test_frames_of_a_removed_episode_may_lie_in_front_of_another(tmp_path):
    """Episode 3 was taken out of meta/ and of the rows, but not out of the videos."""
    def change(made):
        made.rows = [r for r in made.rows if r["episode_index"] != 3]
        made.episodes = [e for e in made.episodes if e["episode_index"] != 3]
        made.info = {"total_episodes": 4, "total_frames": sum(LENGTHS) - 9}
    out = tmp_path / "out"
    episodes = converted(write_v3(tmp_path / "set", change=change), out)
    assert [(e["id"], len(e["steps"])) for e in sorted(episodes, key=lambda e: e["id"])] == [
        ("000000", 7), ("000001", 12), ("000002", 5), ("000004", 3)]
    for episode in episodes:
        for i, step in enumerate(episode["steps"]):
            assert [shown(out / "images" / name) for name in step["image"]] == [
                number(int(episode["id"]), i, 1), number(int(episode["id"]), i)]


# -- what does not add up --

def of(made, episode, step):
    return next(r for r in made.rows if (r["episode_index"], r["frame_index"]) == (episode, step))


def drop(made):
    """As LeRobot's encoder does it: the frame is gone, later ones move up, meta/ knows nothing of it."""
    del made.frames[TOP, 1][7]


def drop_and_tell(made):
    """The same, but meta/ has the times of the video that came out."""
    drop(made)
    made.episodes[3][f"videos/{TOP}/to_timestamp"] -= 0.1
    for name in ("from", "to"):
        made.episodes[4][f"videos/{TOP}/{name}_timestamp"] -= 0.1


def double(made):
    made.frames[HAND, 0].insert(4, made.frames[HAND, 0][4])


def use_twice(made):
    for name in ("from", "to"):
        made.episodes[1][f"videos/{TOP}/{name}_timestamp"] -= 0.1


def begin_early(made):
    for name in ("from", "to"):
        made.episodes[0][f"videos/{TOP}/{name}_timestamp"] -= 0.2


def change_task(made):
    for step in range(5, 9):
        of(made, 3, step)["task_index"] = 0


def forget(made):
    """An episode is gone from meta/, its rows are still there."""
    del made.episodes[3]
    made.info = {"total_episodes": 4, "total_frames": sum(LENGTHS) - 9}


def rename_task(made):
    made.texts = ["push the button", "open the drawer"]


@pytest.mark.parametrize("change, message", [
    (drop, "file-001.mp4 holds 16 pictures, but its episodes need 17"),
    (drop_and_tell, "episode 3 has 9 steps, but its time in the video is 8 frames"),
    (double, "file-000.mp4 holds more than 21 pictures, but its episodes need 21"),
    (use_twice, "frame 6 is used twice, by episodes 0 and 1"),
    (begin_early, "episode 0 begins before the video does"),
    (lambda made: made.rows.remove(of(made, 1, 4)), "meta/ says 12 steps, but there are 11 rows"),
    (lambda made: made.rows.append(of(made, 1, 4)), "meta/ says 12 steps, but there are 13 rows"),
    (lambda made: of(made, 1, 4).update(frame_index=5), "episode 1: the row of frame 4 is missing"),
    (lambda made: of(made, 1, 4).update(timestamp=0.5),
     "frame 4 is timed 0.5 s, at 10 frames a second it should be 0.4"),
    (change_task, "the task changes at frame 5, from 'close the drawer' to 'push the button'"),
    (lambda made: of(made, 2, 4).update(task_index=7), "episode 2: task_index 7 has no text in meta/tasks"),
    (rename_task, "its rows are of the task 'open the drawer', but meta/episodes says"),
    (lambda made: of(made, 2, 4)["action"].__setitem__(1, float("nan")),
     "episode 2, step 4: number 1 of its action is nan"),
    (lambda made: of(made, 2, 4)["observation.state"].__setitem__(0, float("inf")),
     "episode 2, step 4: number 0 of its state is inf"),
    (lambda made: of(made, 2, 4)["action"].append(1.0),
     "column 'action': rows have different numbers of values"),
    (lambda made: of(made, 2, 4).update(action=None), "column 'action': a value is missing"),
    (lambda made: of(made, 2, 4)["action"].__setitem__(0, None), "column 'action': a value is missing"),
    (lambda made: made.episodes[1].update(dataset_to_index=18),
     "episode 1 has 12 steps, but its rows are 7 to 18"),
    (lambda made: made.episodes.pop(), "total_episodes is 5, but the episodes in meta/ make 4"),
    (lambda made: made.episodes.append(made.episodes[0]),
     "total_episodes is 5, but the episodes in meta/ make 6"),
    (lambda made: made.episodes[1].update(episode_index=0), "names an episode twice"),
    (forget, "file-000.parquet holds rows of episode 3, which belongs elsewhere, or nowhere"),
    (lambda made: made.episodes[4].update({f"videos/{TOP}/file_index": 0}), "is used twice"),
    (lambda made: made.info.update(codebase_version="v1.6"), "version 'v1.6' can't be read"),
    (lambda made: made.info.update(data_path="../{chunk_index}/{file_index}"), "names no file in it"),
    (lambda made: made.info.update(data_path="{chunk_index.__class__}"), "names no file in it"),
    (lambda made: made.info.update(features={TOP: feature("video", SIZE, SIZE, 3)}),
     "has no feature 'action'"),
    (lambda made: made.info.update(fps=0), "fps is 0"),
    (lambda made: made.__setattr__("texts", ["", ""]), "meta/episodes says"),
])
def test_what_does_not_add_up_leaves_nothing(tmp_path, change, message):
    source = write_v3(tmp_path / "set", change=change)
    with pytest.raises(UserError) as e:
        converted(source, tmp_path / "out")
    assert message in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_gap_between_the_times_of_frames_is_a_missing_picture(tmp_path):
    source = write_v3(tmp_path / "set")
    write_video(source / f"videos/{TOP}/chunk-001/file-000.mp4", [number(0, s) for s in range(19)],
                times=[*range(9), *range(10, 20)])
    with pytest.raises(UserError, match="file-000.mp4: at frame 9 a picture is missing, doubled or damaged"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("less", [1, 20, 1500])
def test_a_video_whose_end_was_cut_off(tmp_path, less):
    """With its index in front, such a file can still be opened."""
    source = write_v3(tmp_path / "set")
    file = source / f"videos/{TOP}/chunk-001/file-000.mp4"
    write_video(file, [number(0, s) for s in range(19)], movflags="faststart")
    assert len(converted(source, tmp_path / "whole")) == 5
    file.write_bytes(file.read_bytes()[:-less])
    with pytest.raises(UserError, match="file-000.mp4"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("name", [
    "meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-001.parquet",
    "data/chunk-000/file-001.parquet", f"videos/{HAND}/chunk-001/file-002.mp4"])
@pytest.mark.parametrize("keep", [None, 0, 0.5, 0.9])
def test_a_file_that_is_missing_or_cut_is_named(tmp_path, name, keep):
    source = write_v3(tmp_path / "set")
    file = source / name
    data = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(data[:int(len(data) * keep)])
    with pytest.raises(UserError) as e:
        converted(source, tmp_path / "out")
    assert "info.json" in str(e.value) or name in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[20][HAND].update(bytes=b"\x89PNG, but no more"), "step 1, is no PNG or JPEG file"),
    (lambda rows: rows[20][HAND].update(bytes=rows[20][HAND]["bytes"][:-40]),
     "step 1, is no PNG or JPEG file"),
    (lambda rows: rows[20][HAND].update(bytes=None), f"there is no picture of {HAND}, step 1"),
    (lambda rows: rows[20].update({HAND: None}), f"there is no picture of {HAND}, step 1"),
])
def test_a_bad_picture_in_the_rows_is_named(tmp_path, change, message):
    assert all_rows()[20]["episode_index"] == 2
    with pytest.raises(UserError, match="file-001.parquet, episode 2") as e:
        converted(write_stills(tmp_path / "set", ("PNG", "PNG"), change), tmp_path / "out")
    assert message in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_whatever_happens_on_the_way_leaves_nothing(tmp_path, monkeypatch, error):
    source, save, saved = write_v3(tmp_path / "set"), Image.Image.save, []

    def fail_late(image, *args, **options):
        saved.append(image)
        if len(saved) == 30:
            raise error
        save(image, *args, **options)
    monkeypatch.setattr(Image.Image, "save", fail_late)
    with pytest.raises((UserError, KeyboardInterrupt)) as e:
        converted(source, tmp_path / "deep/out")
    assert e.type is KeyboardInterrupt or "No space left" in str(e.value) or "MemoryError" in str(e.value)
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_existing_folder_is_never_touched(tmp_path):
    source, out = write_v3(tmp_path / "set"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="out exists. Move it away"):
        converted(source, out)
    assert list(out.iterdir()) == []


# -- the command --

def command(*args):
    return converter("lerobot", *args, without=("torch", "lerobot", "tensorflow"))


def test_the_command_needs_no_torch_and_says_what_comes_next(tmp_path):
    source, out = write_v3(tmp_path / "set"), tmp_path / "deep/out"
    result = command(source, out, "--val_every", "2", "--jpeg", "95")
    assert result.returncode == 0, result.stderr
    assert f"next     python check.py {out}/train.json --image_dir {out}/images --stage vla" in result.stdout
    assert f"{out}/train.json: 3 episodes" in result.stdout and f"{out}/val.json: 2 episodes" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["images", "train.json", "val.json"]
    episodes = [e for name in ("train", "val") for e in json.loads((out / f"{name}.json").read_text())]
    assert_each_picture_is_its_actions(out, episodes)
    again = command(source, out)
    assert again.returncode == 1 and "exists. Move it away" in again.stderr
    assert len(list(out.rglob("*.jpg"))) == 2 * sum(LENGTHS)


def test_the_command_ends_with_one_sentence(tmp_path):
    result = command(write_v3(tmp_path / "set", change=drop), tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert "holds 16 pictures, but its episodes need 17" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    wrong = command("--jpeg", "200")
    assert wrong.returncode == 2 and "give two names" in wrong.stderr
