"""The repository for Hugging Face's ``kernels``: what it imports, and that it computes the same."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import lay_out
import pytest
import torch

import optima_fast

pytest.importorskip("kernels.load", reason="needs the package kernels, 0.17 or newer")

ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
BACKENDS = ("blockwise", "triton") if importlib.util.find_spec("triton") else ("blockwise",)
CHANGE = "\nCOSINE_EPS = 1.0\n"  # to the second version of the sources


def values(losses, backend):
    """Losses and gradients of two layers, of hidden states and of both targets of attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return [torch.randn(shape, generator=generator).to(device) for _ in range(2)]

    def trained(*shape):
        return [x.requires_grad_() for x in draw(*shape)]

    counts = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    states, weights = trained(2, 5, 8), trained(8, 6)
    loss = losses.hidden_mse(states, draw(2, 5, 6), weights, mask=counts, backend=backend)
    found = {"hidden": [loss, *torch.autograd.grad(loss.sum(), states + weights)]}
    for target in ("scores", "probs"):
        q, k = trained(2, 2, 5, 4), trained(2, 2, 5, 4)
        teacher = draw(2, 3, 5, 8), draw(2, 3, 5, 8)
        loss = losses.attention_mse(
            q, k, *teacher, target=target, causal=True, key_mask=counts, backend=backend
        )
        found[target] = [loss, *torch.autograd.grad(loss.sum(), q + k)]
    return found


def cosine(losses):
    """What the second version computes differently."""
    x = torch.linspace(0.1, 0.2, 12).reshape(2, 6)
    return losses.hidden_cosine(x, x.flip(1), backend="blockwise")


SCRIPT = f"""
import sys
from pathlib import Path

sys.modules["optima_fast"] = None  # to import it is an error
import torch
from kernels import get_kernel, get_local_kernel

{inspect.getsource(values)}
{inspect.getsource(cosine)}
first, second, out = map(Path, sys.argv[1:])
one = get_local_kernel(first)
found = {{backend: values(one, backend) for backend in {BACKENDS!r}}}
found["cosine"] = [cosine(one)]
two = get_local_kernel(second)
found["cosine"] += [cosine(two), cosine(one)]
found["name"] = [one.__name__, two.__name__]
found["all"] = one.__all__
operators = [op for x in (one, two) for op in (x.losses.ops.hidden_loss, x.losses.ops.indexer_kl)]
found["operators"] = [str(op._opoverload) for op in operators]
card = (first / "CARD.md").read_text().split("```")[1].removeprefix("python\\n")
exec(card, shown := {{}})
found["card"] = [shown["losses"] is one, *(x.grad is not None for x in shown["projections"])]
torch.save(found, out)
"""


def python(*argv: object, **env: str) -> str:
    """What Python prints, away from this checkout and without a network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "first"
    lay_out.lay_out(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(repository, tmp_path_factory):
    """What a process finds that loads two versions and cannot import this package."""
    folder = tmp_path_factory.mktemp("loaded")
    files = lay_out.package()
    files["losses/reference.py"] += CHANGE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lay_out, "package", lambda: files)
        lay_out.lay_out(folder / "second")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    # where get_kernel looks before it asks the hub
    local = {"LOCAL_KERNELS": f"{lay_out.NOWHERE}={repository}"}
    python(script, repository, folder / "second", folder / "found.pt", **local)
    return torch.load(folder / "found.pt")


def test_files_import_one_another_python_torch_and_triton_alone(repository):
    checked = 0
    for package in (repository / "torch-ext" / "optima_fast", *(repository / "build").iterdir()):
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, path
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.split(".")[0] in ALLOWED, path
                elif isinstance(node, ast.ImportFrom):
                    home = path.parents[node.level - 1]
                    assert home.is_relative_to(package), f"{path}:{node.lineno}"
                    home = home.joinpath(*(node.module or "").split("."))
                    generated = (home.parent, home.name) == (package, "_ops")
                    exists = home.is_dir() or home.with_suffix(".py").is_file()
                    assert exists or generated, f"{path}:{node.lineno}"
                    checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import numpy\n", "losses/checks.py:1 imports numpy"),
        ("from rich import print\n", "losses/checks.py:1 imports rich"),
        ("import optima_fast.errors\n", "losses/checks.py:1 imports optima_fast.errors"),
        ("\nx = 'optima_fast::mine'\n", "losses/checks.py:2 names an operator optima_fast::mine"),
    ],
)
def test_sources_that_cannot_be_moved_are_refused(monkeypatch, text, said):
    monkeypatch.setitem(lay_out.WRITTEN, "losses/checks.py", text)
    with pytest.raises(ValueError, match=f"may be imported: {said}"):
        lay_out.package()


@cache
def ours(backend):
    return values(optima_fast, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["hidden", "scores", "probs"])
def test_losses_and_gradients_are_those_of_the_package_to_the_last_bit(loaded, backend, loss):
    pairs = list(zip(ours(backend)[loss], loaded[backend][loss], strict=True))
    assert len(pairs) == 5
    assert all(torch.equal(x, y) for x, y in pairs)


def test_two_versions_in_one_process_keep_to_their_own_operators(loaded):
    before, other, after = loaded["cosine"]
    assert torch.equal(before, cosine(optima_fast))
    assert torch.equal(before, after)
    assert not torch.equal(before, other)
    one, two = loaded["name"]
    assert one != two
    operators = ("hidden_loss", "indexer_kl")
    assert loaded["operators"] == [f"{x}.{y}.default" for x in (one, two) for y in operators]


def test_the_public_losses_are_there_and_the_card_has_them(loaded, repository):
    public = set(optima_fast.__all__) & set(optima_fast.losses.__all__)
    assert set(loaded["all"]) == public
    card = (repository / "CARD.md").read_text()
    assert [name for name in public if f"`{name}`" not in card] == []


def test_the_example_of_the_card_runs(loaded):
    assert loaded["card"] == [True, True, True]


def test_metadata_and_build_toml_are_what_the_packages_own_reader_takes(repository):
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    backends = [str(x) for x in Build.open(repository).general.backends]
    assert backends == list(lay_out.BACKENDS)
    variants = sorted((repository / "build").iterdir())
    assert [x.name for x in variants] == [f"torch-{x}" for x in backends]
    for variant, backend in zip(variants, backends, strict=True):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert str(metadata.backend.backend_type) == backend
        assert (str(metadata.name), metadata.license) == ("optima-fast", "Apache-2.0")
        assert metadata.version == int(optima_fast.__version__.split(".")[0])
        assert metadata.python_depends == []
        # raises where a file is missing, unknown or another
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_versions_of_the_loader_that_want_a_folder_of_its_name_find_the_same(repository):
    code = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, sys.argv[1]);"
        "import optima_fast, torch;"
        "print(optima_fast.__file__, optima_fast.hidden_mse(torch.ones(2, 3), torch.zeros(2, 3)))"
    )
    said = python("-c", code, repository / "build" / "torch-cpu")
    assert said == f"{repository / 'build/torch-cpu/optima_fast/__init__.py'} tensor([1.])\n"


def test_it_says_where_it_will_be_published(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lay_out.py", str(tmp_path), "--repo", "me/optima-fast"])
    lay_out.main()
    said = capsys.readouterr().out
    assert said.endswith(f"kernel-builder upload {tmp_path} --repo-id me/optima-fast\n")
    assert 'repo-id = "me/optima-fast"' in (tmp_path / "build.toml").read_text()
    card = (tmp_path / "CARD.md").read_text()
    assert 'get_kernel("me/optima-fast", version=0, trust_remote_code=True)' in card
    assert "OWNER" not in card
