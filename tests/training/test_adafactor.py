"""Adafactor against a second implementation of its formulas in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from optima_fast.training.adafactor import Adafactor


class Plain:
    """The formulas of the docstring for one parameter, in float64."""

    def __init__(self, value, lr, beta1, beta2, decay, threshold):
        self.theta = value.astype(np.float64)
        self.lr, self.beta1, self.beta2 = lr, beta1, beta2
        self.decay, self.threshold = decay, threshold
        self.m = np.zeros_like(self.theta)
        self.rows = self.cols = self.v = 0.0
        self.t = 0

    def step(self, grad):
        self.t += 1
        b = self.beta2 * (1 - self.beta2 ** (self.t - 1)) / (1 - self.beta2**self.t)
        g2 = grad**2 + 1e-30
        if grad.ndim >= 2:
            self.rows = b * self.rows + (1 - b) * g2.mean(-1)
            self.cols = b * self.cols + (1 - b) * g2.mean(-2)
            relative = self.rows / self.rows.mean(-1, keepdims=True)
            x = grad / np.sqrt(relative[..., :, None] * self.cols[..., None, :])
        else:
            self.v = b * self.v + (1 - b) * g2
            x = grad / np.sqrt(self.v)
        x = x / max(1.0, np.sqrt((x**2).mean()) / self.threshold)
        self.m = self.beta1 * self.m + (1 - self.beta1) * self.lr * x
        self.theta = self.theta - self.m - self.lr * self.decay * self.theta


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (1, 6), (2, 4, 3)])
@pytest.mark.parametrize(("decay", "threshold"), [(0.0, 1.0), (0.1, 0.3)])
def test_twenty_steps_equal_the_formulas(shape, decay, threshold):
    rng = np.random.default_rng(3)
    start = rng.normal(size=shape)
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    ours = Adafactor([p], lr=0.05, weight_decay=decay, clip_threshold=threshold)
    plain = Plain(np.asarray(start), 0.05, 0.9, 0.999, decay, threshold)
    for _ in range(20):
        grad = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1)
        p.grad = torch.tensor(grad, dtype=torch.float64)
        ours.step()
        plain.step(np.asarray(grad))
    np.testing.assert_allclose(p.detach().numpy(), plain.theta, rtol=1e-9, atol=1e-12)


def test_the_first_step_has_the_size_of_one_tenth_of_the_rate():
    # t = 1: the second moment is g^2 itself, so x = sign(g), and m = (1 - 0.9) lr x
    p = nn.Parameter(torch.zeros(4))
    optimizer = Adafactor([p], lr=0.5)
    p.grad = torch.tensor([3.0, -2.0, 1e-4, -7.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.05, 0.05, -0.05, 0.05]))


def test_a_matrix_keeps_rows_and_columns_not_itself():
    p = nn.Parameter(torch.ones(50, 40))
    p.grad = torch.ones(50, 40)
    optimizer = Adafactor([p], lr=0.1)
    optimizer.step()
    state = optimizer.state[p]
    assert {k: tuple(v.shape) for k, v in state.items() if k != "step"} == {
        "momentum": (50, 40),
        "row": (50,),
        "col": (40,),
    }


def test_saved_state_continues_exactly():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = Adafactor(model.parameters(), lr=0.1, weight_decay=0.1)
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(6)]

    def run(model, optimizer, steps):
        for step in steps:
            for p, g in zip(model.parameters(), grads[step], strict=True):
                p.grad = g.clone()
            optimizer.step()

    run(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = Adafactor(other.parameters(), lr=0.1, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_gradient_does_not_move():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Adafactor([p, q], lr=0.1, weight_decay=0.5)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(q, torch.ones(2, 2))
    assert not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"lr": float("nan")}, "got nan"),
        ({"betas": (1.0, 0.9)}, "betas must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"clip_threshold": 0.0}, "clip_threshold must be positive"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_where_the_device_says_no_nothing_is_taken(decay):
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    plain, flagged = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [Adafactor(p, lr=0.05, weight_decay=decay) for p in (plain, flagged)]
    for _ in range(3):
        for a, b in zip(plain, flagged, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizers[0].step()
        optimizers[1].step(good=torch.tensor(True))
        assert all(torch.equal(a, b) for a, b in zip(plain, flagged, strict=True))
    for harm in (float("nan"), float("inf")):
        for b in flagged:
            b.grad = torch.full_like(b, harm)
        optimizers[1].step(good=torch.tensor(False))
        assert all(torch.equal(a, b) for a, b in zip(plain, flagged, strict=True))


def test_a_first_step_that_is_not_taken():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.full_like(p, float("nan"))
    Adafactor([p], lr=0.05).step(good=torch.tensor(False))
    assert torch.equal(p, torch.ones(2, 3))
