"""Word problems with one or two events (in the manner of GSM8K), their working, and which of them are held out.

A demonstration either shows the working ("12+5=17", "17-3=14", then the answer) or states the answer alone; a model
trained on both can be moved to the better habit by preferences and rewards. Sentences are short and each has its own
names and amounts, so that two different problems seldom share eight words in a row (see `curation.decontamination`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

_NAMES = (
    "Tom Ann Ben Eva Sam Mia Leo Zoe Max Kim Jon Amy Dan Liz Roy Meg "
    "Ned Pam Rob Sue Tim Una Vic Bea Abe Cal Deb Eli Fay Gus Hal Ida"
)
_OBJECTS = "apples books coins cards pens shells stamps toys balls cups rings kites dolls hats keys lamps"
NAMES, OBJECTS = _NAMES.split(), _OBJECTS.split()
# Events: what happens, and its sign.
EVENTS = (
    ("{name} buys {amount}.", "+"),
    ("{name} finds {amount}.", "+"),
    ("{other} sends {name} {amount}.", "+"),
    ("{name} loses {amount}.", "-"),
    ("{name} sells {amount}.", "-"),
    ("{name} gives {other} {amount}.", "-"),
)
# Ordered pairs of events that no training problem contains.
UNSEEN_PAIRS = frozenset({(0, 3), (1, 5), (2, 4), (3, 1), (4, 2), (5, 0)})
LARGEST_START, LARGEST_CHANGE, LARGEST_RESULT = 20, 9, 99
BAG_SHARE = 0.2
HELD_OUT_OF = 8


@dataclass(frozen=True)
class WordProblem:
    """A question, its answer, the equations that lead there, and the events it tells."""

    question: str
    answer: str
    working: tuple[str, ...]
    events: tuple[int, ...]

    @property
    def key(self) -> str:
        """What makes it this problem under any name and any object: the chain of equations."""
        return "|".join(self.working)

    @property
    def unseen(self) -> bool:
        """Whether it tells a pair of events that training never shows."""
        return any(pair in UNSEEN_PAIRS for pair in zip(self.events, self.events[1:], strict=False))


def held_out(key: str) -> bool:
    """One in eight of the problem space, by a hash of `key`: these are for evaluation only, whatever the seed."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_OF == 0


def draw(rng: Random, *, evaluation: bool, unseen: bool = False) -> WordProblem:
    """A random problem of the training or the evaluation part; `unseen`: two events in a held-out order."""
    while True:
        problem = _draw_any(rng, events=2 if unseen else rng.choice((1, 2)))
        if problem is None or problem.unseen != unseen:
            continue
        if unseen or held_out(problem.key) == evaluation:
            return problem


def _draw_any(rng: Random, events: int) -> WordProblem | None:
    """One draw; None when a number leaves 0..99 on the way."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS)
    if rng.random() < BAG_SHARE:
        bags, each = rng.randint(2, 9), rng.randint(2, 9)
        have = bags * each
        sentences, working = [f"{name} has {bags} bags of {each} {thing}."], [f"{bags}*{each}={have}"]
    else:
        have = rng.randint(2, LARGEST_START)
        sentences, working = [f"{name} has {have} {thing}."], []
    told = tuple(rng.randrange(len(EVENTS)) for _ in range(events))
    for event in told:
        text, sign = EVENTS[event]
        amount = rng.randint(2, LARGEST_CHANGE)
        result = have + amount if sign == "+" else have - amount
        if not 0 <= result <= LARGEST_RESULT:
            return None
        working.append(f"{have}{sign}{amount}={result}")
        sentences.append(text.format(name=name, other=other, amount=amount))
        have = result
    question = " ".join(sentences) + " How many now?"
    return WordProblem(question, str(have), tuple(working), told)


def demonstrate(problem: WordProblem, *, show_working: bool) -> str:
    """A correct response, with its working or without."""
    lines = list(problem.working) if show_working else []
    return "\n".join([*lines, f"The answer is {problem.answer}."])


def gsm8k_row(problem: WordProblem) -> dict[str, str]:
    """The problem in GSM8K's schema."""
    return {"question": problem.question, "answer": "\n".join([*problem.working, f"#### {problem.answer}"])}
