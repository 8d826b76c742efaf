"""How ranks meet, although others may have died before them. `ranks.start` asks here.

torchrun restarts the ranks of a run when one of them dies (--max_restarts), Slurm restarts torchrun
(--requeue). What the dead have left must mislead nobody.
"""
import os
import threading
import time

import torch.distributed as dist


def meet():
    """-> the store of this start, this rank, the world size; and whether a run that was begun before has been
    restarted, which only rank zero is told."""
    under_torchrun = "RANK" in os.environ
    if under_torchrun:
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    kept, rank, world_size = next(dist.rendezvous("env://")) if under_torchrun else (dist.HashStore(), 0, 1)
    # Several numbers count the starts. Which of them grows depends on torch's version, and on the machine
    # where the rank died. One that has grown is enough.
    again = any(int(os.environ.get(f"{by}_RESTART_COUNT", 0)) > 0 for by in ("TORCHELASTIC", "SLURM"))
    return (store_of_this_start(kept, rank, world_size), rank, world_size,
            rank == 0 and (kept.add("starts", 1) > 1 or again))


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
