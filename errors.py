"""What an error says to the user: one sentence, the last on the screen. ranks.run asks here when one is met.

What the user can mend is named, with what to do. Anything else is a bug; its traceback goes into a file.
"""
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from config import UserError, last_words, printable
from ranks import OtherRank

# What the system says of a disk or a network share that does not do what it should -> what to do.
DISK = {errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some space", errno.EFBIG: "Free some space",
        errno.EROFS: "Choose another --run_root", errno.EACCES: "Look at the permissions",
        errno.EPERM: "Look at the permissions", errno.EIO: "Try again later", errno.ESTALE: "Try again later",
        errno.ENOENT: "Look whether it was moved away", errno.ENOTDIR: "Look at the path",
        errno.EISDIR: "Look at the path", errno.EEXIST: "Look at the path", errno.ENAMETOOLONG: "Shorten it",
        errno.ELOOP: "Look at the links", errno.EINVAL: "Look at the path",
        errno.EMFILE: "Lower --num_workers"}


def explain(error):
    """-> the text for the user, and whether this error is an echo: another rank failed, and this one only
    noticed."""
    text = str(error)
    if isinstance(error, UserError):                        # before words are looked at: it may quote data
        return text, False
    if isinstance(error, OtherRank) or "closed by peer" in text or "reset by peer" in text:
        if not isinstance(error, ConnectionError):          # that is how a data worker's end is noticed
            return text, True
    if "DataLoader worker (pid" in text or isinstance(error, (ConnectionError, EOFError)):
        # EOFError: the worker died while it handed over a batch.
        return ("a process that reads data was killed from outside, most often because memory ran out "
                f"({(text or repr(error)).splitlines()[0]}). Lower --num_workers or --per_device_batch_size; "
                "the same command continues"), False
    if isinstance(error, torch.OutOfMemoryError) or isinstance(error, MemoryError):
        return (f"memory ran out ({printable(text, 300)}). Halve --per_device_batch_size, or use "
                "--gradient_checkpointing; the same command continues"), False
    if isinstance(error, OSError) and error.errno in DISK:
        return (f"a file can't be read or written ({printable(text)}). What was saved is intact. "
                f"{DISK[error.errno]}; then give the same command again"), False
    if isinstance(error, subprocess.CalledProcessError):
        return f"the command above ended with {error.returncode}; its own error stands there", False
    return (f"this is a bug of this program ({type(error).__name__}: {printable(text, 300)}). "
            f"{report(error)}"), False


def report(error):
    """Writes the traceback into a file -> the sentence that names it."""
    trace = "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(prefix="traceback-", suffix=".txt")
        said = f"{' '.join(sys.argv)}\ntorch {torch.__version__}\n{trace}"
        os.write(descriptor, said.encode("utf-8", "replace"))
        os.close(descriptor)
    except OSError:                                         # no file can be written: then the screen must do
        return trace
    return f"Please report it where you got this program from, together with {name}"


def end_with(error):
    """Shows the error -> the exit code. torchrun then ends the other ranks, and shows the error again.

    An error that all ranks have is shown once: rank zero ends first, and torchrun then ends the others. An
    echo waits longest. If it ended in the same second as the true error, torchrun might show the echo.
    """
    # When a data worker dies, DataLoader's handler of this signal raises wherever the program is, also here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if isinstance(error, SystemExit):                       # a wrong flag, which has been shown
        return error.code if isinstance(error.code, int) else 1
    rank, (text, echo) = int(os.environ.get("RANK", 0)), explain(error)
    time.sleep(5 if echo else min(rank, 1) * 2)
    if echo:                                                # the cause is another rank's to tell
        print(f"\nrank {rank} ends because another rank did; see there", file=sys.stderr, flush=True)
    else:
        last_words(f"error (rank {rank}): {text}" if "RANK" in os.environ else f"error: {text}")
    return 1


def holds_scores(path):
    """Is a JSON file one that evaluate.py or toy/robot.py has written? It may be the user's own data."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint({"accuracy", "l1", "unseen layouts"})


def check_writable(path, sources=()):
    """A JSON file that will be written after long work is tried out before it. Raises UserError, also if
    it is one of the `sources`, or no scores at all: nobody wants to lose weights to a slip of the hand."""
    if path.suffix != ".json":
        raise UserError(f"--out {path}: give a name that ends with .json")
    if any(path.resolve() == Path(source).resolve() for source in sources):
        raise UserError(f"--out {path} is also what is read. Choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OSError("it is a link, or no file")
        if path.exists() and not holds_scores(path):
            raise OSError("it exists and holds no scores")
        path.with_name(f".{path.name}.tried").touch()
        path.with_name(f".{path.name}.tried").unlink()
    except OSError as e:
        raise UserError(f"{path} can't be written ({e}). Choose another name with --out") from e
