"""accelerate with gradient accumulation, where batches are of unequal size."""

import contextlib

import torch
from accelerate import Accelerator

import optima_fast


def main(student, teacher, batches, accumulate=4, lr=1e-3, **options):
    """A step is the gradient of the mean over all tokens of so many batches, of all processes."""
    accelerator = Accelerator()
    device, processes = accelerator.device, accelerator.num_processes
    student, teacher = student.to(device), teacher.to(device)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    distiller = optima_fast.Distiller.from_models(student, teacher, batches[0], **options)
    projections = [*distiller.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *projections], lr=lr)
    model, optimizer = accelerator.prepare(student, optimizer)
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        sizes = [batch["attention_mask"].sum() for batch in group]
        total = accelerator.reduce(sum(sizes)) / processes
        for batch, size in zip(group, sizes, strict=True):
            last = batch is group[-1]
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = model(**batch).loss + distiller.compare(batch=batch).total
                accelerator.backward(loss * size / total)
        for weight in projections:  # they are in no wrapper
            weight.grad = accelerator.reduce(weight.grad, "mean")
        optimizer.step()
        optimizer.zero_grad()
    distiller.close()
    return student
