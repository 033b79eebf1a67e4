"""What the built-in data says about its canvases: questions, statements, sentences, captions.

Every kind of text is a few wordings and a function of the canvases. Statements and sentences are
dealt out such that each text has each label equally often, so that text alone tells nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optima_fast.tasks.canvases import CELLS, EMPTY, PLACES, TONES, Canvases, Ints, Rng

ANSWERS = (*map(str, range(10)), "even", "odd")
ANNOTATORS = 10


@dataclass(frozen=True)
class Question:
    """A kind of question: wordings, the answers it can have, and which one is right."""

    wordings: tuple[str, ...]
    answers: tuple[int, ...]  # positions in ANSWERS
    answer: Callable[[Canvases], Ints]  # position in ANSWERS for each canvas


QUESTIONS: Mapping[str, Question] = {
    "count": Question(
        ("how many digits are there?", "what is the number of digits?"),
        (1, 2, 3, 4),
        lambda c: c.count,
    ),
    "largest": Question(
        ("what is the largest digit?", "which digit is the highest?"),
        tuple(range(10)),
        lambda c: c.largest,
    ),
    "smallest": Question(
        ("what is the smallest digit?", "which digit is the lowest?"),
        tuple(range(10)),
        lambda c: c.smallest,
    ),
    "brightest": Question(
        ("what is the brightest digit?", "which digit shines most?"),
        tuple(range(10)),
        lambda c: c.brightest,
    ),
    "parity": Question(
        ("is the brightest digit even or odd?", "even or odd: the digit that shines most?"),
        (10, 11),
        lambda c: 10 + c.brightest % 2,
    ),
}


def questions(
    canvases: Canvases, kinds: Sequence[str], per_image: int, error: float, rng: Rng
) -> tuple[list[str], list[str], Ints]:
    """Ask `per_image` different kinds of questions about each canvas.

    Each of ten simulated annotators gives the right answer, or with probability `error` one drawn
    from all the answers that the kind of question has.

    Returns:
        Kinds, texts and votes int64 `[questions, answers]`; a canvas's questions are neighbours.
    """
    n = len(canvases)
    asked = rng.permuted(np.tile(np.arange(len(kinds)), (n, 1)), axis=1)[:, :per_image]
    right = np.stack([QUESTIONS[kind].answer(canvases) for kind in kinds], axis=1)
    right = np.take_along_axis(right, asked, axis=1).reshape(-1)
    asked = asked.reshape(-1)

    shape = (len(asked), ANNOTATORS)
    slip = rng.integers(0, 1_000_000, shape) < round(error * 1_000_000)
    ranges = [QUESTIONS[kind].answers for kind in kinds]
    sizes = np.array([len(answers) for answers in ranges])
    table = np.array([(*a, *[a[0]] * (len(ANSWERS) - len(a))) for a in ranges])
    drawn = table[asked[:, None], rng.integers(0, sizes[asked][:, None], shape)]
    given = np.where(slip, drawn, right[:, None])
    votes = (given[:, :, None] == np.arange(len(ANSWERS))).sum(1)

    wordings = [QUESTIONS[kind].wordings for kind in kinds]
    which = rng.integers(0, [[len(wordings[k])] for k in asked])[:, 0]
    texts = [wordings[k][w] for k, w in zip(asked, which, strict=True)]
    return [kinds[k] for k in asked], texts, votes
