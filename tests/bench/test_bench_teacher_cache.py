"""The bench of the teacher cache: every way takes its steps."""

from __future__ import annotations

import re

import bench_teacher_cache


def test_each_way_has_its_line(capsys):
    assert bench_teacher_cache.main(["--images", "64", "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^\w+", said, re.MULTILINE) == ["way", *bench_teacher_cache.WAYS, "the"]
    assert "3.24 MB (image 64 x 9,216, " in said
