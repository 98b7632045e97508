"""Image bytes to uint8 pixels: what a Hugging Face image processor does before it rescales and normalises.

Plain Pillow, 1.2 (large photographs) to 2.4 times (small images) as fast as the processor, with the same pixels
(``tests/data/test_images.py`` compares them). The models take ``pixel_values`` in [0, 1] and normalise inside, so that attacks
work on pixels; what leaves here is uint8, a quarter of the memory and of the copy to the GPU.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from utils.errors import UserError

# What Pillow decodes without a warning (it refuses twice as much): 341 MiB at its four bytes a pixel. Kept even where some
# library lifts that limit. Also the most that resizing may make of an image: of 1 x 60,000 pixels it would make 3e9.
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535  # pixels, JPEG's own; the filter of a longer side alone would take 32 bytes a pixel of it
MAX_OUTPUT_SIDE = 4096  # of what a model takes; they take 224 to 1024
MAX_PROFILE_BYTES = 1 << 20  # of a colour profile that is kept; the usual ones take 0.5 to 4 KiB
MAX_IMAGE_BYTES = 256 << 20  # of an encoded image: three bytes for each of MAX_PIXELS, which is no compression at all

# Readers for what image sets hold under .jpg, .jpeg, .png and .webp. Without the list Pillow would try every format it
# knows on untrusted bytes, down to PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pictures of the user's own, which become shards: these too, and what no shard holds is written as PNG.
OWN_FORMATS = (*FORMATS, "TIFF", "AVIF")

# Where Pillow keeps what may hold an orientation; a TIFF, which has it among its own tags, it turns by itself.
NOTES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# EXIF's orientation -> what makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
TURNED = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # height and width change places


_BLOCK = bytes(512)
_NOT_ZERO = re.compile(rb"[^\0]")


class ImageError(ValueError):
    """Bytes that are no whole image; the text says why."""


@dataclass(frozen=True)
class ImageTransform:
    """Convert to 8 bits and RGB (transparency onto white), stand upright as EXIF says, resize, centre crop.

    A file is read as the processors read it by its path, and as the library datasets decodes it. Colour profiles and gamma
    are passed over, as they do.

    resize: length of the shorter edge, the longer one keeps the proportions, rounded down; or exactly (height, width);
        or None for no resizing.
    crop: (height, width) cut from the centre, with a black frame where the image is smaller; or None.
    resample: Pillow's filter number, 3 is bicubic.
    draft: let JPEG decode at 1/2, 1/4 or 1/8 of its size where that is still twice the size wanted: for 224 pixels from
        a shorter edge of 896 on. Two to three times faster there, but the pixels differ slightly from the processor's
        (about 50 dB; half the size, no more than what is wanted, would be 34 to 44 dB).
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = int(Image.Resampling.BICUBIC)
    draft: bool = False

    @classmethod
    def from_processor(cls, image_processor: Any, *, draft: bool = False) -> ImageTransform:
        """Reads the fields of a Hugging Face image processor that make its size; UserError for what is not done here.

        SigLIP 2's processor (NaFlex) makes images of any proportions into at most so many patches. Here they become the
        square that holds as many: resized by the shorter edge and cropped, which for square images is the same.
        ``pixel_normalisation`` reads the other fields.
        """
        name = type(image_processor).__name__
        for step in sorted(vars(image_processor)):
            known = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
            if step.startswith("do_") and step not in known and getattr(image_processor, step):
                raise UserError(f"{name}: {step} is not supported; expected resizing and centre cropping only")
        resizes, crops = _switch(image_processor, "do_resize"), _switch(image_processor, "do_center_crop")
        # Where nothing is resized, no filter is asked for.
        resample = _resample(image_processor) if resizes else int(Image.Resampling.BICUBIC)
        if name.startswith("Siglip2ImageProcessor"):
            if not resizes:
                raise UserError(f"{name}: do_resize false is not supported; images have to be of one size")
            side = math.isqrt(_whole(image_processor, "max_num_patches")) * _whole(image_processor, "patch_size")
            if not 1 <= side <= MAX_OUTPUT_SIDE:
                raise UserError(f"{name}: {side} pixels a side; expected 1 to {MAX_OUTPUT_SIDE}")
            return cls(side, (side, side), resample, draft)
        resize: int | tuple[int, int] | None = None
        crop = _sides(image_processor, "crop_size", ("height", "width")) if crops else None
        if resizes and name.startswith("ConvNextImageProcessor"):
            resize, own_crop = _convnext_sizes(image_processor)
            if own_crop and crop not in (None, own_crop):
                raise UserError(f"{name}: do_center_crop after the crop that crop_pct makes is not supported")
            crop = crop or own_crop
        elif resizes:
            resize = _sides(image_processor, "size", ("height", "width"), ("shortest_edge",))
        sizes = [*(resize if isinstance(resize, tuple) else (resize or 1, resize or 1)), *(crop or (1, 1))]
        if min(sizes) < 1 or max(sizes) > MAX_OUTPUT_SIDE:
            raise UserError(f"{name}: size {resize} and crop {crop}; expected 1 to {MAX_OUTPUT_SIDE} pixels a side")
        return cls(resize, crop, resample, draft)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every image that leaves, or None where it depends on the image."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pillow image -> uint8 tensor (3, H, W), 0 ... 255."""
        jpeg = image.format in ("JPEG", "MPO")
        if not jpeg:
            image.load()  # the orientation of a PNG may stand behind its pixels
        turn = _turn(image)
        width, height = image.size
        if turn in TURNED:
            width, height = height, width
        # A draft changes the size, and the proportions by a pixel: the size wanted follows from the original.
        size = self._resized(width, height)
        if size is not None:
            # Pillow resizes the rows first: between the two passes it holds the new width at the old height.
            most = size[0] * max(size[1], height)
            if most > MAX_PIXELS:
                raise ImageError(f"{width} x {height} would take {most} pixels to resize")
        box = None
        if self.draft and size is not None and jpeg and turn is None:
            # The picture's part of what is decoded, which is whole pixels: without it 1201 x 1803 loses 13 dB.
            _, box = image.draft(None, (2 * size[0], 2 * size[1])) or (None, None)
        image = _to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        if size is not None:
            image = image.resize(size, resample=self.resample, box=box)
        pixels = np.array(image)
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _resized(self, width: int, height: int) -> tuple[int, int] | None:
        """(width, height) after resizing."""
        if self.resize is None:
            return None
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)


def pixel_normalisation(image_processor: Any) -> tuple[list[float], list[float]]:
    """mean and std, three numbers each, with which (x - mean) / std is what the processor makes of pixels x in [0, 1].

    The processor sees v = 255 x. With do_rescale it takes r v, r = rescale_factor, else v; with do_normalize then
    (. - image_mean) / image_std. So mean = image_mean / (255 r) and std = image_std / (255 r), which for r = 1/255 are the
    file's own numbers. UserError for fields that are no numbers of this kind.
    """
    name = type(image_processor).__name__
    scale = 255.0
    if _switch(image_processor, "do_rescale"):
        factor: Any = getattr(image_processor, "rescale_factor", None)
        if not _is_number(factor) or factor <= 0:
            raise UserError(f"{name}: rescale_factor is {factor!r}; expected a number above 0, such as 1/255")
        scale = 255 * float(factor)
    mean, std = [0.0] * 3, [1.0] * 3
    if _switch(image_processor, "do_normalize"):
        mean, std = (_three_numbers(image_processor, field) for field in ("image_mean", "image_std"))
        if 0 in std:
            raise UserError(f"{name}: image_std is {std}; expected numbers other than 0")
    return [value / scale for value in mean], [value / scale for value in std]


def normalisation_of_file(fields: dict[str, Any]) -> tuple[list[float], list[float]]:
    """``pixel_normalisation`` by a processor's file alone. What the file leaves out is as CLIP has it."""
    defaults = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    return pixel_normalisation(SimpleNamespace(**defaults | fields))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _switch(image_processor: Any, field: str) -> bool:
    """A do_... field. null is false, as for transformers; a text would be true whatever it says."""
    value = getattr(image_processor, field, None)
    if value not in (None, False, True):
        raise UserError(f"{type(image_processor).__name__}: {field} is {value!r}; expected true or false")
    return bool(value)


def _whole(image_processor: Any, field: str) -> int:
    value = getattr(image_processor, field, None)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{type(image_processor).__name__}: {field} is {value!r}; expected a whole number above 0")
    return value


def _three_numbers(image_processor: Any, field: str) -> list[float]:
    """One number for all channels, or one for each."""
    value = getattr(image_processor, field, None)
    values = [value] * 3 if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
        raise UserError(f"{type(image_processor).__name__}: {field} is {value!r}; expected one number, or three")
    return [float(item) for item in values]


def _resample(image_processor: Any) -> int:
    """Pillow's filter. transformers takes bilinear for a value that it does not know, such as 3.0, and null is an error."""
    value = getattr(image_processor, "resample", None)
    if not isinstance(value, int) or isinstance(value, bool) or value not in list(Image.Resampling):
        raise UserError(
            f"{type(image_processor).__name__}: resample is {value!r}; expected a filter of Pillow, 0 (nearest) to 5"
        )
    return int(value)


def _sides(image_processor: Any, field: str, *kinds: tuple[str, ...]) -> Any:
    """What ``size`` or ``crop_size`` says in one of the ``kinds`` of keys: (height, width), or the shorter edge."""
    size = getattr(image_processor, field, None)
    found = {key: value for key, value in dict(size or {}).items() if value is not None}
    for keys in kinds:
        if set(found) == set(keys) and all(isinstance(value, int) for value in found.values()):
            return found[keys[0]] if len(keys) == 1 else tuple(found[key] for key in keys)
    raise UserError(
        f"{type(image_processor).__name__}: {field} {found or None} is not supported; expected "
        f"{', or '.join(' and '.join(keys) for keys in reversed(kinds))}"
    )


def _convnext_sizes(image_processor: Any) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    """ConvNeXt's resizing and crop: an edge below 384 is the crop_pct-th part of what is resized to, else proportions go."""
    edge = _sides(image_processor, "size", ("shortest_edge",))
    if edge >= 384:
        return (edge, edge), None
    share = image_processor.crop_pct
    if not _is_number(share) or not 0 < share <= 1:
        raise UserError(f"{type(image_processor).__name__}: crop_pct is {share!r}; expected a share of the image")
    return int(edge / share), (edge, edge)


def decode(data: bytes, transform: ImageTransform, formats: tuple[str, ...] = FORMATS) -> torch.Tensor:
    """Encoded image -> uint8 tensor (3, H, W); ImageError for anything but a whole image within the limits above.

    The limits are checked on the header, before pixels are decoded. Of an animation the first frame counts. Texts and colour
    profiles, which may be compressed too, are bounded by Pillow: 1 MiB each, 64 MiB in all.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
    if hole := _find_hole(data):
        raise ImageError(f"zeros from byte {hole[0]} to {hole[1]}, as where a disk has lost blocks")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(*image.size)
            return transform(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others, depending on the damage.
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def known_format(data: bytes) -> str:
    """jpg, png or webp, the extensions of shards, by the first bytes, whatever a name says; "" for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def encode(pixels: torch.Tensor, like: bytes, format: str, **options: Any) -> bytes:
    """uint8 (3, H, W) -> an encoded image, with the RGB colour profile of ``like``, the bytes that the pixels come from.

    A profile of another colour space, such as CMYK, says nothing about RGB and is left out.
    """
    with Image.open(io.BytesIO(like), formats=OWN_FORMATS) as image:
        profile = image.info.get("icc_profile")
    if profile and profile[16:20] == b"RGB " and len(profile) <= MAX_PROFILE_BYTES:
        options["icc_profile"] = profile
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, format, **options)
    return stream.getvalue()


def as_shard_member(data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an image as shards hold it: as it is, or what they have no extension for as PNG of the same
    pixels. ImageError where that cannot be decoded."""
    extension = known_format(data)
    if extension:
        return extension, data
    return "png", encode(decode(data, ImageTransform(resize=None, crop=None), OWN_FORMATS), data, "PNG")


def _find_hole(data: bytes) -> tuple[int, int] | None:
    """The first and last byte of zeros that fill whole blocks: what a disk or a broken copy has lost.

    Decoders of JPEG and WebP make pixels of them without a word; other formats have checksums, or black pixels that are zeros.
    Files, and members of a tar, begin with a block. Zeros that belong to an image begin and end anywhere.
    """
    if known_format(data) not in ("jpg", "webp"):
        return None
    start = data.find(_BLOCK)
    while start >= 0:
        after = _NOT_ZERO.search(data, start)
        end = after.start() if after else len(data)
        whole = data[max(0, start - 2) : start] == b"\xff\xd9"  # a JPEG that is filled up
        if start % len(_BLOCK) == 0 and (end % len(_BLOCK) == 0 or end == len(data)) and not whole:
            return start, end
        start = data.find(_BLOCK, end)
    return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels, at most {MAX_PIXELS} of {MAX_SIDE} a side are decoded")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, or None. A note that cannot be read says nothing against the pixels."""
    if not NOTES & image.info.keys():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, TypeError and others of Pillow's reader
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits. Transparency is laid onto white, as the processors do. ImageError for numbers without a known scale."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ImageError(
            f"one {'whole' if image.mode == 'I' else 'floating-point'} number of 32 bits a pixel, of which none says how "
            "bright it is; save it with 8 or 16 bits"
        )
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as its high bytes, as Pillow reads colours of 16 bits; Pillow alone would make all above 255 white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central (height, width) of ``pixels`` (H, W, 3). Odd differences round as the image processors round them."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    source = pixels[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
    below, right = max(0, -top), max(0, -left)
    canvas[below : below + source.shape[0], right : right + source.shape[1]] = source
    return canvas
