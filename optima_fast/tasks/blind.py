"""Answers from the text alone: what a model that sees the images has to beat.

Texts are rows of ids, int64 `[n, L]`; what a class is worth to an example is kept by the k classes
that are worth something, `[n, k]` (see `Classification.worth`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLE = 20_000
MOST_CLASSES = 100


def best_by_text(
    text: Tensor, classes: Tensor, worth: Tensor, asked: Tensor, otherwise: int
) -> Tensor:
    """Class with the largest sum of worth for the very same text, `otherwise` if it is new.

    Returns:
        int64 `[len(asked)]`.
    """
    number: dict[bytes, int] = {}
    of = np.array([number.setdefault(row.tobytes(), len(number)) for row in text.numpy()])
    size = int(classes.max()) + 1
    key = of[:, None] * size + classes.numpy()
    pairs, where = np.unique(key, return_inverse=True)
    total = np.bincount(where.reshape(-1), weights=worth.numpy().reshape(-1).astype(np.float64))
    # by text, the largest total last, and of equal ones the smallest class
    order = np.lexsort((-pairs, total, pairs // size))
    order = order[total[order] > 0]
    best = dict(zip((pairs[order] // size).tolist(), (pairs[order] % size).tolist(), strict=True))
    known = (number.get(row.tobytes(), -1) for row in asked.numpy())
    return torch.tensor([best.get(i, otherwise) for i in known])


def best_by_words(text: Tensor, classes: Tensor, worth: Tensor, asked: Tensor) -> Tensor:
    """Logistic regression from counts of ids to the class that is worth most.

    Of the texts at most `SAMPLE`, evenly spread, and of those the ones with the `MOST_CLASSES`
    commonest classes are learnt from: a coefficient of each id and class must fit in memory.

    Returns:
        int64 `[len(asked)]`.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    stride = -(-len(text) // SAMPLE)
    rows = text[::stride].numpy()
    most, best = worth[::stride].max(1)
    label = classes[::stride].gather(1, best[:, None])[:, 0].numpy()
    scored = most.numpy() > 0
    names, count = np.unique(label[scored], return_counts=True)
    if len(names) < 2:
        return torch.full((len(asked),), int(names[0]) if len(names) else 0)
    learnt = scored & np.isin(label, names[np.argsort(-count, kind="stable")[:MOST_CLASSES]])
    rows, label = rows[learnt], label[learnt]
    ids = np.unique(rows)

    def counts(rows: NDArray[np.int64]) -> Any:
        column = np.searchsorted(ids, rows).clip(max=len(ids) - 1)
        known = (ids[column] == rows).astype(np.float64)
        where = np.repeat(np.arange(len(rows)), rows.shape[1])
        shape = (len(rows), len(ids))
        return csr_matrix((known.reshape(-1), (where, column.reshape(-1))), shape=shape)

    fit: Callable[..., Any] = LogisticRegression(max_iter=200).fit
    return torch.from_numpy(
        fit(counts(rows), label).predict(counts(asked.numpy())).astype(np.int64)
    )
