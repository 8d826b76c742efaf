"""Which examples make up which batch.

A global batch is what one optimizer step learns from, over all GPUs and micro-batches.

A global batch holds one modality: all its examples have pictures, or none has; a policy that trains on
conversations, too, has a third, a robot's steps. (A batch of both would pad short questions about pictures to
long texts, and a rank without a picture would leave the projector out of its backward.) Inside a global batch
lie examples of like length, so little is padded.

In stage align all examples have pictures, so nothing is split. With --length_window 0, which the presets set
there, its batches are those of a plain shuffled sampler, except that the longest comes first.

The order of the global batches depends on the dataset, the seed, the epoch and the global batch size, and
on nothing else. World size and micro-batch size only cut a global batch into micro-batches: 8 GPUs see the
same batches as one. torch's DistributedSampler does it the other way round: it shuffles all examples, gives
rank r every 8th one, and each rank makes batches of its share. Then nothing keeps modalities and lengths
together, neither in a batch nor on the ranks of one step, which wait for the slowest of them.

Worked example (also a test): lengths 5 3 9 4 2, pictures on the first three, global batch 2, window 1.
The three picture examples fill two batches, so one of them is seen twice; the two texts fill one.
Three batches: the one with the longest example comes first, the others in random order.
"""
import numpy as np


def uneven(global_batch_size, per_device_batch_size, world_size):
    """The sentence for a user whose global batch can't be cut into such micro-batches."""
    share, rest = divmod(global_batch_size, world_size)
    best = max(size for size in range(1, per_device_batch_size + 1) if share % size == 0)
    advice = (f"Choose a multiple of {per_device_batch_size * world_size}; a run that continues keeps its "
              "batch, so start it on a number of ranks that divides it" if rest else
              f"Give --per_device_batch_size {best}, a run may also continue with it")
    return (f"--global_batch_size {global_batch_size} can't be cut into micro-batches of "
            f"{per_device_batch_size} on {world_size} ranks. {advice}")


class SplitModalitySampler:
    """Yields one rank's micro-batches, each a list of example indices.

    lengths                (n,) positions of each example, patches included
    has_image              (n,) bool, or numbers of modalities: 0 text only, 1 with pictures, 2 a robot's step
    global_batch_size      examples per optimizer step;
                           must be a multiple of per_device_batch_size * world_size
    per_device_batch_size  examples per micro-batch
    window                 examples are sorted by length over this many global batches; with 0 and with 1 the
                           batches are random, and only inside a batch like lengths share a micro-batch

    Every example comes at least once an epoch. Where a modality does not fill its last batch, examples of
    the same modality, from the start of its shuffled order, are seen again. `len()` is the number of
    micro-batches that the next iteration yields. The idea is from LLaVA and Prismatic
    (arXiv 2402.07865, section 3).
    """

    def __init__(self, lengths, has_image, *, global_batch_size, per_device_batch_size, world_size, rank,
                 seed, window=64):
        for name, value, least in (("global_batch_size", global_batch_size, 1), ("world_size", world_size, 1),
                                   ("per_device_batch_size", per_device_batch_size, 1), ("seed", seed, 0),
                                   ("window", window, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        per_step = per_device_batch_size * world_size
        if global_batch_size % per_step:
            raise ValueError(f"global_batch_size {global_batch_size} is no multiple of per_device_batch_size "
                             f"{per_device_batch_size} x {world_size} ranks = {per_step}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is none of 0 to {world_size - 1}")
        self.lengths = np.asarray(lengths)
        self.has_image = np.asarray(has_image)
        if self.lengths.ndim != 1 or len(self.lengths) == 0 or self.lengths.shape != self.has_image.shape:
            raise ValueError(f"lengths {self.lengths.shape} and has_image {self.has_image.shape} "
                             "must be two arrays of the same length, at least 1")
        self.global_batch_size, self.per_device_batch_size = global_batch_size, per_device_batch_size
        self.world_size, self.rank, self.seed, self.window = world_size, rank, seed, window
        self.accumulation = global_batch_size // per_step   # micro-batches per rank and optimizer step
        self.modalities = [np.flatnonzero(self.has_image == kind) for kind in (2, 1, 0)]
        self.batches_per_epoch = sum(-(-len(indices) // global_batch_size) for indices in self.modalities)
        self.epoch = self.start = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_start(self, step):
        """Begin at this global batch of the epoch. Nothing is read to get there."""
        if not 0 <= step <= self.batches_per_epoch:
            raise ValueError(f"start {step} is none of 0 to {self.batches_per_epoch}, "
                             "the batches of an epoch")
        self.start = step

    def __len__(self):
        return (self.batches_per_epoch - self.start) * self.accumulation

    def global_batches(self):
        """(batches_per_epoch, global_batch_size) example indices, longest first inside each batch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = []
        for indices in filter(len, self.modalities):
            order = rng.permutation(indices)
            order = np.resize(order, -(-len(order) // self.global_batch_size) * self.global_batch_size)
            batches.append(self._sorted_in_windows(order).reshape(-1, self.global_batch_size))
        batches = np.concatenate(batches)                   # (batches, G)
        rng.shuffle(batches)
        # The longest batch comes first: if memory runs out, then in the first step, not after hours.
        # Of equals (cut to one length, say) one with pictures: the vision backbone takes memory too.
        longest = np.lexsort((self.has_image[batches[:, 0]], self.lengths[batches].max(axis=1)))[-1]
        batches[[0, longest]] = batches[[longest, 0]]
        return batches

    def _sorted_in_windows(self, order):
        """By length, longest first, within each window of global batches."""
        batch = np.arange(len(order)) // (self.global_batch_size * max(self.window, 1))
        return order[np.lexsort((-self.lengths[order], batch))]

    def __iter__(self):
        for batch in self.global_batches()[self.start:]:
            # Longest first, so neighbours are alike: cut into micro-batches, then deal these to the ranks
            # back and forth (0 1 2 3 3 2 1 0), so that no rank gets the longer one each time.
            micro = batch.reshape(self.accumulation, self.world_size, self.per_device_batch_size)
            for i in range(self.accumulation):
                place = self.rank if i % 2 == 0 else self.world_size - 1 - self.rank
                yield micro[i, place].tolist()
