"""From a LeRobot data set (v2.0, v2.1, v3; videos or pictures) to episodes, the form `--stage vla` reads.

    pip install pyarrow av
    python examples/lerobot_to_episodes.py DATASET OUT
    python examples/lerobot_to_episodes.py DATASET OUT --cameras top,wrist

LeRobot itself is not needed. DATASET is the folder that holds meta/info.json. It names the features; cameras
are those of type "video" or "image". Where the rows and the pictures of an episode lie:

                v2.0, v2.1                          v3
    rows        one file for each episode           a file holds many episodes, told apart by episode_index
    pictures    one video for each episode and      a video holds many episodes; each camera has its own files
                camera, or bytes in the rows        and its own start in them; or bytes in the rows

A video is decoded once. LeRobot's encoder may have dropped a frame with only a warning; then every later
picture of the file is late. So the frames of a file must be exactly those that its episodes need.
"""
import functools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, parse, printable  # noqa: E402
from examples.episodes import ConversionConfig, chosen, pick, reading, run  # noqa: E402

NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
           "bool")
# Columns of each row that say where it belongs.
PLACES = ("episode_index", "frame_index", "task_index", "timestamp")


class Episode(NamedTuple):
    """index, number of steps, instructions that its metadata name, its data file;
    videos: camera -> (file, first frame there, frame behind the last one)."""
    index: int
    length: int
    tasks: list
    data: Path
    videos: dict


class DataSet:
    """What meta/ says. Raises UserError where it is no data set that can be read."""

    def __init__(self, root):
        self.root = Path(root)
        path = self.root / "meta/info.json"
        if not path.is_file():
            raise UserError(f"{root} is no LeRobot data set: there is no meta/info.json")
        with reading(path):
            info = json.loads(path.read_text(encoding="utf-8"))
            self.version = info["codebase_version"]
            self.features, self.fps = dict(info["features"]), float(info["fps"])
            self.chunk = int(info.get("chunks_size") or 1000)
            if not re.fullmatch(r"v(2\.[01]|3\.\d+)", self.version):
                raise UserError(f"{path}: version {self.version!r} can't be read, only v2.0, v2.1 and v3. "
                                "LeRobot has a script that converts older ones")
            if not 0 < self.fps < 10 ** 4 or self.chunk < 1:
                raise UserError(f"{path}: fps is {self.fps:g}, chunks_size {self.chunk}")
            self.templates = {name: info.get(f"{name}_path") for name in ("data", "video")}
            self._sort_features()
        self.episodes = sorted(self._episodes_of_v3() if self.version[1] == "3" else self._episodes_of_v2(),
                               key=lambda episode: episode.index)
        self._check_totals(info, path)

    def _sort_features(self):
        """Which features are numbers, which are cameras, and which of these are videos. Others are left
        alone: LeRobot adds new kinds. Distances (depth) are stored as a video, too, but are no picture."""
        self.numbers, self.cameras, self.videos = [], [], []
        for key, about in self.features.items():
            kind, shape = about.get("dtype"), about.get("shape") or ()
            details = about.get("info") or about.get("video_info") or {}
            is_depth = details.get("video.is_depth_map") or details.get("is_depth_map")
            if kind in NUMBERS and len(shape) <= 1 and key not in (*PLACES, "index"):
                self.numbers.append(key)
            if kind in ("video", "image") and 3 in shape and not is_depth:
                self.cameras.append(key)
                self.videos += [key] * (kind == "video")

    def path(self, kind, **places):
        """A file, by the template of info.json. Raises UserError where it would lie outside of the folder."""
        template = self.templates[kind]
        bare = re.sub(r"\{\w+(:\d{1,2}d?)?\}", "", template)
        relative = Path(template.format(**places) if "{" not in bare and "}" not in bare else "..")
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{self.root}/meta/info.json: {kind}_path {template!r} names no file in it")
        return self.root / relative

    def _episodes_of_v3(self):
        import pyarrow.parquet as parquet
        files, episodes = sorted((self.root / "meta/episodes").rglob("*.parquet")), []
        for file in files:
            with reading(file):
                names = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
                for row in parquet.ParquetFile(file).read(names).to_pylist():
                    episodes.append(self._episode_of_v3(row))
        return episodes

    def _episode_of_v3(self, row):
        data = self.path("data", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        videos = {}
        for key in self.videos:
            of = {name: row[f"videos/{key}/{name}"]
                  for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
            file = self.path("video", video_key=key, chunk_index=of["chunk_index"],
                             file_index=of["file_index"])
            # Timestamps are sums of float seconds: 14.399999999999999 s at 10 fps is frame 144, not 143.
            videos[key] = file, round(of["from_timestamp"] * self.fps), round(of["to_timestamp"] * self.fps)
        index, length = int(row["episode_index"]), int(row["length"])
        if row.get("dataset_to_index", length) - row.get("dataset_from_index", 0) != length:
            raise UserError(f"{self.root}/meta/episodes: episode {index} has {length} steps, but its rows "
                            f"are {row['dataset_from_index']} to {row['dataset_to_index']}")
        return Episode(index, length, row.get("tasks") or [], data, videos)

    def _episodes_of_v2(self):
        file = self.root / "meta/episodes.jsonl"
        with reading(file):
            return [self._episode_of_v2(int(row["episode_index"]), int(row["length"]), row.get("tasks") or [])
                    for row in json_lines(file)]

    def _episode_of_v2(self, index, length, tasks):
        where = {"episode_chunk": index // self.chunk, "episode_index": index}
        videos = {key: (self.path("video", video_key=key, **where), 0, length) for key in self.videos}
        return Episode(index, length, tasks, self.path("data", **where), videos)

    @functools.cached_property
    def texts(self):
        """{task_index: instruction}. With --instruction nobody asks."""
        import pyarrow.parquet as parquet
        file = self.root / ("meta/tasks.parquet" if self.version[1] == "3" else "meta/tasks.jsonl")
        with reading(file):
            if file.suffix == ".jsonl":
                return {row["task_index"]: row["task"] for row in json_lines(file)}
            # LeRobot writes a pandas table whose index is the text: the other column, whatever its name.
            rows = parquet.ParquetFile(file).read().to_pylist()
            return {row.pop("task_index"): next(text for text in row.values() if isinstance(text, str))
                    for row in rows}

    def _check_totals(self, info, path):
        found = {"total_episodes": len(self.episodes), "total_frames": sum(e.length for e in self.episodes)}
        for name, number in found.items():
            if info.get(name, number) != number:
                raise UserError(f"{path}: {name} is {info[name]}, but the episodes in meta/ make {number}. "
                                "Is the data set whole?")
        if (len({e.index for e in self.episodes}) < len(self.episodes) or not self.episodes
                or min(min(e.index, e.length - 1) for e in self.episodes) < 0):
            raise UserError(f"{path.parent} names an episode twice, or one without steps, or none at all")


def json_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_columns(path, keys):
    """Columns of a data file, without its pictures -> {key: (N,) or (N, d)}."""
    import pyarrow.parquet as parquet
    with reading(path):
        file = parquet.ParquetFile(path)
        for key in keys:
            if key not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {key!r}")
        table = file.read(columns=list(keys))
        return {key: as_array(table.column(key), f"{path}, column {key!r}") for key in keys}


def as_array(column, place):
    """A column of numbers, or of lists of equally many numbers -> (N,) or (N, d)."""
    import pyarrow.compute as compute
    import pyarrow.types as types
    rows, shape = len(column), (-1,)
    if column.null_count:
        raise UserError(f"{place}: a value is missing")
    if not (types.is_primitive(column.type) or types.is_boolean(column.type)):
        lengths = set(compute.list_value_length(column).unique().to_pylist())
        if len(lengths) > 1:
            raise UserError(f"{place}: rows have different numbers of values, {sorted(lengths)}")
        column, shape = compute.list_flatten(column), (rows, *lengths)
        if column.null_count:
            raise UserError(f"{place}: a value is missing")
    return column.to_numpy().reshape(shape)


def joined(columns, keys, rows):
    """The named columns side by side, of some rows -> (T, sum of d), float64. None without names."""
    parts = [columns[key][rows].astype(np.float64).reshape(len(rows), -1) for key in keys]
    return np.concatenate(parts, axis=1) if parts else None


def rows_by_episode(data, cfg, path, episodes, columns):
    """-> for each episode of a data file, (episode, its rows in the order of their frames, its instruction).

    Rows are found by episode_index, never by position. Raises UserError where they are not those that the
    metadata promise: one for each frame, at its time, all with the same task.
    """
    index, frames = columns["episode_index"], columns["frame_index"]
    strangers = set(index.tolist()) - {e.index for e in episodes}
    if strangers:
        raise UserError(f"{path} holds rows of episode {min(strangers)}, which belongs elsewhere, "
                        "or nowhere, as meta/ says")
    order = np.lexsort((frames, index))
    for episode in episodes:
        start, end = np.searchsorted(index[order], [episode.index, episode.index + 1])
        rows = order[start:end]
        where = f"{path}, episode {episode.index}"
        if len(rows) != episode.length:
            raise UserError(f"{where}: meta/ says {episode.length} steps, but there are {len(rows)} rows")
        wrong = np.flatnonzero(frames[rows] != np.arange(len(rows)))
        if len(wrong):
            raise UserError(f"{where}: the row of frame {wrong[0]} is missing or another one is there twice")
        if "timestamp" in columns:
            times = columns["timestamp"][rows]
            late = np.flatnonzero(~(np.abs(times * data.fps - np.arange(len(rows))) < 0.5))
            if len(late):
                raise UserError(f"{where}: the row of frame {late[0]} is timed {times[late[0]]:g} s, at "
                                f"{data.fps:g} frames a second it should be {late[0] / data.fps:g}")
        text = cfg.instruction or instruction(data, episode, columns["task_index"][rows], where)
        yield episode, rows, text


def instruction(data, episode, tasks, where):
    """The text of the one task that all rows name."""
    changes = np.flatnonzero(tasks != tasks[0])
    for task in (tasks[0], *tasks[changes[:1]]):
        if task not in data.texts:
            raise UserError(f"{where}: task_index {task} has no text in meta/tasks")
    text = data.texts[tasks[0]]
    if len(changes):
        raise UserError(f"{where}: the task changes at frame {changes[0]}, from {text!r} to "
                        f"{data.texts[tasks[changes[0]]]!r}. One instruction is needed for a whole episode")
    if episode.tasks and text not in episode.tasks:
        raise UserError(f"{where}: its rows are of the task {text!r}, but meta/episodes says "
                        f"{printable(str(episode.tasks), 200)}")
    return text


def write_rows(data, cfg, writer, keys):
    """All data files, one after the other. keys: {"action": [...], "state": [...], "image": [...]}.
    Their pictures, where they hold some, are written as they are read: a few at a time."""
    files = defaultdict(list)
    for episode in data.episodes:
        files[episode.data].append(episode)
    for path, episodes in files.items():
        places = [key for key in PLACES if key != "timestamp" or key in data.features]
        columns = read_columns(path, dict.fromkeys([*places, *keys["action"], *keys["state"]]))
        columns |= {key: columns[key].ravel() for key in places}        # some store [3] instead of 3
        checked = list(rows_by_episode(data, cfg, path, episodes, columns))
        endings = write_stills(path, writer, keys["image"])
        for episode, rows, text in checked:
            names = [[writer.name(episode.index, camera, step, endings.get((episode.index, camera, step), ""))
                      for camera in writer.cameras] for step in range(episode.length)]
            writer.episode(f"{episode.index:06d}", text, names, joined(columns, keys["action"], rows),
                           joined(columns, keys["state"], rows), f"{path}, episode {episode.index}")


def write_stills(path, writer, cameras):
    """Pictures that lie in the rows, {"bytes", "path"}: the bytes are a file and stay as they are.
    -> {(episode, camera, step): ending of the file's name}"""
    import pyarrow.parquet as parquet
    endings = {}
    if not cameras:
        return endings
    with reading(path):
        for batch in parquet.ParquetFile(path).iter_batches(
                batch_size=16, columns=["episode_index", "frame_index", *cameras]):
            for row in batch.to_pylist():
                episode, step = (int(np.ravel(row[key])[0]) for key in ("episode_index", "frame_index"))
                for camera in cameras:
                    stored = row[camera] or {}
                    where = f"{path}, episode {episode}"
                    if not stored.get("bytes"):
                        raise UserError(f"{where}: there is no picture of {camera}, step {step}")
                    name = writer.encoded(episode, camera, step, stored["bytes"], where)
                    endings[episode, camera, step] = Path(name).suffix
    return endings


def video_files(data, cameras):
    """-> {(file, camera): its episodes as (first frame, episode), in order}.
    Raises UserError where their times and lengths do not fit."""
    files = defaultdict(list)
    for episode in data.episodes:
        for camera in cameras:
            file, start, end = episode.videos[camera]
            if end - start != episode.length:
                raise UserError(f"{file}: episode {episode.index} has {episode.length} steps, but its time "
                                f"in the video is {end - start} frames. The encoder dropped or doubled "
                                "pictures, so later ones are not where they should be")
            files[file, camera].append((start, episode))
    for (file, _), places in files.items():
        places.sort(key=lambda place: place[0])
        if places[0][0] < 0:
            raise UserError(f"{file}: episode {places[0][1].index} begins before the video does")
        for (start, one), (after, other) in zip(places, places[1:]):
            if start + one.length > after:
                raise UserError(f"{file}: frame {after} is used twice, by episodes {one.index} and "
                                f"{other.index}")
    return files


def write_video(file, camera, places, fps, writer):
    """Decodes a file once, in shown order, and writes each frame where it belongs.

    A frame's place is its time: round(pts * time_base * fps). It must also be its number in shown order, or a
    frame is missing or doubled. In front of an episode there may be frames of none, if one was removed from
    meta/ only. Behind the last episode there may not: a doubled frame has pushed the others back.
    """
    import av
    needed = places[-1][0] + places[-1][1].length
    waiting, count = iter(places), 0
    start, episode = next(waiting)
    with reading(file), av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for count, frame in enumerate(container.decode(stream), start=1):
            place = round(frame.pts * frame.time_base * fps)
            if place != count - 1 or frame.is_corrupt:
                raise UserError(f"{file}: at frame {min(place, count - 1)} a picture is missing, doubled or "
                                f"damaged (number {count - 1} in the file is shown as number {place})")
            if count > needed:
                break
            if place == start + episode.length:
                start, episode = next(waiting)
            if place >= start:
                writer.pixels(episode.index, camera, place - start, frame.to_image())
    if count != needed:
        found = f"more than {needed}" if count > needed else count
        raise UserError(f"{file} holds {found} pictures, but its episodes need {needed}. "
                        "So they are not where they should be")


def read(cfg):
    data = DataSet(cfg.dataset)
    cameras = pick(cfg.cameras, sorted(data.cameras), "camera") or sorted(data.cameras)
    if not cameras:
        raise UserError(f"{cfg.dataset} has no camera: no feature of type video or image with three colors")
    keys = {"action": chosen(cfg.action, [["action"]], data.numbers, "feature"),
            "state": chosen(cfg.state, [["observation.state"]], data.numbers, "feature"),
            "image": [camera for camera in cameras if camera not in data.videos]}
    if not keys["action"]:
        raise UserError(f"{cfg.dataset} has no feature 'action'. Name it with --action; "
                        f"there are: {', '.join(data.numbers) or 'none'}")
    used = {*cameras, *keys["action"], *keys["state"], *PLACES, "index"}
    unused = [printable(key, 80) for key in data.features if key not in used]
    if unused:
        print(f"not used {', '.join(unused)}")
    videos = video_files(data, [camera for camera in cameras if camera in data.videos])

    def write(writer):
        write_rows(data, cfg, writer, keys)
        for (file, camera), places in videos.items():
            write_video(file, camera, places, data.fps, writer)
    return cameras, sum(episode.length for episode in data.episodes), write


if __name__ == "__main__":
    run(parse(ConversionConfig, description=__doc__.split("\n\n")[0], positional=("dataset", "out")), read)
