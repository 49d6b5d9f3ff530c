"""Links in the Markdown files lead somewhere, and the commands shown in them exist."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _hydra import quoted
from _mistakes import check
from _options import register
from _report.claims import verdict

from alignscale.results import read_result

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):  # http:, mailto:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield link


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's bash blocks, without leading assignments such as FOO=1."""
    for block in BASH.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


def unknown_words(words: list[str]) -> Iterator[str]:
    """The words of a command that name a make target, a file of this repository or a config that is not there."""
    for word in words[1:]:
        if words[0] == "make" and re.fullmatch(r"[a-z][\w-]*", word) and word not in TARGETS:
            yield word
    for word in words:
        if re.match(r"(alignscale|configs|docs|launch|tests|tools)/", word) and not (REPOSITORY / word).exists():
            yield word
        group, _, names = word.partition("=")
        folder = REPOSITORY / "configs" / group
        if names and folder.is_dir():
            yield from (f"{group}={name}" for name in names.split(",") if not (folder / f"{name}.yaml").exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page: Path) -> None:
    wrong = {" ".join(words): unknown for words in commands(page) if (unknown := list(unknown_words(words)))}
    assert wrong == {}


SCRIPTS = [REPOSITORY / "launch/torchrun.sh", REPOSITORY / "launch/slurm.sbatch"]


def options(words: list[str]) -> list[str]:
    """What a command gives launch/train.py, by whatever starts it; nothing for a command that shows a placeholder."""
    starts = [
        place for place, word in enumerate(words) if word.endswith(("/train.py", "/torchrun.sh", "/slurm.sbatch"))
    ]
    given = words[starts[0] + 1 :] if starts else []
    given = given[2:] if starts and words[starts[0]].endswith(".sh") else given
    return [] if any(re.search(r"[A-Z]{3}|\.\.\.|--", word) for word in given) else given


def heading(script: Path) -> list[list[str]]:
    """The commands in a script's first comment."""
    comment = "\n".join(line[4:] for line in script.read_text().splitlines() if line.startswith("#   "))
    return [shlex.split(line) for line in comment.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_the_options_of_commands_are_taken(page: Path) -> None:
    register()
    lines = heading(page) if page in SCRIPTS else list(commands(page))
    for words in lines:
        check("train", [quoted(word) for word in options(words)])
    assert page in PAGES or any(options(words) for words in lines)


def test_a_wrong_link_or_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](#one) [b](#two) [c](no.md) [d](https://e.org)\n"
        "```bash\nmake nothing\nA=1 python tools/no.py  # x\n```\n"
    )
    assert list(broken_links(page)) == ["#two", "no.md"]
    assert [list(unknown_words(words)) for words in commands(page)] == [["nothing"], ["tools/no.py"]]


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=quiet, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for page in (REPOSITORY / "docs").glob("*.md"):
        built = tmp_path / ("" if page.stem == "index" else page.stem) / "index.html"
        assert "<h1" in built.read_text()


ROW = re.compile(r"^\| \[\w+\]\(configs/experiment/(\w+)\.yaml\) \| (.*) \| (\d+) \| (\d+) \|", re.MULTILINE)


def test_the_table_of_experiments_says_what_their_numbers_do() -> None:
    """Each row's verdict, seeds and runs follow from the JSON that it links."""
    rows = ROW.findall((REPOSITORY / "README.md").read_text())
    assert {name for name, *_ in rows} == {path.stem for path in (REPOSITORY / "docs/experiments").glob("*.json")}
    words = {True: "holds here", False: "does not hold here", None: "cannot be judged"}
    for name, said, seeds, runs in rows:
        data = read_result(REPOSITORY / f"docs/experiments/{name}.json")
        found = verdict(data)
        assert said == f"**{words[found.holds]}**: {found.claim}. {found.evidence}"
        assert (int(seeds), int(runs)) == (len({run["seed"] for run in data["runs"]}), len(data["runs"]))
