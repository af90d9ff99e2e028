"""The table of recipe keys in `docs/reference/recipes.md`, made from the option classes.

`python -m tests.house.recipe_page` rewrites the page; a test fails while it is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ostro.config import json_schema
from ostro.train.recipe import KINDS
from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "reference" / "recipes.md"
_START = "<!-- keys: made by `python -m tests.house.recipe_page` -->\n"
_LIMITS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


def with_tables(page: str) -> str:
    """The page with its part below the marker made anew.

    Args:
        page: Present text of the page.

    Returns:
        The same text above the marker, then one table per kind.
    """
    schema = json_schema(KINDS)
    tables = []
    for kind, recipe in KINDS.items():
        rows = _rows(schema["$defs"][recipe.__name__], schema["$defs"], "")
        tables.append(f"\n## kind: {kind}\n\n| key | value | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return page.split(_START)[0] + _START + "".join(tables)


def _rows(block: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in block["properties"].items():
        key = prefix + name
        inner = _block(field, definitions)
        default = "required" if name in block.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        if inner is not None:
            value = "list of blocks" if field.get("type") == "array" else "block"
            default = "required" if default == "required" else "" if field.get("default") is not None else "`null`"
        else:
            value = _value(field)
        meaning = " ".join(field.get("description", "").split())
        yield f"| `{key}` | {value} | {default} | {meaning} |\n".replace("|  |", "| |")
        if inner is not None:
            yield from _rows(inner, definitions, f"{key}.0." if field.get("type") == "array" else f"{key}.")


def _block(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The block that a field, a list of them or an optional one refers to."""
    for option in (field, field.get("items", {}), *field.get("anyOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = definitions[option["$ref"].rpartition("/")[2]]
            return found
    return None


def _value(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_value(option) for option in field["anyOf"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        items = field.get("prefixItems")
        return f"{len(items)} of: {_value(items[0])}" if items else f"list of: {_value(field['items'])}"
    words = {"string": "text", "boolean": "true or false", "object": "block"}
    limits = [text.format(f"{field[name]:g}") for name, text in _LIMITS.items() if name in field]
    return " ".join([words.get(field["type"], field["type"]), ", ".join(limits)]).strip()


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
