"""The layouts that official downloads unpack to, and which of several sources is read."""

import json
import logging
import shutil

import pytest
import torch
from official import (
    MAKE,
    edit,
    load,
    make_coco,
    make_nlvr2,
    make_snli_ve,
    make_vqa,
    picture,
    write,
)

from optima_fast.errors import UserError
from optima_fast.tasks import annotations, folders


def names(split):
    return [path.name for path in split.images.paths]


KARPATHY = (  # place, split, number of images
    ("train2014", "train", 3),
    ("val2014", "restval", 2),
    ("val2014", "val", 2),
    ("val2014", "test", 1),
)


def make_karpathy(root, year=2014):
    """Image i has i + 1 captions; ids count on over the splits."""
    images = []
    for place, split, count in KARPATHY:
        for _ in range(count):
            i = len(images)
            name = f"COCO_{place}_{i:012d}.jpg"
            picture(root / (f"{place}/{name}" if year == 2014 else f"train2017/{i:012d}.jpg"), i)
            sentences = [{"raw": f"Caption {k}\nof  {i}. ", "sentid": k} for k in range(i + 1)]
            images.append(
                {"filepath": place, "filename": name, "split": split, "cocoid": i, "imgid": i}
                | {"sentences": sentences}
            )
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return root


def make_vqa_test(root):
    """Two test images, three questions; test-dev has the first of them."""
    for image in (5, 6):
        picture(root / "test2015" / f"COCO_test2015_{image:012d}.jpg", image)
    questions = [
        {"question": f"Which number {n}?", "question_id": n, "image_id": 5 + n % 2}
        for n in (50, 51, 52)
    ]
    write(root / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions})
    write(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions[:1]})
    return root


@pytest.mark.parametrize("year", [2014, 2017])
def test_karpathys_splits_are_used_as_they_are(tmp_path, year):
    data = load("coco", make_karpathy(tmp_path, year))
    assert [split.ids for split in (data.train, data.validation, data.test)] == [
        [0, 1, 2, 3, 4],
        [5, 6],
        [7],
    ]
    assert [len(group) for group in data.train.references] == [1, 2, 3, 4, 5]
    assert data.validation.references[0][1] == "Caption 1 of 5."
    if year == 2014:
        assert names(data.train)[2:4] == [
            "COCO_train2014_000000000002.jpg",
            "COCO_val2014_000000000003.jpg",
        ]
    else:
        assert names(data.train)[3] == "000000000003.jpg"


def test_karpathys_file_wins_and_says_so(tmp_path, caplog):
    make_karpathy(make_coco(tmp_path))
    (tmp_path / "train-0.tar").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        data = load("coco", tmp_path)
    assert len(data.test.images) == 1
    line = "read dataset_coco.json, not captions_*2017.json nor *.tar"
    assert sum(line in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "'split' must be one of train, restval, val, test, got 'dev'"),
        ({"filepath": "train2017"}, "'filepath' must be one of train2014, val2014, got"),
        ({"cocoid": 3}, "cocoid 3 is there a second time"),
        ({"cocoid": None}, "'cocoid' must be of type int, got None"),
        ({"sentences": []}, "must hold at least one sentence, got none"),
        ({"sentences": [{"tokens": []}]}, r"sentences\[0\]: 'raw' is missing"),
        ({"sentences": ["a cat"]}, r"sentences\[0\] must be a JSON object, got str"),
    ],
)
def test_entries_of_karpathys_file_of_a_wrong_form(tmp_path, change, message):
    edit(make_karpathy(tmp_path) / "dataset_coco.json", lambda c: c["images"][4].update(change))
    with pytest.raises(UserError, match=rf"dataset_coco.json, images\[4\].*{message}"):
        load("coco", tmp_path)


def test_captions_of_2014_and_annotations_beside_the_images(tmp_path):
    make_coco(tmp_path)
    for part in ("train", "val"):
        old = tmp_path / "annotations" / f"captions_{part}2017.json"
        old.rename(tmp_path / f"captions_{part}2014.json")
        (tmp_path / f"{part}2017").rename(tmp_path / f"{part}2014")
    data = load("coco", tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 6, 6]
    assert data.train.ids == [0, 1, 2, 3]
    assert data.train.images.paths[0].parent == tmp_path / "train2014"
    make_coco(tmp_path, images=5)
    assert data.train.ids != load("coco", tmp_path).train.ids  # 2017 is read where both are there


@pytest.mark.parametrize("task", MAKE)
def test_annotations_that_an_editor_on_windows_saved(tmp_path, task):
    """With a byte order mark and its line ends they say the same."""
    root = MAKE[task](tmp_path)
    before = [getattr(load(task, root), name).digest() for name in folders.SPLITS]
    files = [path for path in root.rglob("*.json*") if path.is_file()]
    for path in files:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert files
    assert [getattr(load(task, root), name).digest() for name in folders.SPLITS] == before


@pytest.mark.parametrize("place", ["annotations", "Questions", "data"])
def test_annotations_in_a_folder_of_their_own_and_images_in_theirs(tmp_path, place):
    plain = load("vqa", make_vqa(tmp_path / "plain"))
    root = make_vqa(tmp_path / "moved")
    (root / place).mkdir()
    for file in root.glob("*.json"):
        file.rename(root / place / file.name)
    (root / "Images" / "mscoco").mkdir(parents=True)
    for part in ("train2014", "val2014"):
        (root / part).rename(root / "Images" / "mscoco" / part)
    moved = load("vqa", root)
    assert torch.equal(moved.train.text, plain.train.text)
    assert torch.equal(moved.train.batch([1])["images"], plain.train.batch([1])["images"])


def test_flickr30k_under_its_other_name(tmp_path):
    root = make_snli_ve(tmp_path)
    (root / "flickr30k-images").rename(root / "flickr30k_images")
    assert len(load("snli_ve", root).train) == 9


def test_nlvr2_as_its_archives_unpack(tmp_path):
    """images/train/<directory>/ beside dev/ and test1/, annotations in data/ as in its repository;
    test2 has been public since 2022.
    """
    root = make_nlvr2(tmp_path, parts=("train",), layout="train/{directory}")
    make_nlvr2(root, parts=("dev", "test1", "test2"))
    for part in ("dev", "test1", "test2"):
        (root / "images" / part).rename(root / part)
    (root / "data").mkdir()
    for file in root.glob("*.json"):
        file.rename(root / "data" / file.name)
    data = load("nlvr2", root, further=("test2",))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 12, 12]
    assert data.train.images.paths[0] == root / "images" / "train" / "0" / "train-0-0-img0.png"
    further = data.split("test2")
    assert further.ids[0] == "test2-0-0-0"
    assert further.measurable
    assert set(further.target.tolist()) == {0, 1}


def test_vqa_test_questions_are_read_on_demand_and_have_no_targets(tmp_path):
    root = make_vqa_test(make_vqa(tmp_path))
    data = load("vqa", root, further=("test-std", "test-dev"))
    assert load("vqa", root).further == {}
    split = data.split("test-std")
    assert split.ids == [50, 51, 52]
    assert data.split("test-dev").ids == [50]
    assert split.image_index[:, 0].tolist() == [0, 1, 0]
    assert names(split)[1] == "COCO_test2015_000000000006.jpg"
    assert "target" not in split.batch([0, 1])
    assert not split.measurable
    with pytest.raises(ValueError, match="the test-std split has no targets: it can be predicted"):
        data.evaluate(torch.nn.Identity(), split)
    with pytest.raises(UserError, match=r"unknown split 'test-sd'; did you mean 'test-std'"):
        data.split("test-sd")


def test_further_splits_that_are_not_there(tmp_path):
    root = make_vqa(tmp_path)
    with pytest.raises(UserError, match="has no test-dev split of vqa: its file is not there"):
        load("vqa", root, further=("test-dev",))
    with pytest.raises(UserError, match="unknown split of vqa 'test2'; did you mean 'test-std'"):
        load("vqa", root, further=("test2",))
    make_vqa_test(root)
    shutil.rmtree(root / "test2015")
    with pytest.raises(UserError, match=r"no image folder .*test2015"):
        load("vqa", root, further=("test-dev",))


def test_official_ids_are_kept(tmp_path):
    vqa = load("vqa", make_vqa(tmp_path / "vqa"))
    assert vqa.train.ids == [31, 30, 21, 20, 11, 10, 1, 0]
    snli_ve = load("snli_ve", make_snli_ve(tmp_path / "snli_ve"))
    assert snli_ve.test.ids[:4] == ["20.jpg#0", "20.jpg#1", "20.jpg#2", "21.jpg#0"]
    nlvr2 = load("nlvr2", make_nlvr2(tmp_path / "nlvr2"))
    assert nlvr2.validation.ids[:3] == ["dev-0-0-0", "dev-0-0-1", "dev-0-1-0"]


def test_ids_stay_with_their_examples_where_images_are_absent(tmp_path):
    root = make_coco(tmp_path)
    (root / "train2017" / f"{1:012d}.jpg").unlink()
    data = load("coco", root)
    assert data.train.ids == [0, 2, 3]
    assert [group[0].split()[-1] for group in data.train.references] == ["0.", "2.", "3."]


def test_what_was_read_is_named(tmp_path):
    root = make_vqa(tmp_path)
    reading = annotations.vqa(root, annotations.Listing())["validation"]()
    assert [file.name for file in reading.files] == [
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
    ]
    assert json.loads(reading.files[0].read_text())["questions"]
