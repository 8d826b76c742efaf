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
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError


# -- finding each other --------------------------------------------------------------------------------------

def start():
    """Joins the process group: the ranks that make collectives together. A single process joins one, too, so
    the loop needs no `if distributed`.

    -> this rank's device, and whether torchrun (--max_restarts) or Slurm (--requeue) has restarted a run that
    was begun before. Only rank zero is told the second; the others get False.
    """
    import restarts
    device, (store, rank, world_size, restarted) = find_device(), restarts.meet()
    if device.type == "mps" and world_size > 1:
        raise UserError("a Mac's GPU trains alone. Start one process")
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, rank=rank,
                            world_size=world_size, device_id=device if device.type == "cuda" else None)
    global cpu_group
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return device, restarted


def find_device():
    """This process's GPU, or the CPU where there is none. A GPU is what torch calls an accelerator: NVIDIA's
    and AMD's ("cuda"), Intel's ("xpu"), a Mac's ("mps")."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False                 # else cuDNN rounds fp32 pictures to 10 bits
    # LOCAL_RANK counts the ranks of one machine: it names the GPU. `set_device_index` makes it the one that
    # "cuda" means. Without it eight processes would all put their first tensors on GPU 0, until it is full.
    device = torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))
    torch.accelerator.set_device_index(device.index)
    return device


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


def alone(model, **_):
    """In place of DDP on a Mac, whose GPU no backend serves: one rank has nothing to average."""
    model.no_sync = nullcontext
    return model


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
