"""Captioning metrics without Java: CIDEr-D, BLEU-1..4, ROUGE-L and the Penn Treebank tokenizer.

The numbers follow `pycocoevalcap` 1.2 (https://github.com/salaniz/pycocoevalcap), whose tokenizer
is Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase`, a list of punctuation removed.

CIDEr-D (Vedantam et al., 2015, arXiv:1411.5726), I images, n = 1..4, sigma = 6:
    g_n(c)[w]  = count_c(w) (log I - log max(1, df(w)))        df counted over the references
    d_n(c, r)  = sum_w min(g_n(c)[w], g_n(r)[w]) g_n(r)[w] / (|g_n(c)| |g_n(r)|)
    score(c)   = 10 mean_n mean_r d_n(c, r) exp(-(l_c - l_r)^2 / (2 sigma^2))
BLEU-k (Papineni et al., 2002), clipped n-gram precisions p_n of the whole corpus:
    score      = (p_1 ... p_k)^(1/k) min(1, exp(1 - r/c))      c, r: lengths, r of the closest
ROUGE-L (Lin, 2004), P and R the best precision and recall over the references, beta = 1.2:
    score(c)   = (1 + beta^2) P R / (R + beta^2 P)
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from optima_fast.tasks.ptb import tokenize

__all__ = ["bleu", "cider", "rouge_l", "tokenize"]

_MAX_N = 4
_SIGMA = 6.0
_BETA = 1.2
_SMALL = 1e-9
_TINY = 1e-15

Ngrams = Counter[tuple[str, ...]]


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, tokenized: bool = False
) -> tuple[float, list[float]]:
    """CIDEr-D, times ten as published, with document frequencies from the references given.

    Args:
        candidates: One caption an image.
        references: One or more captions an image, in the order of `candidates`.
        tokenized: Whether every caption is already a string of tokens joined by spaces; raw text
            goes through `tokenize` first.

    Returns:
        The mean over images and each image's score.

    Raises:
        ValueError: The two lengths differ, there is nothing to score, or an image has no reference.

    Example:
        >>> cider(["a cat", "two dogs run"], [["a cat"], ["a bird"]], tokenized=True)[1][1]
        0.0
    """
    texts, groups = _prepare(candidates, references, tokenized)
    cooked = [_ngrams(text.split()) for text in texts]
    cooked_groups = [[_ngrams(reference.split()) for reference in group] for group in groups]
    frequency: Counter[tuple[str, ...]] = Counter()
    for group in cooked_groups:
        frequency.update({ngram for counts in group for ngram in counts})
    log_images = math.log(len(groups))

    def weigh(counts: Ngrams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_MAX_N)]
        for ngram, count in counts.items():
            inverse = log_images - math.log(max(1.0, frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * inverse
        norms = [math.sqrt(sum(value**2 for value in level.values())) for level in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 1)

    scores = []
    for counts, group in zip(cooked, cooked_groups, strict=True):
        weights, norms, length = weigh(counts)
        total = 0.0
        for reference in group:
            other, other_norms, other_length = weigh(reference)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for n in range(_MAX_N):
                shared = sum(
                    min(weight, other[n].get(ngram, 0.0)) * other[n].get(ngram, 0.0)
                    for ngram, weight in weights[n].items()
                )
                if norms[n] and other_norms[n]:
                    shared /= norms[n] * other_norms[n]
                total += shared * penalty
        scores.append(10.0 * total / _MAX_N / len(group))
    return sum(scores) / len(scores), scores


def bleu(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, tokenized: bool = False
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-4 of the corpus, with the reference closest in length.

    Args:
        candidates: One caption an image.
        references: One or more captions an image, in the order of `candidates`.
        tokenized: As in `cider`.

    Returns:
        The four corpus scores, and per image its four (smoothed by 1e-15 and 1e-9, as published).

    Raises:
        ValueError: As `cider`.

    Example:
        >>> [round(score, 4) for score in bleu(["a b c d"], [["a b c d"]], tokenized=True)[0]]
        [1.0, 1.0, 1.0, 1.0]
    """
    texts, groups = _prepare(candidates, references, tokenized)
    total_correct, total_guess, total_length, total_reference = [0] * _MAX_N, [0] * _MAX_N, 0, 0
    scores = []
    for text, group in zip(texts, groups, strict=True):
        words = text.split()
        counts = _ngrams(words)
        allowed: Ngrams = Counter()
        lengths = []
        for reference in group:
            reference_words = reference.split()
            lengths.append(len(reference_words))
            allowed |= _ngrams(reference_words)
        closest = min((abs(length - len(words)), length) for length in lengths)[1]
        guess = [max(0, len(words) - n) for n in range(_MAX_N)]
        correct = [0] * _MAX_N
        for ngram, count in counts.items():
            correct[len(ngram) - 1] += min(count, allowed[ngram])
        scores.append(_geometric(correct, guess, len(words), closest))
        total_correct = [a + b for a, b in zip(total_correct, correct, strict=True)]
        total_guess = [a + b for a, b in zip(total_guess, guess, strict=True)]
        total_length += len(words)
        total_reference += closest
    return _geometric(total_correct, total_guess, total_length, total_reference), scores


def rouge_l(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, tokenized: bool = False
) -> tuple[float, list[float]]:
    """ROUGE-L with beta 1.2, by the longest common subsequence of words.

    Args:
        candidates: One caption an image.
        references: One or more captions an image, in the order of `candidates`.
        tokenized: As in `cider`.

    Returns:
        The mean over images and each image's score.

    Raises:
        ValueError: As `cider`.

    Example:
        >>> rouge_l(["a b"], [["a b"]], tokenized=True)[0]
        1.0
    """
    texts, groups = _prepare(candidates, references, tokenized)
    scores = []
    for text, group in zip(texts, groups, strict=True):
        words = text.split(" ")
        precision = recall = 0.0
        for reference in group:
            reference_words = reference.split(" ")
            common = _common_subsequence(words, reference_words)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference_words))
        if precision and recall:
            score = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
        else:
            score = 0.0
        scores.append(score)
    return sum(scores) / len(scores), scores


def _prepare(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool
) -> tuple[list[str], list[list[str]]]:
    if isinstance(candidates, str) or isinstance(references, str):
        raise TypeError("candidates and references must be sequences of captions, got one string")
    if len(candidates) != len(references):
        raise ValueError(
            "candidates and references must have one entry an image, "
            f"got {len(candidates)} candidates and {len(references)} lists of references"
        )
    if not candidates:
        raise ValueError("candidates must hold at least one caption, got none")
    for index, group in enumerate(references):
        if isinstance(group, str):
            raise TypeError(f"references[{index}] must be a list of captions, got {group!r}")
        if not group:
            raise ValueError(f"references[{index}] must hold at least one caption, got none")
    clean: Callable[[str], str] = str if tokenized else lambda text: " ".join(tokenize(text))
    return [clean(text) for text in candidates], [[clean(r) for r in group] for group in references]


def _ngrams(words: Sequence[str]) -> Ngrams:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, _MAX_N + 1)
        for start in range(len(words) - n + 1)
    )


def _geometric(
    correct: Sequence[int], guess: Sequence[int], length: int, reference: int
) -> list[float]:
    scores, product = [], 1.0
    for n in range(_MAX_N):
        product *= (correct[n] + _TINY) / (guess[n] + _SMALL)
        scores.append(product ** (1.0 / (n + 1)))
    ratio = (length + _TINY) / (reference + _SMALL)
    if ratio < 1:
        scores = [score * math.exp(1 - 1 / ratio) for score in scores]
    return scores


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
