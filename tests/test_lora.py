"""lora.py: small matrices beside a frozen language model, alone and in runs as a user starts them."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import checkpoint
import config
import convert
import evaluate
import llava
import lora
import shard
import train
from actions import ActionTokens
from config import Config, UserError, parse
from convert import ConvertConfig
from generate import Assistant
from helpers import talk
from model import VLM, load_vlm
from prompts import tokenize
from test_actions import base, robot, train_robot           # fixtures, two of them
from test_convert import LLMS, POLICY, bring_in, make_run, openvla_folder, picture, randomize, theirs
from test_model import batches, tiny_llm, tiny_vlm
from test_train import (ROOT, SHORT, assert_bit_for_bit, assert_same_curve, assert_same_up_to_rounding,
                        lost_after_15_steps, run_train, train_here, weights, world)
from weights import Tensors

LORA = ("--lora_rank", "4", "--learning_rate", "3e-3")


def scaled(adapters, scale=0.3):
    """Random B's, as if they had trained."""
    for i, layer in enumerate(adapters.layers):
        layer.lora_B.weight.data.normal_(0, scale, generator=torch.Generator().manual_seed(i))
    return adapters


# -- the matrices --------------------------------------------------------------------------------------------

class Two(nn.Module):
    """A layer between embeddings and output."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(2, 2), layer, nn.Linear(2, 2)
        self.get_input_embeddings, self.get_output_embeddings = lambda: self.embed, lambda: self.head


def weighted(cls, weight):
    layer = cls(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.zeros(2)
    return layer


@pytest.mark.parametrize("layer", [weighted(nn.Linear, [[1.0, 2.0], [3.0, 4.0]]),
                                   weighted(Conv1D, [[1.0, 3.0], [2.0, 4.0]])])     # (in, out)
def test_alpha_over_rank_times_b_times_a_is_added(layer):
    """W x = (3, 7); B A x = (1, 2) * 2; alpha / rank = 6 / 2."""
    adapters = lora.Adapters(Two(layer), rank=2, alpha=6)
    assert adapters.layers == [layer]                       # the output has none
    layer.lora_A.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    layer.lora_B.weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert layer(torch.ones(1, 2)).tolist() == [[3 + 6, 7 + 12]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LLMS)
def test_step_0_is_the_base_bit_for_bit(kind, dtype):
    llm, ids = randomize(LLMS[kind](100)).to(dtype).eval(), torch.arange(60)[None]
    with torch.no_grad():
        want = llm(ids).logits
        adapters = lora.Adapters(llm, 4, 16, rows=[30, 50])
        assert torch.equal(llm(ids).logits, want)
        scaled(adapters)
        assert (llm(ids).logits - want).abs().max() > 1     # the comparison can fail
    assert {name.split(".")[-2] for name, p in llm.named_parameters() if p.dtype == torch.float32} >= {
        "lora_A", "lora_B", "token_adapter"}
    assert llm.dtype == dtype                               # what was there keeps its type


def test_the_sum_is_rounded_once():
    """In bf16 256 + 1.0039 is 258. 1.0039 alone would become 1, and 256 + 1 is 256."""
    layer = weighted(nn.Linear, [[256.0, 0.0], [0.0, 256.0]]).bfloat16()
    lora.Adapters(Two(layer), rank=1, alpha=1)
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.ones(1, 2), torch.full((2, 1), 0.501953125)
    assert layer(torch.ones(1, 2).bfloat16()).tolist() == [[258.0, 258.0]]


def test_names_of_the_llm_stay_and_only_what_was_added_is_saved():
    model, names = tiny_vlm(), list(tiny_vlm().llm.state_dict())
    model.adapters = lora.Adapters(model.llm, 4, 16, rows=[10, 20])
    state = model.llm.state_dict()
    assert [name for name in state if "lora_" not in name and "token_adapter" not in name] == names
    assert list(checkpoint.tensors_of(model, {"llm"})) == [
        "llm.model.embed_tokens.token_adapter.trainable_tokens_delta",
        *(f"llm.model.layers.{i}.{name}.lora_{x}.weight" for i in range(2) for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj") for x in "AB"),
        "llm.lm_head.token_adapter.trainable_tokens_delta"]


def test_the_base_is_stored_as_frozen_and_the_adapters_in_fp32(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = Config(stage="finetune", no_align=True, train_json="a", image_dir="b", lora_rank=4)
    model = load_vlm(cfg, cfg.trained, torch.bfloat16)
    lora.begin(model, cfg, None, None)
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert types["llm.transformer.h.0.mlp.c_fc.weight"] == torch.bfloat16
    assert {types[name] for name in types if "lora_" in name} == {torch.float32}
    assert types["projector.0.weight"] == torch.float32
    assert {name for name, p in model.llm.named_parameters() if p.requires_grad} == {
        name.removeprefix("llm.") for name in types if "lora_" in name}


def test_dropout_drops_in_training_and_not_when_asked():
    llm, ids = tiny_llm().eval(), torch.arange(40)[None]
    adapters = scaled(lora.Adapters(llm, 4, 16))
    with torch.no_grad():
        want = llm(ids).logits
        adapters.dropout.p = 0.5
        assert torch.equal(llm.eval()(ids).logits, want)
        assert not torch.equal(llm.train()(ids).logits, want)


@pytest.mark.parametrize("kind, tied", [("llama", False), ("gpt2", True)])
def test_a_table_is_read_with_its_new_rows_and_gives_them_gradients(kind, tied):
    plain, llm, ids = tiny_llm(kind).eval(), tiny_llm(kind).eval(), torch.arange(60)[None]
    llm.requires_grad_(False)
    adapters = lora.Adapters(llm, 4, 16, rows=[30, 50])
    rows = [table.token_adapter["trainable_tokens_delta"] for table in adapters.tables]
    assert (rows[0] is rows[1]) == tied
    with torch.no_grad():
        before = plain(ids).logits
        for table, own in zip((plain.get_input_embeddings(), plain.get_output_embeddings()), rows):
            own.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(1)))
            table.weight[30:50] = own
    plain(ids).logits.square().sum().backward()
    llm(ids).logits.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, plain(ids).logits) and not torch.equal(llm(ids).logits, before)
    for table, own in zip((plain.get_input_embeddings(), plain.get_output_embeddings()), rows):
        assert_close(own.grad, table.weight.grad[30:50], rtol=1e-5, atol=1e-4)
    assert adapters.tables[0].weight.grad is None and adapters.tables[1].weight.grad is None


def test_recomputing_and_autocast_give_the_same_loss_with_adapters():
    losses = []
    for recompute in (False, True):
        model = tiny_vlm()
        torch.manual_seed(5)
        model.adapters = scaled(lora.Adapters(model.llm, 4, 16))
        model.adapters.dropout.p = 0.2
        if recompute:
            model.use_recomputing()
        batch, = batches((4,))
        torch.manual_seed(9)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"])
        loss.backward()
        grads = [layer.lora_A.weight.grad.sum().item() for layer in model.adapters.layers]
        losses.append([loss.item(), *grads])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_with_adapters_can_be_sharded(dtype):
    """Frozen weights in one type and adapters in another lie in one unit."""
    results = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for cut in (False, True):
            model = tiny_vlm(llm="gpt2")
            model.llm.requires_grad_(False).to(dtype)
            torch.manual_seed(5)
            model.adapters = scaled(lora.Adapters(model.llm, 4, 16, rows=[10, 30]))
            if cut:
                device = torch.device("cpu")
                shard.cut(model, shard.make_mesh("all", device), device, torch.float32)
            batch, = batches((4,))
            loss, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"])
            loss.backward()
            results.append({name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
                            for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    finally:
        dist.destroy_process_group()
    assert results[0].keys() == results[1].keys() and len(results[0]) == 4 + 2 * 8 + 1 + 1
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


# -- peft, merging, exports ----------------------------------------------------------------------------------

def lora_run(run, policy=None, name="lora"):
    """A LoRA run as train.py writes it, on a run of test_convert's, with random adapters -> its path."""
    cfg = Config(**vars(config.read_config(run)) | {"ckpt": str(run), "lora_rank": 4, "lora_alpha": 8,
                                                    "trains": "projector,llm", "run_id": name})
    model, start, out = load_vlm(cfg), checkpoint.find(run), run.with_name(name)
    checkpoint.load_weights(model, start)
    lora.begin(model, cfg, start, policy)
    scaled(model.adapters, 0.1)
    if model.adapters.rows:
        for table in model.adapters.tables:
            table.token_adapter["trainable_tokens_delta"].data.normal_(0, 0.3)
    before = checkpoint.read_state(start)
    about = {"parts": ["projector", "llm"], "lora": model.adapters.saved()}
    about |= {"actions": before["actions"]} if "actions" in before else {}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(vars(cfg)))
    tensors = checkpoint.tensors_of(model, about["parts"])
    checkpoint.save(out, 1, tensors, {"random.0": torch.zeros(1)}, about, keep=1)
    return out


@torch.no_grad()
def logits(assistant):
    example = assistant.example("What is it?", [picture((37, 53))])
    pixels = [torch.stack(views) for views in zip(*example["images"])]
    embedded = assistant.model.embed(example["input_ids"][None], pixels)
    return assistant.model.llm(inputs_embeds=embedded).logits


def out_of(run, folder, **flags):
    convert.main(ConvertConfig(ckpt=str(run), out=str(folder), **flags))
    return folder


@pytest.mark.parametrize("trained", [("projector",), ("projector", "llm")])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind, tokenizer", [("llama", "llama"), ("gpt2", "gpt2"), ("qwen-tied", "qwen")])
def test_peft_computes_the_same_with_the_adapters_that_go_out(kind, tokenizer, rows, trained, tmp_path):
    peft = pytest.importorskip("peft")
    run = lora_run(make_run(tmp_path, llm=kind, tokenizer=tokenizer, trained=trained),
                   SimpleNamespace(ids=[40], end=80) if rows else None)
    out = out_of(run, tmp_path / "out", to="peft")
    ours, ids = Assistant(run, "cpu").model.llm, torch.arange(100)[None]
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    if "llm" in trained:                                    # their base is the run's LLM, not the folder's
        tuned = load_file(tmp_path / "run/step-00000001/model.safetensors")
        llm.load_state_dict({name[4:]: tensor for name, tensor in tuned.items() if name.startswith("llm.")},
                            strict=False)
    with torch.no_grad():
        plain = llm(ids).logits.clone()
        theirs = peft.PeftModel.from_pretrained(llm, out).eval()
        assert (theirs(ids).logits - ours(ids).logits).abs().max() == 0
        assert (theirs(ids).logits - plain).abs().max() > 0.1
    written = load_file(out / "adapter_model.safetensors")
    saved = peft.get_peft_model_state_dict(theirs)
    assert written.keys() == saved.keys() and all(torch.equal(written[name], saved[name]) for name in saved)
    about = json.loads((out / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == (None if "llm" in trained else str(tmp_path / "llm"))
    assert about["fan_in_fan_out"] == (kind == "gpt2")      # else peft warns, and corrects it
    assert (out / "adapter_model.safetensors").stat().st_mode & 0o044


def test_merged_is_unmerged_up_to_rounding_and_an_ordinary_run(tmp_path, capsys):
    run = lora_run(make_run(tmp_path, llm="gpt2", tokenizer="gpt2", actions=POLICY),
                   SimpleNamespace(ids=[40], end=80))
    want = logits(Assistant(run, "cpu"))
    merged = out_of(run, tmp_path / "merged", merge=True)
    said = capsys.readouterr().out
    assert "merged   adapters of rank 4 in fp32: logits of 3 made-up examples differ by " in said
    assert float(said.split("differ by ")[1].split()[0]) < 1e-4
    again = Assistant(merged, "cpu")
    assert again.cfg.lora_rank == 0 and again.model.adapters is None and again.policy.end == 700
    got = logits(again)
    assert 0 < (got - want).abs().max() < 1e-5 * want.abs().max()
    names = load_file(merged / "step-00000001/model.safetensors")
    assert "llm.transformer.h.0.mlp.c_fc.weight" in names and not any("lora_" in name for name in names)
    tables = [load_file(folder / "step-00000001/model.safetensors")["llm.transformer.wte.weight"]
              for folder in (tmp_path / "run", merged)]
    changed = (tables[0] != tables[1]).any(1)
    assert changed[40:80].all() and not changed[:40].any() and not changed[80:].any()
    with pytest.raises(UserError, match="--merge: .*merged holds no adapters"):
        out_of(merged, tmp_path / "twice", merge=True)
    with pytest.raises(UserError, match="--to peft: .*merged holds no adapters"):
        out_of(merged, tmp_path / "twice", to="peft")


def test_a_lora_run_goes_out_as_a_llava_with_its_logits(tmp_path, capsys):
    run = lora_run(make_run(tmp_path))
    ours, (processor, model) = Assistant(run, "cpu"), theirs(out_of(run, tmp_path / "out", to="llava"))
    said = capsys.readouterr().out
    assert "merged   adapters of rank 4" in said and "logits differ by 0 of" in said     # of the merged one
    assert "LoRA of rank 4, merged" in (tmp_path / "out/README.md").read_text()
    turns = talk("<image>\nWhat is it?")
    text = processor.apply_chat_template([{"role": "user", "content": turns[0]["value"]}], tokenize=False,
                                         add_generation_prompt=True)
    inputs = processor(text=text, images=[picture((37, 53))], return_tensors="pt")
    ids, _ = tokenize({"image": ["?"], "conversations": turns}, ours.language, 4, 512, ask=True)
    assert inputs["input_ids"][0].tolist() == llava.with_image(ids, model.config.image_token_index)
    with torch.no_grad():
        got, want = model(**inputs).logits, logits(ours)
    assert_close(got[..., :want.shape[-1]], want, rtol=0, atol=1e-5 * want.abs().max().item())


# -- runs ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    return run_train(world, tmp_path_factory.mktemp("lora"), *SHORT, *LORA)


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A run that has trained its LLM as a whole, two steps of it."""
    with pytest.MonkeyPatch.context() as patch:
        return train_here(patch, world, tmp_path_factory.mktemp("tuned"), "--max_steps", "2",
                          "--save_every", "1", "--learning_rate", "1e-3")[1]


def test_adapters_and_projector_are_all_that_a_run_changes_and_saves(world, one, tmp_path, monkeypatch):
    seen, make = {}, train.make_optimizer

    def remember(model, cfg):
        seen.update(model=model, before={name: p.detach().clone() for name, p in model.named_parameters()})
        return make(model, cfg)

    monkeypatch.setattr(train, "make_optimizer", remember)
    monkeypatch.setattr(VLM, "free", lambda self: None)
    _, run = train_here(monkeypatch, world, tmp_path, "--max_steps", "3", *LORA)
    changed = {name for name, p in seen["model"].named_parameters()
               if not torch.equal(p, seen["before"][name])}
    assert changed == set(weights(run)) and len(changed) == 4 + 2 * 16
    assert {name for name in changed if name.startswith("llm.")} == {
        f"llm.transformer.h.{i}.{layer}.lora_{x}.weight" for i in range(4) for x in "AB"
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    moments = {name.split(".", 1)[1] for name in load_file(run / "step-00000003/optimizer.safetensors")}
    assert moments - {"0"} == changed
    assert checkpoint.read_state(run / "step-00000003")["lora"] == {
        "rank": 4, "alpha": 16, "rows": [], "base": None}
    metrics, _, printed = one
    assert "trains   projector 0.03M, llm 0.03M · frozen vision 0.93M, llm 1.05M\n" in printed
    assert "adapters rank 4, alpha 16, beside 16 layers of the language model\n" in printed
    assert sum(line["loss"] for line in metrics[10:]) < 0.8 * sum(line["loss"] for line in metrics[:10])


def test_two_ranks_that_recompute_equal_one(world, one, tmp_path):
    metrics, run, _ = run_train(world, tmp_path, *SHORT, *LORA, "--per_device_batch_size", "1",
                                "--gradient_checkpointing", ranks=2)
    assert_same_curve(metrics, one[0])
    assert_same_up_to_rounding(weights(run), weights(one[1]))


def test_all_ranks_draw_the_same_adapters_and_drop_other_activations(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = Config(stage="finetune", no_align=True, train_json="a", image_dir="b", seed=7, lora_rank=4)
    sampler, drawn = SimpleNamespace(lengths=torch.tensor([9]), has_image=torch.tensor([True])), []
    for rank in (0, 3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(100 + rank)
        _, model = train.load_model(cfg, None, sampler, torch.device("cpu"))
        drawn.append((torch.initial_seed(), model.adapters.layers[0].lora_A.weight))
    assert (drawn[0][0], drawn[1][0]) == (7, 10) and torch.equal(drawn[0][1], drawn[1][1])
    bound = 128 ** -0.5                                     # kaiming_uniform_(a = sqrt(5)), as peft
    assert 0.95 * bound < drawn[0][1].abs().max() <= bound


def test_a_lost_run_with_dropout_continues_bit_for_bit_recomputing(world, tuned, tmp_path, monkeypatch):
    flags = (*SHORT, *LORA, "--lora_dropout", "0.3", "--ckpt", str(tuned))
    want = train_here(monkeypatch, world, tmp_path / "a", *flags)
    (tmp_path / "b").mkdir()
    lost_after_15_steps(want[1], tmp_path / "b")
    got = train_here(monkeypatch, world, tmp_path / "b", *flags, "--gradient_checkpointing")
    assert_bit_for_bit(got, want)
    other, _ = train_here(monkeypatch, world, tmp_path / "c", *SHORT, *LORA, "--ckpt", str(tuned))
    assert other[0]["loss"] == want[0][0]["loss"]           # B is zero
    assert other[1]["loss"] != want[0][1]["loss"]


# -- the base ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def beside(world, tuned, tmp_path_factory):
    """A LoRA run on the tuned one -> its folder. Do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        return train_here(patch, world, tmp_path_factory.mktemp("beside"), "--ckpt", str(tuned),
                          "--max_steps", "2", *LORA, "--save_every", "1")[1]


def test_a_run_beside_a_trained_llm_saves_adapters_and_names_its_base(tuned, beside, world, tmp_path):
    state = checkpoint.read_state(beside / "step-00000002")
    assert state["lora"]["base"] == {"folder": str(tuned / "step-00000002"),
                                     "started": checkpoint.started(tuned)}
    # The base's run may go on: its next checkpoints delete old ones, but not this.
    assert checkpoint.read_state(tuned / "step-00000002")["forever"]
    assert all(".lora_" in name or name.startswith("projector.") for name in weights(beside))
    model, under = Assistant(beside, "cpu").model, weights(tuned)
    for name, tensor in model.state_dict().items():
        if name.startswith("llm.") and "lora_" not in name and "lm_head" not in name:
            assert torch.equal(tensor, under[name]), name   # of the base
        elif name in weights(beside):
            assert torch.equal(tensor, weights(beside)[name]), name     # the projector, too, has gone on
    assert not torch.equal(weights(beside)["projector.0.weight"], under["projector.0.weight"])
    evaluate.main(evaluate.EvaluateConfig(ckpt=str(beside), json=str(world / "val.json"), max_examples=4,
                                          image_dir=str(world / "images"), out=str(tmp_path / "scores.json")))
    assert json.loads((tmp_path / "scores.json").read_text())["count"] == 4


def test_generate_answers_like_base_and_adapters_put_together_by_hand(tuned, beside):
    answerer, hand = Assistant(beside, "cpu"), Assistant(tuned, "cpu")
    saved = weights(beside)
    for name, tensor in saved.items():
        if name.startswith("projector."):
            hand.model.state_dict()[name].copy_(tensor)
        elif name.endswith("lora_A.weight"):
            weight = hand.model.get_parameter(name.replace("lora_A.", ""))
            product = saved[name.replace("lora_A", "lora_B")] @ tensor * (16 / 4)
            weight.data += product.T                        # Conv1D
    assert (logits(answerer) - logits(Assistant(tuned, "cpu"))).abs().max() > 1e-3
    assert_close(logits(answerer), logits(hand), rtol=0, atol=1e-4)
    question = "How many shapes are there?"
    assert answerer.answer([answerer.example(question, [picture((96, 96))])], 8) == hand.answer(
        [hand.example(question, [picture((96, 96))])], 8)


def test_it_continues_beside_its_base_when_that_run_has_gone_on(world, tuned, tmp_path, monkeypatch):
    shutil.copytree(tuned, tmp_path / "base")
    flags = ("--ckpt", str(tmp_path / "base"), "--max_steps", "4", *LORA, "--save_every", "2")
    shutil.rmtree(tmp_path / "base/step-00000002")          # it begins beside step 1
    want = train_here(monkeypatch, world, tmp_path / "a", *flags)
    shutil.copytree(tuned / "step-00000002", tmp_path / "base/step-00000002")
    shutil.copytree(tmp_path / "a/r", tmp_path / "b/r")
    shutil.rmtree(tmp_path / "b/r/step-00000004")
    got = train_here(monkeypatch, world, tmp_path / "b", *flags)
    assert_bit_for_bit(got, want)
    base = checkpoint.read_state(tmp_path / "b/r/step-00000004")["lora"]["base"]
    assert base["folder"] == str(tmp_path / "base/step-00000001")


def test_adapters_of_a_checkpoint_go_on_beside_the_same_base(world, beside, tmp_path, monkeypatch):
    _, run = train_here(monkeypatch, world, tmp_path, "--ckpt", str(beside), "--max_steps", "1", *LORA,
                        "--learning_rate", "0")
    assert all(torch.equal(tensor, weights(beside)[name]) for name, tensor in weights(run).items())
    state = checkpoint.read_state(run / "step-00000001")["lora"]
    assert state == checkpoint.read_state(beside / "step-00000002")["lora"]     # no chain of three


def test_a_base_that_moved_away_is_named_and_one_that_moved_along_is_found(tuned, beside, tmp_path):
    for name, run in (("r", beside), ("base", tuned)):
        shutil.copytree(run, tmp_path / "there" / name)
    step = tmp_path / "there/r/step-00000002"
    state = json.loads((step / "state.json").read_text())

    def base_is(folder, **other):
        base = state["lora"]["base"] | {"folder": str(folder)} | other
        (step / "state.json").write_text(json.dumps(state | {"lora": state["lora"] | {"base": base}}))
        return Assistant(tmp_path / "there/r", "cpu")

    want = logits(Assistant(beside, "cpu"))
    moved = tmp_path / "gone/base/step-00000002"            # was beside the run, and moved along with it
    assert torch.equal(logits(base_is(moved)), want)
    said = f"there/r/step-00000002 holds adapters of the language model in {moved}, which is gone. Put it "
    with pytest.raises(UserError, match=said):              # another run lies there now
        base_is(moved, started="2026-01-01 another")
    file = tmp_path / "there/base/step-00000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=said):
        base_is(moved)
    shutil.rmtree(tmp_path / "there/base")
    with pytest.raises(UserError, match=said):
        base_is(moved)


def test_what_a_run_stands_on_is_not_overwritten_by_it(world, tuned, tmp_path, monkeypatch):
    shutil.copytree(tuned, tmp_path / "r")
    flags = ("--max_steps", "1", *LORA, "--ckpt")
    _, run = train_here(monkeypatch, world, tmp_path / "x", *flags, str(tmp_path / "r"))
    run = run.rename(tmp_path / "x/other")
    with pytest.raises(UserError, match="other stands on .*r/step-00000002: choose another --run_id"):
        train_here(monkeypatch, world, tmp_path, *flags, str(run), "--overwrite")
    assert (tmp_path / "r/step-00000002").exists()


# -- policies ------------------------------------------------------------------------------------------------

def test_a_policys_rows_train_and_no_other_of_their_table(robot, base, tmp_path):
    flags = ("--trains", "projector,llm", *LORA, "--lora_rank", "8")
    one, run, printed = train_robot(robot, base, tmp_path / "1", "--max_steps", "20", *flags)
    two, _, _ = train_robot(robot, base, tmp_path / "2", "--max_steps", "20", "--per_device_batch_size", "2",
                            *flags, "--shard", "all", ranks=2)
    assert_same_curve([line | {"modality": ""} for line in two], [line | {"modality": ""} for line in one])
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    saved, under, rows = weights(run), weights(base), "transformer.wte.token_adapter.trainable_tokens_delta"
    assert {name for name in saved if name.startswith("llm.") and "lora_" not in name} == {f"llm.{rows}"}
    assert saved[f"llm.{rows}"].shape == (256, 128)
    state = checkpoint.read_state(run / "step-00000020")
    first, end = state["lora"]["rows"]
    assert end == state["actions"]["end"] and end - first == 256
    assistant = Assistant(run, "cpu")
    assert torch.equal(assistant.model.llm.transformer.wte.weight, under["llm.transformer.wte.weight"])
    merged = out_of(run, tmp_path / "merged", merge=True)
    table, want = weights(merged)["llm.transformer.wte.weight"], under["llm.transformer.wte.weight"].clone()
    want[first:end] = saved[f"llm.{rows}"]
    assert torch.equal(table, want)
    seen = [[picture((96, 96), i)] for i in range(3)]
    assert (assistant.act(seen, ["show it"] * 3) == Assistant(merged, "cpu").act(seen, ["show it"] * 3)).all()


def test_a_policys_rows_begin_fresh_and_go_on_as_they_are(robot, base, tmp_path, monkeypatch):
    def one_step(start, rate, name):
        return train_here(monkeypatch, robot, tmp_path / name, "--train_json", str(robot / "lamp.json"),
                          "--max_steps", "1", "--trains", "projector,llm", *LORA, "--ckpt", str(start),
                          "--learning_rate", rate, stage="vla")[1]

    run = one_step(base, "0", "1")
    state, llm = checkpoint.read_state(run / "step-00000001"), Assistant(base, "cpu").model.llm
    policy = ActionTokens.load(state["actions"])
    policy.fresh_rows(llm, seed=7)
    name = "llm.transformer.wte.token_adapter.trainable_tokens_delta"
    assert torch.equal(weights(run)[name], llm.transformer.wte.weight[policy.end - 256:policy.end])
    trained = one_step(run, "1e-2", "2")
    assert not torch.equal(weights(trained)[name], weights(run)[name])
    assert torch.equal(weights(one_step(trained, "0", "3"))[name], weights(trained)[name])


def test_an_imported_openvla_learns_by_adapters_and_goes_out_whole(robot, tmp_path, monkeypatch):
    source, tensors, _ = openvla_folder(tmp_path / "source")
    imported = bring_in(source, tmp_path / "imported")
    _, run = train_here(monkeypatch, robot, tmp_path, "--ckpt", str(imported), "--preset", "openvla-lora",
                        "--train_json", str(robot / "lamp.json"), "--max_steps", "2", stage="vla")
    state, saved = checkpoint.read_state(run / "step-00000002"), weights(run)
    assert state["lora"]["base"] is None                    # it is the folder of --llm_backbone
    assert not any(name.startswith("vision.") for name in saved)
    out = Tensors(out_of(run, tmp_path / "out", to="openvla"))
    assert set(out) == set(tensors)
    first, end = state["lora"]["rows"]
    for name, before in tensors.items():
        before, now = before.float(), out[name]
        layer = f"llm.{name.removeprefix('language_model.').removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in saved:
            product = saved[f"{layer}.lora_B.weight"] @ saved[f"{layer}.lora_A.weight"] * (16 / 32)
            assert product.abs().max() > 0
            before = before + product
        elif f"{layer}.token_adapter.trainable_tokens_delta" in saved:
            before[first:end] = saved[f"{layer}.token_adapter.trainable_tokens_delta"]
        if not name.startswith("projector."):
            assert torch.equal(now.float(), before), name


def test_the_preset_has_openvlas_numbers_and_takes_its_model_from_any_checkpoint(tmp_path):
    run = make_run(tmp_path, towers=("registers", "siglip"), projector="fused-gelu-mlp", actions=POLICY,
                   preset="prism-dinosiglip-7b", openvla_vision=True)
    cfg = parse(Config, ["--preset", "openvla-lora", "--stage", "vla", "--ckpt", str(run),
                         "--train_json", "a.json", "--image_dir", "d"])
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.learning_rate, cfg.global_batch_size) == (
        32, 16, 0.0, 5e-4, 16)
    assert (cfg.schedule, cfg.warmup_ratio, cfg.max_steps, cfg.trained) == ("constant", 0.0, 200000,
                                                                           ("projector", "llm"))
    assert cfg.openvla_vision and cfg.projector == "fused-gelu-mlp" and cfg.preset == "openvla-lora"


# -- refusals ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    (["--trains", "projector,llm.last"],
     "--trains projector,llm.last: --lora_rank needs llm there, not llm.last"),
    (["--trains", "llm,llm.last"], "--trains llm,llm.last: --lora_rank needs llm there, not llm.last"),
    (["--trains", "projector"], "--trains projector: --lora_rank needs llm there"),
    (["--stage", "align"], "--trains projector: --lora_rank needs llm there"),
    (["--lora_rank", "-1"], "--lora_rank is -1, but must lie between 0 and 10000"),
    (["--lora_alpha", "0"], "--lora_alpha is 0, but must lie between 1 and 1000000"),
    (["--lora_dropout", "1"], "--lora_dropout is 1.0, but must lie between 0 and 0.99")])
def test_flags_that_can_not_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--stage", "finetune", "--no_align", "--lora_rank", "4", *flags])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "8"], ["--lora_rank", "4", "--lora_alpha", "8"]])
def test_adapters_go_on_with_their_rank_and_alpha_or_not_at_all(flags, world, beside, tmp_path, monkeypatch):
    said = f"--ckpt {beside} holds adapters. Train them with --lora_rank 4 --lora_alpha 16, or make it a "
    with pytest.raises(UserError, match=said):
        train_here(monkeypatch, world, tmp_path, "--ckpt", str(beside), "--max_steps", "1", *flags)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("wrong", [
    {"rank": 0}, {"rank": -1}, {"rank": "4"}, {"rank": 10 ** 15}, {"alpha": None}, {"rows": [3, "a"]},
    {"rows": 7}, {"base": 3}, {"base": {}}, {"more": 1}])
def test_adapters_of_a_stranger_that_can_not_be_are_refused(wrong, beside, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(beside, run)
    file = run / "step-00000002/state.json"
    state = json.loads(file.read_text())
    state["lora"] |= wrong
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="its state.json holds no adapters that can be used"):
        Assistant(run, "cpu")


def test_an_adapter_that_is_missing_is_an_error(one, tmp_path):
    shutil.copytree(one[1], tmp_path / "r")
    step = tmp_path / "r/step-00000020"
    state = json.loads((step / "state.json").read_text())
    tensors = load_file(step / "model.safetensors")
    del tensors["llm.transformer.h.2.mlp.c_fc.lora_B.weight"]
    save_file(tensors, step / "model.safetensors")
    del state["files"]
    with pytest.raises(UserError, match="missing llm.transformer.h.2.mlp.c_fc.lora_B.weight"):
        checkpoint.load_weights(load_vlm(config.read_config(one[1])), step)
