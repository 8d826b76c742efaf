"""forked.py: a forked program is to other processes what one that Python has started would be."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forked


@pytest.fixture
def start(tmp_path):
    """A program's text, and its arguments -> the process, in a folder of its own."""
    def started(text, *args, **env):
        (tmp_path / "program.py").write_text(f"import os, signal, sys, time\n{text}\n")
        return subprocess.Popen(forked.forked([sys.executable, "program.py", *args]), cwd=tmp_path, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    return started


def test_it_has_its_own_arguments_input_output_folder_and_environment(start, tmp_path):
    process = start("print(sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read(), __name__)\n"
                    "print('two', file=sys.stderr)", "a b", WORD="猫")
    said, errors = process.communicate("typed")
    assert said == f"['program.py', 'a b'] {tmp_path} 猫 typed __main__\n" and errors == "two\n"


@pytest.mark.parametrize("text, code, said", [
    ("", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit('no')", 1, "no\n"), ("os._exit(7)", 7, ""),
    ("raise ValueError('cosmic ray')", 1, "ValueError: cosmic ray\n"),
    ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""), ("signal.raise_signal(signal.SIGTERM)", -15, "")])
def test_it_ends_as_it_would(text, code, said, start):
    process = start(text)
    errors = process.communicate()[1]
    assert process.returncode == code and errors.endswith(said) and bool(errors) == bool(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_it(number, start):
    process = start(f"signal.signal({int(number)}, lambda *_: sys.exit(5))\nprint('there', flush=True)\n"
                    "time.sleep(60)")
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    assert process.wait(timeout=60) == 5


def test_it_is_killed_with_its_place_holder(start):
    process = start("print(os.getpid(), flush=True)\ntime.sleep(60)")
    pid = int(process.stdout.readline())
    assert pid != process.pid and Path(f"/proc/{pid}").exists()
    process.kill()
    began = time.time()
    while Path(f"/proc/{pid}").exists():
        assert time.time() - began < 60
        time.sleep(0.01)
    assert process.wait() == -9


def test_torch_is_there_and_the_files_of_this_project_are_not(start, tmp_path):
    (tmp_path / "config.py").write_text("mine = 7")
    process = start("there = set(sys.modules)\nimport config\n"
                    "print('torch' in there, 'transformers' in there, 'train' in there, config.mine)")
    assert process.communicate()[0] == "True True False 7\n"


def test_each_draws_other_numbers_as_separate_programs_do(start):
    text = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (start(text).communicate()[0].split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


def test_what_it_starts_is_forked_too_but_for_other_options_of_python(start, tmp_path):
    (tmp_path / "other.py").write_text("import sys; print('torch' in sys.modules)")
    process = start("import subprocess\nfor args in (['other.py'], ['-u', 'other.py'], ['-c', 'print(3)']):\n"
                    "    subprocess.run([sys.executable, *args], check=True)")
    assert process.communicate()[0] == "True\nTrue\n3\n"


def test_a_variable_that_imports_read_may_not_differ(start):
    process = start("print('here')", OMP_NUM_THREADS="2")
    said, errors = process.communicate()
    assert process.returncode == 1 and not said and "['OMP_NUM_THREADS'] are read before" in errors
