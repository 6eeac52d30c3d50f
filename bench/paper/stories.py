"""Children's stories from a small grammar, about characters with random two-token names.

A word is a token. A name's two parts are drawn independently from one pool, so that nothing but an
earlier mention in the same story tells the second part from the first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

SEPARATOR = 0
N_PARTS = 30
HELD_OUT_SHARE = 0.1

WORDS = {
    "kind": ["fox", "bear", "rabbit", "girl", "boy", "owl", "duck", "mouse", "cat", "knight"],
    "place": ["forest", "garden", "river", "castle", "meadow", "village", "hill", "barn"],
    "thing": ["ball", "kite", "lantern", "apple", "boat", "drum", "hat", "blanket", "key", "cake"],
    "quality": ["little", "brave", "clever", "sleepy", "kind", "hungry", "shy", "happy"],
    "verb": ["found", "lost", "painted", "carried", "hid", "wanted", "dropped", "loved"],
}
# Names are 1 and 2, the story's two characters.
OPENING = "once there was a QUALITY KIND called 1 and a QUALITY KIND called 2 ."
SENTENCES = [
    "one day 1 VERB a QUALITY THING in the PLACE .",
    "1 and 2 went to the PLACE together .",
    "2 asked 1 for the THING but 1 said no .",
    "then 1 VERB the THING near the PLACE .",
    "in the PLACE a KIND gave 2 a THING .",
    "1 was QUALITY and called for 2 .",
    "1 ran to the PLACE because 2 was QUALITY .",
    "the QUALITY KIND saw 1 with the THING .",
    "at night 2 told 1 about the PLACE .",
]
N_SENTENCES = 4

_WRITTEN = {word for line in (OPENING, *SENTENCES) for word in line.split()}
VOCABULARY = [
    "<end>",
    *sorted({word for word in _WRITTEN if word.islower() or word == "."}.union(*WORDS.values())),
]
FIRST_PART = len(VOCABULARY)  # token of the pool's first name part
VOCAB_SIZE = FIRST_PART + N_PARTS
_ID = {word: i for i, word in enumerate(VOCABULARY)}

Name = tuple[int, int]


@dataclass(frozen=True)
class Story:
    """A story's tokens, closed by `SEPARATOR`, and where its characters are named.

    Attributes
    ----------
    tokens : list of int
        Tokens.
    mentions : list of (int, bool)
        Position of the second part of each name, and whether that name came before.
    names : tuple of (int, int)
        The characters' names, as tokens.
    """

    tokens: list[int]
    mentions: list[tuple[int, bool]]
    names: tuple[Name, Name]


def split_names() -> tuple[list[Name], list[Name]]:
    """Return the names of training and those that are held out; no name is in both."""
    parts = range(FIRST_PART, VOCAB_SIZE)
    names = list(product(parts, parts))
    random.Random(0).shuffle(names)
    held_out = round(HELD_OUT_SHARE * len(names))
    return names[held_out:], names[:held_out]


def story(names: list[Name], rng: random.Random) -> Story:
    """Tell a story of two characters from `names` whose first parts differ."""
    one, two = rng.sample(names, 2)
    while one[0] == two[0]:
        two = rng.choice(names)
    tokens: list[int] = []
    mentions: list[tuple[int, bool]] = []
    seen: set[Name] = set()
    for template in [OPENING, *rng.choices(SENTENCES, k=N_SENTENCES)]:
        # Either character may take either part of a sentence.
        cast = {"1": one, "2": two}
        if template is not OPENING and rng.random() < 0.5:
            cast = {"1": two, "2": one}
        for word in template.split():
            if name := cast.get(word):
                tokens += name
                mentions.append((len(tokens) - 1, name in seen))
                seen.add(name)
            else:
                choices = WORDS.get(word.lower()) if word.isupper() else None
                tokens.append(_ID[rng.choice(choices) if choices else word])
    return Story([*tokens, SEPARATOR], mentions, (one, two))
