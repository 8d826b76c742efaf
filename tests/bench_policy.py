"""How long a policy thinks: CPU milliseconds for an answer and for an action, token by token and in parallel.

    python tests/bench_policy.py --threads 1

A language model in the shape of SmolLM2-135M (or of --llm_backbone) with random weights, one robot of seven
dimensions, a picture of 64 patches (computed once: vision is the same for all) and 24 tokens of text.
"""
import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402, F401  (before torch)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig  # noqa: E402

from generate import Assistant  # noqa: E402
from model import VLM  # noqa: E402

SMOLLM2 = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                      num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                      max_position_embeddings=8192)
PROMPT, DIMENSIONS = 88, 7


def milliseconds(assistant, chunk, decoding, times):
    """CPU time of one answer: the mean of `times`, after one that does not count. Of the CPU, not of the
    clock, because other programs may use the cores."""
    length, model = chunk * DIMENSIONS, assistant.model
    assistant.policy = SimpleNamespace(length=length, decoding=decoding, ids=range(500, 756), end=756)
    model.projector.slots = nn.Parameter(torch.randn(length, model.llm.get_input_embeddings().embedding_dim))
    example = {"input_ids": torch.arange(PROMPT) + 5, "images": []}
    for i in range(times + 1):
        if i == 1:
            began = time.process_time()
        assistant.action_ids([example])
    return (time.process_time() - began) * 1000 / times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llm_backbone", default="", help="folder whose config.json gives the shape")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--times", type=int, default=5, help="answers for each figure (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = AutoConfig.from_pretrained(args.llm_backbone) if args.llm_backbone else SMOLLM2
    torch.manual_seed(0)
    assistant = object.__new__(Assistant)                   # without a run: only a language model works here
    assistant.device = torch.device("cpu")
    assistant.model = VLM(nn.Identity(), nn.Sequential(), AutoModelForCausalLM.from_config(shape)).eval()
    print("chunk decode     ms an answer   ms an action")
    with torch.inference_mode():
        for chunk in (1, 4, 8):
            for decoding in ("tokens", "parallel"):
                took = milliseconds(assistant, chunk, decoding, args.times)
                print(f"{chunk:5} {decoding:<9} {took:13.1f} {took / chunk:14.1f}", flush=True)
