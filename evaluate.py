"""Score a trained model's greedy answers, and draw some of them.

    python evaluate.py --ckpt runs/toy-finetune-x7 --json data/toy/test.json --image_dir data/toy/images
    torchrun --nproc_per_node 8 evaluate.py ...             # each GPU answers every eighth example

The last reply of each conversation is the expected answer, or the list "answers" of the example is; earlier
turns are given. --metric says how an answer is compared (scores.py). An example's "type" (or "category", as
others call it), if it has one, makes a row of the table. Killed, the same command continues (answers.py).

A policy (stage vla) is scored on recorded episodes: how far its actions are from the recorded ones. How often
it does its task is found out by its world: `python toy/robot.py --ckpt runs/toy-vla-x7 --rollouts 100`.
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from config import BadExample, UserError, check_limits, knob, parse, printable, read_config


@dataclass(frozen=True)
class EvaluateConfig:
    ckpt: str = knob("", "run folder or step folder")
    json: str = knob("", "examples with answers: LLaVA JSON or JSON lines")
    image_dir: str = knob("", "where the pictures' paths start: a folder, an uncompressed .zip or .tar")
    out: str = knob(
        "", "where the scores go; empty = scores.json in the run folder. A picture of the same name is drawn "
        "beside it")
    metric: Literal["exact", "vqa", "anls", "relaxed", "choice"] = knob(
        "exact", "the same but for case and a final dot; VQA v2's ten people; DocVQA's ANLS; ChartQA's 5 %; "
        "multiple choice, by letter or text")
    batch_size: int = knob(50, "examples answered at once, on each GPU")
    num_workers: int = knob(2, "processes that read examples, per GPU; 0 = none")
    max_new_tokens: int = knob(64, "longest answer", "tokens")
    max_examples: int = knob(0, "score only the first so many; 0 = all")
    unnorm_key: str = knob(
        "", "vla: the dataset whose units the actions are in; needed if the policy knows several and none is "
        "called as the file or its folder")
    blank_images: bool = knob(False, "replace every picture by a black one: does the model look at all?")
    shuffle_images: bool = knob(
        False, "ask each question about the pictures of another: does the answer depend on this picture?")

    def __post_init__(self):
        if not self.ckpt:
            raise UserError("--ckpt RUN is missing")
        if not self.json:
            raise UserError("--json FILE is missing")
        if self.blank_images and self.shuffle_images:
            raise UserError("--blank_images and --shuffle_images exclude each other")
        check_limits(self, {"batch_size": (1, 10 ** 5), "max_new_tokens": (1, 10 ** 5),
                            "max_examples": (0, 10 ** 9), "num_workers": (0, 1000)})


if __name__ == "__main__":
    cfg = parse(EvaluateConfig, description="Score a trained model's greedy answers.")

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import ranks
import scores
import sheets
from answers import Answers, fingerprint
from checkpoint import find, together, write_text
from data import Conversations
from errors import check_writable
from generate import Assistant
from images import read_image
from prompts import images_of


def blank(example, transforms):
    """The example with black pictures: each transform's own view of black."""
    black = Image.new("RGB", (64, 64))
    return example | {"images": [[transform.resized(black) for transform in transforms]
                                 for _ in example["images"]]}


class Questions(Dataset):
    """(i, what `ask(i)` gives) for each of the indices."""

    def __init__(self, ask, indices):
        self.ask, self.indices = ask, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        return self.indices[place], self.ask(self.indices[place])


def batches(ask, indices, assistant, cfg, unread):
    """This rank's share of the examples, in batches of (i, example). Workers read them while the GPU answers.
    An example that can't be read goes to the list `unread`."""
    mine = Questions(ask, indices[dist.get_rank()::dist.get_world_size()])
    loader = DataLoader(mine, cfg.batch_size, num_workers=cfg.num_workers, collate_fn=list,
                        worker_init_fn=ranks.ignore_signals)
    for batch in tqdm(loader, desc="scoring", disable=True if dist.get_rank() else None):
        unread += [example for _, example in batch if isinstance(example, BadExample)]
        batch = [(i, example) for i, example in batch if not isinstance(example, BadExample)]
        if cfg.blank_images:
            batch = [(i, blank(example, assistant.transforms)) for i, example in batch]
        if batch:
            yield batch


def of_all_ranks(found):
    """A list of each rank -> one list of all."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, found, group=ranks.cpu_group)
    return [each for found in lists for each in found]


def score(assistant, data, cfg, answers):
    """-> one dict per example: index, type, question, expected, answer, score, right (at least a half); and
    what could not be scored.

    answers: each is written there as it comes, and those of an earlier start are taken from there. An example
    that can't be read is left out, and named at the end.
    """
    indices = indices_of(assistant, data, cfg)
    shown = other_pictures(data, indices) if cfg.shuffle_images else {}
    unread, given = [], {}
    for i in indices[dist.get_rank()::dist.get_world_size()]:
        if i in answers.known:
            try:                                            # perhaps it was answered for another metric
                scores.score(cfg.metric, "", data.row(i))
                given[i] = answers.known[i]
            except BadExample as e:
                unread.append(data.named(i, e))
    ask = partial(question, data, cfg.metric, shown)
    for batch in batches(ask, [i for i in indices if i not in answers.known], assistant, cfg, unread):
        for (i, _), answer in zip(batch, assistant.answer([each for _, each in batch], cfg.max_new_tokens)):
            given[i] = answer
            answers.write(result(data, cfg.metric, shown, i, answer))
    results = of_all_ranks([result(data, cfg.metric, shown, i, answer) for i, answer in given.items()])
    return sorted(results, key=lambda each: each["index"]), of_all_ranks(unread)


def indices_of(assistant, data, cfg):
    """-> the indices of the examples that are to be answered."""
    indices = list(range(min(len(data), cfg.max_examples or len(data))))
    if not assistant.language.captions:
        return indices
    kept = [i for i in indices if len(pictures_of(data, i)) == 1]
    if len(kept) < len(indices) and dist.get_rank() == 0:
        print(f"left out {len(indices) - len(kept)} examples without exactly one picture: "
              "an align run only captions")
    return kept


def pictures_of(data, i):
    """The names of example i's pictures; none where they are none, which is named when it is asked."""
    try:
        return images_of(data.row(i))
    except BadExample:
        return []


def other_pictures(data, indices, seed=0):
    """-> {i: the example whose pictures question i is asked about}: as many pictures, other ones. The same
    for any number of ranks. Raises UserError where there are no others."""
    names = {i: pictures_of(data, i) for i in indices}
    shown, rng = {}, np.random.default_rng(seed)
    for count in {len(each) for each in names.values()} - {0}:
        group = [i for i in rng.permutation(indices).tolist() if len(names[i]) == count]
        # The next one around the group that has other pictures. Backward, and twice around: of neighbors with
        # the same pictures, both have the same next one.
        for place in reversed(range(2 * len(group))):
            i, following = group[place % len(group)], group[(place + 1) % len(group)]
            shown[i] = following if names[following] != names[i] else shown.get(following)
        if None in (shown[i] for i in group):
            raise UserError(f"{data.path}: --shuffle_images needs other pictures, but all examples with "
                            f"{count} have the same")
    return shown


def question(data, metric, shown, i):
    """Example i without its last reply, or a BadExample."""
    example = data.question(i)
    if isinstance(example, BadExample):
        return example
    row, other = data.row(i), shown.get(i)
    if row["conversations"][-1]["from"] != "gpt":
        return data.named(i, "the last turn must be the expected answer, from 'gpt'")
    try:
        scores.score(metric, "", row)                       # whether it can be scored, before it is answered
        if other is not None:
            example["images"] = data.pictures.tensors(images_of(data.row(other)), other)
    except BadExample as e:
        return data.named(i, e)
    return example


def result(data, metric, shown, i, answer):
    row = data.row(i)
    asked, expected = (turn["value"] for turn in row["conversations"][-2:])
    kind = printable(str(row.get("type", row.get("category", "all"))), 60)
    points = scores.score(metric, answer, row)
    return {"index": i, "type": kind, "question": asked, "expected": expected, "answer": answer,
            "score": points, "right": points >= 0.5} | ({"pictures_of": shown[i]} if i in shown else {})


def summary(results):
    def of(rows):
        points = [row["score"] for row in rows]
        yes = scores.yes_no([(row["answer"], row["expected"]) for row in rows])
        return {"accuracy": sum(points) / max(1, len(rows)), "count": len(rows),
                "interval": scores.interval(points)} | ({"yes_no": yes} if yes else {})
    types = sorted({row["type"] for row in results})
    return of(results) | {"by_type": {kind: of([row for row in results if row["type"] == kind])
                                      for kind in types}}


def print_table(table):
    """In brackets, where the accuracy lies in 95 of 100 such sets of examples."""
    for kind, row in (*table["by_type"].items(), ("all together", table)):
        low, high = row["interval"]
        print(f"{kind:<16} {row['accuracy']:7.1%}   of {row['count']:<6} ({low:.1%} to {high:.1%})")
        if "yes_no" in row:
            of = row["yes_no"]
            print(f"{'':<16} yes: precision {of['precision']:.1%}, recall {of['recall']:.1%}, "
                  f"F1 {of['f1']:.1%}; says yes {of['yes']:.1%}")


def contact_sheet(results, data, path, blank_images=False):
    """Pictures with question, expected answer and given answer; green is right, red is wrong.
    Spread over the types."""
    sheets.write([cell(each, data, blank_images) for each in spread(results)[:sheets.CELLS]], path)


def spread(results):
    """One of each type, then the next of each type, and so on."""
    by_type = {}
    for result in results:
        by_type.setdefault(result["type"], []).append(result)
    longest = max(len(group) for group in by_type.values())
    return [group[i] for i in range(longest) for group in by_type.values() if i < len(group)]


def cell(result, data, blank_images):
    names = images_of(data.row(result.get("pictures_of", result["index"])))
    pictures = [read_image(data.pictures.path(name)) for name in names]
    if blank_images:
        pictures = [Image.new("RGB", picture.size) for picture in pictures]
    answer, expected = (text if len(text) <= 50 else text[:49] + "…"        # both have room below a picture
                        for text in (result["answer"], result["expected"]))
    answer += "" if result["right"] else f"\n(expected: {expected})"
    return pictures, result["question"], answer, "darkgreen" if result["right"] else "firebrick"


def open_loop(assistant, data, cfg, answers):
    """Mean |error| of the policy's actions on recorded steps, per dimension, beside two policies that do not
    look: always the mean action of the training data; always what was done one step before. Of chunks, the
    mean over all their places, and for each place. answers: see `score`; a chunk is kept as JSON."""
    wanted, there = (of[:cfg.max_examples or None] for of in data.chunks())     # (n, K, A), (n, K)
    key = data.units()
    given, unread = dict(answers.known), []
    missing = [i for i in range(len(wanted)) if i not in answers.known]
    for batch in batches(data.question, missing, assistant, cfg, unread):
        for (i, _), chunk in zip(batch, assistant.act_on([example for _, example in batch], key)):
            given[i] = json.dumps(chunk.tolist())
            answers.write({"index": i, "answer": given[i]})
    got, unread = np.full_like(wanted, np.nan), of_all_ranks(unread)    # nan where one can't be read
    for i, chunk in of_all_ranks(list(given.items())):
        if i < len(got):
            got[i] = json.loads(chunk)
    mean = np.broadcast_to(assistant.policy.statistics[key]["action"]["mean"], wanted.shape)
    first = data.first_steps()[:len(wanted), None, None]
    before = np.where(first, mean, np.roll(wanted[:, :1], 1, axis=0))                       # (n, K, A)
    read = ~np.isnan(got).any((1, 2))
    if not read.any():
        return {"count": 0}, unread
    there &= read[:, None]
    errors = {name: np.abs(guess - wanted)[there].mean(0).tolist() for name, guess in
              (("policy", got), ("mean action", mean), ("action before", before))}
    for k in np.flatnonzero(there.any(0)).tolist() if there.shape[1] > 1 else ():
        errors[f"policy, place {k + 1}"] = np.abs(got - wanted)[there[:, k], k].mean(0).tolist()
    if dist.get_rank() == 0:
        print("mean |error| in physical units, for each dimension and over all")
        for name, error in errors.items():
            print(f"{name:<17}", " ".join(f"{e:8.4f}" for e in error), f"| {np.mean(error):8.4f}")
    return {"l1": errors, "count": int(read.sum())}, unread


def write_scores(found, out):
    write_text(out, json.dumps(found, indent=1))
    print(f"scores   {out}")


def main(cfg):
    device, _ = ranks.start()
    read_config(cfg.ckpt)                                   # an error if it is no run
    step = together(lambda: find(cfg.ckpt))                 # a run that still trains saves others meanwhile
    rank, assistant = dist.get_rank(), Assistant(step, device)
    out = Path(cfg.out) if cfg.out else Path(cfg.ckpt) / "scores.json"
    if rank == 0:
        check_writable(out, [cfg.json])
    ranks.barrier()
    with ranks.rank_zero_first():                           # it may make the list of an archive's pictures
        data = assistant.dataset(cfg.json, cfg.image_dir)
    episodes = type(data) is not Conversations
    if episodes and (cfg.shuffle_images or cfg.metric != "exact"):
        raise UserError(f"{cfg.json} holds episodes: --metric and --shuffle_images are for answers in words")
    if episodes:                                            # can it act on them? before answers are kept
        data.key = cfg.unnorm_key
        data.units()
        data.check()
    answers = Answers(out, {
        "weights": fingerprint(step), "examples": data.store.file.name, "image_dir": cfg.image_dir,
        "max_new_tokens": cfg.max_new_tokens, "blank_images": cfg.blank_images, "unnorm_key": cfg.unnorm_key,
        # With fewer examples, a question may be about other pictures.
        "shuffle_images": [cfg.max_examples] if cfg.shuffle_images else False})
    if episodes:
        errors, unread = open_loop(assistant, data, cfg, answers)
        results = errors["count"]
        if results and rank == 0:
            write_scores(errors, out)
    else:
        results, unread = score(assistant, data, cfg, answers)
        if results and rank == 0:
            table = summary(results)
            print_table(table)
            write_scores(table | {"metric": cfg.metric, "answers": results}, out)
            contact_sheet(results, data, out.with_name(f"{out.stem}.png"), cfg.blank_images)
    ranks.barrier()                                         # rank zero's scores are on the disk
    if unread:                                              # a picture may be there again tomorrow
        answers.keep()
        raise UserError(f"{cfg.json}: {len(unread)} examples could not be scored and were left out (the same "
                        f"command asks for these alone), first: {unread[0]}")
    answers.remove()
    if not results:
        raise UserError(f"{cfg.json}: 0 examples could not be scored and were left out; "
                        "there was nothing to score")


if __name__ == "__main__":
    ranks.run(main, cfg)
