"""Eq. 5: its terms, who gets a gradient, what runs."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from teaching import BATCH, DATA, model
from torch import nn

import optima_fast
from optima_fast import Distiller
from optima_fast.distill import Measurement, arm_space, arms
from optima_fast.errors import UserError
from optima_fast.losses import attention_mse, hidden_mse
from optima_fast.models import MODULES
from optima_fast.models.task_model import TaskModel


@pytest.fixture
def pair() -> tuple[TaskModel, TaskModel]:
    torch.manual_seed(0)
    return model("digits_student"), model("digits_teacher")


def no_prediction(logits, batch):
    return logits.sum() * 0.0


def test_the_total_is_the_weighted_sum_of_terms_computed_apart(pair):
    student, teacher = pair
    distiller = Distiller(student, teacher, hidden_weight=0.7, attention_weight=0.3, kl_weight=0.2)
    step = distiller(BATCH, ("image", "multimodal"), predict=DATA.loss, divergence=DATA.divergence)
    s = student(BATCH, taps={"image": [0, 1], "multimodal": [0]})
    t = teacher(BATCH, taps={"image": [1, 3], "multimodal": [1]})
    rows = [("image", 0), ("image", 1), ("multimodal", 0)]
    hidden = [
        hidden_mse(
            s.taps[m][i].hidden,
            t.taps[m][i].hidden,
            distiller.projections[f"{m}_{i}"],
            mask=s.masks[m],
            backend="reference",
        )
        for m, i in rows
    ]
    attention = [
        attention_mse(
            s.taps[m][i].q,
            s.taps[m][i].k,
            t.taps[m][i].q,
            t.taps[m][i].k,
            causal=m != "image",
            query_mask=s.masks[m],
            key_mask=s.masks[m],
            backend="reference",
        )
        for m, i in rows
    ]
    torch.testing.assert_close(step.hidden, torch.cat(hidden), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.attention, torch.cat(attention), rtol=1e-5, atol=1e-6)
    total = DATA.loss(s.logits, BATCH) + 0.2 * DATA.divergence(s.logits, t.logits, BATCH)
    total = total + 0.7 * sum(hidden) + 0.3 * sum(attention)
    torch.testing.assert_close(step.total, total.squeeze(), rtol=1e-5, atol=1e-6)
    assert [(p.module, p.student, p.teacher) for p in step.pairs] == [
        ("image", 0, 1),
        ("image", 1, 3),
        ("multimodal", 0, 1),
    ]


@pytest.mark.parametrize("target", ["scores", "probs"])
@pytest.mark.parametrize("arm", arms(MODULES), ids="+".join)
def test_only_the_arm_s_modules_get_a_layerwise_gradient(pair, arm, target):
    student, teacher = pair
    distiller = Distiller(student, teacher, attention_loss=target, attention_weight=1.0)
    distiller(BATCH, arm, predict=no_prediction).total.backward()
    for name in MODULES:
        projections = [p for n, p in distiller.projections.items() if n.startswith(name)]
        assert all((p.grad is not None) == (name in arm) for p in projections)
        layers = list(getattr(student.coca, name).layers.parameters())
        moved = any(p.grad is not None and bool(p.grad.any()) for p in layers)
        # a multimodal loss reaches image and text too: they feed that decoder
        assert moved == (name in arm or "multimodal" in arm)


def test_the_teacher_stays_as_it_is_and_out_of_the_state(pair):
    student, teacher = pair
    teacher.train()
    distiller = Distiller(student, teacher, kl_weight=1.0)
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    step = distiller(BATCH, MODULES, predict=DATA.loss, divergence=DATA.divergence)
    step.total.backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[n], p) for n, p in teacher.state_dict().items())
    assert set(distiller.state_dict()) == {
        "projections.image_0",
        "projections.image_1",
        "projections.text_0",
        "projections.multimodal_0",
    }


@pytest.mark.parametrize(
    ("arm", "idle"),
    [
        (("text",), ("image", "multimodal")),
        (("image",), ("text", "multimodal")),
        (("image", "text"), ("multimodal",)),
        ((), MODULES),
    ],
)
def test_what_the_arm_does_not_need_is_not_run_in_the_teacher(pair, arm, idle):
    student, teacher = pair

    def explode(*args, **kwargs):
        raise AssertionError("this module was not needed")

    for name in idle:
        getattr(teacher.coca, name).register_forward_pre_hook(explode)
    Distiller(student, teacher)(BATCH, arm, predict=DATA.loss)


def measure(distiller: Distiller) -> Measurement:
    return distiller.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_measure_is_the_full_model_without_gradient_and_restores_the_mode(pair, reduction):
    student, teacher = pair
    distiller = Distiller(student, teacher, reduction=reduction)
    for training in (True, False):
        student.train(training)
        losses = measure(distiller)
        assert student.training == training
    assert all(p.grad is None for p in student.parameters())
    with torch.no_grad():
        step = distiller(BATCH, MODULES, predict=DATA.loss)
        kl = DATA.divergence(student(BATCH).logits, teacher(BATCH).logits, BATCH)
        prediction = DATA.loss(student(BATCH).logits, BATCH)
    # float32 sums over the layers, taken to float64 afterwards: what Eq. 6 has always been of
    reduce = torch.Tensor.sum if reduction == "sum" else torch.Tensor.mean
    assert losses.hidden == float(reduce(step.hidden).double())
    assert losses.attention == float(reduce(step.attention).double())
    assert losses.kl == float(kl)
    assert losses.prediction == float(prediction)
    assert losses.hidden_layers == {
        "image": step.hidden[:2].tolist(),
        "text": step.hidden[2:3].tolist(),
        "multimodal": step.hidden[3:].tolist(),
    }
    assert list(chain(*losses.attention_layers.values())) == step.attention.tolist()
    assert losses.teacher == float(DATA.loss(teacher(BATCH).logits, BATCH))


def test_measure_runs_each_model_once(pair):
    student, teacher = pair
    distiller = Distiller(student, teacher)
    runs = []
    for which in pair:
        for name in MODULES:
            getattr(which.coca, name).register_forward_pre_hook(lambda *_: runs.append(1))
    measure(distiller)
    assert len(runs) == 6


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    torch.manual_seed(0)
    teacher, student = model("digits_base"), model("digits_base")
    student.load_state_dict(teacher.state_dict())
    distiller = Distiller(student, teacher)
    with torch.no_grad():
        for projection in distiller.projections.values():
            nn.init.eye_(projection)
    losses = measure(distiller)
    assert max(losses.kl, losses.hidden, losses.attention) < 1e-9


@pytest.fixture
def deep() -> Distiller:
    """A student of 4, 2 and 2 layers, so that modules have layers to choose from."""
    torch.manual_seed(0)
    return Distiller(model("digits_base"), model("digits_teacher", image_layers=8))


@pytest.mark.parametrize(
    ("arm", "layers", "request_"),
    [
        (("image",), {"image": [0, 1, 2, 3]}, {"image": [1, 3, 5, 7]}),
        (("image[1-2]",), {"image": [0, 1]}, {"image": [1, 3]}),
        (("image[2]", "text"), {"image": [1], "text": [0, 1]}, {"image": [1, 3], "text": [0, 1]}),
        (
            ("image[1]", "image[3-4]", "multimodal[1]"),
            {"image": [0, 2, 3], "multimodal": [0]},
            {"image": [1, 3, 5, 7], "multimodal": [0]},
        ),
        (("text", "image[1-4]"), {"text": [0, 1], "image": [0, 1, 2, 3]}, None),
        ((), {}, {}),
    ],
)
def test_an_arm_of_layers_is_those_layers_losses_and_a_teacher_no_deeper(
    deep, arm, layers, request_
):
    whole = deep(BATCH, MODULES, predict=DATA.loss)
    part = deep(BATCH, arm, predict=DATA.loss)
    where = {(p.module, p.student): i for i, p in enumerate(whole.pairs)}
    chosen = [where[module, i] for module, indices in layers.items() for i in indices]
    assert part.pairs == tuple(whole.pairs[i] for i in chosen)
    if chosen:
        torch.testing.assert_close(part.hidden, whole.hidden[chosen], rtol=1e-6, atol=0)
        torch.testing.assert_close(part.attention, whole.attention[chosen], rtol=1e-6, atol=0)
    if request_ is not None:
        assert deep.teacher_request(arm) == request_


@pytest.mark.parametrize(
    ("layers", "arm", "request_"),
    [
        ([7, 5, 3, 1], ("image",), [1, 3, 5, 7]),
        ([7, 5, 3, 1], ("image[1]",), [7]),
        ([7, 5, 3, 1], ("image[2]",), [5, 7]),
        ([5, 0, 5, 2], ("image",), [0, 2, 5]),
        ([5, 0, 5, 2], ("image[3]",), [0, 5]),
    ],
)
def test_a_mapping_may_go_back_and_repeat_a_layer(deep, layers, arm, request_):
    mapped = Distiller(deep.student, deep.teacher, teacher_layers={"image": layers})
    mapped.projections.load_state_dict(deep.projections.state_dict())
    assert mapped.teacher_request(arm) == {"image": request_}
    part = mapped(BATCH, arm, predict=DATA.loss)
    assert [pair.teacher for pair in part.pairs] == [layers[pair.student] for pair in part.pairs]
    s = deep.student(BATCH, taps={"image": range(4)}).taps["image"]
    t = deep.teacher(BATCH, taps={"image": range(8)}).taps["image"]
    for pair, hidden, attention in zip(part.pairs, part.hidden, part.attention, strict=True):
        a, b = s[pair.student], t[pair.teacher]
        weight = mapped.projections[pair.key]
        torch.testing.assert_close(hidden, hidden_mse([a.hidden], [b.hidden], [weight])[0])
        torch.testing.assert_close(attention, attention_mse([a.q], [a.k], [b.q], [b.k])[0])
    if arm == ("image",):
        measured = mapped.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)
        assert measured.hidden_layers["image"] == pytest.approx(part.hidden.tolist())


def test_an_arm_of_layers_moves_only_what_feeds_them(deep):
    deep(BATCH, ("image[2]",), predict=no_prediction).total.backward()
    moved = {n for n, p in deep.projections.items() if p.grad is not None}
    assert moved == {"image_1"}
    layers = deep.student.coca.image.layers
    reached = [
        any(p.grad is not None and bool(p.grad.any()) for p in x.parameters()) for x in layers
    ]
    assert reached == [True, True, False, False]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_arms_of_layers_share_their_compiled_graphs():
    """15 arms; a graph for each depth of each teacher module, and one a student module."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    pair = model("digits_student"), model("digits_student")
    distiller = Distiller(*pair)
    space = arm_space("layer-groups:2", distiller.student.layer_counts)
    assert len(space.arms) == 15
    for which in pair:
        for name in MODULES:
            getattr(which.coca, name).compile(backend=count, fullgraph=True)
    with torch.no_grad():
        for arm in space.arms:
            distiller(BATCH, arm, predict=DATA.loss)
    # teacher: image and text not recorded (run for multimodal alone) and whole, image half too
    assert len(graphs) == 3 + (3 + 2 + 1)
    torch._dynamo.reset()


def test_scaled_by_variance_a_constant_guess_costs_one(pair):
    student, teacher = pair
    distiller = Distiller(student, teacher, hidden_scale="variance")
    taps = teacher(BATCH, taps={"text": [1]})
    mask = taps.masks["text"]
    states = taps.taps["text"][0].hidden[mask]
    spread = (states - states.mean(0)).square().mean()
    plain = Distiller(student, teacher)
    plain.load_state_dict(distiller.state_dict())
    scaled = distiller(BATCH, ("text",), predict=DATA.loss).hidden
    raw = plain(BATCH, ("text",), predict=DATA.loss).hidden
    torch.testing.assert_close(scaled, raw / spread, rtol=1e-4, atol=0.0)
    shares = [measure(d).unexplained for d in (distiller, plain)]
    assert shares[0]["text"] == pytest.approx(scaled.tolist(), rel=1e-6)
    for name in MODULES:
        assert shares[1][name] == pytest.approx(shares[0][name], rel=1e-6)


def test_reduction_and_cross_attention(pair):
    student, teacher = pair
    torch.manual_seed(1)
    mean = Distiller(student, teacher, reduction="mean", attention_weight=0.0)
    step = mean(BATCH, MODULES, predict=no_prediction)
    torch.testing.assert_close(step.total, step.hidden.mean())
    crossed = Distiller(student, teacher, cross_attention=True)
    with_cross = crossed(BATCH, MODULES, predict=no_prediction).attention
    without = mean(BATCH, MODULES, predict=no_prediction).attention
    assert with_cross.shape == without.shape
    torch.testing.assert_close(with_cross[:-1], without[:-1])
    assert with_cross[-1] > without[-1]


@pytest.mark.parametrize(
    ("options", "name", "more"),
    [
        ({"hidden_loss": "cosine"}, "hidden_cosine", {}),
        ({"hidden_loss": "smooth-l1"}, "hidden_smooth_l1", {}),
        ({"hidden_loss": "normalized-mse"}, "hidden_mse", {"normalize": True}),
        ({"attention_loss": "kl"}, "attention_kl", {"heads": "mean"}),
        ({"attention_loss": "kl-each"}, "attention_kl", {"heads": "each"}),
        ({"attention_loss": "probs-each"}, "attention_mse", {"target": "probs", "heads": "each"}),
        ({"attention_loss": "scores-each"}, "attention_mse", {"heads": "each"}),
    ],
)
def test_losses_by_name(pair, options, name, more):
    student, teacher = pair
    distiller = Distiller(student, teacher, **options)
    step = distiller(BATCH, ("text",), predict=no_prediction)
    s, t = (x(BATCH, taps={"text": [n]}) for x, n in ((student, 0), (teacher, 1)))
    (a,), (b,) = s.taps["text"], t.taps["text"]
    loss = getattr(optima_fast, name)
    if "hidden_loss" in options:
        weight, actual = distiller.projections["text_0"], step.hidden
        expected = loss(
            a.hidden, b.hidden, weight, mask=s.masks["text"], backend="reference", **more
        )
    else:
        mask, actual = s.masks["text"], step.attention
        expected = loss(
            a.q, a.k, b.q, b.k, causal=True, query_mask=mask, key_mask=mask,
            backend="reference", **more,
        )  # fmt: skip
    torch.testing.assert_close(actual, expected)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_loss": "cosine", "hidden_scale": "variance"}, "leave one of them out"),
        ({"hidden_loss": "l1"}, "hidden_loss must be one of"),
        ({"modules": ["audio"]}, "must be of both models, got 'audio'"),
        ({"attention_loss": "maps"}, "attention_loss must be one of"),
        ({"hidden_scale": "std"}, "hidden_scale must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"hidden_weight": -1.0}, "hidden_weight must be finite and not negative, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be finite and not negative, got nan"),
    ],
)
def test_options_are_checked(pair, options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(*pair, **options)


def test_wrong_calls_are_told(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match="kl_weight is 0.5: pass divergence="):
        Distiller(student, teacher, kl_weight=0.5)(BATCH, (), predict=DATA.loss)
    for arm, message in (
        (("audio",), "arm .'audio',.: unknown module 'audio'; choose from image, text"),
        (("image[3]",), r"layers of image must be from 1 to 2, .* got 'image\[3\]'"),
        (("image[2-1]",), "the first not after the last"),
        (("image[x]",), "a member must be MODULE, MODULE.LAYER. or"),
    ):
        with pytest.raises(ValueError, match=message):
            Distiller(student, teacher)(BATCH, arm, predict=DATA.loss)
    with pytest.raises(UserError, match="deeper than its teacher"):
        Distiller(teacher, student)
    capped = model("digits_teacher", attention_cap=50.0)
    with pytest.raises(ValueError, match="do not know capped scores"):
        Distiller(student, capped)
