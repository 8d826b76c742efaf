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
