"""Robot actions as tokens (RT-2, arXiv 2307.15818; OpenVLA, arXiv 2406.09246).

    action in physical units --normalize--> [-1, 1] --256 bins--> 256 ids at the end of the vocabulary,
                                                                  one per dimension

and back. Ids are computed, never written as text and read again: some tokenizers would read something else.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

from config import UserError

BINS = 256
QUESTION = "What action should the robot take to {instruction}?"


class ActionTokens:
    """Ids of actions.
    `end` is one behind the last id in use, `statistics` are those of each dataset (see below).

    As OpenVLA: id = end - bin, bins count from 1, a bin stands for its center. OpenVLA's end is the size of
    the base vocabulary; so is ours, unless control tokens lie among its last 256 ids (GPT-2's end of text
    does): then below them.
    """

    def __init__(self, end, statistics):
        self.end, self.statistics = end, statistics
        self.edges = np.linspace(-1, 1, BINS)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2                               # (255,)

    @property
    def dimensions(self):
        return len(next(iter(self.statistics.values()))["action"]["q01"])

    def key(self, name=""):
        """The dataset whose units are meant: the only one, or the named one."""
        if not name and len(self.statistics) == 1:
            return next(iter(self.statistics))
        if name not in self.statistics:
            raise UserError(f"--unnorm_key {name or '(empty)'}: this policy knows the datasets "
                            f"{', '.join(self.statistics)}. Choose the one whose robot you have")
        return name

    def learn_units(self, data, keep=()):
        """Computes the statistics of a dataset of episodes."""
        episodes = len(np.unique(data.places[:, 0]))
        self.statistics[data.key] = compute_statistics(read_actions(data), episodes, keep)
        if len({len(of["action"]["q01"]) for of in self.statistics.values()}) > 1:
            raise UserError(f"{data.path}: its actions have another number of dimensions "
                            "than those of the other files")

    def encode(self, actions, key):
        """(..., A) in physical units -> (..., A) ids."""
        low, high, mask = self._range(key)
        actions = np.asarray(actions, np.float64)
        normal = np.where(mask, 2 * (actions - low) / (high - low) - 1, actions)
        return self.end - np.digitize(np.clip(normal, -1, 1), self.edges)

    def decode(self, ids, key):
        """(..., A) ids -> (..., A) in physical units. An id that is no action counts as the nearest bin."""
        low, high, mask = self._range(key)
        normal = self.centers[np.clip(self.end - np.asarray(ids) - 1, 0, BINS - 2)]
        return np.where(mask, (normal + 1) / 2 * (high - low) + low, normal)

    def saved(self):
        """What a checkpoint keeps. `statistics` is OpenVLA's dataset_statistics.json."""
        return {"end": self.end, "bins": BINS, "statistics": self.statistics}

    @classmethod
    def load(cls, saved):
        return cls(saved["end"], saved["statistics"])

    @torch.no_grad()
    def fresh_rows(self, llm, seed):
        """Gives the action ids embeddings of their own, neighbors alike: sums of a few waves along the bins.

        Ids that no text ever used have drifted together until one is like the other. The loss then hardly
        tells one action from the next, and hundreds of steps go by before the rows part.
        """
        bins = torch.linspace(0, torch.pi, BINS)[:, None] * torch.arange(1, 9)              # (256, 8)
        waves = torch.cat([bins.sin(), bins.cos()], dim=1)                                  # (256, 16)
        for table in {llm.get_input_embeddings(), llm.get_output_embeddings()}:
            weight = table.weight
            directions = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(seed))
            rows = waves @ directions / 8 ** 0.5 * (weight - weight.mean(0)).std().cpu()
            weight[self.end - BINS:self.end] = rows.flip(0).to(weight)

    def score(self, batch, predicted):
        """A batch and its predicted tokens (S,) -> (1 + 2 A,) sums: examples;
        per dimension, right action tokens; per dimension, |error| in physical units."""
        targets = batch["labels"][:, 1:]
        size = (len(targets), self.dimensions + 1)      # each example supervises its action and the end token
        wanted, got = (ids.view(size)[:, :-1].numpy() for ids in (targets[targets != -100], predicted.cpu()))
        error = [np.abs(self.decode(g, key) - self.decode(w, key))
                 for g, w, key in zip(got, wanted, batch["keys"])]
        return torch.tensor([len(targets), *(got == wanted).sum(0), *np.sum(error, axis=0)],
                            dtype=torch.float64)

    def metrics(self, scores):
        """`score`'s sums -> the mean accuracy; accuracy and L1 error of each dimension."""
        each = np.array(scores[1:]).reshape(2, self.dimensions) / scores[0]
        return {"accuracy": each[0].mean(), "accuracies": each[0].tolist(), "l1": each[1].tolist()}

    def _range(self, key):
        of = self.statistics[key]["action"]
        return np.array(of["q01"]), np.array(of["q99"]), np.array(of["mask"])


def end_of_actions(tokenizer):
    """One behind the last action id:
    the highest place with 256 ids below it and no control token among them."""
    control, end = {i for i in tokenizer.all_special_ids}, tokenizer.vocab_size
    for special in sorted(control, reverse=True):
        if end - BINS <= special < end:
            end = special
    if end < 2 * BINS:
        raise UserError(f"the vocabulary of {tokenizer.vocab_size} ids cannot spare {BINS} for actions below "
                        "its control tokens. Take a language model with a larger one")
    return end


def read_actions(data):
    """Actions (n, A) of a dataset of episodes, in its order, from the JSON alone. No picture is opened."""
    actions, before, episode = [], None, None
    for start, end, step in data.places.tolist():
        if (start, end) != before:
            before, episode = (start, end), json.loads(data.bytes[start:end].tobytes())
        action = episode["steps"][step].get("action")
        if (not isinstance(action, list) or not action
                or len(action) != len(actions[0] if actions else action)
                or not np.isfinite(np.array(action, float)).all()):
            raise UserError(f"{data.path}, episode id={episode.get('id')!r}, step {step}: 'action' must be "
                            f"{len(actions[0]) if actions else 'a list of'} finite numbers, "
                            f"found {str(action)[:60]}")
        actions.append(action)
    return np.array(actions, np.float64)


def compute_statistics(actions, episodes, keep=()):
    """(n, A) -> OpenVLA's dataset_statistics.json layout for one dataset.
    `keep`: dimensions that are not normalized.

    From the 1st to the 99th percentile, so that single wild values do not use up the bins. A dimension that
    hardly moves would be blown up from noise to full range: its range gets a floor of 1 % of its extremes,
    and a warning.
    """
    low, high = np.quantile(actions, 0.01, axis=0), np.quantile(actions, 0.99, axis=0)
    floor = np.maximum(0.01 * (actions.max(0) - actions.min(0)), 1e-6)
    for d in np.flatnonzero(high - low < floor):
        print(f"action dimension {d} hardly moves ({low[d]:g} to {high[d]:g}); "
              f"its range is widened to {floor[d]:g}", file=sys.stderr)
    middle, half = (low + high) / 2, np.maximum(high - low, floor) / 2
    mask = [d not in keep for d in range(actions.shape[1])]
    columns = {"mean": actions.mean(0), "std": actions.std(0), "max": actions.max(0), "min": actions.min(0),
               "q01": middle - half, "q99": middle + half}
    return {"action": {name: column.tolist() for name, column in columns.items()} | {"mask": mask},
            "num_transitions": len(actions), "num_trajectories": episodes}


def dataset_name(path):
    return Path(path).stem if Path(path).stem != "train" else Path(path).parent.name


def episode_problem(episode):
    """What is wrong with the form of an episode, "" if nothing is. Actions are checked by `read_actions`."""
    steps = episode["steps"]
    if not isinstance(episode.get("instruction"), str) or not episode["instruction"].strip():
        return f"'instruction' must be a text, found {str(episode.get('instruction'))[:60]!r}"
    if not isinstance(steps, list) or not steps:
        return f"'steps' must be a list with at least one step, found {str(steps)[:60]!r}"
    for i, step in enumerate(steps):
        images = step.get("image") if isinstance(step, dict) else None
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
            return (f"step {i} must have a file name, or a list of them, under 'image', "
                    f"found {str(step)[:60]!r}")
    return ""


def as_conversation(episode, step):
    """One step of an episode as an example:
    what a conversation is, with an action in place of the reply's text."""
    here = episode["steps"][step]
    images = [here["image"]] if isinstance(here["image"], str) else here["image"]
    question = QUESTION.format(instruction=episode["instruction"].strip().rstrip(".").lower())
    return {"id": f"{episode.get('id')}/{step}", "image": images, "action": here.get("action"),
            "conversations": [{"from": "human", "value": "<image>\n" * len(images) + question},
                              {"from": "gpt", "value": ""}]}
