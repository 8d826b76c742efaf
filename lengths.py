"""Exact lengths, kept in a file beside the data: 665,000 examples are tokenised once, not at each start.

The file's name holds a hash of everything that the lengths depend on, so an old one is never taken for a new
one. What is counted so far is kept, too, once a minute: a start that is killed does not begin again.
"""
import contextlib
import hashlib
import os
import time
import zlib

import numpy as np

KEEP_EVERY = 60                                             # seconds between two savings of what is counted
VERSION = 5                                                 # raise it when examples become other ids


class Store:
    """The lengths of one dataset: rows (n, 5), as Conversations.cache has them."""

    def __init__(self, data):
        with open(data.path, "rb") as file:
            h = hashlib.file_digest(file, "sha256")
        language, tokenizer = data.language, data.language.tokenizer
        rules = (tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast
                 else repr(sorted(tokenizer.get_vocab().items())))
        h.update(repr((rules, language.prompt, language.bos, language.captions, language.place,
                       data.pictures.patches, data.max_length, tokenizer.eos_token, language.rows,
                       type(data).__name__, VERSION)).encode())
        if getattr(data, "policy", None):                   # episodes
            h.update(repr(data.policy.form).encode() * bool(data.policy.form))
        self.path = data.path
        self.file = data.path.with_name(f".{data.path.name}.{h.hexdigest()[:16]}.lengths.npy")
        self.unfinished = self.file.with_suffix(".counting.npy")
        self.saved = time.monotonic()

    def load(self):
        """-> rows, or None if they were not counted yet."""
        rows, _ = read(self.file) or (None, 0)
        return rows

    def save(self, rows):
        self.write(self.file, rows, len(rows))
        with contextlib.suppress(OSError):                  # none is in a folder one may not write into
            self.unfinished.unlink()

    def load_counting(self):
        """-> rows, how many of them are counted; None if no start was killed while it counted."""
        return read(self.unfinished)

    def save_counting(self, places, counted, done):
        if time.monotonic() > self.saved + KEEP_EVERY:
            self.write(self.unfinished, np.column_stack([places, counted]), done)
            self.saved = time.monotonic()

    def write(self, file, rows, done):
        unfinished = file.with_suffix(f".unfinished{os.getpid()}.npy")
        try:
            np.save(unfinished, np.vstack([rows, [[done, 0, 0, 0, zlib.crc32(rows)]]]))
            unfinished.replace(file)
        except OSError as e:                                # a folder one may not write into
            print(f"the token counts can't be kept beside {self.path} ({e.strerror}); "
                  "the next start counts again")


def read(file):
    """-> rows, how many of them are counted; None if the file is not there, or not whole."""
    try:
        # One array, so forked workers share its memory. The last row holds the count and a checksum.
        rows = np.load(file, allow_pickle=False) if file.is_file() else None
        if rows.shape[1:] == (5,) and rows.dtype == np.int64 and zlib.crc32(rows[:-1]) == rows[-1, 4]:
            return rows[:-1], int(rows[-1, 0])
    except Exception:                                       # of the many kinds that numpy raises
        pass
    return None
