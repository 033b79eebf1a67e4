"""The report over a benchmark's JSON: its table, and when it says that something became slower."""

from __future__ import annotations

import json

import pytest
import report


def write(path, **ratios):
    """A file of one group, with a ratio for each contender; blockwise is ours."""
    benchmarks = [
        {
            "fullname": f"bench/bench_losses.py::test_loss[c-{name}]",
            "group": "c",
            "extra_info": {
                "provider": name, "ours": name == "blockwise", "ms": 2.0, "iqr": 0.1,
                "ratio": ratio, "anchor": "eager", "peak_mb": 3.0, "share": None,
            },
        }
        for name, ratio in ratios.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return str(path)


def test_a_table(tmp_path, capsys):
    assert report.main([write(tmp_path / "a.json", eager=1.0, blockwise=0.5)]) == 0
    assert "| c | blockwise | 2 | 0.1 | 0.5 | eager | 3 |  |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "code"), [(0.5, 0), (0.4, 0), (0.59, 0), (0.61, 1), (None, 0)]
)  # fmt: skip
def test_ours_becoming_slower_is_an_error(tmp_path, capsys, now, code):
    old = write(tmp_path / "old.json", eager=1.0, blockwise=0.5, compile=0.7)
    new = write(tmp_path / "new.json", eager=1.0, blockwise=now, compile=1.4)  # theirs may
    assert report.main([new, "--against", old]) == code
    out = capsys.readouterr().out
    assert "| 0.7 | +100% |" in out
    assert ("c, blockwise: 0.61 of eager, was 0.5: 1.22 times as slow" in out) == bool(code)
    assert report.main([new, "--against", old, "--limit", "0.3"]) == 0


def test_files_without_a_benchmark_in_common(tmp_path, capsys):
    old, new = write(tmp_path / "old.json", gemm=0.5), write(tmp_path / "new.json", eager=1.0)
    with pytest.raises(SystemExit):
        report.main([new, "--against", old])
    assert "must have a benchmark in common" in capsys.readouterr().err
