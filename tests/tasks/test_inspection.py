"""The validator of data folders: what it counts, what it says is missing, when a run can start."""

import shutil

import pytest
from official import MAKE, edit, make_coco, make_nlvr2, make_snli_ve, make_vqa, shared

from optima_fast import doctor
from optima_fast.errors import UserError
from optima_fast.tasks import folders
from optima_fast.tasks.inspection import inspect, lines


def text(report):
    return "\n".join(lines(report))


def urls(report):
    return [download.url.rpartition("/")[2] for download in report.downloads]


def row(report, name):
    """Counts of a split as the table shows them."""
    return next(line.split()[1:] for line in lines(report) if line.startswith(f"  {name} "))


@pytest.mark.parametrize("task", MAKE)
def test_a_run_can_start_where_the_data_loads(tmp_path, task):
    root = MAKE[task](tmp_path)
    report = inspect(task, root, decode=2)
    assert report.problems == []
    assert {part.name for part in report.parts} >= {"train", "validation"}
    assert all((part.absent, part.broken, part.decoded) == ([], [], 2) for part in report.parts)
    assert urls(report) == []  # though official sizes are larger
    assert text(report).endswith("a run can start: complete, smaller than the official set")
    assert len(text(report).splitlines()) < 24


def test_questions_images_and_those_that_are_not_there_are_counted(tmp_path):
    root = make_vqa(tmp_path, images=5)
    gone = [root / "train2014" / f"COCO_train2014_{i:012d}.jpg" for i in (1, 3)]
    for file in gone:
        file.unlink()
    report = inspect("vqa", root)
    assert row(report, "train") == ["10", "443,757", "5", "82,783", "2"]
    assert row(report, "validation") == ["10", "214,354", "5", "40,504", "0"]
    assert set(report.parts[0].absent) == set(gone)
    assert "train: 2 images are not there, first " in text(report)
    assert report.problems == []
    assert "train2014.zip  (13 GB, into train2014/)" in text(report)
    assert text(report).endswith("a run can start, on the part that is there")
    assert urls(report) == ["train2014.zip"]
    assert any("divided its held-out split by image into 6 train, " in n for n in report.notes)


def test_a_folder_without_any_image(tmp_path):
    root = make_vqa(tmp_path)
    for part in ("train2014", "val2014"):
        shutil.rmtree(root / part)
    report = inspect("vqa", root, decode=-1)
    assert row(report, "train") == ["8", "443,757", "4", "82,783", "4"]
    assert [p for p in report.problems if "no image folder" in p] == report.problems
    assert len(report.problems) == 2
    assert {"train2014.zip", "val2014.zip"} <= set(urls(report))
    assert text(report).endswith("a run cannot start")


@pytest.mark.parametrize("task", MAKE)
def test_a_wrong_folder_is_told_the_right_one(tmp_path, task):
    root = MAKE[task](tmp_path / "all" / "right")
    other = "coco" if task == "vqa" else "vqa"
    for wrong, hint in (
        (tmp_path / "all", f"give {root}, which has them"),
        (next(path for path in root.iterdir() if path.is_dir()), f"give {root}, which has them"),
    ):
        # COCO's file lies in a folder of its own, where it is found as well
        if task == "coco" and wrong.name == "annotations":
            continue
        with pytest.raises(UserError, match=f"no training annotations in .*; {hint}$"):
            folders.load(task, wrong)
        assert hint in text(inspect(task, wrong))
    with pytest.raises(UserError, match=f"; what is there is of --task {task}$"):
        folders.load(other, root)
    lone = tmp_path / "lone" / "none"
    lone.mkdir(parents=True)
    with pytest.raises(UserError, match="must be there$"):
        folders.load(task, lone)


@pytest.mark.parametrize("task", MAKE)
def test_an_empty_folder_and_none(tmp_path, task):
    report = inspect(task, tmp_path)
    assert report.parts == []
    assert "no training annotations in" in report.problems[0]
    assert len(report.downloads) > 1
    assert urls(report) == urls(inspect(task, tmp_path / "nowhere"))
    assert "no data folder" in inspect(task, tmp_path / "nowhere").problems[0]
    assert text(report).endswith("a run cannot start")


def test_every_broken_split_is_told_at_once(tmp_path):
    root = make_vqa(tmp_path)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    edit(root / "v2_mscoco_train2014_annotations.json", lambda c: c["annotations"].pop())
    report = inspect("vqa", root)
    assert len(report.problems) == 2
    assert "question_id 0 of " in report.problems[0]
    assert "no file " in report.problems[1]
    assert "v2_Annotations_Val_mscoco.zip" in urls(report)


def test_left_out_pairs_and_files_are_named(tmp_path):
    said = text(inspect("snli_ve", make_snli_ve(tmp_path)))
    assert "snli_ve_dev.jsonl; 3 pairs without gold label left out" in said


def test_images_that_cannot_be_decoded(tmp_path):
    root = make_nlvr2(tmp_path)
    broken = root / "images" / "dev" / "dev-1-0-img0.png"
    broken.write_bytes(b"cut")
    assert inspect("nlvr2", root).problems == []
    report = inspect("nlvr2", root, decode=-1)
    assert len(report.problems) == 1
    assert "1 of 12 images of validation cannot be decoded" in report.problems[0]
    assert broken.name in report.problems[0]
    assert "validation: 11 of 12 images decoded" in text(report)


def test_a_sample_of_images_is_spread_evenly(tmp_path):
    root = make_vqa(tmp_path, images=6)
    (root / "train2014" / f"COCO_train2014_{2:012d}.jpg").write_bytes(b"cut")
    # images 5 and 2: annotations are written backwards
    train, _ = inspect("vqa", root, decode=2).parts
    assert (train.decoded, len(train.broken)) == (2, 1)
    assert inspect("vqa", root, decode=99).parts[0].decoded == 6


def test_too_few_images_to_divide(tmp_path):
    report = inspect("coco", make_coco(tmp_path, parts=("train",), images=2))
    assert "has 2 image(s) to divide into 3 splits" in report.problems[0]


def test_shards_that_are_not_there_are_not_to_download(tmp_path):
    report = inspect("coco", tmp_path / "train-{0..3}.tar")
    assert "4 of 4 shards of " in report.problems[0]
    assert report.downloads == []


def test_damaged_shards_in_a_folder_are_not_to_download(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"")
    report = inspect("coco", tmp_path)
    assert "is not a complete tar file" in report.problems[0]
    assert report.downloads == []


def test_splits_for_predictions_alone_do_not_stop_a_run(tmp_path):
    root = make_nlvr2(tmp_path, parts=("train", "dev", "test1", "test2"))
    shutil.rmtree(root / "images" / "test2")
    report = inspect("nlvr2", root)
    assert report.problems == []
    assert any("no image folder" in note for note in report.notes)
    assert [part.name for part in report.parts][-1] == "test2"


def test_official_sizes_leave_nothing_to_say(tmp_path, monkeypatch):
    """Sizes of the folder at hand in place of the official ones."""
    root = make_nlvr2(tmp_path)
    from optima_fast.tasks import inspection
    from optima_fast.tasks.downloads import Size

    sizes = {"nlvr2": dict.fromkeys(folders.SPLITS, Size(12, 12))}
    monkeypatch.setattr(inspection, "SIZES", sizes)
    report = inspect("nlvr2", root)
    assert report.downloads == []
    assert text(report).endswith("a run can start")
    sizes["nlvr2"]["test"] = Size(13, 12)
    report = inspect("nlvr2", root)
    assert report.downloads == []
    assert text(report).endswith("complete, smaller than the official set")
    (root / "images" / "test1" / "test1-0-0-img0.png").unlink()
    report = inspect("nlvr2", root)
    assert [d.folder for d in report.downloads] == ["test1/"]
    assert text(report).endswith("a run can start, on the part that is there")


def test_official_dev_lines_without_images(tmp_path):
    shutil.copy(shared("nlvr2", "dev.json"), tmp_path / "dev.json")
    report = inspect("nlvr2", tmp_path)
    assert row(report, "validation") == ["6,982", "6,982", "8,102", "8,102", "8,102"]


def test_the_command_line(tmp_path, capsys):
    root = make_coco(tmp_path)
    assert doctor.main(["--task", "coco", "--data", str(root), "--images", "all"]) == 0
    assert "train: 4 of 4 images decoded" in capsys.readouterr().out
    assert doctor.main(["--task", "vqa", "--data", str(root)]) == 1
    assert "problem: no training annotations" in capsys.readouterr().out
    assert doctor.main(["--task", "vqb", "--data", str(root)]) == 2
    assert "unknown task 'vqb'; did you mean 'vqa'?" in capsys.readouterr().err
    for wrong in (["--task", "coco"], ["--task", "coco", "--data", ".", "--images", "-3"]):
        assert doctor.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="unknown task"):
        inspect("vqb", root)
