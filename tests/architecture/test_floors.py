"""The architecture, checked: imports go down the floors, files stay short, words stay in place.

A module may import from its own folder and from folders on LOWER floors. Two folders on the same floor never
import each other. Imports inside functions count too: a lazy import may hide an optional dependency (vllm,
transformer_engine), never a cycle. Which folder is on which floor is explained in docs/architecture.md.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "copd_megatron"
FLOOR = {
    "copd_kernels": 0,
    "types": 1,
    "config": 1,
    "platform": 1,
    "optional": 1,
    "parallel": 2,
    "metrics": 2,
    "model": 3,
    "losses": 3,
    "tasks": 3,
    "rollout": 4,
    "exchange": 4,
    "checkpoint": 4,
    "resilience": 4,
    "report": 4,
    "trainer": 5,
    "simulate": 5,
    "launch": 6,
    "__main__": 7,
}
SIDEWAYS: set[tuple[str, str]] = {
    ("config", "types"),  # errors are UserError; types.py itself imports nothing of ours
    ("optional", "types"),
}
"""Edges allowed between two folders of one floor. Each one has its reason."""

LINE_LIMIT = 400
FUNCTION_LIMIT = 60
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted((ROOT / "kernels/copd_kernels").rglob("*.py"))

# A word may appear in code only in the files named (below the package, or below the repository for kernels):
# one home for each outside vocabulary. Module docstrings may mention it.
ONLY_IN = {
    "os.environ": {"launch/environment.py"},
    "os.getenv": {"launch/environment.py", "parallel/groups.py"},  # torchrun's rendezvous
    "parallel_state": {"parallel/"},
    "RunConfig": {"config/", "trainer/", "launch/", "simulate/study.py"},
    "transformer_engine": {"optional.py", "model/fp8.py", "model/te.py", "launch/doctor.py"},
    "import vllm": {"rollout/vllm_engine.py", "launch/doctor.py"},
    "from vllm": {"rollout/vllm_engine.py"},
    "nvidia_resiliency_ext": {"resilience/", "launch/doctor.py"},
    "import wandb": {"metrics/sinks.py"},
}

# Folders that must stay importable without these packages: configs are read before anything heavy is loaded,
# losses are pure tensor functions.
FREE_OF = {
    "config": {"torch", "megatron", "transformers", "numpy"},
    "losses": {"megatron", "transformers", "pydantic"},
    "launch": {"megatron", "transformers"},
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def code_of(path: Path) -> str:
    """The file without comments and without strings that stand alone at module level."""
    return "\n".join(
        ast.unparse(node)
        for node in tree_of(path).body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    )


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "copd_kernels"
    return parts[1] if parts[1] != "__init__" else "types"


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: use absolute imports"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def imported_folders(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports_of(path):
        head, _, rest = name.partition(".")
        if head == "copd_kernels":
            yield line, "copd_kernels"
        elif head == PACKAGE and rest and not rest.startswith("__version__"):
            yield line, rest.split(".")[0]


def every_source(test):
    return pytest.mark.parametrize("path", SOURCES, ids=relative)(test)


@every_source
def test_imports_go_down(path):
    here = folder_of(path)
    for line, there in imported_folders(path):
        if there == here or (here, there) in SIDEWAYS:
            continue
        assert FLOOR[there] < FLOOR[here], (
            f"{relative(path)}:{line}: {here} (floor {FLOOR[here]}) may not import "
            f"{there} (floor {FLOOR[there]})"
        )


@every_source
def test_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert text.count("\n") <= LINE_LIMIT, f"{relative(path)}: split it"
    assert ast.get_docstring(tree_of(path)), f"{relative(path)}: no module docstring"


@every_source
def test_functions_fit_a_screen(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LIMIT, (
                f"{relative(path)}:{node.lineno}: {node.name} has {length} lines; split it"
            )


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "__init__.py" and p.parts[-3] != "copd_kernels"], ids=relative
)
def test_packages_re_export_nothing(path):
    # Beside the docstring: the version of the whole package. A kernel's __init__ is its contract and may hold
    # code.
    for node in tree_of(path).body[1:]:
        assert isinstance(node, ast.Assign) and node.targets[0].id == "__version__", (
            f"{relative(path)}:{node.lineno}"
        )


@pytest.mark.parametrize("word", ONLY_IN)
def test_word_has_one_home(word):
    for path in SOURCES:
        inside = path.relative_to(
            ROOT / PACKAGE if PACKAGE in path.relative_to(ROOT).parts else ROOT
        ).as_posix()
        if word in code_of(path):
            homes = ONLY_IN[word]
            assert any(
                inside == home or (home.endswith("/") and inside.startswith(home)) for home in homes
            ), f"{inside}: `{word}` belongs in {sorted(homes)}"


@every_source
def test_light_folders_stay_light(path):
    for line, name in imports_of(path):
        assert name.split(".")[0] not in FREE_OF.get(folder_of(path), ()), f"{relative(path)}:{line}: {name}"


def test_every_folder_has_a_floor():
    folders = {folder_of(path) for path in SOURCES}
    assert folders <= set(FLOOR), f"give {sorted(folders - set(FLOOR))} a floor"


def test_nothing_is_called_utils():
    assert [relative(path) for path in SOURCES if "util" in path.stem] == []


def test_kernels_folder_is_no_package():
    # Hugging Face owns the import name `kernels`; with an __init__.py ours would shadow it.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_tests_mirror_the_package():
    places = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir()}
    others = {"architecture", "packaging", "support", "kernels", "tools", "examples", "benchmarks"}
    for path in (ROOT / "tests").iterdir():
        if path.is_dir() and any(path.rglob("*.py")):
            assert path.name in places | others, f"tests/{path.name} mirrors no folder of {PACKAGE}"
