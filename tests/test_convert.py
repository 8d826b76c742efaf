"""convert.py, llava.py, openvla.py, weights.py: in and out, on tiny models of the real architectures."""
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import KINDS, make_tokenizer, save_preprocessor, square, talk
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, CLIPVisionModel,
                          Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel,
                          GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, PhiConfig, PhiForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel)

import chat
import checkpoint
import convert
import llava
import openvla
import weights
from actions import ActionTokens
from config import Config, UserError
from convert import ConvertConfig
from generate import Assistant
from model import load_vision, make_projector
from prompts import IMAGE, Language, tokenize

SIZE = dict(hidden_size=64, num_hidden_layers=2, image_size=16, patch_size=8)
DINO = dict(**SIZE, num_attention_heads=1, mlp_ratio=2)
OTHER = dict(**SIZE, num_attention_heads=1, intermediate_size=128)
TOWERS = {"clip": lambda: CLIPVisionModel(CLIPVisionConfig(**OTHER)),
          "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**OTHER)),
          "siglip-gelu": lambda: SiglipVisionModel(SiglipVisionConfig(**OTHER, hidden_act="gelu")),
          "siglip-no-head": lambda: SiglipVisionModel(SiglipVisionConfig(**OTHER, vision_use_head=False)),
          "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
          "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
              **DINO, num_register_tokens=4))}
BODY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
LLMS = {"llama": lambda rows: LlamaForCausalLM(LlamaConfig(
            vocab_size=rows, **BODY, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
        "qwen-tied": lambda rows: Qwen2ForCausalLM(Qwen2Config(
            vocab_size=rows, **BODY, tie_word_embeddings=True)),
        "gpt2": lambda rows: GPT2LMHeadModel(GPT2Config(
            vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1,
            eos_token_id=2)),
        "phi": lambda rows: PhiForCausalLM(PhiConfig(vocab_size=rows, **BODY))}
ODD = [(37, 53), (53, 37), (16, 16), (9, 64)]               # pictures' sizes


def randomize(model, scale=0.2):
    """Larger than a fresh model's weights, so that a wrong number shows in the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale + (1 if parameter.ndim == 1 else 0))
    return model


def save_tower(folder, kind, preprocessor=None):
    randomize(TOWERS[kind]()).save_pretrained(folder)
    return save_preprocessor(folder, preprocessor or square(16, (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)))


def make_run(folder, towers=("siglip",), llm="llama", tokenizer="llama", spare=0,
             trained=("projector", "llm"), actions=None, preprocessor=None, **settings):
    """A run folder as train.py writes it, with random weights -> its path."""
    tower_folders = ",".join(save_tower(folder / f"tower-{i}", kind, preprocessor)
                             for i, kind in enumerate(towers))
    words = tokenizer if not isinstance(tokenizer, str) else make_tokenizer(
        tokenizer, chat=settings.get("prompt") == "chatml", filler=300 if actions else 0)
    words.save_pretrained(folder / "llm")
    model = randomize(LLMS[llm](len(words) + spare))
    model.save_pretrained(folder / "llm")
    cfg = Config(**{"stage": "vla" if actions else "full-finetune", "ckpt": "x", "train_json": "none.json",
                    "image_dir": ".", "vision_backbone": tower_folders, "llm_backbone": str(folder / "llm"),
                    "prompt": "plain", **settings})
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(cfg)))
    projector = randomize(make_projector(cfg.projector, 64 * len(towers), 32))
    tensors = {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    if "llm" in trained:
        randomize(model, 0.25)                              # other weights than the backbone's folder holds
        tensors |= checkpoint.tensors_of(torch.nn.ModuleDict({"llm": model}), {"llm"})
    state = {"parts": [part for part in ("projector", "llm") if part in trained]}
    checkpoint.save(run, 1, tensors, {"random.0": torch.zeros(1)},
                    state | ({"actions": actions} if actions else {}), keep=1)
    return run


def export(run, out, to="llava"):
    convert.main(ConvertConfig(ckpt=str(run), to=to, out=str(out)))
    return out


def bring_in(source, out, **flags):
    convert.main(ConvertConfig(from_=str(source), out=str(out), **flags))
    return out


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def theirs(folder):
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32,
                                                               output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return processor, model.eval()


def typed(turns):
    """The same messages with a part for each picture, as other clients write them."""
    messages = llava.messages_of(turns)
    for message in messages:
        count = message["content"].count("<image>\n")
        text = message["content"].replace("<image>\n", "")
        message["content"] = [{"type": "image"}] * count + [{"type": "text", "text": text}]
    return messages


CONVERSATIONS = [
    (1, ("<image>\nWhat is it?",)), (0, ("What is it?",)), (2, ("<image>\n<image>\nWhat is it?",)),
    (2, ("Is <image> like <image>?", "A cat.", "How many?")),
    (1, ("<image>\nWhat is it?", "A cat.", "How many?", "Two.", "  What color?\n")),
    (0, ("What is it?", "", "How many?"))]
# towers, llm, tokenizer, prompt, resize, picture's place, projector, spare rows
CASES = [("clip", "llama", "llama", "vicuna", "letterbox", "tag", "gelu-mlp", 0),
         ("siglip", "gpt2", "gpt2", "plain", "resize-naive", "first", "gelu-mlp", 0),
         ("dinov2", "qwen-tied", "qwen", "chatml", "resize-crop", "tag", "linear", 100),
         ("siglip-no-head", "llama", "llama", "llama2", "resize-crop", "first", "gelu-mlp", 3),
         ("clip", "qwen-tied", "smollm", "chatml", "letterbox", "first", "linear", 0),
         ("dinov2", "llama", "phi", "phi", "resize-naive", "first", "gelu-mlp", 0)]


@pytest.mark.parametrize("tower,llm,tokenizer,prompt,resize,place,projector,spare", CASES)
def test_the_llava_folder_answers_as_we_do(tower, llm, tokenizer, prompt, resize, place, projector, spare,
                                           tmp_path, capsys):
    run = make_run(tmp_path, (tower,), llm, tokenizer, spare, prompt=prompt, image_resize=resize,
                   picture_place=place, projector=projector)
    folder = export(run, tmp_path / "out")
    assert "the same ids and pixels, logits differ by 0 of" in capsys.readouterr().out
    ours, (processor, model) = Assistant(run, "cpu"), theirs(folder)
    image_id, written = model.config.image_token_index, []
    for i, (count, texts) in enumerate(CONVERSATIONS):
        turns, pictures = talk(*texts), [picture(ODD[(i + k) % 4], k) for k in range(count)]
        row = {"image": ["?"] * count, "conversations": turns}
        ids, _ = tokenize(row, ours.language, 4, 512, ask=True)
        for messages in (llava.messages_of(turns), typed(turns)):
            if count == 2 and "Is " in texts[0] and messages[0]["content"] != texts[0]:
                continue                                    # between words: only a tag says where
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=text, images=pictures or None, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == [image_id if i == IMAGE else i for i in ids], text
        written.append((text, pictures))
        example = {"input_ids": torch.tensor(ids), "images": [ours.transforms and [ours.transforms[0](image)]
                                                              for image in pictures]}
        pixels = [torch.stack([view[0] for view in example["images"]])] if pictures else []
        if pictures:
            assert torch.equal(inputs["pixel_values"], pixels[0])
        with torch.no_grad():
            x = ours.model.embed(example["input_ids"][None], pixels)
            want, got = ours.model.llm(inputs_embeds=x).logits, model(**inputs).logits
            assert (got[..., :want.shape[-1]] - want).abs().max() == 0
            new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:].tolist()
        assert new == ours.answer_ids([example], 8)[0]
    texts, pictures = [text for text, _ in written], [image for _, images in written for image in images]
    batch = processor(text=texts, images=pictures, return_tensors="pt", padding=True)       # on the left
    with torch.no_grad():
        new = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1]:]
    for (text, images), ids in zip(written, new):
        alone = processor(text=text, images=images or None, return_tensors="pt")
        alone = model.generate(**alone, max_new_tokens=8)[0, alone["input_ids"].shape[1]:].tolist()
        assert ids.tolist()[:len(alone)] == alone


def test_an_align_run_goes_out_as_a_captioner(tmp_path):
    run = make_run(tmp_path, llm="gpt2", tokenizer="gpt2", trained=("projector",), stage="align", ckpt="")
    ours, (processor, model) = Assistant(run, "cpu"), theirs(export(run, tmp_path / "out"))
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=text, images=[picture((30, 20))], return_tensors="pt")
    ids, _ = tokenize({"image": ["?"], "conversations": talk("<image>")}, ours.language, 4, 512, ask=True)
    assert inputs["input_ids"][0].tolist() == llava.with_image(ids, model.config.image_token_index)
    assert text == "<image>"                                # gpt2 has no BOS, and no question was ever asked


@pytest.mark.parametrize("prompt", sorted(chat.PROMPTS.keys() - {"openvla", "openvla-v01", "prismatic-phi"}))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["first", "tag"])
def test_every_format_has_a_chat_template_with_its_ids(kind, prompt, place, tmp_path):
    tokenizer = make_tokenizer(kind, chat=prompt == "chatml")
    language = Language(tokenizer, chat.PROMPTS[prompt], place=place)
    run = SimpleNamespace(language=language, ckpt="r", actions={}, cfg=SimpleNamespace(
        llm_backbone=str(tmp_path), prompt=prompt))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    image_id, written = llava.write_tokenizer(run, tmp_path / "out")
    llava.write_template(run, tmp_path / "out", written, image_id)
    text = (tmp_path / "out/chat_template.jinja").read_text()
    for count, texts in CONVERSATIONS:
        ids, _ = tokenize({"image": ["?"] * count, "conversations": talk(*texts)}, language, 1, 512, ask=True)
        got = written.apply_chat_template(llava.messages_of(talk(*texts)), chat_template=text, tokenize=False)
        got = written(got)["input_ids"]                     # with the tokenizer's own special tokens: none
        assert got == [image_id if i == IMAGE else i for i in ids]


def test_a_wrong_glue_gives_other_ids():
    language = Language(make_tokenizer("llama"), chat.PROMPTS["plain"])
    run = SimpleNamespace(language=language)
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    wanted = [llava.with_image(ids, image_id) for ids in llava.probe_ids(language)]
    same = {glue: [a == b for a, b in zip(wanted, llava.template_ids(run, glue, tokenizer), strict=True)]
            for glue in ("", " ")}
    assert all(same[" "]) and not any(same[""])


def test_a_message_of_another_kind_is_refused_by_the_template(tmp_path):
    processor, _ = theirs(export(make_run(tmp_path, llm="gpt2", tokenizer="gpt2"), tmp_path / "out"))
    question = {"role": "user", "content": "Why?"}
    with pytest.raises(Exception, match="trained without system messages"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}, question], tokenize=False)
    with pytest.raises(Exception, match="no video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


@pytest.mark.parametrize("parts,text", [
    (["<", "What is it?"], "<image>\nWhat is it?"), (["What is it?", "<"], "What is it?\n<image>"),
    (["<", "<", "Alike?"], "<image>\n<image>\nAlike?"),
    (["Is ", "<", " like ", "<", "?"], "Is <image> like <image>?"),
    (["One:\n", "<", "Two:\n", "<", "Alike?"], "One:\n<image>\nTwo:\n<image>\nAlike?")])
def test_parts_of_a_message_become_the_text_that_people_write(parts, text, tmp_path):
    run = make_run(tmp_path, llm="gpt2", tokenizer="gpt2", picture_place="tag")
    processor, _ = theirs(export(run, tmp_path / "out"))
    parts = [{"type": "image"} if part == "<" else {"type": "text", "text": part} for part in parts]
    got, want = (processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
                 for content in (parts, text))
    assert got == want == f"In: {text}\nOut:"


def test_a_folder_in_bfloat16_is_half_as_large_and_is_compared_as_such(tmp_path, capsys):
    run = make_run(tmp_path)
    convert.main(ConvertConfig(ckpt=str(run), to="llava", out=str(tmp_path / "half"), bf16=True))
    export(run, tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert 1.9 < sizes[1] / sizes[0] < 2.1
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert capsys.readouterr().out.count("logits differ by 0 of") == 2


def test_the_files_say_what_other_programs_and_older_versions_need(tmp_path):
    run = make_run(tmp_path, ("clip",), prompt="vicuna", image_resize="letterbox")
    out = export(run, tmp_path / "out")
    names = set(load_file(out / "model.safetensors"))
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight",
            "multi_modal_projector.linear_2.bias", "vision_tower.vision_model.pre_layrnorm.weight"} <= names
    assert not any(name.startswith("model.") for name in names)
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["padding_side"] == "left" and tokenizer["eos_token"] == "</s>"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 5000.0 and config["torch_dtype"] == "float32"
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["text_config"]["vocab_size"] % 64 == 0 and config["image_aspect_ratio"] == "pad"
    assert config["image_seq_length"] == 4 and config["vision_feature_select_strategy"] == "default"
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_processor_type"] == "LlavaImageProcessor" and pixels["do_pad"] is True
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["eos_token_id"] == 2
    for part in ("vision_config", "text_config"):           # transformers 4 obeys these
        assert config[part]["torch_dtype"] == config[part]["dtype"] == "float32"
        assert "_name_or_path" not in config[part]
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n# out\n")
    assert 'folder = "out"' in text and "logits differ by 0 of" in text and str(tmp_path) not in text
    assert "vLLM: can serve it" in text
    assert pixels["image_mean"] == [0.48, 0.45, 0.4]
    assert (out / "model.safetensors").stat().st_mode & 0o044       # others may read it, if the umask says so
    # What vLLM's _detect_content_format looks for: a loop over the parts of a message.
    assert "for part in message['content']" in (out / "chat_template.jinja").read_text()


def test_a_new_row_is_the_mean_of_the_old_and_spare_rows_are_used_first(tmp_path):
    full, spare = tmp_path / "full", tmp_path / "spare"
    full.mkdir(), spare.mkdir()
    rows = []
    for folder, extra in ((full, 0), (spare, 5)):
        out = export(make_run(folder, llm="llama", tokenizer="llama", spare=extra), folder / "out")
        table = load_file(out / "model.safetensors")["language_model.model.embed_tokens.weight"]
        image = json.loads((out / "config.json").read_text())["image_token_index"]
        rows.append((len(table), image, len(make_tokenizer("llama"))))
        if not extra:
            old = table[:len(make_tokenizer("llama"))]
            torch.testing.assert_close(table[image], old.mean(0), rtol=1e-5, atol=1e-6)
    (grown, image, words), (same, spare_image, _) = rows
    assert grown % 64 == 0 and grown > words == image       # the next id behind the last word
    assert same == words + 5 and spare_image == words


def test_pictures_of_another_size_than_the_towers_table(tmp_path):
    run = make_run(tmp_path, ("siglip",), preprocessor=square(32))
    _, model = theirs(export(run, tmp_path / "out"))
    assert model.config.vision_config.image_size == 32      # 4 x 4 patches, the table fitted once for all


UNITS = {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "mask": [True, True], "mean": [0.0, 2.0],
                    "std": [1.0, 1.0], "min": [-1.0, 0.0], "max": [1.0, 4.0]},
         "num_transitions": 9, "num_trajectories": 2}
POLICY = {"end": 700, "bins": 256, "pictures": 1, "statistics": {"toy": UNITS}}
REFUSED = {
    "registers": (dict(towers=("registers",)), "llava", "registers would stay"),
    "three layers": (dict(projector="fused-gelu-mlp"), "llava", "three layers"),
    "two towers": (dict(towers=("registers", "siglip")), "llava", "two vision backbones"),
    "a head with a bias": (dict(llm="phi"), "llava", "a bias in its output layer"),
    "no policy": (dict(towers=("registers", "siglip"), projector="fused-gelu-mlp"), "openvla",
                  "is no policy"),
    "other towers": (dict(towers=("clip",), actions=True), "openvla", "clip_vision_model, gelu-mlp, llama"),
    "another llm": (dict(towers=("registers", "siglip"), projector="fused-gelu-mlp", llm="gpt2",
                         actions=True), "openvla", "fused-gelu-mlp, gpt2"),
    "a letterbox": (dict(towers=("registers", "siglip"), projector="fused-gelu-mlp",
                         image_resize="letterbox", actions=True), "openvla", "knows resize-naive only"),
    "two cameras": (dict(towers=("registers", "siglip"), projector="fused-gelu-mlp", actions="two"),
                    "openvla", "several pictures"),
    "a picture at its tag": (dict(towers=("registers", "siglip"), projector="fused-gelu-mlp", actions=True,
                                  picture_place="tag"), "openvla", "at its tag"),
    "chunks": (dict(towers=("siglip",), actions={"chunk": 4}), "openvla", "is a policy with --chunk; who"),
    "slots": (dict(towers=("siglip",), actions={"chunk": 4, "decode": "parallel"}), "llava",
              "is a policy with --chunk, --decode parallel; who reads"),
    "a state": (dict(towers=("siglip",), actions={"statistics": {"toy": UNITS | {"state": UNITS["action"]}}}),
                "openvla", "is a policy with --state; who reads this form asks for one action"),
    "augmented": (dict(towers=("siglip",), augment=True, actions=True), "llava", "--augment")}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_form_cannot_express_is_refused_before_anything_is_written(why, tmp_path):
    settings, to, sentence = REFUSED[why]
    if settings.get("actions"):
        more = settings["actions"] if isinstance(settings["actions"], dict) else {}
        settings = settings | {"actions": POLICY | {"pictures": 1 + (settings["actions"] == "two")} | more}
    run = make_run(tmp_path, **settings)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        export(run, tmp_path / "out", to)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_differs_never_gets_its_name(tmp_path, monkeypatch):
    right = llava.llava_tensors

    def wrong(run, rows):
        for name, tensor in right(run, rows):
            yield name, tensor + 0.1 * (name == "multi_modal_projector.linear_1.bias")
    monkeypatch.setattr(llava, "llava_tensors", wrong)
    run = make_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="logits of the folder and of .* differ by"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags,sentence", [
    ({}, "give --from SOURCE"), ({"from_": "a", "ckpt": "b", "to": "llava", "out": "c"}, "give --from"),
    ({"ckpt": "b", "out": "c"}, "give --from"), ({"from_": "a", "out": "."}, "--out . exists"),
    ({"from_": "a", "out": "x" * 300}, "can't be the name"), ({"from_": "a", "out": "a,b"}, "can't be the"),
    ({"from_": "a", "out": "run/step-00000009"}, "can't be"),
    ({"from_": "a", "out": "c", "bf16": True}, "--bf16"),
    ({"ckpt": "a", "to": "llava", "out": "c", "prompt": "plain"}, "--prompt")])
def test_wrong_flags_are_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        ConvertConfig(**flags)


# -- LLaVA in ------------------------------------------------------------------------------------------------

def llava_folder(folder, kind="clip", tokenizer="llama", old=False):
    """As transformers saves it, with the files of llava-hf -> folder."""
    words = make_tokenizer(tokenizer)
    words.add_tokens(["<image>", "<pad>"], special_tokens=True)
    config = LlavaConfig(
        vision_config=TOWERS[kind]().config.to_dict(), image_seq_length=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        text_config=LLMS["llama"](-(-len(words) // 64) * 64).config.to_dict(),
        vision_feature_select_strategy="full" if kind == "siglip" else "default")
    randomize(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    save_preprocessor(folder, square(16, (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)) | {
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True,
        "image_processor_type": "CLIPImageProcessor"})
    if not old:                                             # names as transformers 5 holds them in memory
        tensors = load_file(folder / "model.safetensors")
        new = {name.replace("language_model.model.", "model.language_model.")
               .replace("language_model.lm_head", "lm_head").replace("vision_tower.", "model.vision_tower.")
               .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
               for name, tensor in tensors.items()}
        assert not any(name.startswith("language_model.") for name in new)
        save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind,old", [("clip", True), ("clip", False), ("siglip", True), ("dinov2", True)])
def test_a_llava_folder_becomes_a_run_with_its_logits(kind, old, tmp_path):
    source = llava_folder(tmp_path / "source", kind, old=old)
    ours = Assistant(bring_in(source, tmp_path / "run"), "cpu")
    assert ours.cfg.image_resize == "resize-crop" and ours.cfg.picture_place == "tag"
    assert ours.cfg.prompt == "llava"
    model = LlavaForConditionalGeneration.from_pretrained(source).eval()
    example = ours.example("<image>\nWhat is it?", [picture((37, 53))])
    shown = ours.language.tokenizer.decode([i if i != IMAGE else 0 for i in example["input_ids"].tolist()])
    assert shown.replace("<unk>", "#") == "<s> USER: #### \nWhat is it? ASSISTANT:"
    pixels = torch.stack([views[0] for views in example["images"]])                 # uint8, as in a file
    ids = torch.where(example["input_ids"] == IMAGE, model.config.image_token_index, example["input_ids"])
    with torch.no_grad():
        want = model(input_ids=ids[None], pixel_values=ours.transforms[0].normal(pixels)).logits
        got = ours.model.llm(inputs_embeds=ours.model.embed(example["input_ids"][None], [pixels])).logits
    assert (got - want).abs().max() == 0


def test_a_llava_folder_in_and_out_gives_the_same_tensors(tmp_path):
    source = llava_folder(tmp_path / "source", old=True)
    out = export(bring_in(source, tmp_path / "run"), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    before = {name.replace("vision_tower.", "vision_tower.vision_model.").replace("vision_model.vision_model",
                                                                                  "vision_model"): tensor
              for name, tensor in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("llm,tokenizer", [("gpt2", "gpt2"), ("llama", "llama"), ("llama", "phi")])
def test_an_export_comes_back_as_the_run_it_was(llm, tokenizer, tmp_path):
    (tmp_path / "vicuna").mkdir()                           # around a model that is none
    run = make_run(tmp_path / "vicuna", llm=llm, tokenizer=tokenizer, image_resize="letterbox", prompt="auto")
    back = bring_in(export(run, tmp_path / "out"), tmp_path / "back")
    one, other = Assistant(run, "cpu"), Assistant(back, "cpu")
    found = other.cfg.prompt, other.cfg.image_resize, other.cfg.picture_place
    assert found == ("plain", "letterbox", "first")
    example = [each.example("What is it?", [picture((30, 50))]) for each in (one, other)]
    assert torch.equal(example[0]["input_ids"], example[1]["input_ids"])
    assert torch.equal(example[0]["images"][0][0], example[1]["images"][0][0])
    assert one.answer_ids(example[:1], 8) == other.answer_ids(example[1:], 8)
    assert one.language.bos == other.language.bos == ([1] if tokenizer == "llama" else [])
    assert one.language.tokenizer.eos_token == other.language.tokenizer.eos_token
    folder = tmp_path / "out"
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(told | {"probes": [[1, 2, 3]]}))
    with pytest.raises(UserError, match="its tokenizer was changed since"):
        bring_in(folder, tmp_path / "again")


@pytest.mark.parametrize("change,sentence", [
    ({"vision_feature_layer": -1}, "vision_feature_layer is -1; only -2"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ({"model_type": "blip-2"}, "its model_type is 'blip-2'")])
def test_a_llava_that_we_cannot_be_is_refused_by_name(change, sentence, tmp_path):
    source = llava_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        bring_in(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


NORM, HEAD = "language_model.model.norm.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize("change,sentence", [
    (lambda tensors: tensors.pop(NORM), "1 tensors are missing, such as model.norm.weight"),
    (lambda tensors: tensors.update({"vision_tower.extra": torch.ones(2)}), "extra is .* no such tensor"),
    (lambda tensors: tensors.update({HEAD: torch.ones(2, 2)}), r"lm_head.weight is \(2, 2\)")])
def test_a_llava_folder_with_wrong_tensors_leaves_nothing_behind(change, sentence, tmp_path):
    source = llava_folder(tmp_path / "source", old=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        bring_in(source, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name,tensor,sentence", [
    ("multi_modal_projector.linear_1.weight", torch.ones(3, 3), r"projector: projector.0.weight is \(3, 3\)"),
    ("multi_modal_projector.linear_9.weight", torch.ones(3, 3), "no such tensor"),
    (NORM, torch.ones(32, dtype=torch.int8), "weights must be dense floats"),
    (NORM, torch.full((32,), float("nan")), "not finite")])
def test_a_tensor_that_is_no_weight_is_refused(name, tensor, sentence, tmp_path):
    source = llava_folder(tmp_path / "source", old=True)
    tensors = load_file(source / "model.safetensors") | {name: tensor}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        bring_in(source, tmp_path / "run")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise weights.SafetensorError("No space left on device (os error 28)")
    run = make_run(tmp_path)
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="can't be written .*No space left.* name another --out"):
        export(run, tmp_path / "out")


# -- OpenVLA and Prismatic -----------------------------------------------------------------------------------

def timm_tower(kind):
    """A tower under timm's names, made without our own maps where the shapes allow it."""
    width, hidden, places = 64, 128, 4
    shapes = {"patch_embed.proj.weight": (width, 3, 8, 8), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}
    for i in range(3):
        for name, out, inp in (("attn.qkv", 3 * width, width), ("attn.proj", width, width),
                               ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, inp), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        if kind == "dino":
            shapes |= {f"blocks.{i}.ls{k}.gamma": (width,) for k in (1, 2)}
    if kind == "dino":
        shapes |= {"cls_token": (1, 1, width), "reg_token": (1, 4, width), "pos_embed": (1, places, width)}
    if kind == "siglip":
        shapes |= {"pos_embed": (1, places, width), "attn_pool.latent": (1, 1, width),
                   "attn_pool.q.weight": (width, width), "attn_pool.q.bias": (width,),
                   "attn_pool.kv.weight": (2 * width, width), "attn_pool.kv.bias": (2 * width,),
                   "attn_pool.proj.weight": (width, width), "attn_pool.proj.bias": (width,),
                   "attn_pool.norm.weight": (width,), "attn_pool.norm.bias": (width,),
                   "attn_pool.mlp.fc1.weight": (hidden, width), "attn_pool.mlp.fc1.bias": (hidden,),
                   "attn_pool.mlp.fc2.weight": (width, hidden), "attn_pool.mlp.fc2.bias": (width,)}
    if kind == "clip":
        del shapes["patch_embed.proj.bias"]
        shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 1 + places, width),
                   "norm_pre.weight": (width,), "norm_pre.bias": (width,)}
    generator = torch.Generator().manual_seed(len(kind))
    return {name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
            for name, shape in shapes.items()}


PROJECTOR = {"fused-gelu-mlp": (512, 32, 32), "gelu-mlp": (32, 32)}


def projector_tensors(kind, vision_width):
    projector = randomize(make_projector(kind, vision_width, 32))
    return dict(projector.state_dict())


def openvla_folder(folder):
    """OpenVLA's shards, on a tiny scale -> folder."""
    folder.mkdir()
    words = make_tokenizer("llama", filler=300)
    words.save_pretrained(folder)
    base, rows = len(words), -(-(len(words) + 1) // 64) * 64
    llm = randomize(LLMS["llama"](rows))
    tensors = {f"vision_backbone.featurizer.{name.replace('.gamma', '.scale_factor')}": tensor
               for name, tensor in timm_tower("dino").items()}
    tensors |= {f"vision_backbone.fused_featurizer.{name}": t for name, t in timm_tower("siglip").items()}
    names = {"0": "fc1", "2": "fc2", "4": "fc3"}
    tensors |= {f"projector.{names[name[0]]}{name[1:]}": tensor
                for name, tensor in projector_tensors("fused-gelu-mlp", 128).items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in llm.state_dict().items()}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    middle = len(tensors) // 2
    places = {}
    for i, names in enumerate((sorted(tensors)[:middle], sorted(tensors)[middle:]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    text = llm.config.to_dict() | {"torch_dtype": "bfloat16"}
    statistics = {"bridge": {"action": {name: POLICY["statistics"]["toy"]["action"][name] for name in (
        "q01", "q99", "mean", "std", "min", "max")}, "num_transitions": 5, "num_trajectories": 1}}
    rounded = [0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375]
    (folder / "config.json").write_text(json.dumps({
        "model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], "image_sizes": [16, 16],
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "vision_backbone_id": "dinosiglip-vit-so-224px", "arch_specifier": "no-align+fused-gelu-mlp",
        "llm_backbone_id": "llama2-7b-pure",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_resize_strategy": "resize-naive", "text_config": text, "norm_stats": statistics,
        "pad_to_multiple_of": rows - base, "use_fused_vision_backbone": True}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "means": [rounded[0], [0.5] * 3], "stds": [rounded[1], [0.5] * 3]}))
    return folder, tensors, base


def test_openvla_becomes_a_policy_with_its_units_and_goes_out_with_the_same_tensors(tmp_path, capsys):
    source, tensors, base = openvla_folder(tmp_path / "source")
    run = bring_in(source, tmp_path / "run")
    policy = Assistant(run, "cpu")
    assert policy.cfg.stage == "vla" and policy.cfg.prompt == "openvla"
    assert policy.policy.end == base and list(policy.policy.statistics) == ["bridge"]
    assert policy.transforms[0].mean.flatten().tolist() == [0.484375, 0.455078125, 0.40625]
    action = policy.act([[picture((30, 20))]], ["Pick up the cup."])
    assert action.shape == (1, 1, 2) and (-1 <= action[0, 0, 0] <= 1) and (0 <= action[0, 0, 1] <= 4)
    example = policy.example(policy.policy.question("Pick up the Cup."), [picture((30, 20))])
    text = policy.language.tokenizer.decode([i for i in example["input_ids"].tolist() if i != IMAGE])
    assert text == "<s> In: What action should the robot take to pick up the cup?\nOut: "
    # The empty token that OpenVLA has in front of its actions.
    assert policy.language.tokenizer.convert_ids_to_tokens(int(example["input_ids"][-1])) == "▁"

    out = export(run, tmp_path / "out", "openvla")
    written = weights.Tensors(out)
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["vocab_size"] - config["pad_to_multiple_of"] == base
    assert config["norm_stats"]["bridge"]["action"]["q99"] == [1.0, 4.0]
    assert "features of a picture differ by 0 of" in capsys.readouterr().out


@pytest.mark.parametrize("change,sentence", [
    ({"pad_to_multiple_of": -1}, "the action ids would end at"),
    ({"pad_to_multiple_of": 64.0}, "would end at"), ({"norm_stats": {}}, "can't be used"),
    ({"norm_stats": {"a": {"action": {"q01": [1e308], "q99": [1e308]}}}}, "beyond 1e9"),
    ({"norm_stats": [1]}, "can't be used"), ({"llm_backbone_id": "mine"}, "its language model is 'mine'"),
    ({"timm_model_ids": ["resnet", "x"]}, "vision tower resnet is not known"),
    ({"timm_model_ids": 3}, "can't be read as what its config.json says"),
    ({"text_config": {"model_type": "llama", "num_hidden_layers": 10 ** 7}}, "its config.json is broken")])
def test_a_broken_openvla_folder_is_one_sentence(change, sentence, tmp_path):
    source, _, _ = openvla_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        bring_in(source, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [source]


def test_a_policy_of_vicuna_gets_vicunas_prompt(tmp_path):
    source, _, _ = openvla_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"llm_backbone_id": "vicuna-v15-7b"}))
    policy = Assistant(bring_in(source, tmp_path / "run"), "cpu")
    example = policy.example(policy.policy.question("go"), [picture((30, 20))])
    text = policy.language.tokenizer.decode([i for i in example["input_ids"].tolist() if i != IMAGE])
    assert text.endswith("USER: What action should the robot take to go? ASSISTANT: ")
    out = export(tmp_path / "run", tmp_path / "out", "openvla")
    assert "USER: What action should the robot take to {}? ASSISTANT: " in (out / "README.md").read_text()


@pytest.mark.parametrize("change", [
    {"size": {"shortest_edge": 20}}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5},
    {"do_resize": False}])
def test_pixels_that_no_resize_of_ours_makes_are_refused(change, tmp_path):
    source = llava_folder(tmp_path / "source")
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match="makes other pixels than any"):
        bring_in(source, tmp_path / "run")


def test_a_run_whose_data_is_gone_or_broken_goes_out_with_made_up_examples(tmp_path, capsys):
    for i, text in enumerate(("", "[", json.dumps([{"image": "gone.png", "conversations": talk(
            "<image>\nWhy?", "So.")}]), json.dumps([{"x": 1}]))):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "d.json").write_text(text)
        run = make_run(folder, llm="gpt2", tokenizer="gpt2", train_json=str(folder / "d.json"),
                       image_dir=str(folder))
        export(run, folder / "out")
    assert capsys.readouterr().out.count("3 made-up examples") == 4


def test_a_run_in_another_prompt_than_it_was_trained_with_does_not_go_out(tmp_path):
    run = make_run(tmp_path, llm="gpt2", tokenizer="gpt2")
    state = json.loads((run / "step-00000001/state.json").read_text())
    state["prompt"] = ["You are Other. ", "b", "c", "d", None]
    (run / "step-00000001/state.json").write_text(json.dumps(state))
    for use in (lambda: export(run, tmp_path / "out"), lambda: Assistant(run, "cpu")):
        with pytest.raises(UserError, match="was trained with the prompt format .*You are Other"):
            use()


def test_a_run_that_trained_no_projector_goes_out_with_that_of_its_seed(tmp_path, capsys):
    run = make_run(tmp_path, llm="gpt2", tokenizer="gpt2")
    file = run / "step-00000001"
    tensors = load_file(file / "model.safetensors")
    checkpoint.save(run, 2, {name: t for name, t in tensors.items() if name.startswith("llm.")},
                    {"random.0": torch.zeros(1)}, {"parts": ["llm"]}, keep=1)
    export(run, tmp_path / "out")
    assert "logits differ by 0 of" in capsys.readouterr().out


def test_ids_of_actions_are_openvlas(tmp_path):
    _, _, base = openvla_folder(tmp_path / "source")
    for end in (base, 600):
        policy = ActionTokens.load(POLICY | {"end": end})
        values = np.stack([np.linspace(-1.5, 1.5, 999)] * 2, axis=1)
        wanted = end - np.digitize(np.clip(values, -1, 1), np.linspace(-1, 1, 256))
        physical = values * [1, 2] + [0, 2]                 # q01 -> -1, q99 -> 1
        assert (policy.encode(physical, "toy") == wanted).all()


@pytest.mark.parametrize("arch,vision_id,timm", [
    ("no-align+fused-gelu-mlp", "dinosiglip-vit-so-224px", ("dino", "siglip")),
    ("gelu-mlp", "clip-vit-l-336px", ("clip",)), ("linear", "siglip-vit-so400m", ("siglip",))])
@pytest.mark.parametrize("parts", ["all", "llm", "projector"])
def test_a_prismatic_run_is_imported(arch, vision_id, timm, parts, tmp_path):
    folder, words = tmp_path / "prismatic", make_tokenizer("llama")
    half = LLMS["llama"](len(words)).half()                 # as the hub's: the file that is read has fp32
    size = 336 if "336" in vision_id else 224
    (folder / "checkpoints").mkdir(parents=True)
    words.save_pretrained(tmp_path / "llama")
    half.save_pretrained(tmp_path / "llama")
    kind = arch.split("+")[-1]
    projector = projector_tensors(kind, 64 * len(timm))
    llm = randomize(LLMS["llama"](-(-(len(words) + 1) // 64) * 64))
    vision, official = {}, []
    for i, name in enumerate(timm):
        prefix = "featurizer" if len(timm) == 1 else f"{name}_featurizer"
        tower = timm_tower(name)
        side = size // 8
        tower["pos_embed"] = torch.randn(1, side * side + (name == "clip"), 64)
        vision |= {f"{prefix}.{key}": tensor for key, tensor in tower.items()}
        official.append(save_tower(tmp_path / f"official-{i}", {"dino": "registers"}.get(name, name)))
    model = {"projector": {f"projector.{key}" if kind != "linear" else f"projector.{key[2:]}": tensor
                           for key, tensor in projector.items()}}
    if parts != "projector":
        model["llm_backbone"] = {f"llm.{key}": tensor for key, tensor in llm.state_dict().items()}
    if parts == "all":
        model["vision_backbone"] = vision
    torch.save({"model": model, "optimizer": {"state": {}}}, folder / "checkpoints/latest-checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model": {
        "vision_backbone_id": vision_id, "llm_backbone_id": "llama2-7b-pure", "arch_specifier": arch,
        "image_resize_strategy": "resize-naive", "llm_max_length": 2048}}))
    run = bring_in(folder, tmp_path / "run", llm_backbone=str(tmp_path / "llama"),
                   vision_backbone="" if parts == "all" else ",".join(official))
    ours = Assistant(run, "cpu")
    assert ours.cfg.projector == kind and ours.cfg.prompt == "plain" and ours.cfg.stage == "full-finetune"
    assert ours.transforms[0].size == size and ours.transforms[0].patches == (size // 8) ** 2
    if kind != "linear":
        assert torch.equal(ours.model.projector[0].weight, projector["0.weight"])
    if parts != "projector":
        assert torch.equal(ours.model.llm.lm_head.weight, llm.lm_head.weight)
        assert torch.equal(convert.load_run(run).model.llm.lm_head.weight, llm.lm_head.weight)  # not rounded
    siglip = [tower.config for tower in ours.model.vision.models if "siglip" in tower.config.model_type]
    assert all(config.hidden_act == "gelu" for config in siglip)                            # timm's
    ours.answer([ours.example("What is it?", [picture((30, 20))])], 3)


def test_a_file_that_is_a_program_is_not_run(tmp_path):
    folder = tmp_path / "prismatic"
    (folder / "checkpoints").mkdir(parents=True)

    class Program:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)
    with open(folder / "checkpoints/latest-checkpoint.pt", "wb") as file:
        pickle.dump({"model": Program()}, file)
    torch.save({"model": Program()}, folder / "checkpoints/step-000001.pt")
    (folder / "config.json").write_text(json.dumps({"model": {
        "vision_backbone_id": "clip-vit-l", "llm_backbone_id": "phi-2-3b", "arch_specifier": "linear",
        "image_resize_strategy": "letterbox"}}))
    for file in (folder, folder / "checkpoints/step-000001.pt"):
        with pytest.raises(UserError, match="can't be read as a Prismatic checkpoint"):
            bring_in(file, tmp_path / "run")
    assert not (tmp_path / "it ran").exists()


def test_what_prismatic_names_and_we_do_not_know_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/a.pt").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model": {
        "vision_backbone_id": "in1k-vit-l", "llm_backbone_id": "llama2-7b-pure", "arch_specifier": "linear",
        "image_resize_strategy": "letterbox"}}))
    with pytest.raises(UserError, match="its backbones are 'in1k-vit-l' and 'llama2-7b-pure'. Known: clip"):
        bring_in(tmp_path, tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps({"vla": {"base_vlm": "mine"}}))
    with pytest.raises(UserError, match="its base_vlm is 'mine'"):
        bring_in(tmp_path, tmp_path / "run")


# What timm 0.9.16 computes with these very tensors: the first three channels of each patch. Its class is
# VisionTransformer, for clip with pre_norm, quick_gelu and eps 1e-5; get_intermediate_layers(n={1}).
TIMM = {"dinov2_with_registers": [2.9632983, 0.8386192, 8.1204033, 2.6552992, 0.8984365, 8.4392472,
                                  2.2447529, 1.1606867, 5.1058860, 1.6952400, 0.7673881, 5.1811771],
        "siglip_vision_model": [20.2825222, 14.5847979, -2.5235257, 19.7778568, 14.1630135, -2.6849744,
                                18.3836098, 13.8486309, -2.7974391, 18.5382614, 13.4233418, -3.1337833],
        "clip_vision_model": [5.0474100, 6.9582229, 4.2269897, 5.2885847, 7.2890534, 3.4592466,
                              3.9143744, 6.9707770, 2.6195693, 4.2732134, 7.3848538, 2.3677320]}


@pytest.mark.parametrize("kind", TIMM)
def test_an_imported_tower_computes_what_timm_computes(kind, tmp_path):
    timm = timm_tower(kind.split("_")[0].removesuffix("v2"))
    config, tensors, preprocessor = openvla.timm_tower(kind, timm, 16, [0.5] * 3, [0.5] * 3)
    convert.write_tower(tmp_path / "tower", config, tensors, preprocessor)
    with torch.no_grad():
        features = load_vision(str(tmp_path / "tower"))([torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)])
    # Other kernels on another machine round otherwise: 1e-5 of the largest value.
    torch.testing.assert_close(features[0, :, :3].flatten(), torch.tensor(TIMM[kind]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip-no-head", "dinov2", "registers"])
def test_a_towers_names_go_to_timm_and_back(kind):
    model = randomize(TOWERS[kind]())
    ours = model.state_dict()
    back = weights.from_timm(model.config.model_type, weights.to_timm(model.config.model_type, ours))
    if kind == "registers":                                 # timm adds CLS and its place
        both = "embeddings.cls_token", "embeddings.position_embeddings"
        assert torch.equal(back[both[0]] + back[both[1]][:, :1], ours[both[0]] + ours[both[1]][:, :1])
        table = torch.cat([back[both[1]][:, :1], ours[both[1]][:, 1:]], dim=1)
        ours = {**ours, both[0]: back[both[0]], both[1]: table}
    if kind in ("dinov2", "registers"):
        back["embeddings.mask_token"] = ours["embeddings.mask_token"]                       # timm has none
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_weights_are_written_in_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", 100)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}          # 40 bytes each: 2, 2, 1
    weights.write_shards(tmp_path, tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json"]
    read = weights.Tensors(tmp_path)
    assert list(read) == list(tensors) and all(torch.equal(read[name], tensors[name]) for name in tensors)
