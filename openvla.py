"""OpenVLA in and out, Prismatic in. Both keep their vision towers under timm's names.

OpenVLA's form is what vLLM serves: DINOv2 with registers and SigLIP at 224 pixels, fused-gelu-mlp, Llama.
"""
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

import weights
from actions import BINS, QUESTION, ActionTokens
from config import UserError
from foreign import loading_options
from model import VISION_MODELS, VisionBackbone, load, load_vision
from weights import (Source, Tensors, base_name, load_tokenizer, positions_fitted, read_json, refuse_surplus,
                     renamed, write_json)

DINO, SIGLIP, CLIP = "dinov2_with_registers", "siglip_vision_model", "clip_vision_model"
# Prismatic's name of a vision backbone -> its towers (transformers' model_type, hub id), its pictures' size.
LARGE_DINO = DINO, "facebook/dinov2-with-registers-large"
VISION = {"clip-vit-l": ([(CLIP, "openai/clip-vit-large-patch14")], 224),
          "clip-vit-l-336px": ([(CLIP, "openai/clip-vit-large-patch14-336")], 336),
          "siglip-vit-so400m": ([(SIGLIP, "google/siglip-so400m-patch14-224")], 224),
          "siglip-vit-so400m-384px": ([(SIGLIP, "google/siglip-so400m-patch14-384")], 384),
          "dinov2-vit-l": ([LARGE_DINO], 224),
          "dinoclip-vit-l-336px": ([LARGE_DINO, (CLIP, "openai/clip-vit-large-patch14-336")], 336),
          "dinosiglip-vit-so-224px": ([LARGE_DINO, (SIGLIP, "google/siglip-so400m-patch14-224")], 224),
          "dinosiglip-vit-so-384px": ([LARGE_DINO, (SIGLIP, "google/siglip-so400m-patch14-384")], 384)}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]                                 # mean, std
OPENAI = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLORS = {SIGLIP: ([0.5] * 3, [0.5] * 3), CLIP: OPENAI, "dinov2": IMAGENET, DINO: IMAGENET}
# Prismatic's name of a language model -> its folder on the hub, the prompt format that Prismatic gives it.
LLMS = {"llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "plain"),
        "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "plain"),
        "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "prismatic-llama2"),
        "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "prismatic-llama2"),
        "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "vicuna"),
        "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "vicuna"),
        "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "plain"),
        "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
        "phi-2-3b": ("microsoft/phi-2", "prismatic-phi")}
# The VLMs that OpenVLA's policies start from, in Prismatic's names.
BASES = {"prism-dinosiglip-224px+7b": ("dinosiglip-vit-so-224px", "llama2-7b-pure",
                                       "no-align+fused-gelu-mlp"),
         "siglip-224px+7b": ("siglip-vit-so400m", "vicuna-v15-7b", "no-align+gelu-mlp")}
LIBRARY, TASK = "vllm", "robotics"
# A policy's format: that of its language model, with the empty token in front of the actions.
POLICY_PROMPTS = {"plain": "openvla", "vicuna": "openvla-v01"}
USE = """\
```python
from vllm import LLM, SamplingParams

policy = LLM("{folder}")
prompt = {prompt}.format("put the cup on the plate")        # in lower case, without a final dot
policy.generate({{"prompt": prompt, "multi_modal_data": {{"image": picture}}}},
                SamplingParams(temperature=0, max_tokens={dimensions}))
```

One id for each dimension comes back. `{end} - id` is its bin, counted from 1: the interval of -1 to 1 between
the places bin - 1 and bin of `numpy.linspace(-1, 1, 256)`. Its center is un-normalized by `norm_stats` in
config.json, from q01 to q99; a dimension whose mask is false stays as it is.
"""


# -- in ------------------------------------------------------------------------------------------------------

def read(source, settings, cfg):
    loading_options(str(source))            # raises where the folder asks for a program
    tensors, towers, taken = Tensors(source), [], set()
    colors = read_json(source / "preprocessor_config.json") if (
        source / "preprocessor_config.json").exists() else {}
    parts = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
    for i, (part, timm_id) in enumerate(zip(parts, settings["timm_model_ids"])):
        names = [name for name in tensors if name.startswith(part)]
        taken |= set(names)
        kind = next((kind for word, kind in (("reg4_dinov2", "dinov2_with_registers"), ("dinov2", "dinov2"),
                                             ("siglip", "siglip_vision_model"), ("clip", "clip_vision_model"))
                     if word in timm_id), None)
        if kind is None:
            raise UserError(f"--from {source}: its vision tower {timm_id} is not known")
        mean, std = COLORS[kind]
        tower = {name.removeprefix(part): tensors[name] for name in names}
        towers.append(timm_tower(kind, weights.timm_names(tower), settings["image_sizes"][i],
                                 colors.get("means", {i: mean})[i], colors.get("stds", {i: std})[i]))
    projector = {re.sub("fc([123])", lambda m: str(2 * int(m[1]) - 2), name): name
                 for name in tensors if name.startswith("projector.")}
    llm = {name.removeprefix("language_model."): name
           for name in tensors if name.startswith("language_model.")}
    refuse_surplus(source, set(tensors) - taken - set(projector.values()) - set(llm.values()))
    text = AutoConfig.for_model(**settings["text_config"])
    policy = {}
    if "norm_stats" in settings:
        policy = actions_of(text.vocab_size - settings["pad_to_multiple_of"], settings["norm_stats"], source,
                            text.vocab_size)
    llm_id = settings["llm_backbone_id"]
    if llm_id not in LLMS:
        raise UserError(f"--from {source}: its language model is {llm_id!r}. Known: {', '.join(LLMS)}")
    about = prismatic_settings(settings["arch_specifier"], settings["image_resize_strategy"],
                               settings["vision_backbone_id"], LLMS[llm_id][1], cfg, policy)
    return Source(towers, (text, load_tokenizer(source), renamed(tensors, llm)),
                  dict(renamed(tensors, projector)), about, policy)


def read_prismatic(file, folder, cfg):
    config = read_json(folder / "config.json")
    if "vla" in config:
        base = config["vla"].get("base_vlm")
        if base not in BASES:
            raise UserError(f"--from {folder}: its base_vlm is {base!r}. Known: {', '.join(BASES)}")
        vision_id, llm_id, arch = BASES[base]
        resize, statistics = "resize-naive", read_json(folder / "dataset_statistics.json")
    else:
        model = config.get("model", {})
        vision_id, llm_id, arch, resize = (model.get(name, "") for name in (
            "vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy"))
        statistics = {}
    if vision_id not in VISION or llm_id not in LLMS:
        raise UserError(f"--from {folder}: its backbones are {vision_id!r} and {llm_id!r}. Known: "
                        f"{', '.join(VISION)}; {', '.join(LLMS)}")
    (parts, size), tensors = VISION[vision_id], prismatic_tensors(file)
    prefixes = ["featurizer."] if len(parts) == 1 else [
        "dino_featurizer.", f"{parts[1][0].partition('_')[0]}_featurizer."]
    known = *(f"vision_backbone/{prefix}" for prefix in prefixes), "llm_backbone/llm.", "projector/"
    refuse_surplus(file, {name for name in tensors if not name.startswith(known)})
    vision = {name.removeprefix("vision_backbone/"): tensor for name, tensor in tensors.items()
              if name.startswith("vision_backbone/")}
    if vision:
        towers = [timm_tower(kind, {key.removeprefix(prefix): tensor for key, tensor in vision.items()
                                    if key.startswith(prefix)}, size, *COLORS[kind])
                  for (kind, _), prefix in zip(parts, prefixes)]
    else:
        towers = official_towers(cfg.vision_backbone or ",".join(hub_id for _, hub_id in parts), size)
    hub_id, prompt = LLMS[llm_id]
    llm_name = cfg.llm_backbone or hub_id
    llm = str(Path(llm_name).resolve()) if Path(llm_name).is_dir() else llm_name
    body = {name.removeprefix("llm_backbone/llm."): name
            for name in tensors if name.startswith("llm_backbone/")}
    if body:                                                # an align run has not changed it
        text, tokenizer = load(AutoConfig, llm_name, "--llm_backbone"), load_tokenizer(llm_name)
        table = tensors[body["model.embed_tokens.weight"]]  # its type is what the file has, not the hub's
        text.vocab_size, text.dtype = len(table), table.dtype
        tokenizer.add_special_tokens({"pad_token": "<|pad|>" if llm_id.startswith("phi") else "<PAD>"})
        llm = text, tokenizer, renamed(tensors, body)
    projector = {name.removeprefix("projector/").replace("projector.weight", "projector.0.weight")
                 .replace("projector.bias", "projector.0.bias"): tensor for name, tensor in tensors.items()
                 if name.startswith("projector/")}
    policy = {}
    if "vla" in config:
        base = load_tokenizer(llm_name).vocab_size
        policy = actions_of(base, statistics, folder / "dataset_statistics.json", base)
    about = prismatic_settings(arch, resize, vision_id, prompt, cfg, policy)
    return Source(towers, llm, projector, about, policy)


def prismatic_settings(arch, resize, vision_id, prompt, cfg, policy):
    if resize != "resize-naive":
        print(f"note: {resize} cuts or pads some pictures one pixel beside Prismatic's place")
    if policy and prompt not in POLICY_PROMPTS and not cfg.prompt:
        raise UserError(f"a policy with the format {prompt} is not known. Name one with --prompt")
    return {"projector": arch.split("+")[-1], "image_resize": resize,
            "prompt": cfg.prompt or (POLICY_PROMPTS[prompt] if policy else prompt),
            "preset": "prism-dinosiglip-7b" if vision_id == "dinosiglip-vit-so-224px" else "published",
            "stage": "vla" if policy else "full-finetune"}


def timm_tower(kind, tensors, size, mean, std):
    config = weights.tower_config(kind, tensors, size)
    return config, weights.from_timm(kind, tensors), square(size, mean, std)


def official_towers(names, size):
    """Towers that Prismatic did not train: it takes timm's, which are those of the hub, with timm's GELU."""
    towers = []
    for name, model in zip(names.split(","), load_vision(names, as_openvla=True).models):
        settings, _ = BaseImageProcessor.get_image_processor_dict(name, **loading_options(name))
        towers.append((model.config.to_dict(), model.state_dict(),
                       square(size, settings["image_mean"], settings["image_std"])))
    return towers


def square(size, mean, std):
    return {"size": {"height": size, "width": size}, "resample": 3, "do_center_crop": False,
            "image_mean": list(mean), "image_std": list(std)}


def actions_of(end, statistics, file, rows):
    """OpenVLA's dataset_statistics.json -> what state.json keeps of a policy."""
    try:
        if type(end) is not int or end > rows:
            raise ValueError(f"the action ids would end at {end}, the vocabulary at {rows}")
        statistics = {name: {**of, "action": {"mask": [True] * len(of["action"]["q01"]), **of["action"]}}
                      for name, of in statistics.items()}
        policy = ActionTokens.load({"end": end, "bins": BINS, "statistics": statistics, "pictures": 1})
        numbers = [number for of in statistics.values() for key in ("q01", "q99")
                   for number in of["action"][key]]
        if len({len(of["action"]["q01"]) for of in statistics.values()}) > 1 or max(map(abs, numbers)) > 1e9:
            raise ValueError("its datasets have different numbers of dimensions, or numbers beyond 1e9")
        return policy.saved()
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{file}: its statistics of actions can't be used ({e})") from e


def prismatic_tensors(file):
    """name -> tensor, of a Prismatic .pt file. Nothing but tensors is read of it (`weights_only`), and from
    the disk only when it is used (`mmap`)."""
    try:
        if not file.is_file():                              # a pipe would be waited for, for ever
            raise ValueError("it is no file")
        parts = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
        return {f"{part}/{name}": tensor
                for part, tensors in parts.items() for name, tensor in tensors.items()}
    except Exception as e:                              # pickle and zip raise many kinds; each means the same
        raise UserError(f"{file} can't be read as a Prismatic checkpoint ({type(e).__name__}: "
                        f"{str(e).partition(chr(10))[0]})") from e


# -- out -----------------------------------------------------------------------------------------------------

def about(run):
    """What stands in the README, see USE."""
    first, prompt = next(iter(run.actions["statistics"].values())), run.language.prompt
    asked = prompt.first + QUESTION.format(instruction="{}") + run.language.before_reply
    return {"dimensions": len(first["action"]["q01"]), "end": run.actions["end"], "prompt": json.dumps(asked)}


def refuse(run, wrong):
    """What OpenVLA can't express: raises wrong(what)."""
    kinds = [model.config.model_type for model in run.model.vision.models]
    llm = run.model.llm.config.model_type
    if not run.actions:
        raise wrong("is no policy; this form is for runs of stage vla")
    if (kinds, run.cfg.projector, llm) != ([DINO, SIGLIP], "fused-gelu-mlp", "llama"):
        raise wrong(f"has {' + '.join(kinds)}, {run.cfg.projector}, {llm}; what reads this form knows DINOv2 "
                    "with registers + SigLIP, fused-gelu-mlp and Llama only")
    if run.cfg.image_resize != "resize-naive":
        raise wrong(f"was trained with --image_resize {run.cfg.image_resize}; what reads this form knows "
                    "resize-naive only")
    if run.cfg.picture_place != "first" or run.actions.get("pictures") not in (None, 1):
        raise wrong("was trained with several pictures, or with a picture at its tag; what reads this form "
                    "shows one, in front")


def as_openvla(run):
    """Whether vision is computed as those do that read this form."""
    exact = run.model.vision.models[1].config.hidden_act == "gelu"
    return exact and all(torch.equal(numbers, numbers.bfloat16().float())
                         for transform in run.transforms for numbers in (transform.mean, transform.std))


def write(run, folder):
    llm, size = run.model.llm, run.transforms[0].size
    weights.write_shards(folder, openvla_tensors(run))
    text, statistics = weights.config_of(llm, weights.dtype_of(run.model)), run.actions["statistics"]
    rows, end = text["vocab_size"], run.actions["end"]
    write_json(folder / "config.json", {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "vision_backbone_id": f"dinosiglip-vit-so-{size}px",
        "llm_backbone_id": "vicuna-v15-7b" if "vicuna" in run.cfg.prompt or "v01" in run.cfg.prompt
        else "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp", "use_fused_vision_backbone": True,
        "image_sizes": [size, size], "image_resize_strategy": "resize-naive",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", f"vit_so400m_patch14_siglip_{size}"],
        "timm_override_act_layers": [None, None], "hf_llm_id": base_name(run.cfg.llm_backbone),
        "llm_max_length": run.cfg.max_length, "n_action_bins": run.actions["bins"],
        # Readers take vocab_size - pad_to_multiple_of for the end of the action ids.
        "pad_to_multiple_of": rows - end, "pad_token_id": min(end, rows - 1),
        "image_token_index": min(end, rows - 1), "text_config": text,
        "torch_dtype": text["torch_dtype"], "norm_stats": statistics})
    write_json(folder / "dataset_statistics.json", statistics)
    write_json(folder / "preprocessor_config.json", {
        "image_resize_strategy": "resize-naive", "input_sizes": [[3, size, size]] * 2,
        "interpolations": ["bicubic"] * 2, "means": [t.mean.flatten().tolist() for t in run.transforms],
        "stds": [t.std.flatten().tolist() for t in run.transforms], "use_fused_vision_backbone": True})
    run.language.tokenizer.save_pretrained(folder)
    if (size, [model.config.hidden_size for model in run.model.vision.models]) != (224, [1024, 1152]):
        print("note: vLLM serves DINOv2-large and SigLIP-so400m at 224 pixels only")
    if not as_openvla(run):
        print("note: vLLM rounds mean and std to bfloat16 and computes SigLIP with the exact GELU. This run "
              "did not (--openvla_vision), so an action there can differ by a bin")


def openvla_tensors(run):
    """(name, tensor) pairs under OpenVLA's names."""
    models, transforms = run.model.vision.models, run.transforms
    for part, tower, transform in zip(("featurizer", "fused_featurizer"), models, transforms):
        timm = weights.to_timm(tower.config.model_type, positions_fitted(tower, transform.size))
        if part == "fused_featurizer" and "attn_pool.latent" not in timm:
            # Readers are strict: what no feature depends on must be there, too. Its values do not matter.
            timm |= unused_head(tower.config.hidden_size, tower.config.intermediate_size)
        for name, tensor in weights.openvla_names(timm).items():
            yield f"vision_backbone.{part}.{name}", tensor
    yield from unchanged(run)


def unchanged(run):
    for name, tensor in run.model.projector.state_dict().items():       # 0, 2, 4 -> fc1, fc2, fc3
        yield f"projector.fc{int(name[0]) // 2 + 1}{name[1:]}", tensor
    for name, tensor in run.model.llm.state_dict().items():
        yield f"language_model.{name}", tensor


def unused_head(width, hidden):
    shapes = {"latent": (1, 1, width), "q.weight": (width, width), "q.bias": (width,),
              "kv.weight": (2 * width, width), "kv.bias": (2 * width,), "proj.weight": (width, width),
              "proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
              "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden),
              "mlp.fc2.bias": (width,)}
    return {f"attn_pool.{name}": torch.zeros(shape) for name, shape in shapes.items()}


@torch.no_grad()
def compare(run, folder, _):
    """transformers has no class of this form. So both towers are built anew from what was written, by timm's
    names alone, and their features compared; of the rest, each tensor."""
    written, largest, scale = Tensors(folder), 0.0, 0.0
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8))
    parts = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
    for tower, transform, part in zip(run.model.vision.models, run.transforms, parts):
        kind = tower.config.model_type
        timm = weights.timm_names({name.removeprefix(part): written[name] for name in written
                                   if name.startswith(part)})
        config = weights.tower_config(kind, timm, transform.size)
        config |= {"num_attention_heads": tower.config.num_attention_heads}
        cls, config = VISION_MODELS[kind][0], AutoConfig.for_model(**config)
        again = cls.from_config(config) if cls is AutoModel else cls(config)
        again.load_state_dict(weights.from_timm(kind, timm))
        pixels = [transform(noise)[None]]
        theirs, ours = (VisionBackbone([model.float().eval()])(pixels) for model in (again, tower))
        largest = max(largest, (theirs - ours).abs().max().item())
        scale = max(scale, ours.abs().max().item())
    other = [name for name, tensor in unchanged(run) if not torch.equal(written[name], tensor)]
    allowed = 1e-5 if run.model.vision.models[1].config.hidden_act == "gelu" else 0.01     # it warned
    if other or not largest <= allowed * scale:
        raise UserError(f"--to openvla: what was written differs from {run.ckpt}: features by {largest:g} of "
                        f"{scale:g}, tensors {other[:3]}")
    return (f"read back: features of a picture differ by {largest:.1g} of {scale:.3g}, all tensors of "
            "projector and language model are equal")
