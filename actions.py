"""Robot actions as tokens (RT-2, arXiv 2307.15818; OpenVLA, arXiv 2406.09246), and episodes as examples.

    action in physical units --normalize--> [-1, 1] --256 bins--> 256 ids at the end of the vocabulary,
                                                                  one per dimension

and back. Ids are computed, never written as text and read again: some tokenizers would read something else.
With --chunk K an answer holds K actions, that of this step and those of the steps behind it (ACT, arXiv
2304.13705; for such tokens OpenVLA-OFT, arXiv 2502.19645), with --decode parallel all at once (parallel.py).
With --state a question holds what the robot knows of itself, S numbers that become ids in the same way.

Shapes: n examples, A dimensions of an action, K actions of a chunk, S numbers of a state.

An episode is one JSON object with many examples, one for each step:

    {"id": "0", "instruction": "push the button", "steps": [{"image": "0.png", "action": [0.1, -0.2]}, ...]}

A step may have a "state", too; or the episode has one, a list with a list of numbers for each step.
"""
import json
import sys
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

import parallel
from config import BadExample, UserError, read_config
from data import Conversations
from prompts import IGNORE, Piece, assemble, to_pieces

BINS = 256
UNKNOWN = 0.2                                               # share of training examples without their state
QUESTION = "What action should the robot take to {instruction}?"


class ActionTokens:
    """Ids of actions.

    end:        exclusive upper end of the action ids.
    statistics: those of each dataset, see `compute_statistics`.
    pictures:   how many a step has; None = not known (a checkpoint of an older version).
    chunk:      K, how many actions an answer holds.
    state:      whether a question holds the robot's state.
    decoding:   how an answer comes: "tokens", one by one, or in "parallel".

    As OpenVLA: id = end - bin, bins count from 1, a bin stands for its center. OpenVLA's end is the size of
    the base vocabulary; so is ours, unless control tokens lie among its last 256 ids (GPT-2's end of text
    does): then below them.
    """

    def __init__(self, end, statistics, pictures=None, chunk=1, state=False, decoding="tokens"):
        self.end, self.statistics, self.pictures = end, statistics, pictures
        self.chunk, self.state, self.decoding = chunk, state, decoding
        self.edges = np.linspace(-1, 1, BINS)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2                               # (255,)

    @property
    def ids(self):
        return list(range(self.end - BINS, self.end))

    @staticmethod
    def question(instruction):
        return QUESTION.format(instruction=instruction.strip().rstrip(".").lower())

    @property
    def sizes(self):
        """How many numbers an action has, and a state if there is one: {"action": A, "state": S}."""
        first = next(iter(self.statistics.values()))
        return {name: len(first[name]["q01"]) for name in ("action", "state")[:1 + self.state]}

    @property
    def dimensions(self):
        return self.sizes["action"]

    @property
    def state_size(self):
        return self.sizes.get("state", 0)

    @property
    def length(self):
        """Action tokens of an answer: K A."""
        return self.chunk * self.dimensions

    @property
    def form(self):
        """What the lengths of examples depend on, beside the data (lengths.py)."""
        return (self.chunk, self.state) if self.chunk > 1 or self.state else ()

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
        episodes, actions = sum(1 for _ in data.objects()), data.numbers("action")
        for d in keep:
            if d >= actions.shape[1]:
                raise UserError(f"--keep_dimensions {d}: the actions of {data.path} have {actions.shape[1]} "
                                f"dimensions, counted from 0")
            if np.abs(actions[:, d]).max() > 1:
                raise UserError(f"--keep_dimensions {d}: its values in {data.path} go from "
                                f"{actions[:, d].min():g} to {actions[:, d].max():g}; "
                                "only what lies in -1 to 1 can stay as it is")
        learned = compute_statistics(actions, episodes, keep)
        if self.state:
            learned["state"] = range_of(data.numbers("state"), "state")
        if self.statistics.setdefault(data.name, learned) != learned:
            raise UserError(f"{data.path}: another file is called {data.name!r}, too, but has other actions. "
                            "Rename one of them, or its folder")
        found = data.pictures_of_a_step()
        self.check_pictures(found, f"{data.path}: ")
        self.pictures, = found
        for name in self.sizes:
            if len({len(of[name]["q01"]) for of in self.statistics.values()}) > 1:
                raise UserError(f"{data.path}: its {name}s have another number of dimensions "
                                "than those of the other files")

    def check_pictures(self, found, path=""):
        """A policy has learned from steps of so many pictures. It would act with fewer or more, too, but at
        random. found: the numbers of pictures, or {number: where a step with so many stands}."""
        if set(found) != {self.pictures or max(found)} or 0 in found:
            counts = " or ".join(f"{n} ({found[n]})" if isinstance(found, dict) else str(n)
                                 for n in sorted(found))
            raise UserError(f"{path}a step has {counts} pictures, but must always have "
                            f"{self.pictures or 'the same number'}")

    def encode(self, numbers, key, name="action"):
        """(..., A) in physical units -> (..., A) ids. name: "state" for states (..., S)."""
        low, high, mask = self._range(key, name)
        numbers = np.asarray(numbers, np.float64)
        normal = np.where(mask, 2 * (numbers - low) / (high - low) - 1, numbers)
        return self.end - np.digitize(np.clip(normal, -1, 1), self.edges)

    def state_ids(self, state, key, language):
        """A state, S numbers, as ids. None: it is not known; the end token, S times, says so."""
        if state is None:
            return [language.end_id] * self.state_size
        return self.encode(self.checked_state(state), key, "state").tolist()

    def checked_state(self, state):
        if (not isinstance(state, (list, tuple, np.ndarray)) or len(state) != self.state_size
                or not all(map(is_number, np.asarray(state, object)))):
            raise BadExample(f"'state' must be {self.state_size} finite numbers, found {str(state)[:60]}")
        return state

    def tokenize(self, row, language, patches, max_length, ask=False, reply=(), state=()):
        """As prompts.tokenize does it, and the ids of a state stand right behind the last picture."""
        pieces = with_state(to_pieces(row, language, ask, reply), state)
        return assemble(pieces, language.piece_ids(pieces), language.bos, patches, max_length, ask)

    def decode(self, ids, key):
        """(..., A) ids -> (..., A) in physical units. An id that is no action counts as the nearest bin."""
        low, high, mask = self._range(key)
        normal = self.centers[np.clip(self.end - np.asarray(ids) - 1, 0, BINS - 2)]
        return np.where(mask, (normal + 1) / 2 * (high - low) + low, normal)

    def saved(self):
        """What a checkpoint keeps. `statistics` is OpenVLA's dataset_statistics.json."""
        return {"end": self.end, "bins": BINS, "statistics": self.statistics, "pictures": self.pictures,
                "chunk": self.chunk, "decode": self.decoding}

    @classmethod
    def load(cls, saved):
        """Raises UserError where it is not what `saved` gives."""
        try:
            statistics = saved["statistics"]
            policy = cls(saved["end"], statistics, saved.get("pictures"), saved.get("chunk", 1),
                         any("state" in of for of in statistics.values()), saved.get("decode", "tokens"))
            sound = (BINS <= policy.end <= 10 ** 7 and 1 <= policy.dimensions <= 1000
                     and type(policy.chunk) is int and 1 <= policy.chunk <= 999
                     and policy.decoding in ("tokens", "parallel")
                     and (policy.pictures is None or 1 <= policy.pictures <= 100))
            for name, size in policy.sizes.items():
                for low, high, mask in (policy._range(key, name) for key in statistics):
                    sound &= low.shape == high.shape == mask.shape == (size,) and mask.dtype == bool
                    sound &= bool(np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all())
            if not sound:
                raise ValueError("a number in it is out of range")
            return policy
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise UserError("the checkpoint's state.json holds no actions that can be used "
                            f"({type(e).__name__}: {e})") from e

    def begin(self, model, cfg):
        """For a run that trains. A checkpoint of stage vla has what the actions need; to any other is added:
        rows of the embedding table, and slots."""
        if any(name.startswith("llm") for name in cfg.trained) and read_config(cfg.ckpt).stage != "vla":
            self.fresh_rows(model.llm, cfg.seed)
        if self.decoding == "parallel":
            parallel.begin(model, self.length, cfg)
        elif hasattr(model.projector, "slots"):
            del model.projector.slots

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
        that have an action there; per dimension, right tokens; per dimension, |error| in physical units.
        A batch of conversations -> (2,): right tokens, and how many there are."""
        targets = batch["labels"][:, 1:]
        if batch["sources"][0] not in self.statistics:
            right = predicted.cpu() == targets[targets != IGNORE]
            return torch.tensor([right.sum(), len(right)], dtype=torch.float64)
        guessed = targets.clone()
        guessed[targets != IGNORE] = predicted.cpu()
        # A row ends with its actions and, token by token, the end token. Target t is label t + 1.
        behind = batch["attention_mask"].sum(1) - 1 - int(self.decoding == "tokens")        # (B,)
        at = behind[:, None] + torch.arange(-self.length, 0)
        wanted, got = (ids.gather(1, at).view(-1, self.chunk, self.dimensions).numpy()
                       for ids in (targets, guessed))
        there = wanted != IGNORE                            # not behind the end of the episode
        error = [np.abs(self.decode(g, key) - self.decode(w, key))
                 for g, w, key in zip(got, wanted, batch["sources"])]
        sums = there[..., 0], there & (got == wanted), there * error
        return torch.tensor(np.concatenate([each.sum(0).ravel() for each in sums]), dtype=torch.float64)

    def metrics(self, scores):
        """`measure`'s sums -> the mean accuracy; accuracy and L1 error of each dimension. In a chunk also the
        L1 errors at each place, None where no example has an action. Of conversations the accuracy alone."""
        if len(scores) == 2:
            return {"accuracy": scores[0] / scores[1]}
        there, each = np.array(scores[:self.chunk]), np.array(scores[self.chunk:])
        each = each.reshape(2, self.chunk, self.dimensions)
        accuracies, l1 = each.sum(1) / there.sum()
        found = {"accuracy": accuracies.mean(), "accuracies": accuracies.tolist(), "l1": l1.tolist()}
        if self.chunk > 1:
            found["l1_by_place"] = [(e / n).tolist() if n else None for n, e in zip(there, each[1])]
        return found

    def _range(self, key, name="action"):
        of = self.statistics[key][name]
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


def with_state(pieces, ids):
    """The pieces of a question with the ids of a state behind its last picture."""
    behind = max((i for i, piece in enumerate(pieces, start=1) if piece.is_picture), default=0)
    return pieces[:behind] + [Piece(ids=tuple(ids))] * bool(ids) + pieces[behind:]


def compute_statistics(actions, episodes, keep=()):
    """(n, A) -> OpenVLA's dataset_statistics.json layout for one dataset.
    `keep`: dimensions that are not normalized."""
    return {"action": range_of(actions, "action", keep), "num_transitions": len(actions),
            "num_trajectories": episodes}


def range_of(numbers, name, keep=()):
    """(n, A) actions, or (n, S) states -> what is known of each dimension.

    From the 1st to the 99th percentile, so that single wild values do not use up the bins. A dimension that
    hardly moves would be blown up from noise to full range: its range gets a floor of 1 % of its extremes,
    and a warning.
    """
    low, high = np.quantile(numbers, 0.01, axis=0), np.quantile(numbers, 0.99, axis=0)
    floor = np.maximum(0.01 * (numbers.max(0) - numbers.min(0)), 1e-6)
    for d in np.flatnonzero(high - low < floor):
        print(f"{name} dimension {d} hardly moves ({low[d]:g} to {high[d]:g}); "
              f"its range is widened to {floor[d]:g}", file=sys.stderr)
    middle, half = (low + high) / 2, np.maximum(high - low, floor) / 2
    columns = {"mean": numbers.mean(0), "std": numbers.std(0), "max": numbers.max(0), "min": numbers.min(0),
               "q01": middle - half, "q99": middle + half}
    return {name: column.tolist() for name, column in columns.items()} | {
        "mask": [d not in keep for d in range(numbers.shape[1])]}


def is_number(value):
    """An action's number. True counts as 1 in Python, and 1e308 overflows in the first sum."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


class Episodes(Conversations):
    """A file of episodes. Each step is an example: a picture, the instruction, and in place of a reply the
    actions from this step on, K of them. Behind the end of the episode the last one is repeated, unlearned.

    policy: ActionTokens. It must know this file's units (`learn_units`) before examples are read.
    seed:   of a run that trains on the file. With --state, a fifth of the examples then don't know theirs, in
            each epoch others: what the state tells is easy to copy, and a policy could forget to look. None:
            all know it.
    key:    whose units the numbers are in; empty = see `units`, or the only ones that the policy knows.
    """

    def __init__(self, path, language, pictures, max_length, policy, skip_bad=False, seed=None):
        self.policy, self.seed, self.key = policy, seed, ""
        super().__init__(path, language, pictures, max_length, skip_bad)

    @staticmethod
    def examples_in(episode):
        """The form of an episode is checked here, once; its numbers by `numbers`."""
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
        actions = numbers_of(episode, "action")[step:step + self.policy.chunk]
        state = numbers_of(episode, "state")[step] if self.policy.state else None
        return {"id": f"{episode.get('id')}/{step}", "image": images, "actions": actions, "state": state,
                "example": i,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]}

    def reply(self, row):
        actions = row["actions"] + row["actions"][-1:] * self._repeats(row)
        return self.policy.encode(actions, self.units()).ravel().tolist()

    def units(self):
        """The dataset whose units its numbers are in: `key`, or that of its own name, or of its folder's."""
        named = (name for name in (self.name, self.path.parent.name) if name in self.policy.statistics)
        return self.policy.key(self.key or next(named, ""))

    def knows_state(self, i):
        """By seed, epoch and example alone, as the crops of --augment (1: but not by the same numbers)."""
        if self.seed is None:
            return True
        return np.random.default_rng((self.seed, int(self.pictures.epoch), i, 1)).random() >= UNKNOWN

    def _state_ids(self, row, ask=False):
        if not self.policy.state:
            return []
        state = row["state"] if ask or self.knows_state(row["example"]) else None
        return self.policy.state_ids(state, self.units(), self.language)

    def _repeats(self, row):
        """How many places of a chunk lie behind the end of the episode."""
        return self.policy.chunk - len(row["actions"])

    def tokens(self, row, ask=False):
        input_ids, labels = self.policy.tokenize(
            row, self.language, self.pictures.patches, self.max_length, ask, () if ask else self.reply(row),
            self._state_ids(row, ask))
        if not ask:
            self._check_whole(labels)
            unlearned = self._repeats(row) * self.policy.dimensions
            labels[-1 - unlearned:-1] = [IGNORE] * unlearned
            if self.policy.decoding == "parallel":
                # The model compares what comes out at a position with the label one further (VLM.forward).
                # So the label of a slot stands one further, and the end token makes room for the last.
                answer = slice(-1 - self.policy.length, None)
                input_ids[answer] = [parallel.SLOT] * self.policy.length + [self.language.end_id]
                labels[answer] = [IGNORE] + labels[answer][:-1]
        return input_ids, labels

    def _length(self, pieces, texts):
        pieces = with_state(pieces, [self.language.end_id] * self.policy.state_size)
        input_ids, labels = assemble(pieces, texts, self.language.bos, self.pictures.patches, self.max_length)
        self._check_whole(labels)
        return len(input_ids)

    def _check_whole(self, labels):
        if sum(label != IGNORE for label in labels) <= self.policy.length:         # and the end token
            raise BadExample(f"it takes more than --max_length {self.max_length} positions, so its actions "
                             "would be cut. Raise --max_length")

    def check(self):
        """Held-out episodes: whether the policy can act on them. Raises UserError."""
        for name, size in self.policy.sizes.items():
            found = self.numbers(name).shape[1]
            if found != size:
                raise UserError(f"{self.path}: its {name}s have {found} dimensions, "
                                f"those of the policy {size}")
        self.policy.check_pictures(self.pictures_of_a_step(), f"{self.path}: ")

    def pictures_of_a_step(self):
        """{how many pictures a step has: the first such step}. One number, in a file to learn from."""
        found = {}
        for episode in self.objects():
            for i, step in enumerate(episode["steps"]):
                number = 1 if isinstance(step["image"], str) else len(step["image"])
                if number not in found:
                    found[number] = f"episode id={episode.get('id')!r}, step {i}"
        return found

    def lengths(self):
        """Steps of a robot are a modality of their own, 2 (sampler.py)."""
        lengths, has_image = super().lengths()
        return lengths, 2 * has_image

    def first_steps(self):
        """(n,) bool: which examples are the first step of their episode."""
        return self.places[:, 2] == 0

    def chunks(self):
        """-> (n, K, A) the actions from each step on, the last of an episode repeated behind its end;
        (n, K) bool: which ones are not repeated."""
        actions, starts = self.numbers("action"), np.flatnonzero(self.first_steps())
        ends = np.append(starts[1:], len(actions))
        ends = np.repeat(ends, ends - starts)[:, None]                                      # (n, 1)
        at = np.arange(len(actions))[:, None] + np.arange(self.policy.chunk)                # (n, K)
        return actions[np.minimum(at, ends - 1)], at < ends

    def numbers(self, name):
        """All actions (n, A), or states (n, S), of the file, in its order. No picture is opened."""
        found = []
        for episode in self.objects():
            place = f"{self.path}, episode id={episode.get('id')!r}"
            of_steps = numbers_of(episode, name)
            if not isinstance(of_steps, list) or len(of_steps) != len(episode["steps"]):
                raise UserError(f"{place}: {name!r} must be a list of {len(episode['steps'])} lists, one for "
                                f"each step, found {str(of_steps)[:60]}")
            for i, numbers in enumerate(of_steps):
                if (not isinstance(numbers, list) or not numbers or not all(map(is_number, numbers))
                        or len(numbers) != len(found[0] if found else numbers)):
                    raise UserError(f"{place}, step {i}: {name!r} must "
                                    f"be {len(found[0]) if found else 'a list of'} finite numbers, "
                                    f"found {str(numbers)[:60]}")
                found.append(numbers)
        return np.array(found, np.float64)


def numbers_of(episode, name):
    """The "action" or the "state" of each step: in the step, or in a list of the episode's own."""
    return episode[name] if name in episode else [step.get(name) for step in episode["steps"]]


def open_episodes(cfg, language, about):
    """The files of stage vla as train.py reads them -> how their actions become tokens, a dataset of each.

    Conversations may be among them: a model that learns nothing but actions forgets how to answer (RT-2,
    arXiv 2307.15818, trains on both). Each file's pictures may lie in a folder of their own."""
    policy = ActionTokens(end_of_actions(language.tokenizer), {}, chunk=cfg.chunk, state=cfg.state,
                          decoding=cfg.decode)
    paths, (_, pictures, max_length), files = cfg.train_json.split(","), about, []
    acts = [holds_episodes(path) for path in paths]
    for path, folder, robot in zip(paths, image_dirs(cfg), acts):
        here = copy(pictures)                               # of the same epoch, which lies in shared memory
        if folder != cfg.image_dir:
            here.look_in(folder)
        # Where no file has episodes, all are opened as such, and the first says what is missing in it.
        if robot or not any(acts):
            files.append(Episodes(path, language, here, max_length, policy, cfg.skip_bad_examples, cfg.seed))
            policy.learn_units(files[-1], [int(d) for d in cfg.kept_dimensions])
        else:
            files.append(Conversations(path, language, here, max_length, cfg.skip_bad_examples))
    for file in files:
        if type(file) is Conversations and file.name in policy.statistics:
            raise UserError(f"{file.path}: a file of episodes is called {file.name!r}, too. Rename one of "
                            "them, or its folder")
    return policy, files


def image_dirs(cfg):
    """--image_dir for each file of --train_json: one for all, or in stage vla as many as there are files.
    Raises UserError where there are more or fewer."""
    files, folders = cfg.train_json.split(","), cfg.image_dir.split(",")
    with_a_comma = Path(cfg.image_dir).exists()             # in its name
    if cfg.stage != "vla" or len(folders) == 1 or with_a_comma:
        return [cfg.image_dir] * len(files)
    if len(folders) != len(files):
        raise UserError(f"--image_dir {cfg.image_dir}: give one for all files of --train_json, or one for "
                        f"each of them: {len(files)}, joined by commas")
    return folders


def image_dir_of(cfg, path):
    """Where the pictures of a file lie. A held-out one has them where a training file of its kind has, if
    possible one in the same folder."""
    def like_it(pair):
        file = pair[0]
        return file == str(path), holds_episodes(file) == holds_episodes(path), (
            Path(file).parent == Path(path).parent)
    return max(zip(cfg.train_json.split(","), image_dirs(cfg)), key=like_it)[1]


def first_file(files, acts):
    """The first of some files; for a model that acts, the first one of episodes, if there is one."""
    return next((file for file in files if not acts or holds_episodes(file)), files[0])


def holds_episodes(path):
    """Whether the first object of a file is an episode, not a conversation. If it can't be read: True, and
    then the reader of episodes says why."""
    size, decoder = 2 ** 16, json.JSONDecoder()
    while Path(path).is_file():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(size)
        begin = text.lstrip(" \t\r\n[")
        try:
            return "steps" in decoder.raw_decode(begin)[0]
        except (ValueError, RecursionError, TypeError):     # cut off here, or really no JSON object
            if len(text) < size or not begin.startswith("{"):
                break
            size *= 8
    return True


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
