"""RandAugment: each operation against Pillow's or by hand, and what the draws depend on."""

import importlib.util
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from optima_fast.errors import UserError
from optima_fast.tasks.augment import GREY, OPERATIONS, RandAugment

SIZE = 40


@pytest.fixture
def image():
    """Smooth and noisy parts, 20 .. 235, and other ranges in each channel."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    planes = [20 + 215 * x, 40 + 150 * y, 60 + 100 * x * y]
    levels = np.stack(planes, -1) + draw.normal(0, 4, (SIZE, SIZE, 3))
    return Image.fromarray(levels.clip(20, 235).astype(np.uint8))


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def apply(name, image, level=1.0, sign=1.0, where=(0.5, 0.5)):
    result = OPERATIONS[name](tensor(image), level, sign, where)
    assert result.shape == (3, SIZE, SIZE)
    assert result.dtype == torch.float32
    assert 0 <= result.min() <= result.max() <= 1
    return (result * 255).permute(1, 2, 0).numpy()


def close(ours, theirs, within):
    np.testing.assert_allclose(ours, np.asarray(theirs, dtype=np.float32), rtol=0, atol=within)


@pytest.mark.parametrize("level", [0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("brightness", ImageEnhance.Brightness),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_those_of_pillow_at_google_s_factor(image, name, enhance, level):
    close(apply(name, image, level), enhance(image).enhance(0.1 + 1.8 * level), within=2.0)


def test_tables_of_levels_are_those_of_pillow(image):
    close(apply("auto_contrast", image), ImageOps.autocontrast(image), within=1.01)
    close(apply("equalize", image), ImageOps.equalize(image), within=2.0)
    close(apply("invert", image), ImageOps.invert(image), within=1e-3)
    close(apply("posterize", image), ImageOps.posterize(image, 4), within=1e-3)
    close(apply("posterize", image, 0.5), ImageOps.posterize(image, 2), within=1e-3)
    close(apply("solarize", image, 0.5), ImageOps.solarize(image, 128), within=1e-3)
    close(apply("solarize", image, 1.0), image, within=1e-3)
    levels = np.asarray(image).astype(int)
    close(apply("solarize_add", image), np.where(levels < 128, levels + 110, levels), 1e-3)
    flat = Image.new("RGB", (SIZE, SIZE), (9, 90, 200))
    close(apply("auto_contrast", flat), flat, within=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("shear_x", lambda s: (1, 0.3 * s, -0.15 * s, 0, 1, 0)),
        ("shear_y", lambda s: (1, 0, 0, 0.3 * s, 1, -0.15 * s)),
        ("translate_x", lambda s: (1, 0, 18 * s, 0, 1, 0)),
        ("translate_y", lambda s: (1, 0, 0, 0, 1, 18 * s)),
    ],
)
def test_moves_are_the_affine_ones_on_grey(image, name, matrix, sign):
    ours = apply(name, image, sign=sign)
    grey = (128, 128, 128)
    theirs = image.transform(image.size, Image.Transform.AFFINE, matrix(sign), fillcolor=grey)
    # what falls between two pixels may go to either; Pillow counts from corners, 0.15 of a shear
    assert (np.abs(ours - np.asarray(theirs)).max(-1) > 0.01).mean() < 0.05
    if name.startswith("translate"):
        close(ours, theirs, within=1e-2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotation_is_by_thirty_degrees_about_the_centre(image, sign):
    theirs = np.asarray(image.rotate(30 * sign, fillcolor=(128, 128, 128)))
    # what falls between two pixels may go to either
    assert (np.abs(apply("rotate", image, sign=sign) - theirs).max(-1) > 0.01).mean() < 0.01


def test_cut_outs_are_grey_squares_at_the_drawn_place(image):
    ours = apply("cutout", image, where=(0.5, 0.25)) / 255
    hole = np.zeros((SIZE, SIZE), bool)
    hole[20 - 7 : 20 + 7, 10 - 7 : 10 + 7] = True
    np.testing.assert_allclose(ours[hole], GREY, atol=1e-6)
    close(ours[~hole] * 255, np.asarray(image)[~hole], within=1e-3)
    corner = apply("cutout", image, where=(0.0, 0.99))
    close(corner[:7, -8:] / 255, np.full((7, 8, 3), GREY), within=1e-6)
    close(corner[8:, :], np.asarray(image)[8:, :], within=1e-3)


def test_what_is_drawn_depends_on_seed_step_and_image_alone(image):
    pixels = tensor(image)
    augment = RandAugment(2, 10, seed=5)
    kept = pixels.clone()
    drawn = {(s, i): augment(s, pixels, i) for s in range(6) for i in range(6)}
    assert torch.equal(pixels, kept)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for (step, number), value in reversed(drawn.items()):
        assert torch.equal(RandAugment(2, 10, seed=5)(step, pixels, number), value)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({value.sum().item() for value in drawn.values()}) > 25
    others = [RandAugment(2, 10, seed=6)(s, pixels, i) for s, i in drawn]
    same = sum(torch.equal(a, b) for a, b in zip(others, drawn.values(), strict=True))
    assert same < 9


def test_threads_do_not_change_a_bit():
    pixels = torch.rand(3, 224, 224, generator=torch.manual_seed(0))
    draws = [(step, image) for step in range(8) for image in range(4)]
    augment = RandAugment(1, 10)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append([augment(step, pixels, image) for step, image in draws])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_operation_is_drawn_equally_often_and_layers_add_up(monkeypatch):
    calls = []
    for name in OPERATIONS:
        record = partial(
            lambda name, x, level, *rest: calls.append((name, level, *rest)) or x, name
        )
        monkeypatch.setitem(OPERATIONS, name, record)
    augment = RandAugment(2, 5)
    for step in range(800):
        augment(step, torch.zeros(3, 2, 2), 7)
    assert len(calls) == 1600
    names = [call[0] for call in calls]
    counts = [names.count(name) for name in OPERATIONS]
    assert len(counts) == 16
    assert min(counts) > 100 - 4 * math.sqrt(100)
    assert {call[1] for call in calls} == {0.5}
    signs = [call[2] for call in calls]
    assert 700 < signs.count(1.0) < 900
    assert set(signs) == {1.0, -1.0}
    places = np.array([call[3] for call in calls])
    assert np.abs(places.mean(0) - 0.5).max() < 0.04


def test_parse():
    assert RandAugment.parse("none") is None
    parsed = RandAugment.parse("2, 7.5", seed=3)
    assert (parsed.layers, parsed.magnitude, parsed.seed) == (2, 7.5, 3)
    for wrong in ("", "1", "1,2,3", "a,b", "0,5", "1,0", "1,11", "1,nan"):
        with pytest.raises(
            UserError, match="augment must be none or LAYERS,MAGNITUDE such as 1,10"
        ):
            RandAugment.parse(wrong)
    with pytest.raises(ValueError, match="layers must be at least 1 and magnitude .* got 0 and 5"):
        RandAugment(0, 5)


def test_kornia_is_imported_only_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)  # an import of it is an error
    spec = importlib.util.find_spec("optima_fast.tasks.augment")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.RandAugment.parse("1,10").layers == 1
