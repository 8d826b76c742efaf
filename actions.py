"""Robot actions as tokens (RT-2, arXiv 2307.15818; OpenVLA, arXiv 2406.09246), and episodes as examples.

    action in physical units --normalize--> [-1, 1] --256 bins--> 256 ids at the end of the vocabulary,
                                                                  one per dimension

and back. Ids are computed, never written as text and read again: some tokenizers would read something else.
With --chunk K an answer holds K actions, that of this step and those of the steps behind it (ACT, arXiv
2304.13705; for such tokens OpenVLA-OFT, arXiv 2502.19645). Shapes: A dimensions, K actions of a chunk.

An episode is one JSON object with many examples, one for each step:

    {"id": "0", "instruction": "push the button", "steps": [{"image": "0.png", "action": [0.1, -0.2]}, ...]}
"""
import sys

import numpy as np
import torch
from PIL import Image, ImageEnhance

from config import BadExample, UserError
from data import Conversations
from prompts import IGNORE, assemble

BINS = 256
QUESTION = "What action should the robot take to {instruction}?"


class ActionTokens:
    """Ids of actions.

    end:        exclusive upper end of the action ids.
    statistics: those of each dataset, see `compute_statistics`.
    pictures:   how many a step has; None = not known (a checkpoint of an older version).
    chunk:      K, how many actions an answer holds.

    As OpenVLA: id = end - bin, bins count from 1, a bin stands for its center. OpenVLA's end is the size of
    the base vocabulary; so is ours, unless control tokens lie among its last 256 ids (GPT-2's end of text
    does): then below them.
    """

    def __init__(self, end, statistics, pictures=None, chunk=1):
        self.end, self.statistics, self.pictures, self.chunk = end, statistics, pictures, chunk
        self.edges = np.linspace(-1, 1, BINS)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2                               # (255,)

    @property
    def ids(self):
        return list(range(self.end - BINS, self.end))

    @staticmethod
    def question(instruction):
        return QUESTION.format(instruction=instruction.strip().rstrip(".").lower())

    @property
    def dimensions(self):
        return len(next(iter(self.statistics.values()))["action"]["q01"])

    @property
    def length(self):
        """Action tokens of an answer: K A."""
        return self.chunk * self.dimensions

    @property
    def form(self):
        """What the lengths of examples depend on, beside the data (lengths.py)."""
        return (self.chunk,) if self.chunk > 1 else ()

    def key(self, name=""):
        """The dataset whose units are meant: the only one, or the named one."""
        if not name and len(self.statistics) == 1:
            return next(iter(self.statistics))
        if name not in self.statistics:
            raise UserError(f"--unnorm_key {name or '(empty)'}: this policy knows the datasets "
                            f"{', '.join(self.statistics)}. Choose the one whose robot you have")
        return name

    def learn_units(self, data, keep=()):
        """Computes the statistics of a dataset of episodes.
        Raises UserError where it can't be learned from."""
        episodes, actions = sum(1 for _ in data.objects()), data.actions()
        for d in keep:
            if d >= actions.shape[1]:
                raise UserError(f"--keep_dimensions {d}: the actions of {data.path} have {actions.shape[1]} "
                                f"dimensions, counted from 0")
            if np.abs(actions[:, d]).max() > 1:
                raise UserError(f"--keep_dimensions {d}: its values in {data.path} go from "
                                f"{actions[:, d].min():g} to {actions[:, d].max():g}; "
                                "only what lies in -1 to 1 can stay as it is")
        learned = compute_statistics(actions, episodes, keep)
        if self.statistics.setdefault(data.name, learned) != learned:
            raise UserError(f"{data.path}: another file is called {data.name!r}, too, but has other actions. "
                            "Rename one of them, or its folder")
        self.check_pictures(data.pictures_of_a_step())
        self.pictures, = data.pictures_of_a_step()
        if len({len(of["action"]["q01"]) for of in self.statistics.values()}) > 1:
            raise UserError(f"{data.path}: its actions have another number of dimensions "
                            "than those of the other files")

    def check_pictures(self, found):
        """A policy has learned from steps of so many pictures.
        It would act with fewer or more, too, but at random."""
        if found != {self.pictures or max(found)} or 0 in found:
            raise UserError(f"a step has {' or '.join(map(str, sorted(found)))} pictures, "
                            f"but must always have {self.pictures or 'the same number'}")

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
        return {"end": self.end, "bins": BINS, "statistics": self.statistics, "pictures": self.pictures,
                "chunk": self.chunk}

    @classmethod
    def load(cls, saved):
        """Raises UserError where it is not what `saved` gives."""
        try:
            policy = cls(saved["end"], saved["statistics"], saved.get("pictures"), saved.get("chunk", 1))
            sound = (BINS <= policy.end <= 10 ** 7 and 1 <= policy.dimensions <= 1000
                     and type(policy.chunk) is int and 1 <= policy.chunk <= 1000
                     and (policy.pictures is None or 1 <= policy.pictures <= 100))
            for low, high, mask in map(policy._range, policy.statistics):
                sound &= low.shape == high.shape == mask.shape == (policy.dimensions,) and mask.dtype == bool
                sound &= bool(np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all())
            if not sound:
                raise ValueError("a number in it is out of range")
            return policy
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise UserError("the checkpoint's state.json holds no actions that can be used "
                            f"({type(e).__name__}: {e})") from e

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

    def measure(self, batch, predicted):
        """A batch and its predicted tokens (S,) -> (K + 2 K A,) sums. For each place in the chunk: examples
        that have an action there; per dimension, right tokens; per dimension, |error| in physical units."""
        targets = batch["labels"][:, 1:]
        guessed = targets.clone()
        guessed[targets != IGNORE] = predicted.cpu()
        # A row ends with its actions and the end token. Label t + 1 is target t.
        first = batch["attention_mask"].sum(1) - self.length - 2                            # (B,)
        at = first[:, None] + torch.arange(self.length)
        wanted, got = (ids.gather(1, at).view(-1, self.chunk, self.dimensions).numpy()
                       for ids in (targets, guessed))
        there = wanted != IGNORE                            # not behind the end of the episode
        error = [np.abs(self.decode(g, key) - self.decode(w, key))
                 for g, w, key in zip(got, wanted, batch["sources"])]
        sums = there[..., 0], there & (got == wanted), there * error
        return torch.tensor(np.concatenate([each.sum(0).ravel() for each in sums]), dtype=torch.float64)

    def metrics(self, scores):
        """`measure`'s sums -> the mean accuracy; accuracy and L1 error of each dimension. In a chunk also the
        L1 errors at each place, None where no example has an action."""
        there, each = np.array(scores[:self.chunk]), np.array(scores[self.chunk:])
        each = each.reshape(2, self.chunk, self.dimensions)
        accuracies, l1 = each.sum(1) / there.sum()
        found = {"accuracy": accuracies.mean(), "accuracies": accuracies.tolist(), "l1": l1.tolist()}
        if self.chunk > 1:
            found["l1_by_place"] = [(e / n).tolist() if n else None for n, e in zip(there, each[1])]
        return found

    def _range(self, key):
        of = self.statistics[key]["action"]
        return np.array(of["q01"]), np.array(of["q99"]), np.array(of["mask"])


def end_of_actions(tokenizer):
    """The exclusive upper end of the action ids:
    the highest one with 256 ids below it and no control token among them."""
    control, end = {i for i in tokenizer.all_special_ids}, tokenizer.vocab_size
    for special in sorted(control, reverse=True):
        if end - BINS <= special < end:
            end = special
    if end < 2 * BINS:
        raise UserError(f"the vocabulary of {tokenizer.vocab_size} ids cannot spare {BINS} for actions below "
                        "its control tokens. Take a language model with a larger one")
    return end


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


def is_number(value):
    """An action's number. True counts as 1 in Python, and 1e308 overflows in the first sum."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


class Episodes(Conversations):
    """A file of episodes. Each step is an example: a picture, the instruction, and in place of a reply the
    actions from this step on, K of them. Behind the end of the episode the last one is repeated, unlearned.

    policy: ActionTokens. It must know this file's units (`learn_units`) before examples are read.
    """

    def __init__(self, path, language, pictures, max_length, policy, skip_bad=False):
        self.policy = policy
        super().__init__(path, language, pictures, max_length, skip_bad)

    @staticmethod
    def examples_in(episode):
        """The form of an episode is checked here, once; its actions by `actions`."""
        if "steps" not in episode:
            raise BadExample("this is no episode, there are no 'steps'. The file must hold episodes only, "
                             "for --stage vla")
        steps, place = episode["steps"], f"episode id={episode.get('id')!r}: "
        if not isinstance(episode.get("instruction"), str) or not episode["instruction"].strip():
            raise BadExample(place + "'instruction' must be a text, "
                             f"found {str(episode.get('instruction'))[:60]!r}")
        if not isinstance(steps, list) or not steps:
            raise BadExample(place + "'steps' must be a list with at least one step, "
                             f"found {str(steps)[:60]!r}")
        for i, step in enumerate(steps):
            images = step.get("image") if isinstance(step, dict) else None
            images = [images] if isinstance(images, str) else images
            if (not isinstance(images, list) or not images
                    or not all(isinstance(name, str) for name in images)):
                raise BadExample(place + f"step {i} must have a file name, or a list of them, under 'image', "
                                 f"found {str(step)[:60]!r}")
        return len(steps)

    def row(self, i):
        episode, step = self.stored(i)
        here = episode["steps"][step]
        images = [here["image"]] if isinstance(here["image"], str) else here["image"]
        question = "<image>\n" * len(images) + self.policy.question(episode["instruction"])
        actions = [each.get("action") for each in episode["steps"][step:step + self.policy.chunk]]
        return {"id": f"{episode.get('id')}/{step}", "image": images, "actions": actions,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]}

    def reply(self, row):
        actions = row["actions"] + row["actions"][-1:] * self._repeats(row)
        return self.policy.encode(actions, self.name).ravel().tolist()

    def _repeats(self, row):
        """How many places of a chunk lie behind the end of the episode."""
        return self.policy.chunk - len(row["actions"])

    def tokens(self, row, ask=False):
        input_ids, labels = super().tokens(row, ask)
        if not ask:
            self._check_whole(labels)
            unlearned = self._repeats(row) * self.policy.dimensions
            labels[-1 - unlearned:-1] = [IGNORE] * unlearned
        return input_ids, labels

    def _length(self, pieces, texts):
        input_ids, labels = assemble(pieces, texts, self.language.bos, self.pictures.patches, self.max_length)
        self._check_whole(labels)
        return len(input_ids)

    def _check_whole(self, labels):
        if sum(label != IGNORE for label in labels) <= self.policy.length:         # and the end token
            raise BadExample(f"it takes more than --max_length {self.max_length} positions, so its actions "
                             "would be cut. Raise --max_length")

    def check(self):
        """Held-out episodes: whether the policy can act on them. Raises UserError."""
        dimensions = self.policy.dimensions
        if self.actions().shape[1] != dimensions:
            raise UserError(f"{self.path}: its actions have {self.actions().shape[1]} dimensions, "
                            f"those of the policy {dimensions}")
        self.policy.check_pictures(self.pictures_of_a_step())

    def pictures_of_a_step(self):
        """The set of how many pictures the steps have. One number, in a file that can be learned from."""
        return {1 if isinstance(step["image"], str) else len(step["image"])
                for episode in self.objects() for step in episode["steps"]}

    def first_steps(self):
        """(n,) bool: which examples are the first step of their episode."""
        return self.places[:, 2] == 0

    def chunks(self):
        """-> (n, K, A) the actions from each step on, the last of an episode repeated behind its end;
        (n, K) bool: which ones are not repeated."""
        actions, starts = self.actions(), np.flatnonzero(self.first_steps())
        ends = np.append(starts[1:], len(actions))
        ends = np.repeat(ends, ends - starts)[:, None]                                      # (n, 1)
        at = np.arange(len(actions))[:, None] + np.arange(self.policy.chunk)                # (n, K)
        return actions[np.minimum(at, ends - 1)], at < ends

    def actions(self):
        """(n, A) all actions of the file, in its order. No picture is opened."""
        actions = []
        for episode in self.objects():
            for i, step in enumerate(episode["steps"]):
                action = step.get("action")
                if (not isinstance(action, list) or not action or not all(map(is_number, action))
                        or len(action) != len(actions[0] if actions else action)):
                    raise UserError(f"{self.path}, episode id={episode.get('id')!r}, step {i}: 'action' must "
                                    f"be {len(actions[0]) if actions else 'a list of'} finite numbers, "
                                    f"found {str(action)[:60]}")
                actions.append(action)
        return np.array(actions, np.float64)


def open_episodes(cfg, language, about):
    """The files of stage vla as train.py reads them -> how their actions become tokens, a dataset of each."""
    policy = ActionTokens(end_of_actions(language.tokenizer), {}, chunk=cfg.chunk)
    files = [Episodes(path, *about, policy, cfg.skip_bad_examples) for path in cfg.train_json.split(",")]
    for file in files:
        policy.learn_units(file, [int(d) for d in cfg.kept_dimensions])
    return policy, files


AREA = 0.9                                                  # share of a picture that a crop keeps, as OpenVLA


def crop(image, x, y):
    """A crop of AREA, cut at (x, y), both in 0..1: (0, 0) is the top left corner, (0.5, 0.5) the center."""
    width, height = (round(side * AREA ** 0.5) for side in image.size)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


def center(image):
    return crop(image, 0.5, 0.5)


def distort(image, rng):
    """OpenVLA's augmentation: a random crop, then brightness, contrast, saturation and hue.

    The policy has then never seen a whole picture:
    at inference it must get the central crop, or it misses its aim.
    """
    image = crop(image, *rng.random(2))
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(rng.uniform(0.8, 1.2))
    hue, saturation, value = image.convert("HSV").split()
    shift = round(255 * rng.uniform(-0.05, 0.05))
    return Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
