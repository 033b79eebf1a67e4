"""What the losses accept. Every check reads shapes, dtypes and devices, nothing that waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Layers = Tensor | Sequence[Tensor]
OptionalLayers = Tensor | Sequence[Tensor] | Sequence[Tensor | None] | None

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        text = ", ".join(repr(x) for x in allowed)
        raise ValueError(f"{name} must be one of {text}, got {value!r}")


def listed(value: Any) -> list[Any]:
    """A sequence (an nn.ParameterList too) as a list, anything else as a list of itself."""
    single = isinstance(value, Tensor) or not isinstance(value, Iterable)
    return [value] if single else list(value)


def floating_layers(*, optional: str = "", **arguments: Any) -> list[list[Any]]:
    """Each argument as a list of one floating tensor a layer; all of one length and device.

    That named ``optional`` may hold None.
    """
    lists = []
    for name, value in arguments.items():
        layers = listed(value)
        if not layers:
            raise ValueError(f"{name} must have at least one layer, got an empty list")
        for x in layers:
            if x is not None or name != optional:
                floating(name, x)
        lists.append(layers)
    lengths = {name: len(layers) for name, layers in zip(arguments, lists, strict=True)}
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(f"every list must have one tensor a layer, got lengths {text}")
    first = lists[0][0].device
    for name, layers in zip(arguments, lists, strict=True):
        for x in layers:
            if x is not None:
                same_device(name, x, first)
    return lists


def multiplied(layers: list[Tensor]) -> list[Tensor]:
    """Under autocast in its dtype, as ``torch.matmul`` takes them; float64 stays."""
    device = layers[0].device.type if layers else "cpu"
    if not torch.is_autocast_enabled(device):
        return layers
    low = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(low) for x in layers]


def floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it first"
        )


def same_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(
            f"all tensors must be on one device, got {device} and {name} on {x.device}"
        )


def per_layer(name: str, value: Any, layers: int) -> list[Any]:
    """One value for all layers, or a sequence of one (or None) each."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        return [value] * layers
    values = list(value)
    if len(values) != layers:
        raise ValueError(f"{name} must be one or a list of {layers}, got {len(values)}")
    return values


def masks(
    name: str,
    value: Tensor | Sequence[Tensor | None] | None,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> list[Tensor | None]:
    """One bool mask for all layers or one (or None) a layer, each of its layer's shape."""
    layers = per_layer(name, value, len(shapes))
    for x, shape in zip(layers, shapes, strict=True):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a bool tensor, got {type(x).__name__}")
        if x.dtype != torch.bool:
            raise TypeError(
                f"{name} must be bool, True where it counts, got {x.dtype}; use {name}.bool()"
            )
        if _shape(x) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {_shape(x)}")
        same_device(name, x, device)
    return layers


def hidden_shapes(student: Tensor, teacher: Tensor, weight: Tensor | None) -> None:
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must be [..., N, d_s] and [..., N, d_t] with the same tokens, got "
            f"{_shape(student)} and {_shape(teacher)}"
        )
    expected = (student.shape[-1], teacher.shape[-1])
    if weight is None and expected[0] != expected[1]:
        raise ValueError(
            f"states of different widths, d_s = {expected[0]} and d_t = {expected[1]}, need a "
            "weight [d_s, d_t], got None"
        )
    if weight is not None and _shape(weight) != expected:
        raise ValueError(f"weight must be [d_s, d_t] = {expected}, got {_shape(weight)}")
    if 0 in expected:
        raise ValueError(f"d_s and d_t must be at least 1, got {expected}")


def attention_shapes(name: str, q: Tensor, k: Tensor) -> None:
    """Queries and keys of one model; keys may be shared by groups of query heads."""
    fit = q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fit:
        raise ValueError(
            f"{name}_q and {name}_k must be [B, H, Nq, d] and [B, G, Nk, d], got {_shape(q)} and "
            f"{_shape(k)}"
        )
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"{name}_q must have at least one head and d >= 1, got {_shape(q)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}_q's number of heads must be a multiple of {name}_k's, so that each head of "
            f"keys serves as many of queries: got {q.shape[1]} and {k.shape[1]}"
        )


def matching_maps(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    causal: bool,
    window: int,
) -> None:
    """Both attention maps cover the same [B, Nq, Nk]."""
    attention_shapes("student", student_q, student_k)
    attention_shapes("teacher", teacher_q, teacher_k)
    student, teacher = (
        (q.shape[0], q.shape[2], k.shape[2])
        for q, k in ((student_q, student_k), (teacher_q, teacher_k))
    )
    if student != teacher:
        raise ValueError(
            "student and teacher must agree in batch, queries and keys [B, Nq, Nk], got "
            f"{student} and {teacher}"
        )
    if (causal or window) and student[1] != student[2]:
        name = "causal" if causal else "window"
        raise ValueError(f"{name} needs Nq = Nk, got Nq = {student[1]} and Nk = {student[2]}")


def indexer_shapes(q: Tensor, k: Tensor, weight: Tensor) -> None:
    fit = q.ndim == 4 and k.ndim == weight.ndim == 3 and q.shape[:3] == weight.shape
    if not (fit and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[2]):
        raise ValueError(
            "indexer_q, indexer_k and indexer_weight must be [B, H, Nq, d], [B, Nk, d] and "
            f"[B, H, Nq], got {_shape(q)}, {_shape(k)} and {_shape(weight)}"
        )


def normalisers(
    name: str,
    value: Tensor | Sequence[Tensor | None] | None,
    queries: Sequence[Tensor],
    target: str,
) -> list[Tensor | None]:
    """Log-sum-exp [B, H, Nq] a layer, each or none; only a softmax has one."""
    if value is None:
        return [None] * len(queries)
    if target == "scores":
        raise ValueError(f"{name} is of use with target='probs' only, got target={target!r}")
    layers = listed(value)
    if len(layers) != len(queries):
        raise ValueError(
            f"{name} must have one tensor (or None) a layer: {len(queries)}, got {len(layers)}"
        )
    for x, q in zip(layers, queries, strict=True):
        if x is None:
            continue
        floating(name, x)
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, H, Nq] = {_shape(q)[:3]}, got {_shape(x)}")
        same_device(name, x, q.device)
    return layers


def flags(name: str, value: bool | Sequence[bool], layers: int) -> list[bool]:
    """One bool for all layers, or one each."""
    values = per_layer(name, value, layers)
    for x in values:
        if not isinstance(x, bool):
            raise TypeError(f"{name} must be True or False, got {x!r}")
    return values


def windows(value: Any, layers: int) -> list[int]:
    """A number of places a layer; 0 where there is no window."""
    values = per_layer("window", value, layers)
    for x in values:
        if x is not None and (not isinstance(x, int) or isinstance(x, bool)):
            raise TypeError(f"window must be a number of places or None, got {x!r}")
        if x is not None and x < 1:
            raise ValueError(f"window must be at least 1, where a query sees itself, got {x}")
    return [x or 0 for x in values]


def positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return float(value)


def groups(
    value: Any,
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
) -> list[int]:
    """In how many groups of neighbouring heads each layer's maps are averaged."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number and value not in ("mean", "each"):
        raise ValueError(f"heads must be 'mean', 'each' or a number of groups, got {value!r}")
    if number and value < 1:
        raise ValueError(f"heads must be at least one group, got {value}")
    result = []
    for q, k, t_q, t_k in zip(student_q, student_k, teacher_q, teacher_k, strict=True):
        n = value if number else 1 if value == "mean" else q.shape[1]
        if q.shape[1] % n or t_q.shape[1] % n:
            raise ValueError(
                f"heads={value!r} makes {n} groups, which must divide the heads of both models, "
                f"got {q.shape[1]} of the student and {t_q.shape[1]} of the teacher; "
                "heads='mean' compares any numbers"
            )
        for name, x in (("student_k", k), ("teacher_k", t_k)):
            if x.shape[1] % n and n % x.shape[1]:
                raise ValueError(
                    f"heads={value!r} makes {n} groups, which must divide the heads of {name} or "
                    f"be a multiple of them, got {x.shape[1]}; repeat the keys' heads"
                )
        result.append(n)
    return result


def scales(
    name: str,
    value: float | Sequence[float | None] | None,
    queries: Sequence[Tensor],
    temperature: float | None = None,
) -> list[float]:
    """The factor of Q K^T a layer, by default 1 / sqrt(d), over the temperature."""
    result = []
    for x, q in zip(per_layer(name, value, len(queries)), queries, strict=True):
        if x is None:
            x = q.shape[3] ** -0.5
        elif not isinstance(x, (int, float)) or isinstance(x, bool):
            raise TypeError(f"{name} must be a float, got {type(x).__name__}")
        elif not math.isfinite(x):
            raise ValueError(f"{name} must be finite, got {x}")
        result.append(float(x) if temperature is None else float(x) / temperature)
    return result
