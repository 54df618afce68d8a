"""What separates runs of train.py: the README's studies, as tables, fits and plots.

    python tests/study.py compare runs/study-* --plot x.png                     # runs side by side
    python tests/study.py sweep runs/demo --option guidance --values 1,3,7      # drawings, value by value
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import sample  # noqa: E402


class Trained(NamedTuple):
    """What a run of train.py says about itself."""
    config: dict
    size: int                               # parameters of the blocks
    curve: list[tuple[float, dict]]         # (FLOPs so far, held-out losses)
    results: dict[str, float]               # the last losses, and the scores


def read_runs(path) -> list[Trained]:
    """A run folder, or a .json file of runs that an earlier comparison saved."""
    if str(path).endswith(".json"):
        text = data.read_utf8(path)
        with sample.naming_file(path):
            return [Trained(**run) for run in json.loads(text)]
    folder = Path(path)
    text = data.read_utf8(folder / "config.json")
    weights = sample.read_model(folder / "model.pt")["model"]
    with sample.naming_file(folder / "config.json"):
        config = json.loads(text)
        tokens = config["rows"] * config["context"]         # of a step
    size = sum(tensor.numel() for name, tensor in weights.items() if ".layers." in name)
    curve, scores = [], {}
    with sample.naming_file(folder / "log.jsonl"):
        for _, line in data.read_rows(folder / "log.jsonl"):
            losses = {name: loss for name, loss in line.items() if name.startswith("val_")}
            if losses:
                curve.append((6 * size * line["step"] * tokens, losses))        # 2 FLOPs forward, 4 backward
            scores |= {name: score for name, score in line.get("scores", {}).items() if score is not None}
        if not curve:
            raise ValueError("no held-out loss in it")
    return [Trained(config, size, curve, curve[-1][1] | scores)]


def grouped(runs) -> tuple[list[str], dict[tuple, list[Trained]]]:
    """Runs that differ only in their seed are a group -> flags that tell groups apart, {values: runs}."""
    ignored = "seed", "out", "shards", "resume", "overwrite", "device"
    given = dict.fromkeys(flag for run in runs for flag in run.config if flag not in ignored)
    flags = [flag for flag in given if len({str(run.config.get(flag)) for run in runs}) > 1]
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(str(run.config.get(flag)) for flag in flags)].append(run)
    return flags, dict(sorted(groups.items(), key=lambda group: (group[1][0].size, group[0])))


def fit_power(x, y, floor=0.0):
    """y = floor + a x^b by least squares of the logarithms -> b, R squared of log y."""
    x, y = np.asarray(x), np.asarray(y)
    b, log_a = np.polyfit(np.log(x), np.log(y - floor), 1)
    return b, np.corrcoef(np.log(floor + np.exp(log_a) * x ** b), np.log(y))[0, 1] ** 2


def mean_and_spread(values) -> str:
    """With the standard deviation over seeds."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if values else "-"


def print_table(header, rows):
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def print_comparison(flags, groups, names):
    """A table with one line for each group."""
    rows = []
    for key, runs in groups.items():
        values = ([run.results[name] for run in runs if name in run.results] for name in names)
        rows.append([*key, f"{runs[0].size:,}", len(runs), *map(mean_and_spread, values)])
    print_table([*flags, "parameters", "seeds", *names], rows)


def print_laws(groups, loss, score):
    """The loss as a power of compute, if the sizes differ, and the score as a line in the loss."""
    runs = [run for group in groups.values() for run in group if loss in run.results]
    if len({run.size for run in runs}) > 3:
        ends = [run.curve[-1][0] for run in runs], [run.results[loss] for run in runs]      # FLOPs, losses
        power, r2 = fit_power(*ends)
        print(f"{loss} ~ FLOPs^{power:.3f} at the end of training (R squared {r2:.3f}, {len(runs)} runs)")
        floors = np.linspace(0, min(ends[1]), 200, endpoint=False)
        floor = max(floors, key=lambda floor: fit_power(*ends, floor)[1])
        power, r2 = fit_power(*ends, floor)
        law = f"{loss} ~ {floor:.3f} + a FLOPs^{power:.3f}"
        print(f"{law} with the floor that fits best (R squared {r2:.3f})")
    scored = [(run.results[loss], run.results[score]) for run in runs if score in run.results]
    if len(scored) > 2:
        slope, r2 = np.polyfit(*zip(*scored), 1)[0], np.corrcoef(*zip(*scored))[0, 1] ** 2
        print(f"{score} ~ {slope:.3f} {loss} (R squared {r2:.3f}, {len(scored)} runs)")


def plot_comparison(flags, groups, loss, score, path):
    """Left: held-out loss along training. Right: the score that each run ended with."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (key, runs) in enumerate(groups.items()):
        look = dict(color=f"C{number % 10}", marker=".")
        label = ", ".join(f"{flag} {value}" for flag, value in zip(flags, key))
        for run in runs:
            points = ((flops, losses[loss]) for flops, losses in run.curve if loss in losses)
            left.plot(*zip(*points), **look, alpha=0.7)
        ends = [run.results for run in runs if {loss, score} <= run.results.keys()]
        right.plot([x[loss] for x in ends], [x[score] for x in ends], **look, linestyle="", label=label)
    left.set(xscale="log", yscale="log", ylabel=loss)
    left.set_xlabel("FLOPs of training (6 x parameters of blocks x tokens)")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.xaxis.set_minor_formatter("")          # labels of both would overlap
    right.set(xlabel=loss, ylabel=score)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def compare(paths, loss="val_t2i", score="t2i_exact", show=None, plot=None, save=None):
    """Print, draw and keep what separates runs of train.py."""
    runs = [run for path in paths for run in read_runs(path)]
    flags, groups = grouped(runs)
    names = show.split(",") if show else dict.fromkeys(name for run in runs for name in run.results)
    print_comparison(flags, groups, names)
    print_laws(groups, loss, score)
    if plot:
        plot_comparison(flags, groups, loss, score, plot)
    if save:
        kept = [run._asdict() for run in runs]
        for run in kept:
            run["config"] = {flag: run["config"].get(flag) for flag in (*flags, "seed")}
        data.write_atomically(save, lambda file: file.write(json.dumps(kept).encode()))


def sweep(paths, option, values, n=200, plot=None, save=None):
    """Score drawings of n scenes, and of n with unseen combinations, for each value of an option."""
    if n < 1:
        raise ValueError(f"--n {n}: expected a number from 1")
    runs, values = [sample.load(path) for path in paths], values.split(",")
    if any("withheld" not in run.config or run.config["data"] for run in runs):
        raise ValueError(f"sweep {' '.join(paths)}: only runs of train.py on built-in scenes can be scored")
    base = runs[0].sampling
    if option in ("top_k", "top_p") and base.temperature == 0:
        base = replace(base, temperature=1.0)       # greedily, these two would change nothing
    try:
        choices = [replace(base, **{option: type(getattr(base, option))(value)}) for value in values]
    except ValueError as error:
        raise ValueError(f"--values {','.join(values)}: {error}") from None
    if len({run.config["withheld"] for run in runs}) > 1:
        raise ValueError(f"sweep {' '.join(paths)}: runs with different --withheld saw different scenes")
    splits = data.built_in(0, runs[0].side, runs[0].config["withheld"], train=1, val=n, unseen=n)
    scenes = {"t2i_exact": splits["val"].pictures, "t2i_unseen_combinations": splits["unseen"].pictures}
    wanted = {name: ([p.captions[0] for p in pictures if p.captions], [p.scene for p in pictures if p.captions])
              for name, pictures in scenes.items() if pictures}
    rows, sheet = [], []
    for value, choice in zip(values, tqdm(choices, desc=option)):
        rows.append({option: value})
        for name, (prompts, truth) in wanted.items():
            drawn = (sample.text_to_image(run, prompts, choice) for run in runs)
            rows[-1][name] = [sample.score_drawings(images, truth)[0] for images in drawn]
        if plot:
            sheet += sample.text_to_image(runs[0], [max(wanted["t2i_exact"][0], key=len)] * 8, choice)
    print_table(rows[0], [[row[option], *(mean_and_spread(row[name]) for name in wanted)] for row in rows])
    if plot:
        data.contact_sheet(sheet, 8).save(plot)
    if save:
        data.write_atomically(save, lambda file: file.write(json.dumps(rows).encode()))


def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("compare")
    p.add_argument("paths", nargs="+", metavar="RUN", help="a run folder, or what --save wrote")
    p.add_argument("--loss", default="val_t2i", help="of log.jsonl")
    p.add_argument("--score", default="t2i_exact", help="of eval")
    p.add_argument("--show", metavar="NAME,NAME", help="columns of the table; usually all losses and scores")
    p.add_argument("--plot", metavar="PNG")
    p.add_argument("--save", metavar="JSON", help="the numbers, without the runs")
    p = commands.add_parser("sweep")
    p.add_argument("paths", nargs="+", metavar="RUN", help="trained on built-in scenes")
    p.add_argument("--option", choices=["guidance", "temperature", "top_k", "top_p"], default="guidance")
    p.add_argument("--values", required=True, metavar="X,Y", help="numbers between commas")
    p.add_argument("--n", type=int, default=200, help="held-out scenes")
    p.add_argument("--plot", metavar="PNG", help="a row of drawings of the longest prompt for each value")
    p.add_argument("--save", metavar="JSON")
    return top


def main(argv=None):
    args = vars(parser().parse_args(argv))
    try:
        {"compare": compare, "sweep": sweep}[args.pop("command")](**args)
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
