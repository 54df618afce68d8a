"""The shape of the project: who imports whom, how long it is, and commands of its pages that exist."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import blank
import sample
import study
import train

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", ROOT / "assets" / "README.md", ROOT / "assets" / "COURSE.md",
          ROOT / "tests" / "README.md")}
README, EVERY = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
ARROWS = {"vqgan": set(), "model": set(), "data": set(), "sample": {"data", "vqgan", "model"},
          "train": {"data", "vqgan", "model", "sample"}}


def imported(nodes):
    """Dotted names of all that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ARROWS)
def test_each_file_imports_only_what_stands_below_it(name):
    """A cycle, a ground floor that knows its upper floors, or a core file that needs an extra to be imported."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    every, top = list(imported(ast.walk(tree))), list(imported(tree.body))
    assert {m.split(".")[0] for m in every} & set(ARROWS) <= ARROWS[name]
    assert name == "train" or not any(m.startswith("torch.distributed") for m in every)
    assert {m.split(".")[0] for m in top} <= {"torch", "numpy", "PIL", "tqdm", *ARROWS[name], *sys.stdlib_module_names}


def test_there_are_five_source_files_at_the_top():
    """A sixth file that no reader was told of."""
    assert {p.stem for p in ROOT.glob("*.py")} == set(ARROWS)


def commands(program):
    """The arguments of each call of a program in the pages, in blocks or within a line; a loop's first values."""
    blocks = re.findall(r"```\w*\n(.*?)```", EVERY, re.DOTALL)
    prose = re.sub(r"```.*?```", "", EVERY, flags=re.DOTALL)
    within = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
    text = re.sub(r"#.*|\\\n|\"\$@\"", "", "\n".join(blocks + within))
    for name, value in re.findall(r"for (\w+) in ([^\s;]+)", text):
        text = re.sub(rf"\${name}\b", value, text)
    lines = re.findall(rf"\b(?:{program})( .*|$)", text, re.MULTILINE)
    return [shlex.split(re.split("[;|]", line)[0]) for line in lines if line.strip() != "--help"]


def test_every_training_command_parses(tmp_path, monkeypatch):
    """A flag that was renamed, or never was."""
    monkeypatch.chdir(tmp_path)
    calls = commands(r"(?:python|torchrun.*) train\.py|study(?= --)|vq(?= --)")
    assert len(calls) >= 20 and [] in calls         # one within a line
    for argv in calls:
        train.configure(argv)


def test_every_flag_has_a_help_and_no_line_is_too_long():
    """A flag that --help shows without a word, or lines that a projector cuts."""
    assert all(action.help for action in train.parser()._actions)
    for path in ROOT.glob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 110, path
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("program, parser", [
    ("sample", sample.parser()), ("tests/study", study.parser()), ("tests/blank", blank.parser())])
def test_every_other_command_parses(program, parser):
    """A command that was renamed, or an argument that it does not take."""
    calls = commands(rf"(?:python|torchrun.*) {program}\.py")
    assert len(calls) >= 6
    for argv in calls:
        parser.parse_args(argv)


def test_every_marker_is_known():
    """A page that asks for tests of an idea that has another name, of which pytest runs none."""
    named = set(re.findall(r"pytest -m (\w+)", EVERY)) - {"slow", "NAME"}
    assert named and named <= set(blank.IDEAS)


def test_the_readme_counts_the_lines_of_the_five_files():
    """Files that grow while the README goes on promising short ones."""
    said = {name: int(n) for name, n in re.findall(r"^\| `(\w+)\.py` \| about (\d+) \|", README, re.MULTILINE)}
    assert said == {p.stem: pytest.approx(len(p.read_text().splitlines()), rel=0.05) for p in ROOT.glob("*.py")}


def test_the_tables_of_the_studies_follow_from_their_numbers(capsys, monkeypatch):
    """A figure that was mistyped, or that is left over from an earlier run."""
    monkeypatch.setattr(study, "print_laws", lambda *_: None)       # the fits, which take seconds
    files = [p for p in (ROOT / "assets").glob("*.json") if '"config"' in p.read_text()]     # others are of sweep
    tables = re.findall(r"^(\| .*\bseeds \| (.*) \|\n\| ---.*\n)((?:\|.*\n)+)", EVERY, re.MULTILINE)
    assert len(tables) >= 7
    for head, names, rows in tables:
        for file in files:
            study.compare([file], show=names.replace(" | ", ","))
        assert head + rows in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_link_leads_somewhere(page):
    """A picture that was renamed, or a heading that was reworded."""
    def anchors(path):
        headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert link.startswith("https://") or path.is_file() and (not anchor or anchor in anchors(path)), link


def test_ci_runs_the_commands_of_the_readme():
    """A green mark from a run that installed something else, or tested nothing."""
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[test]" && pytest' in README
    assert ci.index("\nset -e") < ci.index('\npip install -e ".[test]"\n') < ci.index("\npytest\n")
