"""The certificate of an audit: what was compared, how far apart it was, and whether that is close enough."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.telemetry.html import Html, join, page, paragraph, pre, section, table, tag


@dataclass(frozen=True)
class Difference:
    """One compared thing. `place` is where it sits in the model or data; `value` the measured difference."""

    place: str
    value: float

    def within(self, tolerance: float) -> bool:
        """False for NaN."""
        return self.value <= tolerance


@dataclass(frozen=True)
class Check:
    """One kind of comparison over the whole model, in the order in which the model computes.

    Attributes:
        name: weights, hidden, logprobs (scores, values), loss or gradients; `value model ` is before it for the second
            model of ppo.
        measure: what the values are, in words.
        tolerance: largest value that passes.
        differences: at least one, in the model's order.
        remark: of a failed check: what its pattern suggests.
    """

    name: str
    measure: str
    tolerance: float
    differences: Sequence[Difference]
    remark: str = ""

    @property
    def holds(self) -> bool:
        return bool(self.differences) and all(each.within(self.tolerance) for each in self.differences)

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda each: math.inf if math.isnan(each.value) else each.value)

    @property
    def first_failure(self) -> Difference | None:
        return next((each for each in self.differences if not each.within(self.tolerance)), None)


@dataclass(frozen=True)
class Certificate:
    """The result of an audit.

    Attributes:
        subject: model, data, layout, precision: what the statement is about.
        versions: of everything that computed.
        checks: in the order in which a fault shows: weights, hidden, logprobs, loss, gradients.
        config: the resolved configuration as YAML.
    """

    subject: Mapping[str, Any]
    versions: Mapping[str, str]
    checks: Sequence[Check]
    config: str = field(repr=False, default="")

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(check.holds for check in self.checks)

    def verdict(self) -> str:
        """One sentence; for a failure, the first thing that differs."""
        if self.holds:
            return "holds: this configuration computes what Hugging Face computes in one process"
        failed = next((check for check in self.checks if not check.holds), None)
        if failed is None or failed.first_failure is None:
            return "does not hold: nothing was compared"
        first = failed.first_failure
        return (
            f"does not hold: {failed.name} of {first.place} differ: {failed.measure} is {first.value:.3g}, "
            f"{failed.tolerance:.3g} is allowed" + (f"; {failed.remark}" if failed.remark else "")
        )

    def to_json(self) -> str:
        checks = [
            {**asdict(check), "holds": check.holds, "worst": asdict(check.worst)}
            for check in self.checks
            if check.differences
        ]
        body = {
            "holds": self.holds,
            "verdict": self.verdict(),
            "subject": dict(self.subject),
            "versions": dict(self.versions),
            "checks": checks,
            "config": self.config,
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    def to_html(self) -> str:
        rows = [
            (
                check.name,
                check.measure,
                len(check.differences),
                f"{check.worst.value:.3g}",
                f"{check.tolerance:.3g}",
                check.worst.place,
                tag("span", "holds", class_="right") if check.holds else tag("span", "fails", class_="wrong"),
            )
            for check in self.checks
        ]
        headers = ("check", "measure", "compared", "worst", "allowed", "at", "")
        content = join(
            [
                tag("h1", "Audit"),
                paragraph(tag("span", self.verdict(), class_="right" if self.holds else "wrong")),
                table(headers, rows, numeric=2, caption="Against Hugging Face in one process"),
                table(("subject", ""), [(k, v) for k, v in self.subject.items()], numeric=2),
                table(("software", "version"), list(self.versions.items()), numeric=2),
                *[self._section(check) for check in self.checks],
                section("config", "Configuration", pre(self.config)),
            ]
        )
        return page("Audit", content)

    def _section(self, check: Check) -> Html:
        rows = [
            (each.place, f"{each.value:.3g}", "" if each.within(check.tolerance) else "differs")
            for each in check.differences
        ]
        return section(check.name.replace(" ", "-"), check.name, table(("place", check.measure, ""), rows))

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write `audit.json` and `audit.html`; returns their paths."""
        targets = directory / "audit.json", directory / "audit.html"
        for target, text in zip(targets, (self.to_json(), self.to_html()), strict=True):
            write_atomically(target, text)
        return targets
