"""Distiller.from_models: modules, layers, projections, compiled students, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers", reason="needs transformers")
import transformers as tf
from families import EQUAL, GROUPED, INPUTS, SMALL, pixels, text

import optima_fast
from optima_fast.taps import stacks

FROM = optima_fast.Distiller.from_models


def llama(layers=2, seed=0, **options):
    torch.manual_seed(seed)
    config = {**GROUPED, **options, "num_hidden_layers": layers}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config))


def bert(layers=2, seed=0, **options):
    torch.manual_seed(seed)
    config = {**SMALL, **options, "num_hidden_layers": layers}
    return tf.BertModel(tf.BertConfig(**config)).train()


def clip(seed=0):
    torch.manual_seed(seed)
    return EQUAL["clip"].make()


def test_equal_widths_have_no_projection_and_it_says_what_it_compares():
    student = bert()
    distiller = FROM(student, bert(4, 1), text())
    assert student.training
    assert list(distiller.parameters()) == []
    assert distiller.summary.splitlines() == [
        "encoder layer 1 from teacher layer 2: hidden 32 as they are; attention of 4 heads of 8 "
        "and 4 heads of 8, padded",
        "encoder layer 2 from teacher layer 4: hidden 32 as they are; attention of 4 heads of 8 "
        "and 4 heads of 8, padded",
    ]


def test_losses_are_those_of_the_records():
    student, teacher = llama(2, 0), llama(4, 1, hidden_size=48, num_key_value_heads=1)
    batch = {**text(), "labels": text()["input_ids"]}
    student.eval()
    distiller = FROM(student, teacher, batch, attention_loss="probs", attention_weight=3.0)
    step = distiller(batch)
    with torch.no_grad():
        output = student(**batch)
        s = distiller.student.last().layers("model")
        teacher(**batch)
        t = distiller.teacher.last().layers("model")[1::2]
        mask = batch["attention_mask"].bool()
        for i in range(2):
            weight = distiller.projections[f"model_{i}"]
            difference = (s[i].hidden @ weight - t[i].hidden)[mask]
            torch.testing.assert_close(step.hidden[i], difference.square().mean())
            a, b = s[i].attentions[0], t[i].attentions[0]
            loss = optima_fast.attention_mse(
                a.q, a.k, b.q, b.k, target="probs", causal=True, query_mask=mask, key_mask=mask,
                backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(step.attention[i], loss[0])
    torch.testing.assert_close(step.prediction, output.loss)
    total = step.prediction + step.hidden.sum() + 3.0 * step.attention.sum()
    torch.testing.assert_close(step.total, total)
    student(**batch)
    layers = distiller.compare(batch=batch)
    torch.testing.assert_close(layers.hidden, step.hidden)
    torch.testing.assert_close(layers.attention, step.attention)
    torch.testing.assert_close(layers.total, total - step.prediction)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", ["llama", "siglip"])
def test_a_student_compiled_as_one_graph(name):
    """Causal with shared keys; then two modules, neither causal, one padded."""
    torch._dynamo.reset()
    family = EQUAL[name]
    batch = INPUTS[family.inputs]()
    torch.manual_seed(0)
    student, teacher = family.make().eval(), family.make()
    for path in stacks.find(student).values():  # a layer fewer to compile
        del student.get_submodule(path)[1:]
    distiller = FROM(student, teacher, batch)
    grads = []
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for run in (student, torch.compile(student, fullgraph=True, backend=graphs)):
        for _ in range(3):
            student.zero_grad()
            run(**batch)
            distiller.compare(batch=batch).total.backward()
        # one that is not used has none, or zeros from a compiled graph
        grads.append(
            [
                torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for p in student.parameters()
            ]
        )
    assert graphs.frame_count == 1
    assert sum(bool(g.any()) for g in grads[0]) > 5
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_activation_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        student, teacher = llama(2, 0), llama(4, 1)
        if checkpointing:
            student.activation_checkpointing_enable()
            student.train()
        distiller = FROM(student, teacher, text())
        student(**text())
        distiller.compare(batch=text()).total.backward()
        # the second run, in the backward pass, is not kept
        assert {m.__dict__.get("_optima_fast_calls", ()) for m in student.modules()} == {()}
        grads.append([p.grad for p in student.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_records_without_gradient_are_refused():
    """A reentrant checkpoint, or a student run under no_grad, would be distilled into nothing."""
    student, teacher = llama(2, 0), llama(4, 1)
    distiller = FROM(student, teacher, text())
    with torch.no_grad():
        student(**text())
    with pytest.raises(ValueError, match="recorded without gradient.*use_reentrant=False"):
        distiller.compare(batch=text())


def test_a_module_that_is_frozen_needs_no_gradient():
    student, teacher = EQUAL["clip"].make(), EQUAL["clip"].make()
    student.vision_model.requires_grad_(False)
    batch = {**text(), **pixels()}
    distiller = FROM(student, teacher, batch)
    student(**batch)
    distiller.compare(batch=batch).total.backward()
    assert student.text_model.encoder.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("target", ["scores", "probs"])
@pytest.mark.parametrize("projections", ["all", "needed"])
def test_a_teacher_in_inference_mode(projections, target):
    student, teacher = llama(2, 0), llama(2, 1)
    distiller = FROM(student, teacher, text(), attention_loss=target, projections=projections)
    student(**text())
    with torch.inference_mode():
        teacher(**text())
    distiller.compare().total.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad.any()


def test_rewards_of_all_arms():
    """What is left to learn, of every arm, from a measurement."""
    student, teacher = EQUAL["clip"].make(), EQUAL["clip"].make()
    batch = {**text(), **pixels(), "return_loss": True}
    distiller = FROM(student, teacher, batch)
    arms = optima_fast.arms(distiller.modules_matched)
    headroom = optima_fast.distill.Headroom(
        arms, [0.5, 0.7, 1.0], distiller.student.layer_counts, output="text_model"
    )

    def divergence(s, t, _):
        return (s.logits_per_text - t.logits_per_text).square().mean()

    student.train()
    measured = distiller.measure(batch, predict=lambda x, _: x.loss, divergence=divergence)
    assert student.training
    assert set(measured.hidden_layers) == {"text_model", "vision_model"}
    headroom.measured(measured)
    assert len(headroom.rewards()) == 3
    assert all(0 <= x < float("inf") for x in headroom.rewards())


def test_under_autocast():
    student, teacher = bert(2, 0).eval(), bert(4, 1)
    distiller = FROM(student, teacher, text())
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            student(**text())
            values.append(distiller.compare(batch=text()))
    assert values[1].hidden.dtype == torch.float32
    torch.testing.assert_close(values[0].hidden, values[1].hidden, rtol=0.1, atol=0.01)


def test_modules_by_path_and_teachers_layers():
    student, teacher = clip(0), clip(1)
    batch = {**text(), **pixels()}
    distiller = FROM(
        student, teacher, batch,
        modules={"vision": "vision_model.encoder.layers"}, teacher_layers={"vision": [0, 0]},
    )  # fmt: skip
    assert distiller.modules_matched == ("vision",)
    assert [p.teacher for p in distiller.pairs["vision"]] == [0, 0]
    student(**batch)
    step = distiller.compare(("vision[2]",), batch=batch)
    assert len(step.hidden) == 1


def test_a_models_padding_is_not_its_other_modules():
    """As many image tokens as text tokens: the text's padding says nothing of the image."""
    student, teacher = EQUAL["clip"].make(), EQUAL["clip"].make()
    batch = {"input_ids": torch.randint(5, 99, (3, 17)), **pixels()}
    batch["attention_mask"] = torch.ones(3, 17, dtype=torch.long)
    batch["attention_mask"][0, 9:] = 0
    distiller = FROM(student, teacher, batch)
    student(**batch)
    record = distiller.student.last()
    assert all(x.mask is None for x in record.layers("vision_model"))
    assert torch.equal(record.layers("text_model")[0].mask, batch["attention_mask"].bool())


def test_maps_of_different_pairs_are_refused():
    torch.manual_seed(0)
    student, teacher = bert(2, 0), llama(2, 1)
    with pytest.raises(ValueError, match="causal=False and window=None, the teacher's causal=True"):
        FROM(student, teacher, text())
    far, near = (EQUAL["mistral"].make() for _ in range(2))
    far.config.sliding_window = None
    with pytest.raises(ValueError, match="window=None, the teacher's causal=True and window=5"):
        FROM(far, near, text())


def test_a_mapping_that_goes_back_is_the_same_in_a_loop_of_ones_own():
    student, teacher = bert(2, 0).eval(), bert(4, 1)  # no dropout
    batch = text()
    distiller = FROM(student, teacher, batch, teacher_layers={"encoder": [3, 0]})
    assert "layer 1 from teacher layer 4" in distiller.summary.splitlines()[0]
    with torch.no_grad():
        step = distiller(batch, predict=lambda output, batch: output.last_hidden_state.sum())
        student(**batch)
        compared = distiller.compare(batch=batch)
        student(**batch)
        first = distiller.compare(("encoder[1]",), batch=batch)
    assert torch.equal(step.hidden, compared.hidden)
    assert torch.equal(step.attention, compared.attention)
    assert torch.equal(first.hidden, compared.hidden[:1])
    distiller.close()
    usual = FROM(student, teacher, batch)
    with torch.no_grad():
        student(**batch)
        assert not torch.equal(usual.compare(batch=batch).hidden, compared.hidden)
    usual.close()


def test_errors_leave_no_tap_behind():
    student, teacher = clip(0), bert(4, 1)
    batch = text()
    with pytest.raises(ValueError, match="student's modules are .*text_model.*say which belong"):
        FROM(student, teacher, batch)
    student = bert(4, 0)
    with pytest.raises(ValueError, match=r"deeper than its teacher \(4 layers against 2\)"):
        FROM(student, bert(2, 1), batch)
    for layers, message in (
        ([0, 9, 1, 1], "4 layers from 0 to 3"),
        ([1], "4 layers from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            FROM(student, teacher, batch, teacher_layers={"encoder": layers})
    with pytest.raises(ValueError, match=r"a name must be of letters.*got 'my.layers'"):
        FROM(student, teacher, batch, modules={"my.layers": "encoder.layer"})
    with pytest.raises(ValueError, match="projections must be one of"):
        FROM(student, teacher, batch, projections="some")
    distiller = FROM(student, teacher, batch)
    with pytest.raises(ValueError, match="has no loss: put labels into the batch"):
        distiller(batch)
    with pytest.raises(ValueError, match="compare.. needs an arm"):
        distiller.compare((), batch=batch)
    distiller.close()
    FROM(student, teacher, batch).close()
    assert not any(hasattr(m, "_optima_fast_calls") for m in student.modules())
