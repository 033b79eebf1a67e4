"""The learning rate as a pure function of the step."""

from __future__ import annotations


def lr_at(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to ``peak``, then linear decay to zero.

    Args:
        step: 0-based index of the step about to be taken, below ``steps``.
        peak: the highest rate, reached at step ``warmup - 1`` (or at once without warm-up).
        warmup: number of warm-up steps, below ``steps``.
        steps: total number of steps; the rate would reach 0 at step ``steps``.

    Example:
        >>> [lr_at(s, peak=1.0, warmup=2, steps=6) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)
