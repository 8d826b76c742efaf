"""Shared building blocks: small tokenizers of five kinds, tiny backbones, examples. Nothing is downloaded."""
import functools
import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast,
                          SiglipVisionConfig, SiglipVisionModel)

from data import Conversations, ImageTransform, Language

# kind -> its special tokens as a model's tokenizer_config.json names them
KINDS = {"llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
         "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
         "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
         "phi": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
         "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                    "unk_token": "<|endoftext|>"}}
CHAT = ["<|im_start|>", "<|im_end|>"]
CONTROL = {"llama": ["<unk>", "<s>", "</s>"], "gpt2": ["<|endoftext|>"], "phi": ["<|endoftext|>"],
           "qwen": ["<|endoftext|>", *CHAT], "smollm": ["<|endoftext|>", *CHAT]}
TEXTS = ["In: What is it?\nOut: A cat.", "USER: What color is the cat? ASSISTANT: It is red and blue.",
         "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\nHow many? [/INST] Two.",
         "Instruct: Name one.\nOutput: A dog.", "system\nYou are a helpful assistant.\nuser\nassistant\n"] * 3


@functools.cache
def learned(byte_level):
    """-> vocabulary (list) and merges of a byte-pair encoding of TEXTS, in GPT-2's bytes or Llama's characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level
                               else pre_tokenizers.Metaspace("▁"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(vocabulary, key=vocabulary.get), merges


def make_tokenizer(kind, add_bos=None, chat=False, **special):
    """add_bos: put a BOS before each text, as Llama does and the others do not; None = as the kind does.
    chat: give a kind without <|im_start|> and <|im_end|> these two. special: other special tokens than KINDS says."""
    llama, names = kind == "llama", {**KINDS[kind], **special}
    control = CONTROL[kind] + [token for token in CHAT if chat and token not in CONTROL[kind]]
    words, merges = learned(not llama)
    words = control + [f"<0x{byte:02X}>" for byte in range(256)] * llama + words
    vocabulary = {word: i for i, word in enumerate(words)}
    if llama:                                               # what it can't spell, it writes in bytes
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    if kind == "phi":                                       # CodeGen's runs of spaces and tabs
        tokenizer.add_tokens([AddedToken(" " * n, special=False) for n in range(2, 8)] + ["\t\t"])
    add_bos = llama if add_bos is None else add_bos
    if add_bos:
        bos = names.setdefault("bos_token", "<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
