"""The house rules as functions from source text to a list of complaints; empty means kept.

Each complaint begins with the line it is about. The budgets are those of `docs/decisions`; they are applied to the tree
in `test_code.py` and shown to catch offenders in `test_checks.py`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_file(text: str) -> list[str]:
    """Files above the budget."""
    num_lines = len(text.splitlines())
    return [f"1: file of {num_lines} lines, at most {MAX_FILE_LINES}"] if num_lines > MAX_FILE_LINES else []


def long_functions(text: str) -> list[str]:
    """Functions above the budget, docstring not counted."""
    found = []
    for function in _functions(ast.parse(text)):
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        first = function.body[0]
        if ast.get_docstring(function) is not None:
            num_lines -= (first.end_lineno or 0) - first.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(f"{function.lineno}: {function.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}")
    return found


def code_lines(text: str) -> int:
    """Lines with code: without docstrings, comments and blank lines."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def many_parameters(text: str) -> list[str]:
    """Functions that take more than the budget; `self` and `cls` are not counted.

    The `forward` of a model takes what transformers and the specification say it takes.
    """
    counts = (
        (function, len(_parameters(function))) for function in _functions(ast.parse(text)) if function.name != "forward"
    )
    return [
        f"{function.lineno}: {function.name} takes {count} parameters, at most {MAX_PARAMETERS}"
        for function, count in counts
        if count > MAX_PARAMETERS
    ]


def broad_excepts(text: str) -> list[str]:
    """Handlers that would also swallow programming errors."""
    broad = {"Exception", "BaseException"}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(name is None or (isinstance(name, ast.Name) and name.id in broad) for name in caught):
                found.append(f"{node.lineno}: broad except; name the exceptions")
    return found


def probing(text: str) -> list[str]:
    """`hasattr(x, "name")` and `getattr(x, "name", default)`: its kind decides, not what it carries."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2:
            literal = isinstance(node.args[1], ast.Constant)
            if literal and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)):
                found.append(f"{node.lineno}: {ast.unparse(node)} probes for an attribute")
    return found


def missing_docstrings(text: str) -> list[str]:
    """Modules and public classes, functions and methods that say nothing of themselves."""
    tree = ast.parse(text)
    found = [] if ast.get_docstring(tree) else ["1: module without docstring"]
    for node in _public(tree):
        if not ast.get_docstring(node) and not node.name.startswith("__"):
            found.append(f"{node.lineno}: {node.name} without docstring")
    return found


def missing_annotations(text: str) -> list[str]:
    """Public functions and methods with a parameter or result that has no type."""
    found = []
    for node in _public(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            continue
        bare = [parameter.arg for parameter in _parameters(node) if parameter.annotation is None]
        bare += ["result"] if node.returns is None else []
        if bare:
            found.append(f"{node.lineno}: {node.name} has no type for {', '.join(bare)}")
    return found


def leftovers(text: str) -> list[str]:
    """Marks of unfinished work, in comments or as code."""
    marks = re.compile(r"#.*\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|\bNotImplemented" + r"Error\b")
    return [f"{number}: unfinished work" for number, line in enumerate(text.splitlines(), 1) if marks.search(line)]


def vague_names(text: str) -> list[str]:
    """Classes named after no thing."""
    classes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef))
    return [
        f"{node.lineno}: {node.name} says nothing" for node in classes if re.search("Manager|Helper|Util", node.name)
    ]


def imported_modules(text: str) -> set[str]:
    """Every module a file imports anywhere, outside `if TYPE_CHECKING`; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


# The patterns are split so that this file does not match itself.
_PLACES = re.compile(
    "|".join(
        (
            r"(?<![\w.$}])/(?:work|root|opt|mnt|tmp/\w)(?:/|\b)",
            r"(?<![\w.])/home/\w+",
            r"(?<![\w.])/Users/\w+",
            r"\bpy" + r"pi\.(?:org|python)",
            "python" + r"hosted\.org",
            r"download\.py" + r"torch\.org",
            r"registry\.npm" + r"js\.org",
            r"anaconda\." + r"(?:org|com)",
            r"proxy\.golang" + r"\.org",
            r"(?:index|extra-index)-url[ =]\S*//",
        )
    )
)


def machine_places(text: str) -> list[str]:
    """Paths of one machine and hosts of package registries."""
    return [
        f"{number}: {match.group()} is a machine path or registry host"
        for number, line in enumerate(text.splitlines(), 1)
        for match in [_PLACES.search(line)]
        if match
    ]


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _parameters(function: Function) -> list[ast.arg]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [argument for argument in named if argument.arg not in ("self", "cls")] + starred


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and (node.name[:1] != "_" or node.name[:2] == "__"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)
