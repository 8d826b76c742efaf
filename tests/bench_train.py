"""How fast is the loop, beside what most people would take: transformers.Trainer with its LLaVA class?

    pip install -r requirements-bench.txt
    python tests/bench_train.py                             # two small models on a CPU, about half an hour
    python tests/bench_train.py --sizes 8M --rounds 1       # a first look, five minutes
    python tests/bench_train.py --sizes 0.5B,1.5B --epochs 2    # the shapes of real models: one GPU of 80 GB

Same weights (random, of the shapes below), same JSON, pictures, ids and labels, same global batch and dtype.
Each run is one epoch of 16 global batches, in a process of its own; ours and the peers take turns. `check`
first shows that both models have the same loss on the same example.

The lengths are a mix like LLaVA's: for `finetune` 94 % with a picture and 140 text tokens on average, 6 %
text only with 880; for `align` a caption of 20 tokens. At the CPU sizes all of it, patches included, is a
quarter as long.

Trainer is used as LLaVA uses it: examples padded on the right by a collator, the vision model frozen, loss on
the answers. Its order is random (Trainer's default), or `grouped`: LLaVA's --group_by_modality_length.

Two speeds: tokens per second by the clock, and per second of CPU time of the process that trains (without
data workers). On a CPU that others use too, the second is the one to trust. Padding is not counted as tokens.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STEPS, PICTURES = 16, 64

# name -> how much shorter all lengths are, global batch, micro-batch,
#         vision (width, layers, heads, MLP, picture size),
#         LLM (width, layers, heads, key heads, MLP, vocabulary). The small ones keep the proportions:
#         a vision model as large as the LLM's layers, and a vocabulary of a quarter of the LLM.
SIZES = {"1M": (8, 8, 4, (64, 2, 2, 128, 56), (64, 2, 4, 4, 128, 1024)),       # to try the script itself
         "8M": (4, 16, 8, (256, 6, 4, 1024, 112), (256, 8, 4, 4, 704, 8192)),
         "34M": (4, 8, 8, (512, 6, 8, 2048, 112), (512, 8, 8, 8, 1408, 16384)),
         # SigLIP so400m, and Qwen2.5
         "0.5B": (1, 128, 16, (1152, 27, 16, 4304, 224), (896, 24, 14, 2, 4864, 151936)),
         "1.5B": (1, 128, 4, (1152, 27, 16, 4304, 224), (1536, 28, 12, 2, 8960, 151936))}
WORKERS = {"1M": 1, "8M": 1, "34M": 1, "0.5B": 8, "1.5B": 8}
COLUMNS = ("ours", "trainer", "grouped")


# -- models and data -----------------------------------------------------------------------------------------

def make_world(folder, size, seed=0):
    """Both backbones, a tokenizer of one token a word, pictures, align.json and finetune.json."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig,
                              SiglipVisionModel)
    shorter, batch, _, (width, layers, heads, mlp, picture), llm = SIZES[size]
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                intermediate_size=mlp, image_size=picture, patch_size=14,
                                vision_use_head=False)
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": picture, "width": picture},
         "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    width, layers, heads, key_heads, mlp, words = llm
    LlamaForCausalLM(LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                 num_key_value_heads=key_heads, intermediate_size=mlp, vocab_size=words,
                                 tie_word_embeddings=True)).save_pretrained(folder / "llm")
    special = ["<unk>", "</s>", "<image>", "In", "Out", ":"]
    vocabulary = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(words - len(special))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "llm")

    (folder / "images").mkdir()
    rng = np.random.default_rng(seed)
    for i in range(PICTURES):                               # blurred noise: as large as a photo, as a JPEG
        noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        noise.resize((640, 480)).save(folder / "images" / f"{i}.jpg", quality=90)
    write_examples(folder, rng, shorter, (picture // 14) ** 2 * shorter, words - len(special), batch)


def write_examples(folder, rng, shorter, patches, words, texts):
    """`texts` text-only ones, one global batch of them: 6 %, and none comes twice."""
    from bench_sampler import draw

    def said(n):
        return " ".join(f"w{word}" for word in rng.integers(0, words, max(1, round(n))))

    pictures = (STEPS - 1) * texts
    lengths, has_image = draw(40 * pictures, patches, 0.8)
    lengths = np.concatenate([lengths[has_image][:pictures], lengths[~has_image][:texts]]) / shorter
    captions, talks = [], []
    for i, length in enumerate(lengths):
        picture = {"image": f"{i % PICTURES}.jpg"}
        length, image, turns = length - 8, i < pictures, []
        for left in np.arange(length, 0, -60):              # turns of 60 tokens, half of it learned
            tag = "<image>\n" if image and not turns else ""
            turns += [("human", tag + said(min(left, 60) / 2)), ("gpt", said(min(left, 60) / 2))]
        turns = turns or [("human", ("<image>\n" if image else "") + said(1)), ("gpt", said(1))]
        turns = [{"from": who, "value": text} for who, text in turns]
        talks.append({"id": str(i), "conversations": turns} | (picture if image else {}))
        caption = said(20 * rng.lognormal(-0.125, 0.5) / shorter)
        captions.append({"id": str(i), "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                         {"from": "gpt", "value": caption}]} | picture)
    (folder / "finetune.json").write_text(json.dumps(talks))
    (folder / "align.json").write_text(json.dumps(captions))


# -- ours ----------------------------------------------------------------------------------------------------

def micro_batch(args):
    return args.micro_batch or SIZES[args.size][2]


def our_config(args):
    from config import Config
    from presets import PRESETS
    folder = Path(args.folder)
    return Config(stage=args.stage, no_align=args.stage == "finetune", vision_backbone=f"{folder}/vision",
                  llm_backbone=f"{folder}/llm", prompt="plain", train_json=f"{folder}/{args.stage}.json",
                  image_dir=f"{folder}/images", run_root=f"{folder}/runs", overwrite=True,
                  global_batch_size=SIZES[args.size][1], per_device_batch_size=micro_batch(args),
                  epochs=args.epochs, save_every=10 ** 6, num_workers=WORKERS[args.size], learning_rate=1e-4,
                  weight_decay=0.1, precision=args.precision, forecast=False, compile=args.compile,
                  length_window=PRESETS["single-gpu"][args.stage].get("length_window", 64))


def run_ours(args):
    """train.py itself, with a look at the clock where a step ends. Prints what `report` needs."""
    import train
    stamps = []
    step, look = train.train_step, train.look

    def begun(*values):                                     # the first one
        stamps.extend([] if stamps else [clocks()])
        return step(*values)

    def done(*values):                                      # look waits until the step is computed
        result = look(*values)
        stamps.append(clocks())
        return result

    train.train_step, train.look = begun, done
    train.save = lambda *values, **named: None              # gigabytes to write, after what is timed
    cfg = our_config(args)
    train.main(cfg)
    steps = [json.loads(line) for line in (cfg.run_folder / "metrics.jsonl").read_text().splitlines()]
    real = [round(step["positions"] * (1 - step["padding"])) for step in steps]
    seconds = [n / step["tokens_per_second"] for step, n in zip(steps, real)]
    waits = [step["data_wait"] * each for step, each in zip(steps, seconds)]
    mfu = [(step["mfu"] or 0) * each for step, each in zip(steps, seconds)]
    last = len(steps) // args.epochs
    report(args, stamps[:len(steps) + 1], real, [step["positions"] for step in steps], waits,
           mfu=sum(mfu[-last:]) / sum(seconds[-last:]))


# -- the peer ------------------------------------------------------------------------------------------------

class TheirData:
    """Our ids and labels, which are LLaVA's too; their image processor."""

    def __init__(self, args):
        from transformers import AutoImageProcessor

        from data import Conversations
        from images import Pictures, load_image_transforms
        from prompts import load_language
        cfg = our_config(args)
        language = load_language(cfg.llm_backbone, "plain", captions=args.stage == "align")
        pictures = Pictures(cfg.image_dir, load_image_transforms(cfg.vision_backbone, "resize-naive"))
        self.ours = Conversations(cfg.train_json, language, pictures, cfg.max_length)
        self.rows = json.loads(Path(cfg.train_json).read_text())
        self.images = Path(cfg.image_dir)
        self.processor = AutoImageProcessor.from_pretrained(cfg.vision_backbone)
        self.tag = language.tokenizer.convert_tokens_to_ids("<image>")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        import torch
        from PIL import Image
        from prompts import IMAGE
        ids, labels = (torch.tensor(x) for x in self.ours.tokens(self.rows[i]))
        example = {"input_ids": ids.where(ids != IMAGE, self.tag), "labels": labels}
        if "image" in self.rows[i]:
            image = Image.open(self.images / self.rows[i]["image"]).convert("RGB")
            example["pixel_values"] = self.processor(image, return_tensors="pt")["pixel_values"]
        return example

    def modality_lengths(self):
        """As in LLaVA: words, negative where there is no picture."""
        words = [sum(len(turn["value"].split()) for turn in row["conversations"]) for row in self.rows]
        return [n if "image" in row else -n for n, row in zip(words, self.rows)]


def their_collate(examples):
    import torch
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([example["input_ids"] for example in examples], batch_first=True)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
            **({"pixel_values": torch.cat(pixels)} if pixels else {})}


def modality_grouped(lengths, batch, rng):
    """LLaVA's LengthGroupedSampler: batches of one modality in random order, each sorted by length inside."""
    batches, rest = [], []
    for sign in (1, -1):
        mine = [i for i, length in enumerate(lengths) if sign * length > 0]
        rng.shuffle(mine)
        cut = [mine[at:at + batch] for at in range(0, len(mine), batch)]
        cut = [sorted(each, key=lambda i: -abs(lengths[i])) for each in cut]
        rest += cut.pop() if cut and len(cut[-1]) < batch else []
        batches += cut
    rng.shuffle(batches)
    return [i for each in batches + [rest] for i in each]


def their_model(args, frozen):
    """LlavaForConditionalGeneration with the weights that ours would load, frozen parts in dtype `frozen`."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionModel

    from model import load_vlm
    ours = load_vlm(our_config(args), our_config(args).trained, frozen)
    vision, llm = SiglipVisionModel.from_pretrained(f"{args.folder}/vision", dtype=frozen), ours.llm
    config = LlavaConfig(vision_config=vision.config, text_config=llm.config, image_token_index=2,
                         vision_feature_layer=-2, vision_feature_select_strategy="full",
                         tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, llm.model, llm.lm_head
    projector = model.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = ours.projector[0], ours.projector[2]
    model.requires_grad_(False)
    for part in [projector] + [model.model.language_model] * (args.stage == "finetune"):
        part.requires_grad_(True)                           # the head is tied to the embeddings
    return model, ours


def run_theirs(args):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    batch, micro = SIZES[args.size][1], micro_batch(args)
    waits, stamps, real, positions = [], [], [], []

    class Timed(Trainer):
        def get_batch_samples(self, *values, **named):
            began = time.perf_counter()
            batches, items = super().get_batch_samples(*values, **named)
            stamps.append(clocks())
            waits.append(stamps[-1][0] - began)
            real.append(sum(int(batch["attention_mask"].sum()) for batch in batches))
            positions.append(sum(batch["input_ids"].numel() for batch in batches))
            return batches, items

        def _get_train_sampler(self, *values):
            if args.child == "trainer":
                return super()._get_train_sampler(*values)
            return modality_grouped(self.train_dataset.modality_lengths(), batch, random.Random(0))

    class Last(TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            if state.global_step == state.max_steps:
                stamps.append(clocks())

    settings = TrainingArguments(
        output_dir=f"{args.folder}/trainer", per_device_train_batch_size=micro, num_train_epochs=args.epochs,
        gradient_accumulation_steps=batch // micro, learning_rate=1e-4, weight_decay=0.1,
        lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to="none",
        remove_unused_columns=False, dataloader_num_workers=WORKERS[args.size],
        use_cpu=not torch.cuda.is_available(), bf16=bf16(args))
    frozen = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    Timed(model=their_model(args, frozen)[0], args=settings, train_dataset=TheirData(args),
          data_collator=their_collate, callbacks=[Last()]).train()
    report(args, stamps, real, positions, waits)


def check(args):
    """The same example through both models: the same loss. In fp32: there is no autocast around it."""
    import torch
    from data import collate
    theirs, ours = their_model(args, torch.float32)
    data = TheirData(args)
    for i in (0, len(data) - 1):
        batch = collate([data.ours[i]])
        with torch.no_grad():
            want, _ = ours(batch["input_ids"], batch["labels"], batch["pixel_values"])
            their_batch = their_collate([data[i]])
            got = theirs(**their_batch).loss * (their_batch["labels"][:, 1:] != -100).sum()
        assert abs(float(got - want)) < 1e-3 * float(want), (float(got), float(want))
        print(f"check    {args.size} {args.stage}, example {i}: loss {want:.3f} ours, {got:.3f} theirs")


# -- one run, and the table of all ---------------------------------------------------------------------------

def bf16(args):
    import torch
    return args.precision == "bf16" or (args.precision == "auto" and torch.cuda.is_available())


def clocks():
    """Wall clock, and CPU time of this process with all its threads."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def report(args, stamps, real, positions, waits, **more):
    """stamps (S + 1, 2): when each of the S steps began, and the last one ended. The last epoch counts."""
    import torch
    assert len(stamps) == len(real) + 1, (len(stamps), len(real))
    last = len(real) // args.epochs
    seconds, cpu = stamps[-1] - stamps[-1 - last]
    real, positions = sum(real[-last:]), sum(positions[-last:])
    memory = (torch.cuda.max_memory_allocated() if torch.cuda.is_available()
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    result = {"tokens/s": real / seconds, "per CPU s": real / cpu, "padding": 1 - real / positions,
              "memory": memory / 2 ** 30, "data wait": sum(waits[-last:][1:]) / seconds, **more}
    print("RESULT " + json.dumps(result), flush=True)


def run_child(args, child, stage, size, folder):
    command = [sys.executable, __file__, "--child", child, "--stage", stage, "--size", size,
               "--folder", str(folder), "--epochs", str(args.epochs), "--precision", args.precision,
               "--micro_batch", str(args.micro_batch), *["--compile"] * args.compile]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
    if "OutOfMemoryError" in done.stderr or "memory ran out" in done.stderr:   # theirs; ours (errors.py)
        return ""
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def result(args, child, stage, size, folder):
    """One run -> what it reported of itself; None if it ran out of memory."""
    lines = run_child(args, child, stage, size, folder).splitlines()
    return next((json.loads(text[7:]) for text in lines if text.startswith("RESULT ")), None)


def compare(args, size, stage, folder):
    print(run_child(args, "check", stage, size, folder), end="", flush=True)
    results = {column: [] for column in COLUMNS if column != "grouped" or stage == "finetune"}
    for _ in range(args.rounds):
        for column, mine in results.items():
            mine += filter(None, [result(args, column, stage, size, folder)])
    for column in [column for column, runs in results.items() if len(runs) < args.rounds]:
        print(f"{size:>5} {stage:<9}{column:<8}  out of memory", flush=True)
        del results[column]
    if "ours" not in results:
        return
    middle = {column: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
              for column, runs in results.items()}
    for column, mine in middle.items():
        speeds = [run["tokens/s"] for run in results[column]]
        faster = [middle["ours"][key] / mine[key] for key in ("tokens/s", "per CPU s")]
        print(f"{size:>5} {stage:<9}{column:<8}{mine['tokens/s']:9.0f}{max(speeds) / min(speeds) - 1:8.0%}"
              f"{mine['per CPU s']:11.0f}{mine['padding']:9.1%}{mine['data wait']:11.1%}{mine['memory']:9.2f}"
              f"{faster[0]:9.2f} x{faster[1]:7.2f} x", flush=True)


def main(args):
    import torch
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    print(f"torch {torch.__version__} on {device}; medians of {args.rounds} runs\n size stage    run    "
          " tokens/s  spread  per CPU s  padding  data wait  GB peak  ours is: clock, CPU", flush=True)
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            make_world(Path(folder), size)
            for stage in args.stages.split(","):
                compare(args, size, stage, Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8M,34M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--stages", default="align,finetune")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--epochs", type=int, default=1, help="the last one is timed; take 2 on a GPU")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--micro_batch", type=int, default=0, help="examples; 0 = as the size has it")
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    parser.add_argument("--child", choices=[*COLUMNS, "check"], help=argparse.SUPPRESS)     # one run, here
    for name in ("--stage", "--size", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "ours":
        import ranks
        ranks.run(run_ours, args)                           # after an error, too, it ends; see ranks.py
    {"check": check, "trainer": run_theirs, "grouped": run_theirs, None: main}[args.child](args)
