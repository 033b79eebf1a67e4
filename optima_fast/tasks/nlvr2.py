"""Natural language for visual reasoning: is a sentence true of a pair of images?"""

from typing import ClassVar

from optima_fast.tasks.base import SingleLabel

CLASSES = ("false", "true")


class Nlvr2(SingleLabel):
    """NLVR2: "false" or "true"; cross entropy and accuracy.

    Each example shows two images, so a batch of T sentences has P = 2 T pairs: pair 2 t is
    sentence t with the left image, pair 2 t + 1 the same sentence with the right one.

    Source: Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs",
    2019, arXiv 1811.00491.
    """

    task: ClassVar[str] = "nlvr2"
    head: ClassVar[str] = "pair"
