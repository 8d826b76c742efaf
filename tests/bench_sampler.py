"""What grouping by length saves, and what it costs. No model, no GPU: positions are counted, not computed.

    python tests/bench_sampler.py           # about a minute
    python tests/bench_sampler.py --examples 100000 --large 1000000

The lengths are drawn, not read: a mix like LLaVA-v1.5-mix665k, 94 % with one picture and 140 text tokens on
average, 6 % text only with 880, both lognormal and cut at 2048 positions.

Positions are time. A micro-batch is as long as its longest example, so a rank computes
    cost = micro-batch size x longest example, summed over the micro-batches of one optimizer step
and then waits for the slowest rank. Three fractions follow, each over the whole epoch:
    pad     padded positions, of all positions computed
    lost    time that ranks wait for the slowest one, of all ranks' time; one rank never waits
    used    what neither takes: real positions, of all ranks' time; training is as fast as this is high
"""
import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sampler import SplitModalitySampler    # noqa: E402

MAX_LENGTH = 2048
LAYOUTS = {"8 ranks x 16": 8, "4 ranks x 16 x 2": 4, "1 rank x 16 x 8": 1}     # all cut global batches of 128


class RandomOrder(SplitModalitySampler):
    """What DataLoader(shuffle=True) does: both modalities in one batch, and no sorting at all."""

    def global_batches(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        count = -(-len(order) // self.global_batch_size)
        return np.resize(order, (count, self.global_batch_size))


def draw(examples, patches, tail, seed=0):
    """Text tokens (n,) and has_image (n,). `tail` is the sigma of log length; means hold after the cut."""
    rng = np.random.default_rng(seed)
    has_image, spread = rng.random(examples) < 0.94, rng.lognormal(0, tail, examples)
    text = np.empty(examples)
    for mine, mean, room in ((has_image, 140, MAX_LENGTH - patches), (~has_image, 880, MAX_LENGTH)):
        median = mean
        for _ in range(30):                 # the cut takes from the mean, so stretch until it is right
            median *= mean / np.minimum(median * spread[mine], room).mean()
        text[mine] = np.minimum(median * spread[mine], room)
    return text.round().clip(1).astype(np.int64), has_image


def guessed(text, noise, seed=1):
    """Text tokens as a character count would have it: right on average, wrong by `noise` for each example."""
    error = np.random.default_rng(seed).lognormal(0, noise, len(text))
    return (text * error).round().clip(1).astype(np.int64)


def make(kind, lengths, has_image, world_size, rank=0, window=64):
    return kind(lengths, has_image, global_batch_size=128, per_device_batch_size=16, world_size=world_size,
                rank=rank, seed=0, window=window)


def fractions(true_lengths, ranks):
    """(pad, lost, used) of one epoch, from what the samplers of all ranks really yield."""
    micro = np.array([list(sampler) for sampler in ranks])                  # (W, micro-batches, 16)
    micro = micro.reshape(len(ranks), -1, ranks[0].accumulation, 16)        # (W, steps, accumulation, 16)
    real = true_lengths[micro].sum()
    cost = (true_lengths[micro].max(axis=3) * 16).sum(axis=2)               # (W, steps)
    time_of_all = len(ranks) * cost.max(axis=0).sum()                       # a step lasts as its slowest rank
    return 1 - real / cost.sum(), 1 - cost.sum() / time_of_all, real / time_of_all


def print_waste(args, patches):
    text, has_image = draw(args.examples, patches, args.tail)
    lengths = text + patches * has_image
    guess = guessed(text, args.noise) + patches * has_image
    print(f"\n{args.examples:,} examples, global batch 128, {patches} patches; mean text tokens "
          f"{text[has_image].mean():.0f} with a picture, {text[~has_image].mean():.0f} without")
    print(f"{'%':26}" + "".join(f"{layout:^24}" for layout in LAYOUTS))
    print(f"{'order':26}" + f"{'pad':>8}{'lost':>7}{'used':>7}  " * len(LAYOUTS))
    for name, kind, seen, window in (
            ("random", RandomOrder, lengths, 0),
            ("ours, window 0", SplitModalitySampler, lengths, 0),
            ("ours, window 16", SplitModalitySampler, lengths, 16),
            ("ours, window 64 (default)", SplitModalitySampler, lengths, 64),
            ("ours, window 256", SplitModalitySampler, lengths, 256),
            ("window 64, guessed lengths", SplitModalitySampler, guess, 64)):
        row = f"{name:26}"
        for world_size in LAYOUTS.values():
            ranks = [make(kind, seen, has_image, world_size, rank, window) for rank in range(world_size)]
            row += "{:8.1f}{:7.1f}{:7.1f}  ".format(*(100 * f for f in fractions(lengths, ranks)))
        print(row, flush=True)


def seconds(function):
    """The better of two runs."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return min(took)


def print_plan(examples, args):
    """Each rank plans the whole epoch when it starts to iterate; the first batch of an epoch waits for it."""
    text, has_image = draw(examples, 256, args.tail)
    sampler = make(SplitModalitySampler, text + 256 * has_image, has_image, world_size=8)
    plan, whole = seconds(lambda: next(iter(sampler))), seconds(lambda: list(sampler))
    tracemalloc.start()                     # numpy reports its arrays to it
    sampler.global_batches()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{examples:>12,}{plan:14.2f}{whole:20.2f}{len(sampler):16,}{peak / 1e6:14.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=665_000, help="size of the mix")
    parser.add_argument("--large", type=int, default=10_000_000, help="the larger size to plan")
    parser.add_argument("--tail", type=float, default=0.8, help="sigma of the log of text lengths")
    parser.add_argument("--noise", type=float, default=0.12,
                        help="sigma of the log error of guessed text lengths")
    args = parser.parse_args()
    for patches in (256, 576):
        print_waste(args, patches)
    print(f"\n{'examples':>12}{'plan, s':>14}{'whole epoch, s':>20}{'micro-batches':>16}{'peak, MB':>14}")
    for examples in (args.examples, args.large):
        print_plan(examples, args)
    print("plan: until the first micro-batch; whole epoch: plan, and all micro-batches of one rank of 8;\n"
          "peak: of the plan, beyond the lengths themselves, in each rank")


if __name__ == "__main__":
    main()
