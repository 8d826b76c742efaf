"""Train a vision-language model. `main` is the whole run, `train_step` is one step of it.

    torchrun train.py --stage align
    torchrun train.py --stage finetune --ckpt runs/toy-align-x7
    torchrun --nproc_per_node 8 train.py ...       # the same batches, the same gradients, on 8 GPUs
    python train.py ...                            # a world of one: one process, no torchrun

The same command again continues a run where it stopped. What a step is, in the words of the field:

    forward     the model reads a batch of examples as tokens: pieces of text, each with a number, its id. At
                each position it gives every token of the vocabulary (all tokens there are) a probability to
                come next. It is causal: a position sees itself and the positions before it.
    loss        how far off it was, one number: the mean of -log(probability of the token that did come next)
                over the supervised tokens, those of the replies, which the model is to learn to say.
    backward    from the loss back to each weight: its gradient says how much the loss would grow with it.
    update      the optimizer moves each weight against its gradient. The learning rate says how far.

A batch too large for the memory is read in micro-batches whose gradients are added up (accumulation). On
several GPUs each process, a rank (ranks.py), takes its share of the batch; DistributedDataParallel (DDP)
averages the gradients over the ranks, so all make the same update and their weights stay equal.
"""
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import config
from config import BadExample, Config, UserError

if __name__ == "__main__":
    # Importing torch takes seconds. --help and a wrong flag are answered before.
    config.parse(Config, description="Train a vision-language model.")

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader

import checkpoint
import ranks
from data import Conversations, collate
from images import Pictures, load_image_transforms
from model import PARTS, load_vlm
from profiling import Speed, StepProfile, phase, working_type
from prompts import IGNORE, load_language
from sampler import SplitModalitySampler, uneven


def main(cfg):
    import owner
    import report
    device, restarted = ranks.start()
    rank, run = dist.get_rank(), cfg.run_folder
    ranks.hold(owner.claim(cfg, run))   # the lock of this run: it has one writer
    files, policy, held_out, pictures, loader = load_data(cfg, device)
    sampler = loader.batch_sampler
    # The progress bar counts optimizer steps: epochs x global batches of an epoch. (A loop that counts
    # micro-batches would divide by the accumulation.) --max_steps ends a run earlier, or later, than that,
    # also in the middle of an epoch; a cosine reaches zero there.
    total = cfg.max_steps or cfg.epochs * sampler.batches_per_epoch
    report.check_prompt(cfg, files[0].language)
    report.forecast(cfg, device)        # refuses a run that can't fit
    parts, model = load_model(cfg, policy, sampler, device)
    optimizer, dtype = make_optimizer(model, cfg), working_type(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    owner.begin(cfg, run, restarted, sampler.batches_per_epoch)     # up to here nothing on disk has changed
    step = checkpoint.resume(run, model, optimizer, scaler)
    if step > total:
        raise UserError(f"{run}: {step} steps are done, but the run has {total} now. Was its data changed?")
    # DDP averages gradients over the ranks while backward still runs. It waits for a gradient of every weight
    # that trains, but a text-only batch gives the projector none. DDP then raises an error, unless
    # find_unused_parameters tells it to look for such weights.
    together = ranks.alone if device.type == "mps" else DistributedDataParallel
    ddp = ranks.hold(model if cfg.shard != "no" else together(
        model, device_ids=None if device.type == "cpu" else [device.index],
        find_unused_parameters=not 0 < sampler.has_image.min() == sampler.has_image.max(),
        forward_sync_buffers=False,                                 # they are the same everywhere
        gradient_as_bucket_view=True))                              # what is sent is the gradient, no copy
    # Writing files and printing is rank zero's work. Eight ranks would write eight times, into one file.
    if rank == 0:
        report.opening(cfg, model, files[0], sampler, total, step, learning_rate(step, total, cfg))
        if policy:
            checkpoint.write_text(run / "dataset_statistics.json", json.dumps(policy.statistics, indent=2))
    about = {"parts": parts, "prompt": files[0].language.prompt[:5]}    # as it was learned from a template
    about |= {name: of.saved() for name, of in (("actions", policy), ("lora", model.adapters)) if of}
    watched = StepProfile(cfg.profile if rank == 0 else 0, model, run / "trace.json")
    speed, progress = Speed(model, device, dtype, step, total), report.Progress(cfg, total)
    stop, stopped, saved = ranks.Stop(), False, step
    batches = global_batches(loader, pictures, step, total, speed, stop)
    with progress, open(run / "metrics.jsonl", "a") if rank == 0 else nullcontext() as metrics_file:
        ahead = next(batches, None)
        while ahead:
            epoch, micro_batches, counts = ahead
            watched.step()
            speed.begin()
            stopped = counts["stop"] > 0
            if (stopped or counts["bad"]) and step > saved:
                save(run, step, model, optimizer, scaler, about, cfg.keep)
            if stopped:
                break
            stop_at_bad_examples(micro_batches, counts)
            lr = learning_rate(step, total, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # A GPU works through a queue, and with this call the step is in it, down to the update. Meanwhile
            # the CPU reads the next batch and agrees on it with the other ranks. Then it waits for numbers.
            queued = train_step(ddp, optimizer, scaler, micro_batches, counts["tokens"], cfg, device)
            ahead = next(batches, None)
            loss, norm, scores = look(*queued, micro_batches, counts["tokens"],
                                      policy.measure if policy else right_tokens)
            step += 1
            skipped = stop_unless_finite(loss, norm, step, micro_batches, scaler)
            metrics = {"step": step, "epoch": epoch, "loss": loss, "lr": lr,
                       "grad_norm": None if skipped else norm, "skipped": int(skipped),
                       **(policy.metrics(scores) if policy else {"accuracy": scores[0] / counts["tokens"]}),
                       **speed.metrics(counts)}
            if cfg.val_every and (step % cfg.val_every == 0 or step == total):
                metrics |= held_out.score(model)
            if rank == 0:
                metrics_file.write(json.dumps(metrics) + "\n")
                metrics_file.flush()
                progress.show(metrics)
            epoch_ends = cfg.keep_epochs and step % sampler.batches_per_epoch == 0
            if step % cfg.save_every == 0 or step == total or epoch_ends:
                save(run, step, model, optimizer, scaler, about, cfg.keep, forever=epoch_ends)
                saved = step
    watched.end()
    stop.restore()
    dist.destroy_process_group()        # no collectives from here on; the connections to other ranks close
    if rank == 0 and stopped:
        print(f"stopped by a signal after step {step} and saved; the same command continues")
    elif rank == 0:
        optimizer.state.clear()         # the score loads the model once more, in a process of its own
        model.free()
        report.closing(cfg, run)


# -- what the loop works on ----------------------------------------------------------------------------------

def load_data(cfg, device):
    """One dataset, cut by the sampler into this rank's micro-batches
    -> its files, the policy of stage vla (how actions become tokens; else None), the held-out examples (None
    without --val_json), how pictures are read, a loader."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    language = load_language(cfg.llm_backbone, cfg.prompt, cfg.stage == "align", cfg.picture_place)
    transforms = load_image_transforms(cfg.vision_backbone, cfg.image_resize, cfg.openvla_vision)
    with ranks.rank_zero_first():       # it reads the files and counts all tokens; the others find the counts
        if cfg.prepare and not Path(cfg.train_json).exists():
            subprocess.run([sys.executable, cfg.prepare], check=True)           # draws the toy's data
        pictures = Pictures(cfg.image_dir, transforms)
        if cfg.augment:
            import actions
            pictures.augment, pictures.seed = actions.distort, cfg.seed
        about, policy, held_out = (language, pictures, cfg.max_length), None, None
        if cfg.stage == "vla":
            import actions
            policy, files = actions.open_episodes(cfg, language, about)
        else:
            files = [Conversations(path, *about, cfg.skip_bad_examples) for path in cfg.train_json.split(",")]
        counted = [file.lengths() for file in files]
        if cfg.val_json:                                    # read now, not after hours of training
            import validation
            held_out = validation.HeldOut(cfg, language, transforms, policy, device)
    times = [int(t) for t in cfg.mixture.split(",")] if cfg.mixture else [1] * len(files)
    data = ConcatDataset([file for file, n in zip(files, times) for _ in range(n)])
    lengths, has_image = (np.concatenate([both[k] for both, n in zip(counted, times) for _ in range(n)])
                          for k in (0, 1))
    per_device = min(cfg.per_device_batch_size, max(1, cfg.global_batch_size // world_size))
    if cfg.global_batch_size % (per_device * world_size):
        raise UserError(uneven(cfg.global_batch_size, per_device, world_size))
    sampler = SplitModalitySampler(lengths, has_image, global_batch_size=cfg.global_batch_size,
                                   per_device_batch_size=per_device, world_size=world_size, rank=rank,
                                   seed=cfg.seed, window=cfg.length_window)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=cfg.num_workers,
                        persistent_workers=cfg.num_workers > 0, pin_memory=device.type == "cuda",
                        worker_init_fn=ranks.ignore_signals,
                        # Without a generator of its own the loader draws from torch's global one, which
                        # dropout uses: a run that continues would then drop other activations.
                        generator=torch.Generator().manual_seed(cfg.seed))
    return files, policy, held_out, pictures, loader


def load_model(cfg, policy, sampler, device):
    """The weights of --ckpt if there is one, frozen except for what this stage trains
    -> the parts that a checkpoint of this run holds, the VLM on its device."""
    start = checkpoint.together(lambda: checkpoint.find(cfg.ckpt)) if cfg.ckpt else None
    before = checkpoint.parts_of(cfg, start) if start else []
    trained = {name.split(".")[0] for name in cfg.trained}
    if cfg.shard != "no":
        import shard
        mesh = shard.make_mesh(cfg.shard, device)
        with shard.in_turn():
            model = prepare(cfg, start, before, trained, policy, sampler, device)
            shard.cut(model, mesh, device, working_type(cfg.precision, device))
    else:
        model = prepare(cfg, start, before, trained, policy, sampler, device).to(device)
    torch.manual_seed(cfg.seed + dist.get_rank())           # with dropout, each rank drops other activations
    return [name for name in PARTS if name in before or name in trained], model


def prepare(cfg, start, before, trained, policy, sampler, device):
    """The VLM on the CPU, filled, and frozen except for what trains."""
    import check
    model = load_vlm(cfg, (*cfg.trained, *before),
                     torch.float32 if device.type == "cpu" else working_type(cfg.precision, device))
    check.check_fits(model.llm, int(sampler.lengths.max()), trained, bool(sampler.has_image.all()))
    if start:
        checkpoint.load_weights(model, start)
    if policy:
        policy.begin(model, cfg)                            # rows of the embedding table for action tokens
    model.set_trained(cfg.trained)
    if cfg.lora_rank or model.adapters:                     # those of --ckpt
        import lora
        lora.begin(model, cfg, start, policy)
    if cfg.gradient_checkpointing:
        model.use_recomputing()
    if cfg.compile:
        model.use_compile()
    return model


def make_optimizer(model, cfg):
    """AdamW. Weight decay pulls weights a little towards zero at each update. Only matrices get it: for
    biases and for the scales of normalization layers it helps nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=cfg.learning_rate, fused=True)                   # one kernel instead of several for each tensor


# -- one step ------------------------------------------------------------------------------------------------

def global_batches(loader, pictures, step, total, speed, stop):
    """Yields (epoch, this rank's micro-batches of one global batch, what all ranks counted of it),
    from step `step` of the run until `total` steps are done."""
    sampler = loader.batch_sampler
    while step < total:
        epoch, start = divmod(step, sampler.batches_per_epoch)
        sampler.set_epoch(epoch)
        sampler.set_start(start)
        pictures.epoch.fill_(epoch)
        batches = iter(loader)
        for _ in range(min(sampler.batches_per_epoch - start, total - step)):
            with speed.waiting():
                micro_batches = [next(batches) for _ in range(sampler.accumulation)]
            yield epoch, micro_batches, count_together(micro_batches, stop.asked)
            step += 1


def count_together(micro_batches, stop):
    """What all ranks must know before a step, in one small all-reduce -> dict of sums over all ranks."""
    good = [batch for batch in micro_batches if not isinstance(batch, BadExample)]
    lengths = [int(length) for batch in good for length in batch["attention_mask"].sum(1)]
    counts = {"tokens": sum(len(batch["places"][1]) for batch in good),                         # supervised
              "real": sum(lengths), "pairs": sum(length ** 2 for length in lengths),            # not padding
              "positions": sum(batch["input_ids"].numel() for batch in good),
              "patches": sum(len(batch["places"][0]) for batch in good),
              "pictures": sum(len(batch["pixel_values"][0]) for batch in good if batch["pixel_values"]),
              "replaced": sum(batch["replaced"] for batch in good),
              "bad": len(micro_batches) - len(good),
              "stop": int(stop)}
    return dict(zip(counts, ranks.all_sum(torch.tensor(list(counts.values()))).tolist()))


def stop_at_bad_examples(micro_batches, counts):
    for batch in micro_batches:
        if isinstance(batch, BadExample):
            raise batch
    if counts["bad"]:
        raise ranks.OtherRank("another rank met a bad example")


def learning_rate(step, total, cfg):
    """Linear warm-up, then constant or half a cosine down to zero.

    Warm-up, because AdamW's averages of gradients are poor guesses in the first steps, and full steps along
    them can spoil a trained model. Down to zero, because small steps at the end settle what large ones leave
    noisy. It is a function of the step: there is no scheduler to restore.
    """
    warmup = math.ceil(cfg.warmup_ratio * total)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.learning_rate
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_step(model, optimizer, scaler, micro_batches, tokens, cfg, device):
    """Queues one optimizer step on this rank's micro-batches. Nothing is looked at: a GPU is not waited for.

    -> each micro-batch's loss (a sum) and predicted tokens; the gradient norm before clipping: tensors that
    may not be computed yet.

    The gradient is that of: sum of the token losses / `tokens`, both over the whole global batch. Averaging
    micro-batch by micro-batch would weigh a 3-token answer like a 300-token one.
    """
    scale = dist.get_world_size() / tokens                  # DDP averages over ranks; we want the sum
    dtype, results = working_type(cfg.precision, device), []
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        # Under no_sync DDP only adds to the gradients. Else it would send them after each micro-batch,
        # though the sum of all is wanted once a step. (--shard sends after each: it has no room for a sum of
        # whole gradients.)
        with nullcontext() if last or cfg.shard != "no" else model.no_sync():
            # Autocast, "mixed precision": matrix products run in bf16 (16 bits a number), twice as fast or
            # more. What needs more digits (softmax, normalization, losses) stays in fp32 (32 bits), and so do
            # the weights that train and the optimizer. bf16 has the range of fp32. Older cards have fp16
            # instead: more digits, but a narrow range. Small gradients would become zero, so GradScaler
            # multiplies the loss before backward, and divides the gradients after it.
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                input_ids, labels, patches_at, learned_at, *pixel_values = (
                    tensor.to(device, non_blocking=True) for tensor in      # pinned, so the CPU goes on
                    (batch["input_ids"], batch["labels"], *batch["places"], *batch["pixel_values"]))
                loss, predicted = model(input_ids, labels, pixel_values, (patches_at, learned_at))
            with phase("backward"):
                # 0 * loss is 0, but NaN where the loss is not finite. Then all gradients become NaN, on all
                # ranks, so that one number, their norm, says whether a step may be made.
                scaler.scale(loss * (scale + 0 * loss.detach())).backward()     # adds to each weight's .grad
        results.append((loss.detach(), predicted))
    with phase("optimizer"):
        scaler.unscale_(optimizer)                          # in fp16; else the scaler's calls do nothing more
        # Clipping: one bad batch can have a gradient many times the usual. The gradient norm is the length of
        # all gradients taken as one long vector. Above the limit, all gradients are made smaller by the same
        # factor, so the direction stays.
        norm = checkpoint.whole(nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
        # `if norm is finite` would have to wait for the GPU. Fused AdamW asks there: where found_inf is 1, it
        # changes neither weights nor moments nor its count of steps. The loop ends the run afterwards.
        optimizer.found_inf = (~norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        # Backward adds to the gradients that are there, so the old ones must go. AdamW skips a weight whose
        # gradient is None. With zeros it would still move the projector in text-only steps, by momentum: the
        # average of earlier gradients, which AdamW keeps for each weight.
        optimizer.zero_grad(set_to_none=True)
    return results, norm


def look(results, norm, micro_batches, tokens, measure):
    """Waits until the step is done -> the loss per supervised token; the gradient norm; what
    `measure(batch, predicted)` gives. The first and the last are sums over the global batch."""
    norm, *losses = torch.stack([norm, *(loss for loss, _ in results)]).tolist()
    sums = sum(torch.cat([torch.tensor([loss], dtype=torch.float64), measure(batch, predicted)])
               for loss, batch, (_, predicted) in zip(losses, micro_batches, results))
    loss, *scores = ranks.all_sum(sums).tolist()
    return loss / tokens, norm, scores


def right_tokens(batch, predicted):
    """How many supervised tokens were the likeliest at their place. (1,)"""
    targets = batch["labels"][:, 1:]
    return (predicted.cpu() == targets[targets != IGNORE]).sum(0, keepdim=True).double()


def stop_unless_finite(loss, norm, step, micro_batches, scaler):
    """All ranks have the same two numbers, so all stop here. The update, which was queued, changed nothing.

    -> whether the update was skipped. In fp16 a gradient beyond the range is no error: GradScaler scales less
    from then on. (At a scale below 1 the range is not to blame.)
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return False
    if scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1:
        return True
    ids = [None] * dist.get_world_size()                    # any rank may have the bad one, only one is shown
    dist.all_gather_object(ids, ", ".join(name for batch in micro_batches for name in batch["ids"]),
                           group=ranks.cpu_group)
    examples = "; ".join(f"rank {rank} had the examples {names}" for rank, names in enumerate(ids))
    raise UserError(f"step {step}: loss {loss}, gradient norm {norm}. The update was not made, "
                    f"checkpoints are intact. {examples}. Look at them, or lower --learning_rate")


# -- what remains of a run -----------------------------------------------------------------------------------

@phase("checkpoint")
def save(run, step, model, optimizer, scaler, about, keep, forever=False):
    """Rank zero writes, everyone waits."""
    weights = checkpoint.tensors_of(model, about["parts"])
    moments = checkpoint.optimizer_tensors(model, optimizer) | checkpoint.gather_random_states()
    if dist.get_rank() > 0:
        import slices
        slices.give(weights, moments)
    else:
        about = about | {"forever": forever, "scaler": scaler.state_dict()}
        checkpoint.save(run, step, weights, moments, about, keep)
        if (run / "replaces.json").exists():                # --overwrite: the old run has done its duty
            import owner
            owner.forget(run)
    # Every rank must call barrier(). Inside the `if`, rank zero would wait for ever.
    ranks.barrier()


if __name__ == "__main__":
    ranks.run(main, config.parse(Config))
