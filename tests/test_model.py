"""model.py: features, gradients, freezing; and that it computes what transformers computes."""
import copy
import math
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import looks, save_preprocessor, square
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (AutoModelForCausalLM, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel,
                          CohereConfig, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig,
                          Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel, FalconH1Config,
                          Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config, GPT2LMHeadModel,
                          GPTNeoXConfig, GraniteConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, MistralConfig, Olmo2Config, OPTConfig,
                          OPTForCausalLM, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config, SiglipConfig,
                          SiglipModel, SiglipVisionConfig, SiglipVisionModel, SmolLM3Config)

import checkpoint
from config import TRAINS, UserError
from data import collate
from generate import Assistant
from images import load_image_transforms
from model import PARTS, VLM, VisionBackbone, blocks, load_llm, load_vision, make_projector
from prompts import IGNORE, IMAGE
from train import count_together, look, right_tokens, train_step

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            image_size=16, patch_size=8)
VISION = {"clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZE)),
          "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE, vision_use_head=False)),
          "siglip-head": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE)),
          "dinov2": lambda: Dinov2Model(Dinov2Config(**{**SIZE, "intermediate_size": None}, mlp_ratio=2)),
          "dinov2-registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
              **{**SIZE, "intermediate_size": None}, mlp_ratio=2, num_register_tokens=4)),
          "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZE, num_register_tokens=4))}
SKIP = {"clip": 1, "siglip": 0, "siglip-head": 0, "dinov2": 1, "dinov2-registers": 5, "dinov3": 5}
VOCABULARY, PATCHES = 97, 4
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)      # as in fp32 and bf16


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny_llm(kind="llama"):
    torch.manual_seed(1)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=256,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2))
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def tiny_vlm(vision="siglip", llm="llama", stage="finetune"):
    torch.manual_seed(0)
    backbone = VisionBackbone([VISION[vision]()])
    model = VLM(backbone, make_projector("gelu-mlp", backbone.width, 32), tiny_llm(llm))
    model.set_trained(TRAINS[stage].split(","))
    return model


def example(i, pictures=1):
    """Example i supervises i + 1 tokens and is 10 + 2 i long behind its pictures,
    so a wrong average shows."""
    generator = torch.Generator().manual_seed(i)
    text = torch.randint(3, VOCABULARY - 1, (10 + 2 * i,), generator=generator)
    input_ids = torch.cat([torch.tensor([1] + [IMAGE] * PATCHES * pictures), text])
    labels = torch.full_like(input_ids, IGNORE)
    labels[-(i + 1):] = text[-(i + 1):]
    return {"id": str(i), "input_ids": input_ids, "labels": labels,
            "images": [[torch.randn(3, 16, 16, generator=generator)] for _ in range(pictures)],
            "replaced": 0, "source": "test"}


def batches(sizes, pictures=1):
    cut, start = [], 0
    for size in sizes:
        cut.append(collate([example(i, pictures) for i in range(start, start + size)]))
        start += size
    return cut


@pytest.mark.parametrize("kind", VISION)
def test_features_are_the_second_to_last_blocks_patches(kind):
    model = VISION[kind]().eval()
    pixels = torch.randn(2, 3, 16, 16)
    features = VisionBackbone([model])([pixels])                                    # (2, P, 32)
    assert features.shape == (2, PATCHES, 32)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    seen = []
    handle = blocks[1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(pixels)
    handle.remove()
    assert_close(features, seen[0][:, SKIP[kind]:])


def test_two_backbones_stand_side_by_side_on_the_channel_axis():
    one, two = VISION["dinov2"]().eval(), VISION["siglip"]().eval()
    a, b = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    both = VisionBackbone([one, two])
    assert both.width == 64
    assert_close(both([a, b]), torch.cat([VisionBackbone([one])([a]), VisionBackbone([two])([b])], -1))


@pytest.mark.parametrize("kind", VISION)
def test_every_vision_kind_loads_from_its_folder(kind, tmp_path):
    VISION[kind]().save_pretrained(tmp_path)
    assert load_vision(str(tmp_path))([torch.zeros(1, 3, 16, 16)]).shape == (1, PATCHES, 32)


FIT = {"interpolate_pos_encoding": True}
TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2}
# kind: (a model as the hub has it, its type, positions in front of the patches, how it fits another size)
FOLDERS = {
    "CLIP": (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZE)), "clip", 1, FIT),
    "SigLIP, SigLIP2": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SIZE)), "siglip", 0,
                        FIT),
    "DINOv2": (VISION["dinov2"], "dinov2", 1, {}),
    "DINOv2 with registers": (VISION["dinov2-registers"], "dinov2_with_registers", 5, {}),
    "DINOv3": (VISION["dinov3"], "dinov3_vit", 5, {})}


@pytest.mark.parametrize("size", [16, 24, 40])              # its own, and two others
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_gives_the_features_of_the_untouched_model(kind, size, tmp_path):
    torch.manual_seed(0)
    make, name, skip, fit = FOLDERS[kind]
    model = make().eval()
    model.save_pretrained(tmp_path)
    folder = save_preprocessor(tmp_path, square(size))
    assert model.config.model_type == name
    transform, = load_image_transforms(folder, "resize-naive")
    pixels = transform(Image.effect_noise((50, 30), 99).convert("RGB"))[None]
    with torch.no_grad():
        features = load_vision(folder)([pixels])
        tower = getattr(model, "vision_model", model)
        *_, second_to_last, last = tower(pixels, output_hidden_states=True, **fit).hidden_states
    assert features.shape == (1, transform.patches, 32) and transform.patches == (size // 8) ** 2
    assert torch.equal(features, second_to_last[:, skip:])
    assert not torch.equal(features, last[:, skip:])


@pytest.mark.parametrize("stage,parts", [("align", {"projector"}), ("finetune", {"projector", "llm"}),
                                         ("full-finetune", {"vision", "projector", "llm"}),
                                         ("vla", {"vision", "projector", "llm"})])
@pytest.mark.parametrize("kind", VISION)
def test_a_stage_changes_all_of_what_it_trains_and_nothing_else(kind, stage, parts):
    model = tiny_vlm(kind, stage=stage)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == parts
    for name in PARTS:                                      # the frozen in eval mode, down to the last module
        assert {module.training for module in getattr(model, name).modules()} == {name in parts}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients(model, batches([4])).keys() == trained
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    one_step(model, batches([4]), optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def one_step(model, micro_batches, optimizer, max_norm=1.0):
    """As the loop does it, on one rank without DDP: the same sums, faster to build
    -> the loss, the gradient norm before clipping."""
    model.no_sync = nullcontext
    cfg = SimpleNamespace(max_grad_norm=max_norm, precision="fp32", shard="no")
    tokens = count_together(micro_batches, False)["tokens"]
    queued = train_step(model, optimizer, NO_SCALER, micro_batches, tokens, cfg, torch.device("cpu"))
    return look(*queued, micro_batches, tokens, right_tokens)[:2]


def gradients(model, cut, weigh=None):
    """Gradients of one step, by name. `weigh` replaces the exact weight of a micro-batch's mean loss."""
    model = copy.deepcopy(model)
    if weigh is None:
        return seen_by_the_optimizer(model, cut, max_norm=1e9)[0]
    for batch in cut:
        loss, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"])
        (loss / (batch["labels"][:, 1:] != IGNORE).sum() * weigh).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def seen_by_the_optimizer(model, cut, max_norm):
    """-> gradients when the optimizer makes its step, by name; the norm that the step reports."""
    grabbed = {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    optimizer.register_step_pre_hook(lambda *_: grabbed.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    _, norm = one_step(model, cut, optimizer, max_norm)
    return grabbed, norm


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name in want:                                                       # float rounding of sums in fp32
        assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (2, 3, 3), (1,) * 8])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_how_a_batch_is_cut_does_not_change_the_step(sizes, pictures):
    model = tiny_vlm()
    assert_same_gradients(gradients(model, batches(sizes, pictures)),
                          gradients(model, batches([8], pictures)))


def test_mean_of_means_would_be_caught():
    model = tiny_vlm()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(model, batches((1, 7)), weigh=1 / 2), gradients(model, batches([8])))


@pytest.mark.parametrize("stage", ["align", "finetune", "full-finetune"])
@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(stage, llm):
    model = tiny_vlm(stage=stage, llm=llm)
    want = gradients(model, batches([8]))
    model.use_recomputing()
    for sizes in ((8,), (1, 7), (2, 3, 3)):
        assert_same_gradients(gradients(model, batches(sizes)), want)
    calls, batch = [], batches([2])[0]
    blocks(model.llm.base_model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, _ = model(batch["input_ids"], batch["labels"], batch["pixel_values"])
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2, "the layer was not run again in backward"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_language_model_drops_nothing(checkpointing):
    """OPT's layers ask their own training mode whether to drop, not that of a dropout module in them."""
    torch.manual_seed(0)
    opt = OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                   num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=99,
                                   dropout=0.5))
    for stage in ("align", "finetune"):
        model = VLM(tiny_vlm().vision, make_projector("gelu-mlp", 32, 32), opt)
        model.set_trained(TRAINS[stage].split(","))
        if checkpointing:
            model.use_recomputing()
        one, two = (loss_of(model, batches([2])[0]).item() for _ in range(2))
        assert (one == two) == (stage == "align")


def loss_of(model, batch):
    return model(batch["input_ids"], batch["labels"], batch["pixel_values"])[0]


def test_a_long_gradient_is_clipped_and_a_short_one_is_not():
    model = tiny_vlm()

    def length(limit):
        """Of the gradient that the optimizer sees, and of the one that the step reports."""
        grads, norm = seen_by_the_optimizer(model, batches((2, 2)), limit)
        return torch.cat([grad.flatten() for grad in grads.values()]).norm().item(), norm

    free, reported = length(1e9)
    assert reported == pytest.approx(free)
    assert length(free / 2) == pytest.approx((free / 2, free), rel=1e-5)
    assert length(free * 2) == pytest.approx((free, free))


def test_logits_in_pieces_change_no_loss_no_guess_and_no_gradient(monkeypatch):
    whole, pieces = tiny_vlm(), tiny_vlm()
    batch, = batches((4,))
    want, guessed = whole(batch["input_ids"], batch["labels"], batch["pixel_values"])
    monkeypatch.setattr("model.CHUNK", 3)                   # of ten supervised positions
    got, again = pieces(batch["input_ids"], batch["labels"], batch["pixel_values"])
    (want * 2).backward(), (got * 2).backward()
    assert_close(got, want)
    assert torch.equal(again, guessed)
    for (name, a), b in zip(pieces.named_parameters(), whole.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or b.grad is None or bool(a.grad.allclose(b.grad, atol=1e-6)), name


def test_a_compiled_model_has_the_same_loss_at_every_length_from_a_graph_for_each_transformer(monkeypatch):
    """Which graphs there are, forward and backward, is what this project decides. They are run operation by
    operation: as code for a CPU, a C++ compiler would need a minute. tests/gpu.py compares them as code."""
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block, **how: compile_it(block, backend="aot_eager", **how))
    plain, compiled = tiny_vlm(), tiny_vlm()
    compiled.use_compile()
    torch._dynamo.utils.counters.clear()
    for sizes, pictures in (((5,), 1), ((6,), 1), ((4,), 0)):       # not 4 pictures: each has 4 patches
        batch, = batches(sizes, pictures)
        want, _ = plain(batch["input_ids"], batch["labels"], batch["pixel_values"])
        got, _ = compiled(batch["input_ids"], batch["labels"], batch["pixel_values"])
        got.backward()
        assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2             # of vision and LLM


def test_the_last_vision_block_does_no_work_and_changes_no_feature():
    model, pixels = VISION["siglip"](), torch.randn(2, 3, 16, 16)
    want = model(pixels, output_hidden_states=True).hidden_states[-2]
    backbone = VisionBackbone([model])
    model.encoder.layers[-1].mlp.fc1.weight.data.fill_(math.nan)    # would be seen in whatever it touches
    assert torch.equal(backbone([pixels]), want)
    assert not model(pixels).last_hidden_state.isnan().any()


def test_of_the_vision_blocks_only_the_features_are_kept():
    """With output_hidden_states all blocks' outputs would be alive when the last one runs."""
    model, alive = SiglipVisionModel(SiglipVisionConfig(**{**SIZE, "num_hidden_layers": 6})), []
    backbone, outputs = VisionBackbone([model]), []
    for block in model.encoder.layers[:-1]:
        block.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    model.encoder.layers[-1].register_forward_hook(
        lambda *_: alive.append([output() is not None for output in outputs]))
    with torch.no_grad():
        backbone([torch.zeros(1, 3, 16, 16)])
    assert alive == [[False, False, False, False, True]]
    assert outputs[-1]() is None and backbone.features is None


# -- what a GPU is not waited for ----------------------------------------------------------------------------

def a_step(model, micro_batches):
    """-> what the step itself would wait for; what looking at its results would."""
    model.no_sync = nullcontext
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    cfg = SimpleNamespace(max_grad_norm=1.0, precision="fp32", shard="no")
    with looks() as in_the_step:
        queued = train_step(model, optimizer, NO_SCALER, micro_batches, 9, cfg, torch.device("cpu"))
    with looks() as behind_it:
        look(*queued, micro_batches, 9, lambda batch, predicted: predicted.cpu()[:1].double())
    return in_the_step, behind_it


@pytest.mark.parametrize("stage, pictures", [("align", 1), ("finetune", 0), ("finetune", 2),
                                             ("full-finetune", 1)])
@pytest.mark.parametrize("llm", ["llama", "gpt2"])
@pytest.mark.parametrize("recomputing", [False, True])
def test_a_step_waits_for_nothing_and_its_results_are_read_once(stage, pictures, llm, recomputing):
    """From the pictures' bytes to the update. The second .tolist() is that of the ranks' sums, on the CPU."""
    model = tiny_vlm(llm=llm, stage=stage)
    model.vision.register_buffer("levels", torch.zeros(1, 768))
    if recomputing:
        model.use_recomputing()
    micro_batches = batches((2, 2, 2), pictures)
    for batch in micro_batches:
        batch["pixel_values"] = [pixels.to(torch.uint8) for pixels in batch["pixel_values"]]
    in_the_step, behind_it = a_step(model, micro_batches)
    assert in_the_step == {}
    assert behind_it == {"tolist": 2, "cpu": 3, "allreduce_": 1}


@pytest.mark.parametrize("what, seen", [
    (lambda x: x.isnan().any().item(), "_local_scalar_dense"), (lambda x: bool(x.sum() > 0), "__bool__"),
    (lambda x: x.tolist(), "tolist"), (lambda x: x.cpu(), "cpu"), (lambda x: x[x > 0], "index by a mask"),
    (lambda x: x.nonzero(), "nonzero"), (lambda x: x.masked_select(x > 0), "masked_select")])
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_waits_would_be_caught(what, seen, backward):
    """In backward only what the operations themselves wait for: no Python of ours runs there."""
    if backward and seen in ("__bool__", "tolist", "cpu"):
        seen = {"__bool__": "_local_scalar_dense"}.get(seen)
    model, watched = tiny_vlm(), []

    def waits(grad):
        watched.append(what(grad))

    def forward_hook(module, args, out):
        out.register_hook(waits) if backward else waits(out)

    model.projector[0].register_forward_hook(forward_hook)
    found, _ = a_step(model, batches((2, 2)))
    assert len(watched) == 2 and (seen is None or found[seen] == 2)


def sent_by_a_step(micro_batches, no_sync=DistributedDataParallel.no_sync):
    """What DDP sends to other ranks; of the second step, as DDP sorts its gradients in the first
    -> how many sums over the ranks, how many tensors of rank zero."""
    model = DistributedDataParallel(tiny_vlm(), find_unused_parameters=True, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    cfg = SimpleNamespace(max_grad_norm=1.0, precision="fp32", shard="no")
    model.no_sync = partial(no_sync, model)
    for _ in range(2):
        with looks() as found:
            train_step(model, optimizer, NO_SCALER, micro_batches, 9, cfg, torch.device("cpu"))
    return found["allreduce_"], found["broadcast_"]


def test_an_accumulated_step_sends_its_gradients_once_and_no_buffers():
    """Two all-reduces: the gradients, which fit into one bucket, and which weights had none."""
    assert sent_by_a_step(batches((2,))) == sent_by_a_step(batches((2, 2, 2))) == (2, 0)


def test_gradients_sent_after_each_micro_batch_would_be_caught():
    assert sent_by_a_step(batches((2, 2, 2)), no_sync=lambda model: nullcontext()) == (6, 0)


def state_of(model, optimizer):
    return [tensor.clone() for parameter in model.parameters() if parameter.requires_grad
            for tensor in (parameter, *optimizer.state[parameter].values())]


@pytest.mark.parametrize("where", ["the loss", "a gradient", "nowhere"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(where, bad, micro_batch):
    """Though the update is made before anybody looks. An infinite loss may have a finite gradient."""
    model, calls = tiny_vlm(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    one_step(model, batches((4, 4)), optimizer)
    before = state_of(model, optimizer)

    def spoil(module, args, out):
        calls.append(1)
        here = len(calls) == micro_batch + 1
        return (out[0] + (bad if here and where == "the loss" else 0), out[1])

    model.register_forward_hook(spoil)
    if where == "a gradient":
        model.projector[2].bias.register_hook(
            lambda grad: grad * (bad if len(calls) == micro_batch + 1 else 1))
    loss, norm = one_step(model, batches((4, 4)), optimizer)
    same = [torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True)]
    assert all(same) if where != "nowhere" else not any(same)
    assert math.isfinite(loss) == (where != "the loss") and math.isfinite(norm) == (where == "nowhere")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_changes_nothing():
    model = tiny_vlm().eval()
    total = sum(loss_of(model, collate([example(i)])) for i in range(4))
    batch = collate([example(i) for i in range(4)])
    assert_close(loss_of(model, batch), total, rtol=1e-5, atol=1e-5)        # sums in another order
    for row, mask in enumerate(batch["attention_mask"]):    # to the left
        for name in ("input_ids", "labels"):
            batch[name][row] = batch[name][row].roll(int((~mask).sum()))
    with pytest.raises(AssertionError):                     # there it would be seen, as there is no mask
        assert_close(loss_of(model, batch), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_forward_is_that_of_transformers_llava(pictures):
    torch.manual_seed(0)
    ours = tiny_vlm().eval()
    image_token = VOCABULARY - 1
    vision_config = SiglipVisionConfig(**SIZE, vision_use_head=False)
    theirs = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision_config, text_config=ours.llm.config, image_token_index=image_token,
        vision_feature_select_strategy="full", vision_feature_layer=-2, projector_hidden_act="gelu",
        multimodal_projector_bias=True)).eval()
    theirs.model.vision_tower.load_state_dict(ours.vision.models[0].state_dict())
    theirs.model.language_model.load_state_dict(ours.llm.model.state_dict())
    theirs.lm_head.load_state_dict(ours.llm.lm_head.state_dict())
    theirs.model.multi_modal_projector.linear_1.load_state_dict(ours.projector[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(ours.projector[2].state_dict())
    batch = collate([example(i, pictures) for i in range(3)])
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, image_token)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=batch["pixel_values"][0], labels=batch["labels"],
                      attention_mask=batch["attention_mask"].long())
        x = ours.embed(batch["input_ids"], batch["pixel_values"])
        real = batch["attention_mask"]
        assert_close(ours.llm(inputs_embeds=x).logits[real], want.logits[real], rtol=1e-4, atol=1e-5)
        loss, _ = ours(batch["input_ids"], batch["labels"], batch["pixel_values"])
    count = (batch["labels"][:, 1:] != IGNORE).sum()
    assert_close(loss / count, want.loss, rtol=1e-5, atol=1e-5)
    # Features of the last block would be caught.
    wrong, vision = copy.deepcopy(ours), theirs.model.vision_tower
    wrong.vision.forward = lambda pixels: vision(pixels[0], output_hidden_states=True).hidden_states[-1]
    with pytest.raises(AssertionError):
        assert_close(loss_of(wrong, batch) / count, want.loss, rtol=1e-5, atol=1e-5)
    same_place = cross_entropy(want.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    with pytest.raises(AssertionError):                     # position t predicting token t would be caught
        assert_close(same_place, want.loss, rtol=1e-5, atol=1e-5)
    full = cross_entropy(want.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                         ignore_index=IGNORE)
    assert_close(loss / count, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_a_random_model_starts_at_ln_v_and_overfits_one_batch(llm):
    model = tiny_vlm(llm=llm)
    batch = batches([4])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=True)
    losses = [one_step(model, batch, optimizer)[0] for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.1)
    assert losses[-1] < 0.05


def test_a_text_only_step_leaves_the_projector_and_its_adam_state_alone():
    model = tiny_vlm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  lr=1e-2, weight_decay=0.1, fused=True)
    one_step(model, batches([4]), optimizer)

    def projector():
        weights = [p.clone() for p in model.projector.parameters()]
        return weights + [t.clone() for p in model.projector.parameters()
                          for t in optimizer.state[p].values()]

    before = projector()
    one_step(model, batches([4], pictures=0), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, projector(), strict=True))
    # The usual trick, a black picture of weight zero, gives a gradient of zero.
    # Momentum and decay then move all.
    for p in model.projector.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, projector(), strict=True))


@pytest.mark.parametrize("llm", ["llama", "gpt2"])
def test_batched_generation_equals_one_by_one(llm):
    assistant = object.__new__(Assistant)                   # without a run folder: only what answering needs
    assistant.device, assistant.model = torch.device("cpu"), tiny_vlm(llm=llm).eval()
    assistant.language = type("Language", (), {"end_id": 2})()
    examples = [example(i, pictures) for i, pictures in ((0, 1), (5, 0), (2, 2), (7, 1))]
    together = assistant.answer_ids(examples, max_new_tokens=20)
    assert together == [assistant.answer_ids([one], max_new_tokens=20)[0] for one in examples]
    assert len({tuple(answer) for answer in together}) > 1


def test_generation_that_sees_its_padding_would_be_caught():
    model, examples = tiny_vlm().eval(), [example(0), example(7)]
    assistant = object.__new__(Assistant)
    assistant.device, assistant.model = torch.device("cpu"), model
    assistant.language = type("Language", (), {"end_id": 2})()
    want, generate = assistant.answer_ids(examples, max_new_tokens=20), model.llm.generate
    model.llm.generate = lambda attention_mask, **how: generate(attention_mask=attention_mask | 1, **how)
    assert assistant.answer_ids(examples, max_new_tokens=20)[0] != want[0]      # the shorter one has padding


def test_the_answer_depends_on_the_picture():
    model, one = tiny_vlm().eval(), example(3)
    black = one | {"images": [[-torch.ones(3, 16, 16)]]}
    with torch.no_grad():
        seen, blind = (model(b["input_ids"], b["labels"], b["pixel_values"])[0]
                       for b in map(collate, ([one], [black])))
    assert abs(seen - blind) > 1e-3


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path):
    model = tiny_vlm(llm="gpt2")                            # GPT-2 ties its embeddings and its output layer
    tensors = checkpoint.tensors_of(model, ["projector", "llm"])
    assert not any("lm_head" in name for name in tensors)
    folder = checkpoint.save(tmp_path, 1, tensors, {}, {"parts": ["projector", "llm"]}, keep=1)
    other = tiny_vlm(llm="gpt2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    checkpoint.load_weights(other, folder)
    assert torch.equal(other.llm.lm_head.weight, model.llm.transformer.wte.weight)
    assert other.llm.lm_head.weight is other.llm.transformer.wte.weight


# -- language models -----------------------------------------------------------------------------------------

LLM = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
           num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = LLM | {"num_key_value_heads": 1}
MAMBA = GROUPED | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
LLMS = {
    "Llama, Vicuna": lambda: LlamaConfig(**GROUPED),
    "Llama 3.2, SmolLM, SmolLM2": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "SmolLM3": lambda: SmolLM3Config(**GROUPED),
    "Mistral": lambda: MistralConfig(**GROUPED),
    "Qwen2, Qwen2.5": lambda: Qwen2Config(**GROUPED),
    "Qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "Gemma": lambda: GemmaConfig(**GROUPED, head_dim=16),
    "Gemma 3": lambda: Gemma3TextConfig(**GROUPED, head_dim=16),
    "Phi-1, Phi-2": lambda: PhiConfig(**LLM),
    "Phi-3, Phi-4": lambda: Phi3Config(**GROUPED),
    "GPT-2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0,
                                embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2),
    "GPT-NeoX, Pythia": lambda: GPTNeoXConfig(**LLM),
    "OLMo 2": lambda: Olmo2Config(**GROUPED),
    "OPT": lambda: OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                             num_attention_heads=2, word_embed_proj_dim=32, dropout=0, attention_dropout=0),
    "Granite without scaling": lambda: GraniteConfig(**GROUPED, embedding_multiplier=12.0)}
OUTSIDE = {     # what these do to a logit or an embedding, neither `loss_of` nor `embed` would do
    "Gemma 2": lambda: Gemma2Config(**GROUPED, head_dim=16, initializer_range=0.2,
                                    final_logit_softcapping=30.0),
    "Command R": lambda: CohereConfig(**GROUPED, logit_scale=0.0625),
    "Granite": lambda: GraniteConfig(**GROUPED, logits_scaling=8.0),
    "Falcon-H1": lambda: FalconH1Config(**MAMBA, lm_head_multiplier=0.5, embedding_multiplier=1.0),
    "Falcon-H1, of its embeddings": lambda: FalconH1Config(**MAMBA, lm_head_multiplier=1.0,
                                                           embedding_multiplier=5.0)}


def saved_llm(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", LLMS)
def test_a_language_model_of_each_kind_learns_answers_and_has_its_own_loss(kind, tmp_path):
    llm = load_llm(saved_llm(LLMS[kind](), tmp_path))
    vision = VisionBackbone([VISION["siglip"]()])
    model = VLM(vision, make_projector("gelu-mlp", 32, llm.get_input_embeddings().embedding_dim), llm)
    model.set_trained(TRAINS["finetune"].split(","))
    text, = batches([4], pictures=0)
    with torch.no_grad():
        ours, guessed = model.eval()(text["input_ids"], text["labels"], [])
        logits = llm(text["input_ids"], attention_mask=text["attention_mask"]).logits[:, :-1]
    learned = text["labels"][:, 1:] != IGNORE
    want = cross_entropy(logits[learned], text["labels"][:, 1:][learned], reduction="sum")
    assert_close(ours, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(guessed, logits[learned].argmax(-1))
    model.train()
    grads = gradients(model, batches([2, 2]))
    assert grads.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.use_recomputing()
    assert_same_gradients(gradients(model, batches([2, 2])), grads)
    assistant = object.__new__(Assistant)
    assistant.device, assistant.model = torch.device("cpu"), model.eval()
    assistant.language = SimpleNamespace(end_id=2)
    assert assistant.answer_ids([example(0), example(5)], max_new_tokens=3) == [
        likeliest(model, example(i), 3) for i in (0, 5)]


@pytest.mark.parametrize("kind", LLMS)
def test_a_step_with_a_language_model_of_each_kind_waits_for_nothing(kind, tmp_path):
    llm = load_llm(saved_llm(LLMS[kind](), tmp_path))
    width = llm.get_input_embeddings().embedding_dim
    model = VLM(VisionBackbone([VISION["siglip"]()]), make_projector("gelu-mlp", 32, width), llm)
    model.set_trained(TRAINS["finetune"].split(","))
    assert a_step(model, batches((2, 2)))[0] == {}


@pytest.mark.parametrize("kind", LLMS)
def test_actions_are_those_of_generation_among_action_ids(kind, tmp_path):
    """Prompts of several lengths, and of one length, where attention gets no mask."""
    assistant = object.__new__(Assistant)
    assistant.device = torch.device("cpu")
    llm = load_llm(saved_llm(LLMS[kind](), tmp_path))
    width = llm.get_input_embeddings().embedding_dim
    vision = VisionBackbone([VISION["siglip"]()])
    assistant.model = VLM(vision, make_projector("gelu-mlp", 32, width), llm).eval()
    assistant.policy = SimpleNamespace(length=5, decoding="tokens", ids=list(range(20, 60)), end=60)
    many, options = [example(i) for i in (0, 5, 2, 7)], {"min_new_tokens": 5, "max_new_tokens": 5}
    for examples in (many, [example(3), example(3) | {"images": example(4)["images"]}]):
        with torch.no_grad():
            x, mask, _ = assistant.embed(examples, 5, 5)
            want = llm.generate(inputs_embeds=x, attention_mask=mask, pad_token_id=2, eos_token_id=2,
                                do_sample=False, prefix_allowed_tokens_fn=lambda *_: assistant.policy.ids,
                                **options)
            assert assistant.action_ids(examples).tolist() == want.tolist()
    assert len({tuple(row) for row in assistant.action_ids(many).tolist()}) > 1


@torch.no_grad()
def likeliest(model, example, steps):
    """Token by token, without a cache."""
    pixels = [torch.stack(views) for views in zip(*example["images"])]
    new, x = [], model.embed(example["input_ids"][None], pixels)
    while len(new) < steps and 2 not in new:
        new.append(int(model.llm(inputs_embeds=x).logits[0, -1].argmax()))
        x = torch.cat([x, model.llm.get_input_embeddings()(torch.tensor([[new[-1]]]))], 1)
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_language_model_that_changes_logits_or_embeddings_on_its_way_is_refused(kind, dtype, tmp_path):
    folder = saved_llm(OUTSIDE[kind](), tmp_path)
    with pytest.raises(UserError, match=f"{folder} changes its logits behind the output layer, or its embed"):
        load_llm(folder, dtype)


@pytest.mark.parametrize("kind", LLMS)
def test_a_language_model_that_does_not_is_the_same_bit_for_bit_in_bf16(kind, tmp_path):
    """So no rounding can have it refused. Logits of many sizes, as trained weights give them."""
    config = LLMS[kind]()
    config.initializer_range = 0.3
    llm, ids = load_llm(saved_llm(config, tmp_path), torch.bfloat16), torch.arange(4)[None]
    with torch.no_grad():
        states = llm.base_model(inputs_embeds=llm.get_input_embeddings()(ids)).last_hidden_state
        assert torch.equal(llm.get_output_embeddings()(states), llm(ids).logits)
