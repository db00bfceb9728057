"""README.md and docs/: code and commands run, paths and links lead somewhere, versions agree."""

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

import fastrnn
from fastrnn import __main__ as command_line

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What a build, a benchmark or an example writes.
WRITTEN = ("bench/results/latest", "examples/out")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    title: str
    text: str


def blocks(page, *languages):
    found = re.finditer(
        r"^```(\w+)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", page.read_text(), re.M | re.S
    )
    return [
        Block(str(page.relative_to(ROOT)), match[1], match[2] or "", match[3])
        for match in found
        if match[1] in languages
    ]


def with_blocks(*languages):
    return [name for page, name in zip(PAGES, NAMES, strict=True) if blocks(page, *languages)]


def test_there_are_blocks_of_every_kind():
    assert len(with_blocks("python")) >= 15
    assert len(with_blocks("console")) >= 2
    assert len(with_blocks("sh")) >= 3
    assert any(block.title for page in PAGES for block in blocks(page, "python"))


def test_every_block_says_what_it_is():
    for page in PAGES:
        languages = re.findall(r"^```(.*)$", page.read_text(), re.M)[::2]
        assert {language.partition(" ")[0] for language in languages} <= {
            "python", "console", "sh", "text", "yaml", "json",
        }, page  # fmt: skip


@pytest.mark.parametrize("name", with_blocks("python"))
def test_python(name, tmp_path, monkeypatch):
    """All blocks of a page run in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(ROOT / name, "python"):
        if not block.title:
            exec(compile(block.text, name, "exec"), namespace)


def test_excerpts():
    """A block with a file for a title is an excerpt of that file."""
    for page in PAGES:
        for block in blocks(page, "python", "yaml", "text"):
            if block.title:
                source = (ROOT / block.title).read_text()
                lines = textwrap.dedent(block.text).strip().splitlines()
                indents = {len(line) - len(line.lstrip()) for line in source.splitlines()}
                assert any(
                    "\n".join(" " * indent + line if line else "" for line in lines) in source
                    for indent in indents
                ), (block.page, block.title)


@pytest.mark.parametrize("name", with_blocks("console"))
def test_console(name, capsys):
    """Commands print what a page shows; ``...`` is for what depends on the machine."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for block in blocks(ROOT / name, "console"):
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            program, *arguments = shlex.split(command)
            assert program == "fastrnn", command
            assert command_line.main(arguments) == 0, command
            printed = capsys.readouterr().out
            assert doctest.OutputChecker().check_output(expected, printed, flags), (
                f"{command}\nprints\n{printed}\nand {name} has\n{expected}"
            )


def commands(name):
    for block in blocks(ROOT / name, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # FOO=bar command
                del words[0]
            if words:
                yield words


@pytest.mark.parametrize("name", with_blocks("sh"))
def test_commands(name, monkeypatch):
    """What readers are told to type exists, and takes the options shown."""
    for key, (help_text, add_arguments, _) in command_line._COMMANDS.items():
        ran = (help_text, add_arguments, lambda args: 0)
        monkeypatch.setitem(command_line._COMMANDS, key, ran)
    for words in commands(name):
        check_command(words, monkeypatch)


def check_command(words, monkeypatch):
    match words:
        case ["fastrnn", *arguments]:
            assert command_line.main(arguments) == 0, words
        case ["make", *targets]:
            done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True)
            assert done.returncode == 0, words
        case ["pip", "install", what]:
            extras = re.search(r"\[(.*)\]", what)
            known = metadata.metadata("fastrnn").get_all("Provides-Extra")
            assert set(extras[1].split(",") if extras else []) <= {*known}, words
        case ["python", "-m", "fastrnn", *arguments]:
            check_command(["fastrnn", *arguments], monkeypatch)
        case ["python", "-m", module, *options]:
            spec = importlib.util.find_spec(module)
            assert spec is not None, words
            assert_has_options(Path(spec.origin), options)
        case ["python", script, *options]:
            assert_has_options(ROOT / script, options)
        case ["torchrun", *options] if any((ROOT / word).is_file() for word in options):
            known = ("--standalone", "--nproc-per-node", "--nnodes")
            script = next(word for word in options if (ROOT / word).is_file())
            own = [word for word in options if not word.startswith(known)]
            assert_has_options(ROOT / script, own)
        case ["pytest", *arguments] | ["python", "-m", "pytest", *arguments]:
            for path in arguments:
                assert path.startswith("-") or (ROOT / path).exists(), words
        case ["git" | "cd" | "rm" | ".ci/run", *_]:
            pass
        case _:
            raise AssertionError(f"a command that no test knows: {shlex.join(words)}")


def assert_has_options(script, options):
    text = script.read_text() + (ROOT / "examples" / "common.py").read_text()
    for option in options:
        if option.startswith("--"):
            assert f'"{option.partition("=")[0]}"' in text, (script, option)


def test_commands_that_do_not_exist_are_noticed(monkeypatch):
    for line in (
        "fastrnn bench --no-such-option", "make no-such-target", "pip install .[no-such-extra]",
        "python -m fastrnn.bench.no_such_module", "python examples/char_lm.py --no-such-option",
        "no-such-program",
    ):  # fmt: skip
        with pytest.raises((AssertionError, SystemExit)):
            check_command(shlex.split(line), monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_paths(name):
    """Files of the repository that a page names exist, with the tests it names in them."""
    text = (ROOT / name).read_text()
    folders = "fastrnn|kernels|bench|tests|examples|docs|.github|.ci"
    for path, test in re.findall(rf"`((?:{folders})/[\w./*-]*)(?:::(\w+))?`", text):
        assert path.startswith(WRITTEN) or "NAME" in path or any(ROOT.glob(path.rstrip("/"))), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), (path, test)


@pytest.mark.parametrize("name", [*NAMES, "examples/README.md", "tests/ptx/README.md"])
def test_links(name):
    """Links and pictures lead to files; pages of the site stay below docs."""
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if re.match(r"https?://|#", target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), (name, target)
        assert DOCS in path.parents or DOCS not in page.parents, (name, target)


def test_features_are_tests():
    """Every row of the table of features names a test."""
    rows = re.findall(r"^\|.*\|$", (DOCS / "comparison.md").read_text(), re.M)
    named = [row for row in rows if re.search(r"`tests/test_\w+\.py::test_\w+` \|$", row)]
    assert len(named) > 20


def drawing_scripts():
    return [path for path in sorted((DOCS / "pictures").glob("*.py")) if path.stem != "drawing"]


@pytest.mark.parametrize("path", drawing_scripts(), ids=lambda path: path.stem)
def test_drawings(path, monkeypatch):
    """Every SVG is what its script writes, and none is left over."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.delitem(sys.modules, "drawing", raising=False)
    spec = importlib.util.spec_from_file_location(f"pictures_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, drawing in module.drawings().items():
        assert (path.parent / f"{name}.svg").read_text() == str(drawing), name


def test_every_drawing_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    for path in (DOCS / "pictures").glob("*.svg"):
        assert f"pictures/{path.name}" in text, path


def test_version_is_the_same_everywhere():
    version = fastrnn.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (DOCS / "changelog.md").read_text()
    assert re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.M)[1] == version
    date = re.search(rf"^## {re.escape(version)} . (\S+)$", changelog, re.M)[1]
    assert f"date-released: {date}\n" in (ROOT / "CITATION.cff").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
