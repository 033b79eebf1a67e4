"""Writes clip_tokens.json: texts, and the ids that open_clip's tokenizer gives them.

    python tests/tasks/record_clip_tokens.py        # where open_clip can be imported

Recorded with open_clip 3.3.0, ftfy 6.3.1 and regex 2026.11.15.
"""

import json
from pathlib import Path

LENGTH = 76
TEXTS = [
    *("", " \t\n", "!", "!!", "!?!?", "...", "a", "A photo of a cat"),
    "Is the man's  hat\tRED or blue?",
    "don't I'll we've he'd I'm they're it's O'REILLY'S rock'n'roll ''s 'LL",
    "it\u2019s \u2018quoted\u2019 it`s it\u00b4s",
    "caf\u00e9 cafe\u0301 \u00c9COLE na\u00efve stra\u00dfe \u1e9e",
    "sch\u00c3\u00b6n mojibake \u00e2\u20ac\u0153quotes\u00e2\u20ac\x9d",
    "&amp;lt;b&amp;gt; &lt;p&gt; &#39;s &eacute; &nbsp;x &notanentity; &#x1F600; &#0; &#xD800;",
    "x < y &amp;lt; z &amp;amp;gt;",
    "a\x00b\x07c\x1b[31mred\x1b[0m \x1c\x1d a\x85b\u2028c\u200bd\ufeffe",
    "\u017fun '\u017f \u212a i\u0130I\u0131 \ufb01x \u01c5",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644\u0639 \u0939\u093f\u0928",
    "\uff21\uff22 \uff11\uff12 x\u00b2 \u00bd \u2167 \u0664 \u3007",
    "12345 3.14159 1,000,000 4x4 50%",
    "<start_of_text>",
    "a <end_of_text> b",
    "!!<START_OF_TEXT>x<end_of_text>'s",
    "\u00e9<end_of_text>\u65e5 <<end_of_text>> <start_of_text",
    "_under_score_ #hash @at </w> a</w>b \\n \\x41",
    "lone \ud800 surrogate",
    "a" * 300,
    "ab" * 300,
    "!" * 300,
    " ".join(["word"] * 73),
    " ".join(["word"] * 74),
    " ".join(["word"] * 75),
    " ".join(["word"] * 200),
    "Two dogs, one of which wears a tie-dyed T-shirt, are sitting on the 2nd-floor balcony.",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
]


def main() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=LENGTH)
    rows = []
    for text in TEXTS:
        ids = tokenizer([text])[0].tolist()
        end = ids.index(tokenizer.eot_token_id, 1)
        pieces = tokenizer.encode(text)
        rows.append(
            {
                "text": text,
                "ids": ids,
                "length": len(pieces) + 2,
                "decoded": tokenizer.decode(ids[1:end]),
            }
        )
    path = Path(__file__).with_name("clip_tokens.json")
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
