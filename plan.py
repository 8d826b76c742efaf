"""Will it fit? What a run takes of one GPU, and how long it takes, counted before a GPU is rented.

    python plan.py --gpus 8 --card H100 ...flags of train.py...         # the longest batch of --train_json
    python plan.py --gpus 8 --memory 80 --positions 760 ...             # examples of this length

The model is built from its config.json alone, and runs train.py's own step on fake tensors (ledger.py). On a
CPU with real numbers the same step takes the same memory, to the byte (tests/test_plan.py).

A GPU holds more than tensors. RESERVE is kept free for that:

    CUDA's context and kernels      about 0.5 GB, before the first tensor
    cuBLAS, cuDNN                   32 MiB of work space on Hopper, 8 on others; more for convolutions
    attention kernels               in backward, fp32 sums as large as the queries of one layer
    NCCL                            buffers, some 0.1 GB for each group of ranks
    the allocator                   rounds up to 512 bytes, and leaves gaps, which grow as lengths change

Two more things differ, because autocast and attention are the CPU's here. On a GPU LayerNorm gives fp32 under
autocast; on a CPU it gives the type that it got, half as large where a *frozen* LLM has LayerNorms (GPT-2;
not Llama's RMSNorms). And dropout inside attention (GPT-2) takes a slower kernel on a CPU, which keeps more.
"""
import functools
import os
from bisect import bisect
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import config
import presets
from config import BadExample, Config, UserError, knob

# card -> memory [GB], dense bf16 and fp32 [TFLOP/s]: Nvidia's data sheets ("with sparsity" is twice as much),
# for RTX the white papers of GA102 and Ada (sums in fp32). 0: no bf16 units. A GB is 10^9 bytes, here too;
# most cards hold up to 7 % more.
CARDS = {"H200": (141, 989, 67), "H100": (80, 989, 67), "H100-PCIe": (80, 756, 51), "A100": (80, 312, 19.5),
         "A100-40": (40, 312, 19.5), "L40S": (48, 362, 91.6), "L4": (24, 121, 30.3),
         "A6000": (48, 155, 38.7), "RTX4090": (24, 165, 82.6), "RTX3090": (24, 71, 35.6),
         "V100": (16, 0, 15.7), "V100-32": (32, 0, 15.7), "T4": (16, 0, 8.1)}
RESERVE = 1.5                                                                               # GB, see above
# What may take less. A flag that there is not, or that is set already, is left out.
VARIANTS = ({"gradient_checkpointing": True}, {"lora_rank": 32}, {"shard": "all"},
            {"shard": "all", "gradient_checkpointing": True})


@dataclass(frozen=True)
class Question(Config):
    """train.py's flags and these. It is never made, only its parser is."""
    gpus: int = knob(1, "ranks, one GPU each")
    memory: float = knob(0.0, "of one GPU; 0 = what the card has", "GB = 10^9 bytes")
    gpus_per_machine: int = knob(8, "with --shard machine: how many share one whole, if there are as many")
    card: str = knob("", f"for its memory and the hours: {', '.join(CARDS)}")
    mfu: float = knob(0.4, "share of the card's peak that a step reaches; recomputing counts as work")
    positions: int = knob(0, "length of each example, patches included; 0 = as the longest of train_json")
    pictures: int = knob(1, "of each example, with --positions")
    examples: int = knob(0, "of an epoch, with --positions: for its hours")
    picture: str = knob("runs/plan.png", "memory over the step is drawn into this file; empty = not")
    one_line: bool = knob(False, "nothing but the peak, as train.py shows it")


def parse(argv=None):
    """-> own flags, Config. What only a run needs may be missing: a checkpoint, data."""
    parser = config.make_parser(Question, "What a training run takes of one GPU.")
    try:
        parser.set_defaults(**presets.defaults(argv))
        flags = vars(parser.parse_args(argv))
        own = SimpleNamespace(**{f.name: flags.pop(f.name)
                                 for f in fields(Question) if f not in fields(Config)})
        if flags["stage"] != "align" and not flags["no_align"]:
            flags["ckpt"] = flags["ckpt"] or "-"
        for name in ("train_json", "image_dir"):
            flags[name] = flags[name] or "-"
        if own.card and own.card not in CARDS:
            raise UserError(f"--card {own.card} is not in the table. Choose from {', '.join(CARDS)}, "
                            "or give --memory")
        own.memory = own.memory or CARDS.get(own.card, [0])[0]
        if not own.memory:
            raise UserError("give the --memory of one GPU in GB, or its name: --card H100")
        config.check_limits(own, {"gpus": (1, 10 ** 5), "memory": (0.1, 1e5), "mfu": (0.001, 1),
                                  "gpus_per_machine": (1, 10 ** 5), "positions": (0, 10 ** 7),
                                  "pictures": (0, 1000), "examples": (0, 10 ** 12)})
        return own, Config(**flags | {"val_json": "", "val_every": 0, "prepare": "", "num_workers": 0})
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    ASKED = parse()                                         # before torch, whose import takes seconds

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
# Not public, but there is no other way to be rank 0 of 8 alone: a group whose collectives send nothing.
from torch.testing._internal.distributed.fake_pg import FakeStore

import ranks
import shard
import train
from actions import BINS
from data import collate
from images import load_image_transforms
from ledger import PARTS, Ledger, NeedsNumbers, draw
from parallel import SLOT
from profiling import working_type
from prompts import IGNORE, IMAGE
from report import DOES_NOT_FIT, state_of
from sampler import SplitModalitySampler, uneven

CPU = torch.device("cpu")


# -- one step ------------------------------------------------------------------------------------------------

def hollow(cfg, sampler):
    """The VLM as train.py assembles it, on the device "meta": shapes, no numbers. Of a checkpoint only the
    parts that it brings are read; if there is none yet, a stage goes by the parts that it trains."""
    brings = state_of(cfg.ckpt).get("parts", ()) if cfg.ckpt else ()
    is_policy = cfg.stage == "vla"
    cfg = replace(cfg, stage="finetune", ckpt="", no_align=True, trains=",".join(cfg.trained), compile=False)
    cfg = replace(cfg, shard="no", precision=as_on_a_gpu(cfg))              # the cut comes in `spread`
    with torch.device("meta"):
        model = train.load_model(cfg, None, sampler, torch.device("meta"))[1]
    if is_policy and model.adapters and not model.adapters.rows:    # those of the action tokens
        height = model.llm.get_input_embeddings().weight.shape[0]
        model.adapters.add_rows((height - BINS, height))
    for name in set(brings) - ({"llm"} if cfg.lora_rank else set()):        # see load_vlm
        getattr(model, name).float()
    return model


def as_on_a_gpu(cfg):
    return "bf16" if cfg.precision == "auto" else cfg.precision


def spread(model, cfg, sampler):
    """Over the ranks, as train.py does it. DDP keeps a place for each gradient. After zero_grad() backward
    writes elsewhere, and under no_sync it stays there: with two and more micro-batches gradients lie in
    memory twice, until the last backward has copied them to their places."""
    if cfg.shard != "no":
        model.vision.to = lambda device: model.vision       # is there; torch can't move fake weights
        shard.cut(model, shard.make_mesh(cfg.shard, CPU), CPU, working_type(as_on_a_gpu(cfg), CPU))
        return model
    ddp = DistributedDataParallel(model, find_unused_parameters=not sampler.has_image.all(),
                                  forward_sync_buffers=False, gradient_as_bucket_view=True, init_sync=False)
    ddp.register_comm_hook(None, sent)
    return ddp


def sent(state, bucket):
    """Instead of the all-reduce, which says when it is done in a way that the fake group does not know."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def forecast(model, cfg, sampler, batch, fake=True):
    """Runs a step of train.py, of one micro-batch or of two: a third would be as the second. All weights that
    train have moments by then, as after some steps of both modalities.

    -> of one GPU: peak [bytes], parts {name: bytes at the peak}, flop of a micro-batch, curve [(time, {name:
    bytes})], marks [(time, the phase that begins)]"""
    ledger, marks = Ledger(fake, model.llm.get_output_embeddings().weight.shape[0]), []
    cfg, scaler = replace(cfg, precision=as_on_a_gpu(cfg)), torch.amp.GradScaler("cpu", enabled=False)
    micro_batches = [batch] * min(2, sampler.accumulation)
    tokens = int((batch["labels"][:, 1:] != IGNORE).sum()) * len(micro_batches) * sampler.world_size

    def begins(phase, *_):
        marks.append((ledger.time, phase))

    def optimizer_begins(*_):
        begins("optimizer")
        ledger.rename("gradients", *(weight.grad for weight in trained))            # those of FSDP2
    with ledger:
        if fake:
            model.to_empty(device=CPU)
            model.llm.tie_weights()
        wrapped = spread(model, cfg, sampler)
        ledger.names = ["gradients"] * len(ledger.names)    # what is new are DDP's places for them
        ledger.rename("weights", *model.parameters(), *model.buffers())
        optimizer = train.make_optimizer(model, cfg)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ledger.rename("moments", *(value for state in optimizer.state.values() for value in state.values()))
        ledger.rename("batch", batch["input_ids"], batch["labels"], batch["places"], batch["pixel_values"])
        for weight in trained:
            weight.register_post_accumulate_grad_hook(lambda weight: ledger.rename("gradients", weight.grad))
        wrapped.register_forward_pre_hook(functools.partial(begins, "forward"))
        wrapped.register_forward_hook(functools.partial(begins, "backward"))
        optimizer.register_step_pre_hook(optimizer_begins)
        ledger.flop, start = 0, ledger.time
        train.train_step(wrapped, optimizer, scaler, micro_batches, tokens, cfg, CPU)
    curve = ledger.curve(start)
    peak, parts = max(((sum(now.values()), now) for _, now in curve), key=lambda found: found[0])
    return SimpleNamespace(peak=peak, parts=parts, flop=ledger.flop // len(micro_batches), curve=curve,
                           marks=marks)


# -- the data ------------------------------------------------------------------------------------------------

class Examples:
    """What is forecast with: the first batch of an epoch, where the longest example of the data stands. Or,
    with --positions, examples of that length: pictures, then text that is all supervised."""

    def __init__(self, cfg, own):
        self.cfg, self.gpus, self.count = cfg, own.gpus, own.examples
        if not own.positions:
            for path in cfg.train_json.split(","):
                if not Path(path).is_file():
                    there = "is missing" if path == "-" else f"{path} is not here"      # "-": see parse
                    raise UserError(f"--train_json {there}. Give --positions, the length of the longest "
                                    "example, patches included")
            *_, loader = train.load_data(cfg, CPU)
            self.data, sampler = loader.dataset, loader.batch_sampler
            self.lengths, self.has_image = sampler.lengths, sampler.has_image
            self.count, self.first = len(self.lengths), sampler.global_batches()[0].tolist()
            return
        transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize, cfg.openvla_vision)
        patches = own.pictures * transforms[0].patches
        if patches + 2 > own.positions:
            raise UserError(f"--positions {own.positions} has no room for {own.pictures} pictures of "
                            f"{transforms[0].patches} patches and a text. Give more, or --pictures 0")
        ids = torch.ones(own.positions, dtype=torch.long)
        ids[1:1 + patches] = IMAGE                          # behind BOS
        labels = torch.where(torch.arange(own.positions) <= patches, IGNORE, ids)
        images = [[torch.zeros(3, t.size, t.size, dtype=torch.uint8) for t in transforms]] * own.pictures
        self.data = [dict(input_ids=ids, labels=labels, images=images, id="", source="", replaced=0)]
        self.lengths = np.full(cfg.global_batch_size, own.positions)
        self.has_image = np.full(cfg.global_batch_size, own.pictures > 0)
        self.first = [0] * cfg.global_batch_size

    def sizes(self):
        """Micro-batches that the global batch can be cut into."""
        whole = self.cfg.global_batch_size
        return [size for size in range(1, whole // self.gpus + 1) if whole % (size * self.gpus) == 0]

    def sampler(self, size):
        return SplitModalitySampler(self.lengths, self.has_image, per_device_batch_size=size, rank=0,
                                    global_batch_size=self.cfg.global_batch_size, world_size=self.gpus,
                                    seed=self.cfg.seed, window=self.cfg.length_window)

    @functools.cache
    def forecast(self, cfg, size):
        batch, sampler = collate([self.data[i] for i in self.first[:size]]), self.sampler(size)
        if isinstance(batch, BadExample):
            raise batch
        model, slots = hollow(cfg, sampler), int((batch["input_ids"][0] == SLOT).sum())
        if slots:                                           # --decode parallel
            width = model.llm.get_input_embeddings().embedding_dim
            model.projector.slots = torch.nn.Parameter(torch.empty(slots, width, device="meta"))
        try:
            return forecast(model, cfg, sampler, batch)
        except NeedsNumbers as e:
            raise UserError(f"{cfg.llm_backbone} decides by its numbers what to compute, as models with "
                            f"experts do; such a step can't be counted without numbers ({e})") from e

    def largest(self, cfg, room):
        """-> the largest micro-batch that fits, 0 if not even one example does. A whole share is tried first:
        under DDP a second micro-batch takes more than its own memory (see `spread`)."""
        *sizes, whole = self.sizes()
        if self.forecast(cfg, whole).peak <= room:
            return whole
        fit = bisect(sizes, False, key=lambda size: self.forecast(cfg, size).peak > room)
        return sizes[fit - 1] if fit else 0

    def positions(self, size):
        """Of all micro-batches of an epoch, padding included."""
        if len(self.data) == 1:
            return self.count * len(self.data[0]["input_ids"])
        return int(self.lengths[self.sampler(size).global_batches()].reshape(-1, size).max(1).sum()) * size


# -- the answer ----------------------------------------------------------------------------------------------

def main(own, cfg):
    picture = Path(own.picture)
    if own.picture and picture.exists() and not picture.read_bytes().startswith(b"\x89PNG"):
        raise UserError(f"--picture {picture} is there and no PNG. Choose another name")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=own.gpus)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", min(own.gpus, own.gpus_per_machine)))     # torchrun's word
    if cfg.shard == "machine" and own.gpus % here:
        raise UserError(f"--gpus {own.gpus} are no whole machines of --gpus_per_machine {here}")
    os.environ["LOCAL_WORLD_SIZE"] = str(here)
    examples = Examples(cfg, own)
    size = min(cfg.per_device_batch_size, max(1, cfg.global_batch_size // own.gpus))
    if size not in examples.sizes():
        raise UserError(uneven(cfg.global_batch_size, size, own.gpus))
    found, room = examples.forecast(cfg, size), (own.memory - RESERVE) * 1e9
    unit, per = ("GB", 1e9) if found.peak > 1e9 else ("MB", 1e6)
    if own.one_line:
        parts = ", ".join(f"{name} {found.parts[name] / per:.1f}" for name in PARTS if found.parts.get(name))
        # The more examples at once, the fewer kernels for each: a large GPU waits less for the CPU.
        larger = found.peak < room / 2 and examples.sampler(size).accumulation > 1
        print(f"memory   {found.peak / per:.1f} {unit} at the peak of a step ({parts}); the GPU has "
              f"{own.memory:.1f} GB, {RESERVE} of them kept free"
              + f". There is room for a --per_device_batch_size above {size}" * larger)
        return 0 if found.peak <= room else DOES_NOT_FIT
    length, times = int(examples.lengths[examples.first[:size]].max()), examples.sampler(size).accumulation
    print(f"{cfg.preset} {cfg.stage}, trains {','.join(cfg.trained)}: {size} x {length} positions a "
          f"micro-batch, {times} a step, on {own.gpus} GPUs\n\n{unit} of one GPU at the peak of a step")
    for name, (_, about) in PARTS.items():
        print(f"  {name:<12}{found.parts.get(name, 0) / per:8.2f}   {about}")
    print(f"  {'peak':<12}{found.peak / per:8.2f}   {'fits' if found.peak <= room else 'DOES NOT FIT'} in "
          f"{own.memory:g} GB, of which {RESERVE} are kept for what is not counted\n")
    flop = found.flop * times
    print(f"FLOP     {flop / 1e12:,.2f} T a step on each GPU, recomputing included")
    rate = CARDS[own.card][2 if cfg.precision == "fp32" else 1] if own.card else 0
    if rate:
        speed = rate * 1e12 * own.mfu
        hours = found.flop / (size * length) * examples.positions(size) / own.gpus / speed / 3600
        print(f"time     {flop / speed:,.2f} s such a step at {own.mfu:.0%} of {own.card}'s {rate} TFLOP/s"
              + f"; {hours:,.1f} h an epoch of {examples.count:,} examples" * (hours > 0))
    elif own.card:
        print(f"time     {own.card} has no units for bf16; see --precision fp32")
    print_variants(cfg, examples, size, room, unit, per)
    if own.picture:
        draw(found.curve, found.marks, own.memory * 1e9, picture)
        print(f"\npicture  {picture}")


def print_variants(cfg, examples, size, room, unit, per):
    """What a flag would save, and the largest micro-batch that then fits."""
    smaller = [({"per_device_batch_size": s}, s) for s in examples.sizes() if s < size][-1:]
    tries = [({}, size), *smaller, *((changes, size) for changes in VARIANTS)]
    known, given, seen = {f.name for f in fields(Config)}, examples.forecast(cfg, size).peak, []
    print(f"\n{unit:<45}peak    saved    T FLOP   largest micro-batch that fits", flush=True)
    for changes, s in tries:
        if not changes.keys() <= known or "lora_rank" in changes and "llm" not in cfg.trained:
            continue
        new = replace(cfg, **changes)
        if new in seen:
            continue
        seen.append(new)
        name = " ".join(f"--{key} {value}".removesuffix(" True") for key, value in changes.items())
        try:
            found, largest = examples.forecast(new, s), examples.largest(new, room)
        except UserError as e:                              # of flags that exclude each other
            print(f"  {name:<38}{e}", flush=True)
            continue
        flop = found.flop * examples.sampler(s).accumulation / 1e12
        print(f"  {name or 'as given':<38}{found.peak / per:9.1f}{(given - found.peak) / per:9.1f}"
              f"{flop:10,.1f}   {largest or 'none'}", flush=True)


if __name__ == "__main__":
    ranks.run(main, *ASKED)
