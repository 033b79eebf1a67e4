"""Natural language for visual reasoning: is a sentence true of a pair of images?"""

from collections.abc import Sequence
from typing import ClassVar

from optima_fast.tasks.base import Predictions, SingleLabel
from optima_fast.tasks.split import Split

CLASSES = ("false", "true")


class Nlvr2(SingleLabel):
    """NLVR2: "false" or "true"; cross entropy, accuracy and, of official data, consistency.

    Each example shows two images, so a batch of T sentences has P = 2 T pairs: pair 2 t is
    sentence t with the left image, pair 2 t + 1 the same sentence with the right one.

    Source: Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs",
    2019, arXiv 1811.00491.
    """

    task: ClassVar[str] = "nlvr2"
    head: ClassVar[str] = "pair"

    def metrics(self, split: Split, predictions: Predictions) -> dict[str, float]:
        """`accuracy` and, where the examples have official identifiers, `consistency`."""
        result = super().metrics(split, predictions)
        if split.ids is not None:
            right, seen = self.gained(split, predictions) > 0, split.readable()
            names = [str(i) for i, read in zip(split.ids, seen.tolist(), strict=True) if read]
            result["consistency"] = consistency(names, right[seen].tolist())
        return result


def consistency(identifiers: Sequence[str], correct: Sequence[bool]) -> float:
    """Part of the sentences that are judged rightly for every pair of images they are asked of.

    Args:
        identifiers: split-set-pair-sentence of each example.
        correct: Whether each example was answered rightly.

    Raises:
        ValueError: The two lengths differ, there is no example, or an identifier has another form.

    Source: the evaluation script of https://github.com/lil-lab/nlvr.

    Example:
        >>> consistency(["dev-8-0-0", "dev-8-1-0", "dev-8-0-1"], [True, False, True])
        0.5
    """
    if len(identifiers) != len(correct) or not identifiers:
        raise ValueError(
            "identifiers and correct must have one entry an example and at least one, "
            f"got {len(identifiers)} and {len(correct)}"
        )
    right: dict[tuple[str, str, str], bool] = {}
    for identifier, hit in zip(identifiers, correct, strict=True):
        parts = identifier.split("-")
        if len(parts) != 4:
            raise ValueError(f"identifier must be split-set-pair-sentence, got {identifier!r}")
        sentence = (parts[0], parts[1], parts[3])
        right[sentence] = right.get(sentence, True) and bool(hit)
    return sum(right.values()) / len(right)
