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
    """The arguments of each call of a program in the README, with a loop's first values."""
    text = re.sub(r"#.*|\\\n|\"\$@\"", "", (ROOT / "README.md").read_text())
    for name, value in re.findall(r"for (\w+) in ([^\s;]+)", text):
        text = re.sub(rf"\${name}\b", value, text)
    lines = [line for line in re.findall(rf"(?:{program})(.*)", text) if "`" not in line]
    return [shlex.split(re.split("[;|]", line)[0]) for line in lines]


def test_every_training_command_of_the_readme_parses(tmp_path, monkeypatch):
    """A flag that was renamed, or never was."""
    monkeypatch.chdir(tmp_path)
    calls = commands(r"train\.py|study(?= --)")
    assert len(calls) >= 15
    for argv in calls:
        train.configure(argv)


def test_every_sampling_command_of_the_readme_parses():
    assert len(commands(r"sample\.py")) >= 12
    for argv in commands(r"sample\.py"):
        sample.parser().parse_args(argv)


def test_ci_runs_the_commands_of_the_readme():
    ci, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    assert 'pip install -e ".[test]"' in ci and 'pip install -e ".[test]" && pytest' in readme
