"""Count the lines of code of `src/gspo`: no blanks, comments or docstrings.

    python tools/size.py            # a table by room; what `make size` prints
    python tools/size.py --files    # and every file

A line counts once, however many statements stand on it; a string that is a statement by itself
(a docstring, or the sentence below a constant) does not count.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "gspo"
LIMIT, LAB_LIMIT = 21_554, 1_809
"""Most lines of all of src, and of lab/; tests/test_size.py holds both."""
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> int:
    """Number of lines that hold code.

    >>> code_lines('\"\"\"About.\"\"\"\\n\\nx = 1  # one\\n# two\\n')
    1
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def sizes(source: Path = SOURCE) -> dict[str, int]:
    """Lines of code by file, named relative to the package."""
    files = sorted(source.rglob("*.py"))
    return {str(f.relative_to(source)): code_lines(f.read_text(encoding="utf-8")) for f in files}


def by_room(files: dict[str, int]) -> dict[str, int]:
    """Sums over the folders directly below the package; its own files are `top level`."""
    rooms: Counter[str] = Counter()
    for name, lines in files.items():
        rooms[name.split("/")[0] if "/" in name else "top level"] += lines
    return dict(rooms.most_common())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Lines of code of src/gspo, by room.")
    parser.add_argument("--files", action="store_true", help="every file too")
    files = sizes()
    if parser.parse_args().files:
        for name, lines in files.items():
            print(f"{lines:6,}  {name}")
    rooms = by_room(files)
    for room, lines in rooms.items():
        limit = f"  of at most {LAB_LIMIT:,}" if room == "lab" else ""
        print(f"{lines:6,}  {room}{limit}")
    print(f"{sum(files.values()):6,}  src/gspo, of at most {LIMIT:,}, in {len(files)} files")


if __name__ == "__main__":
    main()
