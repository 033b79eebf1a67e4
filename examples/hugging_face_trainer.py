"""Distillation in transformers' Trainer: a compute_loss of three lines."""

from transformers import Trainer

import optima_fast


class DistillationTrainer(Trainer):
    """A Trainer whose model also learns from a teacher's layers.

    Args:
        teacher: frozen here, moved to the device of the first batch.
        example: one collated batch, from which shapes are known.
        options: of :meth:`optima_fast.Distiller.from_models`.
    """

    def __init__(self, model, *args, teacher, example, options=None, **kwargs):
        self.distiller = optima_fast.Distiller.from_models(
            model, teacher, example, **(options or {})
        )
        super().__init__(model, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        projections = [*self.distiller.to(self.args.device).parameters()]
        if projections:
            optimizer.add_param_group({"params": projections, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.distiller.teacher.model.to(self.args.device)
            loss = loss + self.distiller.compare(batch=inputs).total
        return (loss, outputs) if return_outputs else loss
