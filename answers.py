"""Answers on disk as they come: an evaluation that was killed goes on where it was.

Each rank has a file of its own beside the scores, NAME.unfinished*.jsonl. Its first line says what decides
about the answers: weights, examples, flags. Then each answer is a line. A later start takes over the answers
from files that begin with the same line, whatever the number of ranks or the batch size; other files stay.
"""
import fcntl
import glob
import hashlib
import json
from pathlib import Path

import torch.distributed as dist

import ranks
from checkpoint import unused_name
from config import UserError


def fingerprint(step_folder):
    """Of a checkpoint: its place and its state, in which the checksums of its weights stand."""
    state = json.loads((Path(step_folder) / "state.json").read_text())
    state.pop("forever", None)                              # may be added later: another run stands on it
    return [str(Path(step_folder).resolve()), hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]]


class Answers:
    """known: {index of an example: its answer}, from earlier starts, the same on every rank.

    All ranks must make one together. asked: a dictionary. Raises UserError where another process is at it.
    """

    def __init__(self, out, asked):
        self.out, self.asked, rank = out, json.loads(json.dumps(asked)), dist.get_rank()
        self.earlier, self.known = ranks.tell(self._read() if rank == 0 else None)
        self.path = unused_name(out.with_name(f"{out.stem}.unfinished{rank or ''}.jsonl"))
        self.file = open(self.path, "x")
        self.write({"asked": self.asked})
        try:                                                # until this process ends
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:                                     # a file system without locks
            pass
        if self.known and rank == 0:
            print(f"{len(self.known)} answers are there from before")

    def _read(self):
        """-> files of earlier starts, what they know."""
        files, known = [], {}
        for path in sorted(self.out.parent.glob(f"{glob.escape(self.out.stem)}.unfinished*.jsonl*")):
            if path.is_symlink() or not path.is_file():
                continue
            with open(path, "r+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{path} is being written by another evaluation. Wait for it, end it, or "
                                    "choose another --out") from None
                except OSError:                             # a file system without locks
                    pass
                found = lines_of(file)
            if found[:1] != [{"asked": self.asked}]:
                print(f"{path} is of other weights, examples or flags, and is left as it is")
                continue
            files.append(str(path))
            known |= {row["index"]: row["answer"] for row in found[1:]}
        return files, known

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def keep(self):
        """For another start. A file without an answer would say nothing to it."""
        self.file.close()
        if self.path.read_text().count("\n") == 1:
            self.path.unlink()

    def remove(self):
        """When the scores are written, these files have done their duty."""
        self.file.close()
        for path in [self.path, *(self.earlier if dist.get_rank() == 0 else [])]:
            Path(path).unlink(missing_ok=True)


def lines_of(file):
    """The lines that are whole. Of a killed process, the last one may not be."""
    rows = []
    for line in file:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or (rows and not (
                isinstance(row.get("index"), int) and isinstance(row.get("answer"), str))):
            break
        rows.append(row)
    return rows
