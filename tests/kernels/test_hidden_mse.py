"""The projected hidden-state MSE kernels against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from optima_fast.kernels import hidden_mse as kernel
from optima_fast.kernels import launch
from optima_fast.kernels import layers as shared

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
        ),
    ),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
BLOCK_M, BLOCK_N, BLOCK_K = launch.lookup(launch.PRODUCT, (8, 0), 2)[:3]
EDGES = [  # T, d_s, d_t
    (1, 1, 1),
    (3, 5, 7),
    (16, 32, 64),
    (BLOCK_M, BLOCK_K, BLOCK_N),
    (BLOCK_M, BLOCK_K + 1, BLOCK_N),
    (BLOCK_M + 1, BLOCK_K + 1, BLOCK_N + 1),
    (2 * BLOCK_M + 5, BLOCK_N + 3, 2 * BLOCK_N - 1),
    (5, 3 * BLOCK_K - 1, 1),
]
MIXED = [(BLOCK_M + 3, 20, 33), (0, 8, 6), (7, 40, 9), (1, 3, BLOCK_N + 2), (0, 4, 4)]


class Layers(NamedTuple):
    students: list[Tensor]
    teachers: list[Tensor]
    weights: list[Tensor]
    masks: list[Tensor | None]


class Results(NamedTuple):
    losses: list[Tensor]
    d_students: list[Tensor]
    d_weights: list[Tensor]


def make(
    shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str, masked: bool = False
) -> Layers:
    """Layers; if masked, every second one from the first has a mask, its other rows nan and inf."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = Layers([], [], [], [])
    for i, (tokens, d_s, d_t) in enumerate(shapes):
        student, teacher, weight = normal(tokens, d_s), normal(tokens, d_t), normal(d_s, d_t)
        mask = None
        if masked and i % 2 == 0:
            mask = torch.rand(tokens, generator=generator) < 0.7
            student[~mask] = float("nan")
            teacher[~mask] = float("inf")
            mask = mask.to(device)
        # a mean that is not 0, so that a lost term or factor cannot hide in the noise
        layers.students.append((student + 0.5).to(device, dtype))
        layers.teachers.append((4 * teacher - 1).to(device, dtype))
        layers.weights.append((weight / d_s**0.5).to(device, dtype))
        layers.masks.append(mask)
    return layers


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.students[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.students), dtype=dtype, device=student.device)


def fused(layers: Layers, grad: Tensor) -> Results:
    flags = [True] * len(layers.students)
    losses, residuals, scales = kernel.hidden_mse_forward(*layers, need_residual=True)
    d_students, d_weights = kernel.hidden_mse_backward(
        grad,
        layers.students,
        layers.weights,
        layers.masks,
        residuals,
        scales,
        need_student=flags,
        need_weight=flags,
    )
    return Results(list(losses), d_students, d_weights)


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, or in another."""
    results = Results([], [], [])
    for i, (student, teacher, weight, mask) in enumerate(zip(*layers, strict=True)):
        if dtype is not None:
            student, teacher, weight = (x.to(dtype) for x in (student, teacher, weight))
        student, weight = (x.detach().clone().requires_grad_() for x in (student, weight))
        keep = slice(None) if mask is None else mask
        residual = student[keep] @ weight - teacher[keep]
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.mean() if square.numel() else square.sum()
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_students.append(student.grad)
        results.d_weights.append(weight.grad)
    return results


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Error against float64 <= twice eager's + 2 eps of the result's size, of its own dtype.

    float64 itself has no wider truth: it may differ from eager by 64 eps.
    """
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for name in Results._fields:
        rows = zip(getattr(ours, name), getattr(eager, name), getattr(exact, name), strict=True)
        for i, (actual, plain, truth) in enumerate(rows):
            where = f"{name}[{i}]"
            assert actual.shape == truth.shape, where
            if not truth.numel():
                continue
            assert actual.isfinite().all(), where
            error, allowed = ((x.double() - truth).abs().max().item() for x in (actual, plain))
            factor = 64 if layers.students[0].dtype == torch.float64 else 2
            floor = factor * torch.finfo(actual.dtype).eps * truth.abs().max().item()
            assert error <= 2 * allowed + floor, (where, error, allowed, floor)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", EDGES, ids=lambda s: "x".join(map(str, s)))
def test_one_layer(
    shape: tuple[int, int, int], masked: bool, dtype: torch.dtype, device: str
) -> None:
    layers = make([shape], dtype, device, masked)
    ours = check(layers, upstream(make([(1, 1, 1)] * 2, dtype, device))[1:])
    wide = torch.promote_types(dtype, torch.float32)
    assert ours.losses[0].dtype == wide
    assert ours.d_students[0].dtype == ours.d_weights[0].dtype == dtype


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, pytest.param(torch.float64, marks=no_float64)],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layers_of_different_shapes_some_empty(
    masked: bool, dtype: torch.dtype, device: str
) -> None:
    layers = make(MIXED, dtype, device, masked)
    ours = check(layers)
    assert ours.losses[1].item() == ours.losses[4].item() == 0
    assert not ours.d_weights[1].any()
    assert not ours.d_weights[4].any()


def test_only_empty_layers(device: str) -> None:
    ours = fused(layers := make([(0, 3, 4), (0, 2, 2)], torch.float32, device), upstream(layers))
    assert [x.item() for x in ours.losses] == [0, 0]
    assert [tuple(x.shape) for x in ours.d_students] == [(0, 3), (0, 2)]
    assert not any(x.any() for x in ours.d_weights)


def test_more_tiles_than_the_second_sum_takes_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "TOTAL_BLOCK", 2)
    check(make([(2 * BLOCK_M + 1, 3, 2 * BLOCK_N + 1), (9, 4, 5)], torch.float32, device))


def test_layers_of_two_forms_in_turn(device: str) -> None:
    """Each form is one launch; losses and gradients come in the order of the call."""
    shapes = [(9, 4, 5), (7, 6, 8), (9, 4, 5), (7, 6, 8), (9, 4, 5)]
    check(make(shapes, torch.float32, device))


def test_more_layers_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make(MIXED * 3, torch.float32, device, masked=True)
    whole = fused(layers, upstream(layers))
    monkeypatch.setattr(shared, "MAX_LAYERS", 2)
    parts = fused(layers, upstream(layers))
    for name in Results._fields:
        for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_nothing_counts(dtype: torch.dtype, device: str) -> None:
    """Exactly 0, whatever the rows hold and even where the projection is not finite."""
    layers = make([(9, 4, 5), (BLOCK_M + 2, 6, 3)], dtype, device)
    for x in (*layers.students, *layers.teachers):
        x.fill_(float("nan"))
    layers.masks[:] = [torch.zeros(len(x), dtype=torch.bool, device=device) for x in layers[0]]
    ours = fused(layers, upstream(layers))
    for x in (*ours.losses, *ours.d_students, *ours.d_weights):
        assert not x.any()  # nan is true
    layers.weights[0].fill_(float("inf"))
    losses, residuals, _ = kernel.hidden_mse_forward(*layers, need_residual=True)
    assert not losses.any()
    assert not residuals[0].any()


def test_masked_rows_have_no_effect(device: str) -> None:
    """Bit for bit, and their own gradient is exactly 0."""
    poisoned = make([(BLOCK_M + 9, 12, 11)], torch.float32, device, masked=True)
    mask = poisoned.masks[0]
    clean = poisoned._replace(
        students=[torch.where(mask[:, None], poisoned.students[0], 3.0)],
        teachers=[torch.where(mask[:, None], poisoned.teachers[0], -7.0)],
    )
    grad = torch.full((1,), 0.3, device=device)
    a, b = fused(poisoned, grad), fused(clean, grad)
    assert not a.d_students[0][~mask].any()
    for x, y in zip((*a.losses, *a[1], *a[2]), (*b.losses, *b[1], *b[2]), strict=True):
        assert torch.equal(x, y)


def test_a_nan_that_counts_is_not_hidden(device: str) -> None:
    layers = make([(6, 4, 5), (3, 4, 5)], torch.float32, device)
    layers.students[0][2, 1] = float("nan")
    losses, residuals, _ = kernel.hidden_mse_forward(*layers, need_residual=True)
    assert losses.isnan().tolist() == [True, False]
    assert residuals[0].isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_strided_rows_and_transposed_projections(device: str) -> None:
    """Any layout gives the same bits, and no input is written to."""
    plain = make(MIXED, torch.float32, device, masked=True)

    def padded(x: Tensor) -> Tensor:
        wide = torch.full((len(x), x.shape[1] + 5), float("nan"), device=x.device)
        wide[:, 2:-3] = x
        return wide[:, 2:-3]

    strided = Layers(
        [padded(x) for x in plain.students],
        [x.t().contiguous().t() if i else padded(x) for i, x in enumerate(plain.teachers)],
        [x.t().contiguous().t() for x in plain.weights],
        [None if m is None else m.repeat_interleave(2)[::2] for m in plain.masks],
    )
    kept = [[None if x is None else x.clone() for x in group] for group in strided]
    a, b = fused(plain, upstream(plain)), fused(strided, upstream(plain))
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name
    for before, after in zip(kept, strided, strict=True):
        for x, y in zip(before, after, strict=True):
            assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())


def test_projection_and_teacher_of_other_dtypes(device: str) -> None:
    """As under autocast: computed in the students' dtype, dW in the weight's own."""
    half = make(MIXED[:3], torch.float16, device, masked=True)
    mixed = half._replace(
        teachers=[x.float() for x in half.teachers], weights=[x.float() for x in half.weights]
    )
    a, b = fused(half, upstream(half)), fused(mixed, upstream(half))
    assert all(torch.equal(x, y) for x, y in zip(a.losses, b.losses, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.d_students, b.d_students, strict=True))
    for x, y in zip(a.d_weights, b.d_weights, strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(x, y.half())


def test_float16_gradients_do_not_overflow_or_vanish(device: str) -> None:
    """2 / n is below float16's least number and the sums of dW are above its greatest."""
    layers = make([(600, 3, 4)], torch.float16, device)
    layers.students[0].fill_(30.0)
    layers.teachers[0].fill_(-200.0)
    check(layers, torch.full((1,), 0.01, device=device))
    scale = kernel.hidden_mse_forward(*layers, need_residual=True)[2].clone()
    assert scale.item() == pytest.approx(2 / 2400)


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


def test_kernels_import_without_the_package_and_refuse_a_cpu() -> None:
    """Compiled, not interpreted: torch and triton are all they need, and the CPU is refused."""
    folder = Path(kernel.__file__).parent
    code = f"""
import sys, torch
sys.path.append({str(folder.parent)!r})
from {folder.name} import hidden_mse
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
