"""Programs that need not import torch and transformers: forked from a process that has done it once.

`forked.python()` is a program in place of Python. `PYTHON train.py --stage align` does what it always does,
but for its imports, which take a CPU some five seconds. It is a process of its own, with the input, the
output, the environment and the folder that it is started with; what it starts by sys.executable, as torchrun
starts its ranks, is forked, too. It ends as it would, and signals reach it. What kills its place-holder kills
it a moment later. The files of this project are not among what is imported only once.

What a test looks for in /proc, or kills and does not wait for, is not forked. And of what users start, all is
started in a test as they do it: python train.py with its score, torchrun with two ranks and their curve, one
that gets a signal and one that is killed.
"""
import atexit
import functools
import gc
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What is read by imports, or when Python starts: the same for all programs.
READ_ONCE = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TORCH_CPP_LOG_LEVEL", "HF_HOME", "HF_HUB_OFFLINE",
             "PYTHONPATH", "PYTHONIOENCODING", "PYTHONHASHSEED")


# -- for tests -----------------------------------------------------------------------------------------------

def run(command, fresh=False, **how):
    """`subprocess.run` in the project's folder, with one thread. fresh: with imports of its own."""
    return subprocess.run(command if fresh else forked(command), cwd=ROOT, capture_output=True, text=True,
                          timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


def forked(command):
    """A command that begins with sys.executable -> the same without the imports."""
    assert command[0] == sys.executable
    return [python(), *command[1:]]


@functools.cache
def python():
    """The process that imports is started here, and ends with this one."""
    if sys.platform != "linux":                             # elsewhere, libraries do not like to be forked
        return sys.executable
    folder = tempfile.mkdtemp()
    program, path = os.path.join(folder, "python"), os.path.join(folder, "socket")
    with open(program, "w") as file:
        file.write(f"#!/bin/sh\nexec {shlex.join([sys.executable, '-IS', __file__, path])} \"$@\"\n")
    os.chmod(program, 0o700)
    server = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def end():
        server.communicate()                                # closes its input
        shutil.rmtree(folder)
    return program


# -- the place-holder ----------------------------------------------------------------------------------------

def ask(path, argv):
    """Asks for a program with its own input, output, folder and environment, and ends as the program does."""
    if argv[0] not in ("-m", "-u") and not argv[0].endswith(".py"):         # -c, say
        os.execv(sys.executable, [sys.executable, *argv])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile()
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:                         # that one has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# -- the process that imports --------------------------------------------------------------------------------

def serve(path):
    """Forks for each connection, until its own input ends."""
    sys.executable = os.path.join(os.path.dirname(path), "python")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        import_once()
        print("ready", flush=True)
        attending = 0
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return attend(connection)
            connection.close()
            attending += 1
            while attending and os.waitpid(-1, os.WNOHANG)[0]:
                attending -= 1


def import_once():
    sys.path.insert(0, ROOT)
    import config  # noqa: F401  (before torch)
    import torch.distributed.run
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401  (the toy's language model)

    import evaluate  # noqa: F401  (these two for what they import)
    import train  # noqa: F401
    own = {name.removesuffix(".py") for name in os.listdir(ROOT)}
    for name in list(sys.modules):
        if name.split(".")[0] in own or name == "torch.distributed.run":        # what is run itself, too
            del sys.modules[name]
    sys.path.remove(ROOT)
    sys.excepthook = sys.__excepthook__                     # config.py has its own
    gc.freeze()                                             # else each end of a program walks through it all
    assert len(os.listdir("/proc/self/task")) == 1          # a fork takes no other threads along


def attend(connection):
    """Forks once more: one becomes the program, the other waits for its end and tells it."""
    head, fds, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        argv, folder, environment = json.loads(file.read(int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        return become(argv, folder, environment, fds)
    for fd in fds:                                          # a pipe has ended when nobody can write into it
        os.close(fd)
    connection.sendall(f"{pid}\n".encode())
    ended = False
    while not ended:
        gone = bool(select.select([connection], [], [], 0.01)[0])       # the place-holder was killed
        if gone:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, 0 if gone else os.WNOHANG)
    if not gone:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(argv, folder, environment, fds):
    """Runs the program here, as Python would."""
    import runpy

    import numpy
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    other = [name for name in READ_ONCE if environment.get(name) != os.environ.get(name)]
    assert not other, f"{other} are read before a forked program begins: start this one as users do"
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()                                     # else all programs draw the same
    if argv[0] == "-u":                                     # so torchrun starts its ranks
        sys.stdout.reconfigure(write_through=True)
        argv = argv[1:]
    if argv[0] == "-m":
        sys.path[0], sys.argv = folder, argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(argv[0])), argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
