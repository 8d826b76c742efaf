"""Train a vision-language model. Read it top to bottom: `main` first sets everything up, then runs the loop.

    torchrun train.py --stage align
    torchrun train.py --stage finetune --ckpt runs/toy-align-x7
    torchrun --nproc_per_node 8 train.py ...       # the same batches, the same gradients, on 8 GPUs
    python train.py ...                            # a world of one

The same command again continues a run where it stopped.
"""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import config
from config import Config, UserError

if __name__ == "__main__":
    # Before torch is imported: a fast --help.
    cfg = config.parse(Config, description="Train a vision-language model.")

# DDP warns each run that the first batch used all parameters.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

import actions
import checkpoint
from data import IGNORE, BadExample, Conversations, collate, load_image_transforms, load_language, show
from model import PARTS, load_vlm
from profiling import StepProfile, part
from sampler import SplitModalitySampler

# A run may continue with other values of these: they do not change what is computed, up to float rounding.
FREE_TO_CHANGE = ("per_device_batch_size", "num_workers", "save_every", "keep", "overwrite",
                  "gradient_checkpointing", "run_root", "run_id", "prepare", "val_json", "keep_epochs",
                  "skip_bad_examples", "profile", "compile")


def main(cfg):
    device, restarted = start_process_group()
    rank, run = dist.get_rank(), cfg.run_folder
    prepare(cfg, run, rank, restarted)
    files, policy, loader = load_data(cfg, device)
    sampler = loader.batch_sampler
    total = cfg.max_steps or cfg.epochs * sampler.batches_per_epoch
    parts, model = load_model(cfg, policy)
    model.to(device)
    optimizer = make_optimizer(model, cfg)
    step = resume(cfg, run, model, optimizer)
    # A text-only batch leaves the projector without a gradient;
    # DDP raises at that unless told to look for it.
    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                  find_unused_parameters=not sampler.has_image.all(),
                                  gradient_as_bucket_view=True)     # what is sent is the gradient, no copy

    if rank == 0 and step == total:
        print(f"{run}: this run is finished, all {total:,} steps are done")
    elif rank == 0:
        print_opening(model, files[0], sampler, total)
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    bar = tqdm(total=total, initial=step, disable=rank != 0 or step == total, desc=cfg.stage,
               dynamic_ncols=True)
    if policy and rank == 0:
        checkpoint.write_text(run / "dataset_statistics.json", json.dumps(policy.statistics, indent=2))
    # What a checkpoint says of itself.
    about = {"parts": parts} | ({"actions": policy.saved()} if policy else {})
    watched = StepProfile(cfg.profile if rank == 0 else 0, model, run / "trace.json")
    stop, saved = Stop(), step
    with bar, open(run / "metrics.jsonl", "a") if rank == 0 else nullcontext() as metrics_file:
        while step < total and not stop.agreed:
            epoch, start = divmod(step, sampler.batches_per_epoch)
            sampler.set_epoch(epoch)
            sampler.set_start(start)
            for file in files:
                file.epoch.fill_(epoch)
            batches = iter(loader)
            for _ in range(min(sampler.batches_per_epoch - start, total - step)):
                watched.step()
                began = time.perf_counter()
                with part("data wait"):
                    micro_batches = [next(batches) for _ in range(sampler.accumulation)]
                waited = time.perf_counter() - began
                counts = count_together(micro_batches, stop.asked, device)
                stop.agreed = counts["stop"] > 0
                if (stop.agreed or counts["bad"]) and step > saved:
                    save(run, step, model, optimizer, about, cfg.keep)
                if stop.agreed:
                    break
                stop_at_bad_examples(micro_batches, counts)
                lr = learning_rate(step, total, cfg)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss, norm, scores = train_step(ddp, micro_batches, counts["tokens"], cfg.max_grad_norm,
                                                device, bf16, policy.score if policy else right_tokens)
                stop_unless_finite(loss, norm, step + 1, micro_batches)
                with part("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                if rank == 0:
                    metrics = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm,
                               **(policy.metrics(scores) if policy
                                  else {"accuracy": scores[0] / counts["tokens"]}),
                               **data_metrics(counts, micro_batches, waited, time.perf_counter() - began)}
                    metrics_file.write(json.dumps(metrics) + "\n")
                    metrics_file.flush()
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", data=f"{metrics['data_wait']:.0%}",
                                    refresh=False)
                    bar.update()
                epoch_ends = cfg.keep_epochs and step % sampler.batches_per_epoch == 0
                if step % cfg.save_every == 0 or step == total or epoch_ends:
                    save(run, step, model, optimizer, about, cfg.keep, forever=epoch_ends)
                    saved = step
    watched.end()
    stop.restore()
    dist.destroy_process_group()
    if stop.agreed and rank == 0:
        print(f"stopped by a signal after step {step} and saved; the same command continues")
    return run if rank == 0 and not stop.agreed else None, ddp


# -- what the loop works on ----------------------------------------------------------------------------------

def load_data(cfg, device):
    """One dataset, cut by the sampler into this rank's micro-batches
    -> its files, the policy of stage vla, a loader."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    language = load_language(cfg.llm_backbone, cfg.prompt)
    transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize)
    policy = (actions.ActionTokens(actions.end_of_actions(language.tokenizer), {})
              if cfg.stage == "vla" else None)
    with rank_zero_first(rank):         # it reads the files and counts all tokens; the others find the counts
        files = [Conversations(path, cfg.image_dir, language, transforms, cfg.max_length,
                               caption_only=cfg.stage == "align", skip_bad=cfg.skip_bad_examples,
                               policy=policy, augment=cfg.seed if cfg.augment else None)
                 for path in cfg.train_json.split(",")]
        for data in files if policy else ():
            policy.learn_units(data, [int(d) for d in cfg.kept_dimensions])
        counted = [data.lengths() for data in files]
    times = [int(t) for t in cfg.mixture.split(",")] if cfg.mixture else [1] * len(files)
    data = ConcatDataset([data for data, n in zip(files, times) for _ in range(n)])
    lengths, has_image = (np.concatenate([both[k] for both, n in zip(counted, times) for _ in range(n)])
                          for k in (0, 1))
    per_device = min(cfg.per_device_batch_size, max(1, cfg.global_batch_size // world_size))
    if cfg.global_batch_size % (per_device * world_size):
        raise UserError(f"--global_batch_size {cfg.global_batch_size} can't be cut into micro-batches of "
                        f"--per_device_batch_size {per_device} on {world_size} ranks. Choose a multiple of "
                        f"{per_device * world_size}")
    sampler = SplitModalitySampler(lengths, has_image, global_batch_size=cfg.global_batch_size,
                                   per_device_batch_size=per_device, world_size=world_size, rank=rank,
                                   seed=cfg.seed, window=cfg.length_window)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=cfg.num_workers,
                        persistent_workers=cfg.num_workers > 0, pin_memory=device.type == "cuda",
                        worker_init_fn=worker_signals,
                        # Or it would draw from the model's random state.
                        generator=torch.Generator().manual_seed(cfg.seed))
    return files, policy, loader


def load_model(cfg, policy):
    """The parts of --ckpt if there is one, frozen but for what this stage trains
    -> the parts to save, the VLM."""
    parts = checkpoint_parts(cfg)
    model = load_vlm(cfg, cfg.trained, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    if cfg.ckpt:
        checkpoint.load_weights(model, checkpoint.find(cfg.ckpt))
    trains_llm = any(name.startswith("llm") for name in cfg.trained)
    # A policy has rows of its own already.
    if policy and trains_llm and config.read_config(cfg.ckpt).stage != "vla":
        policy.fresh_rows(model.llm, cfg.seed)
    torch.manual_seed(cfg.seed + dist.get_rank())           # with dropout, each rank drops other activations
    model.set_trained(cfg.trained)
    if cfg.gradient_checkpointing:
        model.use_gradient_checkpointing()
    if cfg.compile:
        model.use_compile()
    return parts, model


# -- one step ------------------------------------------------------------------------------------------------

def count_together(micro_batches, stop, device):
    """What all ranks must know before a step, in one small all-reduce -> dict of sums over all ranks."""
    good = [batch for batch in micro_batches if not isinstance(batch, BadExample)]
    counts = {"tokens": sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in good),   # supervised
              "real": sum(int(batch["attention_mask"].sum()) for batch in good),                # not padding
              "positions": sum(batch["input_ids"].numel() for batch in good),
              "replaced": sum(batch["replaced"] for batch in good),
              "bad": len(micro_batches) - len(good),
              "stop": int(stop)}
    return dict(zip(counts, all_sum(torch.tensor(list(counts.values()), device=device)).tolist()))


def data_metrics(counts, micro_batches, waited, seconds):
    """What metrics.jsonl says of a step's data, and of the time it took."""
    return {"tokens": counts["tokens"], "positions": counts["positions"],
            "padding": 1 - counts["real"] / counts["positions"], "replaced": counts["replaced"],
            "data_wait": waited / seconds, "tokens_per_second": counts["real"] / seconds,
            "modality": "image" if micro_batches[0]["pixel_values"] else "text"}


def train_step(model, micro_batches, tokens, max_norm, device, bf16, score):
    """Forward and backward of one optimizer step on this rank's micro-batches.

    -> loss per supervised token, gradient norm,
    and what `score(batch, predicted)` gives, summed over the global batch.

    The gradient is that of: sum of the token losses / `tokens`, both over the whole global batch. Averaging
    micro-batch by micro-batch would weigh a 3-token answer like a 300-token one.
    """
    scale = dist.get_world_size() / tokens                  # DDP averages over ranks; we want the sum
    results = []
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else model.no_sync():    # gradients cross the wire once per step
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, predicted = model(batch["input_ids"].to(device, non_blocking=True),
                                        batch["labels"].to(device, non_blocking=True),
                                        [pixels.to(device, non_blocking=True)
                                         for pixels in batch["pixel_values"]])
            with part("backward"):
                (loss * scale).backward()
        results.append((loss.detach(), predicted))
    with part("optimizer"):
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # Only now: to look at a result, the CPU waits for the GPU, which then waits for the next micro-batch.
    sums = sum(torch.cat([loss[None].double(), score(batch, predicted).to(device)])
               for batch, (loss, predicted) in zip(micro_batches, results))
    loss_sum, *scores = all_sum(sums).tolist()
    return loss_sum / tokens, norm.item(), scores


def right_tokens(batch, predicted):
    """How many supervised tokens were the likeliest at their place. (1,)"""
    targets = batch["labels"][:, 1:]
    return (predicted.cpu() == targets[targets != IGNORE]).sum(0, keepdim=True).double()


def all_sum(tensor):
    dist.all_reduce(tensor)
    return tensor


def stop_at_bad_examples(micro_batches, counts):
    for batch in micro_batches:
        if isinstance(batch, BadExample):
            raise batch
    if counts["bad"]:
        raise OtherRank("another rank met a bad example")


def stop_unless_finite(loss, norm, step, micro_batches):
    """Before the update. All ranks have the same two numbers, so all stop here."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        ids = [None] * dist.get_world_size()                # any rank may have the bad one, only one is shown
        dist.all_gather_object(ids, ", ".join(name for batch in micro_batches for name in batch["ids"]))
        examples = "; ".join(f"rank {rank} had the examples {names}" for rank, names in enumerate(ids))
        raise UserError(f"step {step}: loss {loss}, gradient norm {norm}. The update was not made, "
                        f"checkpoints are intact. {examples}. Look at them, or lower --learning_rate")


def learning_rate(step, total, cfg):
    """Linear warm-up, then constant or half a cosine down to zero.
    A function of the step: no scheduler to restore."""
    warmup = math.ceil(cfg.warmup_ratio * total)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.learning_rate
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model, cfg):
    """AdamW. Matrices decay; norms and biases do not: pulling a norm's scale to zero helps nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=cfg.learning_rate, fused=True)                   # one kernel instead of several for each tensor


# -- before and after the loop -------------------------------------------------------------------------------

def start_process_group():
    """Always on, so the loop has no `if distributed`. NCCL between GPUs, gloo between CPUs.

    -> this rank's device; and, for rank zero,
    whether torchrun restarts a run (--max_restarts) that it began itself.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    under_torchrun = "RANK" in os.environ
    kept, rank, world_size = next(dist.rendezvous("env://")) if under_torchrun else (dist.HashStore(), 0, 1)
    store = store_of_this_start(kept, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    # Which of the two counts depends on torch's version, and on the machine where the dead rank was.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return device, rank == 0 and (kept.add("starts", 1) > 1 or again)


def store_of_this_start(store, rank, world_size):
    """The part of torchrun's store over which the ranks of this start find each other.

    torchrun keeps one store through all its restarts (--max_restarts), with the addresses of the dead in it:
    who reads those waits for ever (pytorch#135712). Its count of restarts does not help, each machine has its
    own. So rank zero names each start, and tells the name only to a rank that asks for it under a token it
    has just drawn.
    """
    token = name = os.urandom(8).hex()
    if rank > 0:
        store.set(f"token of rank {rank}", token)
        name = store.get(f"name for {token}").decode()      # waits until rank zero has set it
        store.set(f"rank {rank} is in {name}", "")
    missing = set(range(1, world_size)) if rank == 0 else ()
    while missing:
        for other in missing:
            if store.check([f"token of rank {other}"]):     # perhaps a dead one's: then asked again
                store.set(f"name for {store.get(f'token of rank {other}').decode()}", name)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"rank {other} is in {name}"])}
    return dist.PrefixStore(name, store)


class Stop:
    """SIGTERM (a cluster that takes the machine back) or SIGINT (Ctrl-C): finish the step, save, leave.

    Signals reach ranks at different moments, so the ranks first agree on it, see `count_together`.
    """

    def __init__(self):
        self.asked = self.agreed = False
        self.before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, number, frame):
        self.asked = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def worker_signals(worker):
    """Signals are the loop's business.

    torchrun and clusters send them to every process: a data worker that died of one would end the run before
    it could save. Workers end when the loop tells them, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class rank_zero_first:
    """with rank_zero_first(rank): rank zero runs the body, then the others do."""

    def __init__(self, rank):
        self.rank = rank

    def __enter__(self):
        if self.rank != 0:
            dist.barrier()

    def __exit__(self, kind, *_):
        if self.rank == 0 and kind is None:
            dist.barrier()


def prepare(cfg, run, rank, restarted):
    """Rank zero makes the data if there is a script for it, and the run folder with its config.json."""
    if rank == 0:
        if cfg.prepare and not Path(cfg.train_json).exists():
            subprocess.run([sys.executable, cfg.prepare], check=True)
        if cfg.ckpt and Path(cfg.ckpt).resolve() in (run.resolve(), *run.resolve().glob("step-*")):
            raise UserError(f"--ckpt {cfg.ckpt} is the folder of this run. To continue it, leave --ckpt "
                            "as it was at the start; to start from it, name the new run with --run_id")
        if cfg.overwrite and not restarted and (run / "config.json").exists():
            old = run.with_name(f"{run.name}.overwritten")
            shutil.rmtree(old, ignore_errors=True)
            run.rename(old)                             # killed half-way, old steps would pass for new ones
            shutil.rmtree(old)
        if (run / "config.json").exists():
            check_same_run(cfg, config.read_config(run), run)
        else:
            try:
                run.mkdir(parents=True, exist_ok=True)
                checkpoint.write_text(run / "config.json", json.dumps(asdict(cfg), indent=2))
            except OSError as e:
                raise UserError(f"the run folder {run} can't be written ({e.strerror}). "
                                "Choose another --run_root") from e
    dist.barrier()


def check_same_run(cfg, before, run):
    old, new = asdict(before), asdict(cfg)
    changed = [f"--{name} was {old[name]!r}, is {new[name]!r}" for name in new
               if old[name] != new[name] and name not in FREE_TO_CHANGE]
    if changed:
        raise UserError(f"{run} holds a run with other flags: {'; '.join(changed)}. Give the same flags to "
                        "continue it, --run_id for a new run, or --overwrite to start over")


def checkpoint_parts(cfg):
    """The parts that a checkpoint of this run holds: what --ckpt held, and what this stage trains."""
    before = checkpoint.read_state(checkpoint.find(cfg.ckpt))["parts"] if cfg.ckpt else []
    for name in ("vision_backbone", "llm_backbone", "projector", "image_resize"):
        if cfg.ckpt and getattr(cfg, name) != getattr(config.read_config(cfg.ckpt), name):
            raise UserError(f"--{name} {getattr(cfg, name)}: the checkpoint {cfg.ckpt} was made with "
                            f"{getattr(config.read_config(cfg.ckpt), name)}. Leave the flag out")
    return [name for name in PARTS
            if name in before or name in {trained.split('.')[0] for trained in cfg.trained}]


@part("checkpoint")
def save(run, step, model, optimizer, about, keep, forever=False):
    """Rank zero writes, everyone waits."""
    state = random_state()
    states = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(states, state)
    if dist.get_rank() == 0:
        checkpoint.flush(run / "metrics.jsonl")             # a power cut must not take its lines
        optimizer_tensors = checkpoint.optimizer_tensors(model, optimizer)
        optimizer_tensors |= {f"random.{rank}": state.cpu() for rank, state in enumerate(states)}
        checkpoint.save(run, step, checkpoint.tensors_of(model, about["parts"]), optimizer_tensors,
                        about | {"forever": forever}, keep)
    dist.barrier()                              # outside the `if`, or the other ranks never meet rank zero


def random_state():
    """This rank's random state, as one uint8 tensor: what dropout draws from."""
    if not torch.cuda.is_available():
        return torch.get_rng_state()
    return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state()]).cuda()


def resume(cfg, run, model, optimizer):
    """Restores the newest checkpoint of the run, if there is one. Returns the number of steps done."""
    newest, damaged = checkpoint.newest(run)
    if dist.get_rank() == 0:
        for sentence in damaged:
            print(sentence, file=sys.stderr)
    step = 0
    if newest:
        step = checkpoint.read_state(newest)["step"]
        checkpoint.load_weights(model, newest)
        state = checkpoint.load_optimizer(model, optimizer, newest).get(str(dist.get_rank()))
        if state is not None:                           # a rank that the run did not have before draws afresh
            cpu = len(torch.get_rng_state())
            torch.set_rng_state(state[:cpu])
            if len(state) > cpu and torch.cuda.is_available():
                torch.cuda.set_rng_state(state[cpu:])
    file = run / "metrics.jsonl"
    if dist.get_rank() == 0 and file.exists():              # drop the lines of steps that were lost
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        checkpoint.write_text(file, "".join(line for line in lines if json.loads(line)["step"] <= step))
    return step


def print_opening(model, data, sampler, total):
    """What will happen, before it happens."""
    def parts(trained):
        sizes = {name: sum(p.numel() for p in getattr(model, name).parameters() if p.requires_grad == trained)
                 for name in PARTS}
        return ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in sizes.items() if size) or "nothing"
    print(f"trains   {parts(True)} · frozen {parts(False)}")
    print(f"batch    {sampler.global_batch_size} = {sampler.per_device_batch_size} x "
          f"{sampler.accumulation} accumulated x {sampler.world_size} ranks · "
          f"{len(sampler.lengths):,} examples ({int(sampler.has_image.sum()):,} with pictures) · "
          f"{total:,} steps, {sampler.batches_per_epoch:,} an epoch")
    example = data[0]
    if isinstance(example, BadExample):
        raise example
    print("sample 0 "
          f"{show(example['input_ids'].tolist(), example['labels'].tolist(), data.language.tokenizer)}"
          "     (>> << is what the loss sees)", flush=True)


def finish(cfg, run):
    """Scores the held-out examples with the command that a user would type, and names the next step."""
    if cfg.val_json:
        command = ["evaluate.py", "--ckpt", str(run), "--json", cfg.val_json, "--image_dir", cfg.image_dir,
                   "--out", str(run / "val.json")]
        print(f"\nscore    python {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, *command], check=True)
    own = "" if cfg.prepare else f" --train_json FILE --image_dir {cfg.image_dir}"
    print(f"run      {run}")
    if cfg.stage == "align":
        print(f"next     torchrun train.py --stage finetune --ckpt {run}{own}")
    elif cfg.stage == "vla" and cfg.prepare:
        print(f"next     python evaluate.py --ckpt {run} --rollouts 100")
    else:
        print(f"next     python generate.py --ckpt {run} --image FILE --prompt TEXT")


# No space, quota used up, file too large, read-only disk, no permission.
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class OtherRank(Exception):
    """This rank is well, but has to end because another one can't go on."""


def explain(error):
    """-> what a user should read of an error, and whether it is but the echo of another rank's end."""
    text = str(error)
    if "DataLoader worker (pid" in text or isinstance(error, (ConnectionError, EOFError)):
        # The latter: it died while it handed over a batch.
        return ("a process that reads data was killed from outside, most often because memory ran out "
                f"({(text or repr(error)).splitlines()[0]}). Lower --num_workers or --per_device_batch_size; "
                "the same command continues"), False
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        return (f"the disk refuses to write ({error}). What was saved is intact. Free some space, or choose "
                "another --run_root; then the same command continues"), False
    if not isinstance(error, (UserError, OtherRank, subprocess.CalledProcessError)):
        text = "".join(traceback.format_exception(error))
    return text, isinstance(error, OtherRank) or "closed by peer" in text or "reset by peer" in text


def end_with(error):
    """Ends this rank at once: a clean exit would wait for the others.

    torchrun then ends these, and shows the error again. An error that all ranks have is shown once: rank zero
    goes first, and with it goes the run. An echo comes last: of two that end within the same second, torchrun
    may take either for the cause.
    """
    # DataLoader's handler raises when a worker dies, also in here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank, (text, echo) = int(os.environ.get("RANK", 0)), explain(error)
    time.sleep(5 if echo else min(rank, 1) * 2)
    text = f"rank {rank} ends because another rank did; see there" if echo else f"error (rank {rank}): {text}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not echo:    # what torchrun shows as the root cause
        shown = json.dumps({"message": text, "timestamp": int(time.time())})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(shown)
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        finished, held = main(cfg)
        if finished:                                        # rank zero, after the process group is gone
            finish(cfg, finished)
    except Exception as e:
        end_with(e)
    # At once, with DDP still held. Taking it down joins gloo's threads while holding Python's lock; when one
    # of them still waits for that lock to let go of a tensor, the program never ends (seen in two of thirty
    # runs on busy cores).
    sys.stdout.flush()
    os._exit(0)
