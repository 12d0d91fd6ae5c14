"""Pairs of final answers, written in many ways, of which it is known by construction whether they mean the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

Pair = tuple[str, str, bool, str]  # given, truth, equal, kind


def _fraction(rng: random.Random, value: Fraction) -> str:
    sign, top = ("-", -value.numerator) if value < 0 else ("", value.numerator)
    if value.denominator == 1:
        return f"{sign}{top}"
    k = rng.choice([1, 1, 1, 2, 3])
    top, below = top * k, value.denominator * k
    command = rng.choice(["\\frac", "\\dfrac", "\\tfrac"])
    written = [f"{sign}{command}{{{top}}}{{{below}}}", f"{command}{{{sign}{top}}}{{{below}}}", f"{sign}{top}/{below}"]
    if below in (2, 4, 5, 10, 20, 25):
        written.append(f"{float(value):.4f}".rstrip("0").rstrip("."))
    return rng.choice(written)


def fractions(rng: random.Random) -> Pair:
    a = Fraction(rng.randint(-20, 20), rng.choice([1, 2, 3, 4, 5, 7, 20]))
    b = a if rng.random() < 0.5 else a + rng.choice([1, -1, Fraction(1, 7), Fraction(1, 2)])
    return _fraction(rng, a), _fraction(rng, b), a == b, "fraction"


def roots(rng: random.Random) -> Pair:
    n, k, m = rng.choice([2, 3, 5, 6, 7]), rng.randint(2, 5), rng.randint(1, 9)
    other = k if rng.random() < 0.5 else k + 1
    given = rng.choice([f"{k}\\sqrt{{{n}}}", f"\\sqrt{{{k * k * n}}}", f"\\frac{{{k * n}}}{{\\sqrt{{{n}}}}}"])
    truth = rng.choice([f"{other}\\sqrt{{{n}}}", f"\\sqrt{{{other * other * n}}}"])
    if rng.random() < 0.5:
        given, truth = f"{m} + {given}", f"{truth}+{m}"
    return given, truth, k == other, "root"


def polynomials(rng: random.Random) -> Pair:
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    c = b if rng.random() < 0.5 else b + 1
    given = rng.choice([f"x^2 + {a + b}x + {a * b}", f"{a * b} + {a + b} x + x^{{2}}", f"(x+{b})(x+{a})"])
    return given, f"(x+{a})(x+{c})", b == c, "polynomial"


def tuples(rng: random.Random) -> Pair:
    values = [rng.randint(-9, 9) for _ in range(rng.choice([2, 3]))]
    others = list(values)
    if rng.random() < 0.5:
        others[rng.randrange(len(others))] += 1
    given = rng.choice([", ", ","]).join(map(str, values))
    truth = ", ".join(_fraction(rng, Fraction(v)) for v in others)
    return f"({given})", rng.choice(["({})", "\\left({}\\right)"]).format(truth), values == others, "tuple"


def lists(rng: random.Random) -> Pair:
    values = rng.sample(range(1, 30), rng.choice([2, 3]))
    others = list(values)
    if rng.random() < 0.5:
        others[0] += 40
    shuffled = rng.sample(others, len(others))
    return ", ".join(map(str, values)), ",".join(map(str, shuffled)), values == others, "list"


def intervals(rng: random.Random) -> Pair:
    low, high = sorted(rng.sample(range(-9, 10), 2))
    left, right = rng.choice("[("), rng.choice("])")
    other = left if rng.random() < 0.5 else ("(" if left == "[" else "[")
    end = rng.choice([str(high), "\\infty"])
    right = ")" if end == "\\infty" else right
    return f"{left}{low},{end}{right}", f"\\left{other}{low}, {end}\\right{right}", left == other, "interval"


def units(rng: random.Random) -> Pair:
    value = rng.randint(2, 90)
    other = value if rng.random() < 0.5 else value + 1
    unit = rng.choice(["\\text{ cm}", "\\text{ inches}", "^\\circ", "\\%", "\\text{ square units}", "\\text{ hours}"])
    return f"{value}{unit}", str(other), value == other, "unit"


def thousands(rng: random.Random) -> Pair:
    value = rng.randint(1000, 9_999_999)
    other = value if rng.random() < 0.5 else value + 10
    return f"{value:,}", str(other), value == other, "thousands"


def powers(rng: random.Random) -> Pair:
    base, exponent = rng.randint(2, 5), rng.randint(2, 9)
    other = exponent if rng.random() < 0.5 else exponent + 1
    truth = rng.choice([str(base**other), f"{base}\\cdot {base}^{{{other - 1}}}"])
    return f"{base}^{{{exponent}}}", truth, exponent == other, "power"


def constants(rng: random.Random) -> Pair:
    k = rng.randint(2, 9)
    other = k if rng.random() < 0.5 else k + 1
    given = rng.choice([f"{k}\\pi", f"\\pi \\cdot {k}", f"\\frac{{{2 * k}\\pi}}{{2}}"])
    return given, f"{other} \\pi", k == other, "pi"


def assignments(rng: random.Random) -> Pair:
    value = rng.randint(-20, 20)
    other = value if rng.random() < 0.5 else value + 1
    return f"x = {value}", str(other), value == other, "assignment"


def words(rng: random.Random) -> Pair:
    names = ["Evelyn", "odd", "even", "Tuesday", "cube"]
    name, other = rng.choice(names), rng.choice(names)
    return f"\\text{{{name}}}", rng.choice([f"\\text{{{other}}}", other]), name == other, "word"


def bases(rng: random.Random) -> Pair:
    digits, base = rng.randint(100, 777), rng.choice([6, 8, 9])
    other = base if rng.random() < 0.5 else 7
    return f"{digits}_{base}", f"{digits}_{{{other}}}", base == other, "base"


def equations(rng: random.Random) -> Pair:
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    c = b if rng.random() < 0.5 else b + 1
    return f"y = {a}x + {b}", rng.choice([f"y={a}x+{c}", f"y = {c} + {a}x"]), b == c, "equation"


def signs(rng: random.Random) -> Pair:
    a, n = rng.randint(1, 9), rng.choice([2, 3, 5])
    m = n if rng.random() < 0.5 else n + 10
    return f"{a} \\pm \\sqrt{{{n}}}", f"{a}-\\sqrt{{{m}}},{a}+\\sqrt{{{m}}}", n == m, "plus-minus"


def mixed(rng: random.Random) -> Pair:
    whole, below = rng.randint(1, 9), rng.choice([2, 3, 4, 5])
    other = whole if rng.random() < 0.5 else whole + 1
    return f"{whole}\\frac{{1}}{{{below}}}", f"\\frac{{{other * below + 1}}}{{{below}}}", whole == other, "mixed number"


def matrices(rng: random.Random) -> Pair:
    cells = [rng.randint(-9, 9) for _ in range(4)]
    others = list(cells)
    if rng.random() < 0.5:
        others[rng.randrange(4)] += 1
    a, b = ("\\begin{{pmatrix}} {} & {} \\\\ {} & {} \\end{{pmatrix}}".format(*x) for x in (cells, others))
    return a, b.replace(" ", ""), cells == others, "matrix"


def functions(rng: random.Random) -> Pair:
    a = rng.randint(2, 6)
    right = rng.random() < 0.5
    given, truth = rng.choice(
        [
            (f"\\ln {a**2}", f"2\\ln {a if right else a + 1}"),
            (f"\\sin({2 * a}x)", f"2\\sin({a}x)\\cos({a if right else a + 1}x)"),
            (f"\\log_{{{a}}} {a**3}", "3" if right else "4"),
        ]
    )
    return given, truth, right, "function"


def inequalities(rng: random.Random) -> Pair:
    a = rng.randint(-9, 9)
    right = rng.random() < 0.5
    return f"x \\le {a}", f"{a} \\geq x" if right else f"x < {a}", right, "inequality"


def unions(rng: random.Random) -> Pair:
    a, b, c, d = sorted(rng.sample(range(-9, 10), 4))
    right = rng.random() < 0.5
    other = d if right else d + 1
    return f"[{a},{b}] \\cup ({c},{d})", f"({c}, {other})\\cup[{a}, {b}]", right, "union"


def roundings(rng: random.Random) -> Pair:
    below = rng.choice([3, 7, 9])
    return f"{1 / below:.{rng.choice([2, 3, 8])}f}", f"\\frac{{1}}{{{below}}}", False, "rounding"


GENERATORS: list[Callable[[random.Random], Pair]] = [
    fractions,
    roots,
    polynomials,
    tuples,
    lists,
    intervals,
    units,
    thousands,
    powers,
    constants,
    assignments,
    words,
    bases,
    equations,
    signs,
    mixed,
    matrices,
    functions,
    inequalities,
    unions,
    roundings,
]


def pairs(count: int, seed: int) -> list[Pair]:
    """So many pairs, the kinds in turn."""
    rng = random.Random(seed)
    return [GENERATORS[i % len(GENERATORS)](rng) for i in range(count)]


_TEXT = (
    "\\frac|{1}|{2}|12|3|\\sqrt|x|=|k=|/| |\\text{ cm}|\\text{and}|\\text{m}|0.5|.5|\\left(|\\right)|"
    "^\\circ|\\%|\\$|$|\\boxed{4}|\\boxed 5|}|{|,|1,000|ft|dollars|a |an |\\dfrac|\\\\|\\!|\\mbox{a}|square|"
    "(1,2)|\\sqrt[3]{8}|\\pi"
)
_FRAGMENTS = _TEXT.split("|")


def noise(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of strings of LaTeX fragments, right LaTeX or not; a third of them differ in spaces only."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text = "".join(rng.choice(_FRAGMENTS) for _ in range(rng.randint(0, 7)))
        other = "".join(rng.choice(_FRAGMENTS) for _ in range(rng.randint(0, 4)))
        found.append((text, text.replace(" ", "") if rng.random() < 0.33 else other))
    return found
