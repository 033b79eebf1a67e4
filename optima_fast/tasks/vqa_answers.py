"""Answers of VQA as its official evaluator sees them: normal form, score, answer set.

    score(a) = mean over the n annotators i of min(1, |{j != i : answer_j = a}| / 3)

Answers are compared in normal form unless all annotators wrote the very same text; then they are
compared as written. So where ten people wrote "none", "none" is right and "0" is not, while among
differing answers "none" counts as "0".

Source: the evaluator at https://visualqa.org/evaluation.html.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset(["a", "an", "the"])
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the evaluator passes re.UNICODE, 32, as the number of replacements

# A word that lacks one of its apostrophes gets it back.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd've how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've he'd he's 'ow's'at
"""


def _contractions() -> dict[str, str]:
    known = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for place in (match.start() for match in re.finditer("'", word)):
            known[word[:place] + word[place + 1 :]] = word
    return known


_CONTRACTIONS = _contractions()


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The normal form in which the evaluator compares answers.

    Line ends and tabs become spaces, punctuation goes or becomes a space, articles go, words are
    lower-cased, number words up to ten become digits, contractions get their apostrophes.

    Example:
        >>> normalise("The 7-Up, on a table."), normalise("none"), normalise("dont")
        ('7 up on table', '0', "don't")
    """
    answer = _stripped(answer)
    removes = _THOUSANDS.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        apart = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if removes or apart else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accepted(answers: Sequence[str]) -> tuple[dict[str, float], bool]:
    """What predicting each answer is worth.

    Args:
        answers: What the annotators wrote, as written.

    Returns:
        Score by answer, and whether a prediction is normalised before it is looked up there.

    Raises:
        ValueError: `answers` is empty.
    """
    if not answers:
        raise ValueError("answers must hold at least one annotator's answer, got none")
    written = [_stripped(answer) for answer in answers]
    differ = len(set(written)) > 1
    counts = Counter(map(normalise, written) if differ else written)
    n = len(written)
    scores = {
        answer: (same * min(1.0, (same - 1) / 3) + (n - same) * min(1.0, same / 3)) / n
        for answer, same in counts.items()
    }
    return scores, differ


def score(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one prediction against the annotators' answers.

    Example:
        >>> round(score("Two", ["2"] * 3 + ["3"] * 7), 3), score("YES", ["yes"] * 10)
        (0.9, 0.0)
    """
    scores, differ = accepted(answers)
    prediction = _stripped(prediction)
    return scores.get(normalise(prediction) if differ else prediction, 0.0)


def answer_set(questions: Iterable[Sequence[str]], size: int) -> tuple[str, ...]:
    """The answers that are most often the best one of a training question.

    Args:
        questions: The annotators' answers of each question.
        size: Number of answers to keep, at least 1.

    Returns:
        At most `size` answers, the frequent ones first and equally frequent ones by name; an answer
        stands in the form in which it scores.
    """
    counts: Counter[str] = Counter()
    for answers in questions:
        scores, _ = accepted(answers)
        best = min(scores, key=lambda answer: (-scores[answer], answer))
        if best:
            counts[best] += 1
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])
