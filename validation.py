"""Held-out examples between two steps of training (--val_every): how well does it do on what it never sees?

The loss is that of training, summed over all supervised tokens of the file and divided by their number; the
accuracy is the share of these tokens that were the likeliest at their place. Each example counts once, on
however many ranks and in whatever micro-batches.

The run does not notice it. Nothing is drawn from the random state that dropout uses, the model comes back in
the mode that it was in, DDP is not asked, and no gradient is made: the weights of a run with --val_every are
those of the run without it, bit for bit.
"""
import sys
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import actions
import ranks
from check import known_positions
from config import BadExample, UserError
from data import Conversations, collate
from images import Pictures, load_image_transforms
from profiling import unwatched, working_type
from prompts import IGNORE


class HeldOut(Dataset):
    """The examples of --val_json, and the score that a model has on them.

    language, transforms, policy: as for the training data. A policy that trains on conversations, too, may be
    scored on held-out ones: `self.policy` is then None. Raises UserError where an example can't be used: at
    the start of a run, not after hours of it.
    """

    def __init__(self, cfg, language, transforms, policy, device):
        self.cfg, self.device, self.told = cfg, device, False
        folder = cfg.image_dir
        if policy:
            folder = actions.image_dir_of(cfg, cfg.val_json)
            policy = policy if actions.holds_episodes(cfg.val_json) else None
        self.policy = policy
        if cfg.augment:                                     # whole pictures are new to it, see `distort`
            transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize, cfg.openvla_vision,
                                               actions.center)
        about = cfg.val_json, language, Pictures(folder, transforms), cfg.max_length
        self.data = actions.Episodes(*about, policy) if policy else Conversations(*about)
        if policy:
            self.data.check()
        if policy and cfg.val_every:
            self.data.name = units_of(policy, self.data, cfg)
        if cfg.val_every or not policy:
            self.lengths, self.modality = self.data.lengths()               # has_image, see sampler.py
        if cfg.val_every:
            known = known_positions(cfg.llm_backbone) or max(self.lengths)
            if max(self.lengths) > known:
                raise UserError(f"--val_json {cfg.val_json}: its longest example takes {max(self.lengths)} "
                                f"positions, but the language model knows {known}. Set --max_length {known}")
            self.data.skip_bad = True                       # from here on, see __getitem__

    def __getitem__(self, place):
        """(example, whether it counts) -> the example; without labels if it does not count.

        One whose picture can't be read does not count either. Another one stands in its place, so that the
        ranks still make the same number of forwards.
        """
        i, counts = place
        example = self.data[i]
        if isinstance(example, BadExample):                 # no example of this modality can be read
            return example
        if not counts or example["replaced"]:
            nothing = torch.full_like(example["labels"], IGNORE)
            example = example | {"labels": nothing, "replaced": example["replaced"] * counts}
        return example

    def score(self, model):
        """-> val_loss, val_accuracy and val_tokens, how many there were; in stage vla also the accuracy and
        the error of each dimension. The same on all ranks; all must call it together."""
        cfg, policy = self.cfg, self.policy
        size = policy.chunk * (1 + 2 * policy.dimensions) if policy else 1      # see ActionTokens.measure
        loader = DataLoader(self, batch_sampler=list(self.micro_batches()), collate_fn=collate,
                            num_workers=cfg.num_workers, worker_init_fn=ranks.ignore_signals,
                            pin_memory=self.device.type == "cuda",
                            # Without it the loader would draw a number from the random state of dropout.
                            generator=torch.Generator().manual_seed(0))
        sums, dtype = torch.zeros(3 + size, dtype=torch.float64), working_type(cfg.precision, self.device)
        with (unwatched(), at_rest(model), torch.no_grad(),
              torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)):
            for batch in loader:
                if isinstance(batch, BadExample):
                    raise batch
                sums += self.sums_of(batch, model, size)
        loss, tokens, left_out, *scores = ranks.all_sum(sums).tolist()
        self.tell_once(int(left_out))
        found = policy.metrics(scores) if policy else {"accuracy": scores[0] / max(tokens, 1)}
        return {f"val_{name}": value for name, value in
                ({"loss": loss / max(tokens, 1), "tokens": int(tokens)} | found).items()}

    def sums_of(self, batch, model, size):
        """A micro-batch -> (3 + size,) sums: loss, supervised tokens, examples left out, right tokens; in
        stage vla what the policy measures instead of the last."""
        input_ids, labels, *places = (tensor.to(self.device, non_blocking=True) for tensor in
                                       (batch["input_ids"], batch["labels"], *batch["places"]))
        pixels = [tensor.to(self.device, non_blocking=True) for tensor in batch["pixel_values"]]
        loss, predicted = model(input_ids, labels, pixels, places)
        learned = batch["labels"][:, 1:] != IGNORE                                          # (B, T - 1)
        counts, measured = learned.any(1), torch.zeros(size, dtype=torch.float64)
        if counts.any() and self.policy:
            rows = {name: batch[name][counts] for name in ("labels", "attention_mask")}
            rows["sources"] = [name for name, there in zip(batch["sources"], counts) if there]
            measured = self.policy.measure(rows, predicted)
        elif counts.any():
            measured[0] = (predicted.cpu() == batch["labels"][:, 1:][learned]).sum()
        return torch.cat([torch.tensor([loss.item(), int(learned.sum()), batch["replaced"]]).double(),
                          measured])

    def micro_batches(self):
        """This rank's lists of (example, whether it counts). All ranks have as many, of the same modality at
        the same time: with --shard a forward is done together. So a rank that has no example left takes one
        that does not count. Like lengths stand side by side, so little is padded."""
        chosen, size = np.arange(len(self.data)), self.cfg.per_device_batch_size
        if 0 < self.cfg.val_examples < len(chosen):         # spread: the first ones may all be of one kind
            chosen = np.arange(self.cfg.val_examples) * len(chosen) // self.cfg.val_examples
        world, rank = dist.get_world_size(), dist.get_rank()
        for modality in (2, 1, 0):                          # as sampler.py names them
            alike = chosen[self.modality[chosen] == modality]
            alike = alike[np.argsort(-self.lengths[alike], kind="stable")]
            for start in range(0, len(alike), size * world):
                mine = alike[start + size * rank:start + size * (rank + 1)]
                last = min(start + size * world, len(alike)) - 1
                yield [(int(i), True) for i in mine] or [(int(alike[last]), False)]

    def tell_once(self, left_out):
        if left_out and not self.told and dist.get_rank() == 0:
            print(f"\n{left_out} examples of {self.cfg.val_json} can't be read and do not count; "
                  "python check.py names them", file=sys.stderr, flush=True)
        self.told = self.told or left_out > 0


@contextmanager
def at_rest(model):
    """Without dropout; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def units_of(policy, data, cfg):
    """Which training file's units the actions of the held-out episodes have: that of the same name or folder,
    or the only one. Raises UserError."""
    known = list(policy.statistics)
    found = [name for name in (data.name, data.path.parent.name) if name in known] or known
    if len(known) > 1 and found is known:
        raise UserError(f"--val_every: the units of the actions in {cfg.val_json} are not known. Put it into "
                        f"a folder named as one of {', '.join(known)}")
    return found[0]
