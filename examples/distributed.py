"""DDP or FSDP2: torchrun --nproc-per-node 2 examples/distributed.py [--fsdp]"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM

import optima_fast


def main(student, teacher, batches, fsdp=False, lr=0.1, **options):
    """Every rank takes its share of each batch; the student is trained in place."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [{k: v[rank::world].contiguous() for k, v in b.items()} for b in batches]
    for model in (student, teacher) if fsdp else ():
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    model = student if fsdp else DistributedDataParallel(student)
    distiller = optima_fast.Distiller.from_models(model, teacher, shares[0], **options)
    projections = [*distiller.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *projections], lr=lr, foreach=False)
    for batch in shares:
        loss = model(**batch).loss + distiller.compare(batch=batch).total
        optimizer.zero_grad()
        loss.backward()
        for weight in projections:  # they are in no wrapper
            dist.all_reduce(weight.grad)
            weight.grad /= world
        optimizer.step()
    distiller.close()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    teacher = BertForMaskedLM(BertConfig(**small, num_hidden_layers=4))
    student = BertForMaskedLM(BertConfig(**small, num_hidden_layers=2))
    ids = torch.randint(5, 999, (8, 4, 32))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    main(student, teacher, batches, fsdp="--fsdp" in sys.argv)
    dist.destroy_process_group()
