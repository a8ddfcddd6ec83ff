"""What is committed speaks of the project only: no home folders, no merge leftovers, nothing large."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME_FOLDER = re.compile(r"(?<![\w.$}/~])/(?:root|work|home/\w+|Users/\w+)(?:/|\b)")
"""An absolute path into somebody's home or workspace."""
CONFLICT = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)
SIZE_LIMIT_BYTES = 8 << 20


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def texts(paths: list[Path]):
    for path in paths:
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_no_file_names_somebodys_folders(tracked):
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in texts(tracked)
        if (match := HOME_FOLDER.search(text))
    ]
    assert found == []


def test_no_conflict_markers(tracked):
    assert [str(path.relative_to(ROOT)) for path, text in texts(tracked) if CONFLICT.search(text)] == []


def test_no_file_is_large(tracked):
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for path in tracked
        if path.stat().st_size > SIZE_LIMIT_BYTES
    }
    assert large == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/" + "ann/models", True),
        ("/ro" + "ot/x", True),
        ("'/Users/" + "bob'", True),
        ("(/wo" + "rk/main)", True),
        ("docs/home/page", False),
        ("https://a.b/ro" + "ot/x", False),
        ("~/wo" + "rk/x", False),
        ("/data/backbone", False),
        ("../wo" + "rk/x", False),
    ],
)
def test_the_pattern_itself(text, found):
    assert bool(HOME_FOLDER.search(text)) is found
