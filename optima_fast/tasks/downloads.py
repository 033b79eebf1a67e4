"""What the official data sets hold and where each part of them comes from.

Sizes of downloads are rounded; "about" marks those that are no publisher's figure.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """A split's examples and the images they show; None where it is not published."""

    examples: int
    images: int | None


@dataclass(frozen=True)
class Download:
    """A file to fetch, or a page to ask at.

    Attributes:
        url: Where.
        size: How large.
        splits: Those it is needed for.
        folder: Of images, where they come to lie below the data folder; "" for annotations.
    """

    url: str
    size: str
    splits: tuple[str, ...]
    folder: str = ""


NOUNS = {"vqa": "questions", "coco": "captions", "snli_ve": "pairs", "nlvr2": "sentences"}

# by task, or for coco by the name of the file that was read, and by split
SIZES: dict[str, dict[str, Size]] = {
    "vqa": {
        "train": Size(443_757, 82_783),
        "validation": Size(214_354, 40_504),
        "test-dev": Size(107_394, None),
        "test-std": Size(447_793, 81_434),
    },
    "snli_ve": {
        "train": Size(529_527, 29_783),
        "validation": Size(17_858, 1_000),
        "test": Size(17_901, 1_000),
    },
    "nlvr2": {
        "train": Size(86_373, None),
        "validation": Size(6_982, 8_102),
        "test": Size(6_967, None),
        "test2": Size(6_970, None),
    },
    "dataset_coco.json": {
        "train": Size(566_747, 113_287),
        "validation": Size(25_010, 5_000),
        "test": Size(25_010, 5_000),
    },
    "captions_train2017.json": {"train": Size(591_753, 118_287)},
    "captions_val2017.json": {"validation": Size(25_014, 5_000)},
    "captions_train2014.json": {"train": Size(414_113, 82_783)},
    "captions_val2014.json": {"validation": Size(202_654, 40_504)},
}

_ALL = ("train", "validation", "test")
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_"
_COCO = "http://images.cocodataset.org/"
_FLICKR = Download(
    "http://shannon.cs.illinois.edu/DenotationGraph/ (by a form)",
    "about 4 GB",
    _ALL,
    "flickr30k-images/",
)
_NLVR2_IMAGES = "https://goo.gl/forms/yS29stWnFWzrDBFH3 (by a form)"

DOWNLOADS: dict[str, tuple[Download, ...]] = {
    "vqa": (
        Download(_VQA + "Questions_Train_mscoco.zip", "about 7 MB", ("train",)),
        Download(_VQA + "Annotations_Train_mscoco.zip", "about 21 MB", ("train",)),
        Download(_VQA + "Questions_Val_mscoco.zip", "about 3 MB", ("validation",)),
        Download(_VQA + "Annotations_Val_mscoco.zip", "about 10 MB", ("validation",)),
        Download(_VQA + "Questions_Test_mscoco.zip", "about 8 MB", ("test-dev", "test-std")),
        Download(_COCO + "zips/train2014.zip", "13 GB", ("train",), "train2014/"),
        Download(_COCO + "zips/val2014.zip", "6 GB", ("validation",), "val2014/"),
        Download(_COCO + "zips/test2015.zip", "12 GB", ("test-dev", "test-std"), "test2015/"),
    ),
    "snli_ve": (
        Download(
            "https://github.com/necla-ml/SNLI-VE (links to a file a split)",
            "about 0.5 GB",
            _ALL,
        ),
        _FLICKR,
    ),
    "nlvr2": (
        Download(
            "https://github.com/lil-lab/nlvr/tree/master/nlvr2/data",
            "about 50 MB",
            ("train", "validation", "test", "test2"),
        ),
        Download(_NLVR2_IMAGES, "not published", ("train",), "images/train/"),
        Download(_NLVR2_IMAGES, "not published", ("validation",), "dev/"),
        Download(_NLVR2_IMAGES, "not published", ("test",), "test1/"),
        Download(_NLVR2_IMAGES, "not published", ("test2",), "test2/"),
    ),
    "coco": (
        Download(
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "about 36 MB",
            _ALL,
        ),
        Download(_COCO + "zips/train2014.zip", "13 GB", ("train",), "train2014/"),
        Download(_COCO + "zips/val2014.zip", "6 GB", _ALL, "val2014/"),
    ),
    "coco 2017": (
        Download(_COCO + "annotations/annotations_trainval2017.zip", "241 MB", _ALL),
        Download(_COCO + "zips/train2017.zip", "18 GB", ("train",), "train2017/"),
        Download(_COCO + "zips/val2017.zip", "1 GB", ("validation",), "val2017/"),
    ),
    "coco 2014": (
        Download(_COCO + "annotations/annotations_trainval2014.zip", "241 MB", _ALL),
        Download(_COCO + "zips/train2014.zip", "13 GB", ("train",), "train2014/"),
        Download(_COCO + "zips/val2014.zip", "6 GB", ("validation",), "val2014/"),
    ),
}
