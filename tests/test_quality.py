"""What holds for the code as a whole: style, types, which way imports point, sizes, and no traces of one machine."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = sorted((REPOSITORY / "alignscale").rglob("*.py"))
SOURCES = [*PACKAGE, *(REPOSITORY / "launch").rglob("*.py"), *(REPOSITORY / "tools").rglob("*.py")]

# Who may import whom: a module imports from its own row or from rows above. A package stands for all its modules.
LAYERS = [
    {
        *("choices", "choices_data", "config", "conflicts", "validation"),
        *("address", "types", "environment", "files", "kernels", "results"),
    },
    {
        "analysis",
        "data",
        "distributed",
        "initial",
        "interrupts",
        "liveness",
        "loss",
        "metrics",
        "nets",
        "parallel",
        "schedule",
    },
    {"frozen", "jacobian", "traffic"},
    {"rules"},
    {"checkpoint", "tensor_file", "engine", "engine_deepspeed", "engine_graph", "engine_zero", "evaluate"},
    {"folder", "learner"},
    {"memory", "moments", "observe"},
    {"run"},
    {"prepare", "restore"},
    {"train"},
    {"alignscale"},  # the public names
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Who may import a heavy dependency.
OWNERS = {
    "cv2": ("alignscale/data/decode.py", "alignscale/data/webdataset.py", "alignscale/data/ffcv.py", "tools/"),
    "deepspeed": ("alignscale/engine", "alignscale/parallel"),
    "ffcv": ("alignscale/data/ffcv.py", "tools/"),
    "hydra": ("launch/",),
    "jinja2": ("launch/_report/page.py",),
    "matplotlib": ("launch/_report/", "tools/"),
    "omegaconf": ("launch/",),
    "simplejpeg": ("alignscale/data/decode.py", "tools/"),
    "submitit": ("launch/",),
    "triton": ("alignscale/kernels.py",),
    "torchvision": ("alignscale/data/torchvision.py", "tools/"),
    "urllib3": ("alignscale/data/remote.py",),
    "webdataset": ("alignscale/data/webdataset.py", "tools/"),
}


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE}


def parsed(path: Path) -> ast.Module:
    """A file's syntax; once more where Python before 3.11.8 has lost count of its depth (gh-106905)."""
    try:
        return ast.parse(path.read_text())
    except SystemError:
        return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every name that a file imports, wherever in the file, with the module that it comes from."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, `from package import module` resolved to the module."""
    found = {name for name in imports(path) if name.split(".")[0] == "alignscale"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in found}


def top(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    run("ruff", "check")


def test_the_code_is_formatted() -> None:
    run("ruff", "format", "--check")


def test_mypy_finds_nothing() -> None:
    run("mypy")


def test_every_module_has_a_place_among_the_layers() -> None:
    assert {top(name) for name in MODULES} - RANK.keys() == set()


def test_imports_point_one_way() -> None:
    pairs = [(name, other) for name, path in MODULES.items() for other in package_imports(path)]
    assert [pair for pair in pairs if RANK[top(pair[1])] > RANK[top(pair[0])]] == []


def test_no_two_modules_import_each_other() -> None:
    graph = {name: package_imports(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_the_package_knows_nothing_of_launch_and_tools() -> None:
    for path in PACKAGE:
        assert not {name.split(".")[0] for name in imports(path)} & {"launch", "tools", "tests"}, path


@pytest.mark.parametrize("dependency", sorted(OWNERS))
def test_a_heavy_dependency_has_one_owner(dependency: str) -> None:
    users = {
        str(path.relative_to(REPOSITORY))
        for path in SOURCES
        if dependency in {name.split(".")[0] for name in imports(path)}
    }
    assert {user for user in users if not user.startswith(OWNERS[dependency])} == set()


def test_the_options_need_no_torch() -> None:
    assert not any(name.split(".")[0] == "torch" for name in imports(MODULES["alignscale.config"]))


def code_lines(path: Path) -> int:
    """Lines that hold code: without blank lines, comments and docstrings, as cloc counts them."""
    text = path.read_text()
    quoted: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            quoted |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = [range(token.start[0], token.end[0] + 1) for token in tokens if token.type not in empty]
    return len({line for span in spans for line in span} - quoted)


def test_files_are_short_and_the_package_is_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert {str(path): length for path, length in lengths.items() if length > 300} == {}
    assert sum(map(code_lines, PACKAGE)) < 7960


def test_no_path_of_one_machine_is_left() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    absolute = re.compile(rb"(?<![\w.~])/(?:home|opt|root|Users|work)/")
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    texts = [path for path in paths if path.is_file() and path.suffix not in {".npz", ".png", ".beton", ".tar"}]
    assert [str(path) for path in texts if absolute.search(path.read_bytes())] == []
