"""Score a trained model's greedy answers by exact match, and draw some of them.

    python evaluate.py --ckpt runs/toy-finetune-x7 --json data/toy/test.json --image_dir data/toy/images
    torchrun --nproc_per_node 8 evaluate.py ...             # each GPU answers every eighth example

The last reply of each conversation is the expected answer; earlier turns are given. Case, outer spaces and
a final dot do not count. An example's "type" (or "category", as others call it), if it has one, makes a
row of the table.

A policy (stage vla) is scored on recorded episodes: how far its actions are from the recorded ones. How often
it does its task is found out by its world: `python toy/robot.py --ckpt runs/toy-vla-x7 --rollouts 100`.
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import BadExample, UserError, check_limits, knob, parse, printable


@dataclass(frozen=True)
class EvaluateConfig:
    ckpt: str = knob("", "run folder or step folder")
    json: str = knob("", "examples with answers: LLaVA JSON or JSON lines")
    image_dir: str = knob("", "where the pictures' paths start: a folder, an uncompressed .zip or .tar")
    out: str = knob(
        "", "where the scores go; empty = scores.json in the run folder. A picture of the same name is drawn "
        "beside it")
    batch_size: int = knob(50, "examples answered at once, on each GPU")
    num_workers: int = knob(2, "processes that read examples, per GPU; 0 = none")
    max_new_tokens: int = knob(64, "longest answer", "tokens")
    max_examples: int = knob(0, "score only the first so many; 0 = all")
    unnorm_key: str = knob(
        "", "vla: the dataset whose units the actions are in; needed if the policy knows several")
    blank_images: bool = knob(False, "replace every picture by a black one: does the model look at all?")

    def __post_init__(self):
        if not self.ckpt:
            raise UserError("--ckpt RUN is missing")
        if not self.json:
            raise UserError("--json FILE is missing")
        check_limits(self, {"batch_size": (1, 10 ** 5), "max_new_tokens": (1, 10 ** 5),
                            "max_examples": (0, 10 ** 9), "num_workers": (0, 1000)})


if __name__ == "__main__":
    cfg = parse(EvaluateConfig, description="Score a trained model's greedy answers by exact match.")

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import ranks
import sheets
from checkpoint import unused_name, write_text
from errors import check_writable
from generate import Assistant
from images import read_image
from prompts import images_of


def normal(answer):
    return " ".join(answer.lower().split()).rstrip(".").strip()


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
    """-> one dict per example: index, type, question, expected, answer, right; and what could not be scored.

    Each result is written into the file `answers` as it comes: nobody wants to lose hours of work to the last
    picture. An example that can't be read is left out, and named at the end.
    """
    indices = list(range(min(len(data), cfg.max_examples or len(data))))
    if assistant.language.captions:
        kept = [i for i in indices if len(images_of(data.row(i))) == 1]
        if len(kept) < len(indices) and dist.get_rank() == 0:
            print(f"left out {len(indices) - len(kept)} examples without exactly one picture: "
                  "an align run only captions")
        indices = kept
    results, unread = [], []
    for batch in batches(partial(question, data), indices, assistant, cfg, unread):
        given = assistant.answer([example for _, example in batch], cfg.max_new_tokens)
        for (i, _), answer in zip(batch, given):
            row = data.row(i)
            asked, expected = (turn["value"] for turn in row["conversations"][-2:])
            kind = printable(str(row.get("type", row.get("category", "all"))), 60)
            results.append({"index": i, "type": kind, "question": asked, "expected": expected,
                            "answer": answer, "right": normal(answer) == normal(expected)})
            answers.write(json.dumps(results[-1]) + "\n")
        answers.flush()
    return sorted(of_all_ranks(results), key=lambda result: result["index"]), of_all_ranks(unread)


def question(data, i):
    """Example i without its last reply, or a BadExample."""
    example = data.question(i)
    if not isinstance(example, BadExample) and data.row(i)["conversations"][-1]["from"] != "gpt":
        return data.named(i, "the last turn must be the expected answer, from 'gpt'")
    return example


def summary(results):
    def of(rows):
        return {"accuracy": sum(row["right"] for row in rows) / max(1, len(rows)), "count": len(rows)}
    types = sorted({row["type"] for row in results})
    return of(results) | {"by_type": {kind: of([row for row in results if row["type"] == kind])
                                      for kind in types}}


def print_table(scores):
    for kind, row in (*scores["by_type"].items(), ("all together", scores)):
        print(f"{kind:<16} {row['accuracy']:7.1%}   of {row['count']}")


def contact_sheet(results, data, path, blank_images=False):
    """Pictures with question, expected answer and given answer; green is right, red is wrong.
    Spread over the types."""
    sheets.write([cell(result, data, blank_images) for result in spread(results)[:sheets.CELLS]], path)


def spread(results):
    """One of each type, then the next of each type, and so on."""
    by_type = {}
    for result in results:
        by_type.setdefault(result["type"], []).append(result)
    longest = max(len(group) for group in by_type.values())
    return [group[i] for i in range(longest) for group in by_type.values() if i < len(group)]


def cell(result, data, blank_images):
    pictures = [read_image(data.pictures.path(name)) for name in images_of(data.row(result["index"]))]
    if blank_images:
        pictures = [Image.new("RGB", picture.size) for picture in pictures]
    answer = result["answer"] + ("" if result["right"] else f"\n(expected: {result['expected']})")
    return pictures, result["question"], answer, "darkgreen" if result["right"] else "firebrick"


def open_loop(assistant, data, cfg):
    """Mean |error| of the policy's actions on recorded steps, per dimension, beside two policies that do not
    look: always the mean action of the training data; always what was done one step before."""
    wanted, key = data.actions()[:cfg.max_examples or None], assistant.policy.key(cfg.unnorm_key)
    data.check()
    acted, unread = [], []
    for batch in batches(data.question, list(range(len(wanted))), assistant, cfg, unread):
        actions = assistant.act_on([example for _, example in batch], key)
        acted += [(i, action) for (i, _), action in zip(batch, actions)]
    got, unread = np.full_like(wanted, np.nan), of_all_ranks(unread)    # (n, A); nan where one can't be read
    for i, action in of_all_ranks(acted):
        got[i] = action
    mean = np.broadcast_to(assistant.policy.statistics[key]["action"]["mean"], wanted.shape)
    first = data.first_steps()[:len(wanted), None]
    before = np.where(first, mean, np.roll(wanted, 1, axis=0))
    read = ~np.isnan(got).any(1)
    if not read.any():
        return {"count": 0}, unread
    errors = {name: np.abs(guess - wanted)[read].mean(0).tolist() for name, guess in
              (("policy", got), ("mean action", mean), ("action before", before))}
    if dist.get_rank() == 0:
        print("mean |error| in physical units, for each dimension and over all")
        for name, error in errors.items():
            print(f"{name:<16}", " ".join(f"{e:8.4f}" for e in error), f"| {np.mean(error):8.4f}")
    return {"l1": errors, "count": int(read.sum())}, unread


def write_scores(scores, out):
    write_text(out, json.dumps(scores, indent=1))
    print(f"scores   {out}")


def main(cfg):
    device, _ = ranks.start()
    rank, assistant = dist.get_rank(), Assistant(cfg.ckpt, device)
    out = Path(cfg.out) if cfg.out else Path(cfg.ckpt) / "scores.json"
    if rank == 0:
        check_writable(out, [cfg.json])
    ranks.barrier()
    with ranks.rank_zero_first():                           # it may make the list of an archive's pictures
        data = assistant.dataset(cfg.json, cfg.image_dir)
    if assistant.policy:
        scores, unread = open_loop(assistant, data, cfg)
        results = scores["count"]
        if results and rank == 0:
            write_scores(scores, out)
    else:
        so_far = unused_name(out.with_name(f"{out.stem}.unfinished{rank or ''}.jsonl"))
        with open(so_far, "x") as answers:
            results, unread = score(assistant, data, cfg, answers)
        if results and rank == 0:
            scores = summary(results)
            print_table(scores)
            write_scores(scores | {"answers": results}, out)
            contact_sheet(results, data, out.with_name(f"{out.stem}.png"), cfg.blank_images)
        so_far.unlink()
    if unread or not results:
        raise UserError(f"{cfg.json}: {len(unread)} examples could not be scored and were left out"
                        f"{f', first: {unread[0]}' if unread else '; there was nothing to score'}")


if __name__ == "__main__":
    ranks.run(main, cfg)
