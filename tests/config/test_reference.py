"""docs/configuration.md is what the schema says today."""

from __future__ import annotations

from pathlib import Path

from tulu_hpc.config.loader import dotted_keys
from tulu_hpc.config.reference import reference
from tulu_hpc.config.verbs import SCHEMAS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "write it again: python -m tulu_hpc.config.reference > docs/configuration.md"
    )


def test_every_key_is_on_the_page() -> None:
    page = reference()
    for schema in SCHEMAS.values():
        for key in dotted_keys(schema):
            section, _, rest = key.replace(".N.", "[].").partition(".")
            assert f"## {section.removesuffix('[]')}\n" in page or (not rest and f"| `{section}` |" in page)
            assert not rest or f"`{rest}`" in page, key
