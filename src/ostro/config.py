"""Strict recipes: YAML and `key=value` overrides become one validated, frozen object.

Rooms define their options (subclasses of `Options`) next to the code they configure; this file knows how to read,
merge, check and describe them, and nothing of what they mean.

The idea: text becomes plain data, overrides edit the data, and one pass of pydantic in strict JSON mode checks it, so
that a recipe file, an override and the JSON schema for editors obey the same rules. Scalars follow the YAML 1.2 core
schema: `2e-6` is a number, `no` is text. Every refusal is a `RecipeError` that begins with the dotted key, or with the
file and line where the text itself is at fault.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import os
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic.json_schema
import yaml

from ostro.errors import RecipeError

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_MAX_VALUE_CHARS = 80


def _expand_env(value: str) -> str:
    def look_up(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ValueError(f"environment variable {name} is not set; set it or write the path out")
        return os.environ[name]

    return _ENV.sub(look_up, value)


PathField = Annotated[str, pydantic.AfterValidator(_expand_env)]
"""A path or hub id in a recipe; only in such a field is `${env:NAME}` replaced by the environment variable's value."""


class Options(pydantic.BaseModel):
    """Base of every block of a recipe: unknown keys are refused and values cannot change after validation."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def expand(cls, data: dict[str, Any]) -> None:
        """Writes out in place what a recipe of this class may abbreviate; nothing by default.

        Args:
            data: Plain data of the recipe, not validated yet.
        """

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _refuse_placeholders(cls, value: Any) -> Any:
        for text in _texts(value):
            if "${" in text:
                raise ValueError(f"only ${{env:NAME}} in a path field is expanded, got {_show(text)}")
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _texts(item)


RecipeT = TypeVar("RecipeT", bound=Options)


class _Loader(yaml.SafeLoader):
    """YAML to plain data: mappings with unique text keys, lists, text, numbers, booleans, null; nothing else."""

    yaml_implicit_resolvers = {}
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (
            None,
            *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")),
        )
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = "" if isinstance(key, str) else f"key {key!r} is not text"
            problem = f"duplicate key {key!r}" if key in seen else problem
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Plain data to YAML that `_Loader` reads back as it was."""

    yaml_implicit_resolvers = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


# YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema) without octal, hexadecimal, infinity and nan;
# digits may be grouped by `_`.
_SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in _SCALARS:
    for _yaml_class in (_Loader, _Dumper):
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from error


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package.

    Returns:
        YAML text by recipe name, sorted by name.
    """
    folder = importlib.resources.files("ostro") / "recipes"
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


def read_recipe(source: str | Path) -> tuple[str, str]:
    """Find a recipe by path or by the name of a shipped one.

    Args:
        source: A YAML file; or a name without suffix, as listed by `ostro recipes list`.

    Returns:
        The name to report errors under, and the YAML text.

    Raises:
        RecipeError: Neither a readable file nor a shipped recipe.
    """
    path = Path(source)
    shipped = shipped_recipes()
    if str(source) in shipped:
        return str(source), shipped[str(source)]
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from error
    except FileNotFoundError as error:
        if path.suffix in (".yaml", ".yml"):
            raise RecipeError(f"{path}: no such file") from error
        near = difflib.get_close_matches(str(source), shipped, n=1)
        hint = f"nearest shipped recipe: {near[0]}" if near else "see 'ostro recipes list'"
        raise RecipeError(f"{source}: neither a file nor a shipped recipe; {hint}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error


def load_recipe(source: str | Path, overrides: Sequence[str], kinds: Mapping[str, type[RecipeT]]) -> RecipeT:
    """Read a recipe, apply overrides and validate it.

    Args:
        source: A YAML file or the name of a shipped recipe.
        overrides: `key.sub=value` each; the value is YAML, list items go by index (`data.train.0.path=...`), and of two
            values for one key the later one stands.
        kinds: Recipe class for each value of the top-level key `kind`.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: Unreadable text, unknown or duplicate key, wrong type or value, unset environment variable.
    """
    name, text = read_recipe(source)
    data = _parse(text, name)
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: must hold a mapping of keys, got {_show(data)}")
    for override in overrides:
        _apply_override(data, override)
    kind = data.get("kind")
    if kind not in kinds:
        got = f"got {_show(kind)}" if "kind" in data else "not given"
        raise RecipeError(f"kind: must be one of {', '.join(kinds)}; {got}")
    recipe_class = kinds[str(kind)]
    recipe_class.expand(data)
    try:
        # JSON mode: strict about scalars, while a YAML list may still fill a tuple.
        return recipe_class.model_validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        raise RecipeError("; ".join(_explanations(error, data, recipe_class))) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{override}: an override is written key.sub=value")
    value = _parse(text, key)
    block: Any = data
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if isinstance(block, list):
            if not part.isdecimal() or int(part) >= len(block):
                raise RecipeError(
                    f"{key}: {here} is a list of {len(block)}; items are 0 to {len(block) - 1}, got {part}"
                )
            index: Any = int(part)
        elif isinstance(block, dict):
            index = part
            if not last and block.get(part) is None:
                block[part] = {}
        else:
            raise RecipeError(f"{key}: {here} is {_show(block)}, not a block with keys")
        if last:
            block[index] = value
        else:
            block = block[index]


def dump_recipe(recipe: Options) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal object.

    Args:
        recipe: A validated recipe.

    Returns:
        YAML text, keys in the order of the classes.
    """
    data = recipe.model_dump(mode="json")
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def json_schema(kinds: Mapping[str, type[RecipeT]]) -> dict[str, Any]:
    """JSON schema of all recipe kinds, for completion and checks in editors.

    Args:
        kinds: Recipe class by kind.

    Returns:
        A draft 2020-12 schema, one alternative per kind.
    """
    refs, schema = pydantic.json_schema.models_json_schema([(recipe, "validation") for recipe in kinds.values()])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Ostro recipe",
        "oneOf": [refs[(recipe, "validation")] for recipe in kinds.values()],
        **schema,
    }


_MESSAGES = {
    "greater_than": "must be > {gt}, got {got}",
    "greater_than_equal": "must be >= {ge}, got {got}",
    "less_than": "must be < {lt}, got {got}",
    "less_than_equal": "must be <= {le}, got {got}",
    "multiple_of": "must be a multiple of {multiple_of}, got {got}",
    "missing": "required, but not given",
    "int_type": "must be an integer, got {got}",
    "int_from_float": "must be an integer, got {got}",
    "float_type": "must be a number, got {got}",
    "finite_number": "must be finite, got {got}",
    "bool_type": "must be true or false, got {got}",
    "string_type": "must be text, got {got}",
    "string_too_short": "must have at least {min_length} characters, got {got}",
    "string_too_long": "must have at most {max_length} characters, got {got}",
    "string_pattern_mismatch": "must match {pattern}, got {got}",
    "too_short": "must have at least {min_length} entries, got {got}",
    "too_long": "must have at most {max_length} entries, got {got}",
    "list_type": "must be a list, got {got}",
    "tuple_type": "must be a list, got {got}",
    "dict_type": "must be a block with keys, got {got}",
    "model_type": "must be a block with keys, got {got}",
    "literal_error": "must be {expected}, got {got}",
    "enum": "must be {expected}, got {got}",
    "none_required": "must be null, got {got}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}, got '{tag}'",
    "union_tag_not_found": "{discriminator} is required, but not given",
    "value_error": "{error}",
}


def _explanations(error: pydantic.ValidationError, data: Any, recipe_class: type[Options]) -> list[str]:
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    valid = tuple(_dotted_keys(recipe_class))
    # A list with a faulty item is also called too short by pydantic; the innermost faults are the cause.
    return list(dict.fromkeys(_explain(problem, data, valid) for problem in problems if problem["loc"] not in inner))


def _explain(problem: dict[str, Any], data: Any, valid: Sequence[str]) -> str:
    """One sentence for one pydantic error: the dotted key, what was expected and the value seen."""
    key = _dotted(problem, data)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key, valid)}"
    template = _MESSAGES.get(problem["type"], problem["msg"].replace("{", "{{").replace("}", "}}") + ", got {got}")
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()
    }
    message = template.format(got=_show(problem["input"]), **context)
    return f"{key}: {message}" if key else message


def _dotted(problem: dict[str, Any], data: Any) -> str:
    """The error's location without the names pydantic adds for members of a union, which no container has."""
    parts = []
    *outer, last = problem["loc"] or ("",)
    for part in outer:
        if _holds(data, part):
            parts.append(str(part))
            data = data[part]
    if problem["type"] == "missing" or _holds(data, last):
        parts.append(str(last))
    return ".".join(parts)


def _holds(container: Any, part: str | int) -> bool:
    if isinstance(container, dict):
        return part in container
    return isinstance(container, list) and isinstance(part, int) and part < len(container)


def _nearest(key: str, valid: Sequence[str]) -> str:
    index = re.compile(r"(?<=\.)\d+(?=\.|$)")
    indices = iter(index.findall(key))
    parent, _, name = index.sub("*", key).rpartition(".")
    siblings = {full.rpartition(".")[2]: full for full in valid if full.rpartition(".")[0] == parent}
    anywhere = {full.rpartition(".")[2]: full for full in reversed(valid)}
    for names in (siblings, anywhere):
        for near in difflib.get_close_matches(name, names, n=1):
            return f"nearest valid key: {re.sub(r'[*]', lambda _: next(indices, '0'), names[near])}"
    return f"valid keys here: {', '.join(siblings)}"


def _dotted_keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every key of an options class and of the blocks inside it; `*` stands for a list index."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        for name, field in annotation.model_fields.items():
            key = f"{prefix}.{name}".lstrip(".")
            yield key
            yield from _dotted_keys(field.annotation, key)
        return
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, Annotated):
        for member in typing.get_args(annotation):
            yield from _dotted_keys(member, prefix)
    elif origin in (tuple, list):
        yield from _dotted_keys(typing.get_args(annotation)[0], f"{prefix}.*")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."
