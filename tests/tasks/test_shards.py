"""Captions from tar shards: what webdataset writes is read, by index, and every broken form."""

import io
import json
import pickle
import tarfile

import pytest
import torch
from official import SIZE, load_image, shade
from PIL import Image

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks import folders, shards


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(file, "png")
    return file.getvalue()


def write(path, members):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(key, level, caption=b"a dog\nTwo  dogs\n\n", kind="txt"):
    return [(f"{key}.png", png(level)), (f"{key}.{kind}", caption)]


def make(root):
    """Two shards of training, one of validation and test each, of two images a shard."""
    for n, name in enumerate(["train-000000", "train-000001", "val-000000", "test_0"]):
        members = sample(f"{n}0", 20 * n) + sample(f"{n}1", 20 * n + 10)
        write(root / f"{name}.tar", members)
    return root


def test_shards_are_read_by_index_in_their_splits(tmp_path):
    data = tasks.load("coco", str(make(tmp_path)), image_size=SIZE)
    assert [s.ids for s in (data.train, data.validation, data.test)] == [
        [0, 1, 10, 11],
        [20, 21],
        [30, 31],
    ]
    assert data.train.references == [["a dog", "Two dogs"]] * 4
    batch = data.train.batch([6, 0])  # the first caption of the fourth image, then of the first
    assert [shade(image) for image in batch["images"][batch["pair_image"]]] == [30, 0]
    assert data.tokenizer.decode(batch["text"][0]) == "a dog"


def test_shards_that_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pattern = str(tmp_path / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as sink:
        for i in range(8):
            sink.write(
                {"__key__": f"some/cat{i}", "png": png(10 * i)}
                | ({"txt": f"number {i}"} if i % 2 else {"json": {"captions": [f"number {i}"]}})
            )
    data = folders.load("coco", tmp_path, image_size=SIZE)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    seen = {}
    for split in (data.train, data.validation, data.test):
        for row, key in enumerate(split.ids):
            seen[key] = (shade(split.images[torch.tensor([row])][0]), split.references[row])
    assert seen == {f"some/cat{i}": (10 * i, [f"number {i}"]) for i in range(8)}


def test_patterns_with_braces(tmp_path):
    make(tmp_path)
    both = folders.load("coco", f"{tmp_path}/train-{{000000..000001}}.tar", image_size=SIZE)
    assert len(both.train.images) + len(both.validation.images) + len(both.test.images) == 4
    named = f"{tmp_path}/{{train-000000,val-000000,test_0}}.tar"
    data = tasks.load("coco", named, image_size=SIZE)
    assert [s.ids for s in (data.train, data.validation, data.test)] == [[0, 1], [20, 21], [30, 31]]
    with pytest.raises(
        UserError, match=r"2 of 4 shards of .* are not there, the first is .*2\.tar"
    ):
        folders.load("coco", f"{tmp_path}/train-{{000000..000003}}.tar")
    with pytest.raises(UserError, match="no data folder .* holds the vqa data set"):
        folders.load("vqa", f"{tmp_path}/train-{{000000..000001}}.tar")


def test_splits_by_name(tmp_path):
    for name in ("coco_val_3", "00017", "restval-1", "dev", "latest-train", "x-TEST-1"):
        write(tmp_path / f"{name}.tar", [])
    found = {s: [f.stem for f in files] for s, files in shards.by_split(tmp_path).items()}
    assert found == {
        "train": ["00017", "latest-train", "restval-1"],
        "validation": ["coco_val_3", "dev"],
        "test": ["x-TEST-1"],
    }


def test_json_captions_of_both_kinds_and_other_members(tmp_path):
    text = json.dumps({"caption": "one", "captions": ["two", " "], "id": 7}).encode()
    write(
        tmp_path / "train.tar",
        [("a.cls", b"3"), *sample("a", 10, text, "json"), ("README", b"hello")],
    )
    (first,) = shards.samples([tmp_path / "train.tar"])
    assert first.captions == ["two", "one"]
    assert str(first.image) == f"{tmp_path}/train.tar:a.png"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    mark = b"\xef\xbb\xbf"
    members = sample("a", 10, mark + b"one\r\ntwo\r\n") + sample(
        "b", 20, mark + b'{"caption": "three"}', "json"
    )
    write(tmp_path / "train.tar", members)
    read = [s.captions for s in shards.samples([tmp_path / "train.tar"])]
    assert read == [["one", "two"], ["three"]]


def test_samples_without_image_or_caption_are_counted(tmp_path, caplog):
    make(tmp_path)
    write(tmp_path / "train-2.tar", [*sample("40", 1), ("41.png", png(2)), ("42.txt", b"a cat")])
    data = folders.load("coco", tmp_path, image_size=SIZE)
    assert data.train.ids == [0, 1, 10, 11, 40]
    assert "left out 2 of 7 samples without an image or a caption" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample("0", 1) + sample("1", 1) + sample("0", 1), "train.tar: key 0 is there a second"),
        (sample("a", 1, b"{", "json"), "train.tar:a.json cannot be read: Expecting property"),
        (sample("a", 1, b"[1]", "json"), "train.tar:a.json must be a JSON object, got list"),
        (sample("a", 1, b'{"captions": "x"}', "json"), "'captions' must be of type list, got 'x'"),
        (sample("a", 1, b'{"caption": 3}', "json"), "a.json: caption 0 must be text, got 3"),
        (sample("a", 1, b"\xff\xfe"), "train.tar:a.txt cannot be read: .*decode byte 0xff"),
        ([], "the train split of .* is empty"),
    ],
)
def test_broken_members(tmp_path, members, message):
    write(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=message):
        folders.load("coco", tmp_path, image_size=SIZE)


def test_broken_files(tmp_path):
    whole = make(tmp_path) / "train-000001.tar"
    content = whole.read_bytes()
    whole.write_bytes(content[:900])
    with pytest.raises(UserError, match=r"train-000001.tar is not a complete tar file: .*end"):
        folders.load("coco", tmp_path)
    whole.write_bytes(b"not a tar file" * 99)
    with pytest.raises(UserError, match=r"train-000001.tar is not a complete tar file"):
        folders.load("coco", tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "train.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train.tar.gz is compressed .*: gunzip it"):
        folders.load("coco", packed)


def test_a_member_that_was_cut_or_is_no_image_is_named(tmp_path):
    file = tmp_path / "train.tar"
    write(file, [*sample("a", 1), ("b.png", b"no image")])
    first, second = (s.image for s in shards.samples([file]))
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(UserError, match=r"cannot read the image .*train.tar:b.png"):
        load_image(second, SIZE)
    file.write_bytes(file.read_bytes()[: first.offset + 5])
    with pytest.raises(UserError, match=r"train.tar:a.png: .* ends after 5 of \d+ bytes"):
        load_image(first, SIZE)
