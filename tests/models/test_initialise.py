"""A student starts from layers of a model, also of another grid, patch size or text length."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.forms import OPEN_CLIP
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models import CoCa, CoCaConfig, initialise, presets

SMALL = replace(
    OPEN_CLIP,
    image_size=32,
    image_channels=3,
    patch_size=8,
    image_layers=4,
    text_width=32,
    text_heads=4,
    text_length=12,
    vocab_size=50,
    pooler_heads=4,
    pooler_queries=6,
    contrastive_width=32,
)


def model(config: CoCaConfig, seed: int) -> CoCa:
    torch.manual_seed(seed)
    return CoCa(config).eval()


def resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def by_patch(images: Tensor, old: int, new: int) -> Tensor:
    """Images with every patch resized for itself."""
    grid = images.shape[-1] // old
    tiles = F.unfold(images, old, stride=old).transpose(1, 2).reshape(-1, 3, old, old)
    columns = resize(tiles, new).reshape(len(images), grid * grid, -1).transpose(1, 2)
    return F.fold(columns, grid * new, new, stride=new)


def test_like_takes_form_and_sizes_from_one_and_depth_from_the_other() -> None:
    source = presets.get("coca_ViT-B-32")
    student = initialise.like(source, presets.get("coca_tiny12"))
    assert student == replace(source, image_layers=6, text_layers=3, multimodal_layers=3)


def test_a_published_student_starts_from_its_checkpoint() -> None:
    """The real sizes, without memory: what the trainer does before it loads anything."""
    source, teacher = presets.get("coca_ViT-B-32"), presets.get("coca_ViT-L-14")
    config = replace(initialise.like(source, presets.get("coca_tiny12")), patch_size=14)
    assert config.patches == teacher.patches
    with torch.device("meta"):
        initialise.from_layers(CoCa(config), CoCa(source))


def test_starts_from_sampled_layers() -> None:
    source = model(replace(SMALL, image_layers=4, text_layers=3, multimodal_layers=2), 0)
    student = model(replace(SMALL, image_layers=2, text_layers=2, multimodal_layers=1), 1)
    initialise.from_layers(student, source)
    # r = 2, 1.5, 2: layer i of the student, from 1, is layer ceil(i r) of the source
    chosen = {"image": (2, 4), "text": (2, 3), "multimodal": (2,)}
    for module, layers in chosen.items():
        for mine, theirs in enumerate(layers):
            ours = getattr(student, module).layers[mine].state_dict()
            for name, value in getattr(source, module).layers[theirs - 1].state_dict().items():
                assert torch.equal(ours[name], value), (module, mine, name)
    rest = source.state_dict()
    for name, value in student.state_dict().items():
        if ".layers." not in name:
            assert torch.equal(value, rest[name]), name
    with torch.no_grad():
        source.image.positions.zero_()
    assert student.image.positions.any()


@pytest.mark.parametrize(
    ("student", "source", "expected"),
    [
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (3, 12, [4, 8, 12]),
        (2, 12, [6, 12]),
        (1, 12, [12]),
        (2, 3, [2, 3]),
        (4, 6, [2, 3, 5, 6]),
        (3, 3, [1, 2, 3]),
    ],
)
def test_samples_layers_uniformly(student: int, source: int, expected: list[int]) -> None:
    got = [initialise.sampled_layer(i, student, source) + 1 for i in range(student)]
    assert got == expected


@pytest.mark.parametrize(("old", "new"), [(4, 7), (8, 16), (8, 9), (6, 24)])
def test_a_larger_patch_gives_the_same_tokens_on_resized_patches(old: int, new: int) -> None:
    source = model(replace(SMALL, patch_size=old, image_size=4 * old), 0)
    student = model(replace(SMALL, patch_size=new, image_size=4 * new, image_layers=2), 1)
    initialise.from_layers(student, source)
    images = torch.randn(3, 3, 4 * old, 4 * old)
    with torch.no_grad():
        want = source.image.patches(images)
        got = student.image.patches(by_patch(images, old, new))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert want.std() > 0.3
    assert torch.equal(student.image.positions, source.image.positions)


def test_the_whole_model_is_the_same_on_resized_patches() -> None:
    source = model(SMALL, 2)
    larger = model(replace(SMALL, patch_size=12, image_size=48), 3)
    initialise.from_layers(larger, source)
    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        want = source(images, text, features=True)
        got = larger(by_patch(images, 8, 12), text, features=True)
    torch.testing.assert_close(got.decoded, want.decoded, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.image_features, want.image_features, rtol=0, atol=1e-4)


def test_a_smaller_patch_is_the_nearest_on_noise() -> None:
    """No kernel answers 8 x 8 noise from 4 x 4 pixels better, neither scaled nor perturbed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 8, 8, generator=generator)
    kernel = initialise.patches(weight, 4)
    noise = torch.randn(20_000, 3, 8, 8, generator=generator)
    want = noise.flatten(1) @ weight.flatten(1).T

    def error(kernel: Tensor) -> float:
        got = resize(noise, 4).flatten(1) @ kernel.flatten(1).T
        return (got - want).square().mean().item()

    least = error(kernel)
    for factor in (0.9, 1.1):
        assert error(factor * kernel) > least
    for _ in range(5):
        assert error(kernel + 0.2 * torch.randn(kernel.shape, generator=generator)) > least
    assert least < 0.9 * want.square().mean()


def test_patches_of_their_own_size_are_not_touched() -> None:
    weight = torch.randn(2, 3, 5, 5)
    assert initialise.patches(weight, 5) is weight
    assert initialise.patches(weight.half(), 7).dtype == torch.float16


def open_clip_resize(positions: Tensor, side: int) -> Tensor:
    """open_clip's resize_pos_embed, as written there."""
    token, image = positions[:1], positions[1:]
    old = int(math.sqrt(len(image)))
    image = image.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(
        image, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([token, image.permute(0, 2, 3, 1).reshape(1, side * side, -1)[0]])


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 16), (16, 7), (3, 1)])
def test_image_positions_as_open_clip_resizes_them(old: int, new: int) -> None:
    positions = torch.randn(old * old + 1, 24)
    config = replace(SMALL, image_size=8 * new)
    got = initialise.image_positions(positions, config)
    assert torch.equal(got, open_clip_resize(positions, new))
    assert torch.equal(got[0], positions[0])


def test_image_positions_without_a_class_token() -> None:
    """Of a plane of positions the middle stays a plane, rows stay rows and columns columns."""
    config = replace(SMALL, image_stem="plain", image_size=64)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    got = initialise.image_positions(torch.stack([rows, columns], -1).flatten(0, 1), config)
    assert got.shape == (64, 2)
    grid = got.view(8, 8, 2)
    want = (torch.arange(8) + 0.5) / 2 - 0.5
    torch.testing.assert_close(grid[4, :, 0], want[4].expand(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[:, 3, 1], want[3].expand(8), rtol=0, atol=1e-5)
    assert torch.equal(initialise.image_positions(got, config), got)


def test_another_image_size_of_the_same_depth() -> None:
    source, student = model(SMALL, 0), model(replace(SMALL, image_size=48), 1)
    initialise.from_layers(student, source)
    state = source.state_dict()
    for name, value in student.state_dict().items():
        if name == "image.positions":
            assert torch.equal(value, open_clip_resize(state[name], 6))
        else:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("contrastive", ["query", "none"])
def test_text_positions_are_cut_or_stretched_and_cls_is_kept(contrastive: str) -> None:
    config = replace(SMALL, contrastive=contrastive)
    source = model(config, 0)
    shorter, longer = (model(replace(config, text_length=n), 1) for n in (5, 24))
    for student in (shorter, longer):
        initialise.from_layers(student, source)
    old, cut, stretched = (m.text.positions for m in (source, shorter, longer))
    assert torch.equal(cut[:5], old[:5])
    want = (0.75 * old[3] + 0.25 * old[4], 0.25 * old[3] + 0.75 * old[4])
    torch.testing.assert_close(stretched[7:9], torch.stack(want))
    if contrastive == "query":
        assert torch.equal(cut[5:], old[12:])
        assert torch.equal(stretched[24:], old[12:])
        text = torch.randint(1, 50, (3, 5))
        with torch.no_grad():
            for ours, theirs in zip(shorter.text(text)[0], source.text(text)[0], strict=True):
                torch.testing.assert_close(ours, theirs)


def test_other_differences_are_refused() -> None:
    source = model(SMALL, 0)
    for option, message in (
        ({"image_width": 64}, "image_width is 64 in the student and 32 in the source"),
        ({"image_channels": 1}, "image_channels is 1 in the student and 3 in the source"),
        ({"image_stem": "plain"}, "image_stem is plain in the student and clip in the source"),
        ({"vocab_size": 60}, "vocab_size is 60 in the student and 50 in the source"),
        (
            {"text_layers": 3},
            "deeper than .* it starts from: text_layers is 3 in the student and 2 in",
        ),
    ):
        with pytest.raises(UserError, match=message):
            initialise.from_layers(model(replace(SMALL, **option), 1), source)
