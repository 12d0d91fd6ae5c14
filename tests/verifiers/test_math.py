"""Final answers: where they are found, and which ones mean the same."""

import importlib.util

import pytest

from tulu_hpc.verifiers import check_record, verify
from tulu_hpc.verifiers.latex import LatexError, read_expression
from tulu_hpc.verifiers.math_answers import final_answer
from tulu_hpc.verifiers.math_compat import candidates
from tulu_hpc.verifiers.math_equal import answers_equal
from tulu_hpc.verifiers.math_strings import hendrycks_equal, minerva
from tulu_hpc.verifiers.sandbox import VerifierPool

needs_antlr = pytest.mark.skipif(
    importlib.util.find_spec("antlr4") is None, reason="antlr4-python3-runtime 4.11 (extra eval) is not installed"
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"$\boxed 7$ it is", "7"),
        (r"\fbox{3}", "3"),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
        ("The final answer is 3.5. Or so.", "3.5"),
        ("the final answer is: 12\nmore", "12"),
        (r"First $1$, then $2$.", "2"),
        (r"\[ 4 \] and \( 5 \)", "5"),
        (r"It costs \$5 or $x$.", "x"),
        ("no answer", None),
        ("", None),
        ("\\boxed{" * 1000, None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    ("x=5", "5"),
    ("(1,2)", "(1, 2)"),
    ("1,2", "2,1"),
    (r"\{1,2\}", "2, 1"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    ("12 square inches", "12"),
    ("1,000", "1000"),
    ("1{,}234", "1234"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"3 \pm \sqrt{2}", r"3+\sqrt{2},3-\sqrt{2}"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,2]\cup[3,\infty)", r"[3,\infty) \cup (-\infty, 2]"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\\frac{4}{2}\end{pmatrix}"),
    ("x<3", "3>x"),
    ("y = 2x+3", "2x - y + 3 = 0"),
    (r"1 \le x \le 2", r"2 \geq x \geq 1"),
    (r"90^\circ", "90"),
    (r"50\%", "50"),
    (r"\$5", "5"),
    (r"\dfrac{3}{4}", r"\frac34"),
    ("2^10", "1024"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\cos(2x)", r"2\cos^2 x - 1"),
    ("101_2", "101_{2}"),
    (r"3\frac{1}{2}", "3.5"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    (r"6\pi \text{ square units}", r"6\pi"),
    (r"10\text{ and }20", "20,10"),
    (r"x \in [1,2]", "[1,2]"),
    (r"\ln 4", r"2\ln 2"),
    (r"\log_2 8", "3"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    ("7.", "7"),
]
DIFFERENT = [
    ("1", "2"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    ("(1,2)", "1,2"),
    ("1,2", "1"),
    ("1,1", "1"),
    ("0.33", r"\frac13"),
    (r"\sqrt{x^2}", "x"),
    ("x<3", "x>3"),
    ("x<3", r"x \le 3"),
    ("", "5"),
    ("101_2", "101"),
    (r"\frac{1}{0}", "5"),
    ("2^{1000000000}", "1"),
    ("a+b", "ab"),
    ("y=2x+3", "y=2x+4"),
    (r"\infty", r"-\infty"),
    ("i", "1"),
    (r"\text{yes}", r"\text{no}"),
    ("x-y", "0"),
    ("10^{40}", "10^{40}+1"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert answers_equal(a, b) and answers_equal(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not answers_equal(a, b) and not answers_equal(b, a)


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9}}", "200!!", "1000!", "(" * 100 + "1" + ")" * 100, "x" * 2000, "1 2", "", r"\int x", r"\binom{9999}{5}"],
)
def test_what_is_too_large_or_unknown_is_refused(text):
    with pytest.raises(LatexError):
        read_expression(text)


def test_math_verdicts():
    record = {"dataset": "MATH", "ground_truth": r"\frac{3}{4}"}
    assert verify(record, r"It is $\boxed{0.75}$.").score == 1.0
    assert verify(record, r"It is $\boxed{0.7}$.").score == 0.0
    assert "no final answer" in verify(record, "It is 0.75").reason
    # One answer counts: the box, whatever else the text offers.
    assert verify(record, r"The final answer is 0.75. \boxed{1}").score == 0.0
    assert verify({"dataset": "math", "ground_truth": 5}, r"\boxed{5}").score == 1.0


@pytest.mark.parametrize("truth", [None, "", " ", True, ["1", "2"], r"\%"])
def test_ground_truths_that_are_no_answer_are_refused(truth):
    with pytest.raises(ValueError, match=r"math: .*ground truth"):
        check_record({"dataset": "math", "ground_truth": truth})


def test_compat_candidates():
    assert candidates(r"\boxed{1}, \boxed{2}") == ["2"]
    assert candidates(r"\boxed{1} Final Answer: The final answer is $x = 2$. I hope it is correct.") == ["1", "2"]
    assert candidates(r"a $1$ or $2$ b") == ["2"]
    assert candidates("a cat") == ["cat"]
    assert candidates(r"\fbox{3}") == [r"\fbox{3}"]
    assert candidates(r"$\boxed 7$ so") == ["7"]


def test_published_string_normalisations():
    assert minerva(r"x = 5 \text{ cm}") == "5" and minerva("1,000") == "1000" and minerva(r"\frac12") == r"\frac{1}{2}"
    assert hendrycks_equal(r"\dfrac12", r"\frac{1}{2}") and hendrycks_equal("0.5", "1/2")
    assert hendrycks_equal("k=3", "3") and not hendrycks_equal("k1 = 3", "3")
    assert hendrycks_equal(r"5\text{ m}", "5") and not hendrycks_equal(r"\text{ a}\text{ b}", "")
    assert hendrycks_equal("a/b", "a/b") and not hendrycks_equal("a / b", "a/b")  # its int() fails: raw strings


@needs_antlr
def test_compat_verdicts():
    def score(text, truth):
        return verify({"dataset": "math", "ground_truth": truth}, text, "tulu3-compat").score

    assert score(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == 1.0
    assert score(r"\boxed{1} Final Answer: The final answer is 2. I hope it is correct.", "1") == 1.0  # any candidate
    assert score("7", "7") == 1.0  # the whole text
    assert score(r"\boxed{(1,2)}", "(1, 2)") == 1.0  # by string
    assert score(r"\boxed{2,1}", "1,2") == 0.0
    assert score(r"\boxed{1,000}", "1000") == 1.0


def test_compat_without_its_parser_says_so(monkeypatch):
    import sympy.parsing.latex

    def missing(text):
        raise ImportError("no antlr4")

    monkeypatch.setattr(sympy.parsing.latex, "parse_latex", missing)
    with pytest.raises(ValueError, match=r"antlr4-python3-runtime 4\.11: pip install"):
        check_record({"dataset": "math", "ground_truth": "1"}, "tulu3-compat")


NASTY = {
    "brackets": "(" * 5000,
    "fractions": "\\frac{" * 3000,
    "tower": "9^{" * 300 + "9" + "}" * 300,
    "powers of sums": "(((x+1)^{999})^{999})^{999}",
    "long product": "x^{999}" * 100,
    "many roots": "+".join(f"\\sqrt{{{i}}}" for i in range(2, 90)),
    "factorials": "200!" * 100,
    "signs": "-" * 901 + "1",
    "roots of roots": "\\sqrt{" * 50 + "x" + "}" * 50,
    "sines of sines": "\\sin{" * 50 + "x" + "}" * 50,
    "exponentials": "e^{e^{e^{e^{9}}}}",
    "long list": "1," * 400 + "1",
    "signs both ways": "\\pm" * 300 + "1",
    "boxes": "\\boxed{" * 20000,
    "texts": "\\text{" * 5000,
    "digits": "9" * 5000,
    "root of digits": "\\sqrt{" + "9" * 900 + "}",
}


def test_deep_and_large_expressions_cost_no_worker():
    tasks = [
        ({"dataset": "math", "ground_truth": truth}, f"\\boxed{{{text}}}")
        for text in NASTY.values()
        for truth in ("1", "(x+2)^2")
    ]
    with VerifierPool(1, 30.0) as pool:
        scores = [verdict.score for verdict in pool.verify_batch(tasks)]
        assert scores == [0.0] * len(tasks) and pool.stats.lost == 0


@needs_antlr
def test_deep_and_large_expressions_in_the_papers_comparison_cost_one_verdict():
    texts = [NASTY[name] for name in ("brackets", "tower", "powers of sums", "long product")]
    tasks = [({"dataset": "math", "ground_truth": "(x+2)^2"}, f"\\boxed{{{text}}}") for text in texts]
    fine = ({"dataset": "math", "ground_truth": "1"}, "\\boxed{1}")
    with VerifierPool(1, 1.0, rules="tulu3-compat") as pool:
        scores = [verdict.score for verdict in pool.verify_batch([*tasks, fine])]
        assert scores == [0.0] * len(tasks) + [1.0]
        assert pool.stats.verdicts == len(scores) and pool.stats.restarts == pool.stats.lost - pool.stats.errors
