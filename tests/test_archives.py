"""archives.py: pictures in one .zip or .tar are those of the folder, and what is wrong is one sentence."""
import dataclasses
import gzip
import io
import json
import pickle
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import language, make_tokenizer, picture, talk, transform
from safetensors.torch import load_file

import actions
import check
import config
import desk
import llava
from archives import Archive
from chat import PROMPTS
from config import BadExample, UserError
from data import Conversations, collate
from images import Pictures, read_image
from prompts import Language
from test_train import train_here, world  # noqa: F401

NAMES = ["a.png", "deep/er/b.png", "ünï 猫.png", "x" * 150 + "/" + "y" * 120 + ".png", "A.png"]


@pytest.fixture
def folder(tmp_path):
    """Five pictures of five colors."""
    for i, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / "images" / name, (50 * i, 7, 255 - 50 * i))
    return tmp_path / "images"


def as_tar(folder, kind=tarfile.GNU_FORMAT, prefix=""):
    file = folder.with_name(f"images{kind}{prefix.strip('./')}.tar")
    with tarfile.open(file, "w", format=kind) as tar:
        tar.add(folder, prefix or ".")
    return file


def as_zip(folder, how=zipfile.ZIP_STORED):
    file = folder.with_name("images.zip")
    with zipfile.ZipFile(file, "w", how) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder))
    return file


KINDS = {"GNU tar": as_tar, "pax tar": lambda folder: as_tar(folder, tarfile.PAX_FORMAT), "zip": as_zip}
every_archive = pytest.mark.parametrize("kind", KINDS)


def pictures(path):
    return Pictures(path, [transform()])


@every_archive
def test_a_picture_in_an_archive_is_that_of_the_folder(kind, folder):
    archive = pictures(KINDS[kind](folder))
    assert len(archive.archive) == 5
    for name in (*NAMES, "deep/../a.png", "./a.png"):
        want, got = pictures(folder).path(name), archive.path(name)
        assert got.read_bytes() == want.read_bytes()
        assert np.array_equal(read_image(got), read_image(want))
    assert torch.equal(torch.stack(pictures(folder).tensors(NAMES, 0)[0]),
                       torch.stack(archive.tensors(NAMES, 0)[0]))


def test_archives_of_the_usual_programs_are_read(folder):
    """`tar cf` writes ./a.png, `zip -0 -r` also the folders."""
    subprocess.run(["tar", "cf", "../t.tar", "."], cwd=folder, check=True)
    files = [folder.with_name("t.tar")]
    if shutil.which("zip"):
        subprocess.run(["zip", "-q", "-0", "-r", "../z.zip", "."], cwd=folder, check=True)
        files.append(folder.with_name("z.zip"))
    for file in files:
        assert all(Archive(file).open(name).read_bytes() == (folder / name).read_bytes() for name in NAMES)


@every_archive
@pytest.mark.parametrize("name", ["../a.png", "deep/../../a.png", "/etc/passwd", "..", "a/../../b.png"])
def test_a_name_that_leads_out_is_refused_as_in_a_folder(kind, name, folder):
    file = KINDS[kind](folder)
    for where in (folder, file):
        with pytest.raises(BadExample) as e:
            pictures(where).path(name)
        assert str(e.value) == (f"picture {name} lies outside of --image_dir {where}; such paths are refused")


@every_archive
@pytest.mark.parametrize("name", ["b.png", "A.PNG", "deep", "deep/er", "", "a.png/", "a\0.png", "\ud800.png"])
def test_a_name_that_is_not_there_is_named(kind, name, folder):
    """Folders are no pictures, and capital letters count."""
    file = KINDS[kind](folder)
    if name == "a.png/":                                    # normal form takes the slash away, as Path does
        assert Archive(file).open(name).read_bytes() == (folder / "a.png").read_bytes()
        return
    with pytest.raises(BadExample, match="does not exist in .*, which holds 5 files, such as .*png. Names"):
        Archive(file).open(name)


def test_a_broken_picture_in_an_archive_is_named(folder):
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadExample) as e:
        read_image(pictures(as_tar(folder)).path("a.png"))
    name = f"{as_tar(folder)}/a.png"
    assert str(e.value) == (f"picture {name} can't be read (UnidentifiedImageError: cannot identify image "
                            f"file '{name}'). Replace it or drop the example")


def test_of_two_pictures_with_one_name_the_last_counts(folder):
    """As when it is unpacked."""
    file = as_tar(folder)
    picture(folder / "a.png", (1, 2, 3))
    with tarfile.open(file, "a") as tar:
        tar.add(folder / "a.png", "./a.png")
    assert np.array(read_image(Archive(file).open("a.png")))[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_link_in_a_tar_is_refused(link, folder):
    getattr(folder / "link.png", link)(folder / "A.png")
    archive, made = Archive(as_tar(folder)), tarfile.open(as_tar(folder))
    linked = next(each.name for each in made if each.issym() or each.islnk())
    with pytest.raises(BadExample, match="is a link or has holes. Make the archive with tar's --deref"):
        archive.open(linked)


def test_a_link_in_a_zip_is_refused(folder):
    file = as_zip(folder)
    with zipfile.ZipFile(file, "a") as out:
        head = zipfile.ZipInfo("link.png")
        head.external_attr = 0o120777 << 16
        out.writestr(head, "/etc/passwd")
    with pytest.raises(BadExample, match="picture link.png in .* is a link"):
        Archive(file).open("link.png")


# -- archives that can't be used -----------------------------------------------------------------------------

def test_a_compressed_archive_is_one_sentence(folder):
    whole = as_tar(folder).read_bytes()
    for name, raw, kind in (("t.tar.gz", gzip.compress(whole), "gzip"),
                            ("t.tar.zst", b"\x28\xb5\x2f\xfd" + whole, "zstd")):
        folder.with_name(name).write_bytes(raw)
        with pytest.raises(UserError, match=rf"--image_dir .*{name} is compressed \({kind}\), .* Write an"):
            pictures(folder.with_name(name))
    with pytest.raises(UserError, match=r"zip: 5 of its 5 files are compressed, such as .*png. Write an"):
        pictures(as_zip(folder, zipfile.ZIP_DEFLATED))


@every_archive
def test_an_archive_that_was_cut_off_is_found_at_the_start(kind, folder):
    """At every place: in a head, in a picture, between two."""
    whole = KINDS[kind](folder).read_bytes()
    end = len(whole) if kind == "zip" else whole.rindex(b"IEND") // 512 * 512 + 512     # zeros: without loss
    for size in {0, 1, 511, 512, 513, 1024, end // 2, *range(0, end, 512), *range(7, end, 997), end - 1}:
        folder.with_name("cut").write_bytes(whole[:size])
        with pytest.raises(UserError, match="is no folder, and can't be read as an uncompressed .zip or"):
            pictures(folder.with_name("cut"))


def test_a_tar_that_is_damaged_in_its_middle_is_found_at_the_start(folder):
    """tarfile alone takes a damaged head for the end, and the pictures behind it would be missing."""
    whole = bytearray(as_tar(folder).read_bytes())
    whole[whole.index(b"./deep/er/b.png") + 1] ^= 1
    folder.with_name("bad.tar").write_bytes(whole)
    with tarfile.open(folder.with_name("bad.tar")) as tar:
        assert len(tar.getmembers()) < 9
    with pytest.raises(UserError, match=r"behind byte [\d,]+ it is cut off or damaged"):
        pictures(folder.with_name("bad.tar"))


def test_a_file_that_is_no_archive_is_one_sentence(folder):
    with pytest.raises(UserError, match="a.png is no folder, and can't be read as an uncompressed"):
        pictures(folder / "a.png")


def test_random_damage_gives_pictures_or_one_sentence(folder):
    rng, opened = random.Random(0), 0
    for i in range(60):
        raw = bytearray(KINDS[rng.choice(list(KINDS))](folder).read_bytes())
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        folder.with_name(f"damaged{i}").write_bytes(raw)
        try:
            archive = Archive(folder.with_name(f"damaged{i}"))
            for name in NAMES:
                read_image(archive.open(name))
            opened += 1
        except UserError as e:
            assert "damaged" in str(e) and str(e).isprintable(), i
    assert 5 < opened < 55


def test_an_archive_that_changes_while_it_is_read_is_named(folder):
    file = as_tar(folder)
    archive = Archive(file)
    archive.open("a.png")
    with open(file, "ab") as out:
        out.write(b"\0" * 512)
    with pytest.raises(BadExample, match="can't be read from .* now .it was changed since the start"):
        archive.open("a.png")


# -- the list of names ---------------------------------------------------------------------------------------

@every_archive
def test_the_list_of_names_is_made_once_and_kept(kind, folder, monkeypatch):
    file = KINDS[kind](folder)
    before = Archive(file)
    monkeypatch.setattr(Archive, "_look_through", lambda self: pytest.fail("it was looked through again"))
    after = Archive(file)
    assert [after[i] for i in range(5)] == [before[i] for i in range(5)] == sorted(
        name.encode() for name in NAMES)
    assert np.array_equal(before.places, after.places)
    assert after.open("A.png").read_bytes() == (folder / "A.png").read_bytes()


def test_the_list_of_another_archive_is_never_taken(folder):
    file = as_tar(folder)
    Archive(file)
    (folder / "a.png").unlink()
    with pytest.raises(BadExample, match="a.png does not exist in .*, which holds 4 files"):
        Archive(as_tar(folder)).open("a.png")


def as_npz(arrays):
    np.savez(stream := io.BytesIO(), **arrays)
    return stream.getvalue()


def test_a_broken_list_is_made_again(folder):
    file = as_tar(folder)
    Archive(file)
    kept, = folder.parent.glob(".images*.index.npz")
    whole = kept.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    lists = [{"names": np.zeros(3, np.uint8), "ends": np.array(ends), "places": np.array(places)}
             for ends, places in (([9], [[0, 0]]), ([2, 1, 3], [[0, 0]] * 3), ([3], [[0, 2 ** 62]]),
                                  ([3], [[-9, 1]]), ([3], [[0, 0, 0]]))]
    for broken in (b"", whole[:-9], bytes(damaged), *map(as_npz, lists)):
        kept.write_bytes(broken)
        assert len(Archive(file)) == 5 and kept.read_bytes() == whole


def test_in_a_read_only_folder_the_list_is_made_each_time(folder, monkeypatch, capsys):
    def refuse(*_, **__):                                   # not by chmod: root may write everywhere
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "savez", refuse)
    assert len(Archive(as_tar(folder))) == 5
    assert re.fullmatch(r"the list of .*tar can't be kept beside it \(Permission denied\); .*\n",
                        capsys.readouterr().out)


# -- in use --------------------------------------------------------------------------------------------------

def test_workers_read_one_archive_together(tmp_path):
    """Forked ones share the open file. If they shared its place, too, pictures would be mixed up."""
    (tmp_path / "images").mkdir()
    for i in range(200):
        picture(tmp_path / "images" / f"{i}.png", (i, 255 - i, 7))
    turns = talk("<image>\nWhat is it?", "A cat.")
    rows = [{"image": f"{i}.png", "conversations": turns} for i in range(200)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    data = Conversations(tmp_path / "d.json", language(), pictures(as_tar(tmp_path / "images")), 512)
    assert data[0]["images"][0][0][0, 0, 0] == 0            # the file was used before the workers begin
    loader = torch.utils.data.DataLoader(data, 10, collate_fn=collate, num_workers=2)
    seen = torch.cat([batch["pixel_values"][0][:, 0, 0, 0] for batch in loader])
    assert seen.tolist() == list(range(200))


def test_a_process_that_is_not_forked_opens_the_file_itself(folder):
    archive = pickle.loads(pickle.dumps(Archive(as_tar(folder))))
    assert archive.file is None and archive.open("a.png").read_bytes() == (folder / "a.png").read_bytes()


def test_check_takes_an_archive_in_place_of_the_folder(folder, tmp_path, capsys):
    rows = [{"image": name, "conversations": talk("<image>\nWhat is it?", "A cat.")} for name in NAMES]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    said = []
    for where in (folder, as_zip(folder)):
        assert check.check(check.CheckConfig(file=str(tmp_path / "d.json"), image_dir=str(where))) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "5 examples, 0 wrong · 5 one picture" in said[1]


def test_the_page_offers_pictures_from_an_archive(folder, tmp_path):
    """serve.py's; the bytes are those of the file."""
    (tmp_path / "d.json").write_text(json.dumps(
        [{"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.")}]))
    cfg = config.Config(train_json=str(tmp_path / "d.json"), image_dir=str(as_tar(folder)))
    run = SimpleNamespace(cfg=cfg, policy=None, dataset=lambda path, where: Conversations(
        path, language(), pictures(where), 512))
    assert list(desk.examples(run)) == [("What is it?", [(folder / "a.png").read_bytes()])]


def test_each_file_of_a_policy_may_have_an_archive_of_its_own(folder, tmp_path):
    """--stage vla takes one --image_dir for each file."""
    (tmp_path / "robot.json").write_text(json.dumps(
        [{"instruction": "go", "steps": [{"image": "a.png", "action": [0.1 * i]} for i in range(9)]}]))
    (tmp_path / "talk.json").write_text(json.dumps(
        [{"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cat.")}]))
    robot = as_tar(folder)
    picture(folder / "a.png", (1, 2, 3))
    cfg = config.Config(stage="vla", ckpt="x", image_dir=f"{robot},{as_zip(folder)}", prompt="plain",
                        train_json=f"{tmp_path / 'robot.json'},{tmp_path / 'talk.json'}")
    lang = Language(make_tokenizer("gpt2", filler=600), PROMPTS["plain"])
    about = lang, Pictures(cfg.image_dir, [transform()]), 512
    _, files = actions.open_episodes(cfg, lang, about)
    assert [file[0]["images"][0][0][:, 0, 0].tolist() for file in files] == [[0, 7, 255], [1, 2, 3]]
    # The page of a policy asks it to act: it offers steps of robots, whichever file comes first.
    turned = {name: ",".join(reversed(getattr(cfg, name).split(","))) for name in ("train_json", "image_dir")}
    run = SimpleNamespace(cfg=dataclasses.replace(cfg, **turned), policy=True, dataset=lambda path, where: (
        actions.Episodes(path, lang, pictures(where), 512, files[0].policy)))
    assert [question for question, _ in desk.examples(run)] == ["go"] * 9
    # So does the check of what is converted.
    model = SimpleNamespace(llm=SimpleNamespace(config=SimpleNamespace()))
    run = SimpleNamespace(cfg=run.cfg, language=lang, transforms=[transform()], model=model,
                          actions=files[0].policy.saved())
    examples, are_own = llava.own_examples(run)
    assert are_own and "to go?" in examples[0][0][0]["value"]


def test_a_run_on_an_archive_is_the_run_on_the_folder(world, tmp_path, monkeypatch):  # noqa: F811
    """With two data workers; bit for bit."""
    packed = shutil.make_archive(str(tmp_path / "images"), "tar", world / "images")
    flags = "--max_steps", "2", "--num_workers", "2", "--image_dir"
    for name, where in (("folder", world / "images"), ("tar", packed)):
        train_here(monkeypatch, world, tmp_path / name, *flags, str(where))
    one, two = (load_file(tmp_path / name / "r" / "step-00000002" / "model.safetensors")
                for name in ("folder", "tar"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
