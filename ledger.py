"""A ledger of memory: while torch works, which storages come, which go, and what each was for.

A tensor is a view of a storage, and a storage is what takes memory. torch calls a TorchDispatchMode for each
operation, below autograd: so backward, the optimizer and recomputing are seen as they are. With `fake` the
operations run on fake tensors. They have a shape, a type and a storage, but no numbers: nothing is computed,
no memory is taken, and the ledger is the same.
"""
import weakref
from collections import Counter
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
# Not public: torch has no public way to fake tensors and to see operations. Its own memory tracker is made of
# these. requirements.txt pins the version.
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensor, FakeTensorMode, unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten, NeedsNumbers = torch.ops.aten, (DataDependentOutputException, DynamicOutputShapeException)
# FlopCounterMode's formulas. The mode itself must stay out: it holds on to what is recomputed, and the peak
# grows by a fifth. It does not know the attention of the CPU, which does what the GPU's does.
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}


# What memory is for -> its color in the picture, and a word about it. From below, as they lie on each other.
PARTS = {"weights": ("#4e79a7", "fp32 where they train or come from --ckpt, else bf16"),
         "moments": ("#59a14f", "AdamW's two averages of each weight that trains, fp32"),
         "gradients": ("#f28e2b", "fp32; DDP keeps a place for each all the time"),
         "copies": ("#76b7b2", "of weights, bf16 for autocast; with --shard what is gathered and sent"),
         "activations": ("#e15759", "what backward needs of forward, and what passes by"),
         "logits": ("#b07aa1", "at the supervised positions"),
         "batch": ("#9c755f", "ids, labels, pixels")}


def storages_of(*values):
    """Of all tensors among the arguments or results of an operation; with FSDP2, of this rank's slices."""
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.to_local() if hasattr(value, "to_local") else value
            if isinstance(value, FakeTensor) or not value.is_meta:
                yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from storages_of(*value)


class Ledger(TorchDispatchMode):
    """`with ledger:` what torch does inside is written down.

    fake: floating-point numbers are fake. Integers stay real (ids, labels, masks, places), because they are
    small and the program looks at them: which positions are supervised? To a question about a fake number,
    such as whether the loss is finite, the answer is 1.
    vocabulary: a tensor as wide as this holds logits.
    """

    def __init__(self, fake, vocabulary):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        self.vocabulary = vocabulary
        self.alive = {}                                     # id of a storage -> [reference, bytes, number]
        self.names = []                                     # number of a storage -> what it is for
        self.entries = []                                   # (time, number of a storage, bytes more or less)
        self.resized = set()                                # ids of those that FSDP2 may resize
        self.time = self.flop = 0                           # time: operations so far

    def __enter__(self):
        if self.fake:
            self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.fake:
            self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device                      # two thirds of all calls
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented                           # FSDP2's DTensor: calls again with what is in it
        if self.fake and len(self.fake.enter_stack) > 1:    # it only asks which shape the whole would have
            return func(*args, **kwargs or {})
        kwargs, self.time = kwargs or {}, self.time + 1
        result, name = self.run(func, args, kwargs), "activations"
        if func is aten._to_copy.default and self.name_of(args[0]) == "weights":
            name = "copies"                                 # autocast's, in bf16
        elif isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocabulary,):
            name = "logits"
        for storage in storages_of(*args, *kwargs.values()):
            self.track(storage, "batch")
        for storage in storages_of(result):
            self.track(storage, name)
        if func.namespace in ("c10d", "fsdp"):              # whole weights, gathered from the ranks' slices
            self.rename("copies", args, kwargs.get("out"), only="activations")
            self.resized |= {id(storage) for storage in storages_of(kwargs.get("out"))}
        for key in self.resized & self.alive.keys():        # FSDP2 empties them, which is no operation
            self.track(self.alive[key][0](), "copies")
        if func.overloadpacket in FORMULAS:
            self.flop += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def run(self, func, args, kwargs):
        if self.fake is None:
            return func(*args, **kwargs)
        tensors = [x for value in (*args, *kwargs.values())
                   for x in (value if isinstance(value, (list, tuple)) else [value])
                   if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            if func in (aten.item.default, aten._local_scalar_dense.default):
                return 1.0 if args[0].is_floating_point() else 1
            if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
                with unset_fake_temporarily():
                    args = args[0], args[1][0].nonzero().unbind(1)      # which ones the mask means
            return func(*args, **kwargs)
        real = any(not x.is_meta for x in tensors)
        result = None if real else func(*args, **kwargs)    # made of nothing, or of a shape on "meta"
        if real or not tensors and isinstance(result, torch.Tensor) and not result.is_floating_point():
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return result

    def track(self, storage, name):
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            # When a storage dies, another may get its address. The reference tells of the death at once.
            self.alive[key] = [weakref.ref(storage, partial(self.died, key)), 0, len(self.names)]
            self.names.append(name)
        seen = self.alive[key]
        if size != seen[1]:
            self.entries.append((self.time, seen[2], size - seen[1]))
            seen[1] = size

    def died(self, key, _):
        _, size, number = self.alive.pop(key)
        self.entries.append((self.time, number, -size))

    def name_of(self, tensor):
        seen = self.alive.get(id(tensor.untyped_storage()))
        return seen and self.names[seen[2]]

    def rename(self, name, *tensors, only=None):
        """Says what storages are for; the ledger then says so of their past, too."""
        for storage in storages_of(*tensors):
            self.track(storage, name)
            number = self.alive[id(storage)][2]
            if only in (None, self.names[number]):
                self.names[number] = name

    def curve(self, start):
        """-> [(time, {name: bytes})], an item for each entry since `start`"""
        now, found = Counter(), []
        for time, number, more in self.entries:
            now[self.names[number]] += more
            if time >= start:
                found.append((time, dict(now)))
        return found


# -- the picture ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 1000, 500                                                           # of the sheet
LEFT, RIGHT, TOP, BOTTOM = 75, 980, 65, 440                                         # of the field


def draw(curve, marks, memory, path):
    """Memory over a step, from left to right its operations.
    marks: [(time, the phase that begins)], memory: bytes that the GPU has."""
    peak, start, end = max(sum(parts.values()) for _, parts in curve), curve[0][0], curve[-1][0]
    most = 1.05 * max(peak, memory if memory < 3 * peak else 0)
    unit, per = ("GB", 1e9) if peak > 1e9 else ("MB", 1e6)
    sheet, font = Image.new("RGB", (WIDTH, HEIGHT), "white"), ImageFont.load_default(14)
    canvas = ImageDraw.Draw(sheet)

    def x(time):
        return LEFT + (time - start) * (RIGHT - LEFT) // max(end - start, 1)

    def y(size):
        return BOTTOM - round(size / most * (BOTTOM - TOP))
    highest = {}                                            # column -> its moment with the most memory
    for time, parts in curve:
        highest[x(time)] = max(highest.get(x(time), {}), parts, key=lambda parts: sum(parts.values()))
    for column in range(LEFT, RIGHT):
        parts, under = highest.get(column, parts), 0        # where nothing changed, as in the column before
        for name, (color, _) in PARTS.items():
            over = under + parts.get(name, 0)
            if y(over) < y(under):
                canvas.line([(column, y(under) - 1), (column, y(over))], color)
            under = over
    step = next(k * 10 ** e for e in range(3, 16) for k in (1, 2, 5) if k * 10 ** e > most / 8)
    for tick in np.arange(0, most, step):
        canvas.line([(LEFT - 5, y(tick)), (LEFT, y(tick))], "black")
        canvas.text((LEFT - 8, y(tick)), f"{tick / per:g} {unit}", "black", font, "rm")
    for time, phase in marks:
        canvas.line([(x(time), TOP - 22), (x(time), BOTTOM)], "#777777")
        canvas.text((x(time), TOP - 24), phase, "#444444", font, "ls" if x(time) < RIGHT - 60 else "rs")
    if memory < most:
        canvas.line([(LEFT, y(memory)), (RIGHT, y(memory))], "black", 2)
        label = canvas.textbbox((RIGHT, y(memory) - 6), f"the GPU has {memory / 1e9:g} GB", font, "rs")
        canvas.rectangle([label[0] - 3, label[1] - 2, label[2] + 3, label[3] + 2], "white")
        canvas.text((RIGHT, y(memory) - 6), f"the GPU has {memory / 1e9:g} GB", "black", font, "rs")
    for i, (name, (color, _)) in enumerate(PARTS.items()):
        canvas.rectangle([LEFT + 125 * i, BOTTOM + 25, LEFT + 125 * i + 12, BOTTOM + 37], color)
        canvas.text((LEFT + 125 * i + 18, BOTTOM + 31), name, "black", font, "lm")
    canvas.text((LEFT, 8), f"one GPU over the operations of a step: {peak / per:.2f} {unit} at the peak",
                "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
