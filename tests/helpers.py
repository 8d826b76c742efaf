"""Shared building blocks: small tokenizers of five kinds, tiny backbones, examples. Nothing is downloaded."""
import functools
import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, SiglipVisionConfig,
                          SiglipVisionModel)

import ranks
from actions import Episodes
from chat import PROMPTS
from data import Conversations
from images import ImageTransform, Pictures
from prompts import Language

# kind -> its special tokens, as the models' own tokenizer_config.json name them
KINDS = {"llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
         "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
         "gpt2": {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
         "phi": {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
         "smollm": {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                    "pad_token": "<|im_end|>"}}
CHAT = ["<|im_start|>", "<|im_end|>"]
CONTROL = {"llama": ["<unk>", "<s>", "</s>"], "gpt2": ["<|endoftext|>"], "phi": ["<|endoftext|>"],
           "qwen": ["<|endoftext|>", *CHAT], "smollm": ["<|endoftext|>", *CHAT]}
TEXTS = ["In: What is it?\nOut: A cat.", "USER: What color is the cat? ASSISTANT: It is red and blue.",
         "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n"
         "How many? [/INST] Two.",
         "Instruct: Name one.\nOutput: A dog.", "system\nYou are a helpful assistant.\nuser\nassistant\n"] * 3
PATCHES = 4                                                 # of one picture, here


@functools.cache
def learned(byte_level):
    """Byte-pair encoding of TEXTS, in GPT-2's bytes or in Llama's characters -> words (list), merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level
                               else pre_tokenizers.Metaspace("▁"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(vocabulary, key=vocabulary.get), merges


def make_tokenizer(kind, add_bos=None, chat=False, filler=0, **special):
    """add_bos: a BOS in front of each text; None = as the kind does it (only Llama does).
    chat: with <|im_start|> and <|im_end|>, whatever the kind.
    filler: more words. special: instead of those in KINDS."""
    llama, special = kind == "llama", {**KINDS[kind], **special}
    control = CONTROL[kind] + [token for token in CHAT if chat and token not in CONTROL[kind]]
    words, merges = learned(byte_level=not llama)
    words = (control + [f"<0x{byte:02X}>" for byte in range(256)] * llama + words
             + [f"<filler {i}>" for i in range(filler)])
    vocabulary = {word: i for i, word in enumerate(words)}
    if llama:                                               # what it can't spell, it writes in bytes
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True,
                                         byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        # Llama's own decoder also drops the very first space; here it stays, so that a test sees every ▁.
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    if kind == "phi":                                       # CodeGen has words for runs of spaces and tabs
        tokenizer.add_tokens([AddedToken(space * n) for space in " \t" for n in range(2, 8)])
    if llama if add_bos is None else add_bos:
        bos = special.setdefault("bos_token", "<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@contextmanager
def world_of_one():
    """The process group of a single process, as `ranks.start` makes it."""
    ranks.cpu_group = None                                  # an earlier test may have left one that has ended
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Their result, or its shape, depends on values.
READS = {"_local_scalar_dense", "nonzero", "argwhere", "masked_select", "equal", "_unique2", "unique_dim",
         "unique_consecutive", "bincount"}
COPIES = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class Dispatched(TorchDispatchMode):
    """Counts the operations in C++ that would make the CPU wait for a GPU (in backward, too), and what is
    sent to other ranks."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        indices = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        if name in READS or func.namespace == "c10d":
            self.found[name] += 1
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.found["index by a mask"] += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Counts the copies to the CPU that Python asks for: on a CPU they copy nothing in C++."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in COPIES:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def looks():
    """Counts what would wait for a GPU, if there were one: {name: how often}."""
    found = Counter()
    with Dispatched(found), Called(found):
        yield found


def save_vision(folder, kind="siglip", image_size=16, preprocessor=None, **config):
    """A tiny random vision backbone with its preprocessor file; by default 2 x 2 patches -> folder."""
    settings = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                    patch_size=8, image_size=image_size) | config
    torch.manual_seed(0)
    model = (CLIPVisionModel(CLIPVisionConfig(**settings)) if kind == "clip"
             else SiglipVisionModel(SiglipVisionConfig(**settings, vision_use_head=False)))
    model.save_pretrained(folder)
    return save_preprocessor(folder, preprocessor or square(image_size))


def square(size, mean=(0.5,) * 3, std=(0.5,) * 3):
    """What SigLIP's preprocessor file says."""
    return {"size": {"height": size, "width": size}, "image_mean": list(mean), "image_std": list(std)}


def save_preprocessor(folder, settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def transform(resize="resize-naive", size=16, patch_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, resample=3):
    return ImageTransform(size, patch_size, mean, std, resample, resize)


def talk(*texts):
    """human, gpt, human, gpt ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def dataset(folder, rows, language, transforms=None, max_length=512, name="d.json", captions=False,
            policy=None, augment=None):
    (folder / name).write_text(json.dumps(rows))
    if captions:
        language = captioning(language)
    return opened(folder / name, language, transforms, max_length, policy, augment)


def opened(path, language, transforms=None, max_length=512, policy=None, augment=None):
    """The file as a dataset; pictures lie beside it."""
    about = path, language, Pictures(path.parent, transforms or [transform()], augment), max_length
    return Episodes(*about, policy) if policy else Conversations(*about)


def captioning(language):
    """The same tokenizer and prompt, as stage align reads examples."""
    return Language(language.tokenizer, language.prompt, captions=True)


def picture(path, color=(255, 0, 0), size=(12, 8)):
    Image.new("RGB", size, color).save(path)


ROWS = [{"conversations": talk("What is it?", "A cat.")},
        {"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.")},
        {"image": "a.png", "conversations": talk("What is it?\n<image>", "A cat.")},
        {"image": ["a.png", "b.png"], "conversations": talk("<image>\n<image>\nWhat is it?", "A cat.")},
        {"image": ["a.png", "b.png"],
         "conversations": talk("Is <image> like <image>?", "A cat.", "How many?", "Two.")},
        {"image": "a.png",
         "conversations": talk("<image>\nWhat is it?", "A cat.", "  How many?\n", " Two. ")},
        {"conversations": talk("\tdef f():\n    pass", "naïve 猫 🐈", "▁ [INST] USER: In:", "1  2\n\n3")}]
every_kind = pytest.mark.parametrize("kind", KINDS)


def language(kind="gpt2", prompt="plain", add_bos=None, place="first"):
    return Language(make_tokenizer(kind, add_bos, chat=prompt == "chatml"), PROMPTS[prompt], place=place)


def converter(kind, *args, without):
    """A converter of examples/ as a user types it, where the packages named `without` can't be imported."""
    blocked = (f"import runpy, sys; sys.modules.update(dict.fromkeys({without!r})); "
               f"sys.argv = {[f'examples/{kind}_to_episodes.py', *map(str, args)]!r}; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    return subprocess.run([sys.executable, "-c", blocked], cwd=Path(__file__).resolve().parent.parent,
                          capture_output=True, text=True)
