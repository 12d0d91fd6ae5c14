"""The instructions of IFEval that need counting of parts: sentences, paragraphs, sections, repeated prompts."""

from __future__ import annotations

import re

from tulu_hpc.verifiers.constraints import Letter, Relation, constraint, in_relation
from tulu_hpc.verifiers.text_units import sentences

_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_MARKERS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


@constraint("keywords:letter_frequency")
def letter_frequency(response: str, *, letter: Letter, let_frequency: int, let_relation: Relation = "at least") -> bool:
    """The letter occurs at least, or less than, so many times, whatever the case."""
    return in_relation(response.lower().count(letter.strip().lower()), let_frequency, let_relation)


@constraint("length_constraints:number_sentences")
def number_sentences(response: str, *, num_sentences: int, relation: Relation = "at least") -> bool:
    """At least, or less than, so many sentences (`text_units.sentences`; IFEval's own code takes NLTK's punkt)."""
    return in_relation(len(sentences(response)), num_sentences, relation)


@constraint("length_constraints:number_paragraphs")
def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs between dividers `***`; none between two dividers may be blank."""
    parts = re.split(r"\s?\*\*\*\s?", response)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


@constraint("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs between blank lines, and the nth (from 1) starts with the word, whatever the case."""
    parts = response.split("\n\n")
    filled = [part for part in parts if part.strip()]
    if len(filled) != num_paragraphs or not 1 <= nth_paragraph <= len(filled):
        return False
    wanted = parts[nth_paragraph - 1].split()  # blank ones keep their place in the count, as in IFEval
    if not wanted:
        return False
    found = re.split(r"[.,?!'\"]", wanted[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return found.lower() == first_word.strip().lower()


@constraint("detectable_content:postscript")
def postscript(response: str, *, postscript_marker: str) -> bool:
    """Has the marker of a postscript somewhere, whatever the case."""
    marker = postscript_marker.strip()
    pattern = _MARKERS.get(marker, re.escape(marker.lower()))
    return re.search(pattern, response.lower()) is not None


@constraint("detectable_format:constrained_response")
def constrained_response(response: str) -> bool:
    """Contains one of IFEval's three answers: "My answer is yes.", "... no.", "... maybe."."""
    return any(answer in response for answer in _ANSWERS)


@constraint("detectable_format:number_highlighted_sections")
def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many parts in single or double asterisks that are not blank."""
    single = sum(bool(part.strip("*").strip()) for part in re.findall(r"\*[^\n*]*\*", response))
    double = sum(bool(part[2:-2].strip()) for part in re.findall(r"\*\*[^\n*]*\*\*", response))
    return single + double >= num_highlights


@constraint("detectable_format:multiple_sections")
def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many section marks: the splitter and a number."""
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", response)) >= num_sections


@constraint("combination:two_responses")
def two_responses(response: str) -> bool:
    """Two different parts separated by `******`; only the outer parts may be blank."""
    parts = [part.strip() for part in response.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


@constraint("combination:repeat_prompt")
def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """Starts with the prompt, whatever the case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@constraint("change_case:capital_word_frequency")
def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: Relation = "at least") -> bool:
    """At least, or less than, so many words in capitals (runs of word characters; IFEval's own code takes NLTK's)."""
    capitals = [word for word in re.findall(r"[\w'’.-]*\w", response) if word.isupper()]
    return in_relation(len(capitals), capital_frequency, capital_relation)
