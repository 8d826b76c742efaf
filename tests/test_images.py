"""images.py: resizing, normalizing, preprocessor files."""
import struct
import types

import numpy as np
import pytest
import torch
from helpers import dataset, language, save_preprocessor, save_vision, square, talk, transform
from PIL import Image, ImageOps
from transformers import CLIPConfig, CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from config import BadExample
from images import load_image_transforms, read_image
from model import VisionBackbone


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


# -- as transformers does it ---------------------------------------------------------------------------------

HALF = (0.5,) * 3, (0.5,) * 3
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("resize-naive", "resize-crop", "letterbox")
SIZES = [(37, 53), (53, 37), (1, 9), (9, 1), (224, 225), (640, 427), (300, 300), (16, 16), (1, 1)]


def of_transformers(resize, image, size, colors=HALF, resample=3):
    """SigLIP's processor squashes, CLIP's cuts the longer side, LLaVA's pads (on Pillow)."""
    square, about = {"height": size, "width": size}, {"image_mean": colors[0], "image_std": colors[1]}
    processor = {"resize-naive": lambda: SiglipImageProcessorPil(size=square, resample=resample, **about),
                 "resize-crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square,
                                                              resample=resample, **about),
                 "letterbox": lambda: LlavaImageProcessorPil(do_pad=True, size=square, do_center_crop=False,
                                                             resample=resample, **about)}[resize]()
    return processor(image, return_tensors="pt")["pixel_values"][0]


def noise(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.mark.parametrize("resize", KINDS)
@pytest.mark.parametrize("size", [16, 27, 224])
@pytest.mark.parametrize("colors", [HALF, CLIP, IMAGENET])
def test_each_way_equals_the_processors_of_transformers_bit_for_bit(resize, size, colors):
    for shape in SIZES:
        for resample in (2, 3):                             # bilinear, bicubic
            ours = transform(resize, size, 1, *colors, resample)(noise(shape))
            assert torch.equal(ours, of_transformers(resize, noise(shape), size, colors, resample)), shape


class Seeing(torch.nn.Module):
    """A vision model of one block that remembers the pixels it gets."""
    config, dtype = types.SimpleNamespace(model_type="siglip", hidden_size=1, image_size=224), torch.float32

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, pixels):
        self.seen = pixels
        return self.layers[0](pixels)


@pytest.mark.parametrize("resize", KINDS)
@pytest.mark.parametrize("colors", [HALF, CLIP, IMAGENET])
def test_a_backbone_that_gets_bytes_sees_what_the_processors_make_bit_for_bit(resize, colors):
    """Several pictures at once, and two backbones, each with its own mean and std."""
    pictures, other = [noise((640, 427)), noise((300, 300))], transform("resize-naive", 224, 1, *HALF)
    mine = transform(resize, 224, 1, *colors)
    models = Seeing(), Seeing()
    VisionBackbone(models, [other, mine])([torch.stack([each.resized(picture) for picture in pictures])
                                           for each in (other, mine)])
    assert models[0].seen.dtype == torch.float32
    for picture, first, second in zip(pictures, *(model.seen for model in models)):
        assert torch.equal(first, of_transformers("resize-naive", picture, 224, HALF))
        assert torch.equal(second, of_transformers(resize, picture, 224, colors))


def test_a_table_has_an_entry_for_each_byte_of_each_color():
    levels = transform(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25)).levels()
    assert levels[[0, 255, 256, 511, 512, 767]].tolist() == [0.0, 1.0, -1.0, 1.0, -4.0, 0.0]


def test_a_picture_resized_before_it_is_padded_would_be_caught():
    wide = noise((640, 427))
    padded = ImageOps.pad(wide, (224, 224), Image.Resampling.BICUBIC, color=(127,) * 3)
    assert not torch.equal(transform("resize-naive", 224)(padded), of_transformers("letterbox", wide, 224))


def saved(pixels):
    def make(folder):
        Image.fromarray(pixels).save(folder / "a.png")
        return folder / "a.png"
    return make


def rotated(folder):
    exif = Image.Exif()
    exif[0x0112] = 6                                        # hold it turned to the right
    noise((37, 53)).save(folder / "a.png", exif=exif)
    return folder / "a.png"


def rotated_tiff(folder):
    """Pillow turns a TIFF itself when its pixels are read: it must not be turned twice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((37, 53)).save(folder / "a.tiff", exif=exif)
    return folder / "a.tiff"


def with_broken_notes(folder):
    """Right way up after its first tag; a tag that no program could write again stands behind it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0128] = 6, 7
    data = exif.tobytes()
    at = data.index(b"\x28\x01\x03\x00") if data[6:8] == b"II" else data.index(b"\x01\x28\x00\x03")
    type_at = slice(at + 2, at + 4)                         # ResolutionUnit as text instead of a number
    data = data[:type_at.start] + (b"\x02\x00" if data[6:8] == b"II" else b"\x00\x02") + data[type_at.stop:]
    noise((37, 53)).save(folder / "a.png", exif=data)
    with Image.open(folder / "a.png") as file, pytest.raises(struct.error):    # Pillow itself gives up
        ImageOps.exif_transpose(file)
    return folder / "a.png"


def with_notes_that_are_none(folder):
    noise((37, 53)).save(folder / "a.png", exif=b"Exif\x00\x00garbage that is no TIFF")
    return folder / "a.png"


GREY = np.random.default_rng(1).integers(0, 256, (53, 37), np.uint8)
RED = np.dstack([np.full_like(GREY, 255), GREY * 0, GREY * 0])
FILES = {       # kind: (how the file is made, the pixels that a person sees)
    "transparent": (saved(np.dstack([RED, np.where(GREY < 99, 0, 255).astype(np.uint8)])),
                    np.where(GREY[..., None] < 99, np.uint8(255), RED)),
    "grey": (saved(GREY), np.dstack([GREY] * 3)),
    "16 bit": (saved(GREY.astype(np.uint16) * 256 + 77), np.dstack([GREY] * 3)),
    "rotated by EXIF": (rotated, np.rot90(np.array(noise((37, 53))), k=-1)),
    "rotated by EXIF, TIFF": (rotated_tiff, np.rot90(np.array(noise((37, 53))), k=-1)),
    "rotated, other notes broken": (with_broken_notes, np.rot90(np.array(noise((37, 53))), k=-1)),
    "notes that are none": (with_notes_that_are_none, np.array(noise((37, 53))))}


@pytest.mark.parametrize("resize", KINDS)
@pytest.mark.parametrize("kind", FILES)
def test_a_picture_file_equals_what_transformers_makes_of_what_a_person_sees(kind, resize, tmp_path):
    make, seen = FILES[kind]
    ours = transform(resize, 24, 8, *CLIP)(read_image(make(tmp_path)))
    assert torch.equal(ours, of_transformers(resize, Image.fromarray(np.ascontiguousarray(seen)), 24, CLIP))


@pytest.mark.parametrize("resize,size", [("resize-crop", (1, 100_000)), ("resize-crop", (100_000, 1)),
                                         ("letterbox", (1, 40_000)), ("letterbox", (40_000, 1))])
def test_a_picture_so_narrow_that_it_would_take_gigabytes_is_a_bad_example(resize, size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": talk("<image>\nWhat is it?", "A line.")}
    error = dataset(tmp_path, [row], language(), [transform(resize, 224, 16)])[0]
    assert isinstance(error, BadExample)
    assert f"a picture of {size[0]} x {size[1]} pixels is too narrow for {resize}" in str(error)
    naive = dataset(tmp_path, [row], language(), [transform("resize-naive", 224, 16)])[0]
    assert naive["images"][0][0].shape == (3, 224, 224)


# -- sizes and colors ----------------------------------------------------------------------------------------

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
