"""Where the tree's files are: the ones git tracks or would track, and the readers of README and docs."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ostro"

# What .gitignore leaves out, for a tree that is no git checkout.
_IGNORED = re.compile(r"(^|/)(\.venv|\.\w+_cache|__pycache__|runs|dist|build|[^/]+\.egg-info)/")


@functools.cache
def _repository() -> tuple[Path, ...]:
    if not (ROOT / ".git").exists():
        paths = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*"))
        listed = [path for path in paths if not _IGNORED.search(path)]
    else:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return tuple(ROOT / name for name in sorted(listed) if (ROOT / name).is_file())


def files(folder: str = ".", suffix: str = "") -> list[Path]:
    """Files of the repository, ignored ones left out.

    Args:
        folder: Only those anywhere below this folder.
        suffix: Only those whose name ends so.

    Returns:
        Absolute paths, sorted.
    """
    return [path for path in _repository() if path.is_relative_to(ROOT / folder) and path.name.endswith(suffix)]


def listed_paths(readme: str) -> dict[str, str]:
    """Paths and descriptions in the annotated tree of the README.

    Args:
        readme: Text with one fenced block whose lines are `  name  description`, two spaces of indent per level and
            folders ending in `/`.
    """
    block = re.search(r"```text\n(src/ostro/.*?)```", readme, re.DOTALL)
    assert block, "README.md: no fenced text block that begins with src/ostro/"
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.group(1).splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+)(?:\s{2,}(.*))?", line).groups()  # type: ignore[union-attr]
        del folders[len(indent) // 2 :]
        found["".join(folders) + name] = description or ""
        if name.endswith("/"):
            folders.append(name)
    return found


def links(markdown: str) -> list[str]:
    """Relative link targets of a Markdown text, without their fragments; code is skipped."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
