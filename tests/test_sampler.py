"""sampler.py: what a global batch holds, and that only the dataset, seed, epoch and batch size decide it."""
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

import bench_sampler
from sampler import SplitModalitySampler, uneven

# (examples with pictures, examples of text only, global batch)
SIZES = [(1, 0, 1), (0, 1, 1), (1, 0, 8), (0, 1, 8), (1, 1, 8),     # one example of a kind
         (3, 0, 8), (0, 3, 8), (3, 2, 8),                           # fewer than one batch
         (16, 0, 8), (0, 16, 8), (16, 8, 8),                        # full batches only: nothing is seen twice
         (17, 0, 8), (0, 17, 8), (17, 9, 8), (15, 23, 8),           # ragged last batches
         (40, 0, 128), (0, 40, 128), (200, 20, 128), (130, 130, 128)]   # Prismatic's sampler fails on these


def dataset(pictures, texts, seed=0):
    """Lengths with a long tail, the two modalities in no order."""
    rng = np.random.default_rng(seed)
    has_image = rng.permutation(np.arange(pictures + texts) < pictures)
    return 1 + rng.lognormal(4, 0.8, len(has_image)).astype(int) + 16 * has_image, has_image


def samplers(lengths, has_image, ranks=1, accumulation=1, size=8, seed=0, window=4,
             kind=SplitModalitySampler):
    """The samplers of all ranks."""
    per_device = size // ranks // accumulation
    return [kind(lengths, has_image, global_batch_size=size, per_device_batch_size=per_device,
                 world_size=ranks, rank=rank, seed=seed, window=window) for rank in range(ranks)]


def stream(ranks, epoch=0, start=0):
    """Global batches as training sees them: each step's micro-batches of all ranks, put together, sorted."""
    for sampler in ranks:
        sampler.set_epoch(epoch)
        sampler.set_start(start)
    micro = [list(sampler) for sampler in ranks]
    for sampler, mine in zip(ranks, micro):
        assert len(mine) == len(sampler), "len() is not what is yielded"
        assert {len(m) for m in mine} <= {sampler.per_device_batch_size}
    k = ranks[0].accumulation
    steps = [sum((mine[at:at + k] for mine in micro), []) for at in range(0, len(micro[0]), k)]
    return [sorted(sum(step, [])) for step in steps]


def assert_lawful(batches, has_image, size):
    """What law 1 says of one epoch's stream."""
    pictures, n = int(has_image.sum()), len(has_image)
    for batch in batches:
        assert len(batch) == size
        assert len(set(has_image[batch].tolist())) == 1, "two modalities in one global batch"
    assert len(batches) == -(-pictures // size) + -(-(n - pictures) // size), "more batches than it takes"
    seen = np.bincount(np.concatenate(batches), minlength=n)
    assert seen.min() >= 1, f"examples never seen: {np.flatnonzero(seen == 0)}"
    for mine in (seen[has_image], seen[~has_image]):        # what fills the last batch is spread evenly
        assert len(mine) == 0 or mine.max() - mine.min() <= 1


def padding(micro_batches, lengths):
    """Fraction of all positions."""
    of = lengths[np.array(micro_batches)]                                       # (micro-batches, B)
    return 1 - of.sum() / (of.max(axis=1).sum() * of.shape[1])


# ---- one epoch ----

@pytest.mark.parametrize("pictures, texts, size", SIZES)
def test_one_modality_per_batch_and_every_example_at_least_once(pictures, texts, size):
    lengths, has_image = dataset(pictures, texts)
    for epoch in range(3):
        assert_lawful(stream(samplers(lengths, has_image, size=size), epoch), has_image, size)


def test_any_small_dataset_works():
    for pictures in range(7):
        for texts in range(0 if pictures else 1, 7):
            lengths, has_image = dataset(pictures, texts)
            for size in (1, 2, 4):
                assert_lawful(stream(samplers(lengths, has_image, size=size, window=1)), has_image, size)


@pytest.mark.parametrize("sizes", [(9, 7, 5), (1, 1, 1), (40, 3, 0), (40, 0, 3), (5, 0, 0), (130, 130, 130)])
def test_steps_of_a_robot_are_a_third_modality(sizes):
    """sizes: text only, with pictures, of a robot. The same batches on 1, 2 and 4 ranks."""
    kinds = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], sizes))
    lengths = 1 + np.random.default_rng(1).lognormal(4, 0.8, len(kinds)).astype(int)
    for epoch in range(3):
        batches = stream(samplers(lengths, kinds), epoch)
        assert {len(set(kinds[batch].tolist())) for batch in batches} == {1}
        assert len(batches) == sum(-(-n // 8) for n in sizes)
        seen = np.bincount(np.concatenate(batches), minlength=len(kinds))
        for kind, n in enumerate(sizes):                    # what fills a last batch is spread evenly
            assert n == 0 or 1 <= seen[kinds == kind].min() >= seen[kinds == kind].max() - 1
        assert stream(samplers(lengths, kinds, ranks=2), epoch) == batches
        assert stream(samplers(lengths, kinds, ranks=4, accumulation=2), epoch) == batches
        assert stream(samplers(lengths, kinds), epoch, start=1) == batches[1:]


@pytest.mark.parametrize("pictures, texts, size", SIZES)
def test_a_robot_alone_is_drawn_as_pictures_alone(pictures, texts, size):
    lengths, has_image = dataset(pictures, texts)
    want = stream(samplers(lengths, has_image, size=size))
    assert stream(samplers(lengths, 2 * has_image, size=size)) == want


def test_the_sets_that_break_prismatic_have_these_numbers_of_steps():
    steps = {(40, 0): 1, (0, 40): 1, (200, 20): 3, (130, 130): 4}
    for (pictures, texts), want in steps.items():
        ranks = samplers(*dataset(pictures, texts), ranks=4, size=128)
        assert [len(sampler) for sampler in ranks] == [want] * 4 == [len(list(sampler)) for sampler in ranks]


@pytest.mark.parametrize("seed", range(10))
def test_the_example_in_the_docstring(seed):
    lengths, has_image = np.array([5, 3, 9, 4, 2]), np.array([True, True, True, False, False])
    batches = stream(samplers(lengths, has_image, size=2, window=1, seed=seed))
    assert len(batches) == 3 and batches.count([3, 4]) == 1
    seen = Counter(sum(batches, []))
    assert sorted(seen[i] for i in (0, 1, 2)) == [1, 1, 2]      # three for four places: one comes twice
    assert 2 in batches[0]                                      # the longest


def test_one_window_over_everything_sorts_everything():
    lengths, has_image = np.array([10, 80, 30, 60, 50, 40, 70, 20]), np.zeros(8, bool)
    batches = stream(samplers(lengths, has_image, size=2))
    assert sorted(batches) == [[0, 7], [1, 6], [2, 5], [3, 4]]  # 10 20, 80 70, 30 40, 60 50
    assert batches[0] == [1, 6]                                 # the longest


def test_ranks_take_turns_with_the_longer_micro_batch():
    lengths, has_image = np.array([80, 70, 60, 50, 40, 30, 20, 10]), np.ones(8, bool)
    first, second = samplers(lengths, has_image, ranks=2, accumulation=2)
    assert list(first) == [[0, 1], [6, 7]]
    assert list(second) == [[2, 3], [4, 5]]


@pytest.mark.parametrize("pictures, texts, size", SIZES)
def test_the_longest_example_is_in_the_first_micro_batch(pictures, texts, size):
    lengths, has_image = dataset(pictures, texts)
    for epoch in range(5):                  # at once, so that memory runs out in the first step or never
        sampler, = samplers(lengths, has_image, size=size)
        sampler.set_epoch(epoch)
        assert lengths.argmax() in next(iter(sampler))


def test_after_the_first_batch_modalities_and_lengths_come_in_no_order():
    lengths, has_image = dataset(800, 800)
    batches = stream(samplers(lengths, has_image))[1:]                          # 199
    kind, length = has_image[batches][:, 0], lengths[batches].mean(axis=1)
    assert 80 < (kind[1:] != kind[:-1]).sum() < 120             # 99 expected; 1 if they came in turn
    assert abs(np.corrcoef(length[1:], length[:-1])[0, 1]) < 0.2


# ---- nothing else decides ----

@pytest.mark.parametrize("ranks, accumulation", [(1, 8), (2, 4), (8, 1), (4, 2), (2, 1), (1, 2), (4, 1)])
@pytest.mark.parametrize("pictures, texts", [(100, 20), (0, 30), (33, 0), (3, 2)])
def test_how_a_batch_is_cut_does_not_change_the_stream(ranks, accumulation, pictures, texts):
    data = dataset(pictures, texts)
    for epoch in range(3):
        assert stream(samplers(*data, ranks, accumulation), epoch) == stream(samplers(*data), epoch)


def test_same_seed_and_epoch_same_stream_and_otherwise_another():
    data = dataset(100, 20)
    ways = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    one, two = ([stream(samplers(*data, seed=seed), epoch) for seed, epoch in ways] for _ in range(2))
    assert one == two
    assert len({str(sorted(got)) for got in one}) == 16         # nor the same batches in another order


def test_what_ran_before_does_not_matter():
    ranks, fresh = samplers(*dataset(50, 9)), samplers(*dataset(50, 9))
    np.random.seed(1)
    for epoch in (0, 4, 2):
        stream(ranks, epoch, start=1)
    np.random.seed(2)                       # numpy's own generator neither decides ...
    want = stream(fresh, 3)
    assert stream(ranks, 3) == want
    assert np.random.random() == np.random.RandomState(2).random_sample()     # ... nor moves


@pytest.mark.parametrize("ranks, accumulation", [(1, 1), (2, 2)])
def test_start_continues_where_the_run_stopped(ranks, accumulation):
    mine = samplers(*dataset(50, 9), ranks, accumulation)
    whole = stream(mine, epoch=1)
    assert len(whole) == mine[0].batches_per_epoch == 9         # 7 of pictures, 2 of texts
    for k in range(10):
        assert stream(mine, epoch=1, start=k) == whole[k:]
        assert len(mine[0]) == (9 - k) * accumulation


def test_workers_do_not_change_the_stream():
    sampler, = samplers(*dataset(50, 9), accumulation=2)
    for workers in (0, 2):
        loader = DataLoader(range(59), batch_sampler=sampler, num_workers=workers)
        assert [batch.tolist() for batch in loader] == list(sampler) and len(loader) == len(sampler)


# ---- like lengths ----

def test_like_lengths_sit_together():
    data = lengths, has_image = dataset(9000, 1000)
    at_random = np.random.default_rng(0).permutation(10_000).reshape(-1, 8)
    ours = [padding(stream(samplers(*data, window=window)), lengths) for window in (1, 4, 16, 64)]
    assert padding(at_random, lengths) > 0.5
    assert ours[0] > ours[1] > ours[2] > ours[3]                # the wider the window, the closer the lengths
    assert ours[3] < 0.07                                       # tests/bench_sampler.py has real sizes


@pytest.mark.parametrize("patches", [256, 576])
def test_little_is_padded_and_ranks_hardly_wait_on_a_mix_like_llavas(patches):
    """665,000 examples, 8 ranks x 16: what docs/batches.md says, and that random order is far from it."""
    text, has_image = bench_sampler.draw(665_000, patches, tail=0.8)
    lengths = text + patches * has_image
    assert text[has_image].mean() == pytest.approx(140, abs=1)
    assert text[~has_image].mean() == pytest.approx(880, abs=1)

    def waste(kind):
        ranks = [bench_sampler.make(kind, lengths, has_image, 8, rank) for rank in range(8)]
        return bench_sampler.fractions(lengths, ranks)[:2]

    padded, lost = waste(SplitModalitySampler)
    assert padded <= 0.01 and lost <= 0.05
    padded, lost = waste(bench_sampler.RandomOrder)
    assert padded > 0.3 and lost > 0.3


def test_ranks_have_like_work():
    """Ranks meet once per step: a rank's micro-batches together count, against those of the slowest rank."""
    lengths, has_image = dataset(9000, 1000)
    ranks = samplers(lengths, has_image, ranks=4, accumulation=2, size=64, window=64)
    micro = np.array([list(sampler) for sampler in ranks]).reshape(4, -1, 2, 8)  # (W, steps, accumulation, B)
    cost = lengths[micro].max(axis=3).sum(axis=2)                                # (W, steps)
    assert cost.sum() > 0.95 * 4 * cost.max(axis=0).sum()


# ---- bad arguments ----

@pytest.mark.parametrize("change, message", [
    (dict(global_batch_size=12), "12 is no multiple of per_device_batch_size 4 x 2 ranks = 8"),
    (dict(rank=2), "rank 2 is none of 0 to 1"),
    (dict(rank=-1), "rank -1"),
    (dict(global_batch_size=0), "global_batch_size is 0"),
    (dict(per_device_batch_size=-4), "per_device_batch_size is -4"),
    (dict(world_size=0), "world_size is 0"),
    (dict(seed=-1), "seed is -1"),
    (dict(window=-3), "window is -3"),
    (dict(lengths=np.ones((4, 2), int), has_image=np.ones((4, 2), bool)), r"lengths \(4, 2\)"),
    (dict(lengths=np.array([], int), has_image=np.array([], bool)), "at least 1"),
    (dict(has_image=np.ones(4, bool)), r"lengths \(5,\) and has_image \(4,\)"),
])
def test_a_bad_argument_is_named(change, message):
    good = dict(lengths=np.arange(5), has_image=np.ones(5, bool), global_batch_size=8,
                per_device_batch_size=4, world_size=2, rank=0, seed=0)
    SplitModalitySampler(**good)
    with pytest.raises(ValueError, match=message):
        SplitModalitySampler(**good | change)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_start_outside_the_epoch_is_named(step):
    sampler, = samplers(*dataset(50, 9))
    with pytest.raises(ValueError, match=f"start {step}"):
        sampler.set_start(step)


# ---- these checks can fail ----

class Mixed(SplitModalitySampler):
    """Sorts by length alone."""
    def global_batches(self):
        return np.resize(np.argsort(-self.lengths), self.batches_per_epoch * 8).reshape(-1, 8)


class DropsTheRest(SplitModalitySampler):
    """Sees full batches only: the last one repeats the first."""
    def global_batches(self):
        batches = super().global_batches()
        return np.concatenate([batches[:-1], batches[:1]])


class SeededByRank(SplitModalitySampler):
    """Each rank shuffles for itself."""
    def global_batches(self):
        return np.random.default_rng((self.epoch, self.rank)).permutation(super().global_batches())


class CountsExamples(SplitModalitySampler):
    """The len() of a sampler that yields single indices."""
    def __len__(self):
        return super().__len__() * self.per_device_batch_size


@pytest.mark.parametrize("kind, message", [
    (Mixed, "two modalities"), (DropsTheRest, "never seen"), (CountsExamples, "len()")])
def test_an_unlawful_stream_would_be_caught(kind, message):
    data = dataset(40, 24)
    with pytest.raises(AssertionError, match=message):
        assert_lawful(stream(samplers(*data, kind=kind)), data[1], 8)


def test_ranks_that_disagree_would_be_caught():
    data = dataset(100, 20)
    one, two = (stream(samplers(*data, ranks=n, kind=SeededByRank)) for n in (1, 2))
    assert one != two


def test_of_equally_long_batches_one_with_pictures_comes_first():
    has_image = np.arange(40) < 20
    for seed in range(10):
        assert has_image[stream(samplers(np.full(40, 9), has_image, seed=seed))[0]].all()


def test_what_to_do_where_a_batch_cannot_be_cut_is_said():
    """A run that continues may change --per_device_batch_size, but not its global batch."""
    assert uneven(96, 16, 4) == ("--global_batch_size 96 can't be cut into micro-batches of 16 on 4 ranks. "
                                 "Give --per_device_batch_size 12, a run may also continue with it")
    assert "Choose a multiple of 80; a run that continues keeps its batch" in uneven(96, 16, 5)
