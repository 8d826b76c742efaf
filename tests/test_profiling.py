"""profiling.py: which numbers a card is fast with, what a step costs, what a person is told of it."""
from pathlib import Path

import pytest
import torch
from helpers import world_of_one
from test_model import VISION, batches, tiny_llm
from torch.utils.flop_counter import FlopCounterMode

import profiling
from config import TRAINS
from model import VLM, VisionBackbone, make_projector
from profiling import Speed, flop_of, peak_of, working_type
from train import count_together


@pytest.mark.parametrize("card, precision, want", [
    ((8, 0), "auto", torch.bfloat16), ((9, 0), "auto", torch.bfloat16), ((12, 0), "auto", torch.bfloat16),
    ((7, 0), "auto", torch.float16), ((7, 5), "auto", torch.float16),               # V100, T4
    ((6, 1), "auto", torch.float32), ((9, 0), "fp32", torch.float32), ((7, 5), "bf16", torch.bfloat16),
    ((9, 0), "fp16", torch.float16)])
def test_a_card_computes_in_the_type_that_is_built_in(card, precision, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert working_type(precision, torch.device("cuda", 0)) == want


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_whatever_is_no_cuda_computes_in_fp32_unless_it_is_told(device):
    assert working_type("auto", torch.device(device)) == torch.float32
    assert working_type("bf16", torch.device(device)) == torch.bfloat16


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", 165), ("NVIDIA H20", None),
    ("NVIDIA GeForce GTX 1080 Ti", None)])
def test_the_peak_of_a_card_is_found_by_its_name(name, tera):
    assert peak_of(name) == (tera and tera * 1e12)


@pytest.mark.parametrize("kind", sorted(VISION.keys() - {"siglip-head"}))    # it looks once more, for nothing
@pytest.mark.parametrize("stage, pictures", [("align", 1), ("finetune", 0), ("finetune", 2),
                                             ("full-finetune", 0), ("full-finetune", 1)])
@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_the_formula_counts_what_torch_counts_but_the_half_that_causal_attention_does_not_need(
        kind, stage, pictures, llm):
    torch.manual_seed(0)
    backbone = VisionBackbone([VISION[kind]()])
    model = VLM(backbone, make_projector("gelu-mlp", backbone.width, 32), tiny_llm(llm))
    for each in (model.llm, *model.vision.models):          # torch does not count the CPU's own attention
        each.set_attn_implementation("eager")
    model.set_trained(TRAINS[stage].split(","))
    batch, = batches([1], pictures)
    with world_of_one():
        counts = count_together([batch], False)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"], batch["places"])
        loss.backward()
    half = 3 * 2 * 2 * 32 * counts["positions"] ** 2        # forward, backward; 2 blocks; 32 channels
    assert flop_of(model)(counts) + half == counter.get_total_flops()


COUNTS = {"tokens": 30, "real": 800, "pairs": 64000, "positions": 1000, "patches": 4, "pictures": 1,
          "replaced": 2}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    return now


def a_step(speed, clock, seconds, waits):
    speed.begin()
    with speed.waiting():
        clock[0] += waits
    clock[0] += seconds - waits
    return speed.metrics(COUNTS)


def test_a_step_tells_its_speed_its_memory_and_the_time_left(clock, monkeypatch):
    """Two ranks of cards that can do 1,000 FLOP/s each; the step needs 600 and takes 2 seconds."""
    monkeypatch.setattr(profiling, "flop_of", lambda model: lambda counts: 600)
    monkeypatch.setattr(profiling, "peak_of", lambda card: 1000)
    monkeypatch.setattr(profiling, "peak_memory", lambda device: 1.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(profiling.dist, "get_world_size", lambda: 2)
    for device, dtype, mfu in (("cuda", torch.bfloat16, 0.15), ("cuda", torch.float32, None),
                               ("cpu", torch.bfloat16, None)):
        speed = Speed(None, torch.device(device), dtype, 3, 7)
        assert a_step(speed, clock, seconds=2, waits=0.5) == {
            "tokens": 30, "positions": 1000, "padding": pytest.approx(0.2), "replaced": 2,
            "modality": "image", "data_wait": 0.25, "tokens_per_second": 400, "mfu": mfu,
            "peak_memory_gb": 1.5, "seconds_left": None, "start": 3, "total": 7}
        clock[0] += 7                                       # a checkpoint is written: so will be others
        assert a_step(speed, clock, seconds=3, waits=0)["seconds_left"] == 10 * 2
        assert a_step(speed, clock, seconds=2, waits=0)["seconds_left"] == (10 + 2) / 2 * 1
        assert a_step(speed, clock, seconds=2, waits=0)["seconds_left"] == 0


def test_on_a_cpu_the_memory_is_the_most_that_the_process_had():
    said, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    known = int(said.split()[1]) * 1024 / 1e9
    assert profiling.peak_memory(torch.device("cpu")) == pytest.approx(known, rel=0.02)
