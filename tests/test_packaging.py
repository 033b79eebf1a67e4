"""What gets installed, from where, under which names."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

from optima_fast import entry
from optima_fast.demo import pair, teachers

ROOT = Path(__file__).resolve().parents[1]
# where the kernels are found, without the seconds that their import takes
PROBE = (
    "from importlib.util import find_spec as f; print(f('optima_fast.kernels.hidden_mse').origin)"
)
# what runs where only torch is installed, then where triton is too
LOSSES = """
import sys
for name in ("triton", "rich", "yaml", "sklearn", "safetensors", "PIL"):
    sys.modules[name] = None
import torch, optima_fast
x = torch.ones(2, 3)
print(float(optima_fast.hidden_mse(x, torch.zeros(2, 4), torch.zeros(3, 4))))
print(optima_fast.bandit.BACKEND)
del sys.modules["triton"]
import optima_fast.kernels.hidden_mse
print(optima_fast.kernels.hidden_mse.__file__)
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the tests were copied away from their checkout"
)


def run(*argv: object, check: bool = True, **settings: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("PYTHONPATH", None)
    env |= settings.pop("env", {})
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, env=env, **settings)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the real ones."""
    copy = tmp_path_factory.mktemp("source") / "project"
    junk = shutil.ignore_patterns(
        ".*", "*.so", "__pycache__", "*.egg-info", "build", "dist", "runs"
    )
    shutil.copytree(ROOT, copy, ignore=junk)
    return copy


def environment(folder: Path) -> Path:
    """The Python of a new, empty environment that also sees this one's packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (inside,) = folder.glob("lib/python3.*/site-packages")
    # after the environment's own packages, and without this one's editable installs
    (inside / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"


def install(python: Path, *what: object, check: bool = True, **env: str):
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall")
    return run(
        sys.executable, "-m", "pip", "--python", python, "install", *flags, *what,
        check=check, env=env,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory) -> Path:
    """The wheel built from the source distribution, with the extension."""
    folder = tmp_path_factory.mktemp("dist")
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # half the time
    compiler.chmod(0o755)
    env = {"OPTIMA_FAST_EXT": "1", "CXX": str(compiler)}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, env=env)
    (found,) = folder.glob("*.whl")
    assert list(folder.glob("*.tar.gz"))
    return found


def test_the_wheel_from_the_sdist_holds_one_top_level_name_and_everything(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    assert {n.partition("/")[0] for n in names} == {"optima_fast"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "optima_fast").rglob("*.py")}
    sources |= {f"optima_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("*.py")}
    assert sources <= set(names)
    data = ["py.typed", "tasks/clip_merges.txt.gz", "tasks/clip_merges.LICENSE"]
    data += [f"demo/{path.name}" for task in pair.TASKS[:1] for path in teachers.files(task)]
    assert {f"optima_fast/{name}" for name in data} <= set(names)
    for extension in ("_bandit", "_launch"):
        assert any(n.startswith(f"optima_fast/{extension}.") and n.endswith(".so") for n in names)


def test_the_wheel_works_away_from_the_checkout_and_its_losses_need_torch_alone(wheel, tmp_path):
    python = environment(tmp_path / "env")
    install(python, wheel)
    loss, backend, kernels = run(python, "-P", "-c", LOSSES, cwd=tmp_path).stdout.split()
    assert (loss, backend) == ("0.0", "c++")
    assert kernels.endswith("site-packages/optima_fast/kernels/hidden_mse.py")
    assert "usage: optima-fast" in run(tmp_path / "env/bin/optima-fast", "--help").stdout


def test_an_editable_install_and_a_raw_checkout_find_the_kernels(checkout, tmp_path):
    python = environment(tmp_path / "env")
    install(python, "-e", checkout, OPTIMA_FAST_EXT="0")
    shown = run(python, "-P", "-c", PROBE, cwd=tmp_path).stdout
    assert shown.strip() == str(checkout / "kernels" / "hidden_mse.py")
    raw = run(sys.executable, "-c", PROBE, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}).stdout
    assert raw.strip() == str(ROOT / "kernels" / "hidden_mse.py")


def test_another_package_named_kernels_is_not_hidden_by_the_checkout(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'another project'\n")
    # behind the checkout, before an installed package of that name
    before = f"import sys; sys.path.insert(1, {str(tmp_path)!r})"
    code = f"{before}; import kernels; print(kernels.whose)"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout == "another project\n"
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_without_a_compiler_it_installs_in_python_unless_told_to_fail(checkout, tmp_path):
    python = environment(tmp_path / "env")
    broken = {"CXX": "/bin/false", "CC": "/bin/false"}
    install(python, checkout, OPTIMA_FAST_EXT="auto", **broken)
    code = "from optima_fast import bandit; print(bandit.BACKEND)"
    assert run(python, "-P", "-c", code, cwd=tmp_path).stdout == "python\n"
    build = (sys.executable, "setup.py", "build_ext")
    failed = run(*build, cwd=checkout, check=False, env={"OPTIMA_FAST_EXT": "1", **broken})
    assert failed.returncode != 0
    assert "/bin/false" in failed.stderr
    wrong = run(*build, cwd=checkout, check=False, env={"OPTIMA_FAST_EXT": "yes"})
    assert "OPTIMA_FAST_EXT must be auto, 0 or 1, got 'yes'" in wrong.stderr


# in the place of the kernels' compiler
AHEAD = """
import sys
from pathlib import Path
_, command, *archs = sys.argv
out = Path(archs[archs.index("--out") + 1])
out.mkdir(parents=True)
for arch in archs[: archs.index("--work")]:
    (out / f"sm_{arch}.zip").write_text("binaries")
"""


@pytest.fixture
def cuda_build(tmp_path):
    """``setup.py build`` with settings: what it printed, and the archives that are in the build."""
    project, tools = tmp_path / "project", tmp_path / "tools"
    tools.mkdir()
    compiler = tools / "c++"  # an extension is any file
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; touch "$2"\n')
    compiler.chmod(0o755)
    junk = shutil.ignore_patterns(".*", "*.so", "__pycache__", "cubins")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=junk)
        else:
            project.mkdir(exist_ok=True)
            shutil.copy(source, project / name)
    for name in ("optima_fast", "optima_fast/tasks"):
        (project / name).mkdir(exist_ok=True)
        shutil.copy(ROOT / name / "__init__.py", project / name)
    shutil.copy(ROOT / "optima_fast/tasks/clip_merges.LICENSE", project / "optima_fast/tasks")
    (project / "kernels" / "ahead.py").write_text(AHEAD)

    def build(missing: str = "", **settings: str):
        path = tools / (missing or "nothing")
        path.mkdir(exist_ok=True)
        (path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
        env = {"CC": str(compiler), "CXX": str(compiler), "PYTHONPATH": str(path), **settings}
        shutil.rmtree(project / "build", ignore_errors=True)
        done = run(sys.executable, "setup.py", "build", cwd=project, check=False, env=env)
        archives = (project / "build").glob("lib*/optima_fast/kernels/cubins/*")
        return done, sorted(archive.stem for archive in archives)

    return build


def test_kernels_are_compiled_ahead_for_what_is_named(cuda_build):
    done, found = cuda_build(OPTIMA_FAST_CUDA="80;90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found == ["sm_80", "sm_90"]
    assert "kernels are compiled ahead for sm_80 sm_90" in done.stdout
    assert "no kernels compiled ahead" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ({"missing": "ninja"}, "OPTIMA_FAST_CUDA needs ninja, which is not installed: "),
        (
            {"missing": "pybind11.setup_helpers"},
            "they need the extensions, and pybind11 is not installed",
        ),
        (
            {"CC": "/bin/false", "CXX": "/bin/false"},
            "they need the extension _launch, which was not built: see above",
        ),
    ],
)
def test_a_build_without_a_piece_says_which_and_goes_on_unless_told_not_to(
    cuda_build, missing, why
):
    settings = {**missing, "OPTIMA_FAST_CUDA": "90"}
    message = f"no kernels compiled ahead: {why}"
    done, found = cuda_build(**settings)
    assert (done.returncode, found) == (0, [])
    assert done.stderr.count(message) == 1
    done, found = cuda_build(**settings, OPTIMA_FAST_CUDA_REQUIRE="1")
    assert (done.returncode, found) == (1, [])
    assert message in done.stderr.splitlines()[-1]


@pytest.fixture
def architectures(monkeypatch):
    """What setup.py reads from its environment."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("OPTIMA_FAST_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))["architectures"]


@pytest.mark.parametrize(
    ("settings", "archs"),
    [
        ({"OPTIMA_FAST_CUDA": " 100, 90,90 "}, [90, 100]),
        (
            {"OPTIMA_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0a 10.0+PTX"},
            [80, 90, 100],
        ),
        ({"OPTIMA_FAST_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "8.0"}, []),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, []),
    ],
)
def test_architectures_are_named(architectures, monkeypatch, settings, archs):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert architectures() == archs


def test_architectures_are_those_of_the_machine(architectures, monkeypatch):
    monkeypatch.setenv("OPTIMA_FAST_CUDA", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match='there is none: name them, as OPTIMA_FAST_CUDA="90"'):
        architectures()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6)][i])
    assert architectures() == [86, 90]


@pytest.mark.parametrize("name", ["hopper", "75"])
def test_other_architectures_are_refused(architectures, monkeypatch, name):
    monkeypatch.setenv("OPTIMA_FAST_CUDA", name)
    with pytest.raises(RuntimeError, match=f"as OPTIMA_FAST_CUDA=80;90, got '{name}'"):
        architectures()


def test_kernels_compiled_ahead_need_the_extensions(cuda_build):
    done, _ = cuda_build(OPTIMA_FAST_CUDA="90", OPTIMA_FAST_EXT="0")
    assert done.returncode == 1
    assert "OPTIMA_FAST_CUDA needs the extensions, got OPTIMA_FAST_EXT=0" in done.stderr


def test_importing_the_package_needs_only_python(tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'numpy', 'rich', 'yaml', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import optima_fast\n"
        "print(optima_fast.__version__, 'hidden_mse' in dir(optima_fast))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.endswith(" True\n")


def test_what_is_missing_is_told_by_the_extra_that_has_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {
        extra: {re.split(r"[\[>=]", text)[0].replace("-", "_") for text in extras[extra]}
        for extra in ("data", "export")
    }
    assert names["data"] == {"optima_fast", *entry.OF_DATA}
    assert names["export"] == {"optima_fast", "huggingface_hub", *entry.OF_EXPORT}


def test_an_unknown_public_name_is_an_attribute_error():
    import optima_fast

    with pytest.raises(AttributeError, match="no attribute 'hiden_mse'"):
        optima_fast.hiden_mse  # noqa: B018
    for name in optima_fast.__all__:
        assert getattr(optima_fast, name) is not None
