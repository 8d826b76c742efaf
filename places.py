"""Where each example stands in a file of them. The file is read once, from front to end, in blocks.

A file of ten million examples has ten gigabytes, and its examples as Python objects far more. Only one block
of it and three numbers for each example are in memory.
"""
import codecs
import json
import os
import re
from array import array

import numpy as np
from tqdm import tqdm

from config import BadExample, UserError

SPACE = re.compile(r"[ \t\r\n]*")
BLOCK = 2 ** 24                                             # bytes read at once; three at least
LONGEST = 2 ** 26                                           # bytes that one example may take


class Window:
    """A part of the file that moves on through it.

    text: one character for each byte. JSON's own signs are ASCII, so a place in it is a place in the file.
    """

    def __init__(self, path):
        self.path, self.file = path, open(path, "rb")
        self.text, self.start, self.lines, self.ended = "", 0, 1, False     # lines: that of text[0]
        self.decode = json.JSONDecoder().raw_decode
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.bar = tqdm(total=os.path.getsize(path), desc=f"reading {path}", unit="B", unit_scale=True,
                        delay=5, disable=None)

    def wrong(self, at, what):
        return UserError(f"{self.path}, line {self.lines + self.text.count(chr(10), 0, at)}: {what}. "
                         "Expected a JSON list of examples, or one example per line")

    def more(self, at):
        """Reads on -> the place where text[at] is now. What stands before it is forgotten."""
        self.start, self.lines = self.start + at, self.lines + self.text.count("\n", 0, at)
        # As much again as is there: an example that is longer than a block is not decoded too often.
        raw = self.file.read(max(BLOCK, len(self.text) - at))
        self.text, self.ended = self.text[at:] + raw.decode("latin-1"), not raw
        self.bar.update(len(raw))
        begun, _ = self.utf8.getstate()                     # the first bytes of a character that was cut
        try:
            self.utf8.decode(raw, final=self.ended)
        except UnicodeDecodeError as e:
            raise self.wrong(len(self.text) - len(raw) - len(begun) + e.start,
                             "this is no UTF-8 text") from e
        return 0

    def next_sign(self, at):
        """-> the place of the next character that is no space, or of the end of the file."""
        while (at := SPACE.match(self.text, at).end()) == len(self.text) and not self.ended:
            at = self.more(at)
        return at

    def value(self, at):
        """The JSON value that begins at text[at] -> it, where it begins now, and where it ends."""
        while True:
            try:
                return *self.decode(self.text, at), at
            except (ValueError, RecursionError) as e:
                if self.ended or len(self.text) - at > LONGEST:
                    # A number of 5000 digits, brackets without end: no position.
                    raise self.wrong(getattr(e, "pos", at), f"this is no JSON ({getattr(e, 'msg', e)})"
                                     + f", or of more than {LONGEST:,} bytes" * (not self.ended)) from e
                at = self.more(at)


def find_examples(path, count):
    """LLaVA JSON (a list) or JSON lines -> (n, 3). For each example: where its JSON object begins in the
    file, where it ends (bytes, the end not included), and the example's number inside that object.

    count: tells how many examples an object holds. Raises UserError with the file and the line.
    """
    window, places = Window(path), array("q")               # 8 bytes a number; a Python integer takes 32
    at = window.next_sign(0)
    if window.text.startswith("\xef\xbb\xbf", at):          # a byte order mark
        at = window.next_sign(at + 3)
    is_list = window.text.startswith("[", at)
    at = window.next_sign(at + is_list)
    while at < len(window.text) and not (is_list and window.text[at] == "]"):
        row, end, at = window.value(at)
        if not isinstance(row, dict):
            raise window.wrong(at, f"example {len(places) // 3} must be an object with 'conversations', "
                                   f"found {str(row)[:60]!r}")
        try:
            for k in range(count(row)):
                places.extend((window.start + at, window.start + end, k))
        except BadExample as e:
            raise window.wrong(at, str(e)) from None
        at = window.next_sign(end)
        if is_list and window.text[at:at + 1] not in (",", "]"):
            raise window.wrong(at, "a comma or the end of the list is missing behind example "
                                   f"{len(places) // 3 - 1}")
        if is_list and window.text[at] == ",":
            at = window.next_sign(at + 1)
    if is_list and at == len(window.text):
        raise window.wrong(at, "the list does not end; the file was cut off")
    if is_list and (at := window.next_sign(at + 1)) < len(window.text):
        raise window.wrong(at, "there is more behind the end of the list")
    window.bar.close()
    window.file.close()
    if not places:
        raise UserError(f"{path} holds no example")
    return np.frombuffer(places, np.int64).reshape(-1, 3)
