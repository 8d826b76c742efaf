"""Published recipes: named sets of values for the flags of config.py.

preset -> stage -> flags; "" is for all stages. A table, because that is what the papers print. Prismatic has
a copy of each knob for each stage (`align_learning_rate`, `finetune_learning_rate`) and picks one of them in
__post_init__: then a knob has several names, and a flag can be given that nothing reads.

Hyperparameters of the large presets: LLaVA-1.5 (arXiv 2310.03744, appendix A), Prismatic (arXiv 2402.07865,
appendix B), OpenVLA (arXiv 2406.09246).
"""
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
        # Vision stays frozen: it has seen the gripper, and training it blurs where things are (README).
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
