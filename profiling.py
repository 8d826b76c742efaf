"""The card and the clock: which numbers a GPU is fast with, what metrics.jsonl says of a step's time and
memory, and where the time of a step goes.

The last is --profile N: a trace to look into, and a table of phases. The loop names its phases, `with
phase("backward"): ...`; those of the model are found by hooks on its modules. Without --profile no clock is
read. With it, a GPU is waited for at both ends of each phase: the times are true, and the whole is a little
slower than without.
"""
import re
import resource
import sys
import time
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.pytorch_utils import Conv1D

from model import blocks

# The most that a card's tensor cores can do with 16-bit numbers [TFLOP/s], from NVIDIA's data sheets: without
# sparsity, sums in fp32. A word of the card's name -> the number; the first that fits counts.
PEAKS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10": 125,
         "A30": 165, "A40": 150, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65, "RTX A6000": 155,
         "RTX 4090": 165, "RTX 3090": 71}

WARM = 2                                                    # steps before the first one that is timed
seconds = None                                              # phase -> seconds; None: nobody asks


def working_type(precision, device):
    """The type in which a device computes matrix products, of 16 bits if it can (see `train_step`).

    auto: bf16 where it is built in (NVIDIA since the A100, which is compute capability 8, and AMD), fp16 on
    V100 and T4 (7), fp32 elsewhere. A card without bf16 imitates it, slowly, and torch does not say so.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return torch.bfloat16 if capability >= 8 else torch.float16 if capability == 7 else torch.float32


# -- metrics.jsonl -------------------------------------------------------------------------------------------

class Speed:
    """The clock of the loop. start: steps done before this start of the run; total: of the whole run. Both go
    into each line, so it can be seen where a run was started again, and where it was extended.

    A step's time runs from `begin` to `metrics`, which tells it to metrics.jsonl. Its data wait is what is
    spent in `waiting`, for the batch of the step behind it: the loop reads one step ahead. (A GPU may be at
    work meanwhile. If the wait grows all the same, the data workers are too slow.)
    """

    def __init__(self, model, device, dtype, start, total):
        self.flop, self.device, self.first = flop_of(model), device, None
        self.start, self.total, self.left = start, total, total - start
        peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * dist.get_world_size() if peak and dtype != torch.float32 else None
        self.begin()

    def begin(self):
        self.began, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self):
        began = time.perf_counter()
        with phase("data wait"):
            yield
        self.waited += time.perf_counter() - began

    def metrics(self, counts):
        """counts: those of `count_together`. seconds_left is a guess from all steps of this start but the
        first, in which memory is found and kernels are loaded. mfu: see `flop_of`; None where the card's peak
        is not known, and in fp32."""
        end, self.left = time.perf_counter(), self.left - 1
        seconds, (since, done) = end - self.began, self.first or (end, 0)
        self.first = since, done + 1
        return {"tokens": counts["tokens"], "positions": counts["positions"],
                "padding": 1 - counts["real"] / counts["positions"], "replaced": counts["replaced"],
                "modality": "image" if counts["pictures"] else "text",
                "start": self.start, "total": self.total,
                "data_wait": self.waited / seconds, "tokens_per_second": counts["real"] / seconds,
                "mfu": self.flop(counts) / seconds / self.peak if self.peak else None,
                "peak_memory_gb": peak_memory(self.device),
                "seconds_left": (end - since) / done * self.left if done else None}


def flop_of(model):
    """-> a function: counts of a step -> the FLOP (multiplications and additions) that it needs.

    As in PaLM (arXiv 2204.02311, appendix B). A vector times a matrix of n numbers is 2 n FLOP. Backward: 2 n
    for the gradient of the vector, if something in front of the matrix trains, and 2 n for that of the
    matrix, if it trains itself. So 6 n where all trains, 4 n in a frozen LLM behind a projector that trains,
    2 n in a frozen vision model. Attention: two products for each pair of positions; half of the pairs where
    it is causal. The output layer works where a token is learned. What is done beyond that (for padding, for
    activations that are recomputed, elementwise) does not count.

    MFU, "model FLOP utilization", is this FLOP per second, as a share of what the cards could do at most.
    """
    def both_ways(matrices, trains):
        """FLOP of a vector through these matrices, one behind the other. trains: what is in front of them."""
        flop = 0
        for matrix in matrices:
            flop += matrix.numel() * (2 + 2 * trains + 2 * matrix.requires_grad)
            trains |= matrix.requires_grad
        return flop

    vision, towers = "vision" in model.trained, []
    for tower, skip in zip(model.vision.models, model.vision.skip):
        layers = blocks(tower)[:-1]
        pair = 4 * len(layers) * tower.config.hidden_size * (3 if vision else 1)
        towers.append((both_ways(matrices_of(tower, nn.Conv2d), False),
                       both_ways(matrices_of(layers, nn.Linear), vision), pair, skip))
    patch = both_ways(matrices_of(model.projector, nn.Linear), vision)
    word = both_ways(matrices_of(model.llm.base_model, (nn.Linear, Conv1D)), True)
    learned = both_ways([model.llm.get_output_embeddings().weight], True)
    about = model.llm.config
    head = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    word_pair = 4 / 2 * 3 * about.num_hidden_layers * about.num_attention_heads * head

    def flop(counts):
        patches, pictures = counts["patches"], counts["pictures"]
        seen = 0
        for cut, through, pair, skip in towers if pictures else ():     # skip: CLS and registers
            positions = patches / pictures + skip
            seen += patches * cut + pictures * (positions * through + positions ** 2 * pair)
        return (seen + patches * patch + counts["real"] * word + counts["pairs"] * word_pair
                + counts["tokens"] * learned)
    return flop


def matrices_of(module, kinds):
    return [each.weight for each in module.modules() if isinstance(each, kinds)]


def peak_of(card):
    """A card's name, as its driver tells it -> FLOP/s; None where it is not in the table."""
    words = re.split(r"[\s-]+", card)
    return next((peak * 1e12 for name, peak in PEAKS.items() if set(name.split()) <= set(words)), None)


def peak_memory(device):
    """The most that this process has held so far [GB]: on a GPU in tensors, on a CPU altogether; None on the
    GPU of a Mac, which does not tell."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return None if device.type == "mps" else torch.accelerator.max_memory_allocated(device) / 1e9


# -- --profile -----------------------------------------------------------------------------------------------

def now():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def phase(name):
    if seconds is None:
        yield
        return
    with record_function(name):
        began = now()
        yield
        seconds[name] = seconds.get(name, 0) + now() - began


@contextmanager
def unwatched():
    """What is done here is no part of a step's table."""
    global seconds
    asked, began, seconds = seconds, now() if seconds is not None else 0, None
    try:
        yield
    finally:
        seconds = asked
        if seconds is not None:
            seconds["validation"] = seconds.get("validation", 0) + now() - began


class StepProfile:
    """Watches `steps` steps of this process after the first WARM, then writes `file` and prints the table."""

    def __init__(self, steps, model, file):
        self.steps, self.file, self.count = steps, file, 0
        phases = {"forward": model, "vision": model.vision, "projector": model.projector,
                  "LLM forward": model.llm.base_model}
        for name, module in phases.items() if steps else ():
            opened = []                                     # one hook opens the phase, the other closes it
            module.register_forward_pre_hook(partial(open_phase, name, opened))
            module.register_forward_hook(partial(close_phase, opened))

    def step(self):
        """Call it where a step begins."""
        global seconds
        if self.steps and self.count == WARM:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.trace = profile(activities=activities)
            self.trace.start()
            seconds, self.began = {}, now()
        if self.steps and self.count == WARM + self.steps:
            whole, phases, seconds = now() - self.began, seconds, None
            self.trace.stop()
            self.trace.export_chrome_trace(str(self.file))
            self.show(whole, phases)
        self.count += 1

    def end(self):
        """Behind the last step. A run that was too short shows what there was."""
        if seconds is not None:
            self.steps = self.count - WARM
            self.step()

    def show(self, whole, phases):
        model = sum(phases.get(name, 0) for name in ("vision", "projector", "LLM forward"))
        phases["logits and loss"] = phases.pop("forward") - model
        phases["other: the loop itself"] = whole - sum(phases.values())
        print(f"\n{self.steps} steps of {whole / self.steps:.3f} s")
        for name, of_it in phases.items():
            print(f"{of_it / whole:7.1%}  {name}")
        sent = sum(event.device_time_total or event.cpu_time_total for event in self.trace.key_averages()
                   if event.key in ("nccl:all_reduce", "gloo:all_reduce")) / 1e6
        print(f"{sent / whole:7.1%}  all-reduce, while the others run")
        print(f"trace    {self.file}, for ui.perfetto.dev", flush=True)


def open_phase(name, opened, *_):
    opened.append(phase(name))
    opened[-1].__enter__()


def close_phase(opened, *_):
    opened.pop().__exit__(None, None, None)
