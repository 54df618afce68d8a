"""The shape of the project: who imports whom, and commands in the README that exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import sample
import train

ROOT = Path(__file__).parent.parent
ARROWS = {"vqgan": set(), "model": set(), "data": set(), "sample": {"data", "vqgan", "model"},
          "train": {"data", "vqgan", "model", "sample"}}


@pytest.mark.parametrize("name", ARROWS)
def test_each_file_imports_only_what_stands_below_it(name):
    """A cycle, or a ground floor that knows its upper floors."""
    tree, found = ast.parse((ROOT / f"{name}.py").read_text()), set()
    for node in ast.walk(tree):
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert found & set(ARROWS) <= ARROWS[name] and (name == "train" or "torch.distributed" not in found)


def test_there_are_five_source_files_at_the_top():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ARROWS)


def commands(program):
    """The arguments of each call of a program in the README, in blocks or within a line, with a loop's first values."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
    prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
    within = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
    text = re.sub(r"#.*|\\\n|\"\$@\"", "", "\n".join(blocks + within))
    for name, value in re.findall(r"for (\w+) in ([^\s;]+)", text):
        text = re.sub(rf"\${name}\b", value, text)
    lines = re.findall(rf"\b(?:{program})( .*|$)", text, re.MULTILINE)
    return [shlex.split(re.split("[;|]", line)[0]) for line in lines if line.strip() != "--help"]


def test_every_training_command_of_the_readme_parses(tmp_path, monkeypatch):
    """A flag that was renamed, or never was."""
    monkeypatch.chdir(tmp_path)
    calls = commands(r"(?:python|torchrun.*) train\.py|study(?= --)|vq(?= --)")
    assert len(calls) >= 20 and [] in calls         # one within a line
    for argv in calls:
        train.configure(argv)


def test_every_sampling_command_of_the_readme_parses():
    """A command that was renamed, or an argument that it does not take."""
    calls = commands(r"(?:python|torchrun.*) sample\.py")
    assert len(calls) >= 12
    for argv in calls:
        sample.parser().parse_args(argv)


def test_the_readme_counts_the_lines_of_the_five_files():
    """Files that grow while the README goes on promising short ones."""
    said = re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: int(n) for name, n in said} == {p.stem: len(p.read_text().splitlines()) for p in ROOT.glob("*.py")}


def test_ci_runs_the_commands_of_the_readme():
    """A green mark from a run that installed something else, or tested nothing."""
    ci, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    assert 'pip install -e ".[test]" && pytest' in readme
    assert ci.index("\nset -e") < ci.index('\npip install -e ".[test]"\n') < ci.index("\npytest\n")
