"""A picture -> a tensor, exactly as transformers' processors make it.

A vision backbone knows pictures of one size, with the mean and the spread of color that it was trained on.
Both stand in its preprocessor_config.json. A picture of other proportions must first become a square, and
there are three ways to do that (--image_resize).
"""
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

from config import BadExample, UserError, printable


class Pictures:
    """Reads the pictures of an example: (3, size, size) uint8 tensors, one for each vision backbone.

    image_dir:  where names start: a folder, an uncompressed .zip or .tar. Names that lead out are refused.
    transforms: one ImageTransform for each backbone.
    augment:    changes a picture at random, (picture, rng) -> picture, in each epoch in another way.
    """

    def __init__(self, image_dir, transforms, augment=None, seed=0):
        self.transforms, self.augment, self.seed = transforms, augment, seed
        self.look_in(image_dir)
        # In shared memory: data workers live longer than an epoch and must learn of the next one.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def look_in(self, image_dir):
        self.image_dir, self.archive = Path(image_dir), None
        if self.image_dir.is_file():
            import archives
            self.archive = archives.Archive(self.image_dir)

    @property
    def patches(self):
        """Positions that one picture takes in the language model's input."""
        return self.transforms[0].patches

    def tensors(self, names, i):
        """File names of example i -> for each picture, one tensor for each backbone. Raises BadExample."""
        pictures = [read_image(self.path(name)) for name in names]
        if self.augment is not None:
            # From epoch and example alone: a run that continues sees the same crops, in any order of workers.
            rng = np.random.default_rng((self.seed, int(self.epoch), i))
            pictures = [self.augment(picture, rng) for picture in pictures]
        return [self.views(picture) for picture in pictures]

    def views(self, picture):
        """An open picture (PIL, RGB) -> one tensor for each backbone."""
        return [transform.resized(picture) for transform in self.transforms]

    def path(self, name):
        """Where a picture lies, for read_image: a path, or an open file in an archive. Raises BadExample."""
        if self.archive is not None:
            return self.archive.open(name)
        path = self.image_dir / name
        try:
            inside = path.resolve().is_relative_to(self.image_dir.resolve())
        except (OSError, ValueError, RuntimeError) as e:    # a link to itself, a zero byte, half a character
            raise BadExample(f"picture {printable(name, 400)} can't be read "
                             f"({type(e).__name__}: {printable(str(e), 400)}). Correct its name") from e
        if not inside:
            linked = not Path(name).is_absolute() and ".." not in Path(name).parts
            raise BadExample(f"picture {name} lies outside of --image_dir {self.image_dir}; "
                             + (f"a link leads to {path.resolve()}. Such links are refused: copy what is "
                                "there, or make a .tar (tar --dereference)" if linked
                                else "such paths are refused"))
        return path


# Pillow knows more, some by handing the file to another program (EPS to Ghostscript, for example).
Image.init()
FORMATS = [name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
           if name in Image.OPEN]                           # not every build of Pillow has AVIF


T = Image.Transpose
TURNS = dict(enumerate((T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270,
                        T.TRANSVERSE, T.ROTATE_90), start=2))                       # EXIF's Orientation


def upright(image):
    """Turned as its EXIF tag says. ImageOps.exif_transpose also writes the other tags anew, and fails where
    one of them makes no sense."""
    image.load()                                            # a TIFF turns itself here, and drops the tag
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                       # notes that can't be read; the pixels are well
        turn = None
    return image if turn is None else image.transpose(turn)


def read_image(path):
    """A picture file as RGB, as a person sees it: rotated by its EXIF tag, on white where it is transparent.
    Of an animation, the first frame. Raises BadExample where the file is missing or can't be decoded.
    """
    try:
        if not hasattr(path, "read") and Path(path).exists() and not Path(path).is_file():
            raise IsADirectoryError("this is no file")      # opening a named pipe would wait for ever
        with Image.open(path, formats=FORMATS) as file:
            image = upright(file)
            if image.mode == "F" or (image.mode == "I" and file.format != "PPM"):   # what value is white?
                raise ValueError("its pixels have 32 bits; save it with 8 or 16")
            if image.mode.startswith("I"):      # 16 bit: `convert` would clip everything above 255 to white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise BadExample(f"picture {path} does not exist. Paths are relative to --image_dir") from None
    except Exception as e:                              # decoders raise many kinds here; each means the same
        raise BadExample(f"picture {printable(str(path), 400)} can't be read "
                         f"({type(e).__name__}: {printable(str(e), 400)}). "
                         "Replace it or drop the example") from e


class ImageTransform:
    """A picture -> (3, size, size) float tensor for one backbone, by that backbone's own preprocessor file.
    `resized` is done where pictures are read, `normal` by VisionBackbone on its device: bytes travel between.

    resize: resize-naive squashes to a square; resize-crop brings the shorter side to size and cuts the other;
    letterbox pads with the mean color, then resizes. In this order and with this rounding each equals, bit
    for bit, the processors of the transformers library (on Pillow): resize-naive SigLIP's, resize-crop
    CLIP's, letterbox LLaVA's. before: done to a picture first. `patches`: how many the backbone makes of it.
    """

    def __init__(self, size, patch_size, mean, std, resample=3, resize="resize-naive", before=None):
        self.before = before
        self.size, self.resize, self.resample = size, resize, Image.Resampling(resample)
        self.patches = (size // patch_size) ** 2
        self.fill = tuple(int(255 * value) for value in mean)       # cut, not rounded: as LLaVA, Prismatic
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        if not (1 <= patch_size <= size <= 10 ** 4 and len(mean) == len(std) == 3 and min(std) > 0):
            raise ValueError(f"size {size}, patch size {patch_size}, mean {mean}, std {std}")

    def __call__(self, image):
        return self.normal(self.resized(image))

    def normal(self, pixels):                               # (..., 3, size, size) uint8
        return (pixels.float() / 255 - self.mean) / self.std

    def levels(self):
        """(3 * 256,) what `normal` makes of each value of each color. A GPU that computed it could round
        otherwise (torch multiplies by 1 / 255 there); a table has the same bits on every device."""
        return self.normal(torch.arange(256).expand(3, 1, 256)).flatten()

    def resized(self, image):
        image = self.before(image) if self.before else image
        size, (width, height) = self.size, image.size
        short, long = min(width, height), max(width, height)
        between = {"resize-crop": size * size * long // short, "letterbox": long * long}.get(self.resize, 0)
        if between > 2e8:                                   # 1 x 40,000 pixels would take gigabytes
            raise BadExample(f"a picture of {width} x {height} pixels is too narrow for {self.resize}. Cut "
                             "its long side, or drop the example; --image_resize resize-naive takes it")
        if self.resize == "resize-crop":
            other = int(size * long / short)
            image = image.resize((size, other) if width < height else (other, size), self.resample)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        elif self.resize == "letterbox":
            padded = Image.new("RGB", (long, long), self.fill)
            padded.paste(image, ((long - width) // 2, (long - height) // 2))
            image = padded.resize((size, size), self.resample)
        else:
            image = image.resize((size, size), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)                   # (3, size, size) uint8


def load_image_transforms(names, resize, as_openvla=False, before=None):
    """One ImageTransform for each backbone of a comma-separated list. as_openvla: see --openvla_vision."""
    from foreign import loading_options
    transforms = []
    for name in names.split(","):
        try:
            options = loading_options(name)
            settings, _ = BaseImageProcessor.get_image_processor_dict(name, **options)
            config = AutoConfig.from_pretrained(name, **options)
            config = getattr(config, "vision_config", config)
            size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
            if isinstance(size, dict):
                size = size.get("height") or size["shortest_edge"]
            mean, std = settings["image_mean"], settings["image_std"]
            if as_openvla:
                mean, std = (torch.tensor(numbers).bfloat16().tolist() for numbers in (mean, std))
            transforms.append(ImageTransform(size, config.patch_size, mean, std, settings.get("resample", 3),
                                             resize, before))
        except Exception as e:                          # also what is missing in them: KeyError 'image_mean'
            raise UserError(f"--vision_backbone {name}: config.json and preprocessor_config.json can't be "
                            f"loaded from it ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from e
    if len({transform.patches for transform in transforms}) > 1:
        found = " and ".join(f"{name} makes {t.patches}" for name, t in zip(names.split(","), transforms))
        raise UserError("--vision_backbone: joined backbones must make the same number of patches, "
                        f"but {found}. Choose versions whose (picture size / patch size) agree")
    return transforms
