"""The first thing to run on a new GPU: what a CPU can't show, in one table, in less than eight minutes.

    pip install -r requirements-bench.txt
    python tests/gpu.py                                     # one GPU of 80 GB
    python tests/gpu.py --sizes 1M                          # all of it on small models; also without a GPU

laws    short runs of train.py on the toy, which must agree with each other: several at once, for speed
use     the other commands, asked for the run that the laws have made
speed   shapes of real models, beside transformers.Trainer (bench_train.py), and plan.py's forecast

A line is: what was tried, what was found, what it should be. A law that is broken is an error. A speed is
held to its target on an H100 alone, and a slower one is no error: a card may be shared, or throttled.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import config  # noqa: E402  (before torch: it sets what torch reads when it is imported)

import torch  # noqa: E402

import bench_train  # noqa: E402

GPU = torch.cuda.is_available()
SAME = ("step", "loss", "grad_norm", "lr", "tokens")
# What is timed. size, stage -> Trainer's order beside it; what else is tried. With a small model the GPU
# waits for the CPU, which queues its work; so larger micro-batches help, and --compile.
TIMED = {("0.5B", "align"): ("trainer", {"micro_batch": 64, "compile": True}),
         ("0.5B", "finetune"): ("grouped", {"compile": True}),
         ("1.5B", "finetune"): ("grouped", {"compile": True}),
         ("1M", "align"): ("trainer", {"micro_batch": 8}),
         ("1M", "finetune"): ("grouped", {"compile": True})}
# size, stage -> real tokens a second, MFU: what one H100 should reach, either way
TARGETS = {("0.5B", "align"): (100e3, 0), ("0.5B", "finetune"): (86e3, 0), ("1.5B", "finetune"): (0, 0.5)}
broken = []


def say(what, found, wanted="", good=None):
    """A line of the table. good: whether it is as it must be; None: nobody can say."""
    verdict = {True: "ok", False: "NOT SO", None: ""}[good]
    print(f"{what:<47} {found:<40} {wanted:<22} {verdict}".rstrip(), flush=True)
    if good is False:
        broken.append(what)


# -- runs of train.py ----------------------------------------------------------------------------------------

def environment(gpu=True):
    return os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"} | (
        {} if gpu else {"CUDA_VISIBLE_DEVICES": ""})


class Toy:
    """Runs of train.py on the toy, in one folder, all of the same number of steps."""

    def __init__(self, root, steps):
        self.root, self.steps = root, steps

    def command(self, run_id, *flags, stage="align"):
        return [sys.executable, "train.py", "--stage", stage, "--val_json", "", "--run_root", str(self.root),
                "--run_id", run_id, "--save_every", str(self.steps // 4), "--max_steps", str(self.steps),
                "--no-forecast", *flags]

    def train(self, run_id, *flags, stage="align", gpu=True):
        """-> the lines of its metrics.jsonl; an empty list if it failed, and then the table says why."""
        done = subprocess.run(self.command(run_id, *flags, stage=stage), cwd=ROOT, capture_output=True,
                              text=True, env=environment(gpu))
        if done.returncode:
            say(f"train.py {stage} {' '.join(flags)}"[:46], (done.stderr.strip() or "no word")[-1500:],
                "exit code 0", False)
            return []
        return self.metrics(run_id)

    def metrics(self, run_id):
        file = self.root / run_id / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def killed(self, run_id, *flags, stage="align"):
        """SIGKILL after two thirds of the steps, then the same command again -> its metrics."""
        process = subprocess.Popen(self.command(run_id, *flags, stage=stage), cwd=ROOT, env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(self.metrics(run_id)) < self.steps * 2 // 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return self.train(run_id, *flags, stage=stage)


def at_once(runs):
    """{name: a function} -> {name: its result}. They share the GPU: nothing here is timed."""
    with ThreadPoolExecutor(9 if GPU else 2) as pool:
        waiting = {name: pool.submit(run) for name, run in runs.items()}
        return {name: each.result() for name, each in waiting.items()}


def compare(what, got, want, most, steps=None):
    """The losses of two runs, at all steps or the first few: their largest relative difference."""
    if not got or not want:
        return
    differ = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(got[:steps], want[:steps]))
    say(what, f"{differ:.2e} of the loss", f"<= {most:g}", differ <= most and len(got) == len(want))


def same(what, got, want):
    if got and want:
        bits = [[line[key] for key in SAME] for line in got] == [[line[key] for key in SAME] for line in want]
        say(what, "the same bits" if bits else "other bits", "the same bits", bits)


# -- laws ----------------------------------------------------------------------------------------------------

def laws(toy):
    """Bounds: fp32 adds up in another order on each device; bf16 rounds to 8 bits; fp16 to 11."""
    bf16, fp32 = ("--precision", "bf16"), ("--precision", "fp32")
    found = at_once({
        "bf16": lambda: toy.train("bf16", *bf16), "again": lambda: toy.train("again", *bf16),
        "killed": lambda: toy.killed("killed", *bf16), "fp32": lambda: toy.train("fp32", *fp32),
        "cpu": lambda: toy.train("cpu", *fp32, gpu=False),
        "fp16": lambda: toy.train("fp16", "--precision", "fp16"),
        "fp16 killed": lambda: toy.killed("fp16-killed", "--precision", "fp16")})
    losses = [round(line["loss"], 3) for line in found["bf16"]]
    say("align, the loss of the first and last steps", f"{losses[:2]} ... {losses[-2:]}", "falls",
        bool(losses) and losses[-1] < losses[0])
    compare("fp32: this device beside a CPU", found["fp32"], found["cpu"], 1e-3)
    compare("bf16 beside fp32", found["bf16"], found["fp32"], 2e-2)
    # GradScaler begins with a scale that is too large; each update that it skips leaves the run one behind.
    compare("fp16 beside fp32, the first step", found["fp16"][:1], found["fp32"][:1], 2e-3)
    if found["fp16"]:
        skipped, end = sum(line["skipped"] for line in found["fp16"]), found["fp16"][-1]["loss"]
        say("fp16: updates that were skipped, the last loss", f"{skipped}, {end:.3f}", "falls",
            end < found["fp16"][0]["loss"])
    same("the same run twice", found["again"], found["bf16"])
    same("killed and continued", found["killed"], found["bf16"])
    same("fp16: killed and continued", found["fp16 killed"], found["fp16"])

    start = ("--ckpt", str(toy.root / "bf16"))
    how = {"plain": bf16, "recomputed": (*bf16, "--gradient_checkpointing"), "compiled": (*bf16, "--compile"),
           "sharded": (*bf16, "--shard", "all"), "lora": (*bf16, "--lora_rank", "8", "--lora_dropout", "0.1"),
           "plain-fp32": fp32, "compiled-fp32": (*fp32, "--compile")}
    how["validated"] = (*how["lora"], "--val_json", "data/toy/val.json", "--val_every", "5", "--val_examples",
                        "60")
    found = at_once({name: lambda name=name, flags=flags: toy.train(name, *start, *flags, stage="finetune")
                     for name, flags in how.items()} | {
        f"{name} killed": lambda name=name: toy.killed(f"{name}-killed", *start, *how[name], stage="finetune")
        for name in ("sharded", "lora")})
    plain = found["plain"]
    say("finetune: modalities", ", ".join(sorted({line["modality"] for line in plain})))
    compare("--gradient_checkpointing", found["recomputed"], plain, 1e-3)
    # In bf16 rounding alone makes another curve (docs/speed.md); the line in fp32 tells a mistake from that.
    compare("--compile", found["compiled"], plain, 2e-2)
    compare("--compile, fp32", found["compiled-fp32"], found["plain-fp32"], 1e-3)
    compare("--shard all, one rank", found["sharded"], plain, 1e-2)
    same("--shard all: killed and continued", found["sharded killed"], found["sharded"])
    compare("--lora_rank 8: the first step is the base's", found["lora"][:1], plain[:1], 1e-3)
    same("--lora_rank 8, dropout: killed and continued", found["lora killed"], found["lora"])
    same("--lora_rank 8, dropout: with --val_every 5", found["validated"], found["lora"])


def use(toy):
    """What follows a run: each command ends well."""
    run, picture = str(toy.root / "plain"), "data/toy/images/test_00001.png"
    ask = ("--image", picture, "--prompt", "How many shapes are there?")
    here = (sys.executable,)
    policy = ("--ckpt", str(toy.root / "policy"))
    toy.train("policy", "--ckpt", run, "--precision", "bf16", stage="vla")
    commands = {
        "generate.py": (*here, "generate.py", "--ckpt", run, *ask),
        "generate.py, with adapters": (*here, "generate.py", "--ckpt", str(toy.root / "lora"), *ask),
        "evaluate.py": (*here, "evaluate.py", "--ckpt", run, "--json", "data/toy/test.json", "--image_dir",
                        "data/toy/images", "--max_examples", "64", "--out", str(toy.root / "score.json")),
        "convert.py --to llava": (*here, "convert.py", "--ckpt", run, "--to", "llava", "--out",
                                  str(toy.root / "llava")),
        "toy/robot.py --rollouts": (*here, "toy/robot.py", *policy, "--rollouts", "2"),
        "torchrun train.py": ("torchrun", *toy.command("torchrun", "--precision", "bf16")[1:])}
    ran = at_once({name: lambda command=command: subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment())
        for name, command in commands.items()})
    for name, done in ran.items():
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
        last = lines[-1] if done.returncode == 0 else " | ".join(lines[-4:])
        say(name, f"exit code {done.returncode}: {last[:200 if done.returncode else 26]}", "exit code 0",
            done.returncode == 0)


# -- speed ---------------------------------------------------------------------------------------------------

@contextmanager
def waits():
    """-> a list; afterwards it holds torch's warnings that the CPU waited for the GPU."""
    found = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield found
        torch.cuda.set_sync_debug_mode("default")
    found += [str(each.message) for each in warned if "synchronizing" in str(each.message)]


def watch(folder):
    """A child: a run of train.py that counts the waits in each step, and in the look at what it gave."""
    import train
    found = {"train_step": [], "look": []}

    def watched(name, inner):
        def call(*values):
            with waits() if GPU else nullcontext([]) as waited:
                result = inner(*values)
            found[name].append(len(waited))
            return result
        return call
    for name in found:
        setattr(train, name, watched(name, getattr(train, name)))
    flags = Toy(folder, 8).command("watched", "--no_align", "--per_device_batch_size", "16", stage="finetune")
    train.main(config.parse(config.Config, flags[2:]))
    print("RESULT " + json.dumps(found), flush=True)


def host_reads(folder):
    """Of steps of two micro-batches. Not of the first ones, which make moments and load kernels. (Without a
    GPU tests/test_model.py looks for operations that would wait.)"""
    done = subprocess.run([sys.executable, __file__, "--watch", str(folder)], cwd=ROOT, capture_output=True,
                          text=True, env=environment())
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return say("host reads", done.stderr.strip()[-1500:], "a count", False)
    step, look = (sorted(set(found[0][name][2:])) for name in ("train_step", "look"))
    if GPU:
        say("host reads in a step, until it is queued", str(step), "0", step == [0])
        say("host reads of its results, two micro-batches", str(look), "<= 3", max(look) <= 3)


def bench(size, stage, args):
    """Ours, Trainer beside it, ours once more in another way, and what plan.py says of the first."""
    peer, otherwise = TIMED[size, stage]
    name, (speed, mfu) = f"{size} {stage}", TARGETS.get((size, stage) if "H100" in card() else "", (0, 0))

    def run(child, **more):
        more = argparse.Namespace(**vars(args) | more)
        return bench_train.result(more, child, stage, size, args.folder)
    with ThreadPoolExecutor(1) as pool:
        ours = run("ours")
        planned = pool.submit(forecast, args, size, stage)                  # on the CPU, beside Trainer
        theirs, other = run(peer), run("ours", **otherwise) if otherwise else None
    if ours is None:
        return say(name, "out of memory", "a result", False)
    rate = ours["tokens/s"]
    say(f"{name}: tokens a second",
        f"{rate:,.0f}" + beside(peer, theirs, lambda of: f"{of['tokens/s']:,.0f}"))
    if theirs:
        say(f"{name}: faster than {peer}", f"{rate / theirs['tokens/s']:.2f} x")
    best = max([ours, other or ours], key=lambda run: run["tokens/s"])
    if other:
        how = " ".join(f"--{flag} {value}".removesuffix(" True") for flag, value in otherwise.items())
        say(f"{name}: with {how}", f"{other['tokens/s']:,.0f}")
    if speed:
        reach(f"{name}: the faster of both", f"{best['tokens/s']:,.0f}", f"{speed:,.0f}",
              best["tokens/s"] >= speed)
    if best["mfu"]:
        reach(f"{name}: MFU", f"{best['mfu']:.1%}", f"{mfu:.0%}" if mfu else "", best["mfu"] >= mfu)
    for what in ("padding", "data wait"):
        say(f"{name}: {what}", f"{ours[what]:.1%}" + beside(peer, theirs, lambda of: f"{of[what]:.1%}"))
    peak, planned = gigabytes(ours), planned.result()
    found = f"{peak:.2f} GB" + beside(peer, theirs, lambda of: f"{gigabytes(of):.2f}")
    if planned is None or not GPU:                          # a CPU tells what the whole process had
        return say(f"{name}: peak memory", found, f"planned {planned}")
    say(f"{name}: peak memory", found, f"{planned:.2f} planned, 5 %", abs(planned / peak - 1) <= 0.05)


def beside(peer, result, show):
    return f" ({peer}: {show(result) if result else 'out of memory'})"


def gigabytes(result):
    return result["memory"] * 2 ** 30 / 1e9


def reach(what, found, target, reached):
    """A line of a speed, which breaks no law."""
    verdict = ("ok" if reached else "below") if target else ""
    print(f"{what:<47} {found:<40} {'>= ' + target if target else '':<22} {verdict}".rstrip(), flush=True)


def forecast(args, size, stage):
    """What plan.py says of our run: the peak [GB]; None if it can't."""
    cfg = bench_train.our_config(argparse.Namespace(**vars(args) | {"size": size, "stage": stage}))
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
             for name, value in asdict(cfg).items()]
    done = subprocess.run([sys.executable, "plan.py", *flags, "--gpus=1", "--memory=80", "--one_line"],
                          cwd=ROOT, capture_output=True, text=True, env=environment(gpu=False))
    said = re.search(r"([\d.]+) (GB|MB) at the peak", done.stdout)
    if not said:
        say("plan.py", (done.stderr or done.stdout).strip()[-1500:], "a forecast", False)
        return None
    return float(said[1]) / (1 if said[2] == "GB" else 1000)


def card():
    return torch.cuda.get_device_name() if GPU else "no GPU, a CPU"


def main(args):
    print(f"{card()}, torch {torch.__version__}\n", flush=True)
    parts = args.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        toy = Toy(Path(folder) / "toy", args.steps)
        for script, file in (("world", "toy/align.json"), ("robot", "toy_robot/train.json")):
            if not (ROOT / "data" / file).exists():         # else several runs would draw it at once
                subprocess.run([sys.executable, f"toy/{script}.py"], cwd=ROOT, check=True,
                               capture_output=True)
        if "laws" in parts:
            laws(toy)
        if "use" in parts:
            use(toy)
        if "speed" in parts:
            host_reads(Path(folder) / "watched")
            for size in args.sizes.split(","):
                args.folder = Path(folder) / size
                args.folder.mkdir()
                with torch.device("cuda" if GPU else "cpu"):                # random weights are made faster
                    bench_train.make_world(args.folder, size)
                for stage in (stage for of, stage in TIMED if of == size):
                    bench(size, stage, args)
    print(f"\nNOT SO: {len(broken)}: {'; '.join(broken)}" if broken else "\nall laws hold", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.5B,1.5B" if GPU else "1M", help="0.5B, 1.5B, 1M")
    parser.add_argument("--parts", default="laws,use,speed")
    parser.add_argument("--steps", type=int, default=40 if GPU else 8, help="of a run on the toy")
    parser.add_argument("--epochs", type=int, default=2 if GPU else 1,
                        help="of a timed run: the last one counts")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)          # one run, here
    args = parser.parse_args(namespace=argparse.Namespace(micro_batch=0, compile=False))
    if args.watch:
        import ranks
        ranks.run(watch, args.watch)
    sys.exit(main(args))
