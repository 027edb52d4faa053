"""Checks the comments and docstrings of the repository by the rules of CONTRIBUTING that a pattern can check.

    python scripts/check_prose.py [FILE ...]

Prints every violation as `file:line: message` and exits with 1 if it finds one. Without arguments it checks all
tracked files.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPP = (".h", ".cuh", ".cpp", ".cu")
HASH = (".sh", ".cmake", ".toml", ".yml")  # files whose comments begin with #
HASH_NAMES = ("CMakeLists.txt", "Makefile", ".ci/run")
PROSE = (".md", ".cff")
# The largest number of columns of a line with a comment, in C++ and in other files. ruff checks the lines of Python.
CPP_COLUMNS, COLUMNS = 100, 120
# Words that no comment of this repository needs: the rules have no exceptions.
RULES = {
    r"^Of\b(?! course)": 'begins with "Of": begin with the noun or the verb',
    r"\b(?:no|some)body\b": "name who or what it is",
    r"\bstands? (?:in )?for\b": 'say "means", "replaces" or "is"',
    r"\bone behind\b|\bbehind (?:one another|each other)\b": 'say "contiguous", "one after another" or "after"',
    r"\b(?:is|are|was|were) not there\b": "use the field's word: absent, masked, missing",
    r"\bto and fro\b|\bby and by\b": 'say "oscillate" or "gradually"',
    r"\b(?:a|one) (?:warp|block|thread) an? (?:token|row|group|warp|expert|slot)\b": 'write "one warp per token"',
    r"\bcome by\b|\brubbish\b|\bvouch": "use the field's word: get, garbage, untrusted",
    r"\b(?:AMD|Intel|NVIDIA)'s\b": 'write "on AMD CPUs", without a possessive',
}


def is_hash_file(path: Path) -> bool:
    """Tells whether comments of the file begin with #; False for Python files."""
    return path.suffix in HASH or path.as_posix().endswith(HASH_NAMES)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the comments, docstrings or lines of prose of a file, each with its line number."""
    text = path.read_text()
    if path.suffix == ".py":
        before = tokenize.NEWLINE
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string.lstrip("#: ")
            elif token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                lines = token.string.strip("rRuU").strip("\"'").splitlines()
                yield from ((token.start[0] + i, line.strip()) for i, line in enumerate(lines))
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                before = token.type
    elif path.suffix in CPP:
        for number, line in enumerate(text.splitlines(), 1):
            match = re.search(r"(?:^|\s)//+\s?(.*)", line)
            if match:
                yield number, match[1]
    elif is_hash_file(path):
        for number, line in enumerate(text.splitlines(), 1):
            match = re.match(r"\s*#+(?!!)\s?(.*)", line)  # whole lines only: a # within a line may be code
            if match:
                yield number, match[1]
    else:
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, line.lstrip("-* ")


def violations(path: Path) -> Iterator[tuple[int, str]]:
    """Yields every violation: the line number and the message."""
    sentence_ended = True
    last = -1
    for number, text in comments(path):
        # A line that continues a sentence may begin with "Of".
        begins = sentence_ended or number != last + 1
        for pattern, message in RULES.items():
            if (begins or not pattern.startswith("^")) and re.search(pattern, text):
                yield number, message
        sentence_ended, last = not text or text.rstrip().endswith((".", ":", ";")), number
    if path.suffix in CPP or is_hash_file(path):
        columns, mark = (CPP_COLUMNS, r"(?:^|\s)//") if path.suffix in CPP else (COLUMNS, r"^\s*#")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > columns and re.search(mark, line):
                yield number, f"a line with a comment has {len(line)} columns, {columns} are the most"


def main(arguments: list[str]) -> int:
    """Checks the files; returns the exit status."""
    if arguments:
        paths = [Path(argument) for argument in arguments]
    else:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in tracked.splitlines()]
    # This file and CONTRIBUTING name the forbidden words.
    skipped = (Path(__file__).resolve(), ROOT / "CONTRIBUTING.md")
    found = 0
    for path in paths:
        checked = path.suffix in (".py", *CPP, *PROSE) or is_hash_file(path)
        if checked and path.resolve() not in skipped and path.exists():
            for number, message in violations(path):
                found += 1
                print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{number}: {message}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
