"""A Penn Treebank tokenizer for captions, without Java.

`tokenize` re-creates the observable behaviour of Stanford CoreNLP 3.4.1's
`PTBTokenizer -preserveLines -lowerCase` on single lines of caption-like text, followed by the
removal of punctuation that `pycocoevalcap` 1.2 does. It was written from the conventions of the
Penn Treebank (Marcus et al., 1993, "Building a Large Annotated Corpus of English") and by comparing
its outputs with the program's.

How it works: an ordered list of patterns reads the line from left to right, the longer and rarer
kinds of token first, and what no pattern matches is skipped. Case is looked at ("Wash." is a state
and "wash." ends a sentence) and lowered last.

Known to differ: abbreviations outside the lists below; notations of programs ("1e-10", "3.x",
"U+FFFD", mark-up with attributes or declarations); numeric entities ("&#39;"); web addresses with
brackets, or with a hyphen after "www."; elisions such as "c'est" and names such as "x-o'neil";
scripts written with combining marks, decomposed accents, letters and symbols beyond the basic
multilingual plane or newer than the program.
"""

import re

__all__ = ["tokenize"]

# What the metrics leave out; "(" became "-lrb-" by then and stays, as it does in the published
# figures. Runs such as "??" are other tokens and stay too.
_DROPPED = frozenset("'`\".?!,:;-\u2019\u2010\u2011\u2026") | {"''", "--", "---", "----"}

_RENAMED = {
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&lt;": "<",
    "&gt;": ">",
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u00a4": "$",
    "\u20ac": "$",
    "\u00bc": "1/4",
    "\u00bd": "1/2",
    "\u00be": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
}

_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "&mdash;": " -- "}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)

# Soft hyphens and variation selectors vanish, zero-width spaces and joiners part words, quotation
# marks other than the apostrophe are one, and so are the dashes.
_CHARACTERS = (
    {0xAD: None, 0xFE0F: None, 0xFEFF: " ", 0x2018: "`"}
    | dict.fromkeys(range(0x200B, 0x2010), " ")
    | dict.fromkeys(map(ord, "\u201c\u201d\u00ab\u00bb\u2039\u203a"), '"')
    | dict.fromkeys(map(ord, "\u2013\u2014\u2015"), " -- ")
)
_CURLY = re.compile("\u2019(?=(?:s|d|m|t|re|ve|ll)\\b)", re.IGNORECASE)

# Words that keep their period anywhere.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bhd|bldg|blvd|bros|"
    "calif|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|"
    "ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|jan|jos|jr|jul|jun|"
    "kan|kans|ky|la|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|"
    "mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|prof|profs|pty|pvt|rd|rep|reps|rev|rt|"
    "sen|sens|sep|sept|seq|sgt|sq|sr|st|ste|supt|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|"
    "wed|wis|wisc|wm|wyo"
)
# So does a single letter, but for these beginnings of a sentence after it.
_BEGINNINGS = (
    "A|After|An|As|At|But|He|Her|Here|However|If|In|It|Many|More|Now|Once|One|Other|Our|She|"
    "Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
# Only with a capital: without one they are words.
_NAMES = "ark|del|ill|mass|miss|ore|pa|tex|wash"
# Only before a number.
_COUNTERS = "art|ca|figs?|nos?|op|pp|prop"

_OTHER_NUMERALS = r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2150-\u215f"
_L = rf"[^\W\d_{_OTHER_NUMERALS}]"  # a letter
_W = rf"[^\W_{_OTHER_NUMERALS}]"  # a letter or digit
_A = "['\u2019]"  # an apostrophe
_END = rf"(?!{_W})"
_NOT = rf"(?i:n['`]t){_END}"
_SUFFIX = rf"'(?i:s|d|m|re|ve|ll){_END}"
_KEPT = r"(?:\.(?=[,;:]))?"  # a period before such a mark is taken for an abbreviation's
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+)*"
_HEAD = rf"(?:\d[\d.,]*[.,]\d+|{_W}+(?:_{_W}+)*(?:\.{_L}{_W}*)*(?:,|\.|\.{{3}})?)"
_TAIL = rf"[-\u2010\u2011](?:(?:{_L}\.){{2,}}|{_W}+(?:_{_W}+)*)"
_FAMILIAR = "c'mon|cap'n|ev'ry|e'er|li'l|ma'am|s'mores?|ol'|(?:dunk|someth)in'".replace("'", _A)
_SPLIT = "can(?=not)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|wan(?=na)"

_PATTERNS = (
    # the common case, first for speed
    rf"(?!(?i:{_SPLIT}))[A-Za-z]+(?=[ ]|$)",
    # addresses, markup, names of accounts, faces
    r"(?i:https?://)[^\s\"<>|(){}]*[^\s\"<>|(){}.,!?]",
    r"\w(?:[\w.+-]*\w)?@\w(?:[\w.-]*\w)?",
    rf"(?:{_W}+\.)+(?i:com|edu|net|org)/[\w/.?&=%~+-]+[\w/]",
    r"</?[A-Za-z][\w.-]*(?:[ ][\w.-]+)*[ ]?/?>",
    rf"@{_L}\w*|\#{_L}+|[Cc](?:\#|\+\+)",
    rf">?[:;=]['-]?(?:[()|\[\]]|[DPdp]{_END})|:O{_END}|\^_\^|-_-",
    # contractions
    rf"(?i:{_SPLIT})(?={_L}{{2,3}}(?!{_W}|[-']{_W}|\.[,;:]))",
    rf"(?i:'t(?=(?:is|was)(?:{_NOT}|{_END})))",
    rf"''|{_SUFFIX}|(?i:{_A}n{_A}|{_A}(?:em|till?|cause|n){_END})",
    rf"{_A}(?:[2-9]0s{_END}|\d\d(?!\S))",
    # numbers in several parts
    rf"(?:\(\d{{2,3}}\)[ -]?|(?:\+?\d{{2,4}}[ -])?\d{{2,4}}[ -])\d{{3,4}}[ -]?\d{{3,4}}{_END}",
    r"\d{1,4}[ -]\d{1,4}/\d{1,4}",
    # words in several parts
    rf"{_PART}(?:/{_PART}){{1,2}}",
    rf"{_HEAD}(?:{_TAIL})+{_KEPT}",
    r"[A-Z]+(?:&[A-Z]+)+|[A-Z]+\$",
    rf"(?i:ph\.d\.|(?:{_L}\.){{2,}}){_END}",
    rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)+{_KEPT}",
    # words with an apostrophe of their own
    _NOT,
    rf"{_L}+?(?={_NOT})",
    rf"(?!.{_SUFFIX})[dlnoA-HJ-XZ]{_A}{_L}{{2,}}(?:{_TAIL})*",
    rf"(?i:{_FAMILIAR}){_END}",
    rf"(?!.{_SUFFIX})(?i:[djl]{_A}|y{_A}(?={_L}))",
    rf"{_L}+(?i:[aeiouy]{_A}[aeiouy]){_L}*",
    # words
    rf"(?i:{_ABBREVIATIONS})\.",
    rf"[A-Za-z]\.(?!\s+(?:{_BEGINNINGS}){_END}(?!'))",
    rf"(?=[A-Z])(?i:{_NAMES})\.",
    rf"(?i:{_COUNTERS})\.(?=\s?\d)",
    r"[-+]?\d*(?:[.,:]\d+)+|[-+]\d+",
    rf"{_W}+(?:_{_W}+)*{_KEPT}",
    # the rest
    r"[?!]{2,}|\*+|_+|\#+|-+|<<|>>|&[lg]t;|[^\s\w\U00010000-\U0010ffff]|\w",
)
_TOKEN = re.compile("|".join(_PATTERNS))


def tokenize(text: str) -> list[str]:
    """Splits one caption into lower-case Penn Treebank tokens without punctuation.

    Args:
        text: One caption; line ends count as spaces.

    Returns:
        The tokens, none of them empty. Brackets come as "-lrb-" and "-rrb-", fractions after a
        number and telephone numbers with no-break spaces inside.

    Example:
        >>> tokenize("The dog's bowl (isn't it?)")
        ['the', 'dog', "'s", 'bowl', '-lrb-', 'is', "n't", 'it', '-rrb-']
    """
    text = _CURLY.sub("'", text.translate(_CHARACTERS))
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES[match[0].lower()], text)
    return [_spell(token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def _spell(token: str) -> str:
    if token.isalnum() and token.isascii():
        return token.lower()
    token = _RENAMED.get(token, token).replace(" ", "\u00a0")
    return token.replace("(", "-lrb-").replace(")", "-rrb-").lower()
