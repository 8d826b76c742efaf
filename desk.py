"""One model that many ask at once: a queue in front of it, answered in batches.

Threads `ask`, and then wait for `news` of their job. One thread of the desk's own has the model: what waits
when it is free becomes one batch. Answers are greedy, so neighbors in a batch do not change them, up to float
rounding. Each row of a batch has its own limit, is told as it grows, and ends when nobody waits for it.
"""
import queue
import sys
import tempfile
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from actions import first_file, image_dir_of
from config import BadExample, UserError
from generate import Assistant
from images import read_image
from prompts import TAG, images_of, turns_of

EXAMPLES = 12                                               # of the run's data, that are offered
PIXELS = 50_000_000                                         # of a question's pictures


@dataclass(eq=False)
class Job:
    example: dict
    limit: int                              # most new ids
    key: str | None                         # the dataset whose units an action is in; None = words
    streams: bool                           # the thread wants to see the answer grow
    news: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)      # the ids so far; None = the end
    answer: object = None                   # ids, actions (K, A), or an exception
    gone: bool = False                      # nobody waits any more


class Desk:
    def __init__(self, ckpt, batch_size, max_new_tokens):
        self.assistant, self.batch_size = Assistant(ckpt), batch_size
        policy, llm = self.assistant.policy, self.assistant.model.llm
        self.max_new_tokens = policy.length if policy else max_new_tokens
        known = getattr(llm.config, "max_position_embeddings", None) or 10 ** 9
        self.longest = known - self.max_new_tokens          # so no neighbor in a batch can cut an answer
        if self.longest < 1:
            raise UserError(f"--max_new_tokens {max_new_tokens}: the language model knows {known} positions, "
                            "and a question needs some of them")
        self.jobs, self.changed, self.reading = [], threading.Condition(), threading.Lock()
        self.answered = self.batches = 0
        Image.MAX_IMAGE_PIXELS = PIXELS // 2                # Pillow refuses what is twice as large
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, question, pictures, earlier=(), limit=10 ** 9, key=None, streams=False, state=None):
        """Puts a question into the queue -> its Job. pictures: the bytes of files, or open ones (PIL, RGB).
        earlier: the turns before it. key, state: of a robot. Raises UserError where it can't be answered."""
        # One at a time: tokenizers are not made for several threads, and open pictures take much memory.
        with self.reading:
            opened, pixels = [], 0
            for number, sent in enumerate(pictures, start=1):
                opened.append(open_picture(number, sent))
                pixels += opened[-1].width * opened[-1].height
                if pixels > PIXELS:
                    raise BadExample(f"the pictures have more than {PIXELS:,} pixels. Make them smaller")
            example = self.assistant.example(question, opened, earlier, state, key or "")
        if len(example["input_ids"]) > self.longest:
            raise BadExample(f"the question takes {len(example['input_ids'])} positions; beside "
                             f"--max_new_tokens {self.max_new_tokens} there is room for {self.longest}. "
                             "Shorten it")
        job = Job(example, min(limit, self.max_new_tokens), key, streams)
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()
        return job

    def news(self, job, hung_up):
        """Waits for a job, and yields the ids so far of one that streams. Then its answer is there. hung_up()
        tells whether nobody listens any more."""
        try:
            while True:
                try:
                    ids = job.news.get(timeout=0.2)
                except queue.Empty:
                    if hung_up():
                        raise ConnectionAbortedError from None
                    continue
                if ids is None:
                    break
                yield ids
        finally:
            job.gone = True
        if isinstance(job.answer, Exception):
            raise job.answer

    def _take(self):
        """Waits for a job -> it, and those behind it that can be answered with it."""
        with self.changed:
            while not (jobs := [job for job in self.jobs if not job.gone]):
                self.changed.wait()
            batch = [job for job in jobs if job.key == jobs[0].key][:self.batch_size]
            self.jobs, self.batches = [job for job in jobs if job not in batch], self.batches + 1
            return batch

    def _work(self):
        while True:
            batch = self._take()
            for jobs in (batch, *([job] for job in batch)):         # what fails in a batch is tried alone
                jobs = [job for job in jobs if job.answer is None and not job.gone]
                try:
                    if jobs:
                        self._answer(jobs)
                except Exception as error:                  # one job's; the others are to be answered
                    if len(jobs) == 1:
                        self._finish(jobs[0], error)
                    else:
                        print(f"{len(jobs)} requests failed as a batch ({type(error).__name__}), each is now "
                              "tried alone; if memory ran out, lower --batch_size", file=sys.stderr)

    def _answer(self, jobs):
        def after_each_token(ids, _):                                                       # (B, new)
            """What transformers calls a stopping criterion -> which rows have ended (B,) bool."""
            for job, row in zip(jobs, ids.tolist()):
                if job.answer is not None or job.gone:
                    continue
                if row[-1] == end or len(row) == job.limit:
                    self._finish(job, row)                  # now: its neighbors may go on for long
                elif job.streams:
                    job.news.put(row)
            return torch.tensor([job.answer is not None or job.gone for job in jobs], device=ids.device)

        examples, end = [job.example for job in jobs], self.assistant.language.end_id
        if self.assistant.policy:
            for job, actions in zip(jobs, self.assistant.act_on(examples, jobs[0].key)):
                self._finish(job, actions)
        else:
            with torch.inference_mode():
                rows = self.assistant.answer_ids(examples, max(job.limit for job in jobs),
                                                 stopping_criteria=[after_each_token])
            for job, row in zip(jobs, rows):                # should anything else have ended it
                if job.answer is None and not job.gone:
                    self._finish(job, row)

    def _finish(self, job, answer):
        job.answer, self.answered = answer, self.answered + 1
        job.news.put(None)


def open_picture(number, sent):
    """The bytes of a picture file -> PIL, RGB, by the reader that training has, which takes a path."""
    if isinstance(sent, Image.Image):
        return sent
    with tempfile.NamedTemporaryFile() as file:
        file.write(sent)
        file.flush()
        try:
            return read_image(file.name)
        except BadExample as e:
            why = str(e.__cause__).replace(f" {file.name!r}", "")
            why = f"{type(e.__cause__).__name__}: {why}"
            raise BadExample(f"picture {number} can't be read ({why})") from None


# -- what is known of the model ------------------------------------------------------------------------------

def about(assistant, folder):
    """A step folder -> what the page tells of it, and pictures: {path that the page asks for: bytes}."""
    run, cfg, policy, pictures, offered = folder.parent, assistant.cfg, assistant.policy, {}, []
    for question, files in examples(assistant):
        paths = [f"/pictures/{len(pictures) + i}" for i in range(len(files))]
        pictures |= zip(paths, files)
        offered.append({"question": question, "pictures": paths})
    curves = run / "curves.png"                             # by metrics.py, if it was asked
    if curves.is_file() and curves.read_bytes().startswith(b"\x89PNG"):
        pictures["/curves.png"] = curves.read_bytes()
    weights = sum(parameter.numel() for parameter in assistant.model.parameters())
    return {"model": run.name, "captions": assistant.language.captions, "examples": offered,
            "curves": "/curves.png" in pictures, "state": bool(policy and policy.state),
            "units": {key: of["action"] for key, of in policy.statistics.items()} if policy else None,
            "facts": {"stage": cfg.stage, "step": int(folder.name[5:]), "vision": cfg.vision_backbone,
                      "projector": cfg.projector, "language model": cfg.llm_backbone,
                      "weights": f"{weights / 1e6:,.1f} million", "trained on": cfg.train_json}}, pictures


def examples(assistant):
    """Some of the run's held-out file, or else of its first one: question, bytes of its pictures. A policy's
    page asks for actions, so there conversations are no examples."""
    cfg = assistant.cfg
    try:
        files = [file for file in (cfg.val_json, *cfg.train_json.split(",")) if file]
        file = first_file(files, assistant.policy)
        data = assistant.dataset(file, image_dir_of(cfg, file))
        spread = np.unique(np.linspace(0, len(data) - 1, 20 * EXAMPLES).astype(int)).tolist()
        shown = [i for i in spread if images_of(data.row(i))]
        for i in shown[::max(1, len(shown) // EXAMPLES)][:EXAMPLES]:
            row = data.row(i)
            paths = [data.pictures.path(name) for name in images_of(row)]
            if all(map(read_image, paths)):                 # what is no picture is not given away
                question = turns_of(row)[0]["value"].replace(TAG + "\n", "")
                yield data.stored(i)[0].get("instruction", question), [path.read_bytes() for path in paths]
    except (UserError, OSError) as e:
        print(f"no more examples can be offered: {e}", file=sys.stderr)
