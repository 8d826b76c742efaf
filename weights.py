"""A model as others store it: folders of safetensors, and the names of timm, in which Prismatic and OpenVLA
keep their vision towers. llava.py and openvla.py stand on it.

Tensors are read one at a time, when they are asked for, and written in shards: a model of 7 billion weights
passes through a few gigabytes of memory.
"""
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from checkpoint import unused_name
from config import UserError
from foreign import loading_options

SHARD = 4 * 10 ** 9                                         # bytes of one file


class Tensors(Mapping):
    """name -> tensor, of a folder of safetensors."""

    def __init__(self, folder):
        index = Path(folder) / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        self.files = {}
        for file in (Path(folder) / name for name in sorted(names)):
            if not file.is_file():
                raise UserError(f"{file} is missing. Weights must be safetensors")
            try:
                with safe_open(file, "pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file} can't be read ({e})") from e

    def __getitem__(self, name):
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


@contextmanager
def whole(out):
    """A folder to write into. It gets the name `out` when all went well; else it is deleted."""
    unfinished = unused_name(out.with_name(f"{out.name}.unfinished"))
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def write_shards(folder, tensors):
    """(name, tensor) pairs -> model.safetensors, or several files and their index."""
    shard, files, total = {}, [], 0

    def put():
        try:
            save_file(shard, folder / f"{len(files)}.unfinished", metadata={"format": "pt"})
        except SafetensorError as e:                        # its own word for a full disk, too
            raise UserError(f"{folder} can't be written ({e}). Free some space, or name another --out") from e
        files.append(list(shard))
        shard.clear()
    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD:
            put()
        # A copy, where it is a part of another tensor: safetensors refuses two that share memory.
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        total += tensor.nbytes
    put()
    places, mask = {}, os.umask(0)
    os.umask(mask)
    for i, names in enumerate(files):
        number = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = f"model{number}.safetensors"
        (folder / f"{i}.unfinished").rename(folder / file)
        (folder / file).chmod(0o666 & ~mask)                # safetensors lets nobody else read it
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))


class Source(NamedTuple):
    """What was found: everything that a run is made of."""
    towers: list                            # of each its config (dict), tensors by transformers' names, and
    #                                         preprocessor file
    llm: tuple | str                        # config, tokenizer, tensors by its own names; or a folder's name
    projector: dict                         # tensors by our names, projector.*
    settings: dict                          # fields of Config
    actions: dict = {}                      # what state.json keeps of a policy
    told: dict = {}                         # what an export of ours keeps of its run, see llava.keep


def read_json(file):
    try:
        if file.exists() and not file.is_file():            # a pipe would be waited for, for ever
            raise ValueError("it is no file")
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds {str(content)[:40]!r}, no object")
        return content
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} can't be read ({e}). A model of the hub must be downloaded first") from e


def load_tokenizer(name):
    """Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(name, **loading_options(name))
    except Exception as e:                          # transformers raises many kinds here; each means the same
        raise UserError(f"no tokenizer can be loaded from {name} ({type(e).__name__}: "
                        f"{str(e).partition(chr(10))[0]})") from e


def renamed(tensors, names):
    """(our name, tensor) pairs, one tensor in memory at a time."""
    return ((ours, tensors[name]) for ours, name in names.items())


def refuse_surplus(source, names):
    if names:
        raise UserError(f"{source} holds {len(names)} tensors that no part of the model has a place for, "
                        f"such as {min(names)}")


def write_json(file, content):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def config_of(model, dtype):
    """A part's config.json inside of that of the whole: for transformers 4, too, and without local paths.

    transformers 4 obeys the parts' dtypes: one that differs from the whole's ends in an error. And it looks
    for rope_theta beside, not in, rope_parameters; without it it takes 10000.
    """
    config = model.config.to_dict() | {"dtype": dtype, "torch_dtype": dtype}
    config.pop("_name_or_path", None)
    rope = config.get("rope_parameters") or {}
    config |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return config | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})


def dtype_of(model):
    """What the whole is loaded as: its widest type."""
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    return str(widest).removeprefix("torch.")


def base_name(names):
    """Names of backbones for the eyes of others: of a local folder its last part, a hub id as it is."""
    return ",".join(Path(name).name if Path(name).exists() else name for name in names.split(","))


# -- vision towers: timm and transformers --------------------------------------------------------------------

def same_tensors(kind, blocks):
    """{timm's name: transformers' name} of what both keep in one form. kind: the model_type."""
    dino = kind.startswith("dinov2")
    outer = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"} if dino else {
        "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm",
        "norm_pre": "pre_layrnorm", "attn_pool.proj": "head.attention.out_proj", "attn_pool.norm":
        "head.layernorm", "attn_pool.mlp.fc1": "head.mlp.fc1", "attn_pool.mlp.fc2": "head.mlp.fc2"}
    inner = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
             "attn.proj": "attention.o_proj"} if dino else {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "attn.proj": "self_attn.out_proj"}
    layers = "encoder.layer" if dino else "encoder.layers"
    names = outer | {f"blocks.{i}.{a}": f"{layers}.{i}.{b}" for i in range(blocks) for a, b in inner.items()}
    names = {f"{a}.{end}": f"{b}.{end}" for a, b in names.items() for end in ("weight", "bias")}
    if dino:
        names |= {"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens"}
        names |= {f"blocks.{i}.ls{k}.gamma": f"{layers}.{i}.layer_scale{k}.lambda1"
                  for i in range(blocks) for k in (1, 2)}
    return names | ({"attn_pool.latent": "head.probe"} if kind.startswith("siglip") else {})


def query_key_value(kind, i):
    """transformers' three names for what timm keeps in one tensor, `blocks.<i>.attn.qkv`."""
    block = f"encoder.layer.{i}.attention" if kind.startswith("dinov2") else f"encoder.layers.{i}.self_attn"
    return [f"{block}.{part}_proj" for part in "qkv"]


def from_timm(kind, timm):
    """A tower's tensors under timm's names -> under transformers' names. Raises UserError for one that is
    left over."""
    timm = dict(timm)
    blocks = count_blocks(timm)
    found = {ours: timm.pop(name) for name, ours in same_tensors(kind, blocks).items() if name in timm}
    for i in range(blocks):
        for end in ("weight", "bias"):
            three = timm.pop(f"blocks.{i}.attn.qkv.{end}").chunk(3)
            found |= {f"{name}.{end}": part for name, part in zip(query_key_value(kind, i), three)}
    table = timm.pop("pos_embed")                                                       # (1, places, D)
    if kind == "clip_vision_model":
        found["embeddings.class_embedding"] = timm.pop("cls_token").flatten()
    if kind.startswith("dinov2"):
        if kind == "dinov2_with_registers":                 # timm adds the place of CLS to cls_token
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        found |= {"embeddings.position_embeddings": table,
                  "embeddings.mask_token": torch.zeros_like(table[0, :1])}
    else:
        found["embeddings.position_embedding.weight"] = table[0]
    if "attn_pool.q.weight" in timm:
        for end in ("weight", "bias"):
            both = [timm.pop(f"attn_pool.{part}.{end}") for part in ("q", "kv")]
            found[f"head.attention.in_proj_{end}"] = torch.cat(both)
    if timm:
        raise UserError(f"the vision tower holds {len(timm)} tensors that a {kind} has no place for, "
                        f"such as {next(iter(timm))}")
    return found


def to_timm(kind, ours):
    """The inverse of `from_timm`. The table of positions must fit the run's pictures already."""
    blocks = 1 + max(int(name.split(".")[2]) for name in ours if name.startswith("encoder.layer"))
    found = {name: ours[other] for name, other in same_tensors(kind, blocks).items() if other in ours}
    for i in range(blocks):
        for end in ("weight", "bias"):
            three = [ours[f"{name}.{end}"] for name in query_key_value(kind, i)]
            found[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(three)
    if kind.startswith("dinov2"):
        table = ours["embeddings.position_embeddings"]
        if kind == "dinov2_with_registers":
            found["cls_token"] = found["cls_token"] + table[:, :1]
            table = table[:, 1:]
        found["pos_embed"] = table
    else:
        found["pos_embed"] = ours["embeddings.position_embedding.weight"][None]
    if kind == "clip_vision_model":
        found["cls_token"] = ours["embeddings.class_embedding"][None, None]
    if "head.probe" in ours:
        width = ours["head.probe"].shape[-1]
        for end in ("weight", "bias"):
            both = ours[f"head.attention.in_proj_{end}"]
            found |= {f"attn_pool.q.{end}": both[:width], f"attn_pool.kv.{end}": both[width:]}
    return found


def openvla_names(timm):
    """OpenVLA renames one tensor of timm's: transformers 4 would have turned "gamma" into "weight"."""
    return {name.replace(".gamma", ".scale_factor"): tensor for name, tensor in timm.items()}


def timm_names(openvla):
    return {name.replace(".scale_factor", ".gamma"): tensor for name, tensor in openvla.items()}


def count_blocks(timm):
    return 1 + max((int(name.split(".")[1]) for name in timm if name.startswith("blocks.")), default=-1)


def tower_config(kind, timm, size):
    """The shapes of timm's tensors, and the size of its pictures -> transformers' config, as a dict."""
    width, _, patch, _ = timm["patch_embed.proj.weight"].shape
    hidden = timm["blocks.0.mlp.fc1.weight"].shape[0]
    heads = 16 if width == 1152 else max(1, width // 64)    # SigLIP so400m; all others have heads of 64
    config = {"model_type": kind, "hidden_size": width, "num_hidden_layers": count_blocks(timm),
              "num_attention_heads": heads, "patch_size": patch, "image_size": size}
    if kind.startswith("dinov2"):
        config |= {"mlp_ratio": hidden // width, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
        registers = timm["reg_token"].shape[1] if "reg_token" in timm else 0
        return config | ({"num_register_tokens": registers} if registers else {})
    # timm computes SigLIP with the exact GELU; its folders on the hub say gelu_pytorch_tanh. OpenAI's CLIP
    # was trained with another approximation.
    act, eps = ("gelu", 1e-6) if kind == "siglip_vision_model" else ("quick_gelu", 1e-5)
    head = {"vision_use_head": "attn_pool.latent" in timm} if kind == "siglip_vision_model" else {}
    return config | {"intermediate_size": hidden, "hidden_act": act, "layer_norm_eps": eps} | head


def positions(tower, size):
    """The table of position embeddings as the tower fits it to pictures of that size, (1, places, D)."""
    of, dino = tower.embeddings, tower.config.model_type.startswith("dinov2")
    table = of.position_embeddings if dino else of.position_embedding.weight[None]
    if size == tower.config.image_size:
        return table
    first = int(tower.config.model_type != "siglip_vision_model")                       # CLS
    places = (size // tower.config.patch_size) ** 2 + first
    dtype = table.dtype                                     # half precision would round between the places
    fitted = of.float().interpolate_pos_encoding(torch.zeros(1, places, table.shape[-1]), size, size)
    of.to(dtype)
    return fitted


def positions_fitted(tower, size):
    """A tower's tensors, its table of positions fitted to the pictures of the run."""
    name = ("embeddings.position_embeddings" if tower.config.model_type.startswith("dinov2")
            else "embeddings.position_embedding.weight")
    table = positions(tower, size)
    return tower.state_dict() | {name: table if name.endswith("embeddings") else table[0]}
