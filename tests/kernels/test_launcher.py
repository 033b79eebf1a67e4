"""Launches past Triton's launcher: what reaches the driver, and what tells variants apart."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

tl = pytest.importorskip("triton.language", reason="Triton is not installed")
launcher = pytest.importorskip("optima_fast.kernels.launcher")

BUILT = not isinstance(launcher.extension(), str)
needs_extension = pytest.mark.skipif(not BUILT, reason="the extension _launch is not built")


def run(stub: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(stub), **variables}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT
    )


@needs_extension
@pytest.mark.parametrize(
    "arguments",
    [
        ("--op", "hidden_mse", "--op", "attention_scores"),
        pytest.param(
            ("--masked", "--layers=1", "--layers=12", "--dtype=bf16", "--dtype=fp32"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_driver_gets_what_triton_s_launcher_gives_it(stub, arguments):
    done = run(stub, HERE / "launches.py", stub, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total" in done.stdout
    assert "hidden_forward_tma" in done.stdout


def variant(a, b, pair, count, C: tl.constexpr, D: tl.constexpr = 4):
    pass


@pytest.fixture(scope="module")
def example():
    """A kernel's launcher, and Triton's own way to tell its variants apart."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    jit = JITFunction(variant, do_not_specialize=["count"])
    module = launcher.extension()
    module.configure(lambda: 0, lambda device: 0, lambda size: None, launcher.TYPES)
    own = module.Launcher("variant", launcher.parameters(jit))
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(jit.signature, jit.params, backend)

    def of_triton(args, named):
        _, specialization, options = bind(*args, **named)
        return str(specialization) + str(options)

    return own.key, of_triton


X = torch.zeros(64)
CALLS = [
    ((X, X, (X, X), 3), {"C": 1}),
    ((X[1:], X, (X, X), 3), {"C": 1}),  # not a multiple of 16 bytes
    ((X, X, (X, X[1:]), 3), {"C": 1}),
    ((X, X, (X, X, X), 3), {"C": 1}),
    ((X, X, ((X, X),), 3), {"C": 1}),
    ((X, X, (X, (X,)), 3), {"C": 1}),
    ((X, X.half(), (X, X), 3), {"C": 1}),
    ((X, X.bool(), (X, X), 3), {"C": 1}),
    ((X, 1, (X, X), 3), {"C": 1}),  # part of the kernel
    ((X, 5, (X, X), 3), {"C": 1}),
    ((X, 32, (X, X), 3), {"C": 1}),
    ((X, 2**40, (X, X), 3), {"C": 1}),
    ((X, 2**40 + 1, (X, X), 3), {"C": 1}),
    ((X, 1.0, (X, X), 3), {"C": 1}),
    ((X, True, (X, X), 3), {"C": 1}),
    ((X, None, (X, X), 3), {"C": 1}),
    ((X, X, (16, 1, 3), 3), {"C": 1}),
    ((X, X, (1, 16, 3), 3), {"C": 1}),
    ((X, X, (), 3), {"C": 1}),
    ((X, X, (X, X), 3.0), {"C": 1}),
    ((X, X, (X, X), 2**40), {"C": 1}),
    ((X, X, (X, X), 3), {"C": 1.0}),
    ((X, X, (X, X), 3), {"C": True}),
    ((X, X, (X, X), 3), {"C": None}),
    ((X, X, (X, X), 3), {"C": tl.float32}),
    ((X, X, (X, X), 3), {"C": tl.float64}),
    ((X, X, (X, X), 3), {"C": 1, "D": 5}),
    ((X, X, (X, X), 3), {"C": 1, "num_warps": 8}),
    ((X, X, (X, X), 3), {"C": 1, "num_warps": 4, "maxnreg": 128}),
]


@needs_extension
def test_each_variant_of_triton_s_has_a_key_of_its_own(example):
    own, of_triton = example
    assert len({of_triton(*call) for call in CALLS}) == len(CALLS)
    assert len({own(*call) for call in CALLS}) == len(CALLS)


@needs_extension
@pytest.mark.parametrize(
    "other",
    [
        ((X[16:], X[4:], (X[8:], X[12:]), 16), {"C": 1}),
        ((X, X, (X, X), 1), {"C": 1}),  # nothing is compiled for a count
        ((X, X), {"pair": (X, X), "count": 3, "C": 1}),
        ((X, X, (X, X), 3, 1, 4), {}),
    ],
)
def test_what_is_compiled_alike_has_one_key(example, other):
    own, of_triton = example
    assert of_triton(*other) == of_triton(*CALLS[0])
    assert own(*other) == own(*CALLS[0])


@needs_extension
@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((X, X, (X, X)), {"C": 1}, "variant needs count"),
        ((X,) * 7, {}, "variant takes 6 arguments, got 7"),
        ((X, X.to(torch.complex64), (X,), 3), {"C": 1}, "a tensor must be of a known dtype"),
        ((X, 2**70, (X,), 3), {"C": 1}, "an argument must fit 64 bits, got 1180591620717411303424"),
        ((X, X, (X,), 3), {"C": object()}, "a constant must be a number, None or a known dtype"),
        ((X, X, (X,) * 600, 3), {"C": 1}, "a launch has too many arguments"),
        ((X, "text", (X,), 3), {"C": 1}, "'str' object has no attribute 'dtype'"),
    ],
)
def test_what_cannot_be_launched_is_told(example, args, named, message):
    with pytest.raises((TypeError, ValueError, AttributeError), match=message):
        example[0](args, named)


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setattr(launcher, "_chosen", None)
    monkeypatch.delenv(launcher.VARIABLE, raising=False)
    return monkeypatch


class Extension:
    """In the place of the C++ one."""

    ABI = launcher.ABI

    def __init__(self, driver: bool) -> None:
        self.has_driver = lambda: driver


def test_triton_launches_where_the_extension_cannot(undecided):
    for module, why in (
        ("no extension", "no extension: install with a C++ compiler and OPTIMA_FAST_EXT=1"),
        (Extension(False), "there is no CUDA driver"),
    ):
        undecided.setattr(launcher, "extension", lambda found=module: found)
        undecided.setattr(launcher, "_chosen", None)
        assert launcher.who() == f"Triton ({why})"
        assert launcher.chosen() is launcher.chosen()
        undecided.setattr(launcher, "_chosen", None)
        undecided.setenv(launcher.VARIABLE, "direct")
        with pytest.raises(ValueError, match=re.escape(f"OPTIMA_FAST_LAUNCHER=direct: {why}")):
            launcher.chosen()
        undecided.delenv(launcher.VARIABLE)


def test_the_variable_chooses(undecided):
    undecided.setenv(launcher.VARIABLE, "triton")
    undecided.setattr(launcher, "extension", lambda: pytest.fail("not asked for"))
    assert launcher.who() == "Triton (OPTIMA_FAST_LAUNCHER=triton)"
    undecided.setattr(launcher, "_chosen", None)
    undecided.setenv(launcher.VARIABLE, "fast")
    with pytest.raises(ValueError, match="must be auto, triton or direct, got 'fast'"):
        launcher.chosen()


def test_a_stale_or_missing_extension_is_not_taken(monkeypatch):
    import optima_fast

    monkeypatch.setitem(sys.modules, "optima_fast._launch", None)
    monkeypatch.delattr(optima_fast, "_launch", raising=False)
    assert "is not there" in launcher.extension()
    stale = importlib.util.module_from_spec(importlib.util.spec_from_loader("stale", None))
    stale.ABI = 0
    monkeypatch.setattr(optima_fast, "_launch", stale, raising=False)
    assert launcher.extension().endswith("is of another version (0, not 1)")


@pytest.mark.parametrize(
    "needs", [{"num_ctas": 2}, {"launch_cooperative_grid": True}, {"profile_scratch_size": 64}, {}]
)
def test_what_a_plain_launch_does_not_give_is_left_to_triton(monkeypatch, needs):
    calls = []

    class Jit:
        __name__, params = "kernel", ()

        def __getitem__(self, grid):
            return lambda *args, **named: calls.append("triton")

        def run(self, *args, grid, warmup, **named):
            metadata = {"name": "kernel", "num_warps": 4, "shared": 0, "num_ctas": 1, **needs}
            return SimpleNamespace(metadata=SimpleNamespace(**metadata), asm={"cubin": b"code"})

    class Launcher:
        def __init__(self, name, parameters):
            self.loaded = False

        def __call__(self, grid, args, named):
            calls.append("direct")
            return None if self.loaded else b"key"

        def add(self, key, code, entry, threads, shared, scratch):
            self.loaded = (key, code, entry, threads) == (b"key", b"code", "kernel", 128)

    monkeypatch.setattr(launcher, "_chosen", SimpleNamespace(Launcher=Launcher))
    monkeypatch.setattr(launcher, "architecture", lambda: 1)
    kernel = launcher.Kernel(Jit())
    kernel[(1,)]()
    kernel[(1,)]()
    expected = ["direct", "triton", "triton"] if needs else ["direct", "direct", "direct"]
    assert calls == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_both_launchers_give_the_same_bits_on_a_device(undecided):
    import optima_fast

    torch.manual_seed(0)
    layers = 3
    sizes = [(layers, 2, 4, 77, 64)] * 2 + [(layers, 2, 6, 77, 64)] * 2
    heads = [[*torch.randn(size, device="cuda", dtype=torch.bfloat16)] for size in sizes]
    states = [[*torch.randn(layers, 2, 77, n, device="cuda").bfloat16()] for n in (64, 128)]
    weights = [*torch.randn(layers, 64, 128, device="cuda").bfloat16()]
    found = []
    for how in ("triton", "direct"):
        undecided.setattr(launcher, "_chosen", None)
        undecided.setenv(launcher.VARIABLE, how)
        inputs = [[x.clone().requires_grad_() for x in y] for y in (*heads[:2], states[0], weights)]
        q, k, h, w = inputs
        losses = [
            optima_fast.hidden_mse(h, states[1], w, backend="triton"),
            *(
                optima_fast.attention_mse(
                    q, k, *heads[2:], target=target, causal=True, backend="triton"
                )
                for target in ("scores", "probs")
            ),
            optima_fast.attention_kl(q, k, *heads[2:], causal=True, backend="triton"),
        ]
        torch.stack([loss.sum() for loss in losses]).sum().backward()
        found.append([*losses, *(x.grad for y in inputs for x in y)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
