"""Shapes that the losses are measured at, their inputs, exact results and the least possible time.

The floor of a loss on a card is the larger of two times: bytes that must move (inputs read once,
gradients written once) over the rate of a copy, and arithmetic over the rate of the units that do
it. For ``probs`` the arithmetic is that of the algorithm in kernels/attention_probs.py, and each of
its sweeps takes the longer of its products and its exponentials. One sweep a pair and head:

    normaliser  1 product, 1 exp      every head whose log-sum-exp is not given
    residual    1 product, 1 exp      every head
    dQ          3 products, 1 exp     the student's heads
    dK          2 products, 1 exp     the student's heads

A row of at most ON_CHIP keys can stay on the chip from its normaliser to its gradients, which
leaves one sweep of 1 product and 1 exp over every head, and one of 3 and 1 over the student's. A
divergence of each head has both models' products and exponentials in every sweep: 3 and 2 for dQ
and for dK, or 4 and 2 for both. The other losses have no floor here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optima_fast


class Layer(NamedTuple):
    """One layer; heads are (student, teacher). Hidden states have ``queries`` tokens an item."""

    batch: int
    queries: int
    keys: int
    heads: tuple[int, int] = (12, 16)
    width: int = 64  # of a head; a model is heads * width wide
    causal: bool = False

    @property
    def pairs(self) -> float:
        live = (self.queries + 1) / (2 * self.queries) if self.causal else 1.0
        return self.batch * self.queries * self.keys * live


class Case(NamedTuple):
    """Layers that one call of a loss takes."""

    name: str
    target: str  # a key of LOSSES
    layers: tuple[Layer, ...]


Shapes = list[tuple[int, ...]]
RELATION_HEADS = 48  # of MiniLMv2


def _states(layer: Layer) -> Shapes:
    d_s, d_t = (h * layer.width for h in layer.heads)
    return [(layer.batch, layer.queries, d_s), (d_s, d_t), (layer.batch, layer.queries, d_t)]


def _features(layer: Layer) -> Shapes:
    return [(layer.batch, layer.queries, h * layer.width) for h in layer.heads]


def _maps(layer: Layer) -> Shapes:
    lengths = (layer.queries, layer.keys)
    return [(layer.batch, h, n, layer.width) for h in layer.heads for n in lengths]


def _indexer(layer: Layer) -> Shapes:
    """The indexer has as many heads as the student."""
    q, _, *teacher = _maps(layer)
    return [q, (layer.batch, layer.keys, layer.width), q[:3], *teacher]


class Loss(NamedTuple):
    """A loss as the benches call it."""

    shapes: Callable[[Layer], Shapes]  # of a layer's tensors
    trained: int  # how many of them have gradients
    call: Callable[..., Tensor]  # of columns of tensors
    causal: bool = False  # takes it


def _hidden(loss: Callable[..., Tensor]) -> Loss:
    return Loss(_states, 2, lambda s, w, t, **options: loss(s, t, w, **options))


def _attention(loss: Callable[..., Tensor], **fixed: Any) -> Loss:
    return Loss(_maps, 2, lambda *x, **options: loss(*x, **fixed, **options), causal=True)


LOSSES = {
    "hidden": _hidden(optima_fast.hidden_mse),
    "scores": _attention(optima_fast.attention_mse, target="scores"),
    "probs": _attention(optima_fast.attention_mse, target="probs"),
    "kl": _attention(optima_fast.attention_kl),
    "kl-mean": _attention(optima_fast.attention_kl, heads="mean"),
    "relations": Loss(
        _features, 1,
        lambda *x, **options: optima_fast.relation_kl(*x, relation_heads=RELATION_HEADS, **options),
    ),
    "gram": Loss(_features, 1, optima_fast.gram_mse),
    "indexer": Loss(_indexer, 3, optima_fast.indexer_kl, causal=True),
    "cosine": _hidden(optima_fast.hidden_cosine),
    "smooth-l1": _hidden(optima_fast.hidden_smooth_l1),
}  # fmt: skip
TARGETS = ("probs", "scores", "hidden")  # the paper's
FAMILY = tuple(target for target in LOSSES if target not in TARGETS)


def loss(case: Case, columns: Sequence[Sequence[Tensor]], **options: Any) -> Tensor:
    """Ours, one value a layer, of columns of tensors."""
    found = LOSSES[case.target]
    if found.causal:
        options["causal"] = [layer.causal for layer in case.layers]
    return found.call(*map(list, columns), **options)


class Card(NamedTuple):
    """Rates a second."""

    tensor: float  # 16-bit FLOP/s of tensor cores
    copy: float  # bytes, read plus written
    exp: float


# measured product of two 8192 matrices of random bfloat16 and measured copy; 16 exponentials a
# clock on each of 132 multiprocessors at 1755 MHz. Other cards, an H100 PCIe too, get ratios only
CARDS = {
    "H200": Card(790e12, 4.3e12, 3.71e12),
    "H100 80GB HBM3": Card(798e12, 3.0e12, 3.71e12),
}


def card(name: str) -> Card | None:
    return next((rates for key, rates in CARDS.items() if key in name), None)


ON_CHIP = 256


class Work(NamedTuple):
    """What a step must do at least: sweeps of (FLOP, exponentials), and bytes to move."""

    sweeps: tuple[tuple[float, float], ...]
    bytes: float

    @property
    def flop(self) -> float:
        return sum(flop for flop, _ in self.sweeps)

    def seconds(self, rates: Card) -> float:
        busy = sum(max(flop / rates.tensor, exp / rates.exp) for flop, exp in self.sweeps)
        return max(busy, self.bytes / rates.copy)


def _work(layer: Layer, target: str, lse: bool, backward: bool, itemsize: int) -> Work | None:
    if target not in (*TARGETS, "kl", "kl-mean"):
        return None
    (h_s, h_t), d = layer.heads, layer.width
    d_s, d_t = h_s * d, h_t * d
    if target == "hidden":
        tokens = layer.batch * layer.queries
        moved = tokens * (d_s * (1 + backward) + d_t) + d_s * d_t * (1 + backward)
        flop = (6 if backward else 2) * tokens * d_s * d_t
        return Work(((flop, 0.0),), itemsize * moved)
    rows = layer.batch * (layer.queries + layer.keys)
    moved = itemsize * rows * (d_s * (1 + backward) + d_t)
    pairs = layer.pairs
    if target == "scores":
        return Work(((2 * pairs * (d_s + d_t) + backward * 4 * pairs * d_s, 0.0),), moved)
    whole = layer.keys <= ON_CHIP
    # (products, exponentials) of a pair
    sweeps = [(h_s + h_t, h_s + h_t)] * (1 if lse or whole else 2)
    if backward and target == "kl":
        sweeps += [(4 * h_s, 2 * h_s)] if whole else [(3 * h_s, 2 * h_s)] * 2
    elif backward:
        sweeps += [(3 * h_s, h_s)] if whole else [(3 * h_s, h_s), (2 * h_s, h_s)]
    return Work(tuple((n * 2 * d * pairs, exps * pairs) for n, exps in sweeps), moved)


def work(
    case: Case, *, lse: bool = False, backward: bool = True, itemsize: int = 2
) -> list[Work] | None:
    """Of each layer; None where no one has counted it."""
    found = [_work(x, case.target, lse, backward, itemsize) for x in case.layers]
    return [x for x in found if x is not None] or None


def floor_ms(layers: list[Work], rates: Card) -> float:
    """The least milliseconds that the case can take in 16 bits."""
    return 1e3 * sum(layer.seconds(rates) for layer in layers)


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """Laid out as a model makes them, heads as [B, N, H, d] in memory; the first ones are trained.

    Of hidden states a layer has (student, weight, teacher); of attention the student's q and k,
    then the teacher's.
    """
    g = torch.Generator().manual_seed(0)
    if device == "cuda":
        g = torch.Generator(device).manual_seed(0)
    shapes, trained, *_ = LOSSES[case.target]

    def drawn(shape: tuple[int, ...], heads: bool) -> Tensor:
        if heads:
            batch, h, n, *width = shape
            return torch.randn((batch, n, h, *width), generator=g, device=g.device).transpose(1, 2)
        x = torch.randn(shape, generator=g, device=g.device)
        return x * shape[0] ** -0.5 if len(shape) == 2 else x  # a projection

    made = []
    for layer in case.layers:
        tensors = [
            # heads, and an indexer's weights of them
            drawn(s, len(s) == 4 or (case.target == "indexer" and i == 2)).to(device, dtype)
            for i, s in enumerate(shapes(layer))
        ]
        made.append([x.requires_grad_() if i < trained else x for i, x in enumerate(tensors)])
    return made


def _chunks(layer: Layer, target: str, room: int) -> Iterator[slice]:
    """Items of a batch that float64 has room for at once."""
    width = layer.width if target in ("hidden", "cosine", "smooth-l1") else layer.keys
    heads = RELATION_HEADS if target == "relations" else sum(layer.heads)
    a_batch = layer.queries * heads * (width or layer.queries)
    step = max(1, room // (8 * max(1, a_batch)))
    for start in range(0, layer.batch, step):
        yield slice(start, min(layer.batch, start + step))


def exact(case: Case, layers: list[list[Tensor]], *, room: int = 2 << 30) -> list[Tensor]:
    """In float64, by the plain definition: the losses [L], then the gradients of each layer."""
    trained = LOSSES[case.target].trained
    losses, gradients = [], []
    for layer, tensors in zip(case.layers, layers, strict=True):
        value = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        parts: list[tuple[Tensor, ...]] = []
        for items in _chunks(layer, case.target, room):
            sliced = [x.detach() if x.ndim == 2 else x.detach()[items] for x in tensors]
            leaves = [x.double().requires_grad_(i < trained) for i, x in enumerate(sliced)]
            columns = [[x] for x in leaves]
            part = loss(case._replace(layers=(layer,)), columns, backend="reference").sum()
            part = part * (items.stop - items.start) / layer.batch
            parts.append(torch.autograd.grad(part, leaves[:trained]))
            value = value + part.detach()
        losses.append(value)
        for whole, chunks in zip(tensors, zip(*parts, strict=True), strict=False):
            summed = whole.ndim == 2
            gradients.append(torch.stack(chunks).sum(0) if summed else torch.cat(chunks))
    return [torch.stack(losses), *gradients]


def _single(name: str, target: str, *shape: int, causal: bool = False, layers: int = 1) -> Case:
    batch, queries, keys = shape
    layer = Layer(batch, queries, keys, causal=causal)
    return Case(f"{name}-{target}", target, (layer,) * layers)


CPU = [
    _single(name, target, *shape, causal=causal)
    for target in ("probs", "scores")
    for name, shape, causal in (
        ("image1024", (2, 1024, 1024), False),
        ("image256", (8, 256, 256), False),
        ("text77", (32, 77, 77), True),
        ("cross64x256", (16, 64, 256), False),
    )
] + [
    Case("hidden8192", "hidden", (Layer(8, 1024, 0),)),
    Case("hidden2048", "hidden", (Layer(8, 256, 0),)),
]

SMALL = (2, 3)

# one step of layerwise distillation: 6 layers of an image encoder, 3 of a text decoder, 3 cross
STEP = tuple(
    layer
    for layer, count in (
        (Layer(64, 256, 256), 6),
        (Layer(64, 77, 77, causal=True), 3),
        (Layer(64, 64, 256), 3),
    )
    for _ in range(count)
)

HEADLINE = [
    Case("hidden32k-x12", "hidden", (Layer(32, 1024, 0),) * 12),
    _single("image1024", "probs", 32, 1024, 1024),
    _single("text77-x12", "probs", 256, 77, 77, causal=True, layers=12),
    _single("cross64x256-x12", "probs", 256, 64, 256, layers=12),
    _single("image256-x6", "probs", 64, 256, 256, layers=6),
    _single("image1024", "scores", 32, 1024, 1024),
    Case("step-probs", "probs", STEP),
    Case("step-scores", "scores", STEP),
    Case("step-hidden", "hidden", STEP),
    _single("text77-x12", "scores", 256, 77, 77, causal=True, layers=12),
    _single("text64-x12", "probs", 256, 64, 64, layers=12),
    _single("cross64x256-x12", "scores", 256, 64, 256, layers=12),
    Case("hidden8k", "hidden", (Layer(8, 1024, 0),)),
]


# what the README's tables of the other losses have
OTHERS = [
    Case(f"{target}-{batch}x{n}", target, (Layer(batch, n, keys, heads, causal=causal),))
    for batch, length in ((8, 197), (1, 1024))
    for target, n, keys, heads, causal in (
        *((x, length, length, (12, 12), False) for x in ("kl", "kl-mean")),
        *((x, length, 0, (6, 12), False) for x in ("relations", "gram")),
        ("indexer", length, length, (16, 12), True),
        *((x, length, 0, (6, 12), False) for x in ("cosine", "smooth-l1")),
    )
]
OTHERS_ON_A_CARD = [
    Case("kl-image1024", "kl", (Layer(32, 1024, 1024, (12, 12)),)),
    Case("kl-mean-image1024", "kl-mean", (Layer(32, 1024, 1024),)),
    Case("kl-text77-x12", "kl", (Layer(256, 77, 77, (12, 12), causal=True),) * 12),
    Case("kl-cross64x256-x12", "kl", (Layer(256, 64, 256, (12, 12)),) * 12),
    Case("kl-mean-text77-x12", "kl-mean", (Layer(256, 77, 77, causal=True),) * 12),
    Case("relations-32x512", "relations", (Layer(32, 512, 0, (6, 12)),) * 3),
    Case("gram-32x256", "gram", (Layer(32, 256, 0),)),
    Case("gram-4x1024-4096", "gram", (Layer(4, 1024, 0, (16, 64)),)),
    Case("indexer-1x4096", "indexer", (Layer(1, 4096, 4096, (64, 16), 128, causal=True),)),
    Case("indexer-4x1024", "indexer", (Layer(4, 1024, 1024, (16, 12), causal=True),)),
    Case("cosine-32k", "cosine", (Layer(32, 1024, 0),)),
    Case("smooth-l1-32k", "smooth-l1", (Layer(32, 1024, 0),)),
]


def _growth() -> Iterator[Case]:
    for target in TARGETS:
        for n in (64, 128, 256, 512, 1024, 2048):
            yield Case(f"tokens{n}-{target}", target, (Layer(16, n, n),))
        for batch in (8, 16, 32, 64, 128, 256):
            yield Case(f"batch{batch}-{target}", target, (Layer(batch, 256, 256),))
        for count in (1, 2, 4, 8, 16, 32):
            text = (Layer(32, 77, 77, causal=target != "hidden"),) * count
            yield Case(f"layers{count}-{target}", target, text)


def _crossover() -> Iterator[Case]:
    for target in TARGETS:
        for n in (16, 64, 196, 256, 577, 1024):
            for batch in (1, 8, 64):
                yield Case(f"cross-n{n}-b{batch}-{target}", target, (Layer(batch, n, n),))


SUITES = {
    "cpu": CPU,
    "six": HEADLINE[:6],
    "headline": HEADLINE,
    "others": OTHERS,
    "others-card": OTHERS_ON_A_CARD,
    "growth": list(_growth()),
    "crossover": list(_crossover()),
}


def named(suite: str, name: str) -> Case:
    """The case of a suite; another's of this name may have other sizes."""
    return next(case for case in SUITES[suite] if case.name == name)


def shrunk(case: Case) -> Case:
    """The same case at a size that the interpreter of kernels can run: two layers, a few tokens."""
    layers = tuple(
        Layer(min(x.batch, 2), min(x.queries, 20), min(x.keys, 24 if x.keys != x.queries else 20),
              (3, 3) if case.target == "kl" else (6, 12) if case.target == "relations" else SMALL,
              8, x.causal)
        for x in case.layers[:2]
    )  # fmt: skip
    return case._replace(layers=layers)
