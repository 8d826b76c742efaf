"""The pages say what the code says: quoted lines, flags, files; and each language says the same."""
import re
import subprocess

import pages
import pytest
from test_house import ROOMS

PAGES = sorted(str(path.relative_to(pages.ROOT)) for path in (*pages.ROOT.glob("*.md"),
                                                             *pages.ROOT.glob("docs/*.md")))
PAIRS = [(name, name.replace(".md", ".zh.md")) for name in PAGES if name.replace(".md", ".zh.md") in PAGES]
every_page = pytest.mark.parametrize("name", PAGES)
every_pair = pytest.mark.parametrize("english, chinese", PAIRS)


def differences(english, chinese):
    """What two versions of a page do not have in common, in words."""
    found = []
    if pages.headings(english) != pages.headings(chinese):
        found.append(f"headings {pages.headings(english)} and {pages.headings(chinese)}")
    if pages.blocks(english) != pages.blocks(chinese):
        found.append("blocks")
    for i, sections in enumerate(zip(pages.sections(english), pages.sections(chinese), strict=False)):
        if len(set(map(str, map(pages.figures, sections)))) > 1:
            found.append(f"section {i}: figures {' and '.join(map(str, map(pages.figures, sections)))}")
    return found


def test_the_tour_the_exercises_and_the_readme_are_there_in_chinese():
    assert {english for english, _ in PAIRS} >= {"README.md", "docs/tour.md", "docs/exercises.md"}


def test_the_readme_fits_on_three_screens_and_names_every_room():
    """A room that is not named there is not found."""
    page = pages.read("README.md")
    assert len(page.splitlines()) <= 140
    missing = [room for room in ROOMS if f"`{room}.py`" not in page and f"`{room}/`" not in page]
    assert not missing


@every_pair
def test_both_languages_have_the_same_headings_blocks_and_figures(english, chinese):
    assert not differences(pages.read(english), pages.read(chinese))


@pytest.mark.parametrize("old, new, what", [
    ("## 8.", "8.", "headings"), ("--save_every 5", "--save_every 6", "blocks"),
    ("0.125", "0.25", "figures")])
def test_a_change_in_one_language_would_be_caught(old, new, what):
    page = pages.read("docs/tour.zh.md")
    assert what in " ".join(differences(pages.read("docs/tour.md"), page.replace(old, new)))


@every_page
def test_quoted_lines_stand_in_the_code(name):
    for language, block in pages.blocks(pages.read(name)):
        if language == "python":
            assert not pages.quoted(block), block


def test_a_line_that_is_not_in_the_code_would_be_caught():
    assert pages.quoted("# train.py\n    ranks.barrier()\n    ranks.barrier(5)\n") == ["    ranks.barrier(5)"]


@every_page
def test_commands_can_be_typed(name):
    for language, block in pages.blocks(pages.read(name)):
        if language == "bash":
            said = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True).stderr
            assert not said, block
            for program in pages.programs(block):
                compile(program, name, "exec")
            for script, flags in pages.commands(block):
                assert not pages.unknown_flags(script, flags), block


def test_a_flag_that_does_not_exist_would_be_caught():
    block = 'cd x && torchrun --nproc_per_node 2 train.py --stage align --max_step 3 | tail -1\n'
    assert pages.commands(block) == [("train.py", ["--stage", "--max_step"])]
    assert pages.unknown_flags("train.py", ["--stage", "--max_step", "--no-forecast"]) == ["--max_step"]
    assert pages.unknown_flags("plan.py", ["--gpus", "--preset", "--gpu"]) == ["--gpu"]


@every_page
def test_links_point_to_files(name):
    for path in pages.links(pages.read(name)):
        assert (pages.ROOT / name).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("picture", sorted((pages.ROOT / "docs").glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small(picture):
    assert picture.stat().st_size < 200_000


def test_the_edits_of_the_exercises_still_apply():
    """An exercise that changes a line shows the sed command. It must change one line of today's code."""
    edits = re.findall(r"^sed '([^']+)' (\S+\.py) > ", pages.read("docs/exercises.md"), re.M)
    assert edits
    for edit, file in edits:
        said = subprocess.run(["sed", edit, file], cwd=pages.ROOT, capture_output=True, text=True)
        before, after = pages.read(file).splitlines(), said.stdout.splitlines()
        changed = [pair for pair in zip(before, after, strict=True) if len(set(pair)) > 1]
        assert len(changed) == 1, edit
        compile(said.stdout, file, "exec")
