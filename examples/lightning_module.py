"""A LightningModule that distils: the teacher is no part of its state."""

import lightning
import torch

import optima_fast


class Distillation(lightning.LightningModule):
    """Trains a student whose output has a loss.

    Args:
        student: to train.
        teacher: to learn from.
        example: one batch, from which shapes are known.
        lr: of AdamW.
        options: of :meth:`optima_fast.Distiller.from_models`.
    """

    def __init__(self, student, teacher, example, lr=1e-3, **options):
        super().__init__()
        self.student, self.lr = student, lr
        self.distiller = optima_fast.Distiller.from_models(student, teacher, example, **options)

    def training_step(self, batch):
        self.distiller.teacher.model.to(self.device)
        prediction = self.student(**batch).loss
        layers = self.distiller.compare(batch=batch)
        self.log("prediction", prediction)
        self.log("layers", layers.total)
        return prediction + layers.total

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
