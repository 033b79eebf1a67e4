"""Other shapes of model: vision and language (LLaVA, BLIP-2), an encoder and a decoder (BART)."""

import torch

import optima_fast


def vision_and_language(student, teacher, batch):
    """A LLaVA-like pair: modules by path, under names of one's own, two arms of three."""
    return optima_fast.Distiller.from_models(
        student,
        teacher,
        batch,
        modules={
            "vision": "model.vision_tower.encoder.layers",
            "language": "model.language_model.layers",
        },
        attention_loss="probs",
    )


def encoder_and_decoder(student, teacher, batch):
    """BART: found by themselves, cross-attention compared too, the teacher's layers given."""
    return optima_fast.Distiller.from_models(
        student,
        teacher,
        batch,
        cross_attention=True,
        teacher_layers={"encoder": [1, 3], "decoder": [1, 3]},
    )


def train(distiller, student, batches, arm=None, lr=1e-3):
    """A step a batch; returns the losses."""
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=lr)
    losses = []
    for batch in batches:
        loss = distiller(batch, arm).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
