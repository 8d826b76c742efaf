"""Processes that find each other, agree, stop and fail together.

torchrun starts one process for each GPU. Each has a number, its rank: 0, 1, ... world size - 1. All run the
same program on other examples, and meet in collectives: calls that every rank must make, such as

    all_reduce   every rank brings a tensor, every rank gets the sum
    barrier      nobody goes on before everybody is there

A rank that does not come lets all others wait. So ranks must agree before one of them leaves the loop, and a
rank that fails must end at once. `python train.py` without torchrun is a world of one: the same calls, with
nobody to wait for.
"""
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


# -- finding each other --------------------------------------------------------------------------------------

def start():
    """Joins the process group: the ranks that make collectives together. A single process joins one, too, so
    the loop needs no `if distributed`.

    -> this rank's device, and whether torchrun (--max_restarts) or Slurm (--requeue) has restarted a run that
    was begun before. Only rank zero is told the second; the others get False.
    """
    # LOCAL_RANK counts the ranks of one machine: it names the GPU. `set_device` makes that GPU the one that
    # "cuda" means. Without it eight processes would all put their first tensors on GPU 0, until it is full.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    under_torchrun = "RANK" in os.environ
    if under_torchrun:
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    kept, rank, world_size = next(dist.rendezvous("env://")) if under_torchrun else (dist.HashStore(), 0, 1)
    store = store_of_this_start(kept, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    global cpu_group
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    # Several numbers count the starts. Which of them grows depends on torch's version, and on the machine
    # where the rank died. One that has grown is enough.
    again = any(int(os.environ.get(f"{by}_RESTART_COUNT", 0)) > 0 for by in ("TORCHELASTIC", "SLURM"))
    return device, rank == 0 and (kept.add("starts", 1) > 1 or again)


def end_with_parent(parent):
    """Ends this rank when torchrun is gone. kill -9 takes torchrun without its ranks; they would train on,
    and the same command, given again, would make a second writer of the same run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


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


def tell(value):
    """What rank zero says, on every rank: for what only one may decide."""
    values = [value]
    dist.broadcast_object_list(values, group=cpu_group)
    return values[0]


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


STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stop:
    """SIGTERM (a cluster that takes the machine back), SIGHUP (the terminal is closed) or SIGINT (Ctrl-C):
    finish the step, save, leave.

    Signals reach the ranks at different moments. One that left the loop at once would let the others wait in
    the next all-reduce. So `asked` is only a wish; the loop sums up the wishes and all leave together.
    """

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self) for number in STOP_SIGNALS
                       if signal.getsignal(number) != signal.SIG_IGN}               # nohup ignores SIGHUP

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
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# -- how a process ends --------------------------------------------------------------------------------------
# A rank ends with os._exit, at once, and takes nothing down before. Two things go wrong otherwise. After an
# error, Python would wait for threads of torch that wait for the other ranks. After success, freeing DDP
# joins gloo's threads while it holds Python's lock; if one of them needs that lock to let go of a tensor, the
# program never ends (seen in two of thirty runs on busy cores). So DDP must live until the end: `hold` it.

HELD = []


def hold(thing):
    """Keeps DDP, or the lock of the run, until the process ends -> the same thing."""
    HELD.append(thing)
    return thing


def run(main, *args):
    """The life of a process, of a rank or of any other command: `main(*args)`, then the end. Never returns.

    The one boundary between errors and users; errors.py knows what to say.
    """
    code = 0
    try:
        code = main(*args) or 0
        sys.stdout.flush()
    except BrokenPipeError:                                 # `| head -1` has seen enough
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        import errors
        code = errors.end_with(error)
    os._exit(code)


class OtherRank(Exception):
    """This rank is well, but has to end because another one can't go on."""
