"""What a flag is when nobody gives it: published recipes, a checkpoint's model, a config.json of before.

PRESETS: preset -> stage -> flags; "" is for all stages. A table, because that is what the papers print.
Prismatic has a copy of each knob for each stage (`align_learning_rate`, `finetune_learning_rate`) and picks
one of them in __post_init__: then a knob has several names, and a flag can be given that nothing reads.

Hyperparameters of the large presets: LLaVA-1.5 (arXiv 2310.03744, appendix A), Prismatic (arXiv 2402.07865,
appendix B), OpenVLA (arXiv 2406.09246).
"""
import difflib
import json
from pathlib import Path
from typing import get_type_hints

from config import MODEL_FIELDS, Config, Parser, UserError, fits, read_config

_TOY = {"image_dir": "data/toy/images", "prepare": "toy/world.py", "global_batch_size": 32,
        "per_device_batch_size": 32, "max_length": 512, "num_workers": 1}
_PUBLISHED = {"align": {"global_batch_size": 256, "learning_rate": 1e-3, "length_window": 0},
              "finetune": {"global_batch_size": 128, "learning_rate": 2e-5, "weight_decay": 0.1},
              "full-finetune": {"global_batch_size": 128, "learning_rate": 2e-5, "weight_decay": 0.1},
              "vla": {"global_batch_size": 256, "learning_rate": 2e-5, "schedule": "constant",
                      "warmup_ratio": 0.0, "epochs": 1000, "length_window": 0, "augment": True}}
PRESETS = {
    "toy": {
        "": _TOY,
        "align": {"train_json": "data/toy/align.json", "val_json": "data/toy/val_align.json", "epochs": 4,
                  "learning_rate": 3e-3, "length_window": 0},
        "finetune": {"train_json": "data/toy/finetune.json", "val_json": "data/toy/val.json", "epochs": 3,
                     "learning_rate": 5e-4, "weight_decay": 0.01},
        "full-finetune": {"train_json": "data/toy/finetune.json", "val_json": "data/toy/val.json",
                          "epochs": 1, "learning_rate": 3e-4, "weight_decay": 0.01},
        # Vision stays frozen: it has seen the gripper, and training it blurs where things are (docs/vla.md).
        "vla": {"train_json": "data/toy_robot/train.json",
                "image_dir": "data/toy_robot/images", "prepare": "toy/robot.py",
                "trains": "projector,llm", "epochs": 4, "learning_rate": 5e-4, "weight_decay": 0.01,
                "length_window": 0}},
    # The preset of those who name a backbone and no preset. It brings no data and no model.
    "published": {**_PUBLISHED, "": {}},
    "single-gpu": {**_PUBLISHED, "": {
        "vision_backbone": "google/siglip-base-patch16-224",
        "llm_backbone": "HuggingFaceTB/SmolLM2-360M-Instruct"}},
    "llava-v1.5-7b": {
        "": {"vision_backbone": "openai/clip-vit-large-patch14-336", "llm_backbone": "lmsys/vicuna-7b-v1.5",
             "image_resize": "letterbox", "prompt": "vicuna", "picture_place": "tag",
             "gradient_checkpointing": True, "shard": "all"},
        "align": {**_PUBLISHED["align"], "per_device_batch_size": 32},
        "finetune": {**_PUBLISHED["finetune"], "weight_decay": 0.0},
        "full-finetune": {**_PUBLISHED["full-finetune"], "weight_decay": 0.0},
        "vla": _PUBLISHED["vla"]},
    "prism-dinosiglip-7b": {**_PUBLISHED, "": {
        "vision_backbone": "facebook/dinov2-with-registers-large,google/siglip-so400m-patch14-224",
        "llm_backbone": "meta-llama/Llama-2-7b-hf", "projector": "fused-gelu-mlp", "prompt": "plain",
        "openvla_vision": True, "gradient_checkpointing": True, "shard": "all"},
        # Programs that serve OpenVLA's format can't crop a picture, so its policies must see whole ones.
        "vla": _PUBLISHED["vla"] | {"augment": False}},
    # The defaults of OpenVLA's vla-scripts/finetune.py, where 16 is the batch of each GPU. The model comes
    # from --ckpt, such as an imported openvla-7b. What differs: there vision and projector have adapters too;
    # here the projector trains as a whole, and vision, which would not bear this learning rate, not at all.
    # There A is drawn from a Gaussian, here as peft does it by default. There rows of embeddings and output
    # stay, here those of the actions train. There nothing is clipped, and pictures are augmented; as to that,
    # see above.
    "openvla-lora": {**_PUBLISHED, "": {}, "vla": _PUBLISHED["vla"] | {
        "trains": "projector,llm", "lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0.0,
        "global_batch_size": 16, "per_device_batch_size": 16, "learning_rate": 5e-4, "weight_decay": 0.01,
        "max_steps": 200000, "save_every": 5000, "augment": False, "gradient_checkpointing": True}},
}


def defaults(argv):
    """The defaults of all flags, for this command line. Those read here first decide those of the others, in
    --help too. Raises UserError."""
    peek = Parser(add_help=False, allow_abbrev=False)
    for name in ("config", "stage", "preset", "ckpt", "train_json", "vision_backbone", "llm_backbone"):
        peek.add_argument(f"--{name}")
    given = {name: value for name, value in vars(peek.parse_known_args(argv)[0]).items() if value is not None}
    file = read_file(given["config"]) if given.get("config") else {}
    known = file | given
    inherited = {}
    if known.get("ckpt"):
        saved = read_config(known["ckpt"])
        inherited = {name: getattr(saved, name) for name in MODEL_FIELDS}
    # A named backbone gets the published recipe. The toy's, with a learning rate of 3e-3, would spoil it.
    default = "published" if known.get("vision_backbone") or known.get("llm_backbone") else "toy"
    # A flag wins over the file, and so does the model of a --ckpt that was given as a flag.
    last = file | inherited if given.get("ckpt") else inherited | file
    preset = given.get("preset") or last.get("preset", default)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is none of this name. Choose from {', '.join(PRESETS)}")
    if inherited.get("preset", preset) != preset and PRESETS[preset].get(""):
        raise UserError(f"--preset {preset}: the checkpoint {known['ckpt']} was made with "
                        f"--preset {inherited['preset']}. "
                        "Leave the flag out: the model comes from the checkpoint")
    # val_json and prepare of the preset go with the preset's own data. Other data must not get them.
    own_data = {"val_json": "", "prepare": ""} if known.get("train_json") else {}
    of_stage = PRESETS[preset].get(known.get("stage", "align"), {})
    return {"preset": preset} | PRESETS[preset].get("", {}) | of_stage | own_data | last


def read_file(path):
    """--config: a config.json, or the folder of a run -> its flags. Raises UserError that names the field.

    Two are left out: --overwrite is said each time, and the file that this one was made from is no matter.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    kinds = get_type_hints(Config)
    try:
        saved = json.loads(file.read_text()) if file.is_file() else None
        if not isinstance(saved, dict):
            raise ValueError("it holds no JSON object" if file.is_file() else "there is no such file")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--config {path} can't be read ({e}). "
                        "Give a config.json, such as a run's own") from e
    for name, value in saved.items():
        if name not in (*kinds, "started"):                 # the last is a run's own
            near = difflib.get_close_matches(name, kinds, 1)
            raise UserError(f"--config {path}: there is no flag {name!r}"
                            + (f". Did you mean {near[0]!r}?" if near else ""))
        if name in kinds and not fits(value, kinds[name]):
            raise UserError(f"--config {path}: {name} can't be {value!r}; --help says what it can be")
    return {name: value for name, value in saved.items() if name not in ("started", "overwrite", "config")}
