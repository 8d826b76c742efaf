"""Vision backbone(s) -> projector -> language model (LLM), and what each stage trains.

A part that does not train is frozen: its weights get no gradient and stay as they are.

Shapes: B examples, T positions, N pictures in the batch, P patches per picture, D_v vision width,
D LLM width, V vocabulary, S supervised positions.
"""
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, CLIPVisionModel, GenerationConfig,
                          SiglipVisionModel, masking_utils)
from transformers.utils import logging

from config import UserError
from images import load_image_transforms
from prompts import find_places

logging.disable_progress_bar()                      # a bar and a report for each backbone and rank would bury
logging.set_verbosity_error()                       # what matters; `load` looks at what is missing itself
# It asks whether a row is several texts in one. Ours never are, and the CPU would wait for a GPU to hear so.
masking_utils.find_packed_sequence_indices = lambda position_ids: None

PARTS = ("vision", "projector", "llm")
CHUNK = 4096                                                # supervised positions with logits at one time

# model_type -> (class, positions in front of the patches: CLS and registers). Their features are no patches.
VISION_MODELS = {
    "clip": (CLIPVisionModel, lambda config: 1),
    "clip_vision_model": (CLIPVisionModel, lambda config: 1),
    "siglip": (SiglipVisionModel, lambda config: 0),
    "siglip_vision_model": (SiglipVisionModel, lambda config: 0),
    "dinov2": (AutoModel, lambda config: 1),
    "dinov2_with_registers": (AutoModel, lambda config: 1 + config.num_register_tokens),
    "dinov3_vit": (AutoModel, lambda config: 1 + config.num_register_tokens),
}


def blocks(transformer):
    return next(module for module in transformer.modules() if isinstance(module, nn.ModuleList))


class VisionBackbone(nn.Module):
    """One or several vision transformers, their patch features side by side on the channel axis.

    The features are the second-to-last block's, without the final norm: LLaVA and Prismatic found them to
    keep more of the place and look of things than the last block's, which is trained for a summary of the
    whole picture.
    """

    def __init__(self, models, transforms=()):
        super().__init__()
        self.models, self.features = nn.ModuleList(models), None
        # The last block works for nothing. It is replaced by a function that keeps its input, the features:
        # one block less to compute. (transformers gives them as hidden_states[-2], and keeps all the others.)
        for model in models:
            blocks(model)[-1].forward = self.keep
        if transforms:                                      # (models, 768)
            self.register_buffer("levels", torch.stack([t.levels() for t in transforms]), persistent=False)
        self.skip = [VISION_MODELS[model.config.model_type][1](model.config) for model in models]
        self.width = sum(model.config.hidden_size for model in models)                      # D_v

    def keep(self, states, *_, **__):
        self.features = states
        return states

    def forward(self, pixel_values):                        # one (N, C, H, W) per model
        features = []
        for i, (model, skip, pixels) in enumerate(zip(self.models, self.skip, pixel_values, strict=True)):
            if pixels.dtype == torch.uint8:                 # as files have them, see ImageTransform
                color = torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
                pixels = self.levels[i].index_select(0, (pixels + color).flatten()).view(pixels.shape)
            # DINO always fits its position embeddings to the picture's size; the others do so when asked.
            fit = {"interpolate_pos_encoding": True} if pixels.shape[-1] != model.config.image_size \
                and not model.config.model_type.startswith("dino") else {}
            model(pixels.to(model.dtype), **fit)
            features.append(self.features[:, skip:])                                # (N, P, D_v of one model)
        self.features = None                                # or a step's activations would outlive it
        return torch.cat(features, dim=-1)                                                  # (N, P, D_v)


def make_projector(kind, vision_width, width):
    """(N, P, D_v) -> (N, P, D). linear, gelu-mlp as in LLaVA, LLaVA-1.5, fused-gelu-mlp as in Prismatic."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(vision_width, width))
    if kind == "gelu-mlp":
        return nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
    return nn.Sequential(nn.Linear(vision_width, 4 * vision_width), nn.GELU(),
                         nn.Linear(4 * vision_width, width), nn.GELU(), nn.Linear(width, width))


class VLM(nn.Module):
    def __init__(self, vision, projector, llm):
        super().__init__()
        self.vision, self.projector, self.llm = vision, projector, llm
        self.trained, self.adapters = (), None              # see set_trained, and lora.py

    def set_trained(self, names):
        """Only the named parts get gradients (TRAINS in config.py). Others stay in eval mode: no dropout."""
        self.trained = {name.split(".")[0] for name in names}
        self.requires_grad_(False)
        for name in names:
            if name == "llm.last":                          # what OpenVLA calls the last layer
                for module in (blocks(self.llm.base_model)[-1], self.llm.get_input_embeddings(),
                               self.llm.get_output_embeddings()):
                    module.requires_grad_(True)
            else:
                getattr(self, name).requires_grad_(True)
        if "vision" in self.trained:
            # The last block, the final norm and the head stand behind the features: nothing to train.
            used = used_parameters(self.vision)
            for parameter in self.vision.parameters():
                parameter.requires_grad_(parameter in used)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for name in PARTS:
            if name not in self.trained:
                getattr(self, name).eval()
        return self

    def free(self):
        """Gives its memory back. It can't be used any more."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.grad, tensor.data = None, tensor.data.new_empty(0)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def use_recomputing(self):
        """Recompute the LLM's activations in backward instead of keeping them ("gradient checkpointing").

        The switch of the transformers library works in training mode only. A frozen LLM is in eval mode, so
        that its dropout is off. But backward goes through it to the projector and needs its activations.
        """
        for block in blocks(self.llm.base_model):
            block.forward = partial(recompute, block.forward, use_reentrant=False)

    def use_compile(self):
        """One graph for all blocks of a transformer, which are alike, and for all lengths of a batch."""
        vision = (block for model in self.vision.models for block in blocks(model)[:-1])
        for block in (*blocks(self.llm.base_model), *vision):
            block.compile(dynamic=True)

    def embed(self, input_ids, pixel_values, patches_at=None):  # (B, T), one (N, C, H, W) per model, (N P,)
        """Token embeddings with the projected patches in their places -> (B, T, D)."""
        x = self.llm.get_input_embeddings()(input_ids.clamp_min(0))                         # (B, T, D)
        if len(pixel_values) == 0:
            return x                                        # a text-only batch never touches the projector
        with torch.set_grad_enabled("vision" in self.trained and torch.is_grad_enabled()):
            features = self.vision(pixel_values)                                            # (N, P, D_v)
        patches = self.projector(features.to(self.projector[0].weight.dtype))               # (N, P, D)
        patches_at = find_places(input_ids, input_ids)[0] if patches_at is None else patches_at     # (N P,)
        rows, columns = patches_at // x.shape[1], patches_at % x.shape[1]                   # (N P,) each
        return x.index_put((rows, columns), patches.flatten(0, 1).to(x.dtype))              # (B, T, D)

    def forward(self, input_ids, labels, pixel_values, places=None):
        """-> the cross-entropy summed over all supervised tokens, one fp32 number (it is train.py's
        -log(probability)), and the likeliest token at each of their places, (S,). A patch is never guessed.

        The shift by one: what comes out at position t has seen the tokens up to t, and is the guess for token
        t + 1. So outputs 0 ... T - 2 are compared with labels 1 ... T - 1; label 0 is nobody's target.
        `places` says where, see `collate`; without it a GPU is waited for.

        No attention mask: padding stands on the right and attention is causal, so no real token ever sees it.
        Without a mask the attention kernel takes its fast causal path.
        """
        patches_at, learned_at = places or find_places(input_ids, labels)                      # (N P,), (S,)
        x, seen = self.embed(input_ids, pixel_values, patches_at), {}                       # (B, T, D)
        if hasattr(self.projector, "slots") and len(pixel_values):      # a text-only batch has no slots
            import parallel                                 # a policy, --decode parallel
            x, seen = parallel.fill(self.projector.slots, x, input_ids)
        states = self.llm.base_model(inputs_embeds=x, use_cache=False, **seen).last_hidden_state
        states = states.flatten(0, 1).index_select(0, learned_at)                           # (S, D)
        targets = labels.flatten().index_select(0, learned_at + 1)                          # (S,)
        if len(targets) <= CHUNK:
            return self.loss_of(states, targets)
        # Logits are the scores of all V tokens, before they become probabilities. For all S positions at once
        # they would be the largest tensor of the step. So in chunks, which backward computes a second time.
        chunks = [recompute(self.loss_of, *chunk, use_reentrant=False)
                  for chunk in zip(states.split(CHUNK), targets.split(CHUNK))]
        return sum(loss for loss, _ in chunks), torch.cat([likeliest for _, likeliest in chunks])

    def loss_of(self, states, targets):                     # (S, D), (S,)
        logits = self.llm.get_output_embeddings()(states)                                   # (S, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), logits.argmax(-1)


def used_parameters(vision):
    """The set of parameters that the features depend on, found by asking autograd."""
    parameters = list(vision.parameters())
    blank = [torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=parameters[0].device)
             for model in vision.models]
    with torch.enable_grad():
        grads = torch.autograd.grad(vision(blank).float().sum(), parameters, allow_unused=True)
    return {parameter for parameter, grad in zip(parameters, grads) if grad is not None}


# -- loading -------------------------------------------------------------------------------------------------

def load_vision(names, dtype=torch.float32, as_openvla=False, transforms=()):
    """Folder or hub id, or several joined by commas -> VisionBackbone. as_openvla: see --openvla_vision."""
    models = []
    for name in names.split(","):
        kind = load(AutoConfig, name, "--vision_backbone").model_type
        if kind not in VISION_MODELS:
            raise UserError(f"--vision_backbone {name} is of type {kind!r}. "
                            f"Known types: {', '.join(VISION_MODELS)}")
        changed = {"hidden_act": "gelu"} if as_openvla and kind.startswith("siglip") else {}
        changed |= {"pos_embed_rescale": None} if kind == "dinov3_vit" else {}      # positions at random
        models.append(load(VISION_MODELS[kind][0], name, "--vision_backbone", dtype=dtype, **changed))
    return VisionBackbone(models, transforms)


def load_llm(name, dtype=torch.float32):
    """Folder or hub id -> causal language model. Refuses the few that do more than `embed` and `loss_of`."""
    llm = load(AutoModelForCausalLM, name, "--llm_backbone", dtype=dtype)
    if llm.device.type == "meta":                           # shapes without numbers: nothing can be tried out
        return llm
    with torch.no_grad():
        ids = torch.arange(4)[None]                                                         # (1, 4)
        given = llm(ids, use_cache=False).logits.float()                                    # (1, 4, V)
        states = llm.base_model(inputs_embeds=llm.get_input_embeddings()(ids), use_cache=False)[0]
        ours = llm.get_output_embeddings()(states).float()
    if not (given - ours).abs().max() <= 1e-5 * given.abs().max():
        raise UserError(f"--llm_backbone {name} changes its logits behind the output layer, or its "
                        "embeddings in front of the first block; such models are not supported")
    # Many folders bring a generation_config.json with sampling and penalties. Our flags decide instead.
    llm.generation_config = GenerationConfig()
    return llm


def load(cls, name, flag, **options):
    from foreign import loading_options, without_weights
    try:
        if cls is AutoConfig:
            return cls.from_pretrained(name, **loading_options(name))
        if torch.get_default_device().type == "meta":       # for plan.py: shapes without numbers
            return without_weights(cls, AutoConfig.from_pretrained(name, **loading_options(name)), **options)
        model, found = cls.from_pretrained(name, output_loading_info=True, **loading_options(name), **options)
        missing = sorted(found["missing_keys"]) + list(found["mismatched_keys"])
        if missing:                                 # transformers would fill them with random numbers
            raise ValueError(f"{len(missing)} tensors are missing or of another shape, such as {missing[0]}")
        return model
    except Exception as e:                          # transformers raises many kinds here; each means the same
        raise UserError(f"{flag} {name} can't be loaded ({type(e).__name__}: {str(e).splitlines()[0]}). "
                        "Give a Hugging Face folder, or a hub id if this machine reaches the hub") from e


def load_vlm(cfg, trained=PARTS, frozen_dtype=torch.float32):
    """The VLM of a Config, its projector fresh from the seed. trained: parts in float32, those that train and
    those that a checkpoint brings, which will be saved again. Others get `frozen_dtype`."""
    trained = {name.split(".")[0] for name in trained} - ({"llm"} if cfg.lora_rank else set())
    dtype = {name: torch.float32 if name in trained else frozen_dtype for name in PARTS}
    transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize, cfg.openvla_vision)
    vision = load_vision(cfg.vision_backbone, dtype["vision"], cfg.openvla_vision, transforms)
    llm = load_llm(cfg.llm_backbone, dtype["llm"])
    torch.manual_seed(cfg.seed)
    projector = make_projector(cfg.projector, vision.width, llm.get_input_embeddings().embedding_dim)
    return VLM(vision, projector.to(dtype["projector"]), llm)
