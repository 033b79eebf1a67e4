"""Captioning: the words of a caption one by one; greedy decoding, CIDEr-D."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.tasks.base import Split, TaskData, evaluating, mean_kl

if TYPE_CHECKING:
    from optima_fast.models.task_model import TaskModel


class Coco(TaskData):
    """Captioning; the text is the target, one of an image's captions an example.

    `logits` are `[T, L - 1, V]` and predict `text[:, 1:]`; padding does not count.
    """

    task: ClassVar[str] = "coco"
    head: ClassVar[str] = "caption"
    metric_name: ClassVar[str] = "cider"

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy with the next word, mean over words that are not padding."""
        target = batch["text"][:, 1:]
        counts = target != self.tokenizer.pad_id
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits[counts].to(wide), target[counts])

    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) over the words at temperature 1, mean over words as in `loss`."""
        counts = batch["text"][:, 1:] != self.tokenizer.pad_id
        return mean_kl(student_logits[counts], teacher_logits[counts])

    def evaluate(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """CIDEr-D of one greedy caption an image against all its references.

        Returns:
            `cider`, on the scale where the references of people reach about 1.
        """
        from optima_fast.tasks.caption_metrics import cider

        known = references(split)
        captions = self.captions(model, split, batch_size=batch_size, device=device)
        return {"cider": cider(captions, known)[0]}

    def captions(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> list[str]:
        """A greedy caption of each image of the split, in order."""
        from optima_fast.models.generate import greedy

        words = self.tokenizer
        result: list[str] = []
        with evaluating(model):
            for ids in torch.split(torch.arange(len(split.images)), batch_size):
                written = greedy(
                    cast("TaskModel", model),
                    split.images[ids].to(device),
                    bos_id=words.bos_id,
                    eos_id=words.eos_id,
                    max_length=self.text_length,
                )
                result += [words.decode(row) for row in written.cpu()]
        return result

    def baselines(self) -> dict[str, float]:
        """CIDEr-D on the test split of two captions that are the same for every image.

        `majority` is the most frequent training caption. `text_only` is, of the 25 most frequent
        captions and 75 more spread over the training split, the one with the largest CIDEr-D on
        the references of at most 100 training images.
        """
        from optima_fast.tasks.caption_metrics import cider, tokenize

        def words(caption: str) -> str:
            return " ".join(tokenize(caption))

        known, asked = references(self.train), references(self.test)
        counts = Counter(caption for group in known for caption in group)
        ranked = sorted(counts, key=lambda caption: (-counts[caption], caption))
        spread = [group[0] for group in known[:: -(-len(known) // 75)]]
        sample = [list(map(words, group)) for group in known[:: -(-len(known) // 100)]]
        blind = max(
            map(words, [*ranked[:25], *spread]),
            key=lambda caption: cider([caption] * len(sample), sample, tokenized=True)[0],
        )
        return {
            name: cider([caption] * len(asked), asked)[0]
            for name, caption in (("majority", ranked[0]), ("text_only", blind))
        }


def references(split: Split) -> Sequence[Sequence[str]]:
    """The captions of each image of a captioning split."""
    if split.references is None:
        raise ValueError(f"the {split.name} split must have references to be captioned")
    return split.references
