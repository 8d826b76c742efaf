"""shard.py, and checkpoints of which each rank holds a slice."""
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import checkpoint
import config
import forked
import shard
import slices
from helpers import world_of_one
from model import blocks
from test_faults import lose_steps_after
from test_model import batches, tiny_vlm
from test_train import (ROOT, assert_same_curve, assert_same_up_to_rounding, metrics_of,        # noqa: F401
                        run_train, train_command, weights, world)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Untied, three blocks, and widths that four ranks do not divide."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/llm")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=36, intermediate_size=70, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=1)).save_pretrained(folder)
    return folder


def curves(world, llama, out, ranks, *cases):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "tests/sharded.py"),
               str(world), str(llama), str(out), *cases]
    done = forked.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


SAME_CUT = ["tied", "untied", "everything", "last", "recomputing", "align"]


@pytest.fixture(scope="session")
def two(world, llama, tmp_path_factory):                    # noqa: F811
    cases = [f"{case}:{kind}" for case in (*SAME_CUT, "bf16") for kind in ("no", "all")]
    return curves(world, llama, tmp_path_factory.mktemp("two") / "two.json", 2, *cases)


@pytest.fixture(scope="session")
def four(world, llama, tmp_path_factory):                   # noqa: F811
    return curves(world, llama, tmp_path_factory.mktemp("four") / "four.json", 4,
                  "tied:all", "untied:all", "untied:machine")


@pytest.mark.parametrize("case", SAME_CUT)
def test_a_sharded_run_follows_the_curve_of_ddp(case, two):
    want, got = two[f"{case}:no"], two[f"{case}:all"]
    assert got["modalities"] == want["modalities"] and ("text" in want["modalities"]) == (case != "align")
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)         # only the order of sums differs
    assert got["norms"] == pytest.approx(want["norms"], rel=2e-5)
    # Not GPT-2's key biases: their true gradient is zero, and Adam makes full steps of the noise there.
    names = [name for name in want["weights"] if not name.endswith("c_attn.bias")]
    assert [got["weights"][n] for n in names] == pytest.approx([want["weights"][n] for n in names], rel=1e-4)
    assert got["moments"] == want["moments"]                                # a text-only start has fewer


def test_what_is_gathered_in_bf16_is_as_near_as_another_cut_is(two):
    want, got = two["bf16:no"], two["bf16:all"]
    assert got["losses"][0] == want["losses"][0]
    # After one update, whose sums differ in the last bits. With norms gathered in bf16: 3e-5.
    assert got["losses"][1] == pytest.approx(want["losses"][1], rel=2e-6)
    assert got["losses"] == pytest.approx(want["losses"], rel=5e-4)


@pytest.mark.parametrize("case", ["tied:all", "untied:all", "untied:machine"])
def test_four_ranks_and_two_machines_follow_it_in_another_cut(case, two, four):
    assert four[case]["losses"] == pytest.approx(two[case.split(":")[0] + ":no"]["losses"], rel=1e-4)


def test_each_rank_holds_its_share_of_the_weights(two, four):
    assert two["untied:no"]["share"] == [1, 1] and two["untied:all"]["share"] == [0.5, 0.5]
    # Slices of rows: 36 rows on four ranks are 9 each, 962 are 241, 241, 241, 239.
    assert four["untied:all"]["share"] == pytest.approx([0.25, 0.25], abs=0.003)
    assert four["untied:machine"]["share"] == pytest.approx([0.5, 0.5])     # cut in two, held twice
    assert two["align:all"]["share"] == [0.5, 0.5]          # the frozen language model is cut, too


def test_norms_stay_in_fp32_and_nothing_inside_a_block_stops_its_graph():
    model, device, seen = tiny_vlm(stage="full-finetune"), torch.device("cpu"), {}
    with world_of_one():
        shard.cut(model, shard.make_mesh("all", device), device, torch.bfloat16)
        units = [*blocks(model.llm.base_model), *blocks(model.vision.models[0])[:-1]]
        for block in units:                                 # --compile takes what is inside, hooks and all
            inside = [module for module in block.modules() if module is not block]
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in inside)
            block.register_forward_pre_hook(lambda block, _: seen.update(
                {(name, p.ndim): p.dtype for name, p in block.named_parameters()}))
        batch, = batches((4,))
        with torch.autocast("cpu", torch.bfloat16):
            model(batch["input_ids"], batch["labels"], batch["pixel_values"])
    assert len(seen) > 20 and {dtype for (_, ndim), dtype in seen.items() if ndim > 1} == {torch.bfloat16}
    assert {dtype for (_, ndim), dtype in seen.items() if ndim == 1} == {torch.float32}


CUT = ("--max_steps", "12", "--save_every", "4", "--keep", "9", "--shard", "all")


@pytest.fixture(scope="session")
def dropout(tmp_path_factory):
    """The random state of each rank decides the losses."""
    folder = tmp_path_factory.mktemp("llm")
    for file in (ROOT / "toy/llm").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    drop = {name: 0.1 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    (folder / "config.json").write_text(json.dumps(settings | drop))
    return ("--preset", "toy", "--llm_backbone", str(folder))


@pytest.fixture(scope="session")
def undisturbed(world, dropout, tmp_path_factory):          # noqa: F811
    return run_train(world, tmp_path_factory.mktemp("cut"), *CUT, *dropout, ranks=2)


def test_a_run_that_continues_ends_bit_for_bit_the_same(undisturbed, world, dropout, tmp_path):  # noqa: F811
    lose_steps_after(undisturbed[1], tmp_path, 4)
    metrics, run, _ = run_train(world, tmp_path, *CUT, *dropout, ranks=2)
    assert [line["loss"] for line in metrics] == [line["loss"] for line in undisturbed[0]]
    for name in checkpoint.FILES[:2]:
        one, other = (load_file(folder / "step-00000012" / name) for folder in (run, undisturbed[1]))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_goes_on_with_another_number_of_ranks_and_without_the_cut(world, tmp_path):       # noqa: F811
    whole, run, _ = run_train(world, tmp_path / "cut", *CUT, ranks=2)
    (tmp_path / "on").mkdir()
    lose_steps_after(run, tmp_path / "on", 8)
    lose_steps_after(tmp_path / "on/r", tmp_path, 4)        # 2 ranks cut, 1 rank whole, 4 ranks cut
    first, run, _ = run_train(world, tmp_path, *CUT[:-4], "--max_steps", "12", "--shard", "no", ranks=1)
    assert_same_curve(first, whole)
    assert_same_up_to_rounding(weights(run), weights(tmp_path / "cut/r"))


# -- files ---------------------------------------------------------------------------------------------------

def test_a_file_is_written_tensor_by_tensor_as_safetensors_writes_it(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a.weight": torch.randn(2).bfloat16(), "ü": torch.arange(7).byte(),
               "step": torch.tensor(3.0), "half": torch.randn(2, 2).half(), "empty": torch.zeros(0, 4),
               "column": torch.randn(4, 4)[:, 1], "a": torch.randn(2, 3, 4)}
    slices.write_tensors(tmp_path / "ours", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_7b_presets_cut_their_weights():
    for preset in ("llava-v1.5-7b", "prism-dinosiglip-7b"):
        cfg = config.parse(config.Config, ["--preset", preset, "--train_json", "a", "--image_dir", "b"])
        assert cfg.shard == "all"


SLOW_DISK = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from datetime import timedelta
import torch.distributed as dist
begin = dist.init_process_group
dist.init_process_group = lambda *how, **more: begin(*how, **more, timeout=timedelta(seconds=4))
import checkpoint
inner = checkpoint.flush
def flush(path):
    if str(path).endswith("model.safetensors"):
        time.sleep(6)
    inner(path)
checkpoint.flush = flush
import config, ranks, train
ranks.run(train.main, config.parse(config.Config))
"""


def test_a_slow_disk_does_not_end_a_sharded_run(world, tmp_path):                               # noqa: F811
    """The other ranks wait for rank zero longer than a collective may take (NCCL: ten minutes, here 4 s)."""
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    command = train_command(world, tmp_path, "--max_steps", "1", "--shard", "all", ranks=2)
    command[command.index(str(ROOT / "train.py"))] = str(tmp_path / "slow.py")
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/step-00000001/model.safetensors").exists()


UNEQUAL = """
import os, sys
sys.path.insert(0, os.getcwd())
import ranks, shard, torch.distributed as dist
ranks.start()
last = dist.get_rank() >= 2                                 # alone on its machine
os.environ |= {"LOCAL_WORLD_SIZE": "1" if last else "2", "LOCAL_RANK": "0" if last else os.environ["RANK"]}
with shard.in_turn():
    print("loads", flush=True)
values = [dist.get_rank()]
dist.broadcast_object_list(values, group=ranks.cpu_group)   # with one barrier too few, it would meet another
assert values == [0]
try:
    shard.make_mesh("machine", ranks.find_device())
except shard.UserError as e:
    print(str(e), flush=True)
"""


def test_machines_may_have_unequal_numbers_of_ranks(tmp_path):
    """Four ranks, as on machines of two, one and one. --shard machine refuses them, on each rank."""
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    done = forked.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--master_port=0",
                       "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(tmp_path / "unequal.py")])
    assert done.returncode == 0 and done.stdout.count("loads") == 4, done.stderr
    said = "a machine has 1 ranks, another one 2. Start as many on each, or give --shard all"
    assert done.stdout.count(said) == 4
