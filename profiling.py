"""Where the time of a step goes (--profile N): a trace to look into, and a table of its phases.

The loop names its phases, `with phase("backward"): ...`; those of the model are found by hooks on its
modules. Without --profile no clock is read. With it, a GPU is waited for at both ends of each phase: the
times are true, and the whole is a little slower than without.
"""
import time
from contextlib import contextmanager
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile, record_function

WARM = 2                                                    # steps before the first one that is timed
seconds = None                                              # phase -> seconds; None: nobody asks


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def phase(name):
    if seconds is None:
        yield
        return
    with record_function(name):
        began = now()
        yield
        seconds[name] = seconds.get(name, 0) + now() - began


class StepProfile:
    """Watches `steps` steps of this process after the first WARM, then writes `file` and prints the table."""

    def __init__(self, steps, model, file):
        self.steps, self.file, self.count = steps, file, 0
        phases = {"forward": model, "vision": model.vision, "projector": model.projector,
                  "LLM forward": model.llm.base_model}
        for name, module in phases.items() if steps else ():
            opened = []                                     # one hook opens the phase, the other closes it
            module.register_forward_pre_hook(partial(open_phase, name, opened))
            module.register_forward_hook(partial(close_phase, opened))

    def step(self):
        """Call it where a step begins."""
        global seconds
        if self.steps and self.count == WARM:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.trace = profile(activities=activities)
            self.trace.start()
            seconds, self.began = {}, now()
        if self.steps and self.count == WARM + self.steps:
            whole, phases, seconds = now() - self.began, seconds, None
            self.trace.stop()
            self.trace.export_chrome_trace(str(self.file))
            self.show(whole, phases)
        self.count += 1

    def end(self):
        """Behind the last step. A run that was too short shows what there was."""
        if seconds is not None:
            self.steps = self.count - WARM
            self.step()

    def show(self, whole, phases):
        model = sum(phases.get(name, 0) for name in ("vision", "projector", "LLM forward"))
        phases["logits and loss"] = phases.pop("forward") - model
        phases["other: the loop itself"] = whole - sum(phases.values())
        print(f"\n{self.steps} steps of {whole / self.steps:.3f} s")
        for name, of_it in phases.items():
            print(f"{of_it / whole:7.1%}  {name}")
        sent = sum(event.device_time_total or event.cpu_time_total for event in self.trace.key_averages()
                   if event.key in ("nccl:all_reduce", "gloo:all_reduce")) / 1e6
        print(f"{sent / whole:7.1%}  all-reduce, while the others run")
        print(f"trace    {self.file}, for ui.perfetto.dev", flush=True)


def open_phase(name, opened, *_):
    opened.append(phase(name))
    opened[-1].__enter__()


def close_phase(opened, *_):
    opened.pop().__exit__(None, None, None)
