"""OpenVLA in and out, Prismatic in. Both keep their vision towers under timm's names.

OpenVLA's form is what vLLM serves: DINOv2 with registers and SigLIP at 224 pixels, fused-gelu-mlp, Llama.
"""
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

import weights
from actions import BINS, ActionTokens
from config import UserError
from foreign import loading_options
from model import VISION_MODELS, VisionBackbone, load, load_vision
from weights import (Source, Tensors, base_name, load_tokenizer, positions_fitted, read_json, refuse_surplus,
                     renamed, write_json)

# How Prismatic's name of a vision backbone begins -> its towers, by transformers' model_type.
TOWERS = {"dinosiglip": ("dinov2_with_registers", "siglip_vision_model"),
          "dinoclip": ("dinov2_with_registers", "clip_vision_model"), "siglip": ("siglip_vision_model",),
          "clip": ("clip_vision_model",), "dinov2": ("dinov2_with_registers",)}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLORS = {"siglip_vision_model": ([0.5] * 3, [0.5] * 3), "clip_vision_model": CLIP,             # mean, std
          "dinov2": IMAGENET, "dinov2_with_registers": IMAGENET}
HUB = {("siglip_vision_model", 224): "google/siglip-so400m-patch14-224",
       ("siglip_vision_model", 384): "google/siglip-so400m-patch14-384",
       ("clip_vision_model", 224): "openai/clip-vit-large-patch14",
       ("clip_vision_model", 336): "openai/clip-vit-large-patch14-336",
       ("dinov2_with_registers", 224): "facebook/dinov2-with-registers-large"}
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
USE = """\
```python
from vllm import LLM, SamplingParams

policy = LLM("{folder}", trust_remote_code=False)
policy.generate({{"prompt": "In: What action should the robot take to {{instruction}}?\\nOut:",
                 "multi_modal_data": {{"image": picture}}}},
                SamplingParams(temperature=0, max_tokens={dimensions}))
```

The ids that come are bins: action = center of bin `{end} - id`, un-normalized by `norm_stats` in config.json.
The instruction is in lower case, without a final dot.
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
        policy = actions_of(text.vocab_size - settings["pad_to_multiple_of"], settings["norm_stats"])
    about = prismatic_settings(settings["arch_specifier"], settings["image_resize_strategy"],
                               settings["vision_backbone_id"], "plain", cfg, policy)
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
    kinds = next((kinds for word, kinds in TOWERS.items() if vision_id.startswith(word)), None)
    if kinds is None or llm_id not in LLMS:
        raise UserError(f"--from {folder}: its backbones are {vision_id!r} and {llm_id!r}. Known: "
                        f"{', '.join(TOWERS)}; {', '.join(LLMS)}")
    size = int(match[1]) if (match := re.search(r"(\d+)px", vision_id)) else 224
    tensors = prismatic_tensors(file)
    tower_names = ["featurizer."] if len(kinds) == 1 else ["dino_featurizer.",
                                                            f"{kinds[1].partition('_')[0]}_featurizer."]
    vision = {name.removeprefix("vision_backbone/"): tensor for name, tensor in tensors.items()
              if name.startswith("vision_backbone/")}
    refuse_surplus(file, {name for name in vision if not name.startswith(tuple(tower_names))})
    if vision:
        towers = [timm_tower(kind, {key.removeprefix(part): tensor for key, tensor in vision.items()
                                    if key.startswith(part)}, size, *COLORS[kind])
                  for kind, part in zip(kinds, tower_names)]
    else:
        official = [HUB.get((kind, size)) for kind in kinds]
        if not cfg.vision_backbone and None in official:
            raise UserError(f"{file} holds no vision weights, and the hub id of {vision_id} is not known. "
                            "Name its folder with --vision_backbone")
        towers = official_towers(cfg.vision_backbone or ",".join(official), size)
    hub_id, prompt = LLMS[llm_id]
    llm_name = cfg.llm_backbone or hub_id
    # An align run has not changed it.
    llm = str(Path(llm_name).resolve()) if Path(llm_name).is_dir() else llm_name
    body = {name.removeprefix("llm_backbone/llm."): name
            for name in tensors if name.startswith("llm_backbone/")}
    if body:
        text, tokenizer = load(AutoConfig, llm_name, "--llm_backbone"), load_tokenizer(llm_name)
        text.vocab_size = len(tensors[body["model.embed_tokens.weight"]])
        tokenizer.add_special_tokens({"pad_token": "<|pad|>" if llm_id.startswith("phi") else "<PAD>"})
        llm = text, tokenizer, renamed(tensors, body)
    projector = {name.removeprefix("projector/").replace("projector.weight", "projector.0.weight")
                 .replace("projector.bias", "projector.0.bias"): tensor for name, tensor in tensors.items()
                 if name.startswith("projector/")}
    policy = actions_of(load_tokenizer(llm_name).vocab_size, statistics) if statistics else {}
    about = prismatic_settings(arch, resize, vision_id, prompt, cfg, policy)
    return Source(towers, llm, projector, about, policy)


def prismatic_settings(arch, resize, vision_id, prompt, cfg, policy):
    projector = "linear" if arch.endswith("linear") else arch.split("+")[-1]
    if resize != "resize-naive":
        print(f"note: {resize} differs from Prismatic's by one pixel where the sides of a picture differ by "
              "an odd number")
    prompt = cfg.prompt or ("openvla" if policy else prompt)
    return {"projector": projector, "image_resize": resize, "prompt": prompt,
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


def actions_of(end, statistics):
    """OpenVLA's dataset_statistics.json -> what state.json keeps of a policy."""
    statistics = {name: {**of, "action": {"mask": [True] * len(of["action"]["q01"]), **of["action"]}}
                  for name, of in statistics.items()}
    return ActionTokens.load({"end": end, "bins": BINS, "statistics": statistics, "pictures": 1}).saved()


def prismatic_tensors(file):
    """name -> tensor, of a Prismatic .pt file. Nothing but tensors is read of it (`weights_only`), and from
    the disk only when it is used (`mmap`)."""
    try:
        parts = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
        return {f"{part}/{name}": tensor
                for part, tensors in parts.items() for name, tensor in tensors.items()}
    except Exception as e:                              # pickle and zip raise many kinds; each means the same
        raise UserError(f"{file} can't be read as a Prismatic checkpoint ({type(e).__name__}: "
                        f"{str(e).partition(chr(10))[0]})") from e


# -- out -----------------------------------------------------------------------------------------------------

def about(run):
    """What stands in the README, see USE."""
    first = next(iter(run.actions["statistics"].values()))
    return {"dimensions": len(first["action"]["q01"]), "end": run.actions["end"]}


def refuse(run, wrong):
    """What OpenVLA can't express: raises wrong(what)."""
    kinds = [model.config.model_type for model in run.model.vision.models]
    llm = run.model.llm.config.model_type
    if not run.actions:
        raise wrong("is no policy; this form is for runs of stage vla")
    if (kinds, run.cfg.projector, llm) != (list(TOWERS["dinosiglip"]), "fused-gelu-mlp", "llama"):
        raise wrong(f"has {' + '.join(kinds)}, {run.cfg.projector}, {llm}; what reads this form knows DINOv2 "
                    "with registers + SigLIP, fused-gelu-mlp and Llama only")
    if run.cfg.image_resize != "resize-naive":
        raise wrong(f"was trained with --image_resize {run.cfg.image_resize}; what reads this form knows "
                    "resize-naive only")


def write(run, folder):
    llm, size = run.model.llm, run.transforms[0].size
    weights.write_shards(folder, openvla_tensors(run))
    text, statistics = weights.config_of(llm, weights.dtype_of(run.model)), run.actions["statistics"]
    rows, end = text["vocab_size"], run.actions["end"]
    write_json(folder / "config.json", {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "vision_backbone_id": f"dinosiglip-vit-so-{size}px", "llm_backbone_id": "llama2-7b-pure",
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
    if not run.cfg.openvla_vision:
        print("note: vLLM rounds mean and std to bfloat16 and computes SigLIP with the exact GELU. This run "
              "did not (--openvla_vision), so an action there can differ by a bin")
    if run.cfg.prompt != "plain":
        print("note: vLLM's prompts end with 'Out:'. That is --prompt plain; this run was trained with "
              f"--prompt {run.cfg.prompt}")


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
        cls = VISION_MODELS[kind][0]
        again = (cls.from_config if cls is AutoModel else cls)(AutoConfig.for_model(**config))
        again.load_state_dict(weights.from_timm(kind, timm))
        pixels = [transform(noise)[None]]
        theirs, ours = (VisionBackbone([model.float().eval()])(pixels) for model in (again, tower))
        largest = max(largest, (theirs - ours).abs().max().item())
        scale = max(scale, ours.abs().max().item())
    other = [name for name, tensor in unchanged(run) if not torch.equal(written[name], tensor)]
    if other or not largest <= 0.01 * scale:
        raise UserError(f"--to openvla: what was written differs from {run.ckpt}: features by {largest:g} of "
                        f"{scale:g}, tensors {other[:3]}")
    return (f"read back: features of a picture differ by {largest:.1g} of {scale:.3g}, all tensors of "
            "projector and language model are equal")
