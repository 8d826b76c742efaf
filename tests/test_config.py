"""config.py and presets.py: what a command line becomes."""
import json
from dataclasses import asdict

import pytest

from config import MODEL_FIELDS, Config, UserError, parse, read_config

DATA = ["--train_json", "a.json", "--image_dir", "d"]


@pytest.mark.parametrize("stage,want", [
    (["--stage", "align"], (1e-3, 256, 1, 2048)),
    (["--stage", "finetune", "--no_align"], (2e-5, 128, 1, 2048))])
@pytest.mark.parametrize("named", [["--llm_backbone", "some/model"], ["--vision_backbone", "some/tower"]])
def test_a_named_backbone_gets_the_published_recipe(stage, want, named):
    cfg = parse(Config, stage + named + DATA)
    assert (cfg.learning_rate, cfg.global_batch_size, cfg.epochs, cfg.max_length) == want
    assert cfg.run_folder.name.startswith("published-") and cfg.val_json == cfg.prepare == ""
    assert parse(Config, ["--stage", "align", "--preset", "toy", *named]).learning_rate == 3e-3   # asked for


def test_the_published_recipe_brings_no_data(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--llm_backbone", "some/model"])
    assert "--train_json is missing: preset 'published' brings no data of its own" in capsys.readouterr().err


def test_llava_and_openvla_presets_say_what_these_models_need():
    llava = parse(Config, ["--preset", "llava-v1.5-7b", *DATA])
    assert (llava.image_resize, llava.picture_place, llava.prompt) == ("letterbox", "tag", "vicuna")
    prism = parse(Config, ["--preset", "prism-dinosiglip-7b", *DATA])
    assert prism.openvla_vision and prism.image_resize == "resize-naive" and prism.prompt == "plain"


def test_what_belongs_to_the_model_comes_from_the_checkpoint(tmp_path):
    first = parse(Config, ["--llm_backbone", "m", "--picture_place", "tag", "--openvla_vision", *DATA])
    (tmp_path / "config.json").write_text(json.dumps(asdict(first)))
    second = parse(Config, ["--stage", "finetune", "--ckpt", str(tmp_path), *DATA])
    assert [getattr(second, name) for name in MODEL_FIELDS] == [getattr(first, name) for name in MODEL_FIELDS]
    assert second.learning_rate == 2e-5 and second.preset == "published"


def test_a_run_that_is_older_than_a_flag_gets_its_default(tmp_path):
    saved = asdict(parse(Config, DATA))
    del saved["picture_place"], saved["openvla_vision"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path).picture_place == "first"
    del saved["prompt"]                                     # this one every run of this program has
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="can't be read"):
        read_config(tmp_path)


# -- --config ------------------------------------------------------------------------------------------------

def saved_in(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return ["--config", str(folder / "config.json")]


def test_a_run_is_repeated_by_its_config_json_and_flags_win_over_it(tmp_path):
    run = parse(Config, ["--stage", "finetune", "--no_align", "--epochs", "9", "--seed", "3", "--augment",
                         *DATA])
    flags = saved_in(tmp_path, **asdict(run), started="2026-01-01 0a")
    again = parse(Config, flags)
    assert asdict(again) == asdict(run) | {"config": flags[1]}
    assert parse(Config, ["--config", str(tmp_path)]).epochs == 9               # the folder of a run
    other = parse(Config, [*flags, "--epochs", "2", "--no-augment"])
    assert (other.epochs, other.augment, other.seed) == (2, False, 3)


def test_a_short_config_json_says_the_preset_and_the_stage_of_the_rest(tmp_path):
    flags = saved_in(tmp_path, stage="finetune", no_align=True, preset="llava-v1.5-7b", learning_rate=1,
                     train_json="a.json", image_dir="d")
    cfg = parse(Config, flags)
    assert (cfg.learning_rate, cfg.global_batch_size, cfg.prompt) == (1, 128, "vicuna")
    assert parse(Config, [*flags, "--stage", "align", "--ckpt", ""]).global_batch_size == 256


def test_overwrite_is_not_taken_from_a_config_json(tmp_path):
    """Or the line that repeats a run would delete it."""
    run = parse(Config, ["--overwrite", "--config", saved_in(tmp_path, seed=4)[1], *DATA])
    assert run.overwrite and run.seed == 4
    assert not parse(Config, saved_in(tmp_path, **asdict(run))).overwrite


def test_the_model_of_a_checkpoint_that_is_a_flag_wins_over_the_file(tmp_path):
    (tmp_path / "run").mkdir()
    saved_in(tmp_path / "run", **asdict(parse(Config, ["--llm_backbone", "theirs", *DATA])))
    flags = saved_in(tmp_path, **asdict(parse(Config, ["--llm_backbone", "ours", "--epochs", "5", *DATA])))
    cfg = parse(Config, [*flags, "--ckpt", str(tmp_path / "run")])
    assert (cfg.llm_backbone, cfg.epochs) == ("theirs", 5)
    # Also where the two have other presets: nobody gave the flag --preset.
    flags = saved_in(tmp_path, **asdict(parse(Config, ["--preset", "llava-v1.5-7b", *DATA])))
    assert parse(Config, [*flags, "--ckpt", str(tmp_path / "run")]).preset == "published"
    flags = saved_in(tmp_path, ckpt=str(tmp_path / "run"), image_resize="letterbox")
    # Both stand in the file: there its own words win over its --ckpt.
    assert parse(Config, [*flags, *DATA]).image_resize == "letterbox"


@pytest.mark.parametrize("fields, said", [
    ({"learnig_rate": 1e-3}, "there is no flag 'learnig_rate'. Did you mean 'learning_rate'?"),
    ({"xyzzy": 1}, "there is no flag 'xyzzy'"),
    ({"epochs": "3"}, "epochs can't be '3'"), ({"epochs": 3.0}, "epochs can't be 3.0"),
    ({"epochs": None}, "epochs can't be None"), ({"augment": 1}, "augment can't be 1"),
    ({"stage": "fine"}, "stage can't be 'fine'"), ({"stage": ["align"]}, "stage can't be ['align']"),
    ({"seed": True}, "seed can't be True"), ({"ckpt": 7}, "ckpt can't be 7")])
def test_a_field_that_is_unknown_or_mistyped_is_named(fields, said, tmp_path, capsys):
    flags = saved_in(tmp_path, **fields)
    with pytest.raises(SystemExit):
        parse(Config, [*flags, *DATA])
    assert f"--config {flags[1]}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [(None, "there is no such file"), ("[]", "it holds no JSON object"),
                                        ("{", "Expecting property name"), ("[" * 10 ** 5, "can't be read")])
def test_a_file_that_is_no_config_is_named(text, said, tmp_path, capsys):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(SystemExit):
        parse(Config, ["--config", str(tmp_path / "c.json"), *DATA])
    printed = capsys.readouterr().err
    assert said in printed and "Give a config.json, such as a run's own" in printed
