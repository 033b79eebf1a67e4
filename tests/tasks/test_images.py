"""Images from files: geometry, modes, normalisation, and files that are no images."""

import pickle

import numpy as np
import pytest
import torch
from official import levels, load_image
from PIL import Image, ImageOps

from optima_fast.errors import UserError
from optima_fast.tasks.images import FolderImages, Preprocessing, UnreadableImages


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def test_an_image_of_the_right_size_is_only_normalised(tmp_path):
    pixels = noise(16, 16)
    got = load_image(save(tmp_path / "a.png", pixels), 16)
    assert got.shape == (3, 16, 16)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(levels(got), pixels, atol=1e-3)
    by_hand = (pixels[2, 5, 1] / 255 - 0.4578275) / 0.26130258
    assert got[1, 2, 5].item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(8, 20, slice(0, 8), slice(6, 14)), (21, 8, slice(6, 14), slice(0, 8))],
    ids=["wide", "tall"],
)
def test_the_centre_is_kept_and_a_half_rounds_to_even(tmp_path, height, width, rows, columns):
    pixels = noise(height, width)
    got = load_image(save(tmp_path / "a.png", pixels), 8)
    np.testing.assert_allclose(levels(got), pixels[rows, columns], atol=1e-3)


def test_the_shortest_side_is_scaled_by_bicubic(tmp_path):
    pixels = noise(30, 50)
    got = load_image(save(tmp_path / "a.png", pixels), 12)
    scaled = Image.fromarray(pixels).resize((20, 12), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(levels(got), np.asarray(scaled)[:, 4:16], atol=1e-3)
    linear = Image.fromarray(pixels).resize((20, 12), Image.Resampling.BILINEAR)
    assert np.abs(levels(got) - np.asarray(linear)[:, 4:16]).max() > 5


def test_small_images_grow(tmp_path):
    got = load_image(save(tmp_path / "a.png", np.full((1, 1, 3), 200, np.uint8)), 7)
    np.testing.assert_allclose(levels(got), np.full((7, 7, 3), 200), atol=1e-3)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    black_and_white = np.zeros((6, 6, 3), np.uint8)
    black_and_white[:, 3:] = 255
    suffix = "tiff" if mode == "CMYK" else "png"
    got = load_image(save(tmp_path / f"a.{suffix}", black_and_white, mode), 6)
    np.testing.assert_allclose(levels(got), black_and_white, atol=1e-3)


def test_a_palette_with_transparency_gives_no_warning(tmp_path):
    image = Image.frombytes("P", (6, 6), (noise(6, 6, 1) % 4).tobytes())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff\x20")
    got = levels(load_image(tmp_path / "a.png", 6))
    assert set(np.unique(np.rint(got[..., 0]))) <= {10, 40, 70, 100}


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    grey = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)
    Image.fromarray(grey).save(tmp_path / "a.png")
    got = levels(load_image(tmp_path / "a.png", 6))
    np.testing.assert_allclose(got[..., 0], grey // 256, atol=1e-3)


def test_only_the_asked_files_are_decoded_in_the_asked_order(tmp_path):
    shades = [30, 90, 150]
    paths = [
        save(tmp_path / f"{shade}.png", np.full((5, 5, 3), shade, np.uint8)) for shade in shades
    ]
    images = FolderImages([*paths, tmp_path / "absent.png"], Preprocessing(5))
    assert len(images) == 4
    got = images[torch.tensor([2, 0])]
    assert got.shape == (2, 3, 5, 5)
    assert [round(float(levels(image)[0, 0, 0])) for image in got] == [150, 30]
    assert images[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 5, 5)
    with pytest.raises(UserError, match=r"no image file .*absent\.png"):
        images[torch.tensor([3])]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        FolderImages(paths, Preprocessing(0))


def open_clip(image, size, resize):
    """The steps of open_clip's `image_transform` for evaluation, one by one, on a Pillow image."""
    width, height = image.size
    if resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif resize == "shortest":
        short, long = sorted(image.size)
        sides = (size, int(size * long / short))
        image = image.resize(sides if width <= height else sides[::-1], Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2.0) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    else:
        ratio = max(height / size, width / size)
        image = image.resize((round(width / ratio), round(height / ratio)), 3)
        (w, h), before = image.size, ((size - image.size[0]) // 2, (size - image.size[1]) // 2)
        border = (*before, size - w - before[0], size - h - before[1])
        image = ImageOps.expand(image, border, fill=0)
    return np.array(image.convert("RGB"))


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("shape", [(30, 47), (50, 33), (10, 13), (64, 64)])
def test_every_step_is_open_clip_s(tmp_path, mode, shape, resize):
    image = Image.fromarray(noise(*shape)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(noise(*shape, 1, seed=1)))
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    got = load_image(path, 24, resize=resize)
    with Image.open(path) as again:
        np.testing.assert_allclose(levels(got), open_clip(again, 24, resize), atol=1e-3)


def test_normalisation_is_the_checkpoint_s(tmp_path):
    pixels = noise(6, 6)
    path = save(tmp_path / "a.png", pixels)
    own = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 1.0, 2.0)}
    by_hand = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    np.testing.assert_allclose(load_image(path, 6, **own).permute(1, 2, 0), by_hand, atol=1e-6)
    plain = Preprocessing(6, **own).read(path).permute(1, 2, 0)
    np.testing.assert_allclose(plain, pixels / 255, atol=1e-6)


def test_values_out_of_range():
    with pytest.raises(ValueError, match="resize must be one of shortest, .* got 'crop'"):
        Preprocessing(8, resize="crop")
    with pytest.raises(ValueError, match="std above 0, got .* and .0.0, 1.0, 1.0."):
        Preprocessing(8, std=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="mean and std must be three numbers each"):
        Preprocessing(8, mean=(0.5,))


def test_augmentation_comes_before_normalisation_and_knows_the_image(tmp_path):
    paths = [save(tmp_path / f"{i}.png", noise(5, 5, seed=i)) for i in range(3)]
    images, seen = FolderImages(paths, Preprocessing(5)), []

    def augment(pixels, number):
        assert 0 <= pixels.min() <= pixels.max() <= 1
        seen.append(number)
        return pixels / (number + 1)

    got = images.load(torch.tensor([2, 1]), augment)
    assert seen == [2, 1]
    np.testing.assert_allclose(levels(got[0]), noise(5, 5, seed=2) / 3, atol=1e-3)
    np.testing.assert_allclose(levels(got[1]), noise(5, 5, seed=1) / 2, atol=1e-3)


def test_all_unreadable_images_of_a_batch_are_told(tmp_path):
    paths = [save(tmp_path / f"{i}.png", noise(5, 5)) for i in range(5)]
    paths[1].write_bytes(b"")
    paths[3].unlink()
    with pytest.raises(UnreadableImages, match="cannot read the image .*1.png") as caught:
        FolderImages(paths, Preprocessing(5))[torch.arange(5)]
    error = pickle.loads(pickle.dumps(caught.value))
    assert list(error.errors) == [1, 3]
    assert "no image file" in error.errors[3]
    assert str(error) == str(caught.value)
    assert str(error) == f"{error.errors[1]}; --image-errors skip leaves out what shows it"


def test_unreadable_images_name_the_file(tmp_path):
    whole = save(tmp_path / "whole.jpg", noise(64, 64), quality=95).read_bytes()
    broken = {
        "truncated.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "header.png": b"\x89PNG\r\n\x1a\n" + b"\x00" * 40,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read the image .*{name}: .") as caught:
            load_image(tmp_path / name, 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read the image"):
        load_image(tmp_path, 8)
    thin = save(tmp_path / "thin.png", np.zeros((2, 400, 3), np.uint8))
    with pytest.raises(UserError, match=r"thin.png: 400 x 2 pixels, more than 100 times"):
        load_image(thin, 8)
