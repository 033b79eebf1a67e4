"""What a call of the hidden-state kernels keeps, wants and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernel_hidden import (
    MARKS,
    MIXED,
    ON_GPU,
    autograd,
    check,
    fused,
    make,
    no_float64,
    upstream,
)
from optima_fast.kernels import hidden_mse as kernel
from optima_fast.kernels import launch

pytestmark = MARKS


def test_loss_alone_stores_no_residual(device: str) -> None:
    layers = make(MIXED, torch.float32, device, masked=True)
    losses, residuals, scales = kernel.hidden_mse_forward(*layers, need_residual=False)
    expected = kernel.hidden_mse_forward(*layers, need_residual=True)
    assert residuals == []
    assert torch.equal(losses, expected[0])
    assert torch.equal(scales, expected[2])


def test_only_wanted_gradients_and_a_second_backward(device: str) -> None:
    layers = make([*MIXED[:1], *MIXED[2:4]], torch.float32, device, masked=True)
    whole = fused(layers, upstream(layers))
    _, residuals, scales = kernel.hidden_mse_forward(*layers, need_residual=True)
    for _ in range(2):
        d_students, d_weights = kernel.hidden_mse_backward(
            upstream(layers),
            layers.students,
            layers.weights,
            layers.masks,
            residuals,
            scales,
            need_student=[False, True, True],
            need_weight=[True, False, False],
        )
        assert d_students[0] is d_weights[1] is d_weights[2] is None
        assert torch.equal(d_students[1], whole.d_students[1])
        assert torch.equal(d_students[2], whole.d_students[2])
        assert torch.equal(d_weights[0], whole.d_weights[0])


def test_gradients_in_a_wider_dtype(device: str) -> None:
    """Unit gradients of float16 inputs, for a mean that is too large for float16."""
    layers = make([(40, 3, 4)], torch.float16, device)
    grad = torch.full((1,), 2.0**-22, device=device)
    _, residuals, scales = kernel.hidden_mse_forward(*layers, need_residual=True)
    wide = kernel.hidden_mse_backward(
        grad,
        layers.students,
        layers.weights,
        layers.masks,
        residuals,
        scales,
        need_student=[True],
        need_weight=[True],
        dtype=torch.float32,
    )
    exact = autograd(layers, grad, torch.float64)
    for actual, truth in zip(wide, exact[1:], strict=True):
        assert actual[0].dtype == torch.float32
        error = (actual[0].double() - truth[0]).norm() / truth[0].norm()
        assert error <= torch.finfo(torch.float16).eps


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    far = torch.zeros(kernel.MAX_STRIDE + 3, dtype=torch.bool).as_strided(
        (2, 3), (kernel.MAX_STRIDE, 1)
    )
    assert kernel._unit_stride(far).stride() == (3, 1)


class HiddenMSE(torch.autograd.Function):
    """The least that makes the launchers differentiable: two layers, the second masked."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, teachers: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.layers = [*inputs[:2]], [*inputs[2:]], [None, mask]
        losses, *ctx.kept = kernel.hidden_mse_forward(
            inputs[:2], teachers, inputs[2:], [None, mask], need_residual=True
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = [True, True]
        d_students, d_weights = kernel.hidden_mse_backward(
            grad, *ctx.layers, *ctx.kept, need_student=both, need_weight=both
        )
        return None, None, *d_students, *d_weights


@no_float64
def test_gradcheck() -> None:
    layers = make([(4, 3, 2), (5, 2, 3)], torch.float64, "cpu")
    mask = torch.tensor([True, False, True, True, False])
    inputs = [x.requires_grad_() for x in (*layers.students, *layers.weights)]
    assert torch.autograd.gradcheck(
        lambda *x: HiddenMSE.apply(mask, layers.teachers, *x), inputs, fast_mode=False
    )


@pytest.mark.parametrize(
    ("capability", "itemsize", "expected"),
    [
        ((8, 0), 2, 8),
        ((8, 9), 2, 8),
        ((9, 0), 2, 9),
        ((10, 3), 2, 10),
        ((11, 0), 2, 10),
        ((12, 0), 2, 8),
        ((9, 0), 4, 8),
    ],
)
def test_launch_config(capability: tuple[int, int], itemsize: int, expected: int) -> None:
    chosen = launch.lookup(launch.PRODUCT, capability, itemsize, tma=True)
    assert chosen is launch.PRODUCT[expected, itemsize]
    plain = launch.lookup(launch.PRODUCT, capability, itemsize)
    assert not plain.programs


@pytest.fixture
def by_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = launch.LaunchConfig(32, 32, 16, 4, 2, programs=2, split=2)
    for key in [x for x in launch.PRODUCT if x[1] == 2]:
        monkeypatch.setitem(launch.PRODUCT, key, entry)
    monkeypatch.setitem(launch.PRODUCT, (7, 2), launch.LaunchConfig(32, 32, 16, 4, 2))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_persistent_programs_that_load_by_tma(masked: bool, by_tma: None, device: str) -> None:
    """More tiles than programs, sizes that end within a tile, and layers of two forms."""
    layers = make(
        [(70, 40, 72), (70, 40, 72), (0, 8, 16), (33, 16, 8)], torch.float16, device, masked
    )
    assert kernel._config(layers.students[0], layers.students[:2]).programs == 2
    check(layers)
    grad = upstream(layers)
    for a, b in zip(fused(layers, grad), fused(layers, grad), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_that_tma_cannot_address_are_loaded_plainly(by_tma: None, device: str) -> None:
    layers = make([(40, 16, 20)], torch.float16, device)
    assert not kernel._config(layers.students[0], layers.teachers).programs
    check(layers)


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        ((torch.float32, torch.float32, torch.int32), "float64, got torch.int32"),
        ((torch.float32, torch.float64, torch.float32), "float64 cannot be mixed"),
    ],
)
def test_not_served_names_dtypes(dtypes: tuple[torch.dtype, ...], reason: str, device: str) -> None:
    tensors = ([torch.zeros(2, 2, device=device, dtype=d)] for d in dtypes)
    assert any(reason in line for line in kernel.not_served(*tensors))


def test_not_served_names_dtypes_that_differ_between_layers(device: str) -> None:
    layers = make([(2, 3, 4)] * 2, torch.float32, device)
    assert kernel.not_served(*layers[:3]) == []
    layers.teachers[1] = layers.teachers[1].half()
    reasons = kernel.not_served(*layers[:3])
    assert reasons == ["teachers must have one dtype, got float16, float32"]


@pytest.mark.skipif(ON_GPU, reason="is about a machine without one")
def test_not_served_in_the_interpreter() -> None:
    layers = make([(2, 3, 4)], torch.bfloat16, "cpu")
    reasons = kernel.not_served(*layers[:3])
    assert len(reasons) == 1
    assert "interpreter computes bfloat16" in reasons[0]


def test_kernels_import_without_the_package_and_refuse_a_cpu(tmp_path: Path) -> None:
    """Compiled, not interpreted: torch and triton are all they need, and the CPU is refused."""
    (tmp_path / "alone").symlink_to(Path(kernel.__file__).parent)  # by a name that nobody has
    code = f"""
import sys, torch
sys.path.append({str(tmp_path)!r})
from alone import hidden_mse
assert not any(name.startswith("optima_fast") for name in sys.modules)
layer = [[torch.zeros(2, 2)]] * 3
print(hidden_mse.not_served(*layer))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = "['the device must be CUDA, got cpu, and TRITON_INTERPRET is not set']"
    assert run.stdout.strip() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_offsets_past_32_bits_and_no_synchronisation() -> None:
    tokens, d_t = 2**16, 2**15 + 128  # T * d_t > 2**31
    students = [torch.randn(tokens, 64, device="cuda", dtype=torch.float16)]
    weights = [torch.randn(64, d_t, device="cuda", dtype=torch.float16) / 8]
    teachers = [torch.zeros(tokens, d_t, device="cuda", dtype=torch.float16)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, residuals, scales = kernel.hidden_mse_forward(
            students, teachers, weights, [None], need_residual=True
        )
        d_students, _ = kernel.hidden_mse_backward(
            losses,
            students,
            weights,
            [None],
            residuals,
            scales,
            need_student=[True],
            need_weight=[True],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last = residuals[0][-3:].double()
    exact = students[0][-3:].double() @ weights[0].double()
    torch.testing.assert_close(last, exact, rtol=2e-3, atol=2e-3)
    d_exact = scales[0] * losses[0] * last @ weights[0].double().t()
    torch.testing.assert_close(d_students[0][-3:].double(), d_exact, rtol=2e-3, atol=1e-7)
