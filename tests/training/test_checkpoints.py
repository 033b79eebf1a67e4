"""Files are whole or not there, and damage is told."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from optima_fast.errors import UserError
from optima_fast.training import checkpoints
from optima_fast.training.run import Run


def test_text_and_json_come_back(tmp_path):
    checkpoints.write_text(tmp_path / "a" / "b.txt", "déjà vu\n")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "déjà vu\n"
    checkpoints.write_json(tmp_path / "c.json", {"x": [1, 2.5, None]})
    assert checkpoints.read_json(tmp_path / "c.json") == {"x": [1, 2.5, None]}
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n')
    assert checkpoints.read_json(tmp_path / "d.json") == {"x": 1}
    (tmp_path / "metrics.jsonl").write_bytes(b'\xef\xbb\xbf{"step": 1}\r\n{"step": 2}\r\n')
    assert Run(tmp_path).metrics() == [{"step": 1}, {"step": 2}]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("flush") or flush(file))
    monkeypatch.setattr(Path, "replace", lambda *p: done.append("rename") or rename(*p))
    checkpoints.write_text(tmp_path / "a.txt", "new")
    assert done == ["flush", "rename"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    checkpoints.write_text(path, "old")

    def fail(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot save .*a\.txt: No space left on device; earlier"):
        checkpoints.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_real_limit_on_file_size_keeps_the_checkpoint_before(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 1, {"x": torch.zeros(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot save .*File too large"):
            checkpoints.save_checkpoint(tmp_path, 2, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoints.load_checkpoint(tmp_path / "step-00000001.pt")["x"].sum() == 0


def test_only_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoints.save_checkpoint(tmp_path, step, {"step": step})
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["step-00000015.pt", "step-00000020.pt"]
    newest = checkpoints.latest_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoints.load_checkpoint(newest) == {"step": 20}
    assert checkpoints.latest_checkpoint(tmp_path / "nowhere") is None


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    where = data.index(b"\x07" * 64) + 10  # inside the tensor's own bytes
    return data[:where] + b"\xff" + data[where + 1 :]


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, lambda data: b"", lambda data: b"no checkpoint"]
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    for step in (1, 2):
        checkpoints.save_checkpoint(
            tmp_path, step, {"x": torch.full((5000,), 7, dtype=torch.uint8)}
        )
    path = tmp_path / "step-00000002.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(checkpoints.Damaged, match=r"00000002\.pt is damaged \("):
        checkpoints.load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({"x": Payload()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_checkpoint(tmp_path / "step-00000001.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("place", [-1, -17, -25])
def test_a_bit_that_turned_over_is_seen(tmp_path, place):
    path, model = tmp_path / "w.safetensors", nn.Linear(3, 2)
    checkpoints.save_weights(path, model)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    before = model.weight.clone()
    with pytest.raises(UserError, match="is damaged: its weights are not those that were written"):
        checkpoints.load_weights(path, model)
    assert torch.equal(model.weight, before)


def test_equal_weights_are_equal_files(tmp_path):
    model = nn.Linear(3, 2)
    for i in range(6):  # the library's order of metadata is drawn anew each time
        checkpoints.save_weights(tmp_path / f"{i}.safetensors", model)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_weights_of_another_writer_have_no_digest(tmp_path):
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    safetensors.torch.save_file(one.state_dict(), tmp_path / "w.safetensors")
    checkpoints.load_weights(tmp_path / "w.safetensors", two)
    assert torch.equal(one.weight, two.weight)


def test_weights_round_trip_and_are_strict(tmp_path):
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "w.safetensors"
    checkpoints.save_weights(path, one)
    checkpoints.load_weights(path, two)
    assert torch.equal(one.weight, two.weight)
    with pytest.raises(UserError, match=r"another model: 1 unexpected \(first 'bias'\)"):
        checkpoints.load_weights(path, nn.Linear(3, 2, bias=False))
    with pytest.raises(UserError, match=r"2 of other shape \(first 'bias'\)"):
        checkpoints.load_weights(path, nn.Linear(3, 4))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        checkpoints.load_weights(path, two)
    with pytest.raises(UserError, match="no weights at"):
        checkpoints.load_weights(tmp_path / "none.safetensors", two)


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        checkpoints.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        checkpoints.read_json(tmp_path / "bad.json")
