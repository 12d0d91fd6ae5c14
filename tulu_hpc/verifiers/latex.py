r"""A reader for the LaTeX of final answers: numbers, fractions, roots, powers, functions and letters, as sympy.

It is a reader of answers, not of mathematics: what it does not know (integrals, sums, matrices, words) it refuses, and
the caller falls back on comparing strings. Its work is bounded: nesting, the length of the text, and the size of powers
and factorials, which sympy would otherwise compute for hours.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sympy

MAX_CHARACTERS = 1000
MAX_DEPTH = 60
MAX_POWER_BITS = 20_000
MAX_FACTORIAL = 200

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\\[a-zA-Z]+|\\.)|([a-zA-Z])|(.))", re.DOTALL)
_IGNORED = frozenset(
    ["\\left", "\\right", "\\big", "\\Big", "\\bigg", "\\Bigg", "\\displaystyle", "\\textstyle", "\\limits"]
    + ["\\,", "\\;", "\\:", "\\!", "\\ ", "\\quad", "\\qquad", "~", "&"]
)
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega"
)
_GREEK = frozenset(_GREEK_NAMES.split())
_FUNCTIONS = {
    **{f"\\{name}": name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")},
    **{f"\\arc{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    "\\ln": "log",
    "\\log": "log",
}
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_TIMES = ("*", "\\cdot", "\\times", "\\ast")
_DIVIDED = ("/", "\\div", ":")


class LatexError(ValueError):
    """The text is no expression that this reader knows, or one that is too large."""


def read_expression(text: str) -> sympy.Expr:
    r"""The expression that a LaTeX (or plain) formula stands for.

    `3\frac{1}{2}` is a mixed number; letters are symbols, `e`, `i` and `\pi` the constants; `101_2` is a symbol of its
    own; a percent sign and degrees are dropped.

    Raises:
        LatexError: as described there.
    """
    import sympy

    if len(text) > MAX_CHARACTERS:
        raise LatexError(f"longer than {MAX_CHARACTERS} characters")
    reader = _Reader(sympy, _tokens(text))
    value = reader.sum()
    if reader.next is not None:
        raise LatexError(f"unexpected {reader.next!r}")
    return value


def _tokens(text: str) -> list[str]:
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree|\\?%", "", text).replace("\\tfrac", "\\frac")
    text = text.replace("\\dfrac", "\\frac").replace("\\cfrac", "\\frac").replace("**", "^").replace("−", "-")
    tokens = [match[1] or match[2] or match[3] or match[4] for match in _TOKEN.finditer(text.rstrip())]
    return [token for token in tokens if token not in _IGNORED]


class _Reader:
    """Recursive descent; `sum` is the entry. The names of the methods are those of the grammar's rules."""

    def __init__(self, sympy: Any, tokens: list[str]) -> None:
        self.sympy, self.tokens, self.position, self.depth = sympy, tokens, 0, 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        token = self.next
        if token is None:
            raise LatexError("ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if (found := self.take()) != token:
            raise LatexError(f"{found!r} where {token!r} should stand")

    def sum(self, bars: bool = False) -> Any:
        """`bars`: inside `|...|`, where the next bar closes."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise LatexError(f"nested deeper than {MAX_DEPTH}")
        sign = 1
        while self.next in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = sign * self.product(bars)
        while self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            while self.next in ("+", "-"):
                sign = -sign if self.take() == "-" else sign
            value = value + sign * self.product(bars)
        self.depth -= 1
        return value

    def product(self, bars: bool) -> Any:
        value = self.signed(bars)
        mixed = self._whole_number_behind()
        while self.next is not None:
            if self.next in _TIMES:
                self.take()
                value = value * self.signed(bars)
            elif self.next in _DIVIDED:
                self.take()
                value = self.quotient(value, self.signed(bars))
            elif self._starts_factor(bars):
                factor_at = self.next
                factor = self.power(bars)
                if mixed and factor_at == "\\frac" and factor.is_Rational and 0 < factor < 1:
                    value = value + factor
                else:
                    value = value * factor
            else:
                break
            mixed = False
        return value

    def _whole_number_behind(self) -> bool:
        return self.position > 0 and self.tokens[self.position - 1].isdigit() and self._alone()

    def _alone(self) -> bool:
        """The number just read is no exponent or index."""
        return self.position < 2 or self.tokens[self.position - 2] not in ("^", "_")

    def _starts_factor(self, bars: bool) -> bool:
        token = self.next
        if token is None or token in ("|", "\\|"):
            return token is not None and not bars
        if token[0].isdigit() or token[0] == ".":
            return not self.tokens[self.position - 1][0].isdigit()  # "1 2" is no product
        return token.isalpha() or token in _OPENING or (token.startswith("\\") and self._known(token))

    def _known(self, token: str) -> bool:
        return token in _FUNCTIONS or token[1:] in _GREEK or token in ("\\frac", "\\sqrt", "\\pi", "\\infty", "\\binom")

    def signed(self, bars: bool) -> Any:
        if self.next in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            return sign * self.signed(bars)
        return self.power(bars)

    def power(self, bars: bool) -> Any:
        value = self.atom(bars)
        while self.next == "!":
            self.take()
            if not (value.is_Integer and 0 <= value <= MAX_FACTORIAL):
                raise LatexError(f"a factorial of something else than 0 to {MAX_FACTORIAL}")
            value = self.sympy.factorial(value)
        if self.next == "^":
            self.take()
            value = self.raised(value, self.argument(whole=True))
        return value

    def raised(self, base: Any, exponent: Any) -> Any:
        """A power, unless sympy would write out a number of more than `MAX_POWER_BITS`."""
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p), base.q).bit_length()
            if bits * max(1, abs(exponent.p)) > MAX_POWER_BITS or exponent.q > MAX_POWER_BITS:
                raise LatexError("a power that is too large")
            if base == 0 and exponent < 0:
                raise LatexError("division by zero")
        elif exponent.is_Rational and abs(exponent) > 1000:
            raise LatexError("a power that is too large")
        return base**exponent

    def quotient(self, above: Any, below: Any) -> Any:
        if below == 0:
            raise LatexError("division by zero")
        return above / below

    def argument(self, whole: bool = False) -> Any:
        r"""What follows `^`, `\frac`, `\sqrt`: a group in braces, a letter, a command, a digit (or `whole` number)."""
        if self.next == "{":
            return self.group("{")
        token = self.take()
        if token == "-":
            return -self.argument(whole)
        if token[0].isdigit():
            if len(token) > 1 and token.isdigit() and not whole:  # \frac12 is one half
                self.position -= 1
                self.tokens[self.position] = token[1:]
                token = token[0]
            return self.number(token)
        self.position -= 1
        return self.atom(False)

    def group(self, opening: str) -> Any:
        self.expect(opening)
        value = self.sum()
        self.expect(_OPENING[opening])
        return value

    def number(self, token: str) -> Any:
        return self.sympy.Rational(token)

    def atom(self, bars: bool) -> Any:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if self.next == "_":
                return self.sympy.Symbol(f"{token}_{self.index()}")
            return self.number(token)
        if token in _OPENING:
            self.position -= 1
            return self.group(token)
        if token in ("|", "\\|") and not bars:
            value = self.sum(bars=True)
            self.expect(token)
            return abs(value)
        if token.isalpha() or token[1:] in _GREEK:
            return self.letter(token)
        return self.command(token)

    def letter(self, token: str) -> Any:
        name = token.lstrip("\\")
        if self.next == "_":
            return self.sympy.Symbol(f"{name}_{self.index()}")
        return {"e": self.sympy.E, "i": self.sympy.I}.get(name) or self.sympy.Symbol(name)

    def index(self) -> str:
        self.expect("_")
        if self.next != "{":
            return self.take()
        self.expect("{")
        parts = []
        while (token := self.take()) != "}":
            parts.append(token)
        return "".join(parts)

    def command(self, token: str) -> Any:
        if token == "\\frac":
            above = self.argument()
            return self.quotient(above, self.argument())
        if token == "\\sqrt":
            degree = self.group("[") if self.next == "[" else self.sympy.Integer(2)
            return self.raised(self.argument(), self.quotient(self.sympy.Integer(1), degree))
        if token == "\\pi":
            return self.sympy.pi
        if token == "\\infty":
            return self.sympy.oo
        if token == "\\binom":
            return self.binomial(self.argument(), self.argument())
        if token in _FUNCTIONS:
            return self.function(_FUNCTIONS[token], token)
        raise LatexError(f"unknown {token!r}")

    def binomial(self, n: Any, k: Any) -> Any:
        if not (n.is_Integer and k.is_Integer and 0 <= n <= MAX_FACTORIAL):
            raise LatexError("a binomial coefficient that is too large")
        return self.sympy.binomial(n, k)

    def function(self, name: str, token: str) -> Any:
        base = None
        if token == "\\log":
            base = self.sympy.Integer(10)
            if self.next == "_":
                self.take()
                base = self.argument()
        exponent = None
        if self.next == "^":
            self.take()
            exponent = self.argument(whole=True)
        if exponent == -1 and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        operand = self.group(self.next) if self.next in ("(", "{", "[") else self.operand()
        if name == "log" and operand == 0:
            raise LatexError("logarithm of zero")
        if name == "exp":
            value = self.raised(self.sympy.E, operand)
        elif base is not None:
            value = self.quotient(self.sympy.log(operand), self.sympy.log(base))
        else:
            value = getattr(self.sympy, name)(operand)
        return value if exponent is None else self.raised(value, exponent)

    def operand(self) -> Any:
        r"""Of a function without brackets: factors side by side up to a sign or another function ("\sin 2x")."""
        value = self.power(False)
        while self._starts_factor(False) and self.next not in _FUNCTIONS and self.next not in ("(", "|"):
            value = value * self.power(False)
        return value
