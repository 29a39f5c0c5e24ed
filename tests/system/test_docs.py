"""The README and docs/: their examples run, their links lead somewhere, nothing is left unsaid."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gmm_dist.commands import cli
from gmm_dist.lake.filters.text import parse

pytestmark = pytest.mark.unchecked  # whole fits

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_CLUSTER, _NOT_RUN = "runs on: a Ray cluster", "not run: "


@dataclass(frozen=True)
class Block:
    """A piece of code of a page, and the comment above it, which says how it is to be run."""

    language: str
    text: str
    line: int
    mark: str | None


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = [
        Block(m["language"], m["text"], text[: m.start("text")].count("\n"), m["mark"])
        for m in _BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def wants_cluster(page: Path) -> bool:
    return any(block.mark == _CLUSTER for block in blocks(page, "python"))


def name(page: Path) -> str:
    return page.name


def run(page: Path) -> None:
    """Run a page's examples one after the other, as a reader would type them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        assert block.mark is None or block.mark == _CLUSTER or block.mark.startswith(_NOT_RUN)
        if block.mark is not None and block.mark.startswith(_NOT_RUN):
            continue
        if not block.text.startswith(">>>"):
            source = "\n" * block.line + block.text  # tracebacks name the page's lines
            exec(compile(source, str(page), "exec"), names)
            continue
        parsed = doctest.DocTestParser().get_doctest(
            block.text, names, page.name, str(page), block.line
        )
        assert parsed.examples
        report = io.StringIO()
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(parsed, out=report.write, clear_globs=False)
        names = parsed.globs
        assert runner.failures == 0, report.getvalue()


with_examples = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", [p for p in with_examples if not wants_cluster(p)], ids=name)
def test_the_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.long  # workers start, for one small fit
@pytest.mark.parametrize("page", [p for p in with_examples if wants_cluster(p)], ids=name)
def test_the_examples_of_a_page_run_on_a_cluster(
    page: Path, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    monkeypatch.chdir(tmp_path)
    run(page)


def test_few_examples_are_not_run() -> None:
    marks = [block.mark for page in PAGES for block in blocks(page, "python")]
    assert len(marks) >= 10
    assert sum(mark is not None and mark.startswith(_NOT_RUN) for mark in marks) <= 2


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges make them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue  # of other sites nothing is asked
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found), target
    for path in re.findall(r"\bpython (\w+/\S+\.py)\b", page.read_text()):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"\bpython -m\s(tools\.\w+)", page.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_tools_start() -> None:
    """As a reader starts them: without the paths that pytest adds."""
    text = "".join(page.read_text() for page in (*PAGES, ROOT / "CONTRIBUTING.md"))
    modules = sorted(set(re.findall(r"\bpython -m\s(tools\.\w+)", text)))
    assert len(modules) >= 4
    command = [sys.executable, "-c"]
    running = {
        module: subprocess.Popen(
            [*command, f"import {module}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for module in modules
    }
    said = {module: process.communicate()[1] for module, process in running.items()}
    assert {module: process.returncode for module, process in running.items()} == dict.fromkeys(
        modules, 0
    ), said


def test_the_site_has_every_page_once() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(page.name for page in PAGES[1:])


def test_filters_can_be_read() -> None:
    section = (ROOT / "docs" / "lakes.md").read_text().partition("## Filter rows")[2]
    table = section.partition("\n## ")[0]
    examples = re.findall(r"^\| .* \| (`.*`) \|$", table, re.M)
    filters = [text for cell in examples for text in re.findall(r"`([^`]+)`", cell)]
    filters += [text for line in commands() for text in re.findall(r'--where "([^"]+)"', line)]
    assert len(filters) >= 8
    for text in filters:
        assert parse(text).columns


def tool(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Return a command of tools/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


JOBS = ("fit", "sweep", "score", "nightly", "verify")


@pytest.fixture(scope="module")
def helped() -> dict[str, set[str]]:
    """Return the options that each job's --help tells of."""
    found = {}
    for job in (None, *JOBS):
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
            cli.main(job, ["--help"])
        found[job or "none"] = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", written.getvalue()))
    return found


def test_the_command_line_has_each_option(helped: dict[str, set[str]]) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    cells = re.findall(r"^\| (.*?) \|", page, re.M)
    told = {option for cell in cells for option in re.findall(r"`(--[a-z][a-z-]*)`", cell)}
    assert told | helped["none"] == set().union(*helped.values())
    for option in helped["none"]:
        assert option in page


@pytest.mark.parametrize("job", JOBS)
def test_commands_have_only_options_that_there_are(job: str, helped: dict[str, set[str]]) -> None:
    for command in commands():
        if re.search(rf"\bgmm-dist {job}\b|\bjobs/{job}\.py\b", command):
            own = command.partition(job)[2]
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", own)) <= helped[job], command


def commands() -> Iterator[str]:
    """Yield the commands of all pages, each on one line."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            yield from re.sub(r"\\\n\s*", "", block.text).splitlines()


def test_the_architecture_names_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each as it does itself; `python tools/modules.py` writes the list anew."""
    listed = tool(monkeypatch, "modules").listed()
    assert listed in (ROOT / "docs" / "architecture.md").read_text()
    assert listed.count("\n| `") > 50


def test_the_architecture_says_where_things_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## Where is")[2].partition("\n## ")[0]
    paths = re.findall(r"`(\S+\.py)`", section)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / "gmm_dist" / path).is_file(), path


# ---- the pictures ------------------------------------------------------------------------------


def test_a_terminal_is_drawn_without_anything_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tool(monkeypatch, "pictures")
    svg = pictures.terminal("\x1b[1mbest\x1b[0m by BIC\n", "gmm-dist sweep <a> & b")
    assert "best" in svg
    assert "&lt;a&gt;&#160;&amp;" in svg
    assert "url(http" not in svg
    assert "@font-face" not in svg
    assert 'class="sweep-r' in svg


def test_the_pictures_are_small() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert sum(image.stat().st_size for image in images) < 300_000
    page = "".join(page.read_text() for page in PAGES)
    assert all(f"images/{image.name}" in page for image in images)
