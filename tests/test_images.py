"""images.py: resizing, normalizing, preprocessor files."""
import numpy as np
import pytest
import torch
from helpers import save_preprocessor, save_vision, square, transform
from PIL import Image
from transformers import CLIPConfig

from images import load_image_transforms


def red(resize, image, size, mean=(0.5,) * 3):
    """The red channel of what the backbone gets, back in 0..255."""
    view = transform(resize, size, 1, mean, (0.25,) * 3, resample=0)(image)
    assert view.shape == (3, size, size) and view.dtype == torch.float32
    return ((view[0] * 0.25 + mean[0]) * 255).round().int().tolist()


def columns(*values):
    """A picture of two rows."""
    return Image.fromarray(np.array([[[value] * 3 for value in values]] * 2, np.uint8))


def test_each_way_to_make_a_picture_square():
    wide = columns(10, 20, 30, 40)
    assert red("resize-naive", wide, 2) == [[20, 40], [20, 40]]                             # squashed
    assert red("resize-crop", wide, 2) == [[20, 30], [20, 30]]                              # the sides cut
    assert red("letterbox", wide, 4, (0.2, 0.4, 0.6)) == [[51] * 4, *[[10, 20, 30, 40]] * 2, [51] * 4]
    tall = wide.transpose(Image.Transpose.ROTATE_270)                                       # 10 is on top
    assert red("resize-naive", tall, 2) == [[20, 20], [40, 40]]
    assert red("resize-crop", tall, 2) == [[20, 20], [30, 30]]
    assert red("letterbox", tall, 4, (0.2, 0.4, 0.6)) == [[51, n, n, 51] for n in (10, 20, 30, 40)]


def test_a_letterbox_is_filled_with_the_mean_color_which_becomes_zero():
    view = transform("letterbox", 4, 1, (0.2, 0.4, 0.6))(columns(10, 20, 30, 40))
    assert view[:, 0].tolist() == [[0.0] * 4] * 3           # 51, 102, 153 are 0.2, 0.4, 0.6 exactly


@pytest.mark.parametrize("resize", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_a_picture_of_any_shape_becomes_square(resize, size):
    assert transform(resize)(Image.new("RGB", size)).shape == (3, 16, 16)


def test_pixels_are_normalized_by_mean_and_std():
    view = transform(mean=(0.5, 0.0, 1.0), std=(0.5, 0.25, 2.0))(Image.new("RGB", (3, 3), (255, 255, 0)))
    assert view[:, 0, 0].tolist() == [1.0, 4.0, -0.5]


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PREPROCESSORS = {                                           # as the models' files say it, but all 16 pixels
    "siglip": square(16) | {"resample": 3},
    "clip": {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "size": {"shortest_edge": 16},
             "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "clip, older file": {"crop_size": 16, "do_center_crop": True, "size": 16, "resample": 3,
                         "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "dinov2": {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True,
               "size": {"shortest_edge": 18}, "resample": 2,
               "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "no crop": {"size": {"shortest_edge": 16}, "do_center_crop": False, "image_mean": [0.1] * 3,
                "image_std": [0.2] * 3}}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_size_mean_and_std_come_from_the_preprocessor_file(name, tmp_path):
    settings = PREPROCESSORS[name]
    folder = save_vision(tmp_path, name.split(",")[0], preprocessor=settings)
    got, = load_image_transforms(folder, "letterbox")
    assert (got.size, got.patches, got.resize) == (16, 4, "letterbox")
    assert got.resample == settings.get("resample", 3)
    for tensor, key in ((got.mean, "image_mean"), (got.std, "image_std")):
        assert torch.equal(tensor.flatten(), torch.tensor(settings[key]))


def test_a_whole_clip_folder_serves_as_a_vision_backbone(tmp_path):
    CLIPConfig(vision_config={"patch_size": 4, "image_size": 16}).save_pretrained(tmp_path)
    folder = save_preprocessor(tmp_path, PREPROCESSORS["clip"])
    assert load_image_transforms(folder, "resize-naive")[0].patches == 16


def test_two_backbones_may_have_different_sizes_but_the_same_patches(tmp_path):
    one = save_vision(tmp_path / "a")
    two = save_vision(tmp_path / "b", "clip", image_size=32, patch_size=16)
    got = load_image_transforms(f"{one},{two}", "letterbox")
    assert [(t.size, t.patches) for t in got] == [(16, 4), (32, 4)]
