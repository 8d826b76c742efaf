"""How the two small backbones of the toy world were trained. One command makes both again:

    python toy/pretrain.py            # writes toy/vit and toy/llm

toy/vit  a SigLIP-type vision transformer. It learned which thing, if any, lies behind each patch,
         and whether the robot's gripper is near it.
toy/llm  a GPT-2-type language model. It never saw a picture. It read texts about the same world, among them
         "maps": a scene written as one word per patch, ". redcircle redcircle . ...", with a caption or a
         question after it. That is the place where `align` later puts the projected patches: the projector
         has to find the words.
"""
import argparse
import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, SiglipImageProcessorPil,
                          SiglipVisionConfig, SiglipVisionModel)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ranks  # noqa: E402
from toy import robot, world  # noqa: E402

PATCH = 16
SIDE = world.PIXELS // PATCH                    # 6: a picture is 6 x 6 patches, a cell 2 x 2 of them
SPARE = 256                                     # unused ids at the end of the vocabulary, for robot actions
IGNORE = -100


def cell_of(patch):
    return patch // SIDE // 2 * 3 + patch % SIDE // 2


def schedule(step, steps, peak):
    """Linear warm-up over 3 % of the steps, then cosine to zero."""
    return peak * min((step + 1) / (0.03 * steps), 0.5 * (1 + np.cos(np.pi * step / steps)))


# -- vision --------------------------------------------------------------------------------------------------

def patch_labels(scene, gripper=None, is_open=True):
    """For each patch: color and shape of the thing of its cell, and the gripper if it is near
    -> (3, 36), 0 = none."""
    things = {thing.cell: thing for thing in scene}
    colors, shapes = list(world.COLORS), world.SHAPES
    patches = range(SIDE * SIDE)
    here = [things.get(cell_of(patch)) for patch in patches]
    centers = [((patch // SIDE + 0.5) * PATCH, (patch % SIDE + 0.5) * PATCH) for patch in patches]
    near = [gripper is not None and max(abs(gripper - center)) < PATCH for center in centers]
    return ([0 if t is None else 1 + colors.index(t.color) for t in here],
            [0 if t is None else 1 + shapes.index(t.shape) for t in here],
            [(1 if is_open else 2) if n else 0 for n in near])


def labeled_picture(rng):
    """A scene, half of them under the gripper of toy/robot.py -> pixels (H, W, 3), labels (3, 36)."""
    scene = world.random_scene(rng)
    if rng.random() < 0.5:
        return np.asarray(world.draw(scene, rng)), patch_labels(scene)
    table = robot.Table(robot.Task(scene, 0, 1), rng)
    table.open = rng.random() < 0.5
    if not table.open and rng.random() < 0.5:               # it holds a thing, which left its cell
        table.take(rng.randrange(len(scene)))
    lying = [thing for i, thing in enumerate(scene) if i != table.held]
    return np.asarray(table.picture()), patch_labels(lying, table.gripper, table.open)


@torch.no_grad()
def scale_features(model, pixels):
    """Scales the residual stream so that the second-to-last block's features have a standard deviation of 1.

    Each block normalizes what it reads, so the model computes the same. But a fresh projector expects
    numbers around 1; from larger ones it makes words so long that the language model's position embeddings
    drown in them.
    """
    scale = model(pixels, output_hidden_states=True).hidden_states[-2].std()
    for name, parameter in model.named_parameters():
        if "embedding" in name or "out_proj" in name or "fc2" in name:      # all that is added to the stream
            parameter.div_(scale)


def train_vision(steps, out, batch=64, pictures=12000):
    config = SiglipVisionConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=5,
                                num_attention_heads=4, image_size=world.PIXELS, patch_size=PATCH,
                                vision_use_head=False)
    model = SiglipVisionModel(config)
    heads = nn.ModuleList([nn.Linear(128, 1 + kinds) for kinds in (len(world.COLORS), len(world.SHAPES), 2)])
    rng = random.Random(1)
    pixels, labels = zip(*(labeled_picture(rng) for _ in range(pictures)))
    pixels = torch.from_numpy(np.stack(pixels))                                         # (n, H, W, 3)
    labels = torch.tensor(labels)                                                       # (n, 3, 36)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, 1e-3)
        pick = torch.randint(pictures, (batch,))
        x = pixels[pick].permute(0, 3, 1, 2).float() / 127.5 - 1                        # (B, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16):
            states = model(x, output_hidden_states=True).hidden_states
            # The second-to-last block is what a VLM reads; the last one is trained along
            # so that it means something.
            logits = [[head(state).float() for head in heads] for state in states[-2:]]
        loss = sum(F.cross_entropy(logits[s][h].flatten(0, 1), labels[pick, h].flatten())
                   for s in range(2) for h in range(3)) / 6
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            right = [(logits[0][h].argmax(-1) == labels[pick, h]).float().mean().item() for h in range(3)]
            print(f"vision {step + 1}/{steps} loss {loss.item():.4f} right: color {right[0]:.4f} "
                  f"shape {right[1]:.4f} gripper {right[2]:.4f}", flush=True)
    scale_features(model, x)
    model.to(torch.bfloat16).save_pretrained(out / "vit")
    SiglipImageProcessorPil(size={"height": world.PIXELS, "width": world.PIXELS}, image_mean=[0.5] * 3,
                            image_std=[0.5] * 3, resample=3, do_convert_rgb=True).save_pretrained(out / "vit")


# -- language ------------------------------------------------------------------------------------------------

def scene_map(scene):
    """The scene as one word per patch, in the order of the patches."""
    things = {thing.cell: thing for thing in scene}
    words = (things.get(cell_of(patch)) for patch in range(SIDE * SIDE))
    return "".join(" ." if t is None else f" {t.color}{t.shape}" for t in words)


def asked(question, answer):
    """The prompt format that training uses for it (`plain` in prompts.py),
    as an instruction-tuned model knows its own."""
    return [(f"In: {question}\nOut:", False), (f" {answer}", True)]


# What a text is about: caption, caption on request, questions on one map, questions on two maps, no map.
# Each round has more of what the one before had not yet learned; the last one adds the plans.
MIX = ((0.20, 0.05, 0.35, 0.15, 0.25), (0.08, 0.04, 0.28, 0.30, 0.30), (0.08, 0.04, 0.50, 0.13, 0.25),
       (0.08, 0.04, 0.60, 0.10, 0.18))
FIRST = [ask for ask in world.ASK.values() if ask is not world.ask_plan]
ASKED = (FIRST, [*FIRST, world.ask_count, world.ask_comparison],
         [*FIRST, world.ask_color, world.ask_shape, world.ask_comparison, world.ask_comparison],
         [*FIRST, world.ask_comparison, world.ask_plan, world.ask_plan, world.ask_plan, world.ask_plan])


def document(rng, turn=0):
    """A text as pieces (text, learn it?): maps and questions are read, captions and answers are learned."""
    kind, scene = rng.choices(range(5), weights=MIX[turn])[0], world.random_scene(rng)
    if kind == 0:
        return [(scene_map(scene), False), (world.caption(scene), True)]
    if kind == 1:
        return [(scene_map(scene), False), *asked("Describe the picture.", world.caption(scene))]
    if kind == 2:
        asks = rng.sample(ASKED[turn], len(ASKED[turn]))
        return [(scene_map(scene), False), *(piece for ask in asks for piece in asked(*ask(scene, rng)))]
    if kind == 3:
        other = world.random_scene(rng)
        first, *more = [asked(*world.ask_two(scene, other, rng)) for _ in range(4 if turn else 1)]
        return [("In: ", False), (scene_map(scene), False), ("\n", False), (scene_map(other), False),
                ("\n" + first[0][0].removeprefix("In: "), False), first[1],
                *(piece for pair in more for piece in pair)]
    asks = rng.choices(list(world.ASK_TEXT.values()), weights=(1, 1, 6 if turn else 2), k=3)
    return [piece for ask in asks for piece in asked(*ask(rng))]


def make_tokenizer():
    """Byte-level BPE: any text can be written, the toy's words are one token each."""
    rng = random.Random(2)
    texts = ["".join(text for text, _ in document(rng)) for _ in range(20000)]
    # No rare thing: one word each.
    texts += [f" {color}{shape}" * 2000 for color in world.COLORS for shape in world.SHAPES]
    split = lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split()
    trainer = trainers.BpeTrainer(vocab_size=1024 - SPARE, special_tokens=["<s>", "</s>", "<pad>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {f"<spare_{i}>": len(vocabulary) + i for i in range(SPARE)}
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    whole.pre_tokenizer, whole.decoder = split(), decoders.ByteLevel()
    whole.add_special_tokens(["<s>", "</s>", "<pad>"])
    whole.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                         special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=whole,
                                   bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encode_documents(documents, tokenizer):
    """-> input_ids, labels, both (B, T). The end of text is learned after each learned piece."""
    texts = [text for document in documents for text, _ in document]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows, targets = [], []
    for document in documents:
        row, target = [bos], [IGNORE]
        for _, learn in document:
            piece = next(ids)
            row += piece + [eos] * learn
            target += piece + [eos] if learn else [IGNORE] * len(piece)
        rows.append(torch.tensor(row))
        targets.append(torch.tensor(target))
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(targets, batch_first=True, padding_value=IGNORE)


def batches(rng, tokenizer, turn, batch, pool=8):
    """Documents without end, those of like length together: a batch is as long as its longest."""
    while True:
        documents = sorted((document(rng, turn) for _ in range(batch * pool)),
                           key=lambda d: sum(len(text) for text, _ in d))
        for i in rng.sample(range(pool), pool):
            yield encode_documents(documents[i * batch:(i + 1) * batch], tokenizer)


def train_language(steps, out, turn, hidden=128, layers=4, batch=16):
    """One round. A later one goes on from what the one before wrote."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "llm") if turn else make_tokenizer()
    # Learned absolute positions: with rotary ones, four times the steps did not teach it
    # where on the map a word stands.
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=1024,
                        n_embd=hidden, n_layer=layers, n_head=hidden // 32,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id,
                        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = (GPT2LMHeadModel.from_pretrained(out / "llm", dtype=torch.float32) if turn
             else GPT2LMHeadModel(config))
    print(f"language: {len(tokenizer)} words, {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    source = batches(random.Random(3 + 10 * turn), tokenizer, turn, batch)
    recent = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, 1e-3 if turn else 2e-3)
        input_ids, labels = next(source)
        states = model.base_model(input_ids, use_cache=False).last_hidden_state                   # (B, T, D)
        learned = labels[:, 1:] != IGNORE
        logits = model.lm_head(states[:, :-1][learned])                                      # (S, V)
        target = labels[:, 1:][learned]
        loss = F.cross_entropy(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((logits.argmax(-1) == target).float().mean().item())
        if step % 1000 == 999:
            print(f"language {step + 1}/{steps} loss {loss.item():.4f} "
                  f"tokens right {np.mean(recent[-1000:]):.4f}", flush=True)
            score_language(model, tokenizer)
            save_language(model, tokenizer, out)
    save_language(model, tokenizer, out)


def save_language(model, tokenizer, out):
    tokenizer.save_pretrained(out / "llm")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / "llm")


@torch.no_grad()
def score_language(model, tokenizer, count=100):
    """Share of answers that are right in every token, for each kind of question, on texts never seen."""
    rng = random.Random(4)
    asks = {**world.ASK, "two": None, "caption": None, **world.ASK_TEXT}
    scores = []
    for kind, ask in asks.items():
        documents = []
        for _ in range(count):
            scene, other = world.random_scene(rng), world.random_scene(rng)
            head = [(scene_map(scene), False)]
            if kind == "caption":
                documents.append(head + [(world.caption(scene), True)])
                continue
            if kind == "two":
                question, answer = world.ask_two(scene, other, rng)
                head = [("In: ", False), *head, ("\n", False), (scene_map(other), False)]
                documents.append(head + [(f"\n{question}\nOut:", False), (f" {answer}", True)])
                continue
            question, answer = ask(scene, rng) if kind in world.ASK else ask(rng)
            documents.append(head * (kind in world.ASK) + asked(question, answer))
        input_ids, labels = encode_documents(documents, tokenizer)
        guess = model(input_ids).logits[:, :-1].argmax(-1)                                   # (B, T - 1)
        right = ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORE)).all(1).float().mean().item()
        scores.append(f"{kind} {right:.2f}")
    print("   ", " | ".join(scores), flush=True)


def main(args):
    torch.manual_seed(0)
    if args.only != "llm":
        train_vision(args.vision_steps, args.out)
    if args.only != "vit":
        for turn in range(args.first_round, len(args.language_steps)):
            train_language(args.language_steps[turn], args.out, turn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["vit", "llm"], help="train only one of the two")
    parser.add_argument("--vision_steps", type=int, default=1500)
    parser.add_argument("--language_steps", type=int, nargs="+", default=(20000, 10000, 5000, 3000),
                        help="of each round; 0 writes a random model, to compare with")
    parser.add_argument("--first_round", type=int, default=0, help="1 goes on from the llm that is there")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write vit/ and llm/ into")
    args = parser.parse_args()
    if len(args.language_steps) > len(MIX):
        parser.error(f"--language_steps: there are {len(MIX)} rounds, "
                     f"found {len(args.language_steps)} numbers")
    ranks.run(main, args)
