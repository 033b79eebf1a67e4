"""Kernels compiled ahead: what is compiled again, where it is found, when it does not count."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optima_fast import doctor

pytest.importorskip("triton", reason="Triton is not installed")
ahead = pytest.importorskip("optima_fast.kernels.ahead")
launcher = pytest.importorskip("optima_fast.kernels.launcher")

ROOT = Path(__file__).resolve().parents[2]
EVERY = len(ahead.CASES) * len(ahead.DTYPES) * len(ahead.LAYERS)  # parts of an architecture
# in the compiler's place: writes down what it was asked for, and makes the file
COMPILER = """#!{python}
import sys
from pathlib import Path
command, *rest = sys.argv[sys.argv.index("optima_fast.kernels.ahead") + 1 :]
path = Path(rest[0] if command == "merge" else rest[-1])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(command)
with open({log!r}, "a") as log:
    print(command, *rest[: 1 if command == "merge" else -1], file=log)
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build of copied sources by a compiler that only writes down what it was asked for."""
    pytest.importorskip("ninja", reason="ninja is not installed")
    sources, log = tmp_path / "kernels", tmp_path / "log"
    shutil.copytree(ahead.HERE, sources, ignore=shutil.ignore_patterns("cubins", "__pycache__"))
    compiler = tmp_path / "a compiler"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    monkeypatch.setattr(ahead, "HERE", sources)
    monkeypatch.setattr(ahead.sys, "executable", str(compiler))

    def run(*archs: int) -> list[str]:
        log.write_text("")
        ahead.build(archs, tmp_path / "work", tmp_path / "out", jobs=4)
        return log.read_text().splitlines()

    return SimpleNamespace(run=run, sources=sources, out=tmp_path / "out")


def touch(path: Path) -> None:
    later = time.time() + 100
    os.utime(path, (later, later))


def test_only_what_changed_is_compiled_again(build, capfd):
    first = build.run(80, 90)
    assert len(first) == len(set(first)) == 2 * (EVERY + 1)
    assert "part 90 attention_probs fp16 16" in first
    assert {path.name for path in build.out.iterdir()} == {"sm_80.zip", "sm_90.zip"}
    assert not build.run(80, 90)
    touch(build.sources / "hidden_mse.py")
    again = build.run(90)
    assert {line.split()[2] for line in again if line.startswith("part")} == {"hidden_mse"}
    assert sum(line.startswith("merge") for line in again) == 1
    touch(build.sources / "launch.py")  # all share it
    assert len(build.run(90)) == EVERY + 1


def test_another_triton_compiles_anew(build, monkeypatch, capfd):
    import triton

    build.run(90)
    monkeypatch.setattr(triton, "__version__", "99")
    assert len(build.run(90)) == EVERY + 1


@pytest.fixture(scope="session")
def part(tmp_path_factory) -> Path:
    """A part as it is compiled, for a chip that is not there."""
    if isinstance(launcher.extension(), str):
        pytest.skip("the extension _launch is not built")
    path = tmp_path_factory.mktemp("ahead") / "part.zip"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DISABLE_LINE_INFO": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "optima_fast.kernels.ahead", "part"]
    command += ["90", "hidden_mse", "bf16", "4", str(path)]
    subprocess.run(command, check=True, env=env, cwd=ROOT)
    return path


@pytest.fixture(scope="session")
def archive_file(part, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cubins") / "sm_90.zip"
    ahead.merge([part], path)
    return path


def test_an_archive_gives_each_part_s_binaries(part, archive_file):
    archive = ahead.Archive(archive_file)
    assert archive.problem == ""
    with zipfile.ZipFile(part) as file:
        names = set(file.namelist()) - {ahead.INDEX}
        codes = {name: file.read(name) for name in names}
    assert set(archive.variants) == names
    assert all(code.startswith(b"\x7fELF") for code in codes.values())
    ahead.digest, digest = (lambda kernel, key: key.decode()), ahead.digest
    try:
        for name, code in codes.items():
            found, (entry, threads, shared, scratch) = archive.find("any", name.encode())
            assert found == code
            assert entry.encode() in code
            assert threads in (128, 256)
            assert 0 <= shared <= 227 << 10
            assert scratch >= 0
        assert archive.find("any", b"another") is None
    finally:
        ahead.digest = digest
    assert f"{len(names)} variants compiled ahead, " in archive.summary()
    assert archive.find("any", b"key") is None
    assert ahead.digest("one", b"key") != ahead.digest("another", b"key")


def launches(stub: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Every launch of hidden states' loss by both launchers, ours from a folder of archives."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(stub)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/kernels/launches.py", str(stub), "--op", "hidden_mse"]
    command += ["--cubins", str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_kernels_from_an_archive_are_launched_as_triton_s_are(archive_file, stub):
    assert "6 compiled ahead, 0 now" in launches(stub, archive_file.parent).stdout


def test_binaries_that_the_driver_refuses_are_compiled_now(archive_file, stub, tmp_path):
    refused = tmp_path / "sm_90.zip"
    with zipfile.ZipFile(archive_file) as old, zipfile.ZipFile(refused, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content if name == ahead.INDEX else b"?" * len(content))
    done = launches(stub, tmp_path)
    assert "0 compiled ahead, 6 now" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"{refused} does not load: loading _hidden_forward_tma_kernel: an error" in done.stderr


def test_an_archive_that_does_not_count_says_why(archive_file, tmp_path, monkeypatch):
    missing = ahead.Archive(tmp_path / "sm_89.zip")
    assert missing.problem == "none compiled ahead, which python -m optima_fast.doctor --warm does"
    assert missing.find("kernel", b"key") is None
    damaged = tmp_path / "sm_90.zip"
    damaged.write_bytes(archive_file.read_bytes()[:1000])
    assert f"{damaged} cannot be read: " in ahead.Archive(damaged).problem
    monkeypatch.setattr(ahead, "sources", lambda: "another hash")
    stale = ahead.Archive(archive_file)
    assert stale.problem == f"{archive_file} was compiled from other sources: install again"
    assert not stale.variants
    assert "Triton compiles them when they are first called" in stale.summary()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The package's archives and the user's, both empty."""
    package, user = tmp_path / "package", tmp_path / "cache"
    package.mkdir()
    monkeypatch.setattr(ahead, "FOLDER", package)
    monkeypatch.setenv("OPTIMA_FAST_CACHE", str(user))
    (user / "cubins").mkdir(parents=True)
    ahead.archive.cache_clear()
    yield package, user / "cubins"
    ahead.archive.cache_clear()


def test_the_package_s_archive_comes_before_the_user_s(folders, archive_file):
    package, user = folders
    assert "none compiled ahead" in ahead.archive(90).problem
    for folder in (user, package):
        shutil.copy(archive_file, folder)
        ahead.archive.cache_clear()
        assert ahead.archive(90).path.parent == folder
        assert ahead.archive(90).problem == ""
    (package / "sm_90.zip").write_bytes(b"damaged")
    ahead.archive.cache_clear()
    assert ahead.archive(90).path.parent == user


def test_the_doctor_lists_archives_and_devices_without_one(folders, archive_file, monkeypatch):
    shutil.copy(archive_file, folders[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 0), (9, 0), (8, 0)][i])
    assert [x.path.stem for x in ahead.archives()] == ["sm_80", "sm_90"]


def test_the_doctor_names_a_launcher_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_chosen", None)
    monkeypatch.setenv(launcher.VARIABLE, "fast")
    assert doctor.main([]) == 2
    assert "OPTIMA_FAST_LAUNCHER must be auto, triton or direct" in capsys.readouterr().err


@pytest.mark.skipif(
    isinstance(launcher.extension(), str), reason="the extension _launch is not built"
)
def test_the_doctor_compiles_for_what_is_there(folders, archive_file, monkeypatch, capsys):
    asked = []

    def build(archs, work, out):
        asked.append((list(archs), work.parent, out))
        for arch in archs:
            shutil.copy(archive_file, out / f"sm_{arch}.zip")

    monkeypatch.setattr(ahead, "build", build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor.main(["--warm"]) == 2
    assert "there is none: name one, 90" in capsys.readouterr().err
    assert doctor.main(["--warm", "90", "75"]) == 2
    assert "from 80 on, such as 90, got 75" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
        assert doctor.main(["--warm", "90"]) == 2
        assert "--warm needs triton, which is not installed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "extension", lambda: "no extension")
        assert doctor.main(["--warm", "90"]) == 2
        assert "--warm: no extension; install with a C++ compiler" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        failed = subprocess.CalledProcessError(1, "ninja")
        patch.setattr(ahead, "build", lambda *_: (_ for _ in ()).throw(failed))
        assert doctor.main(["--warm", "90"]) == 2
        assert "a kernel was not compiled, see above" in capsys.readouterr().err
    assert not asked
    assert doctor.main(["--warm", "90"]) == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 6))
    assert doctor.main(["--warm"]) == 0
    assert asked == [([90], folders[1], folders[1]), ([86], folders[1], folders[1])]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" variants")[0] for line in lines] == [
        f"kernels for sm_90: {len(ahead.archive(90).variants)}",
        f"kernels for sm_86: {len(ahead.archive(90).variants)}",
    ]
