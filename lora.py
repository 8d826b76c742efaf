"""LoRA (arXiv 2106.09685): the language model stays as it is, and small matrices beside its own learn.

    y = W x + alpha / rank * B A x    A: (rank, in), random; B: (out, rank), zeros: a run begins as its base

Each linear layer of the LLM but the output has both. In stage vla the rows of the action ids train, too. A
checkpoint holds no more of the LLM, and names the base: a step folder, or None for that of --llm_backbone.
"""
from copy import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D               # GPT-2's linear layer; its weight is (in, out)

import checkpoint
from config import UserError


class Adapters:
    def __init__(self, llm, rank, alpha, rows=()):
        self.rank, self.alpha, self.base, self.reading = rank, alpha, None, False
        self.tables, self.dropout = (llm.get_input_embeddings(), llm.get_output_embeddings()), nn.Dropout(0.0)
        self.layers = [layer for layer in llm.modules()
                       if isinstance(layer, (nn.Linear, Conv1D)) and layer is not self.tables[1]]
        for layer in self.layers:
            n_out, n_in = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
            layer.lora_A = nn.Linear(n_in, rank, bias=False)                # as torch draws it, so does peft
            layer.lora_B, layer.lora_dropout = nn.Linear(rank, n_out, bias=False), self.dropout
            nn.init.zeros_(layer.lora_B.weight)
            layer.forward = partial(adapted, layer, alpha / rank)
        self.add_rows(rows)

    def add_rows(self, rows):
        """rows: first id, end. Each row begins as it stands in its table. Tied tables share theirs."""
        self.rows, made = rows, {}
        for table in self.tables if rows else ():
            own = made.setdefault(table.weight, nn.Parameter(table.weight.data[slice(*rows)].float().clone()))
            table.token_adapter = nn.ParameterDict({"trainable_tokens_delta": own})         # peft's names
            table.forward = partial(with_rows, table, copy(table), rows)

    def saves(self, name):
        """Whether a tensor of the VLM goes into its checkpoint: of the LLM what was added, and no more."""
        return not name.startswith("llm.") or (".lora_" in name or ".token_adapter." in name) != self.reading

    def saved(self):
        return {"rank": self.rank, "alpha": self.alpha, "rows": self.rows, "base": self.base}


def adapted(layer, scale, x):
    """A layer's forward with its adapter. The sum is rounded once, to the type that the layer gives."""
    y = type(layer).forward(layer, x)
    x = x if torch.is_autocast_enabled(x.device.type) else x.to(layer.lora_A.weight.dtype)
    return (y + layer.lora_B(layer.lora_A(layer.lora_dropout(x))) * scale).to(y.dtype)


def with_rows(table, plain, rows, x):
    """A table's forward with the rows that train in the place of its own. plain: it, with its own forward."""
    own = table.token_adapter["trainable_tokens_delta"].to(table.weight.dtype)
    return functional_call(plain, {"weight": table.weight.slice_scatter(own, 0, *rows)}, x)


def begin(model, cfg, start, policy):
    """For a run that trains: the adapters of --ckpt go on, or new ones begin beside what it holds."""
    there = model.adapters
    if there and (there.rank, there.alpha) != (cfg.lora_rank, cfg.lora_alpha):
        raise UserError(f"--ckpt {cfg.ckpt} holds adapters. Train them with --lora_rank {there.rank} "
                        f"--lora_alpha {there.alpha}, or make it a whole model first: convert.py --merge")
    if not there:
        there = model.adapters = Adapters(model.llm, cfg.lora_rank, cfg.lora_alpha)
        if start and "llm" in checkpoint.read_state(start)["parts"]:
            there.base = {"folder": str(start), "started": checkpoint.started(start.parent)}
    if there.base and Path(there.base["folder"]).is_relative_to(cfg.run_folder.resolve()):
        raise UserError(f"--ckpt {cfg.ckpt} stands on {there.base['folder']}: choose another --run_id")
    if policy and not there.rows:
        there.add_rows((policy.ids[0], policy.end))
    there.dropout.p = cfg.lora_dropout
    for name, parameter in model.llm.named_parameters():
        parameter.requires_grad_(there.saves(f"llm.{name}"))


def prepare(model, step):
    """Before a checkpoint with adapters is read: places for them; their base, if another one is there."""
    try:
        told = checkpoint.read_state(step)["lora"]
        base = told.pop("base")
        there = model.adapters = model.adapters or Adapters(model.llm, **told)
        if base == there.base:
            return
        lay, started = Path(base["folder"]), base["started"]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise UserError(f"{step}: its state.json holds no adapters that can be used ({e!r})") from e
    lay = lay if lay.exists() else Path(step).resolve().parents[1] / lay.parent.name / lay.name   # both moved
    if checkpoint.damage(lay) or checkpoint.started(lay.parent) != started:
        raise UserError(f"{step} holds adapters of the language model in {base['folder']}, which is gone. "
                        "Put it back, or its run beside this one")
    there.base, there.reading = base, True
    checkpoint.load_weights(model, lay)
    there.reading = False
