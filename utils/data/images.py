"""Image bytes to uint8 pixels, as a Hugging Face image processor does it before it rescales and normalises.

This module uses plain Pillow. It gives the same pixels 1.2 times (large photographs) to 2.4 times (small images) as
fast. The models take ``pixel_values`` in [0, 1] and normalise inside, so that attacks work on pixels. Here pixels are
uint8, which needs a quarter of float32's memory and of its copy to the GPU.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from utils.errors import UserError

# Pillow warns above this: 341 MiB at four bytes per pixel. It is fixed here because libraries lift Pillow's own limit.
# It also bounds a resized image: 1 x 60,000 pixels would become 3e9.
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535  # pixels, as in JPEG; the resizing filter alone takes 32 bytes for each pixel of a side
MAX_OUTPUT_SIDE = 4096  # models take 224 to 1024
MAX_PROFILE_BYTES = 1 << 20  # of a colour profile that is kept; the usual ones take 0.5 to 4 KiB
MAX_IMAGE_BYTES = 256 << 20  # of an encoded image: three bytes for each of MAX_PIXELS, without any compression

# torchvision, and so open_clip, rounds half a pixel of a centre crop to the even number, transformers down. The image
# processor of a model in open_clip's layout has this attribute. Its saved file keeps it, transformers ignores it.
CROP_ROUNDING = "crop_rounding"

# By default Pillow tries every format it knows on untrusted bytes, even PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
OWN_FORMATS = (*FORMATS, "TIFF", "AVIF")  # also allowed for the user's own pictures when shards are made of them

# Keys of ``image.info`` that may hold an orientation. A TIFF has it in its own tags, and Pillow applies it.
NOTES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_T = Image.Transpose
TURNED = (_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90)  # these swap height and width
# EXIF's orientation, 2 to 8 -> the transposition that makes the picture upright.
UPRIGHT = dict(enumerate((_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.FLIP_TOP_BOTTOM, *TURNED), start=2))

_BLOCK = bytes(512)
_NOT_ZERO = re.compile(rb"[^\0]")


class ImageError(ValueError):
    """The bytes are not a complete image; the text says why."""


@dataclass(frozen=True)
class ImageTransform:
    """Converts to 8-bit RGB (transparency on white), rotates upright by EXIF, resizes and crops the centre.

    Colour profiles and gamma are ignored, as the image processors do.

    resize: length of the shorter edge, where the longer one keeps the proportions and is rounded down; or exactly
        (height, width); or None for no resizing.
    crop: (height, width) cut from the centre, with a black frame if the image is smaller; or None.
    resample: number of Pillow's filter; 3 is bicubic.
    even: half a pixel of the crop's place is rounded to the even number, as in open_clip, else down, as in
        transformers. Every second odd difference gives a crop one pixel further.
    draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size if that is still at least twice the target size. This is two to
        three times as fast, but pixels differ slightly: about 50 dB (34 to 44 dB if less than twice were enough).
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = int(Image.Resampling.BICUBIC)
    draft: bool = False
    even: bool = False

    @classmethod
    def from_processor(cls, image_processor: Any, *, draft: bool = False) -> ImageTransform:
        """Takes resizing and cropping from a Hugging Face image processor; UserError for unsupported settings.

        SigLIP 2's processor (NaFlex) fits an image of any proportions into a number of patches. Here the image is
        cropped to a square of as many patches. For square images the result is the same.
        """
        read, name = partial(_field, image_processor), type(image_processor).__name__
        known = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        for step in sorted(vars(image_processor)):
            if step.startswith("do_") and step not in known and getattr(image_processor, step):
                raise UserError(f"{name}: {step} is not supported; expected resizing and centre cropping only")
        resizes, crops = read("do_resize"), read("do_center_crop")
        resample = read("resample") if resizes else Image.Resampling.BICUBIC
        resize: int | tuple[int, int] | None = None
        crop: tuple[int, int] | None = None
        if name.startswith("Siglip2ImageProcessor"):
            if not resizes:
                raise UserError(f"{name}: do_resize false is not supported; images have to be of one size")
            side = math.isqrt(read("max_num_patches")) * read("patch_size")
            resize, crop = side, (side, side)
        else:
            if crops:
                crop = _sides(image_processor, "crop_size", ("height", "width"))
            if resizes and name.startswith("ConvNextImageProcessor"):
                # Below 384: resize to edge / crop_pct, then crop to the edge. From 384: resize to a square, no crop.
                edge = _sides(image_processor, "size", ("shortest_edge",))
                square = (edge, edge)
                resize = square if edge >= 384 else int(edge / read("crop_pct"))
                if resize != square and crop not in (None, square):
                    raise UserError(f"{name}: do_center_crop after the crop that crop_pct makes is not supported")
                crop = crop if resize == square else square
            elif resizes:
                resize = _sides(image_processor, "size", ("height", "width"), ("shortest_edge",))
        sides = [*(resize if isinstance(resize, tuple) else [resize]), *(crop or ())]
        if not all(side is None or 1 <= side <= MAX_OUTPUT_SIDE for side in sides):
            raise UserError(f"{name}: size {resize} and crop {crop}; expected 1 to {MAX_OUTPUT_SIDE} pixels a side")
        rounding = getattr(image_processor, CROP_ROUNDING, "floor")
        if rounding not in ("floor", "even"):
            raise UserError(f"{name}: {CROP_ROUNDING} is {rounding!r}; expected floor or even")
        return cls(resize, crop, int(resample), draft, even=rounding == "even")

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every output image, or None if it depends on the input image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pillow image -> uint8 tensor (3, H, W), 0 ... 255."""
        jpeg = image.format in ("JPEG", "MPO")
        if not jpeg:
            image.load()  # a PNG may store its orientation after its pixels
        turn = _turn(image)
        width, height = reversed(image.size) if turn in TURNED else image.size
        # Compute the target size from the original: a draft changes the size, and the proportions by a pixel.
        size = self._resized(width, height)
        # Pillow resizes the rows first, so between its two passes it holds the new width at the old height.
        if size is not None and (most := size[0] * max(size[1], height)) > MAX_PIXELS:
            raise ImageError(f"{width} x {height} would take {most} pixels to resize")
        box = None
        if self.draft and size is not None and jpeg and turn is None:
            # ``box`` is the picture's exact part of the draft, whose size is rounded up. Else 1201 x 1803 loses 13 dB.
            _, box = image.draft(None, (2 * size[0], 2 * size[1])) or (None, None)
        image = _to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        if size is not None:
            image = image.resize(size, resample=self.resample, box=box)
        if self.crop is not None:
            left, top = (self._half(image.width - self.crop[1]), self._half(image.height - self.crop[0]))
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))  # outside the image it is black
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _half(self, difference: int) -> int:
        """Where the crop begins, if the image is longer by ``difference``; below 0 in a shorter one."""
        if self.even:
            return round(difference / 2) if difference > 0 else -(-difference // 2)
        return difference // 2

    def _resized(self, width: int, height: int) -> tuple[int, int] | None:
        """(width, height) after resizing."""
        if self.resize is None:
            return None
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)


def resized_processor(image_processor: Any, side: int) -> Any:
    """A copy of an image processor that makes square images of ``side`` pixels, of the same part of each picture.

    What is resized before the crop keeps its proportion to it: 256 for 224 becomes 64 for 56. ConvNeXt's ``crop_pct``
    stays. UserError for a processor that resizes nothing, or to more than ``MAX_OUTPUT_SIDE``.
    """
    transform, name = ImageTransform.from_processor(image_processor), type(image_processor).__name__
    assert transform.output_size is not None  # ``published.image_size`` was asked when it was read
    before = transform.output_size[0]
    if side == before:
        return image_processor
    if transform.resize is None:
        fault = f"do_resize is false, so {side} px would show another part of each image than {before} px"
        raise UserError(f"{name}: {fault}; expected a processor that resizes")
    fields: dict[str, Any] = image_processor.to_dict()
    if name.startswith("Siglip2ImageProcessor"):
        fields["max_num_patches"] = (side // fields["patch_size"]) ** 2
    elif name.startswith("ConvNextImageProcessor"):
        fields["size"] = {"shortest_edge": side}
    elif isinstance(transform.resize, tuple):
        fields["size"] = dict(zip(("height", "width"), (round(edge * side / before) for edge in transform.resize)))
    else:
        fields["size"] = {"shortest_edge": round(transform.resize * side / before)}
    if fields.get("do_center_crop"):
        fields["crop_size"] = {"height": side, "width": side}
    resized = type(image_processor).from_dict(fields)
    ImageTransform.from_processor(resized)  # refuses sides that are too long
    return resized


def pixel_normalisation(image_processor: Any) -> tuple[list[float], list[float]]:
    """mean and std, three numbers each: for pixels x in [0, 1] the processor computes (x - mean) / std.

    The processor gets v = 255 x. With do_rescale it computes r v, r = rescale_factor, else v; with do_normalize then
    (. - image_mean) / image_std. So mean = image_mean / (255 r) and std = image_std / (255 r). For r = 1/255 these are
    the numbers in the file. UserError for fields that are not such numbers.
    """
    read = partial(_field, image_processor)
    scale, mean, std = 255.0, [0.0] * 3, [1.0] * 3
    if read("do_rescale"):
        scale *= read("rescale_factor")
    if read("do_normalize"):
        mean, std = ([*map(float, _three(read(name)))] for name in ("image_mean", "image_std"))
        if 0 in std:
            raise UserError(f"{type(image_processor).__name__}: image_std is {std}; expected numbers other than 0")
    return [value / scale for value in mean], [value / scale for value in std]


def normalisation_of_file(fields: dict[str, Any]) -> tuple[list[float], list[float]]:
    """``pixel_normalisation`` of a processor's file. Fields that the file leaves out get CLIP's values."""
    defaults = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    return pixel_normalisation(SimpleNamespace(**defaults | fields))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _three(value: Any) -> Sequence[Any]:
    """One value per channel; a single value is repeated."""
    return value if isinstance(value, (list, tuple)) else [value] * 3


# Fields of an image processor -> a check of the value, and its description. The check refuses values that transformers
# would silently read as another one: any text as true, an unknown filter as bilinear.
_FIELDS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("do_resize", "do_center_crop", "do_rescale", "do_normalize"): (
        lambda v: v in (None, False, True),
        "true or false",
    ),
    ("max_num_patches", "patch_size"): (lambda v: isinstance(v, int) and v > 0, "a whole number above 0"),
    ("resample",): (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v in [*Image.Resampling],
        "a filter of Pillow, 0 (nearest) to 5",
    ),
    ("rescale_factor",): (lambda v: _is_number(v) and v > 0, "a number above 0, such as 1/255"),
    ("crop_pct",): (lambda v: _is_number(v) and 0 < v <= 1, "a share of the image"),
    ("image_mean", "image_std"): (lambda v: [*map(_is_number, _three(v))] == [True] * 3, "one number, or three"),
}


def _field(image_processor: Any, name: str) -> Any:
    """The value of a field in ``_FIELDS``; UserError if its check fails."""
    value = getattr(image_processor, name, None)
    fits, expected = next(row for names, row in _FIELDS.items() if name in names)
    if not fits(value):
        raise UserError(f"{type(image_processor).__name__}: {name} is {value!r}; expected {expected}")
    return value


def _sides(image_processor: Any, name: str, *kinds: tuple[str, ...]) -> Any:
    """(height, width), or the shorter edge: the numbers stored under the keys of one of ``kinds``."""
    size = getattr(image_processor, name, None)
    found = {key: value for key, value in dict(size or {}).items() if value is not None}
    for keys in kinds:
        if set(found) == set(keys) and all(isinstance(value, int) for value in found.values()):
            return found[keys[0]] if len(keys) == 1 else tuple(found[key] for key in keys)
    expected = ", or ".join(" and ".join(keys) for keys in reversed(kinds))
    what = f"{name} {found or None} is not supported"
    raise UserError(f"{type(image_processor).__name__}: {what}; expected {expected}")


def decode(data: bytes, transform: ImageTransform, formats: tuple[str, ...] = FORMATS) -> torch.Tensor:
    """Encoded image -> uint8 tensor (3, H, W); ImageError unless it is a complete image within the limits above.

    The header is checked before pixels are decoded. Of an animation the first frame is used. Texts and colour profiles
    may be compressed too; Pillow limits them to 1 MiB each and 64 MiB in total.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
    if hole := _find_hole(data):
        raise ImageError(f"zeros from byte {hole[0]} to {hole[1]}, as where a disk has lost blocks")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                size = f"{image.width} x {image.height} pixels"
                raise ImageError(f"{size}, at most {MAX_PIXELS} of {MAX_SIDE} a side are decoded")
            return transform(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Depending on the damage, Pillow's readers raise OSError, SyntaxError, struct.error and others.
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def known_format(data: bytes) -> str:
    """jpg, png or webp, the extension for a shard, by the first bytes and not by a name; "" for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def encode(pixels: torch.Tensor, like: bytes, format: str, **options: Any) -> bytes:
    """uint8 (3, H, W) -> an encoded image, with the colour profile of ``like``, the encoded image it was made from.

    A profile for another colour space than RGB, such as CMYK, is left out.
    """
    with Image.open(io.BytesIO(like), formats=OWN_FORMATS) as image:
        profile = image.info.get("icc_profile")
    if profile and profile[16:20] == b"RGB " and len(profile) <= MAX_PROFILE_BYTES:
        options["icc_profile"] = profile
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, format, **options)
    return stream.getvalue()


def as_shard_member(data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an image for a shard: unchanged, or its pixels as PNG. ImageError if that fails."""
    if extension := known_format(data):
        return extension, data
    return "png", encode(decode(data, ImageTransform(resize=None, crop=None), OWN_FORMATS), data, "PNG")


def _find_hole(data: bytes) -> tuple[int, int] | None:
    """(start, end) in bytes of the first run of zeros that fills whole blocks, as a disk or a broken copy leaves it.

    JPEG and WebP decode such zeros without an error. Other formats have checksums, or use zeros for black. Lost blocks
    start at a multiple of the block size, as do files and members of a tar; zeros that belong to an image need not.
    """
    if known_format(data) not in ("jpg", "webp"):
        return None
    start = data.find(_BLOCK)
    while start >= 0:
        after = _NOT_ZERO.search(data, start)
        end = after.start() if after else len(data)
        whole = data[max(0, start - 2) : start] == b"\xff\xd9"  # padding after a complete JPEG
        if start % len(_BLOCK) == 0 and (end % len(_BLOCK) == 0 or end == len(data)) and not whole:
            return start, end
        start = data.find(_BLOCK, end)
    return None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the picture upright; None if there is no orientation, or it cannot be read."""
    if not NOTES & image.info.keys():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, TypeError and others of Pillow's reader
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB, with transparency on white. ImageError for pixel values on an unknown scale."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ImageError("one number of 32 bits a pixel, on an unknown scale; save it with 8 or 16 bits")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> its high bytes, as Pillow does for colours. For grey Pillow would make all above 255 white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
