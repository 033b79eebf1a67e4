"""Every way in which a data folder can be wrong."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from official import MAKE, edit, edit_lines, files, load, make_coco, make_nlvr2, make_vqa, write

from optima_fast.errors import UserError
from optima_fast.tasks import folders


@pytest.mark.parametrize("task", MAKE)
def test_absent_images_are_counted_and_the_first_is_named(tmp_path, task, caplog):
    root = MAKE[task](tmp_path)
    whole = len(load(task, root).train)
    gone = load(task, root).train.images.paths[0]
    gone.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = load(task, root)
    left = len(data.train)
    assert left < whole
    assert gone.name not in files(data.train)
    line = next(r.getMessage() for r in caplog.records if "image is not there" in r.getMessage())
    assert f"left out {whole - left} of {whole} train examples" in line
    assert gone.name in line
    for path in gone.parent.glob("**/*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no image of the train split is there, the first would be .*g: "
    ):
        load(task, root)


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("vqa", "train2014"),
        ("coco", "val2017"),
        ("snli_ve", "flickr30k-images"),
        ("nlvr2", "images"),
    ],
)
def test_missing_image_folder(tmp_path, task, folder):
    root = MAKE[task](tmp_path)
    shutil.rmtree(root / folder)
    with pytest.raises(UserError, match=f"no image folder .*{folder}"):
        load(task, root)


@pytest.mark.parametrize("task", MAKE)
def test_missing_training_files_are_named(tmp_path, task):
    with pytest.raises(UserError, match=r"no training annotations in .*: .*train.* must be there"):
        load(task, tmp_path)


def test_missing_folder_and_half_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"no data folder .*nowhere"):
        load("vqa", tmp_path / "nowhere")
    root = make_vqa(tmp_path)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"no file .*v2_mscoco_val2014_annotations\.json"):
        load("vqa", root)


FILES = {
    "vqa": "v2_mscoco_train2014_annotations.json",
    "coco": "annotations/captions_train2017.json",
    "snli_ve": "snli_ve_train.jsonl",
    "nlvr2": "train.json",
}


@pytest.mark.parametrize("task", MAKE)
def test_malformed_json_names_file_and_line(tmp_path, task):
    root = MAKE[task](tmp_path)
    file = root / FILES[task]
    if task in ("vqa", "coco"):
        file.write_text(json.dumps(json.loads(file.read_text()), indent=1)[:-300])
        line = len(file.read_text().split("\n"))
    else:
        lines = file.read_text().splitlines()
        lines[4] = lines[4][:-7]
        file.write_text("\n".join(lines))
        line = 5
    with pytest.raises(UserError, match=rf"{file.name}, line {line}: not valid JSON \(.+\)"):
        load(task, root)
    file.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UserError, match=f"{file.name} is not UTF-8 text"):
        load(task, root)


@pytest.mark.parametrize("task", MAKE)
def test_empty_split(tmp_path, task):
    root = MAKE[task](tmp_path)
    if task == "vqa":
        write(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})
        write(root / FILES[task], {"annotations": []})
    else:
        write(root / FILES[task], {"images": [], "annotations": []} if task == "coco" else "\n")
    with pytest.raises(UserError, match=r"the train split of .* is empty"):
        load(task, root)


@pytest.mark.parametrize(
    ("task", "file", "where", "what"),
    [
        ("vqa", FILES["vqa"], r"annotations\[8\]", "question_id 31"),
        ("vqa", "v2_OpenEnded_mscoco_train2014_questions.json", r"questions\[8\]", "question_id 0"),
        ("coco", FILES["coco"], r"annotations\[12\]", "annotation id 0"),
        ("snli_ve", FILES["snli_ve"], "line 13", "pairID 00.jpg#0"),
        ("nlvr2", FILES["nlvr2"], "line 13", "identifier train-0-0-0"),
    ],
)
def test_duplicate_ids(tmp_path, task, file, where, what):
    root = MAKE[task](tmp_path)

    def repeat(content):
        rows = content
        if isinstance(content, dict):
            rows = content.get("annotations") or content["questions"]
        rows.append(rows[0])

    (edit if task in ("vqa", "coco") else edit_lines)(root / file, repeat)
    with pytest.raises(UserError, match=rf"{Path(file).name}, {where}: {what} is there a second"):
        load(task, root)


def test_duplicate_image_ids(tmp_path):
    root = make_coco(tmp_path)
    edit(root / FILES["coco"], lambda c: c["images"].append(c["images"][1]))
    with pytest.raises(UserError, match=r"images\[4\]: image id 1 is there a second time"):
        load("coco", root)


def test_vqa_questions_and_annotations_must_match(tmp_path):
    root = make_vqa(tmp_path)
    questions = root / "v2_OpenEnded_mscoco_train2014_questions.json"
    edit(questions, lambda c: c["questions"].pop())
    with pytest.raises(UserError, match=r"annotations\[0\] answers question_id 31, which is not"):
        load("vqa", root)
    root = make_vqa(tmp_path)
    edit(root / FILES["vqa"], lambda c: c["annotations"].pop())
    with pytest.raises(UserError, match=r"question_id 0 of .* has no annotation in"):
        load("vqa", root)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("vqa", {"answers": []}, "must hold at least one answer, got none"),
        ("vqa", {"answers": [{"answer": 3}]}, "answer 0: 'answer' must be of type str, got 3"),
        ("vqa", {"answers": ["yes"]}, "answer 0 must be a JSON object, got str"),
        ("vqa", {"question_id": "31"}, "'question_id' must be of type int, got '31'"),
        ("vqa", {"question_id": True}, "'question_id' must be of type int, got True"),
        ("coco", {"image_id": 77}, "image_id 77, which is not among the file's images"),
        ("coco", {"caption": None}, "'caption' must be of type str, got None"),
        ("snli_ve", {"gold_label": "maybe"}, "one of entailment, neutral, contradiction, got 'm"),
        ("snli_ve", {"Flickr30K_ID": []}, r"'Flickr30K_ID' must be of type str or int, got \[\]"),
        ("nlvr2", {"label": "Yes"}, "'label' must be one of false, true, got 'yes'"),
        ("nlvr2", {"identifier": "train-1"}, "split-set-pair-sentence, got 'train-1'"),
    ],
)
def test_entries_of_a_wrong_form(tmp_path, task, change, message):
    root = MAKE[task](tmp_path)
    if task in ("vqa", "coco"):
        edit(root / FILES[task], lambda c: c["annotations"][0].update(change))
        where = r"annotations\[0\]"
    else:
        edit_lines(root / FILES[task], lambda c: c[0].update(change))
        where = "line 1"
    with pytest.raises(UserError, match=f"{Path(FILES[task]).name}, {where}.*{message}"):
        load(task, root)


def test_missing_keys_and_other_documents(tmp_path):
    root = make_nlvr2(tmp_path)
    edit_lines(root / "dev.json", lambda c: c[2].pop("sentence"))
    with pytest.raises(UserError, match=r"dev.json, line 3: 'sentence' is missing"):
        load("nlvr2", root)
    write(root / "dev.json", "[1]\n")
    with pytest.raises(UserError, match=r"dev.json, line 1 must be a JSON object, got list"):
        load("nlvr2", root)
    root = make_coco(tmp_path)
    write(root / FILES["coco"], [])
    with pytest.raises(UserError, match="must be a JSON object with a list 'images'"):
        load("coco", root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be an integer >= 1, got 0"),
        ({"text_length": 2}, "text_length must be an integer >= 3, got 2"),
        ({"answers": 1.5}, "answers must be an integer >= 1, got 1.5"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, got 1.0"),
        ({"imagesize": 3}, r"unknown option .*'imagesize'; did you mean 'image_size'"),
        ({"min_count": 999}, "no word occurs min_count=999 times"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    root = make_vqa(tmp_path)
    with pytest.raises(UserError, match=message):
        folders.load("vqa", root, **options)
    with pytest.raises(UserError, match=r"unknown task 'vqb'; did you mean 'vqa'"):
        folders.load("vqb", root)
