"""Unusual model answers: the inputs on which two scorers are most likely to differ."""

from __future__ import annotations

import random
from collections.abc import Sequence

OPTIONS = {"A": "a red chair", "B": "The table", "C": "3.5", "D": "left and forward"}
LETTERS = "ABCD"
CHOICE_FORMS = (
    "",
    " ",
    "\n",
    "{L}",
    "{L}.",
    "({L})",
    " {L}",
    "{L} ",
    "{l}",
    "({l})",
    "{L}. {T}",
    "{L}) {T}",
    "{L}: {T}",
    "{T}",
    "{T}.",
    "{t}",
    "`{L}`",
    "``{L}``",
    "``{l}``",
    "`` {L} ``",
    "{{{L}}}",
    "``{{{L}}}``",
    "**{L}**",
    "[{L}]",
    "<answer>{L}</answer>",
    "<answer>{T}</answer>",
    "The answer is {L}.",
    "The answer is {l}",
    "answer: {L}",
    "Answer {L}",
    "I think it is {L} because",
    "A chair is left of B, so {L}",
    "{L}, {M}",
    "{L} or {M}",
    "{L}{M}",
    "{L} and {M}.",
    "Option {L}",
    "option {l}: {T}",
    "Not {L}. Rather {M}.",
    "{L}\nbecause the chair is near",
    "Because it is near.\n{L}",
    "<think>maybe {M}</think>{L}",
    "<think>maybe {M}</think>\n{L}. {T}",
    "</think>{L}",
    "E",
    "F",
    "Z",
    "G. other",
    "None of the above",
    "Ａ",
    "“{L}”",
    "𝐀",
    "{L}。",
    "答案：{L}",
    "选{L}",
    "Sorry, I can't help with images of people yet.",
    "Cannot determine the answer",
    "A",
    "a",
    "I",
    "{L} {L} {L}",
    "{L}-{M}",
    "{L}/{M}",
    "\u200b{L}",
    "{L}\u200b",
    "{L}\t{T}",
    "{L};",
    "#{L}",
    "$\\boxed{{{L}}}$",
    "\\boxed{{{L}}}",
    "the first option",
    "{L} is right but also {M} is",
    "My answer is {L}",
    "Final answer: {L}",
    '"{L}"',
    "*{L}*",
    "{L}?",
    "{L}!",
)
NUMBER_FORMS = (
    "{n}",
    "{n}.",
    " {n}",
    "{n} m",
    "{n}m",
    "{n} meters",
    "about {n}",
    "About {n} metres.",
    "There are {i}",
    "There are {i} chairs.",
    "{i}",
    "{w}",
    "{w} chairs",
    "The answer is {w}.",
    "1,{i}00",
    "{n}, or {m}",
    "{n} to {m}",
    "{n}-{m}",
    "~{n}",
    "-{n}",
    "+{n}",
    ".5",
    "5.",
    "1e3",
    "1_000",
    "nan",
    "inf",
    "-inf",
    "３",
    "٣",
    "½",
    "{n}\u00a0m",
    "{n}\n{m}",
    "[{n}]",
    "[{n}, {m}]",
    "[]",
    "[a",
    "<answer>{n}</answer>",
    "<answer> {n} m</answer>",
    "<think>it is {m}</think>{n}",
    "<think>{m}",
    "0",
    "0.0",
    "`{n}`",
    "**{n}**",
    "{n}%",
    "{n} ft",
    "twenty-one",
    "three hundred and two",
    "two thousand and five",
    "hundred",
    "none",
    "one apple, room 2",
    "room 2, one apple",
    "{i}.{i}.{i}",
    "",
    " ",
    "no idea",
    "{n}cm",
    "{n} square meters",
    "10000000000000000000000",
    "Zero",
    "and two",
    "two and a half",
)
WORDS = ("zero", "one", "two", "three", "four", "seven", "ten", "twelve", "twenty")


def choices(count: int, seed: int = 0, options: dict[str, str] | None = None) -> list[str]:
    """`count` answers to multiple-choice questions: every form, then random ones, some of 10,000 characters."""
    rng = random.Random(seed)
    table = options or OPTIONS
    made = []
    for number in range(count):
        letter, other = rng.sample(sorted(table), 2)
        form = CHOICE_FORMS[number % len(CHOICE_FORMS)] if number < 4 * len(CHOICE_FORMS) else rng.choice(CHOICE_FORMS)
        text = form.format(L=letter, l=letter.lower(), M=other, T=table[letter], t=table[letter].upper())
        made.append(_lengthen(text, rng))
    return made


def numbers(count: int, seed: int = 0) -> list[str]:
    """`count` answers to questions for a number."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        form = NUMBER_FORMS[number % len(NUMBER_FORMS)] if number < 4 * len(NUMBER_FORMS) else rng.choice(NUMBER_FORMS)
        n, m = (round(rng.uniform(0.1, 9), rng.randint(0, 2)) for _ in range(2))
        text = form.format(n=n, m=m, i=rng.randint(0, 12), w=rng.choice(WORDS))
        made.append(_lengthen(text, rng))
    return made


def _lengthen(text: str, rng: random.Random) -> str:
    """One in twenty answers is long: the text is before, after or in the middle of 10,000 characters."""
    if rng.random() > 0.05:
        return text
    filler = " ".join(rng.choice(_FILLER) for _ in range(2200))[:10_000]
    return rng.choice([f"{text} {filler}", f"{filler} {text}", f"{filler}\n{text}", f"{filler} {text} {filler}"])


_FILLER: Sequence[str] = (
    "the",
    "room",
    "has",
    "a",
    "table",
    "near",
    "it.",
    "So",
    "we",
    "look",
    "I",
    "A",
    "left,",
    "two",
)
