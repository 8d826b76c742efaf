"""Every knob of a run, once.

One dataclass field is one flag, one line of --help and one entry of config.json. A value comes from, weakest
first: the field's default, the preset, the preset's stage, the file of --config, the checkpoint of --ckpt
(what describes the model), the command line (presets.py). No torch here, so `--help` is instant.
"""
import argparse
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

# Two defaults that are read when torch is imported. Every command imports this file before; a value of the
# user's own wins. The first: at the end of each parallel loop, OpenMP's threads wait for the last one by
# spinning. Where another program uses the cores too, the last one often has no core, and the others burn
# theirs. A short spin costs little on free cores and saves most of the speed on busy ones (docs/speed.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Without this, DDP warns in each run that the first batch used all weights. That is no mistake here.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# A terminal that can't show a character is no reason to fail, and Ctrl-C while torch is imported no error.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")
sys.excepthook = lambda kind, *rest: (os._exit(130) if kind is KeyboardInterrupt
                                      else sys.__excepthook__(kind, *rest))


class UserError(ValueError):
    """Something the user can mend. Shown as one sentence, without a traceback."""

    def __str__(self):
        return printable(super().__str__())


class BadExample(UserError):
    """An example that can't be trained on: which file, which example, what is wrong, what to do."""


def printable(text, most=1500):
    """Text that may go to a terminal, on one line. Names and texts from data files can hold anything: control
    characters would move the cursor or forge a line, and a million of others would hide the sentence."""
    if len(text) > most:
        text = f"{text[:most - 300]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def last_words(text):
    """Shows why the process ends: on the screen, and in the file whose text torchrun prints as its last."""
    print(f"\n{text}", file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))


def knob(default, meaning, unit=""):
    """One field of a config. `field` is how a dataclass lets a default carry more: here, its line of --help.

    So a knob is written down once. Where flags, defaults and the saved config are three lists, sooner or
    later one of them is forgotten.
    """
    return field(default=default, metadata={"help": f"{meaning} [{unit}]" if unit else meaning})


TRAINS = {"align": "projector", "finetune": "projector,llm", "full-finetune": "vision,projector,llm",
          "vla": "vision,projector,llm"}


# `@dataclass` writes the constructor from the annotated fields, and then calls __post_init__, which checks
# the values. `frozen`: nobody can change one of them behind the loop's back.
# `Literal` lists the words that a knob may have; the command line takes its choices from it. Others write an
# Enum and a registry for that, which are two more places to look at before one knows what can be typed.
@dataclass(frozen=True)
class Config:
    stage: Literal["align", "finetune", "full-finetune", "vla"] = knob(
        "align", "what trains, on what: the projector on captions; projector and LLM, or everything, on "
        "conversations; everything on robot episodes")
    ckpt: str = knob("", "run folder or step folder whose weights this run starts from")
    trains: str = knob("", "parts that train, joined by commas: vision, projector, llm, llm.last "
                       "(embeddings, last layer, output); empty = the stage's")
    lora_rank: int = knob(0, "LoRA: llm in --trains means matrices of this rank beside frozen ones; 0 = none")
    lora_alpha: int = knob(16, "LoRA: what the matrices add is multiplied by alpha / rank")
    lora_dropout: float = knob(0.0, "LoRA: dropout of what goes into the matrices, in training")
    no_align: bool = knob(False, "start from a fresh projector, without an align stage before")
    preset: str = knob("toy", "named set of values for all other flags")
    config: str = knob("", "config.json, such as a run's own: its values are the defaults of all flags")
    vision_backbone: str = knob(
        "toy/vit", "folder or hub id of a CLIP, SigLIP (1, 2) or DINO (v2, v3) model; two joined by a comma")
    llm_backbone: str = knob("toy/llm", "folder or hub id of a causal language model")
    projector: Literal["linear", "gelu-mlp", "fused-gelu-mlp"] = knob(
        "gelu-mlp", "what turns patches into words")
    image_resize: Literal["resize-naive", "resize-crop", "letterbox"] = knob(
        "resize-naive", "how a picture becomes square: squash it, cut its sides, or pad it")
    prompt: Literal["auto", "plain", "openvla", "openvla-v01", "vicuna", "llava", "llama2", "mistral", "phi",
                    "chatml", "prismatic-llama2", "prismatic-phi"] = knob(
        "auto", "how questions and answers are written; auto learns it from the tokenizer's chat template")
    picture_place: Literal["first", "tag"] = knob(
        "first", "where the only picture of an example stands: in front, or at its tag, as in LLaVA")
    openvla_vision: bool = knob(
        False, "vision as OpenVLA computes it: SigLIP with the exact GELU, mean and std rounded to bfloat16")
    max_length: int = knob(2048, "longer examples are cut at the end", "positions, patches included")
    train_json: str = knob(
        "", "training examples: LLaVA JSON, JSON lines, or episodes; several files joined by commas")
    mixture: str = knob("", "how often each file of train_json comes in an epoch, such as 3,1; empty = once")
    image_dir: str = knob("", "where the pictures' paths start: a folder, an uncompressed .zip or .tar; vla: "
                          "or one for each file of train_json, a,b")
    val_json: str = knob("", "held-out examples, scored when the run ends; empty = no score")
    val_every: int = knob(
        0, "loss and accuracy on val_json every so many steps, and at the end; 0 = never", "steps")
    val_examples: int = knob(0, "so many of val_json, spread over the file, for val_every; 0 = all")
    prepare: str = knob("", "Python script that makes the preset's data; run once if train_json is missing")
    run_id: str = knob("", "name of the run folder; empty = <preset>-<stage>-x<seed>")
    run_root: str = knob("runs", "folder of all run folders")
    global_batch_size: int = knob(128, "examples per optimizer step, over all GPUs", "examples")
    per_device_batch_size: int = knob(
        16, "examples per forward on one GPU; halve it when memory runs out", "examples")
    epochs: int = knob(1, "times every example is seen")
    max_steps: int = knob(0, "optimizer steps, whatever the epochs; 0 = by epochs")
    learning_rate: float = knob(2e-5, "peak learning rate, reached when the warm-up ends")
    schedule: Literal["cosine", "constant"] = knob(
        "cosine", "after the warm-up: half a cosine down to zero, or constant")
    weight_decay: float = knob(0.0, "AdamW weight decay, not on norms and biases")
    warmup_ratio: float = knob(0.03, "linear warm-up", "fraction of all steps")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm")
    length_window: int = knob(
        64, "examples of like length share a batch: they are sorted by length over this many; "
        "0 = each batch is a random choice", "global batches")
    seed: int = knob(7, "of the projector's start, and of the order of the data")
    save_every: int = knob(500, "a checkpoint every so many steps, and at the end", "steps")
    keep: int = knob(2, "newest checkpoints to keep")
    keep_epochs: bool = knob(False, "also save at the end of each epoch, and never remove these checkpoints")
    overwrite: bool = knob(False, "delete a run folder of the same name and start over")
    skip_bad_examples: bool = knob(
        False, "replace an example that can't be read by the next good one, and count it; else the run stops")
    num_workers: int = knob(4, "processes that read data, per GPU; 0 = none")
    chunk: int = knob(1, "vla: actions of an answer, this step's and those of the steps behind it", "steps")
    decode: Literal["tokens", "parallel"] = knob("tokens", "vla: action tokens one by one, or all at once")
    state: bool = knob(False, "vla: the robot's state stands in the question; unknown in a fifth of training")
    keep_dimensions: str = knob("", "vla: dimensions of actions that stay as they are, in -1..1, such as 6")
    augment: bool = knob(
        False, "vla: random crops of 90 % and random colors; a policy then sees the central 90 %")
    gradient_checkpointing: bool = knob(
        False, "recompute the LLM's activations in backward, do not keep them: less memory, 30 % slower")
    shard: Literal["no", "all", "machine"] = knob(
        "no", "cut weights, gradients and optimizer among all GPUs, or those of each machine (FSDP2): less "
        "memory, more traffic; no: each GPU holds all of it (DDP)")
    compile: bool = knob(False, "torch.compile all blocks: fewer kernels, a slow first step; a CPU needs g++")
    tracker: Literal["", "tensorboard", "wandb"] = knob(
        "", "where else the metrics go, besides metrics.jsonl: a package that you have installed")
    profile: int = knob(0, "time the parts of so many steps: a table, and trace.json in the run", "steps")
    forecast: bool = knob(True, "on a GPU: count first what a step takes, and refuse what can't fit")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto", "of matrix products; auto = bf16 where the GPU has it, fp16 on V100 and T4, else fp32")

    def __post_init__(self):
        check_types(self)
        if self.stage in ("finetune", "full-finetune") and not self.ckpt and not self.no_align:
            raise UserError(f"--stage {self.stage} starts from an aligned projector, or a trained VLM: "
                            "give --ckpt runs/<run>, or --no_align for a fresh projector")
        if self.stage == "vla" and not self.ckpt:
            raise UserError(f"--stage {self.stage} starts from a trained VLM: give --ckpt runs/<run>")
        if not self.trained or not set(self.trained) <= {"vision", "projector", "llm", "llm.last"}:
            raise UserError(f"--trains {self.trains}: choose from vision, projector, llm, llm.last (a,b,...)")
        if self.lora_rank and {"llm", "llm.last"} & set(self.trained) != {"llm"}:
            raise UserError(f"--trains {','.join(self.trained)}: --lora_rank needs llm there, not llm.last")
        times = self.mixture.split(",") if self.mixture else []
        if times and (len(times) != len(self.train_json.split(","))
                      or not all(re.fullmatch("[1-9][0-9]{0,3}", t) for t in times)):
            raise UserError(f"--mixture {self.mixture}: give one whole number from 1 to 9999 "
                            "for each file of --train_json")
        if not all(re.fullmatch("[0-9]{1,4}", d) for d in self.kept_dimensions):
            raise UserError(f"--keep_dimensions {self.keep_dimensions}: give numbers joined by commas, "
                            "counted from 0")
        if self.ckpt and self.no_align:
            raise UserError("--ckpt and --no_align exclude each other: "
                            "start from a checkpoint, or from a fresh projector")
        for name in ("train_json", "image_dir", "run_root"):
            if not all(getattr(self, name).split(",")):
                raise UserError(f"--{name} is missing: preset {self.preset!r} brings no data of its own")
        if self.val_every and not self.val_json:
            raise UserError("--val_every needs held-out examples: give --val_json FILE")
        check_limits(self, LIMITS)
        if self.run_id and not re.fullmatch(r"(?!step-|unfinished-|set-aside-)\w[\w.+-]{0,99}", self.run_id):
            raise UserError(f"--run_id {self.run_id}: give a name for a folder, of letters, digits and "
                            "_ . + -; not step-..., as the folders inside of a run are called")

    @property
    def trained(self):
        return tuple(name.strip() for name in (self.trains or TRAINS[self.stage]).split(","))

    @property
    def kept_dimensions(self):
        return [d.strip() for d in self.keep_dimensions.split(",") if d.strip()]

    @property
    def run_folder(self):
        return Path(self.run_root) / (self.run_id or f"{self.preset}-{self.stage}-x{self.seed}")


# knob -> its smallest and its largest value. The largest are far beyond use: they catch slips of the hand.
LIMITS = {"global_batch_size": (1, 10 ** 6), "per_device_batch_size": (1, 10 ** 6), "epochs": (1, 10 ** 6),
          "save_every": (1, 10 ** 9), "keep": (1, 10 ** 6), "max_length": (1, 10 ** 7),
          "max_steps": (0, 10 ** 9), "num_workers": (0, 1000), "length_window": (0, 10 ** 6),
          "val_every": (0, 10 ** 9), "val_examples": (0, 10 ** 9),
          "seed": (0, 2 ** 32 - 1), "profile": (0, 1000), "learning_rate": (0, 1e30),
          "weight_decay": (0, 1e3), "warmup_ratio": (0, 1), "max_grad_norm": (1e-30, 1e30),
          "lora_rank": (0, 10 ** 4), "lora_alpha": (1, 10 ** 6), "lora_dropout": (0, 0.99), "chunk": (1, 999)}


def check_types(cfg):
    """argparse has done this for flags; a config.json can hold anything."""
    for name, kind in get_type_hints(type(cfg)).items():
        if not fits(getattr(cfg, name), kind):
            raise UserError(f"--{name} can't be {getattr(cfg, name)!r}")


def fits(value, kind):
    """Whether a knob of this kind can have the value. A whole number is a number, but True is no 1."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind or (kind, type(value)) == (float, int)


def check_limits(cfg, limits):
    for name, (least, most) in limits.items():
        if not least <= getattr(cfg, name) <= most:         # this way round, nan is refused, too
            raise UserError(f"--{name} is {getattr(cfg, name)}, but must lie between {least} and {most}")


# What belongs to the model, not to a run: a run that starts from --ckpt takes these over.
# The first six are as old as this program; without them a config.json is not one of its own.
MODEL_FIELDS = ("preset", "vision_backbone", "llm_backbone", "projector", "image_resize", "prompt",
                "picture_place", "openvla_vision")


def run_config_file(ckpt):
    """config.json of a run folder, or of the run that a step folder lies in."""
    folder = Path(ckpt)
    file = next((path / "config.json" for path in (folder, folder.parent)
                 if os.path.isfile(path / "config.json")), None)
    if file is None:
        raise UserError(f"--ckpt {ckpt}: neither a run folder nor a step folder, there is no config.json. "
                        "Give a folder that train.py wrote, such as runs/toy-align-x7")
    return file


def read_config(ckpt):
    """The Config that a run was trained with. A flag that is younger than the run gets its default."""
    file = run_config_file(ckpt)
    try:
        saved = json.loads(file.read_text())
        saved = {f.name: saved[f.name] for f in fields(Config)
                 if f.name in saved or f.name in MODEL_FIELDS[:6]}
        return Config(**saved)
    except UserError as e:
        raise UserError(f"{file} holds what no run can have: {e}") from e
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file} can't be read ({type(e).__name__}: {e}). "
                        "Give a folder that train.py wrote") from e


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        # Not public. Python before 3.14 takes -3.2e-05, a number of a robot's state, for an unknown flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message):
        """A wrong flag: one sentence. All ranks have it; rank zero ends first, so it is shown once."""
        time.sleep(min(int(os.environ.get("RANK", 0)), 1) * 2)
        last_words(f"{self.prog}: error: {printable(message)} (--help lists all flags)")
        raise SystemExit(2)


def make_parser(cls, description=None, positional=()):
    """One flag for each field. `positional`: fields that are given without their names, in this order."""
    parser = Parser(allow_abbrev=False, description=description,
                    usage=" ".join(("%(prog)s", *map(str.upper, positional), "[flags]")))
    kinds = get_type_hints(cls)
    for f in fields(cls):
        kind, shown = kinds[f.name], "" if f.default == "" else " (default: %(default)s)"
        options = dict(default=f.default, help=f.metadata["help"].replace("%", "%%") + shown)
        if kind is bool:                        # --compile and --no-compile; type=bool reads "False" as True
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:                     # may be given several times, each with several values
            options.update(action="extend", nargs="+", metavar="str", default=list(f.default))
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options.update(type=kind, metavar=kind.__name__)
        if f.name in positional:
            parser.add_argument(f.name, nargs="?", **options | {"metavar": f.name.upper()})
        else:
            parser.add_argument(f"--{f.name.rstrip('_')}", dest=f.name, **options)      # `from` is Python's
    return parser


def parse(cls, argv=None, description=None, positional=()):
    """Command line -> `cls`. Bad flags end the program with one line, as argparse does."""
    parser = make_parser(cls, description, positional)
    try:
        if cls is Config:
            from presets import defaults
            parser.set_defaults(**defaults(argv))
        return cls(**vars(parser.parse_args(argv)))
    except UserError as e:
        parser.error(str(e))
