"""Captioning metrics against hand arithmetic, a brute-force definition and official figures."""

import json
import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official import shared

from optima_fast.tasks.caption_metrics import bleu, cider, rouge_l, tokenize


def test_cider_of_identical_captions_is_ten_where_every_order_exists():
    texts = ["a cat sleeps on the red mat", "two dogs run over green grass"]
    mean, each = cider(texts, [[text] for text in texts], tokenized=True)
    assert each == pytest.approx([10.0, 10.0], abs=1e-12)
    assert mean == pytest.approx(10.0, abs=1e-12)


def test_cider_of_a_caption_shorter_than_four_words_lacks_the_long_orders():
    mean, each = cider(["red cat", "blue dog"], [["red cat"], ["blue dog"]], tokenized=True)
    assert each == pytest.approx([5.0, 5.0])  # n = 1, 2 match; n = 3, 4 have no n-gram
    assert mean == pytest.approx(5.0)


def test_cider_of_disjoint_captions_is_zero():
    assert cider(["x y z w", "p q r s"], [["a b c d"], ["e f g h"]], tokenized=True) == (
        0.0,
        [0.0, 0.0],
    )


def test_cider_length_penalty_by_hand():
    # Image 0: every word of both captions is in one image of two, so each weighs log 2.
    # unigrams: candidate {a, b}, reference {a, b, c, d}: 2 / (sqrt 2 sqrt 4) = 1 / sqrt 2
    # bigrams: {ab} against {ab, bc, cd}: 1 / sqrt 3; lengths 2 and 4
    penalty = math.exp(-((2 - 4) ** 2) / (2 * 6.0**2))
    expected = 10 * (1 / math.sqrt(2) + 1 / math.sqrt(3)) * penalty / 4
    _, each = cider(["a b", "z"], [["a b c d"], ["z"]], tokenized=True)
    assert each[0] == pytest.approx(expected, rel=1e-12)


def test_cider_clips_repeated_words_and_counts_images_not_captions_in_frequency():
    # "a" is in one of two images though in both references of it: idf log 2, not 0.
    # candidate a a a: unigram vector 3, reference 1: min(3, 1) * 1 / (3 * 1) = 1 / 3
    penalty = math.exp(-((3 - 1) ** 2) / 72)
    _, each = cider(["a a a", "z"], [["a", "a"], ["z"]], tokenized=True)
    assert each[0] == pytest.approx(10 * penalty / 3 / 4, rel=1e-12)


def test_cider_averages_over_references():
    one = cider(["a b c d", "z"], [["a b c d"], ["z"]], tokenized=True)[1][0]
    two = cider(["a b c d", "z"], [["a b c d", "q r s t"], ["z"]], tokenized=True)[1][0]
    assert two == pytest.approx(one / 2)


def test_a_word_in_every_image_weighs_nothing():
    _, each = cider(["the", "the"], [["the"], ["the"]], tokenized=True)
    assert each == [0.0, 0.0]


def test_bleu_by_hand_with_brevity_penalty_and_clipping():
    corpus, each = bleu(["a a b"], [["a b c d", "a b c d e f"]], tokenized=True)
    # unigrams: a clipped to 1, b 1 of 3; bigrams: ab of {aa, ab}; closest reference has 4 words
    short = math.exp(1 - 4 / 3)
    assert corpus[0] == pytest.approx(2 / 3 * short, rel=1e-8)
    assert corpus[1] == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * short, rel=1e-8)
    assert corpus[2] < 1e-4
    assert each == [corpus]


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    corpus, _ = bleu(["a b c"], [["a b", "a b c d"]], tokenized=True)
    assert corpus[0] == pytest.approx(1.0, rel=1e-8)  # reference length 2: no penalty


def test_bleu_pools_counts_over_the_corpus():
    corpus, each = bleu(["a b c d", "x"], [["a b c d"], ["y"]], tokenized=True)
    assert corpus[0] == pytest.approx(4 / 5, rel=1e-8)
    assert each[0][0] == pytest.approx(1.0, rel=1e-8)
    assert each[1][0] < 1e-8


def test_bleu_has_no_penalty_for_a_long_candidate():
    corpus, _ = bleu(["a b c d e f"], [["a b c"]], tokenized=True)
    assert corpus[0] == pytest.approx(0.5, rel=1e-8)


def test_rouge_by_hand():
    # common subsequence of "a b c d" and "b x d": b d; P = 2/4, R = 2/3
    p, r, square = 2 / 4, 2 / 3, 1.2**2
    mean, _ = rouge_l(["a b c d"], [["b x d"]], tokenized=True)
    assert mean == pytest.approx((1 + square) * p * r / (r + square * p), rel=1e-12)


def test_rouge_takes_best_precision_and_best_recall_separately():
    mean, _ = rouge_l(["a b"], [["a b c d"], ["a"]][:1], tokenized=True)
    both, _ = rouge_l(["a b"], [["a b c d", "a"]], tokenized=True)
    assert mean < 1.0
    assert both == pytest.approx(1.0)  # P = 1 from the first, R = 1 from the second


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_rouge_against_brute_force(first, second):
    longest = 0
    for size in range(1, len(first) + 1):
        for kept in combinations(first, size):
            rest = iter(second)
            if all(word in rest for word in kept):
                longest = size
    p, r = longest / len(first), longest / len(second)
    expected = 2.44 * p * r / (r + 1.44 * p) if longest else 0.0
    assert rouge_l([" ".join(first)], [[" ".join(second)]], tokenized=True)[0] == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("metric", [cider, bleu, rouge_l])
def test_bad_input(metric):
    with pytest.raises(ValueError, match="2 candidates and 1 lists of references"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\] must hold at least one"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="at least one caption, got none"):
        metric([], [])
    with pytest.raises(TypeError, match=r"references\[0\] must be a list of captions, got 'a'"):
        metric(["a"], ["a"])
    with pytest.raises(TypeError, match="got one string"):
        metric("a", ["a"])


@pytest.mark.parametrize("metric", [cider, bleu, rouge_l])
def test_raw_text_is_tokenized_and_an_empty_candidate_scores_zero(metric):
    raw = metric(["A cat's Mat.", "dogs!"], [["a cat's mat"], ["Dogs"]])
    ready = metric(["a cat 's mat", "dogs"], [["a cat 's mat"], ["dogs"]], tokenized=True)
    assert raw == ready
    _, each = metric(["", "a b c d"], [["a b c d"], ["a b c d e"]], tokenized=True)
    assert each[0] == pytest.approx(0.0 if metric is not bleu else [0.0] * 4, abs=1e-9)


# What the Java tool gives for each text, punctuation removed.
TOKENIZED = {
    "The dog's (big) bowl, isn't it?": "the dog 's -lrb- big -rrb- bowl is n't it",
    "I cannot tell; you're gonna wannabe": "i can not tell you 're gon na wannabe",
    "'tis the 80's and '80s, 'cause": "'t is the 80 's and '80s 'cause",
    "y'all rock 'n' roll O'Malley's ma'am": "y' all rock 'n' roll o'malley 's ma'am",
    "I'd've shouldn't've": "i 'd 've should n't 've",
    "a \"quoted\" and 'single' players' word": "a quoted and single players word",
    "\u201ccurly\u201d \u2018quotes\u2019 don\u2019t it\u2019s": "curly quotes do n't it 's",
    "Mr. Smith met Dr. Who. St. Patrick's": "mr. smith met dr. who st. patrick 's",
    "at 5 p.m. The U.S. flag, e.g. J.K. Rowling": "at 5 p.m. the u.s. flag e.g. j.k. rowling",
    "Vitamin C. and I. He went.": "vitamin c. and i he went",
    "no. 5 and no. one, in. Ind.": "no. 5 and no one in ind.",
    "Miss. miss. Wash. wash.": "miss. miss wash. wash",
    "$5.00 50% #5 #tag @user 1,000": "$ 5.00 50 % # 5 #tag @user 1,000",
    "10:30am 3:27pm 10am 5ft 7up 4x4": "10:30 am 3:27 pm 10am 5ft 7up 4x4",
    "3 1/2 cups ½ and/or 24/7": "3\u00a01/2 cups 1/2 and/or 24/7",
    "t-shirt 12-inch mother-in-law a - b -- c—d": "t-shirt 12-inch mother-in-law a b c d",
    "what?! why?? wait... ----- man,on": "what ?! why ?? wait ----- man on",
    "AT&T m&m's M&Ms r&b &amp;": "at&t m & m 's m&m s r & b &",
    "cat.The dog cats., x. y": "cat.the dog cats. x. y",
    "[hi] {hi} <br> :) * a\\b x_y": "-lsb- hi -rsb- -lcb- hi -rcb- <br> :-rrb- * a \\ b x_y",
    "café £5 €10 5¢ ™ 日本語": "café # 5 $ 10 5 cents ™ 日本語",
    "www.foo.com http://a.b/c?d=1 a@b.com": "www.foo.com http://a.b/c?d=1 a@b.com",
    "555-1234 (555) 555-1234": "555-1234 -lrb-555-rrb-\u00a0555-1234",
    "two\nlines\r\nhere ": "two lines here",
    "at foo.com/abc/d and see foo.com.": "at foo.com/abc/d and see foo.com",
    "c'mon cap'n, li'l s'mores dunkin' e'er": "c'mon cap'n li'l s'mores dunkin' e'er",
    "hawai'i hallowe'en Xi'an d'Angelo's": "hawai'i hallowe'en xi'an d'angelo 's",
    "j'adore y'know 'til 'em in '97 or '97,": "j' adore y' know 'til 'em in '97 or 97",
    "Vitamin C. The end, vitamin C. is": "vitamin c the end vitamin c. is",
    "dogs.; cats.: U.S.-based red,-hot ab-cd.": "dogs. cats. u.s.-based red,-hot ab-cd",
    "Ph.D. p. 5 fig. 3, fig. a": "ph.d. p. 5 fig. 3 fig a",
    "+1 555 555 1234 or 10 20 30": "+1 555\u00a0555\u00a01234 or 10 20 30",
    "a/b/c/d ab-cd/ef $5/lb 1.5/lb": "a/b/c / d ab-cd/ef $ 5/lb 1.5 / lb",
    "-5 +.5 6:30-7:30 5-6-7 5a 1.5a a:5": "-5 +.5 6:30 -7:30 5-6-7 5a 1.5 a a :5",
    "yes!no have?q yes!! yahoo!": "yes!no have?q yes !! yahoo",
    "AT&amp;T &lt;b&gt; &quot;x&quot; it&apos;s": "at&t < b > x it 's",
    "US$5 us$5 C# c++ #foo1 @foo1": "us$ 5 us $ 5 c# c++ #foo 1 @foo1",
    "'tisn't cannot-x gonna, GIMME lemme": "'t is n't cannot-x gon na gim me lem me",
    "~ == *** __ ### << ^_^ :'( :D": "~ = = *** __ ### << ^_^ :'-lrb- :d",
    "a_b_c _a b_ 2\u00bd m\u00b2 \u00ab\u00e0\u00bb": "a_b_c _ a b _ 2 1/2 m \u00b2 \u00e0",
    "wood---a dog D'll see": "wood a dog d 'll see",
    "\U0001f600 ": "",
    "": "",
}


@pytest.mark.parametrize("text", TOKENIZED, ids=repr)
def test_tokenize_agrees_with_the_java_tool(text):
    assert " ".join(tokenize(text)) == TOKENIZED[text]


@given(st.text(st.characters(exclude_characters="&"), max_size=40))  # "&gt;" becomes ">"
@settings(deadline=None, max_examples=300, derandomize=True)
def test_tokenize_ends_and_loses_no_letter_or_digit_of_ascii(text):
    tokens = tokenize(text)
    assert all(tokens)
    joined = "".join(tokens)
    for letter in text.lower():
        if letter.isascii() and letter.isalnum():
            assert letter in joined


def golden():
    return json.loads(shared("golden", "caption_metrics.json").read_text())["cases"]


def test_golden_tokens():
    pairs = [
        (raw, wanted)
        for case in golden()
        for item in case["items"]
        if "candidate_tokenized" in item
        for raw, wanted in zip(
            [item["candidate"], *item["references"]],
            [item["candidate_tokenized"], *item["references_tokenized"]],
            strict=True,
        )
    ]
    wrong = [(raw, wanted) for raw, wanted in pairs if " ".join(tokenize(raw)) != wanted]
    assert len(pairs) > 700
    assert wrong == []


@pytest.mark.parametrize("raw", [False, True], ids=["tokenized", "raw"])
def test_golden_scores(raw):
    for case in golden():
        items = case["items"]
        has_tokens = "candidate_tokenized" in items[0]
        ready = (not raw and has_tokens) or "already" in case.get("note", "")
        suffix = "_tokenized" if ready and has_tokens else ""
        candidates = [item["candidate" + suffix] for item in items]
        references = [item["references" + suffix] for item in items]
        mean, each = cider(candidates, references, tokenized=ready)
        wanted = case["summary"]
        assert mean == pytest.approx(wanted["CIDEr"], abs=1e-9), case["name"]
        # one case was published with eight decimals
        assert each == pytest.approx([item["CIDEr"] for item in items], abs=6e-9), case["name"]
        scores = bleu(candidates, references, tokenized=ready)[0]
        assert scores == pytest.approx([wanted[f"Bleu_{n}"] for n in (1, 2, 3, 4)], abs=1e-9), case[
            "name"
        ]
        if "ROUGE_L" in wanted:
            rouge, _ = rouge_l(candidates, references, tokenized=ready)
            assert rouge == pytest.approx(wanted["ROUGE_L"], abs=1e-9), case["name"]
