"""The canvases: disjoint scans, the same bytes everywhere, labels that agree with the pixels."""

import hashlib

import numpy as np
import pytest
import torch

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks import canvases as c
from optima_fast.tasks import digits

SMALL = {"train_images": 40, "validation_images": 10, "test_images": 10}


def blocks(canvases):
    """Cells of the images: [n, 4, 12, 12]."""
    n = len(canvases)
    image = canvases.image.reshape(n, 2, 12, 2, 12).swapaxes(2, 3)
    return image.reshape(n, 4, 12, 12).astype(np.int64)


def test_every_scan_belongs_to_one_split():
    parts = c.scan_split()
    assert sum(map(len, parts.values())) == 1797
    assert set().union(*map(set, parts.values())) == set(range(1797))
    for part, share in zip(parts.values(), (0.60, 0.15, 0.25), strict=True):
        assert len(part) / 1797 == pytest.approx(share, abs=0.01)
        assert np.bincount(c.scans()[1][part]).min() >= share * 170


def test_no_scan_has_a_copy_in_another_split():
    levels, parts = c.scans()[0], c.scan_split()
    seen = [{levels[i].tobytes() for i in part} for part in parts.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_canvases_use_the_scans_of_their_split_whatever_the_seed():
    used = {name: set() for name in c.SHARES}
    for name in used:
        for seed in (0, 1):
            drawn = c.compose(300, name, c.generator(seed))
            used[name] |= set(drawn.scan[drawn.scan >= 0].tolist())
    for name, part in c.scan_split().items():
        assert used[name] <= set(part.tolist())
        assert len(used[name]) > 200


def test_labels_agree_with_the_scans():
    drawn = c.compose(500, "train", c.generator(3), covers=(0, 1, 3))
    visible = drawn.scan >= 0
    assert (drawn.digit[visible] == c.scans()[1][drawn.scan[visible]]).all()
    assert (drawn.digit[~visible] == c.EMPTY).all()
    assert ((drawn.tone >= 0) == visible).all()
    assert not (visible & drawn.covered).any()
    assert set(drawn.covered.sum(1)) == {0, 1, 3}
    assert set(drawn.count[~drawn.covered.any(1)]) == {1, 2, 3, 4}
    assert drawn.count.min() == 1
    for tones in drawn.tone:
        own = tones[tones >= 0]
        assert len(set(own)) == len(own)


def test_pixels_agree_with_the_labels():
    drawn = c.compose(400, "train", c.generator(4), noise=0.0, covers=(0, 1))
    cell = blocks(drawn)
    brightest = cell.max((2, 3))
    assert (brightest[(drawn.digit == c.EMPTY) & ~drawn.covered] == 0).all()
    assert (cell[drawn.covered] == c.PATCH_LEVEL).all()
    for tone in range(4):
        top = brightest[drawn.tone == tone]
        assert top.max() <= 255 * (tone + 2) // 5
        assert top.mean() > 0.9 * 255 * (tone + 2) / 5
    ink = (cell > 0).any(2).sum(2)[drawn.digit < c.EMPTY]
    assert 2 <= ink.min() < ink.max() == 12


def test_properties_of_a_canvas():
    drawn = c.compose(200, "train", c.generator(5))
    for row, (digit, tone) in enumerate(zip(drawn.digit, drawn.tone, strict=True)):
        own = digit[digit < c.EMPTY]
        assert drawn.count[row] == len(own)
        assert drawn.largest[row] == max(own)
        assert drawn.smallest[row] == min(own)
        assert drawn.brightest[row] == digit[np.argmax(tone)]
    some = drawn.take(np.array([7, 3]))
    assert (some.image == drawn.image[[7, 3]]).all()
    assert (some.scan == drawn.scan[[7, 3]]).all()


def test_noise_has_the_standard_deviation_asked_for():
    drawn = c.compose(300, "train", c.generator(6), noise=0.1, covers=(1,))
    patch = blocks(drawn)[drawn.covered]
    assert patch.std() / 255 == pytest.approx(0.1, rel=0.02)
    assert patch.mean() == pytest.approx(c.PATCH_LEVEL, abs=0.5)


@pytest.mark.parametrize("size", c.SIZES)
def test_resize_is_bilinear(size):
    levels = c.scans()[0][:50]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(levels)[:, None].double(), size=(size, size), mode="bilinear"
    )[:, 0]
    error = c.resize(levels, size) - expected.numpy() * 255 / 16
    assert np.abs(error).max() <= 0.5 + 1e-9


CHECKSUMS = {
    "vqa": "bdc117b88ed2f2ab",
    "snli_ve": "4d4fab5fc11e94c3",
    "nlvr2": "55b5f3c97155d728",
    "coco": "a6e8d6760d7fa905",
}


def checksum(data):
    digest = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        digest.update(split.images.levels.numpy().tobytes())
        for part in (split.text, split.image_index, split.image_labels["cells"]):
            digest.update(part.numpy().tobytes())
        if split.target is not None:
            digest.update((split.target * 60).round().long().numpy().tobytes())
    digest.update("\n".join(data.tokenizer.words).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("task", CHECKSUMS)
def test_a_seed_gives_the_same_data_on_every_machine(task):
    assert checksum(tasks.load(task, seed=7, **SMALL)) == CHECKSUMS[task]


@pytest.mark.parametrize("task", CHECKSUMS)
def test_another_seed_gives_other_data(task):
    other = tasks.load(task, seed=8, **SMALL)
    assert checksum(other) != checksum(tasks.load(task, seed=7, **SMALL))


def test_the_global_generators_are_not_touched():
    torch.manual_seed(5)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    tasks.load("vqa", seed=1, **SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()


@pytest.mark.parametrize("task", CHECKSUMS)
def test_batches_are_what_a_coca_takes(task):
    data = tasks.load(task, **SMALL)
    per = data.train.group
    batch = data.train.batch(torch.arange(2 * per))
    texts, shown = 2 * per, 2 if task == "nlvr2" else 1
    assert batch["images"].shape == (2 * shown, data.channels, data.image_size, data.image_size)
    assert batch["images"].dtype == torch.float32
    assert -0.5 <= float(batch["images"].min()) < 0 < 1.5 < float(batch["images"].max()) <= 3.5
    assert batch["text"].shape == (texts, data.text_length)
    assert (batch["text"][:, 0] == data.tokenizer.bos_id).all()
    assert (batch["text"] == data.tokenizer.eos_id).sum(1).tolist() == [1] * texts
    assert batch["text"].max() < len(data.tokenizer)
    padding = batch["text"] == data.tokenizer.pad_id
    assert (padding[:, 1:] >= padding[:, :-1]).all()
    assert batch["pair_image"].shape == batch["pair_text"].shape == (texts * shown,)
    assert batch["pair_image"].max() == 2 * shown - 1
    assert batch["cells"].shape == (2 * shown, 4)
    assert batch["cells"].dtype == torch.int64
    assert 0 <= int(batch["cells"].min()) < int(batch["cells"].max()) == digits.EMPTY
    assert digits.CELL_CLASSES == digits.EMPTY + 1
    if task == "coco":
        assert "target" not in batch
        assert data.num_classes == 0
    elif task == "vqa":
        assert batch["target"].shape == (texts, data.num_classes)
        assert batch["target"].dtype == torch.float32
    else:
        assert batch["target"].shape == (texts,)
        assert batch["target"].dtype == torch.int64
        assert 0 <= int(batch["target"].min()) <= int(batch["target"].max()) < data.num_classes


def test_the_vocabulary_knows_training_words_only():
    data = tasks.load("vqa", train_images=1, texts_per_image=1, validation_images=5, test_images=50)
    words = set(data.tokenizer.decode(data.train.text[0]).split())
    assert words == set(data.tokenizer.words[4:])
    assert (data.test.text == data.tokenizer.unk_id).any()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("vqa", {"train_image": 3}, r"'train_image'; did you mean 'train_images'"),
        ("vqa", {"train_images": 0}, "train_images .* must be an integer >= 1, got 0"),
        ("vqa", {"test_images": 2.5}, "test_images .* got 2.5"),
        ("vqa", {"texts_per_image": True}, "texts_per_image .* got True"),
        ("vqa", {"noise": -0.1}, r"noise .* must be in 0 \.\. 1, got -0.1"),
        ("vqa", {"annotator_error": "x"}, "annotator_error .* got 'x'"),
        ("vqa", {"kinds": ("counts",)}, r"'counts'; did you mean 'count'"),
        ("vqa", {"kinds": ()}, "kinds must be distinct and at least one"),
        ("vqa", {"kinds": ("count", "count")}, "kinds must be distinct"),
        ("vqa", {"kinds": ("count",)}, "texts_per_image must be at most 1"),
        ("snli_ve", {"texts_per_image": 100}, "texts_per_image must be at most"),
        ("nlvr2", {"test_images": 1}, "test_images must be at least 2 for nlvr2"),
        ("coco", {"seed": -1}, "seed must be an integer >= 0, got -1"),
        ("coco", {"seed": 0.5}, "seed must be an integer >= 0, got 0.5"),
    ],
)
def test_options_are_checked(task, options, message):
    with pytest.raises(UserError, match=message):
        tasks.load(task, **options)


def test_the_scans_are_scikit_learn_s_own(monkeypatch):
    from sklearn.datasets import load_digits

    levels, digits = c.scans()
    own = load_digits()
    assert np.array_equal(levels, own.images)
    assert np.array_equal(digits, own.target)
    # where its file is elsewhere, it is asked
    monkeypatch.setattr(c.importlib.util, "find_spec", lambda name: None)
    again = c.scans.__wrapped__()
    assert np.array_equal(again[0], levels)
    assert np.array_equal(again[1], digits)
    assert [(x.dtype, x.shape) for x in again] == [(x.dtype, x.shape) for x in (levels, digits)]
