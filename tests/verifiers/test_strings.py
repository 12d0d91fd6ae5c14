"""Strings, lengths, formats and JSON Schemas."""

import importlib.util
import json
import random

import pytest

from tulu_hpc.verifiers import check_record, verify
from tulu_hpc.verifiers.json_schema import check_schema, violations
from tulu_hpc.verifiers.strings import token_f1


def score(name, truth, completion, rules="fixed"):
    record = {"dataset": name, "ground_truth": truth}
    check_record(record, rules)
    return verify(record, completion, rules).score


@pytest.mark.parametrize(
    ("name", "truth", "right", "wrong"),
    [
        ("exact", "The Sun", ["sun", " The sun!"], ["the sun shines", ""]),
        ("exact", ["sun", "moon"], ["Moon"], ["sun moon"]),
        ("exact", 5, ["5", "5."], ["15"]),
        ("substring", ["New York", "NYC"], ["It is in New York.", "nyc"], ["New Yorkers", "York, New"]),
        ("flan", "blue", ["So the answer is blue.", "The answer is: Blue", "blue"], ["blue is the answer"]),
        ("length", {"max": 3}, ["one two three", ""], ["one two three four"]),
        ("length", {"min": 2, "max": 2, "unit": "sentences"}, ["One. Two."], ["One."]),
        ("length", {"min": 3, "unit": "characters"}, ["abc"], [" ab "]),
        ("length", {"min": 2, "unit": "paragraphs"}, ["a\n\nb"], ["a\nb"]),
        ("format", "<think>.*</think>\\s*<answer>.+</answer>", ["<think>a\nb</think> <answer>c</answer>"], ["c"]),
        ("format", ["[a-z ]+", ".*sun.*"], ["the sun"], ["The sun", "the moon"]),
        (
            "json_schema",
            {"type": "object", "required": ["a"]},
            ['{"a": 1}', 'Here:\n```json\n{"a": 1}\n```'],
            ["{}", "[1]", "a: 1", '{"a": NaN}', "[" * 100_000],
        ),
    ],
)
def test_scores(name, truth, right, wrong):
    for text in right:
        assert score(name, truth, text) == 1.0, text
    for text in wrong:
        assert score(name, truth, text) == 0.0, text


def test_flan_as_the_paper_scored_it():
    assert score("flan", "blue", "The answer is: Blue", "tulu3-compat") == 1.0
    assert score("flan", "blue", "So the answer is blue.", "tulu3-compat") == 0.0


def test_f1():
    assert token_f1("the cat sat", "A cat sat down") == pytest.approx(0.8)
    assert token_f1("a", "the") == 1.0 and token_f1("", "cat") == 0.0
    assert score("f1", ["dog", "cat sat"], "cat cat") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "truth", "words"),
    [
        ("exact", None, "list of accepted texts"),
        ("exact", ["", "a b"], "empty"),
        ("f1", {"a": 1}, "list of accepted texts"),
        ("length", 3, "must hold min"),
        ("length", {"unit": "words"}, "must hold min"),
        ("length", {"max": 3, "unit": "lines"}, "unknown unit 'lines'"),
        ("length", {"min": 4, "max": 3}, "min <= max"),
        ("length", {"max": "3"}, "min <= max|counts"),
        ("format", "(", "not a regular expression"),
        ("format", [3, "a"], "regular expression or a list"),
        ("json_schema", [1, 2], "must be a JSON Schema"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", {"type": "text"}, "#/type: unknown type 'text'"),
        ("json_schema", {"properties": {"a": {"minimun": 3}}}, "#/properties/a: keyword 'minimun' is not supported"),
        ("json_schema", {"$ref": "#/$defs/a"}, "points nowhere"),
        ("json_schema", {"$ref": "http://x"}, "into the schema"),
        ("json_schema", {"pattern": "("}, "regular expression"),
        ("json_schema", {"anyOf": []}, "list of schemas"),
        ("json_schema", {"minLength": "3"}, "must be a number"),
    ],
)
def test_ground_truths_that_cannot_be_used_are_refused(name, truth, words):
    with pytest.raises(ValueError, match=f"{name}: .*({words})"):
        check_record({"dataset": name, "ground_truth": truth})


TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["v"]}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": ["integer", "null"]}, [1, 1.0, None], [1.5, True, "1"]),
        ({"enum": [1, "a", [1]]}, [1.0, "a", [1]], [True, "b"]),
        ({"const": {"a": 1}}, [{"a": 1.0}], [{"a": True}, {}]),
        ({"multipleOf": 0.5}, [1, 1.5, "a"], [1.2]),
        ({"exclusiveMinimum": 1, "maximum": 2}, [2, "x"], [1, 3]),
        ({"minLength": 2, "maxLength": 3, "pattern": "b"}, ["ab"], ["b", "aaa", "abcd"]),
        ({"uniqueItems": True, "minItems": 1}, [[1, True], [[1], [2]]], [[], [1, 1.0]]),
        ({"prefixItems": [{"type": "string"}], "items": False}, [["a"], []], [["a", 1], [1]]),
        ({"properties": {"a": {"type": "string"}}, "additionalProperties": False}, [{"a": "b"}, {}], [{"b": 1}]),
        ({"patternProperties": {"^x": {"type": "null"}}, "minProperties": 1}, [{"xa": None}], [{"xa": 1}, {}]),
        ({"oneOf": [{"minimum": 2}, {"maximum": 3}]}, [1, 4], [2]),
        ({"not": {"type": "string"}}, [1], ["a"]),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, ["ab"], ["a", 1]),
        (TREE, [{"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {}}, {"next": {"v": 1}}]),
    ],
)
def test_schema(schema, valid, invalid):
    check_schema(schema)
    for value in valid:
        assert list(violations(value, schema)) == [], value
    for value in invalid:
        assert list(violations(value, schema)) != [], value


def random_schema(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return {"type": rng.choice(["integer", "number", "string", "array", "object", "null", "boolean"])}
    if kind == 1:
        return {"enum": rng.sample([1, 2.0, "a", True, None, [1], {"a": 1}], 3)}
    if kind == 2:
        return {
            rng.choice(["minimum", "exclusiveMaximum", "minLength", "maxItems", "minProperties"]): rng.randint(0, 3)
        }
    if kind == 3:
        return {"required": rng.sample(["a", "b", "c"], 2)}
    if kind == 4:
        names = rng.sample(["a", "b", "c"], 2)
        return {
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "additionalProperties": rng.choice([False, random_schema(rng, depth + 1)]),
        }
    if kind == 5:
        return {"prefixItems": [random_schema(rng, depth + 1)], "items": random_schema(rng, depth + 1)}
    combined = rng.choice(["anyOf", "oneOf", "allOf"])
    return {combined: [random_schema(rng, depth + 1) for _ in range(2)], "not": random_schema(rng, depth + 1)}


def random_value(rng, depth=0):
    if depth < 3 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {name: random_value(rng, depth + 1) for name in rng.sample(["a", "b", "c"], rng.randrange(4))}
    return rng.choice([0, 1, 1.0, 2.5, -3, "", "a", "abc", True, False, None])


def compare_with_jsonschema(count):
    from jsonschema import Draft202012Validator

    rng = random.Random(5)
    valid = 0
    for _ in range(count):
        schema, value = random_schema(rng), random_value(rng)
        expected = Draft202012Validator(schema).is_valid(value)
        assert (next(violations(value, schema), None) is None) == expected, json.dumps([schema, value])
        valid += expected
    assert 0.2 * count < valid < 0.8 * count
    return count


needs_jsonschema = pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="no jsonschema")


@needs_jsonschema
def test_against_jsonschema():
    compare_with_jsonschema(300)


@needs_jsonschema
@pytest.mark.soak
def test_against_jsonschema_soak(soak_figures):
    soak_figures(cases=compare_with_jsonschema(5000))
