"""Visual entailment: does an image entail a statement, contradict it, or leave it open?"""

from typing import ClassVar

from optima_fast.tasks.base import SingleLabel

CLASSES = ("entailment", "neutral", "contradiction")


class SnliVe(SingleLabel):
    """SNLI-VE: one of three `CLASSES`; cross entropy and accuracy.

    Source: Xie et al., "Visual Entailment", 2019, arXiv 1901.06706.
    """

    task: ClassVar[str] = "snli_ve"
    head: ClassVar[str] = "classification"
