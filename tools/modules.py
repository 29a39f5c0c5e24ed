"""Write the list of modules in docs/architecture.md anew, from the first line of each module.

python tools/modules.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
FIRST, LAST = "<!-- what follows is written by tools/modules.py -->", "<!-- until here -->"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(FIRST)
    after = rest.partition(LAST)[2]
    PAGE.write_text(before + listed() + after)


def listed() -> str:
    """Return a table for each folder of the package, the highest shelf of files first."""
    package = ROOT / "gmm_dist"
    folders = sorted({path.parent for path in package.rglob("*.py")})
    parts = [FIRST]
    for folder in folders:
        name = folder.relative_to(package.parent).as_posix()
        rows = [f"| `{path.name}` | {said_of(path)} |" for path in modules(folder)]
        purpose = said_of(folder / "__init__.py")
        if rows:
            parts += [f"**`{name}/`** {purpose}", "\n".join(["| file | |", "|---|---|", *rows])]
    return "\n\n".join([*parts, LAST])


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))


def said_of(path: Path) -> str:
    """Return the first line of a module's docstring, such that it may stand in a table."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    main()
