"""The programs of the tour print what stands below them, and the pictures are those that the script draws."""
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
from forked import forked
from PIL import Image

# A bash block, and behind it what it prints.
SHOWN = re.compile(r"^```bash\n([^`]*?^EOF\n)```\n\n```\n(.*?)^```$", re.M | re.S)
PROGRAMS = [(block, printed) for block, printed in SHOWN.findall(pages.read("docs/tour.md"))
            if "runs/" not in block]                    # those ask a trained model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Like the project's folder, with the toy's data freshly drawn."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "toy").symlink_to(pages.ROOT / "toy")
    subprocess.run([sys.executable, "toy/world.py"], cwd=folder, check=True, capture_output=True)
    return folder


def printed_by(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = pages.HEREDOC.sub("", block).strip()
    said = subprocess.run(["bash", "-ec", before], capture_output=True, text=True, check=True,
                          env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    shown = io.StringIO(said.stdout)
    shown.seek(0, io.SEEK_END)
    with contextlib.redirect_stdout(shown):
        for program in pages.programs(block):
            exec(compile(program, "docs/tour.md", "exec"), {})
    return shown.getvalue()


def test_programs_were_found():
    assert len(PROGRAMS) >= 10


@pytest.mark.parametrize("block, printed", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_programs_of_the_tour_print_what_stands_below_them(block, printed, folder, monkeypatch):
    assert printed_by(block, folder, monkeypatch) == printed


def test_the_pictures_are_those_that_the_script_draws(folder, monkeypatch):
    monkeypatch.chdir(folder)
    command = forked([sys.executable, str(pages.ROOT / "docs/pictures.py"), "--folder", "drawn"])
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    drawn = sorted((folder / "drawn").glob("*.png"))
    assert len(drawn) == 5
    for path in drawn:
        new, old = (np.asarray(Image.open(file).convert("L"), int)
                    for file in (path, pages.ROOT / "docs" / path.name))
        assert new.shape == old.shape, path.name
        # Another version of Pillow may draw the edges of letters a little differently.
        assert (abs(new - old) > 64).mean() < 0.005, path.name
