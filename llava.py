"""LLaVA, in and out: the form of transformers' LlavaForConditionalGeneration, as on the hub's llava-hf pages.

One CLIP, SigLIP or DINOv2 tower, a projector of two layers, any language model. The same ids, pixels and
logits come out there as here. That is not left to hope: `compare` loads a folder as its users do.
"""
import json
import re

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (AddedToken, AutoConfig, AutoImageProcessor, AutoModelForCausalLM,
                          AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast)
from transformers.image_processing_utils import BaseImageProcessor

import chat
from actions import ActionTokens, Episodes, first_file, image_dir_of
from config import BadExample, UserError
from data import Conversations
from foreign import loading_options
from images import ImageTransform, Pictures, read_image
from model import load
from prompts import IMAGE, TAG, images_of, tokenize
from weights import (Source, Tensors, config_of, dtype_of, load_tokenizer, positions, read_json, renamed,
                     write_json, write_shards)

# Whether LLaVA drops the first position, CLS: default, or has none to drop: full.
STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full", "dinov2": "default"}
# What DINOv2's layers are called now, and what transformers 4 calls them.
OLD_DINO = ((".attention.q_proj.", ".attention.attention.query."),
            (".attention.k_proj.", ".attention.attention.key."),
            (".attention.v_proj.", ".attention.attention.value."),
            (".attention.o_proj.", ".attention.output.dense."))
# A file of ours in the folder: what convert.py --from needs to make the same run of it again.
KEPT = "run.json"
# Conversations for which the template must give our ids: one picture, none, several, between words, in turns.
PROBES = [["<image>\nWhat is it?"], ["What is it?"], ["<image>\n<image>\nAre they alike?"],
          ["Is <image> like <image>, or not?", "Yes.", "Why?"],
          ["<image>\nHow many?", "Two cats.", "Of what color?", "Red, and\nblue.", "3 more?"],
          ["Hello", "Hi!", "Bye"], ["Look at <image> now", "I do."]]
LIBRARY, TASK = "transformers", "image-text-to-text"
# How the result is used: it stands in its README.md.
USE = """\
```python
from transformers import AutoProcessor, pipeline

folder = "{folder}"                                         # the path of this folder
processor = AutoProcessor.from_pretrained(folder, backend="pil")
answer = pipeline("image-text-to-text", model=folder, processor=processor)
said = answer(text=[{{"role": "user", "content": {content}}}],
              max_new_tokens=64, return_full_text=False)
print(said[0]["generated_text"].strip())
```

- Pictures go through Pillow, as in training: `backend="pil"` (transformers 4: `use_fast=False`). Where
  torchvision is installed, transformers takes it otherwise, and a pixel differs by 1 or 2 of 255.
- Put a picture with an alpha channel on white first, and bring 16 bits to 8, as in training.
- {asked}
- Control tokens in a user's text are obeyed; filter them. The chat template writes the begin token itself;
  raw prompts need it, and an `<image>` for each picture.
- vLLM: {vllm}.
"""
ASKED = ("It was trained without system messages and tools; the chat template refuses them.",
         "It captions exactly one picture, whatever is asked: it is a run of stage align.")


# -- in ------------------------------------------------------------------------------------------------------

def read(source, settings, cfg):
    config = load(AutoConfig, str(source), "--from")
    kind, tensors = config.vision_config.model_type, Tensors(source)
    if kind not in STRATEGY:
        raise UserError(f"--from {source}: its vision tower is of type {kind!r}. Known: CLIP, "
                        "SigLIP, DINOv2")
    expected = {"vision_feature_layer": -2, "vision_feature_select_strategy": STRATEGY[kind],
                "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise UserError(f"--from {source}: {name} is {getattr(config, name)!r}; only {value!r} can be "
                            "imported")
    of = {"vision": {}, "projector": {}, "llm": {}}
    with torch.device("meta"):                              # takes no memory
        base = AutoModelForCausalLM.from_config(config.text_config).base_model_prefix
    for name in tensors:
        part, ours = llava_name(name, base)
        of[part][ours] = name
    transforms, _ = BaseImageProcessor.get_image_processor_dict(source, **loading_options(source))
    resize = ("letterbox" if transforms.get("do_pad") else
              "resize-crop" if transforms.get("do_center_crop") else "resize-naive")
    check_pixels(source, transforms, config.vision_config, resize)
    tokenizer = load_tokenizer(source)
    told = read_json(source / KEPT) if (source / KEPT).exists() else {}         # an export of ours tells more
    actions = ActionTokens.load(told["actions"]).saved() if told.get("actions") else {}
    return Source(
        [(config.vision_config.to_dict(), renamed(tensors, of["vision"]), transforms)],
        (config.text_config, tokenizer, renamed(tensors, of["llm"])), dict(renamed(tensors, of["projector"])),
        {"projector": "gelu-mlp", "image_resize": resize, "picture_place": told.get("picture_place", "tag"),
         "preset": "llava-v1.5-7b" if kind == "clip_vision_model" else "published",
         "stage": "vla" if actions else "align" if told.get("captions") else "full-finetune",
         "prompt": cfg.prompt or told.get("prompt") or llava_prompt(source, tokenizer)}, actions, told)


def check_pixels(source, settings, vision, resize):
    """A preprocessor file can say more than our three ways to make a square. Raises UserError where ours does
    not give the same pixels."""
    size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    size = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    ours = ImageTransform(size, vision.patch_size, settings["image_mean"], settings["image_std"],
                          settings.get("resample", 3), resize)
    theirs = AutoImageProcessor.from_pretrained(source, backend="pil", **loading_options(source))
    for picture in (noise(), noise().rotate(90, expand=True)):
        pixels = theirs(picture, return_tensors="pt")["pixel_values"][0]
        if pixels.shape != ours(picture).shape or not torch.equal(pixels, ours(picture)):
            raise UserError(f"--from {source}: its preprocessor_config.json makes other pixels than any "
                            "--image_resize. Known are CLIP's (shortest edge, then a crop of the same size), "
                            "SigLIP's and LLaVA's")


def llava_name(name, base):
    """A tensor's name on disk, in the old and in the new form -> part, name in the part's own class."""
    name = re.sub("^model[.](?=vision_tower|multi_modal_projector|language_model)", "new.", name)
    if "vision_tower." in name:
        name = re.sub("^(new[.])?vision_tower[.](vision_model[.])?", "", name)
        for new, old in OLD_DINO:
            name = name.replace(old, new)
        return "vision", name
    if "multi_modal_projector." in name:
        layer, end = name.split(".")[-2:]
        return "projector", f"projector.{ {'linear_1': 0, 'linear_2': 2}.get(layer, layer)}.{end}"
    name = re.sub("^new[.]language_model[.]", f"{base}.", name)
    return "llm", re.sub("^language_model[.](model[.])?", lambda m: f"{base}." if m[1] else "", name)


def llava_prompt(source, tokenizer):
    """llava-hf's own template can't be learned: it says nothing of what ends a reply. It is Vicuna's without
    the first text."""
    if not tokenizer.chat_template or "ASSISTANT:" in tokenizer.get_chat_template():
        return "llava"
    chat.find_prompt("auto", source, tokenizer)             # raises UserError
    return "auto"


# -- out -----------------------------------------------------------------------------------------------------

def refuse(run, wrong):
    """What LLaVA can't express: raises wrong(what)."""
    kinds = [model.config.model_type for model in run.model.vision.models]
    if len(kinds) > 1:
        raise wrong("has two vision backbones; LLaVA has one")
    if kinds[0] not in STRATEGY:
        raise wrong(f"has a vision backbone of type {kinds[0]}: LLaVA drops one position in front of the "
                    "patches, and registers would stay among them")
    if run.cfg.projector == "fused-gelu-mlp":
        raise wrong("has a fused-gelu-mlp projector of three layers; LLaVA's has two")


def write(run, folder):
    """-> the id of <image>."""
    tower = run.model.vision.models[0].config
    image_id, tokenizer = write_tokenizer(run, folder)
    write_template(run, folder, tokenizer, image_id)        # first: it can be refused
    rows = len(run.model.llm.get_input_embeddings().weight)
    if image_id >= rows:                                    # the tables grow, as usual to a multiple of 64
        rows = -(-(image_id + 1) // 64) * 64
    write_shards(folder, llava_tensors(run, rows))
    config = llava_config(run, rows, image_id)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {
        "do_sample": False, "eos_token_id": run.language.end_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id})
    pixels = llava_pixels(run)
    write_json(folder / "preprocessor_config.json", pixels)
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "patch_size": tower.patch_size, "image_token": TAG,
        "num_additional_image_tokens": int(tower.model_type != "siglip_vision_model"),          # CLS
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "image_processor": pixels})
    if run.actions:
        write_json(folder / "dataset_statistics.json", run.actions["statistics"])
    print(f"vLLM     {why_not_vllm(run) or 'can serve it'}")
    return image_id


def about(run):
    """What stands in the README, see USE."""
    content = '[{"type": "image", "url": "picture.png"}]' if run.language.captions else (
        '[{"type": "image", "url": "picture.png"},\n'
        '                                               {"type": "text", "text": "What is it?"}]')
    return {"content": content, "asked": ASKED[run.language.captions],
            "vllm": why_not_vllm(run) or "can serve it (not tried by us)"}


def why_not_vllm(run):
    kind = run.model.vision.models[0].config.model_type
    if kind == "dinov2":
        return "no: it knows CLIP and SigLIP towers only"
    if run.cfg.projector == "linear":
        return "no: it does not know a projector of one layer"
    if not hasattr(run.model.llm.base_model, "embed_tokens"):
        return f"no: it wants a language model built like Llama, not {run.model.llm.config.model_type}"
    return ""


def llava_config(run, rows, image_id):
    llm, dtype = run.model.llm, dtype_of(run.model)
    vision = config_of(run.model.vision.models[0], dtype)
    if vision["model_type"] != "dinov2":
        vision["image_size"] = run.transforms[0].size       # LLaVA does not fit the table to another size
    pad = {"image_aspect_ratio": "pad"} if run.cfg.image_resize == "letterbox" else {}      # for SGLang
    text = config_of(llm, dtype) | {"vocab_size": rows, "tie_word_embeddings": is_tied(llm)}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **pad,
        "image_token_index": image_id, "image_seq_length": run.transforms[0].patches,
        "projector_hidden_act": "gelu" if run.cfg.projector == "gelu-mlp" else "linear",
        "multimodal_projector_bias": True, "vision_feature_layer": -2,
        "vision_feature_select_strategy": STRATEGY[vision["model_type"]],
        "vision_config": vision, "text_config": text, "tie_word_embeddings": is_tied(llm),
        "dtype": dtype, "torch_dtype": dtype}


def is_tied(llm):
    """Whether the folder stores one table for embeddings and output. LLaVA ties by the name embed_tokens:
    a model that calls its table otherwise (GPT-2: wte) gets two copies."""
    table, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    return table is head and hasattr(llm.base_model, "embed_tokens")


def llava_tensors(run, rows):
    """(name, tensor) pairs under LLaVA's names on disk in their old form: transformers 4 and 5 read it."""
    llm, (tower,) = run.model.llm, run.model.vision.models
    table, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    base, seen = llm.base_model_prefix, set()
    for name, tensor in llm.state_dict(keep_vars=True).items():
        if tensor is table or tensor is head:
            if tensor in seen:
                continue
            seen.add(tensor)
            # New rows are the mean of the old ones: then <image>'s logit is the mean of all, never the best.
            more = tensor.detach().float().mean(0).to(tensor.dtype).expand(rows - len(tensor), -1)
            grown = torch.cat([tensor.detach(), more])
            if tensor is table:
                yield name.replace(f"{base}.", "language_model.model.", 1), grown
            if tensor is head and not is_tied(llm):
                yield "language_model.lm_head.weight", grown
        else:
            yield name.replace(f"{base}.", "language_model.model.", 1), tensor
    linears = [layer for layer in run.model.projector if isinstance(layer, nn.Linear)]
    if len(linears) == 1:                                   # LLaVA always has two: the second changes nothing
        linears.append(nn.Linear(len(linears[0].weight), len(linears[0].weight)).to(linears[0].weight.dtype))
        nn.init.eye_(linears[1].weight)
        nn.init.zeros_(linears[1].bias)
    for name, layer in zip(("linear_1", "linear_2"), linears):
        yield f"multi_modal_projector.{name}.weight", layer.weight
        yield f"multi_modal_projector.{name}.bias", layer.bias
    dino = tower.config.model_type == "dinov2"
    for name, tensor in tower.state_dict().items():
        if not dino and name == "embeddings.position_embedding.weight":
            tensor = positions(tower, run.transforms[0].size)[0]
        for new, old in OLD_DINO if dino else ():
            name = name.replace(new, old)
        yield f"vision_tower.{'' if dino else 'vision_model.'}{name}", tensor


def llava_pixels(run):
    """The preprocessor's file, everything spelled out."""
    transform, square = run.transforms[0], {"height": run.transforms[0].size, "width": run.transforms[0].size}
    crop, pad = run.cfg.image_resize == "resize-crop", run.cfg.image_resize == "letterbox"
    return {"image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
            "do_convert_rgb": True, "do_resize": True, "resample": int(transform.resample),
            "size": {"shortest_edge": transform.size} if crop else square, "do_center_crop": crop,
            "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": decimals(transform.mean), "image_std": decimals(transform.std),
            **({"do_pad": True} if pad else {})}


def kept(run, tokenizer):
    """What an export changes in the tokenizer, and what no field of LLaVA's tells; with the ids of PROBES."""
    prompt = run.cfg.prompt
    if prompt == "auto" and not run.language.prompt.in_place:
        prompt = chat.known(chat.own_name(run.cfg.llm_backbone), tokenizer)
    return {"prompt": prompt, "picture_place": run.language.place, "actions": run.actions,
            "captions": run.language.captions, "eos_token": tokenizer.eos_token,
            "chat_template": tokenizer.chat_template,
            "post_processor": json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"],
            "probes": probe_ids(run.language)}


def restore(folder, told):
    """An import's llm folder gets back what its export changed."""
    if told:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.eos_token, tokenizer.chat_template = told["eos_token"], told["chat_template"]
        tokenizer.save_pretrained(folder)
        rules = read_json(folder / "tokenizer.json") | {"post_processor": told["post_processor"]}
        write_json(folder / "tokenizer.json", rules)


def probe_ids(language):
    """The ids of PROBES, one position for a picture."""
    return [tokenize({"image": ["?"] * pictures, "conversations": turns}, language, 1, 10 ** 6,
                     ask=len(turns) % 2 == 1)[0]
            for pictures, turns in probes(language)]


def probes(language):
    """-> (pictures, turns) of each conversation. An align run was shown one picture, and captions it."""
    for texts in PROBES:
        pictures = "".join(texts).count(TAG)
        texts = [texts[0], "A red cat."] if language.captions else texts
        if pictures == 1 or not language.captions:
            yield pictures, [{"from": ("human", "gpt")[i % 2], "value": said} for i, said in enumerate(texts)]


def decimals(tensor):
    """fp32 numbers as a person wrote them: 0.48, not 0.47999998927116394."""
    return [float(str(number)) for number in tensor.flatten().numpy()]


def write_tokenizer(run, folder):
    """-> the id of <image>, the tokenizer as written."""
    language, tokenizer = run.language, load_tokenizer(run.cfg.llm_backbone)
    tokenizer.add_tokens([AddedToken(TAG, special=True, normalized=False, lstrip=False, rstrip=False)],
                         special_tokens=True)
    write_json(folder / KEPT, kept(run, tokenizer))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(language.end_id)      # others stop at eos
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    # The template writes BOS, so the tokenizer must not: some programs tokenize with its special tokens, some
    # without, and there must be exactly one.
    write_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json") | {"post_processor": None})
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    # PreTrainedTokenizerFast is the class that transformers 4 and 5 both know and that changes no id.
    # token_type_ids would be refused by the model. Left padding: replies then begin where all prompts end.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "add_bos_token": False,
                 "model_input_names": ["input_ids", "attention_mask"], "processor_class": "LlavaProcessor"}
    for made_here in ("backend", "is_local", "local_files_only"):
        settings.pop(made_here, None)
    write_json(file, settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(TAG), tokenizer


# -- the chat template ---------------------------------------------------------------------------------------

# The chat template, behind the strings of the prompt format. A picture may be a part of its own, or its tag.
TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{- content | trim -}}
{%- else -%}
{%- set all = namespace(text='') -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- set all.text = all.text + part['text'] -%}
{%- elif part['type'] in ['image', 'image_url'] -%}
{#- A picture on a line of its own, unless it stands between words. -#}
{%- set opens, between = not all.text or all.text.endswith('\\n'), all.text.endswith(' ') -%}
{%- set all.text = all.text + ('<image>\\n' if opens else '<image>' if between else '\\n<image>') -%}
{%- else -%}{{- raise_exception('this model knows texts and pictures, no ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{{- all.text | trim -}}
{%- endif -%}
{%- endmacro -%}
{%- set count = namespace(pictures=0) -%}
{%- for message in messages -%}
{#- vLLM looks for this loop, to see that parts of messages are understood. -#}
{%- for part in message['content'] -%}{%- endfor -%}
{%- set count.pictures = count.pictures + said(message['content']).split('<image>') | length - 1 -%}
{%- endfor -%}
{%- set in_front = one_in_front and count.pictures == 1 -%}
{{- bos + ('<image>' if in_front else '') -}}
{%- for message in messages -%}
{%- set text = said(message['content']) -%}
{%- if message['role'] == 'user' -%}
{%- set text = text.replace('<image>', '') | trim if in_front else text -%}
{%- set behind_control = bos or in_front or not loop.first -%}
{{- (glue if behind_control and needs_glue[0 if loop.first else 1] else '') -}}
{{- first if loop.first else later -}}
{%- for piece in (text + before_reply).split('<image>') -%}
{%- set alone = not piece or piece.startswith(' ') or (piece == before_reply and not needs_glue[2]) -%}
{{- ('' if loop.first else '<image>' + ('' if alone else glue)) + piece -}}
{%- endfor -%}
{%- elif message['role'] == 'assistant' -%}
{{- (space + text if text else '') + end -}}
{%- elif text -%}
{{- raise_exception('this model was trained without system messages and tools') -}}
{%- endif -%}
{%- endfor -%}
"""
# A run of stage align: it was never asked, it captions one picture.
CAPTIONS = """\
{{- bos + '<image>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- (message['content'] if message['content'] is string else message['content'][0]['text']) | trim + end -}}
{%- endif -%}
{%- endfor -%}
"""


def template(run, glue):
    """glue: what stands in front of a piece of text that follows a control token. Some tokenizers put a
    space there by themselves, others only at the start of the whole text; and we read each piece as a text.
    """
    language, prompt = run.language, run.language.prompt
    texts = prompt.first, prompt.user, language.before_reply
    strings = {
        "bos": language.tokenizer.bos_token if language.bos else "", "first": texts[0], "later": texts[1],
        "before_reply": texts[2], "glue": glue, "one_in_front": language.place == "first",
        "needs_glue": [bool(text) and text[0] != " " and not language.control.match(text) for text in texts],
        "space": " " if language.adds_space and not prompt.in_place else language.gap,
        "end": language.tokenizer.eos_token if language.captions else prompt.end}
    # JSON's strings, lists, and its true and false are Jinja's, too.
    head = "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
                   for name, value in strings.items())
    return head + (CAPTIONS if language.captions else TEMPLATE)


def write_template(run, folder, tokenizer, image_id):
    """The glue that gives our ids on all PROBES is the right one. Raises UserError if none does."""
    wanted = [with_image(ids, image_id) for ids in probe_ids(run.language)]
    found = next((glue for glue in (" ", "") if template_ids(run, glue, tokenizer) == wanted), None)
    if found is None:
        raise UserError(f"--to llava: {run.ckpt} has a prompt format (--prompt {run.cfg.prompt}) that can't "
                        "be written as a chat template with the same ids. Train with another --prompt")
    (folder / "chat_template.jinja").write_text(template(run, found))


def template_ids(run, glue, tokenizer):
    text = template(run, glue)
    written = [tokenizer.apply_chat_template(messages_of(turns), chat_template=text, tokenize=False)
               for _, turns in probes(run.language)]
    return tokenizer(written, add_special_tokens=False)["input_ids"]


def with_image(ids, image_id):
    return [image_id if i == IMAGE else i for i in ids]


def messages_of(turns):
    return [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
            for turn in turns]


# -- the check -----------------------------------------------------------------------------------------------

def own_examples(run, most=6):
    """The run's own first examples without their last reply, up to two of each number of pictures: turns,
    pictures (PIL). Where its data is not at hand, made-up ones."""
    found = {}
    try:
        file = first_file(run.cfg.train_json.split(","), run.actions)
        about = file, run.language, Pictures(image_dir_of(run.cfg, file), run.transforms)
        known = getattr(run.model.llm.config, "max_position_embeddings", None) or run.cfg.max_length
        about = *about, min(run.cfg.max_length, known)
        data = Episodes(*about, ActionTokens.load(run.actions)) if run.actions else Conversations(*about)
        rows = (data.row(i) for i in range(min(len(data), 2000)))
    except UserError:                                       # moved, changed; an imported run has none
        rows = []
    for row in rows:
        try:
            data.tokens(row, ask=True)
            names, turns = images_of(row), row["conversations"]
            turns = turns[:-1] if turns[-1]["from"] == "gpt" else turns
            if len(found.setdefault(len(names), [])) < 2 and not any(
                    run.language.control.search(turn["value"]) for turn in turns):
                pictures = [read_image(data.pictures.path(name)) for name in names]
                found[len(names)].append((turns, pictures))
        except BadExample:
            continue
    own = [example for examples in found.values() for example in examples][:most]
    return (own, True) if own else (made_up(run), False)


def made_up(run):
    return [(turns[:1], [noise()] * n) for n, turns in list(probes(run.language))[:3]]


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8))


@torch.no_grad()
def seen_by(run, turns, pictures):
    """-> what the run makes of an example: ids, pixels of its first tower, logits (T, V)."""
    ids, _ = tokenize({"image": ["?"] * len(pictures), "conversations": turns}, run.language,
                      run.transforms[0].patches, 10 ** 6, ask=True)
    pixels = [torch.stack([transform(picture) for picture in pictures])
              for transform in run.transforms] if pictures else []
    x = run.model.embed(torch.tensor([ids]), pixels)
    return ids, pixels[0] if pictures else None, run.model.llm(inputs_embeds=x).logits[0]


@torch.no_grad()
def compare(run, folder, image_id):
    """Loads the folder as its users do, and compares ids, pixels and logits -> the largest difference, in
    words. Raises UserError where something differs by more than rounding."""
    examples, own = own_examples(run)
    run.model.float()
    ours = [seen_by(run, *example) for example in examples]
    run.model.free()                                        # never two models in memory
    # Pillow's pixels, as ours are. Where torchvision is installed, transformers takes its resizing otherwise.
    processor = AutoProcessor.from_pretrained(folder, backend="pil", **loading_options(folder))
    theirs = load(AutoModelForImageTextToText, str(folder), "--out", dtype=torch.float32).eval()
    largest, scale = 0.0, 0.0
    for (turns, pictures), (ids, pixels, logits) in zip(examples, ours):
        text = processor.apply_chat_template(messages_of(turns), add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False)
        if inputs["input_ids"][0].tolist() != with_image(ids, image_id):
            raise UserError(f"--to llava: the folder gives other ids than {run.ckpt} for {text[:300]!r}")
        if pictures and not torch.equal(inputs["pixel_values"], pixels):
            raise UserError(f"--to llava: the folder gives other pixels than {run.ckpt}")
        got = theirs(**inputs).logits[0, :, :logits.shape[1]]
        largest = max(largest, (got - logits).abs().max().item())
        scale = max(scale, logits.abs().max().item())
    if not largest <= 1e-4 * scale:
        raise UserError(f"--to llava: logits of the folder and of {run.ckpt} differ by {largest:g} of "
                        f"{scale:g}")
    return (f"{len(examples)} {'of its own' if own else 'made-up'} examples through transformers: the same "
            f"ids and pixels, logits differ by {largest:.1g} of {scale:.3g}")
