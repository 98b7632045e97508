"""Pixels equal to those of the Hugging Face image processors; damaged and oversized images are refused."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image, ImageFile
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPProcessor,
    SiglipImageProcessor,
)

from examples.pretrain_small_clip import make_tokenizer
from tests.shard_maker import image_bytes
from utils.data.images import CROP_ROUNDING, MAX_PIXELS, OWN_FORMATS, ImageError, ImageTransform, decode
from utils.errors import UserError
from utils.models.published import read_image_processor

RAW = {"do_rescale": False, "do_normalize": False}
PROCESSORS = {
    "clip 224": CLIPImageProcessor(**RAW),
    "clip 32": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **RAW),
    "clip, odd crop": CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 31, "width": 33}, **RAW),
    "clip, crop larger than the image": CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 63, "width": 52}, **RAW
    ),
    "clip, crop without resize": CLIPImageProcessor(do_resize=False, crop_size={"height": 64, "width": 65}, **RAW),
    "clip, bilinear": CLIPImageProcessor(size={"shortest_edge": 48}, resample=2, do_center_crop=False, **RAW),
    "dinov2": BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, **RAW),
    "siglip": SiglipImageProcessor(size={"height": 48, "width": 40}, **RAW),
}
SIZES = [
    (100, 75),
    (75, 100),
    (64, 64),
    (65, 64),
    (64, 65),
    (33, 97),
    (223, 225),
    (20, 30),
    (31, 5),
    (301, 200),
    (1, 1),
]


def pictures():
    """(name, encoded image): photographs of many shapes, and all that is no plain RGB."""
    for number, size in enumerate(SIZES):
        yield f"jpeg {size}", image_bytes(number, size)
    yield "png", image_bytes(1, (61, 90), "PNG")
    yield "webp", image_bytes(2, (90, 61), "WEBP")
    yield "grey jpeg", image_bytes(3, (61, 90), "JPEG", "L")
    yield "cmyk jpeg", image_bytes(4, (61, 90), "JPEG", "CMYK")
    yield "grey png", image_bytes(5, (90, 61), "PNG", "L")
    yield "bilevel png", image_bytes(6, (90, 61), "PNG", "1")
    yield "palette png", image_bytes(7, (90, 61), "PNG", "P")
    rgba = np.random.default_rng(8).integers(0, 256, size=(61, 90, 4), dtype=np.uint8)
    for mode in ("RGBA", "LA"):
        yield f"{mode} png", encoded(Image.fromarray(rgba).convert(mode))
    yield "RGBA webp", encoded(Image.fromarray(rgba), "WEBP", lossless=True)
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    yield "palette png with transparency", encoded(palette, transparency=3)
    yield (
        "rgb png with transparent colour",
        encoded(Image.fromarray(rgba[..., :3]), transparency=tuple(rgba[0, 0, :3].tolist())),
    )


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_pixels_equal_those_of_the_image_processor(processor):
    transform = ImageTransform.from_processor(processor)
    for name, data in pictures():
        transparent = "transparen" in name or name.startswith(("RGBA", "LA"))
        # transformers 5.17 drops the alpha channel and shows the colour below; 5.23 lays the image on white, as here.
        if transparent and Version(transformers.__version__) < Version("5.23"):
            continue
        expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
        pixels = decode(data, transform)
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous()
        assert pixels.shape == expected.shape, name
        assert np.array_equal(pixels.numpy(), expected), name
        assert transform.output_size in (None, tuple(pixels.shape[1:]))


def test_settings_come_from_the_processor():
    assert ImageTransform.from_processor(CLIPImageProcessor()) == ImageTransform(224, (224, 224), 3)
    assert ImageTransform.from_processor(SiglipImageProcessor()) == ImageTransform((224, 224), None, 3)
    assert ImageTransform.from_processor(PROCESSORS["clip, crop without resize"]).resize is None
    assert ImageTransform.from_processor(PROCESSORS["clip, bilinear"]).output_size is None


@pytest.mark.parametrize(
    "settings", [{"size": {"shortest_edge": 10, "longest_edge": 20}}, {"do_pad": True}], ids=["size", "pad"]
)
def test_processors_that_do_more_are_refused(settings):
    with pytest.raises(UserError, match="not supported"):
        ImageTransform.from_processor(CLIPImageProcessor(**settings))


# ------------------------------------------------------------------------------------------ where a centre crop begins


def ruler(width, height):
    """A picture whose red says the column and green the row, both counted from 1. Black is outside."""
    rows, columns = np.mgrid[1 : height + 1, 1 : width + 1].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2))


@pytest.mark.parametrize("difference", range(41))
def test_half_a_pixel_goes_to_even_as_in_torchvision_or_down_as_in_transformers(difference):
    """torchvision.transforms.functional.center_crop: int(round((size - crop) / 2.0))."""
    side, other = 24, (difference * 7) % 41
    picture = ruler(side + difference, side + other)
    processor = CLIPImageProcessor(do_resize=False, crop_size={"height": side, "width": side}, **RAW)
    for even in (False, True):
        pixels = ImageTransform(None, (side, side), even=even)(picture)
        left, top = int(pixels[0, 0, 0]) - 1, int(pixels[1, 0, 0]) - 1
        if even:
            assert (left, top) == tuple(round((size - side) / 2.0) for size in picture.size)
        else:
            assert (left, top) == (difference // 2, other // 2)
            assert np.array_equal(pixels.numpy(), processor(picture, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("lacking", range(1, 9))
def test_a_smaller_picture_gets_the_frame_of_torchvision_or_that_of_transformers(lacking):
    """torchvision pads (crop - size) // 2 at the left, transformers the larger half."""
    picture = ruler(20 - lacking, 20)
    for even, frame in ((True, lacking // 2), (False, (lacking + 1) // 2)):
        pixels = ImageTransform(None, (20, 20), even=even)(picture)
        assert int((pixels[0, 0] == 0).long().argmin()) == frame


def test_of_forty_photographs_some_crops_differ_by_one_pixel():
    """Only those whose longer side exceeds the crop by 3, 7, 11 ... after resizing."""
    moved = 0
    for number in range(40):
        width, height = 96 + 5 * number, 64 + 3 * (number % 7)
        data = image_bytes(number, (height, width) if number % 2 else (width, height))
        longer = int(32 * max(width, height) / min(width, height))
        wide = ImageTransform(32, None)  # the whole resized picture, in which to look for both crops
        down, even = (decode(data, ImageTransform(32, (32, 32), even=even)) for even in (False, True))
        whole = decode(data, wide)
        along = 2 if whole.shape[2] > whole.shape[1] else 1
        first = (longer - 32) // 2
        assert torch.equal(down, whole.narrow(along, first, 32))
        further = (longer - 32) % 4 == 3
        assert torch.equal(even, whole.narrow(along, first + further, 32))
        moved += further
    assert 0 < moved < 20


@pytest.mark.parametrize("with_text", [False, True])
def test_the_rounding_of_crops_is_saved_with_the_processor(tmp_path, with_text):
    """transformers loads the file and ignores it."""
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert not ImageTransform.from_processor(image_processor).even
    setattr(image_processor, CROP_ROUNDING, "even")
    processor = CLIPProcessor(image_processor, make_tokenizer(["a cat"], 530)) if with_text else image_processor
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert ImageTransform.from_processor(loaded) == ImageTransform(32, (32, 32), even=True)
    read = read_image_processor(str(tmp_path), "clip", "--model")
    assert ImageTransform.from_processor(read) == ImageTransform(32, (32, 32), even=True)
    if with_text:
        assert ImageTransform.from_processor(CLIPProcessor.from_pretrained(tmp_path).image_processor).even
    picture = ruler(35, 32)
    plain = loaded(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert plain[0, 0, 0] == 2  # column 1: down
    assert ImageTransform.from_processor(loaded)(picture)[0, 0, 0] == 3
    setattr(image_processor, CROP_ROUNDING, "up")
    with pytest.raises(UserError, match="CLIPImageProcessorPil: crop_rounding is 'up'; expected floor or even"):
        ImageTransform.from_processor(image_processor)


def test_truncated_images_raise_wherever_they_end():
    transform = ImageTransform(8, (8, 8))
    for format in ("JPEG", "PNG", "WEBP"):
        data = image_bytes(1, (40, 30), format)
        decode(data, transform)
        for length in [*range(0, len(data) - 12, max(1, len(data) // 40))]:
            with pytest.raises(ImageError):
                decode(data[:length], transform)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "data",
    [b"", b"no image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 1 1 255\nabc", bytes(1000)],
    ids=["empty", "text", "postscript", "format not listed", "zeros"],
)
def test_other_files_raise(data):
    with pytest.raises(ImageError):
        decode(data, ImageTransform())


@pytest.mark.parametrize(
    "options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "WEBP"}], ids=str
)
def test_lost_blocks_of_an_image_raise(options):
    """Light-Untar#29: a hole of zeros. The decoders of both formats take it for pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), quality=95, **options)
    for first, after in ((8192, 12288), (512 * 20, 512 * 21), (512 * 20, len(whole))):
        holed = whole[:first] + bytes(after - first) + whole[after:]
        with pytest.raises(ImageError, match=f"zeros from byte {first} to {after}, as where a disk has lost blocks"):
            decode(holed, ImageTransform())


def test_zeros_of_a_whole_image_are_none_lost():
    for image in (Image.new("RGB", (900, 900), (128, 128, 128)), Image.new("RGB", (900, 900))):
        for options in (
            {"format": "JPEG", "optimize": True},
            {"format": "WEBP"},
            {"format": "BMP"},
            {"format": "PNG", "compress_level": 0},
        ):
            decode(encoded(image, **options), ImageTransform())
    data = image_bytes(0)
    room = -len(data) % 512 + 512
    comment = b"\xff\xfe" + (room - 2).to_bytes(2, "big") + b"x" * (room - 4)  # so that it ends with a block
    decode(data[:2] + comment + data[2:] + bytes(4096), ImageTransform())


def test_decompression_bombs_raise_before_they_are_decoded(monkeypatch):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match="pixels"):
        decode(bomb, ImageTransform())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries do
    with pytest.raises(ImageError, match=f"{side} x {side} pixels"):
        decode(bomb, ImageTransform())


def test_draft_is_off_by_default_and_close():
    data = image_bytes(1, (1201, 803))
    exact, draft = (
        decode(data, ImageTransform(100, (100, 100))),
        decode(data, ImageTransform(100, (100, 100), draft=True)),
    )
    assert not ImageTransform().draft
    assert draft.shape == exact.shape
    difference = (draft.int() - exact.int()).abs().float()
    assert 0 < difference.max() <= 16
    assert difference.mean() < 1
    small = image_bytes(2, (150, 120))  # less than twice the size wanted: decoded in full
    assert torch.equal(decode(small, ImageTransform(100, None)), decode(small, ImageTransform(100, None, draft=True)))


@pytest.mark.parametrize("size", [(1201, 1803), (2051, 1533), (897, 1201)])
def test_draft_keeps_every_pixel_in_its_place(size):
    """Sizes that 2 does not divide: a picture decoded to whole pixels reaches past its own edge."""
    coarse = np.random.default_rng(0).integers(0, 256, size=(size[1] // 24, size[0] // 24, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    exact, draft = (decode(data, ImageTransform(draft=draft)).double() for draft in (False, True))
    error = (exact - draft).square().mean()
    assert error > 0
    assert 10 * torch.log10(255**2 / error) > 50  # dB; 38 where what reaches past is not left out


def test_transforms_can_be_sent_to_workers():
    transform = ImageTransform((20, 10), None, 2, True)
    assert pickle.loads(pickle.dumps(transform)) == transform


# ----------------------------------------------------------------------------- what files hold beside eight bits of RGB

FULL = ImageTransform(None, None)


def png_bytes(rows: np.ndarray, colour_type: int, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits: uint16 (H, W) or (H, W, channels)."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, colour_type, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    notes = chunk(extra[:4], extra[4:]) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + notes + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format, orientation, tmp_path):
    """As the processors read a file by its path, and as the library datasets decodes one (datasets#6252)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((80, 48), 0)
    data = encoded(picture, format, exif=exif, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {}))
    (tmp_path / "x").write_bytes(data)
    for name, transform in (("clip, crop without resize", FULL), ("clip 32", None)):
        processor = PROCESSORS[name]
        expected = np.asarray(processor.fetch_images(str(tmp_path / "x"))).transpose(2, 0, 1)
        if transform is None:
            expected = processor(str(tmp_path / "x"), return_tensors="np")["pixel_values"][0]
        found = decode(data, transform or ImageTransform.from_processor(processor), OWN_FORMATS)
        assert found.shape == expected.shape
        assert np.array_equal(found.numpy(), expected)
    sides = (80, 48) if orientation > 4 else (48, 80)
    assert decode(data, FULL, OWN_FORMATS).shape == (3, *sides)


def test_a_draft_of_a_turned_picture_is_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.open(io.BytesIO(image_bytes(1, (1201, 803)))), "JPEG", exif=exif)
    transforms = [ImageTransform(100, None, draft=draft) for draft in (False, True)]
    exact, draft = (decode(data, transform) for transform in transforms)
    assert exact.shape == draft.shape == (3, 149, 100)
    assert (exact.int() - draft.int()).abs().float().mean() < 1


@pytest.mark.parametrize("exif", [b"Exif\0\0no note at all", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"], ids=["text", "cut"])
def test_an_unreadable_note_says_nothing_against_the_pixels(exif):
    picture = Image.open(io.BytesIO(image_bytes(1)))
    assert torch.equal(decode(encoded(picture, "JPEG", exif=exif), FULL), decode(encoded(picture, "JPEG"), FULL))


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        png_bytes(RAMP, 0),
        png_bytes(np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2), 4),
        png_bytes(np.repeat(RAMP[..., None], 3, axis=2), 2),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    ],
    ids=["grey", "grey with alpha", "colours", "tiff", "tiff, big-endian", "tiff, compressed"],
)
def test_sixteen_bits_become_eight(data):
    """A ramp of mean 127.5, where Pillow alone makes a white picture of mean 254 (Pillow#2574)."""
    pixels = decode(data, FULL, OWN_FORMATS)
    assert pixels.float().mean() == 127.5
    assert torch.equal(pixels[0], torch.from_numpy((RAMP >> 8).astype(np.uint8)))


def test_a_transparent_grey_of_sixteen_bits_is_white():
    pixels = decode(png_bytes(RAMP, 0, b"tRNS" + struct.pack(">H", 0x1234)), FULL)
    expected = torch.from_numpy(np.where(RAMP == 0x1234, 255, RAMP >> 8).astype(np.uint8))
    assert torch.equal(pixels[0], expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_scale_are_no_picture(dtype):
    with pytest.raises(ImageError, match=r"32 bits a pixel.* save it with 8 or 16 bits"):
        decode(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF"), FULL, OWN_FORMATS)
