"""Empty one idea of the five files, write it again yourself, and let its tests teach you.

    python tests/blank.py --list            # the names, in the order of the paper's story
    python tests/blank.py guidance          # sample.guide loses its body; prints what to read, and its tests
    pytest -m guidance                      # red until your own body is right
    python tests/blank.py guidance --back   # the project's body again; yours is kept in blanks/
"""

import argparse
import ast
import os
import re
import sys
import textwrap
from collections import namedtuple
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
Idea = namedtuple("Idea", "name file function source background")      # its name is a marker of pytest, too
IDEAS = {idea[0]: Idea(*idea) for idea in (
    ("straight_through", "vqgan.py", "Quantizer.forward", "van den Oord et al., arXiv 1711.00937, 3.2",
     "Rounding to a row has no slope, so z gets the gradient of z_q as it is. The loss pulls rows to "
     "vectors, and beta times as much vectors to rows; with l2_norm it is multiplied by e."),
    ("nearest_code", "vqgan.py", "nearest", "van den Oord et al., arXiv 1711.00937, equation 1",
     "A picture becomes integers: each vector is replaced by the number of its nearest centre. In "
     "|v|^2 - 2 v.c + |c|^2 the first term is the same for all centres."),
    ("code_to_id", "data.py", "Vocab.codes_to_ids", "Liquid, arXiv 2412.04332, its architecture",
     "The rows of codes stand behind the rows of words, so code c is the id image_start + c. Any other "
     "number is an error: who clamps it hides a mistake."),
    ("t2i_template", "data.py", "render_t2i", "Liquid, arXiv 2412.04332, its data",
     "The order makes the task: bos, caption + DRAW (or <unconditional> instead), <boi>, codes, <eoi>, eos. "
     "The model learns all from the codes on."),
    ("packed_rows", "model.py", "mask_mod", "Vaswani et al., arXiv 1706.03762, 3.2.3",
     "Several examples share a row. visible(b, head, query, key) lets a query see itself and earlier keys "
     "of its example: not the neighbours, not the padding, and with a window only the last keys."),
    ("rotary", "model.py", "rotate", "Su et al., arXiv 2104.09864, 3.2",
     "Each pair of numbers (i, i + d/2) turns by an angle that grows with the position. The product of a "
     "query and a key then knows only their distance."),
    ("table_logits", "model.py", "Table.logits", "Liquid, arXiv 2412.04332, its architecture",
     "There is no second head: the logit of a word or a code is x times its row. The parts of the table "
     "stand one behind the other, and `rows` may ask for a range of them."),
    ("answer_loss", "data.py", "sequence", "Liquid, arXiv 2412.04332, its training",
     "All parts make one sequence of ids. The target at a place is the next id if that one is learned, "
     "else IGNORE: the model learns answers, not prompts."),
    ("guidance", "sample.py", "guide", "Ho and Salimans, arXiv 2207.12598, 3.2",
     "The model reads the prompt, and beside it <unconditional>. Guidance starts at the unconditional "
     "logits and goes `scale` times the way to the conditional ones."),
    ("top_k_top_p", "sample.py", "choose", "Holtzman et al., arXiv 1904.09751, 3",
     "Divide logits by the temperature; keep the k likeliest, and of all the fewest that reach p. Choose "
     "the first whose cumulative probability, among those kept, exceeds the uniform number."),
    ("schedule", "train.py", "schedule", "Loshchilov and Hutter, arXiv 1608.03983, equation 5",
     "The rate rises in a straight line, stays at 1, and falls to 0 as half a wave of a cosine."),
    ("cache", "model.py", "Attention.forward", "Shazeer, arXiv 1911.02150, 2",
     "Keys and values of earlier tokens are kept. Make q, k, v; split heads; norm and rotate q and k. A "
     "cache takes k and v at `slots` and gives those of all slots. Attend, join heads, o_proj."))}


def find(idea):
    """-> lines of the file, the slice of them that is the function, its syntax tree."""
    text = (ROOT / idea.file).read_bytes().decode()
    try:
        node = ast.parse(text)
        for name in idea.function.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == name)
    except SyntaxError as error:
        sys.exit(f"{idea.file}, line {error.lineno}: {error.msg}. Mend it first; nothing was changed")
    except StopIteration:
        sys.exit(f"{idea.file}: no {idea.function}. Write its `def` line first; nothing was changed")
    return text.split("\n"), slice(node.lineno - 1, node.end_lineno), node


def emptied(idea, function):
    """Lines of a function -> its signature, its docstring and a sentence that is raised."""
    body = ast.parse(textwrap.dedent("\n".join(function))).body[0].body
    first = body[ast.get_docstring(ast.Module(body, [])) is not None].lineno - 1
    indent = " " * (function[0].index("def") + 4)
    task = f"{idea.background} Test: pytest -m {idea.name}. Back: python tests/blank.py {idea.name} --back"
    said = "\n".join(f'{indent}    "{line} "' for line in textwrap.wrap(task, 92))
    return function[:first] + f'{indent}raise NotImplementedError(\n{said[:-2]}")'.split("\n")


def write(path, lines):
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes("\n".join(lines).encode())
    os.replace(unfinished, path)            # all or nothing


def blank(idea):
    """Put the project's body away; refuse where a body is the student's."""
    (lines, place, node), kept = find(idea), ROOT / "blanks" / f"{idea.name}.py"
    if not all(isinstance(line, (ast.Raise, ast.Expr, ast.Pass)) for line in node.body):
        if kept.exists() and kept.read_bytes().decode().split("\n") != lines[place]:
            sys.exit(f"{idea.function} holds your body; `python tests/blank.py {idea.name} --back` keeps it")
        kept.parent.mkdir(exist_ok=True)
        write(kept, lines[place])
        lines[place] = emptied(idea, lines[place])
        write(ROOT / idea.file, lines)
    print(f"{idea.file}, line {node.lineno}: {idea.function} is blank.", textwrap.fill(idea.background, 100),
          f"Read: {idea.source}.", "These tests speak of it:", sep="\n")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_bytes().decode()
        for test in ast.walk(ast.parse(text if f"mark.{idea.name}" in text else "")):
            marks = " ".join(map(ast.unparse, getattr(test, "decorator_list", ())))
            if re.search(rf"\bmark\.{idea.name}\b", marks):
                print(f"    {path.name}: {test.name}")
    print(f"Write the body, then: pytest -m {idea.name} (with -x it ends at the first mistake)")


def back(idea):
    """The project's body again; one that is neither this nor the blank is kept in a file of its own."""
    (lines, place, _), kept = find(idea), ROOT / "blanks" / f"{idea.name}.py"
    if not kept.exists():
        sys.exit(f"{idea.name}: nothing was put away (if it is blank, see `git checkout {idea.file}`)")
    own, project = lines[place], kept.read_bytes().decode().split("\n")
    if own not in (project, emptied(idea, project)):
        mine = next(p for i in count(1) if not (p := kept.with_name(f"{idea.name}.mine{i}.py")).exists())
        write(mine, own)
        print(f"your body is kept in {mine.relative_to(ROOT)}")
    lines[place] = project
    write(ROOT / idea.file, lines)
    kept.unlink()
    print(f"{idea.file}: {idea.function} is the project's again")


def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("name", nargs="?", choices=IDEAS)
    top.add_argument("--back", action="store_true", help="the project's body again; yours is kept")
    top.add_argument("--list", action="store_true", help="the names, one a line")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    if not args.list and not args.name:
        parser().error("which idea? --list prints the names")
    print(*IDEAS, sep="\n") if args.list else (back if args.back else blank)(IDEAS[args.name])


if __name__ == "__main__":
    main()
