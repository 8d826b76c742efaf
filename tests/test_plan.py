"""plan.py counts, without numbers, what a step takes. It must be what the same step takes with numbers."""
import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import make_tokenizer, picture, save_preprocessor, save_vision, square, talk
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import owner
import parallel
import plan
import ranks
import report
import train
from config import Config, UserError
from data import collate
from ledger import PARTS, Ledger
from model import load_vlm

VOCABULARY, WIDTH, WIDER, LAYERS = 72, 32, 48, 3
LLAMA = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDER, num_hidden_layers=LAYERS,
             num_attention_heads=4)
LLMS = {"untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4,
                                                   n_positions=64))}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of tiny models: `full/NAME`, and `bare/NAME` without weights."""
    root = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    for name, make in LLMS.items():
        make().save_pretrained(root / "full" / name)
    for kind in ("siglip", "clip"):
        save_vision(root / "full" / kind, kind, num_hidden_layers=3)
    for folder in (root / "full").iterdir():
        (root / "bare" / folder.name).mkdir(parents=True)
        for file in {"config.json", "preprocessor_config.json"} & {path.name for path in folder.iterdir()}:
            shutil.copy(folder / file, root / "bare" / folder.name)
    return root


@pytest.fixture(autouse=True)
def alone():
    yield start(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(world_size):
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def settings(world, llm="untied", vision="siglip", weights="bare", **changes):
    """Stage finetune; a global batch is one micro-batch of 2, if nothing else is said."""
    return Config(**{"stage": "finetune", "no_align": True, "train_json": "-", "image_dir": "-",
                     "vision_backbone": str(world / weights / vision), "global_batch_size": 2,
                     "llm_backbone": str(world / weights / llm), "per_device_batch_size": 2} | changes)


def counted(cfg, pictures=1):
    """-> what a step takes, counted without numbers; the sampler and the batch of the step"""
    own, _ = plan.parse(["--memory", "80", "--positions", "20", "--pictures", str(pictures)])
    examples = plan.Examples(cfg, own)
    step = examples.sampler(2), collate([examples.data[0]] * 2)
    return examples.forecast(cfg, 2), step


def with_numbers(cfg, sampler, batch):
    """The same step of the same model, loaded from its weights. As on a GPU: what is frozen is bf16."""
    model = load_vlm(cfg, cfg.trained, torch.float32 if cfg.precision == "fp32" else torch.bfloat16)
    model.set_trained(cfg.trained)
    if cfg.gradient_checkpointing:
        model.use_recomputing()
    return plan.forecast(model, cfg, sampler, batch, fake=False)


def ends(curve):
    """What is there after each operation: [{name: bytes}]"""
    return list({time: parts for time, parts in curve}.values())


EVERYTHING = "vision,projector,llm"
CASES = {"align": {"trains": "projector"}, "finetune": {}, "full-finetune": {"trains": EVERYTHING},
         "clip": {"vision": "clip", "trains": EVERYTHING}, "last layer": {"trains": "llm.last"},
         "tied": {"llm": "tied"}, "gpt2": {"llm": "gpt2"}, "fp32": {"precision": "fp32"},
         "recomputing": {"gradient_checkpointing": True},
         "recomputing in align": {"gradient_checkpointing": True, "trains": "projector"},
         "accumulated": {"global_batch_size": 6}, "text only": {"pictures": 0},
         "two pictures": {"pictures": 2}}


# -- the count -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def case(world, request):
    """-> what a step takes by the count, its ledger, the operations in it; the arguments of `with_numbers`"""
    changes, operations, ledgers, run = dict(CASES[request.param]), set(), [], Ledger.run
    pictures = changes.pop("pictures", 1)

    def noted(ledger, func, *rest):
        operations.add(str(func.overloadpacket).replace(".", "::"))
        ledgers.append(ledger)
        return run(ledger, func, *rest)
    start(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Ledger, "run", noted)
        found, step = counted(settings(world, **changes), pictures)
    return found, ledgers[-1], operations, (settings(world, weights="full", **changes), *step)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_count_is_that_of_a_step_with_numbers(case):
    fake, _, _, step = case
    real = with_numbers(*step)
    assert fake.peak == real.peak == sum(fake.parts.values())
    assert {k: v for k, v in fake.parts.items() if v} == {k: v for k, v in real.parts.items() if v}
    assert fake.flop == real.flop > 0
    # Not only at the peak: after each operation, until backward is over. The gradient norm then goes through
    # one operation for all tensors; for fake tensors torch has only the one for each.
    one, two = ends(fake.curve), ends(real.curve)
    same = next(i for i, (a, b) in enumerate(zip(one, two)) if a != b)
    norms = 2 * 4 * real.parts["moments"] // 8              # at most two fp32 numbers for each trained tensor
    assert same > 300 and {one[same - 1].get(name, 0) for name in ("copies", "logits")} == {0}
    copies = min(2, step[1].accumulation)
    assert one[same - 1]["gradients"] == two[same - 1]["gradients"] == real.parts["gradients"] // copies
    assert max(sum(now.values()) for now in (*one[same:], *two[same:])) <= sum(one[same].values()) + norms


# Bytes of a number that Python hands over, and of the random state that recomputing keeps. With a GPU, too,
# they lie in the memory of the CPU.
HOST = (8, 5056)


class Nobody(nullcontext):
    """Stands where the ledger stands, and writes nothing down."""
    time = flop = 0

    def __init__(self, *_):
        super().__init__()
        self.names = []

    def rename(self, *_, **__):
        pass

    def curve(self, start):
        return [(0, {})]


def allocated(step, operations, monkeypatch):
    """Runs `step()`, which calls train_step -> the most bytes that the CPU's allocator has given out, as
    torch's profiler hears. Looked at between operations: inside of them the CPU's kernels take room of their
    own, as those of a GPU do."""
    exact, events = train.train_step, []

    def watched(*args):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
            done = exact(*args)
        events.extend(watch.profiler.kineto_results.events())
        return done
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", watched)
        patched.setattr(plan, "Ledger", Nobody)
        step()
    taken = iter(sorted((e.start_ns(), e.nbytes()) for e in events
                        if e.name() == "[memory]" and abs(e.nbytes()) not in HOST))
    now, most, until, following = 0, 0, 0, next(taken, None)
    for begin, end in sorted(((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events
                              if e.name() in operations), key=lambda times: (times[0], -times[1])):
        if begin >= until:                                  # else it is a part of the one before
            until = end
            while following and following[0] <= end:
                now, following = now + following[1], next(taken, None)
            most = max(most, now)
    return most


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_count_is_what_the_allocator_gives_out(case, monkeypatch):
    fake, ledger, operations, step = case
    counts, began = [0], None
    for time, number, more in ledger.entries:
        if ledger.names[number] != "batch" and abs(more) not in HOST:
            began = len(counts) - 1 if began is None and time >= fake.curve[0][0] else began
            counts.append(counts[-1] + more)
    # The profiler orders by a clock, which may go backwards where a process changes to another core.
    tries = (allocated(lambda: with_numbers(*step), operations, monkeypatch) for _ in range(3))
    assert max(counts[began:]) - counts[began] in tries


def test_the_parts_are_those_computed_by_hand(world):
    heads = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2      # q, o; k and v of half the heads
    linear = LAYERS * (heads + 3 * WIDTH * WIDER) + VOCABULARY * WIDTH
    llm = linear + VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
    projector = (8 + 1) * WIDTH + (WIDTH + 1) * WIDTH
    block = 4 * (8 + 1) * 8 + 2 * (8 + 1) * 8 + 2 * 2 * 8
    vision = (3 * 8 * 8 + 1) * 8 + 4 * 8 + 3 * block + 2 * 8
    # 4 places of patches; 4 speeds of rotation, twice; what each of 256 levels of 3 colors becomes
    buffers = 4 * 8 + 2 * 4 * 4 + 3 * 256 * 4
    trained, tensors = llm + projector, 9 * LAYERS + 3 + 4
    found, _ = counted(settings(world))
    # ids and labels; pixels, as bytes; places of 4 patches and 15 supervised tokens, for 2 examples
    batch = 2 * 20 * 8 * 2 + 2 * 3 * 16 * 16 + 2 * (4 + 15) * 8
    assert {name: found.parts[name] for name in ("weights", "gradients", "moments", "copies", "batch")} == {
        "weights": 4 * trained + 2 * vision + buffers, "gradients": 4 * trained,
        "moments": 8 * trained + 4 * tensors, "copies": 2 * (linear + projector), "batch": batch}
    align, _ = counted(settings(world, trains="projector"))
    assert align.parts["weights"] == 2 * (llm + vision) + 4 * projector + buffers
    assert align.parts["gradients"] == 4 * projector


def test_ddp_holds_gradients_twice_while_they_are_accumulated(world):
    once, _ = counted(settings(world))
    twice, _ = counted(settings(world, global_batch_size=4))
    more, _ = counted(settings(world, global_batch_size=8))
    assert twice.parts["gradients"] == 2 * once.parts["gradients"]
    assert more.peak == twice.peak


def test_recomputing_takes_less_memory_and_more_work(world):
    own, _ = plan.parse(["--memory", "80", "--positions", "60"])
    cfg = settings(world, global_batch_size=24, per_device_batch_size=24)
    examples = plan.Examples(cfg, own)
    given, less = examples.forecast(cfg, 24), examples.forecast(replace(cfg, gradient_checkpointing=True), 24)
    assert less.peak < 0.7 * given.peak and less.flop > 1.1 * given.flop


def test_the_largest_micro_batch_that_fits(world, monkeypatch):
    """12 at once take less than 6 and 6, whose gradients would lie in memory twice."""
    own, _ = plan.parse(["--memory", "80", "--positions", "60", "--gpus", "2"])
    examples = plan.Examples(settings(world, global_batch_size=24), own)
    peaks = {1: 20, 2: 30, 3: 40, 4: 50, 6: 70, 12: 65}
    monkeypatch.setattr(examples, "forecast", lambda cfg, size: SimpleNamespace(peak=peaks[size]))
    assert examples.sizes() == list(peaks)
    assert [examples.largest(None, room) for room in (70, 65, 64, 50, 49, 20, 19)] == [12, 12, 4, 4, 3, 1, 0]


def test_flop_are_those_of_torch(world, monkeypatch):
    aten, exact = torch.ops.aten, train.train_step
    counter = FlopCounterMode(display=False, custom_mapping={       # it does not know the CPU's attention
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)})

    def watched(*args):
        with counter:
            return exact(*args)
    found, step = counted(settings(world, precision="fp32"))
    monkeypatch.setattr(train, "train_step", watched)
    with_numbers(settings(world, weights="full", precision="fp32"), *step)
    assert found.flop == counter.get_total_flops()


def test_slices_are_counted_as_they_come_and_go():
    """FSDP2 gathers weights for a block and then empties their storages, which is no operation."""
    start(4)
    ledger = Ledger(True, 72)
    mesh = init_device_mesh("cpu", (4,))
    with torch.device("meta"):
        blocks = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(16)))
    with ledger:
        blocks.to_empty(device="cpu")
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(blocks, mesh=mesh)
        ledger.rename("weights", *blocks.parameters())
        optimizer = torch.optim.AdamW(blocks.parameters(), fused=True)
        begin = ledger.time
        for _ in range(2):
            x = torch.zeros(2, 64, requires_grad=True)
            blocks(x).sum().backward()
            ledger.rename("gradients", *(weight.grad for weight in blocks.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    one = 4 * 64 * 64
    curve = ledger.curve(begin)
    assert curve[0][1]["weights"] == 16 * one // 4
    # Never is the whole model there: two blocks are gathered or being gathered, a gradient is being cut.
    assert 2 * one <= max(parts.get("copies", 0) for _, parts in curve) <= 4 * one
    assert max(parts.get("gradients", 0) for _, parts in curve) == 16 * one // 4
    assert sum(curve[-1][1].values()) == sum(entry[0]().nbytes() for entry in ledger.alive.values())


# -- the answer ----------------------------------------------------------------------------------------------

def llama_7b(root):
    """config.json and preprocessor_config.json as meta-llama/Llama-2-7b, lmsys/vicuna-7b-v1.5, OpenAI's CLIP
    and SigLIP have them, as far as sizes go -> the folders."""
    written = {
        "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
                  "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
                  "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "clip": {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768,
                 "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024,
                                   "intermediate_size": 4096, "num_hidden_layers": 24,
                                   "num_attention_heads": 16, "image_size": 336, "patch_size": 14}},
        "so400m": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                   "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}}
    for name, settings in written.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(settings))
    save_preprocessor(root / "clip", {"crop_size": 336, "do_center_crop": True, "size": 336,
                                      "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]})
    save_preprocessor(root / "so400m", square(224))
    return root


def answer(capsys, *flags):
    """-> what plan.py prints, its exit code"""
    dist.destroy_process_group()
    try:
        code = plan.main(*plan.parse([*flags]))
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)            # plan.py's process would end here
    return capsys.readouterr().out, code or 0


def test_7b_is_what_the_study_found(tmp_path):
    """16 x 440 positions without DDP: 27.9 GB of weights, 148 at the peak of the second step; 557 TFLOP of
    two steps, attention left out."""
    start(8)
    root = llama_7b(tmp_path)
    own, cfg = plan.parse(["--gpus", "8", "--memory", "80", "--positions", "440", "--stage", "finetune",
                           "--no_align", "--llm_backbone", str(root / "llama"), "--vision_backbone",
                           str(root / "so400m")])
    found = plan.Examples(cfg, own).forecast(cfg, 16)
    assert round(found.parts["weights"] / 1e9, 1) == 27.9
    assert round((found.peak - found.parts["gradients"]) / 1e9, 1) == 147.9
    attention = 32 * (4 + 10) * 16 * 440 * 440 * 4096       # q k, a v; in backward five products of this size
    assert abs(found.flop - attention - 557e12 / 2) < 2e12


def test_llava_7b_on_a_card_that_is_too_small(tmp_path, capsys):
    root = llama_7b(tmp_path)
    said, code = answer(capsys, "--preset", "llava-v1.5-7b", "--stage", "finetune", "--gpus", "8", "--card",
                        "H100", "--positions", "760", "--llm_backbone", str(root / "llama"),
                        "--vision_backbone", str(root / "clip"), "--one_line", "--shard", "no")
    assert code == report.DOES_NOT_FIT
    assert "weights 27.6, moments 54.1, gradients 27.0, copies 13.3" in said
    assert said.startswith("memory   130.0 GB") and "the GPU has 80.0 GB, 1.5 of them kept free" in said


def test_the_table_the_time_and_the_picture(world, tmp_path, capsys):
    flags = ["--gpus", "2", "--card", "L40S", "--mfu", "0.5", "--positions", "20", "--examples", "1000",
             "--stage", "full-finetune", "--global_batch_size", "8", "--per_device_batch_size", "4",
             "--vision_backbone", str(world / "bare" / "siglip"), "--llm_backbone",
             str(world / "bare" / "untied"), "--picture", str(tmp_path / "new" / "a.png")]
    said, code = answer(capsys, *flags)
    assert code == 0 and "published full-finetune, trains vision,projector,llm: 4 x 20 positions" in said
    lines = said.splitlines()
    parts = {line.split()[0]: float(line.split()[1]) for line in lines if line.split()[:1] and
             line.split()[0] in (*PARTS, "peak")}
    assert parts["peak"] == pytest.approx(sum(parts.values()) / 2, abs=0.04)
    rows = {line[2:40].strip(): line[40:].split() for line in lines if line[:2] == "  " and line[60:]}
    assert {"as given", "--per_device_batch_size 2", "--gradient_checkpointing"} <= rows.keys()
    assert float(rows["--gradient_checkpointing"][1]) > 0 and rows["as given"][3] == "4"
    assert "of L40S's 362 TFLOP/s" in said and "h an epoch of 1,000 examples" in said
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(10 ** 6)}
    assert {tuple(bytes.fromhex(PARTS[name][0][1:])) for name in ("weights", "activations")} <= colors
    (tmp_path / "mine.png").write_text("notes")
    with pytest.raises(UserError, match="is there and no PNG"):
        answer(capsys, *flags[:-1], str(tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").read_text() == "notes"


@pytest.mark.parametrize("flags, said", [
    (["--card", "H1000"], "--card H1000 is not in the table. Choose from H200, H100"),
    ([], "give the --memory of one GPU in GB, or its name: --card H100"),
    (["--memory", "-3"], "--memory is -3.0, but must lie between 0.1 and 100000.0"),
    (["--card", "T4", "--gpus", "0"], "--gpus is 0, but must lie between 1 and 100000"),
    (["--card", "T4", "--stage", "none"], "invalid choice: 'none'")])
def test_a_wrong_flag_is_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        plan.parse(flags)
    assert end.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flags, said", [
    (["--positions", "5"], "has no room for 1 pictures of 4 patches and a text"),
    (["--positions", "99"], "the longest example takes 99 positions, but the language model knows 64"),
    ([], "--train_json is missing. Give --positions"),
    (["--train_json", "no.json"], "--train_json no.json is not here. Give --positions"),
    (["--positions", "20", "--gpus", "3"], "--global_batch_size 128 can't be cut into micro-batches of 16"),
    (["--positions", "20", "--vision_backbone", "/no"], "config.json and preprocessor_config.json can't be")])
def test_what_can_not_be_counted_is_said(world, flags, said, capsys):
    with pytest.raises(UserError, match=said):
        answer(capsys, "--memory", "80", "--stage", "finetune", "--picture", "", "--vision_backbone",
               str(world / "bare" / "siglip"), "--llm_backbone", str(world / "bare" / "gpt2"), *flags)


def test_a_stage_that_needs_a_checkpoint_is_counted_without_one():
    for stage in ("finetune", "full-finetune", "vla"):
        assert plan.parse(["--memory", "80", "--preset", "published", "--stage", stage])[1].trained == Config(
            stage=stage, ckpt="a", train_json="b", image_dir="c").trained


def test_a_frozen_part_that_the_checkpoint_brings_is_counted_in_fp32(world, tmp_path, monkeypatch):
    """As train.py holds it: what is saved again is not rounded."""
    cfg = settings(world, trains="projector", no_align=False, ckpt=str(tmp_path))
    examples = plan.Examples(cfg, plan.parse(["--memory", "80", "--positions", "20"])[0])
    monkeypatch.setattr(plan, "state_of", lambda ckpt: {"parts": ["projector", "llm"]})
    model = plan.hollow(cfg, examples.sampler(2))
    assert {weight.dtype for weight in model.llm.parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.vision.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in model.llm.parameters())


def test_shard_machine_is_counted_for_machines_and_not_for_all_gpus(world, capsys):
    """Sixteen GPUs in machines of 8 and of 4: of twice as large slices, a GPU has twice as much."""
    flags = ["--memory", "80", "--positions", "20", "--gpus", "16", "--global_batch_size", "16", "--picture",
             "", "--stage", "finetune", "--no_align", "--vision_backbone", str(world / "bare/siglip"),
             "--llm_backbone", str(world / "bare/untied"), "--per_device_batch_size", "1",
             "--shard", "machine"]

    def moments(*more):
        text, _ = answer(capsys, *flags, *more)
        return float(re.search(r"moments +([\d.]+)", text)[1])
    assert moments("--gpus_per_machine", "4") == pytest.approx(2 * moments(), rel=0.1)      # in MB, rounded
    with pytest.raises(UserError, match="--gpus 16 are no whole machines of --gpus_per_machine 5"):
        answer(capsys, *flags, "--gpus_per_machine", "5")


def test_the_rows_of_a_policys_tokens_are_counted_beside_adapters(world):
    cfg = settings(world, stage="vla", no_align=False, ckpt="-", trains="projector,llm", lora_rank=4)
    examples = plan.Examples(cfg, plan.parse(["--memory", "80", "--positions", "20"])[0])
    model = plan.hollow(cfg, examples.sampler(2))
    height = model.llm.get_input_embeddings().weight.shape[0]
    assert model.adapters.rows == (height - 256, height)


def test_a_model_that_looks_at_its_numbers_is_refused(world, monkeypatch):
    def choosy(cfg, sampler):
        model = hollow(cfg, sampler)
        model.llm.base_model.norm.forward = lambda states: states[states > 0][:, None]
        return model
    hollow = plan.hollow
    monkeypatch.setattr(plan, "hollow", choosy)
    with pytest.raises(UserError, match="decides by its numbers what to compute"):
        counted(settings(world))


def test_a_card_without_bf16_has_no_time(world, monkeypatch, capsys):
    monkeypatch.setattr(plan, "print_variants", lambda *_: None)            # they come behind it
    flags = ["--card", "T4", "--positions", "20", "--global_batch_size", "1", "--picture", "",
             "--vision_backbone", str(world / "bare" / "siglip"),
             "--llm_backbone", str(world / "bare" / "untied")]
    assert "T4 has no units for bf16" in answer(capsys, *flags)[0]
    said, _ = answer(capsys, *flags, "--precision", "fp32", "--mfu", "1")
    assert "s such a step at 100% of T4's 8.1 TFLOP/s" in said


def data(folder, world, *texts):
    """A Config whose data are these texts, with a picture each."""
    picture(folder / "a.png")
    rows = [{"image": "a.png", "conversations": talk("<image>\nWhat is it?", text)} for text in texts]
    (folder / "d.json").write_text(json.dumps(rows))
    shutil.copytree(world / "bare" / "untied", folder / "llm", dirs_exist_ok=True)
    make_tokenizer("llama").save_pretrained(folder / "llm")
    settings = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps(settings | {"vocab_size": 900}))
    return ["--train_json", str(folder / "d.json"), "--image_dir", str(folder), "--llm_backbone",
            str(folder / "llm"), "--vision_backbone", str(world / "bare" / "siglip"), "--prompt", "plain",
            "--stage", "finetune", "--global_batch_size", "4", "--per_device_batch_size", "2"]


def test_the_longest_micro_batch_of_the_data_is_counted(world, tmp_path, capsys):
    flags = data(tmp_path, world, "Cat.", "A cat. " * 9, "A dog. It", "A cat. " * 5)
    own, cfg = plan.parse(["--memory", "80", *flags])
    examples = plan.Examples(cfg, own)
    shortest, short, long, longest = sorted(examples.lengths)
    assert shortest < short < long < longest
    batch = collate([examples.data[i] for i in examples.first[:2]])
    assert batch["input_ids"].shape == (2, longest) and len(batch["pixel_values"][0]) == 2
    assert [examples.positions(size) for size in (1, 2, 4)] == [sum(examples.lengths), 2 * (longest + short),
                                                                4 * longest]
    assert examples.count == 4
    alone = examples.forecast(cfg, 2).peak / 1e6
    said = answer(capsys, "--card", "H100", "--one_line", *flags)[0]
    assert said.startswith(f"memory   {alone:.1f} MB at")
    assert said.endswith("There is room for a --per_device_batch_size above 2\n")
    for alone_in_a_step in ("--gpus=2", "--per_device_batch_size=4"):
        said = answer(capsys, "--card", "H100", "--one_line", *flags, alone_in_a_step)[0]
        assert said.endswith("kept free\n")
    full = str((alone * 1.5 + 1500) / 1e3)                  # 1.5 GB are kept free: two thirds of it are taken
    assert answer(capsys, "--memory", full, "--one_line", *flags)[0].endswith("kept free\n")


def test_the_slots_of_a_policy_are_counted(world):
    """--decode parallel: four slots at the end of each example, in the step with numbers as in the other."""
    cfg = settings(world)
    own, _ = plan.parse(["--memory", "80", "--positions", "20"])
    examples = plan.Examples(cfg, own)
    plain = examples.forecast(cfg, 2)
    examples = plan.Examples(cfg, own)
    examples.data[0]["input_ids"][-5:-1] = parallel.SLOT
    found = examples.forecast(cfg, 2)
    model = load_vlm(settings(world, weights="full"), cfg.trained, torch.bfloat16)
    parallel.begin(model, 4, cfg)
    model.set_trained(cfg.trained)
    real = plan.forecast(model, cfg, examples.sampler(2), collate([examples.data[0]] * 2), fake=False)
    assert found.peak == real.peak and found.flop == real.flop
    assert {k: v for k, v in found.parts.items() if v} == {k: v for k, v in real.parts.items() if v}
    assert found.parts["weights"] - plain.parts["weights"] == 4 * 4 * WIDTH         # in fp32
    assert found.parts["moments"] - plain.parts["moments"] == 2 * 4 * 4 * WIDTH + 4


# -- train.py asks -------------------------------------------------------------------------------------------

def test_a_run_that_can_not_fit_is_refused_with_its_parts(world, tmp_path, capsys):
    _, cfg = plan.parse(["--memory", "80", "--no_align", *data(tmp_path, world, "Cat.", "A cat.")])
    with pytest.raises(UserError, match=r"this run can't fit. memory +\d.* MB at the peak of a step "
                                        r"\(weights .*\); the GPU has 1.5 GB.*--no-forecast"):
        report.count(cfg, 2, int(1.5001e9))
    assert capsys.readouterr().out.startswith("memory   is being counted")


@pytest.mark.parametrize("code, out, err, said", [
    (0, "memory   1 GB", "", "memory   1 GB"),
    (1, "", "x\nerror: no room\n", "memory   can't be counted: error: no room"),
    (-9, "", "", "memory   can't be counted: exit code -9")])
def test_plan_is_heard_and_its_failure_ends_no_run(world, monkeypatch, capsys, code, out, err, said):
    asked = []

    def run(command, env, **_):
        asked.append((command, env))
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    monkeypatch.setattr(report.subprocess, "run", run)
    monkeypatch.setenv("RANK", "0")
    cfg = settings(world, gradient_checkpointing=True, learning_rate=1e-5)
    report.count(cfg, 8, 85 * 10 ** 9)
    assert capsys.readouterr().out.splitlines()[-1] == said
    (command, env), = asked
    own, again = plan.parse(command[2:])
    assert (own.gpus, own.memory, own.one_line) == (8, 85.0, True)
    assert replace(again, num_workers=cfg.num_workers) == cfg
    assert env["CUDA_VISIBLE_DEVICES"] == "" and "RANK" not in env


def test_only_a_gpu_is_asked_about_and_only_with_the_flag(world, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "count", lambda *about: asked.append(about))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=5))
    cfg = settings(world)
    report.forecast(cfg, torch.device("cpu"))
    report.forecast(replace(cfg, forecast=False), torch.device("cuda"))
    assert not asked
    report.forecast(cfg, torch.device("cuda"))
    assert asked == [(cfg, 1, 5)]
    owner.check_same_run(replace(cfg, forecast=False), cfg, "run")      # it may change from start to start


def test_train_asks_before_it_loads_a_model(world, tmp_path, monkeypatch):
    def refuse(cfg, device):
        raise UserError("too large")
    monkeypatch.setattr(report, "forecast", refuse)
    monkeypatch.setattr(train, "load_model", None)
    _, cfg = plan.parse(["--memory", "80", "--no_align", "--run_root", str(tmp_path / "runs"),
                         *data(tmp_path, world, "Cat.", "A cat.")])
    dist.destroy_process_group()
    try:
        with pytest.raises(UserError, match="too large"):
            train.main(cfg)
        assert not list((tmp_path / "runs").glob("[!.]*"))
    finally:
        ranks.cpu_group = None
        ranks.HELD.clear()


def test_plan_spreads_a_model_as_train_does(world, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def ddp(model, device_ids=None, **options):
        seen.append(options)
        raise Seen
    seen = []
    monkeypatch.setattr(train, "DistributedDataParallel", ddp)
    monkeypatch.setattr(plan, "DistributedDataParallel", ddp)
    monkeypatch.setattr(train, "load_model", lambda *_: ([], torch.nn.Linear(1, 1)))
    own, cfg = plan.parse(["--memory", "80", "--no_align", "--run_root", str(tmp_path),
                           *data(tmp_path, world, "Cat.", "A cat.")])
    with pytest.raises(Seen):
        plan.spread(None, cfg, plan.Examples(cfg, own).sampler(2))
    dist.destroy_process_group()
    try:
        with pytest.raises(Seen):
            train.main(cfg)
    finally:
        ranks.cpu_group = None
        ranks.HELD.clear()
    ours, theirs = seen
    assert ours == theirs | {"init_sync": False}            # of a group that sends nothing
