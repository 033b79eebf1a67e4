"""Captioning: the words of a caption one by one; greedy decoding, CIDEr-D."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.tasks.base import Predictions, TaskData, evaluating, mean_kl
from optima_fast.tasks.split import Split

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
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(
            logits.flatten(0, 1).to(wide), target.flatten(), ignore_index=self.tokenizer.pad_id
        )

    def counted(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """The words of all captions."""
        words = int((batch["text"][:, 1:] != self.tokenizer.pad_id).sum())
        return words, words

    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) over the words at temperature 1, mean over words as in `loss`."""
        counts = batch["text"][:, 1:] != self.tokenizer.pad_id
        return mean_kl(student_logits, teacher_logits, counts)

    def predict(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> Predictions:
        """A greedy caption of each image of the split, in order."""
        from optima_fast.models.generate import greedy

        words = self.tokenizer
        captions = [""] * len(split.images)
        with evaluating(model):
            for numbers, images in split.image_batches(batch_size):
                written = greedy(
                    cast("TaskModel", model),
                    images.to(device),
                    bos_id=words.bos_id,
                    eos_id=words.eos_id,
                    max_length=self.text_length,
                )
                for number, row in zip(numbers.tolist(), written.cpu(), strict=True):
                    captions[number] = words.decode(row)
        return Predictions(captions)

    def metrics(self, split: Split, predictions: Predictions) -> dict[str, float]:
        """One caption an image against all its references.

        Returns:
            `cider` (CIDEr-D, on the scale where the references of people reach about 1), `bleu1`
            to `bleu4`, `rouge_l` and `left_out`, the number of images that cannot be read, if
            there are any.
        """
        from optima_fast.tasks.caption_metrics import bleu, cider, rouge_l

        pairs = zip(predictions.texts, references(split), split.readable().tolist(), strict=True)
        seen = [(_words(said), list(map(_words, known))) for said, known, read in pairs if read]
        said, known = zip(*seen, strict=True)
        result = {"cider": cider(said, known, tokenized=True)[0]}
        result |= {f"bleu{k + 1}": b for k, b in enumerate(bleu(said, known, tokenized=True)[0])}
        result |= {"rouge_l": rouge_l(said, known, tokenized=True)[0]}
        return result | split.left_out()

    def baselines(self) -> dict[str, float]:
        """CIDEr-D on the test split of two captions that are the same for every image.

        `majority` is the most frequent training caption. `text_only` is, of the 25 most frequent
        captions and 75 more spread over the training split, the one with the largest CIDEr-D on
        the references of at most 100 training images.
        """
        from optima_fast.tasks.caption_metrics import cider

        known, asked = references(self.train), references(self.test)
        counts = Counter(caption for group in known for caption in group)
        ranked = sorted(counts, key=lambda caption: (-counts[caption], caption))
        spread = [group[0] for group in known[:: -(-len(known) // 75)]]
        sample = [list(map(_words, group)) for group in known[:: -(-len(known) // 100)]]
        blind = max(
            map(_words, [*ranked[:25], *spread]),
            key=lambda caption: cider([caption] * len(sample), sample, tokenized=True)[0],
        )
        return {
            name: cider([caption] * len(asked), asked)[0]
            for name, caption in (("majority", ranked[0]), ("text_only", blind))
        }


def references(split: Split) -> Sequence[Sequence[str]]:
    """The captions of each image of a captioning split."""
    assert split.references is not None
    return split.references


def _words(caption: str) -> str:
    from optima_fast.tasks.caption_metrics import tokenize

    return " ".join(tokenize(caption))
