"""Processes that find each other, agree, stop and fail together; and how an error reaches the user.

torchrun starts one process for each GPU. Each has a number, its rank: 0, 1, ... world size - 1. All run the
same program on other examples, and meet in collectives: calls that every rank must make, such as

    all_reduce   every rank brings a tensor, every rank gets the sum
    barrier      nobody goes on before everybody is there

A rank that does not come lets all others wait. So ranks must agree before one of them leaves the loop, and a
rank that fails must end at once. `python train.py` without torchrun is a world of one: the same calls, with
nobody to wait for.
"""
import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from config import UserError


# -- finding each other --------------------------------------------------------------------------------------

def start():
    """Joins the process group: the ranks that make collectives together. A single process joins one, too, so
    the loop needs no `if distributed`.

    -> this rank's device, and whether torchrun has restarted the run that it began (--max_restarts). Only
    rank zero is told the second; the others get False.
    """
    # LOCAL_RANK counts the ranks of one machine: it names the GPU. `set_device` makes that GPU the one that
    # "cuda" means. Without it eight processes would all put their first tensors on GPU 0, until it is full.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    under_torchrun = "RANK" in os.environ
    kept, rank, world_size = next(dist.rendezvous("env://")) if under_torchrun else (dist.HashStore(), 0, 1)
    store = store_of_this_start(kept, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    global cpu_group
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    # Two numbers count the starts. Which of them grows depends on torch's version, and on the machine where
    # the rank died. One that has grown is enough.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return device, rank == 0 and (kept.add("starts", 1) > 1 or again)


def store_of_this_start(store, rank, world_size):
    """A view of torchrun's store (a dictionary that all ranks share) in which no dead rank has written.

    1. The problem: torchrun keeps one store through all its restarts (--max_restarts). The addresses of dead
       ranks stay in it, and a rank that reads one of them waits for ever (pytorch#135712).
    2. torchrun's count of restarts can't tell the starts apart: each machine counts for itself.
    3. So each rank writes down a ticket, a random word that no start before can have drawn.
    4. Rank zero names this start, and answers under each ticket with the name. A ticket of a dead rank is
       answered, too, but nobody reads that answer.
    5. Each rank confirms the name. Rank zero asks again until all have: a rank may replace its ticket late.
    """
    ticket = name = os.urandom(8).hex()
    if rank > 0:
        store.set(f"ticket of rank {rank}", ticket)
        name = store.get(f"name for {ticket}").decode()     # waits until rank zero has set it
        store.set(f"rank {rank} is in {name}", "")
    missing = set(range(1, world_size)) if rank == 0 else ()
    while missing:
        for other in missing:
            if store.check([f"ticket of rank {other}"]):
                store.set(f"name for {store.get(f'ticket of rank {other}').decode()}", name)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"rank {other} is in {name}"])}
    return dist.PrefixStore(name, store)


# -- agreeing ------------------------------------------------------------------------------------------------

# For what ranks tell each other besides gradients: CPU tensors, sent by gloo. NCCL, the library that sends
# GPU tensors, would make the GPU wait, and gives up after ten minutes. Counting the tokens of millions of
# examples, or saving 84 GB, takes longer.
cpu_group = None


def all_sum(tensor):
    """The sum over all ranks, in place and on each of them."""
    dist.all_reduce(tensor, group=cpu_group if tensor.device.type == "cpu" else None)
    return tensor


def barrier():
    dist.barrier(group=cpu_group)


@contextmanager
def rank_zero_first():
    """`with rank_zero_first():` rank zero runs the body, then the others do, and find what it left on disk.

    @contextmanager makes a `with` of one function: what stands before `yield` runs on entering, what stands
    behind it on leaving. A class with __enter__ and __exit__ says the same in two functions. If the body
    raises, the line behind `yield` is not reached: rank zero then ends, and the others hear of that.
    """
    if dist.get_rank() != 0:
        barrier()
    yield
    if dist.get_rank() == 0:
        barrier()


class Stop:
    """SIGTERM (a cluster that takes the machine back) or SIGINT (Ctrl-C): finish the step, save, leave.

    Signals reach the ranks at different moments. One that left the loop at once would let the others wait in
    the next all-reduce. So `asked` is only a wish; the loop sums up the wishes and all leave together.
    """

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, number, frame):
        self.asked = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """Of a data worker: signals are the loop's business.

    torchrun and clusters send them to every process. A data worker that died of one would end the run before
    it could save. Workers end when the loop tells them, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -- how a rank ends -----------------------------------------------------------------------------------------
# A rank ends with os._exit, at once, and takes nothing down before. Two things go wrong otherwise. After an
# error, Python would wait for threads of torch that wait for the other ranks. After success, freeing DDP
# joins gloo's threads while it holds Python's lock; if one of them needs that lock to let go of a tensor, the
# program never ends (seen in two of thirty runs on busy cores). So DDP must live until the end: `hold` it.

HELD = []


def hold(ddp):
    """Keeps DDP from being freed when `main` returns -> ddp."""
    HELD.append(ddp)
    return ddp


def run(main, cfg):
    """The life of a rank: `main(cfg)`, and then the end. Does not return."""
    try:
        main(cfg)
    except Exception as error:
        end_with(error)
    sys.stdout.flush()
    os._exit(0)


class OtherRank(Exception):
    """This rank is well, but has to end because another one can't go on."""


# No space, quota used up, file too large, read-only disk, no permission.
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def explain(error):
    """-> the text for the user, and whether this error is an echo: another rank failed, and this one only
    noticed."""
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
    """Shows the error and ends this rank. torchrun then ends the others, and shows the error again.

    An error that all ranks have is shown once: rank zero ends first, and torchrun then ends the others. An
    echo waits longest. If it ended in the same second as the true error, torchrun might show the echo.
    """
    # When a data worker dies, DataLoader's handler of this signal raises wherever the program is, also here.
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
