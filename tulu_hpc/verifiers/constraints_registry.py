"""The instructions that later Tulu data add to IFEval's: copying, first and last words, counting, brackets.

Names and arguments are those of the data. Words here are whole words in any case, sentences those of `text_units`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from tulu_hpc.verifiers.constraints import CONSTRAINTS, Relation, constraint, in_relation
from tulu_hpc.verifiers.text_units import divided, occurrences, paragraphs, sentences, words

CONSTRAINTS["letters:letter_counting2"] = CONSTRAINTS["keywords:letter_frequency"]


def _same(given: str, wanted: str) -> bool:
    return given.strip().lower() == wanted.strip().lower()


def _word(given: str | Sequence[str]) -> str:
    return (given if isinstance(given, str) else given[0]).strip().lower()


@constraint("copy:repeat_phrase")
def repeat_phrase(response: str, *, phrase: str, small_n: int) -> bool:
    """The phrase so many times, each time with exactly one word exchanged, neither the first nor the last."""
    wanted = phrase.split()
    found = re.findall(rf"(?<!\S){re.escape(wanted[0])} .*?{re.escape(wanted[-1])}(?!\w)", response)
    variants = [variant.split() for variant in found]
    return len(variants) == small_n and all(
        len(variant) == len(wanted) and sum(a != b for a, b in zip(variant, wanted, strict=True)) == 1
        for variant in variants
    )


@constraint("copy:copy")
def copy(response: str, *, prompt_to_repeat: str) -> bool:
    """Is the prompt, whatever the case."""
    return _same(response, prompt_to_repeat)


@constraint("copy:copying_simple")
def copying_simple(response: str, *, prompt_to_repeat: str) -> bool:
    """Is the prompt, whatever the case."""
    return _same(response, prompt_to_repeat)


@constraint("copy:copying_multiple")
def copying_multiple(response: str, *, prompt_to_repeat: str, N: int) -> bool:
    """Is the prompt so many times, separated by `******`."""
    parts = response.split("******")
    return len(parts) == N and all(_same(part, prompt_to_repeat) for part in parts)


@constraint("new:copy_span_idx")
def copy_span_idx(response: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """Is the span of the prompt from character `n_start` up to, not including, `n_end`."""
    return _same(response, prompt_to_repeat[n_start:n_end])


@constraint("detectable_format:sentence_hyphens")
def sentence_hyphens(response: str) -> bool:
    """Sentences follow each other with a hyphen and no space between them; hyphens inside words are free."""
    parts = re.split(r"(?<=[.!?])-", response.strip())
    return all(part == part.strip() and len(sentences(part)) == 1 for part in parts)


@constraint("detectable_format:square_brackets")
def square_brackets(response: str) -> bool:
    """Every word stands in square brackets."""
    found = response.split()
    return bool(found) and all(re.fullmatch(r"\[[^\[\]]+\][.,;:!?]?", word) for word in found)


@constraint("detectable_format:bigram_wrapping")
def bigram_wrapping(response: str) -> bool:
    """Words come in pairs in double angle brackets; an odd last word may stand alone."""
    found = response.split()
    pairs = list(zip(found[::2], found[1::2]))
    return bool(found) and all(
        first.startswith("<<") and second.rstrip(".,;:!?").endswith(">>") for first, second in pairs
    )


@constraint("keywords:no_adjacent_consecutive")
def no_adjacent_consecutive(response: str) -> bool:
    """No two neighbouring words start with letters that follow each other in the alphabet."""
    initials = [word[0].lower() for word in words(response)]
    return not any(
        a.isascii() and b.isascii() and a.isalpha() and b.isalpha() and ord(b) - ord(a) == 1
        for a, b in pairwise(initials)
    )


@constraint("keywords:word_once")
def word_once(response: str, *, keyword: str) -> bool:
    """The keyword exactly once."""
    return occurrences(keyword, response) == 1


@constraint("keywords:word_count_different_numbers")
def word_count_different_numbers(
    response: str, *, keyword: str, frequency: int, relation: Relation = "at least"
) -> bool:
    """The keyword at least, or less than, so many times."""
    return in_relation(occurrences(keyword, response), frequency, relation)


@constraint("keywords:exclude_word_harder")
def exclude_word_harder(response: str, *, keyword: str, instruction: str = "") -> bool:
    """The keyword nowhere."""
    return occurrences(keyword, response) == 0


@constraint("keywords:palindrome")
def palindrome(response: str) -> bool:
    """Has a word of at least three letters that reads the same backwards, whatever the case."""
    found = [word.lower() for word in re.findall(r"[^\W\d_]+", response)]
    return any(len(word) >= 3 and word == word[::-1] for word in found)


@constraint("keywords:keyword_specific_position")
def keyword_specific_position(response: str, *, keyword: str | Sequence[str], n: int, m: int) -> bool:
    """The keyword is the m-th word of the n-th sentence, both from 1."""
    found = sentences(response)
    if not 1 <= n <= len(found):
        return False
    there = words(found[n - 1])
    return 1 <= m <= len(there) and there[m - 1].lower() == _word(keyword)


@constraint("keywords:start_end")
def start_end(response: str) -> bool:
    """The first word is also the last, with nothing behind it, not even punctuation."""
    found = words(response)
    return len(found) > 1 and found[0].lower() == found[-1].lower() and response.strip().endswith(found[-1])


@constraint("paragraphs:paragraphs")
def two_divided_paragraphs(response: str) -> bool:
    """Two paragraphs with `***` between them."""
    parts = divided(response)
    return parts is not None and len(parts) == 2


@constraint("paragraphs:paragraphs2")
def two_paragraphs(response: str) -> bool:
    """Two paragraphs with a blank line between them."""
    return len(paragraphs(response)) == 2


@constraint("first_word:first_word_sent")
def first_word_sent(response: str, *, first_word: str | Sequence[str]) -> bool:
    """Every sentence starts with the word."""
    starts = [words(sentence)[0].lower() for sentence in sentences(response)]
    return bool(starts) and all(start == _word(first_word) for start in starts)


@constraint("first_word:first_word_answer")
def first_word_answer(response: str, *, first_word: str) -> bool:
    """The response starts with the word."""
    found = words(response)
    return bool(found) and found[0].lower() == _word(first_word)


@constraint("last_word:last_word_sent")
def last_word_sent(response: str, *, last_word: str | Sequence[str]) -> bool:
    """Every sentence ends in the word, punctuation aside."""
    ends = [words(sentence)[-1].lower() for sentence in sentences(response)]
    return bool(ends) and all(end == _word(last_word) for end in ends)


@constraint("last_word:last_word_answer")
def last_word_answer(response: str, *, last_word: str) -> bool:
    """The response ends in the word, punctuation aside."""
    found = words(response)
    return bool(found) and found[-1].lower() == _word(last_word)


@constraint("punctuation:punctuation_dot")
def punctuation_dot(response: str) -> bool:
    """Contains no full stop."""
    return "." not in response


@constraint("punctuation:punctuation_exclamation")
def punctuation_exclamation(response: str) -> bool:
    """Contains no exclamation mark."""
    return "!" not in response


@constraint("count:lowercase_counting")
def lowercase_counting(response: str, *, N: int) -> bool:
    """At most so many words in small letters."""
    return sum(word.islower() for word in words(response)) <= N


@constraint("letters:letter_counting")
def letter_counting(response: str, *, N: int, relation: Relation = "at least") -> bool:
    """At least, or less than, so many letters a to z."""
    return in_relation(len(re.findall(r"[a-zA-Z]", response)), N, relation)


@constraint("count:counting_composition")
def counting_composition(response: str, *, n_sent: int, n_words: int) -> bool:
    """Three paragraphs between `***`, each of so many sentences, each of so many words."""
    parts = divided(response)
    if parts is None or len(parts) != 3:
        return False
    counts = [[len(words(sentence)) for sentence in sentences(part)] for part in parts]
    return all(len(part) == n_sent and all(count == n_words for count in part) for part in counts)


@constraint("count:count_unique")
def count_unique(response: str) -> bool:
    """No word twice, whatever the case."""
    found = [word.lower() for word in words(response)]
    return len(found) == len(set(found))


@constraint("count:count_increment_word")
def count_increment_word(response: str, *, keyword1: str, keyword2: str) -> bool:
    """The first keyword once, the second twice."""
    return occurrences(keyword1, response) == 1 and occurrences(keyword2, response) == 2
