"""Files of examples -> a dataset, exact lengths, and batches.

A file is a JSON list of examples, or one example per line; what an example looks like stands in prompts.py.
`Conversations` turns it into tensors one example at a time, `collate` turns examples into a batch:

    DataLoader(Conversations(...), batch_sampler=SplitModalitySampler(...), collate_fn=collate)
"""
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import BadExample, UserError, printable
from prompts import IGNORE, assemble, find_places, images_of, to_pieces, tokenize


class Conversations(torch.utils.data.Dataset):
    """Map-style dataset over one file.

    language:   how a conversation becomes ids.
    pictures:   how a picture becomes tensors.
    max_length: longer examples are cut at the end [positions].
    skip_bad:   a bad example is replaced by the next good one of its modality.

    `data[i]` is {input_ids (T,), labels (T,), images, id, source, replaced}, or a BadExample. It returns the
    error instead of raising it: raised inside a DataLoader worker, it would arrive wrapped in that worker's
    traceback. The loop raises it. `data.question(i)` is the same without the reply, to be answered.

    Other kinds of files are read by subclasses: they say how many examples a JSON object holds
    (`examples_in`), what example i says (`row`), and which ids stand in place of its reply (`reply`).
    """

    def __init__(self, path, language, pictures, max_length, skip_bad=False):
        import lengths
        import places
        self.path, self.language, self.pictures = Path(path), language, pictures
        self.max_length, self.skip_bad, self.last = max_length, skip_bad, (None, None)
        if not self.path.is_file():                         # opening a named pipe would wait for ever
            raise UserError(f"{path} does not exist, or is no file. It should be a LLaVA JSON or "
                            "JSON-lines file")
        self.state = self.path.stat().st_size, self.path.stat().st_mtime_ns
        # What it is called where several files are told apart: most training files are named train.json.
        self.name = self.path.parent.name if self.path.stem == "train" else self.path.stem
        self.store = lengths.Store(self)
        self.cache = self.store.load()                      # (n, 5) places, length (0 = bad), has picture
        # (n, 3) where the JSON object begins and ends [bytes], which of the object's examples it is
        self.places = (places.find_examples(path, self.examples_in) if self.cache is None
                       else self.cache[:, :3])

    @staticmethod
    def examples_in(row):
        """How many examples a JSON object holds. Raises BadExample."""
        if "steps" in row:
            raise BadExample("this is an episode; episodes are for --stage vla")
        return 1

    def row(self, i):
        """Example i as a conversation."""
        return self.stored(i)[0]

    def reply(self, row):
        """Ids that stand in place of the last reply's text: none here."""
        return ()

    def __len__(self):
        return len(self.places)

    def stored(self, i):
        """-> the JSON object that example i lies in, and which of the object's examples it is."""
        start, end, k = self.places[i].tolist()
        return self._parse(start, end), k

    def objects(self):
        """Each JSON object of the file once, in order."""
        for start, end in np.unique(self.places[:, :2], axis=0).tolist():
            yield self._parse(start, end)

    def _parse(self, start, end):
        """Reads one object from the file, or gives the last one again: an episode is asked for step by step.

        A list of all objects, kept in memory, would be copied into every worker page by page, because Python
        writes a reference count into each object it looks at. And a mapped file would kill the process with
        SIGBUS, without a word, if somebody cut it.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                text = b"" if self.last[0] == (start, end) else file.read(end - start)
                now = os.fstat(file.fileno())
        except OSError as e:
            raise BadExample(f"{self.path} can't be read now ({e}). The same command continues") from e
        if (now.st_size, now.st_mtime_ns) != self.state:
            raise BadExample(f"{self.path} was changed since the start. The same command reads it anew")
        if text:
            self.last = (start, end), json.loads(text)
        return self.last[1]

    def named(self, i, error):
        """The error with its place."""
        row = self.row(i)
        return BadExample(f"{self.path}[{i}] id={printable(repr(row.get('id')), 400)}: {error}. "
                          f"It begins {self.beginning(row)!r}")

    @staticmethod
    def beginning(row):
        turns = row.get("conversations")
        first = turns[0] if isinstance(turns, list) and turns else row
        return str(first.get("value") if isinstance(first, dict) else first)[:40]

    def tokens(self, row, ask=False):
        """A row -> input_ids (T,), labels (T,), as lists. ask: without the reply."""
        return tokenize(row, self.language, self.pictures.patches, self.max_length, ask,
                        () if ask else self.reply(row))

    def question(self, i):
        return self._read(i, ask=True)

    def __getitem__(self, i):
        example = self._read(i)
        if self.skip_bad and isinstance(example, BadExample):
            for j in self._next_good(i):
                other = self._read(j)
                if not isinstance(other, BadExample):
                    return other | {"replaced": 1}
        return example

    def _read(self, i, ask=False):
        try:
            row = self.row(i)
        except BadExample as e:                             # of the whole file
            return e
        try:
            input_ids, labels = self.tokens(row, ask)
            images = self.pictures.tensors(images_of(row), i)
        except BadExample as e:
            return self.named(i, e)
        return {"id": str(row.get("id", i)), "source": self.name, "images": images, "replaced": 0,
                "input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}

    def _next_good(self, i):
        """Indices of the examples behind i that can be tokenised and have i's modality,
        around the end of the file."""
        _, has_image = self.lengths()
        good = np.flatnonzero((self.cache[:, 3] > 0) & (has_image == has_image[i]))
        return [int(j) for j in np.roll(good, -np.searchsorted(good, i + 1)) if j != i]

    def lengths(self):
        """-> lengths (n,) in positions, has_image (n,). Exact: every text is tokenised.

        They are kept in a file beside the data (lengths.py). Raises BadExample for the first example that
        can't be trained on; with skip_bad it gets the values of the next good one.
        """
        if self.cache is None:
            self.cache = self.store.load()                  # by now another rank may have counted
        if self.cache is None:
            self.cache = np.column_stack([self.places, self._count()])
            self.store.save(self.cache)
        lengths, has_image = self.cache[:, 3].copy(), self.cache[:, 4].astype(bool)
        good = np.flatnonzero(lengths)
        if len(good) < len(lengths):
            first = int(np.flatnonzero(lengths == 0)[0])
            if not self.skip_bad or len(good) == 0:
                raise self._read(first)
            next_good = good[np.searchsorted(good, np.arange(len(lengths))) % len(good)]
            lengths, has_image = lengths[next_good], has_image[next_good]
        return lengths, has_image

    def _count(self):
        """-> (n, 2) length and has picture, length 0 where the example is bad.

        In chunks: the tokenizer is fast when it gets many texts at once.
        """
        rows, done = self.store.load_counting() or (None, 0)
        counted, chunk = np.zeros((len(self), 2), np.int64) if rows is None else rows[:, 3:].copy(), 1000
        for start in tqdm(range(done, len(self), chunk), desc="counting tokens", unit_scale=chunk,
                          disable=len(self) < 10000):
            self.store.save_counting(self.places, counted, start)
            indices, pieces = range(start, min(start + chunk, len(self))), []
            for i in indices:
                try:
                    row = self.row(i)
                    pieces.append(to_pieces(row, self.language, reply=self.reply(row)))
                except BadExample as e:
                    pieces.append(self._bad(i, e))
            ids = iter(self.language.piece_ids([piece for row in pieces for piece in row]))
            for i, row in zip(indices, pieces):
                texts = [next(ids) for piece in row if piece.text]
                try:
                    counted[i] = (self._length(row, texts) if row else 0,
                                  any(piece.is_picture for piece in row))
                except BadExample as e:
                    self._bad(i, e)
        return counted

    def _bad(self, i, error):
        """Without skip_bad the first bad example ends the count:
        nobody wants to wait for the rest of 665,000."""
        if not self.skip_bad:
            raise self.named(i, error) from None
        return []

    def _length(self, pieces, texts):
        return len(assemble(pieces, texts, self.language.bos, self.pictures.patches, self.max_length)[0])


def collate(examples):
    """Examples -> one batch, padded on the right. A BadExample among them is returned in place of the batch.

    input_ids (B, T), labels (B, T), attention_mask (B, T) bool, pixel_values: one (N, C, H, W) per backbone,
    N pictures in the order of the examples (no tensor at all for text only), ids and sources (the files'
    names): list of str, replaced: how many (see skip_bad). places: where patches stand, (N P,), and where the
    next token is supervised, (S,): sought here, as on a GPU the CPU would wait to learn how many there are.

    The mask is True where a position is not padding. In training it is used for counting only: VLM.forward
    says why the model needs none. In generation the padding stands on the left, so there it needs one.
    """
    for example in examples:
        if isinstance(example, BadExample):
            return example
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    images = [image for example in examples for image in example["images"]]
    input_ids = pad([example["input_ids"] for example in examples], batch_first=True)
    labels = pad([example["labels"] for example in examples], batch_first=True, padding_value=IGNORE)
    return {"ids": [example["id"] for example in examples],
            "replaced": sum(example["replaced"] for example in examples),
            "sources": [example["source"] for example in examples],
            "input_ids": input_ids, "labels": labels, "places": find_places(input_ids, labels),
            # From the lengths. `input_ids != pad` would also hide every end token where the two share an id.
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "pixel_values": [torch.stack(views) for views in zip(*images)]}
