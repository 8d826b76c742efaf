"""Official weights in, Hugging Face folders out.

    python convert.py --from SOURCE --out FOLDER            # SOURCE becomes a run that --ckpt takes
    python convert.py --ckpt RUN --to llava --out FOLDER    # a run becomes a folder that transformers reads
    python convert.py --ckpt RUN --to openvla --out FOLDER  # a policy becomes a folder that vLLM serves
    python convert.py --ckpt RUN --to peft --out FOLDER     # a LoRA run's adapters, for the peft library
    python convert.py --ckpt RUN --merge --out FOLDER       # a LoRA run becomes a run without adapters

SOURCE is a run folder of Prismatic (or the .pt file in it), a folder of OpenVLA, or one of llava-hf. Both of
its backbones become folders inside of FOLDER. What is read is tensors and JSON; no code of theirs is run.
What the forms are stands in llava.py and openvla.py, what others call the same tensor in weights.py.
"""
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

from config import Config, UserError, knob, parse


@dataclass(frozen=True)
class ConvertConfig:
    from_: str = knob("", "Prismatic run folder or .pt file, OpenVLA folder, or llava-hf folder")
    ckpt: str = knob("", "run folder or step folder that goes out")
    to: Literal["", "llava", "openvla", "peft"] = knob("", "the form in which --ckpt goes out")
    merge: bool = knob(False, "add a LoRA run's adapters to its language model: an ordinary run, in fp32")
    out: str = knob("", "new folder for the result")
    bf16: bool = knob(
        False, "write all weights of --to and --merge in bfloat16: half the size; answers can change a word")
    vision_backbone: str = knob(
        "", "Prismatic without vision weights: folders or hub ids of the towers; empty = the official ones")
    llm_backbone: str = knob(
        "", "Prismatic: folder or hub id of its language model, for tokenizer and shapes; empty = by name")
    prompt: Literal[("", *get_args(Config.__annotations__["prompt"]))] = knob(
        "", "--from: the prompt format of the run; empty = what the source was trained with")

    def __post_init__(self):
        ways = bool(self.to) + self.merge
        if bool(self.from_) == bool(self.ckpt) or bool(self.ckpt) != ways or not self.out:
            raise UserError("give --from SOURCE --out FOLDER, or --ckpt RUN --out FOLDER and one of "
                            "--to llava|openvla|peft, --merge")
        if self.bf16 if self.from_ else self.prompt or self.vision_backbone or self.llm_backbone:
            raise UserError("--bf16 is for --to and --merge; --prompt and the backbones are for --from")
        try:
            taken = os.path.lexists(self.out) or Path(self.out).name.startswith("step-") or "," in self.out
        except ValueError:
            taken = True
        if taken or len(Path(self.out).name) > 100:
            raise UserError(f"--out {self.out} exists, or can't be the name of a run. Name a new folder")


if __name__ == "__main__":
    cfg = parse(ConvertConfig, description="Official weights in, Hugging Face folders out.")

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import chat
import checkpoint
import llava
import openvla
import ranks
import weights
from config import read_config
from images import load_image_transforms
from model import VISION_MODELS, VLM, load, load_llm, load_vision, make_projector
from prompts import load_language

# -- in ------------------------------------------------------------------------------------------------------

def read_source(cfg):
    """The kind of --from is told by its config.json."""
    source = Path(cfg.from_)
    if source.suffix == ".pt":
        return openvla.read_prismatic(source, source.parent.parent, cfg)
    settings = weights.read_json(source / "config.json")
    if settings.get("model_type") == "llava":
        return llava.read(source, settings, cfg)
    if settings.get("model_type") in ("openvla", "prismatic"):
        return openvla.read(source, settings, cfg)
    files = sorted((source / "checkpoints").glob("*.pt"))
    latest = source / "checkpoints/latest-checkpoint.pt"
    if files and ("model" in settings or "vla" in settings):
        return openvla.read_prismatic(latest if latest.exists() else files[-1], source, cfg)
    raise UserError(f"--from {source} is no folder of LLaVA (llava-hf) or OpenVLA, and no run folder of "
                    f"Prismatic with checkpoints/*.pt; its model_type is {settings.get('model_type')!r}")


def fitting(model, pairs, what):
    """Passes on the tensors of a part, after it has compared each with the model of the part's config, which
    takes no memory (torch's meta device). Raises UserError where one is missing, surplus or of another shape.
    """
    state = model.state_dict(keep_vars=True)
    found = set()
    for name, tensor in pairs:
        if name.endswith(("rotary_emb.inv_freq", "position_ids")):      # older files keep what we compute
            continue
        if not tensor.is_floating_point() or tensor.is_sparse or tensor.is_quantized:
            raise UserError(f"{what}: {name} is of type {tensor.dtype}; weights must be dense floats")
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {name} holds values that are not finite")
        if name not in state or state[name].shape != tensor.shape:
            raise UserError(f"{what}: {name} is {tuple(tensor.shape)}, the model of its config has "
                            f"{tuple(state[name].shape) if name in state else 'no such tensor'}")
        found.add(name)
        yield name, tensor
    there = {state[name] for name in found}                 # a tied tensor has two names
    missing = [name for name in state if state[name] not in there]
    if missing:
        raise UserError(f"{what}: {len(missing)} tensors are missing, such as {missing[0]}")


def empty_model(cls, config):
    if max(getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0) / 100) > 1000:
        raise UserError(f"a model of {config.num_hidden_layers} layers, each {config.hidden_size} wide, is "
                        "beyond belief: its config.json is broken")
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def write_tower(folder, config, tensors, preprocessor):
    folder.mkdir()
    kind = config["model_type"]
    config = AutoConfig.for_model(**config)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
    cls = VISION_MODELS[kind][0]
    model = empty_model(cls, config)
    pairs = tensors.items() if isinstance(tensors, dict) else tensors
    weights.write_shards(folder, fitting(model, pairs, f"vision tower {kind}"))


def write_llm(folder, config, tokenizer, tensors):
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = empty_model(AutoModelForCausalLM, config)
    weights.write_shards(folder, fitting(model, tensors, "language model"))


def llm_width(name):
    return load(AutoConfig, str(name), "--llm_backbone").get_text_config().hidden_size


def bring_in(cfg):
    """--from -> a run folder, see `import_run`. Raises UserError: in a source that is not what it seems,
    everything can be wrong."""
    try:
        import_run(cfg)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--from {cfg.from_} can't be read as what its config.json says it is "
                        f"({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e


def import_run(cfg):
    """The weights lie once: the backbones' as folders, as they came, and the projector's as step 0."""
    source, out = read_source(cfg), Path(cfg.out).resolve()
    towers = ["vision" if i == 0 else f"vision-{i + 1}" for i in range(len(source.towers))]
    own_llm = not isinstance(source.llm, str)
    settings = Config(**source.settings, vision_backbone=",".join(str(out / name) for name in towers),
                      llm_backbone=str(out / "llm") if own_llm else source.llm, ckpt=str(cfg.from_),
                      train_json=str(cfg.from_), image_dir=".")             # a Config needs some data
    state = {"parts": ["projector"], "forever": True}
    state |= {"actions": source.actions} if source.actions else {}
    with weights.whole(out) as run:
        for name, tower in zip(towers, source.towers):
            write_tower(run / name, *tower)
        if own_llm:
            write_llm(run / "llm", *source.llm)
            llava.restore(run / "llm", source.told)
        language = load_language(str(run / "llm") if own_llm else source.llm, settings.prompt,
                                 settings.stage == "align", settings.picture_place)
        if source.told and not cfg.prompt and source.told["probes"] != llava.probe_ids(language):
            raise UserError(f"--from {cfg.from_} was exported by a run that read other ids; its tokenizer "
                            "was changed since")
        state["prompt"] = language.prompt[:5]
        started = {"started": f"{time.strftime('%F %T')} imported"}
        checkpoint.write_text(run / "config.json", json.dumps(asdict(settings) | started, indent=2))
        width = sum(tower[0]["hidden_size"] for tower in source.towers)
        with torch.device("meta"):
            depth = llm_width(run / "llm" if own_llm else source.llm)
            empty = make_projector(settings.projector, width, depth)
        projector = dict(fitting(nn.ModuleDict({"projector": empty}), source.projector.items(), "projector"))
        projector = {name: tensor.contiguous() for name, tensor in projector.items()}
        checkpoint.save(run, 0, projector, {"random.0": torch.get_rng_state()}, state, keep=1)
    print(f"run      {out}   (prompt {settings.prompt}, {settings.image_resize}, one picture stands "
          f"{'first' if settings.picture_place == 'first' else 'at its tag'})")
    print(f"next     python generate.py --ckpt {cfg.out} --image FILE --prompt TEXT")


# -- out -----------------------------------------------------------------------------------------------------

def send_out(ckpt, kind, out, bf16=False):
    """Writes `out`, loads it and compares, before it gets its name. Raises UserError where something can't be
    the same there, before anything is written."""
    run, form = load_run(ckpt), {"llava": llava, "openvla": openvla}[kind]

    def wrong(what):
        return UserError(f"--to {kind}: {ckpt} {what}")
    if run.cfg.augment:
        raise wrong("was trained with --augment: it must be shown the central 90 % of a picture, and no "
                    "folder can tell its user to cut it out")
    actions = run.actions or {}
    flags = [flag for flag, used in (
        ("--chunk", actions.get("chunk", 1) > 1), ("--decode parallel", actions.get("decode") == "parallel"),
        ("--state", any("state" in of for of in actions.get("statistics", {}).values()))) if used]
    if flags:
        raise wrong(f"is a policy with {', '.join(flags)}; who reads this form asks for one action, token by "
                    "token, by pictures and an instruction alone")
    if not run.language.tokenizer.is_fast:
        raise wrong("has a tokenizer that is no tokenizer.json")
    if getattr(run.model.llm.get_output_embeddings(), "bias", None) is not None:
        raise wrong("has a language model with a bias in its output layer, which this form has no place for")
    form.refuse(run, wrong)
    if bf16:
        round_weights(run.model)
    with weights.whole(out.resolve()) as folder:
        image_id = form.write(run, folder)
        text = card(run, form, out.name, "{difference}")    # now: after the check the run's weights are gone
        difference = form.compare(run, folder, image_id) + " (both in bfloat16)" * bf16
        (folder / "README.md").write_text(text.replace("{difference}", difference))
    print(f"folder   {out}   ({difference})")


def load_run(ckpt, merged=True):
    """All parts of a run, each in the precision that it has on disk. Nothing is rounded on its way out.
    merged: adapters are added to their LLM. They are in fp32, so it is, too."""
    cfg, step = read_config(ckpt), checkpoint.find(ckpt)
    saved, state = weights.Tensors(step), checkpoint.read_state(step)
    dtype = {part: saved[next(name for name in saved if name.startswith(f"{part}."))].dtype
             for part in state["parts"]}
    vision = load_vision(cfg.vision_backbone, dtype.get("vision", "auto"), cfg.openvla_vision)
    llm = load_llm(cfg.llm_backbone, dtype.get("llm", "auto"))
    torch.manual_seed(cfg.seed)                             # a run that did not train it has that of its seed
    projector = make_projector(cfg.projector, vision.width, llm.get_input_embeddings().embedding_dim)
    model = VLM(vision, projector.to(dtype.get("projector")), llm).eval().requires_grad_(False)
    checkpoint.load_weights(model, step)
    language = load_language(cfg.llm_backbone, cfg.prompt, cfg.stage == "align", cfg.picture_place)
    if not language.captions:
        chat.check_same(state, language, ckpt, cfg.llm_backbone)
    transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize, cfg.openvla_vision)
    run = SimpleNamespace(ckpt=ckpt, cfg=cfg, step=step, model=model, language=language,
                          transforms=transforms, actions=state.get("actions"))
    if merged and model.adapters:
        merge(run)
    return run


@torch.no_grad()
def merge(run):
    """LoRA: what `lora.adapted` and `lora.with_rows` compute becomes a part of the LLM's own tensors, and the
    adapters go. Prints how far that is from them in logits: sums of fp32, rounded in another order."""
    adapters, examples = run.model.adapters, llava.made_up(run)
    before = [llava.seen_by(run, *example)[2] for example in examples]
    for layer in adapters.layers:
        product = layer.lora_B.weight @ layer.lora_A.weight * (adapters.alpha / adapters.rank)
        layer.weight += product.T if isinstance(layer, Conv1D) else product
        del layer.lora_A, layer.lora_B, layer.lora_dropout, layer.forward
    for table in adapters.tables if adapters.rows else ():
        table.weight[slice(*adapters.rows)] = table.token_adapter["trainable_tokens_delta"]
        del table.token_adapter, table.forward
    run.model.adapters = None
    after = [llava.seen_by(run, *example)[2] for example in examples]
    difference = max((a - b).abs().max().item() for a, b in zip(after, before))
    print(f"merged   adapters of rank {adapters.rank} in fp32: logits of {len(examples)} made-up examples "
          f"differ by {difference:.1g} of {max(b.abs().max().item() for b in before):.3g}")


def write_merged(ckpt, out, bf16):
    """--merge -> a run folder with the LLM as a whole. It stands beside nothing any more."""
    run = load_run(with_adapters(ckpt, "--merge"))
    if bf16:
        round_weights(run.model)
    state = checkpoint.read_state(run.step)
    kept = {name: state[name] for name in ("parts", "prompt", "actions") if name in state}
    settings = asdict(run.cfg) | {"lora_rank": 0, "started": f"{time.strftime('%F %T')} merged"}
    with weights.whole(out.resolve()) as folder:
        checkpoint.write_text(folder / "config.json", json.dumps(settings, indent=2))
        checkpoint.save(folder, state["step"], checkpoint.tensors_of(run.model, state["parts"]),
                        {"random.0": torch.get_rng_state()}, kept | {"forever": True}, keep=1)
    print(f"run      {out}")


def write_adapters(ckpt, out):
    """--to peft -> a folder for PeftModel.from_pretrained(language model, folder). peft's names are ours
    behind a prefix. The projector, and vision if it trained, have no place there."""
    run = load_run(with_adapters(ckpt, "--to peft"), merged=False)
    adapters, rows = run.model.adapters, "token_adapter.trainable_tokens_delta"
    tensors = {f"base_model.model.{name.removeprefix('llm.')}": tensor
               for name, tensor in checkpoint.tensors_of(run.model, {"llm"}).items()}
    layers = {name.split(".")[-3] for name in tensors if name.endswith("lora_A.weight")}
    tables = [name.split(".")[-3] for name in tensors if name.endswith(rows)]
    with weights.whole(out.resolve()) as folder:
        weights.write_shards(folder, tensors.items())
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        weights.write_json(folder / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM",
            # A trained LLM has no folder of its own; beside the untrained one they would be another model.
            "base_model_name_or_path": None if adapters.base else run.cfg.llm_backbone,
            "r": adapters.rank, "lora_alpha": adapters.alpha, "lora_dropout": run.cfg.lora_dropout,
            "target_modules": sorted(layers), "bias": "none", "inference_mode": True,
            "fan_in_fan_out": isinstance(adapters.layers[0], Conv1D),
            "trainable_token_indices": {name: list(range(*adapters.rows)) for name in tables} or None})
    beside = adapters.base["folder"] if adapters.base else run.cfg.llm_backbone
    print(f"folder   {out}   (adapters alone; their language model is that of {beside})")


def with_adapters(ckpt, flag):
    if not checkpoint.read_state(checkpoint.find(ckpt)).get("lora"):
        raise UserError(f"{flag}: {ckpt} holds no adapters, it was trained without --lora_rank")
    return ckpt


def round_weights(model):
    """To bfloat16. Not model.to(): it would round the angles of rotary positions, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def card(run, form, name, difference):
    """README.md: what it is, how it was trained, and the lines that use it."""
    cfg = run.cfg
    size = sum(p.numel() * p.element_size() for p in run.model.parameters())
    towers, llm, data = map(weights.base_name, (cfg.vision_backbone, cfg.llm_backbone, cfg.train_json))
    steps = checkpoint.read_state(run.step)["step"]
    adapted = f", LoRA of rank {cfg.lora_rank}, merged" if cfg.lora_rank else ""
    trained = (f"Stage `{cfg.stage}` on {data}, {steps} steps, global batch {cfg.global_batch_size}, "
               f"learning rate {cfg.learning_rate:g}{adapted}." if steps
               else f"Imported from {data}, not trained further.")
    return f"""---
library_name: {form.LIBRARY}
pipeline_tag: {form.TASK}
---
# {name}

- Vision: {towers}. Projector: {cfg.projector}. Language model: {llm}.
- {size / 1e9:.2g} GB in {weights.dtype_of(run.model)}. Pictures: {cfg.image_resize}.
- {trained}

Checked when it was written: {difference}.

{form.USE.format(folder=name, **form.about(run))}"""


def interrupt(*_):
    raise KeyboardInterrupt             # so that an unfinished folder is removed


def main(cfg):
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, interrupt)
    if cfg.from_:
        bring_in(cfg)
    elif cfg.merge:
        write_merged(cfg.ckpt, Path(cfg.out), cfg.bf16)
    elif cfg.to == "peft":
        write_adapters(cfg.ckpt, Path(cfg.out))
    else:
        send_out(cfg.ckpt, cfg.to, Path(cfg.out), cfg.bf16)


if __name__ == "__main__":
    ranks.run(main, cfg)
