"""Writes docs/benchmarks.md, its pictures and the lines in README: `python -m benchmarks.report.docs`.

Reads the results in `benchmarks/results`: `<name>.csv` of `benchmarks.run` and `<name>-scaling.csv` of
`benchmarks.scaling`. No number is written by hand. A test compares the pages with the results.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.case import BACKWARD, FORWARD, RECORDED
from benchmarks.kept import read_run
from benchmarks.report.console import GPU_TIMES, WAITS, memory_of_results, seconds
from benchmarks.report.targets import best_peer, reason, verdicts
from benchmarks.scaling import GAIN, SLACK, is_compute_bound, read_scaling

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("<!-- benchmarks: written by python -m benchmarks.report.docs -->", "<!-- end of benchmarks -->")
NO_GPU = "No run on a GPU is kept here: the speed of the CUDA kernels is unknown."
NONE = "No run is kept here yet; `make bench` measures on your machine."
README_CASES = (
    "softmax + top-k",
    "Sinkhorn, one group",
    "k-sparse transport, Adam, one group",
    "dispatch + combine, one group",
    "layer, softmax_token_choice, K=1, one group",
    "layer, soft",
)
HEAD = """# Benchmarks

This page compares the speed of our ops and layers with other ways to compute the same results. Every case has several
*variants*: our code, common torch code, the same torch code under `torch.compile`, and installed packages. Variants run
in one process, in shuffled rounds. Before timing, the results of a variant are checked against ours. The pictures also
show a dense MLP of the same FLOPs, and variants that compute a different function by design. The tables leave out both.

| column | meaning |
|---|---|
| best other variant, forward | the fastest variant, other than ours, that computes the same function |
| ours | time of our forward |
| faster by | time of the best other variant / our time; **bold** if the other variant is faster |
| with gradients | the same ratio for forward and backward together; the best other variant may differ |
| of the floor | the floor / our time of the forward |

- **Ratios** are medians of paired ratios.
- **The floor** is the longest of three times: the times that the FLOPs, the bytes and the exponentials of the case take
  at the machine's ceilings.
- **Ceilings** are the highest rates of the machine for matrix products, copies and exponentials, measured in the same
  run.
- **UNSTABLE** marks a noisy result: two measurements of our code differ by more than 10 %, or the interval of their
  ratio reaches beyond 30 %.
- **Freed memory is kept** means that the C library was told to reuse freed memory, for all variants. By default, the
  system maps large results page by page in every call. This mapping can take longer than writing the results.
- **Packed for oneDNN** means that the experts' weights were packed ahead of time, for torch ops that are not public and
  have no gradient. These variants do not use MKL.
- **bwconrad's form** is Soft MoE, computed as in the repository bwconrad/soft-moe.

Expect a smaller lead on Intel CPUs in cases that are mostly matrix products. On CPUs, experts and Soft MoE use our
matrix products, and most other variants use torch's `mm` and `bmm`, from MKL. On AMD CPUs MKL runs AVX2 code, at half
the speed of the AVX-512 units. On Intel CPUs MKL uses AVX-512. This page has no run on an Intel CPU.
"""
TAIL = """## Measure again

```bash
make bench                                    # every case at its default size, one thread
make bench ARGS="--quick"                     # small sizes, nothing compiled
python -m benchmarks.overhead                 # call overhead of a tiny layer of every router, in seconds
python -m benchmarks.run --full --csv benchmarks/results/NAME.csv          # to keep: with peak memory and more sizes
python -m benchmarks.scaling --csv benchmarks/results/NAME-scaling.csv
python -m benchmarks.report.docs              # this page, its pictures and README's lines
```

The CSV files in [benchmarks/results](../benchmarks/results) have one row per case, direction and variant. A row has the
time, the ratio with its bootstrap 95 % interval, the floor, the memory kept for the backward, and the peak memory.
"""


def table(head: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """Makes a Markdown table. Columns from `numbers` on are aligned right."""
    align = ["---"] * numbers + ["---:"] * (len(head) - numbers)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def on_gpu(run: dict) -> bool:
    return run["machine"]["device"] == "cuda"


def shown(run: dict) -> list[dict]:
    """Selects the results for the table: one thread, default sizes, no call overheads."""
    return [r for r in run["results"] if r["threads"] == 1 and (r["default"] or run["quick"]) and r["op"] != "overhead"]


def best(result: dict) -> dict | None:
    """Returns the fastest variant other than ours that computes the same function."""
    return next((v for v in result["variants"] if v["name"] == best_peer(result)), None)


def lead(result: dict) -> str:
    """Formats how many times faster ours is than the best other variant."""
    found = best(result)
    if found is None:
        return "-"
    ratio = found["ratio"]["median"]
    return (f"{ratio:.2g}x" if ratio >= 1 else f"**{ratio:.2g}x**") + unstable(result)


def unstable(row: dict) -> str:
    return " UNSTABLE" if row["unstable"] else ""


def ratios(run: dict, others: list[dict], only: tuple[str, ...] | None = None) -> str:
    """Makes the table of ratios: a row per case and size, a column for every other run on a CPU."""
    results = {(r["title"], r["size"], r["direction"]): r for r in shown(run)}
    cases = [(title, size) for title, size, way in results if way == FORWARD and (only is None or title in only)]
    common = set.intersection(*(set(size.split()) for _, size in cases)) if cases else set()
    called = any(r["variants"][0]["called_seconds"] for r in results.values())
    rows = []
    for title, size in cases:
        forward, both = results[title, size, FORWARD], results.get((title, size, BACKWARD))
        ours, other = forward["variants"][0], best(forward)
        row = [title, " ".join(part for part in size.split() if part not in common)]
        row.append((other["name"] + (f" ({WAITS})" if other["waits"] else "")) if other else "-")
        row.append(seconds(ours["seconds"]) + (f" ({WAITS})" if ours["waits"] else ""))
        row += [seconds(ours["called_seconds"]) if ours["called_seconds"] else ""] if called else []
        row += [lead(forward), lead(both) if both else "", f"{forward['floor']['seconds'] / ours['seconds']:.0%}"]
        for another in others:
            same = (r for r in shown(another) if r["title"] == title and r["direction"] == FORWARD)
            row.append(next(map(lead, same), ""))
        rows.append(row)
    head = ["case", "size", "best other variant, forward", "ours", *(["of a call"] if called else [])]
    head += ["faster by", "with gradients", "of the floor"]
    head += [f"ISA {other['machine']['isa']}" + (", small sizes" if other["quick"] else "") for other in others]
    note = "n tokens, T tokens per image, E experts, width D, K experts per token"
    note += f"; {', '.join(sorted(common))} in every row. " if common else ". "
    note += "**Bold**: the other variant is faster."
    for other in others:
        note += f" In column ISA {other['machine']['isa']}, only our kernels are limited to this level."
        note += " This column has the sizes of `--quick`, and no `torch.compile`." if other["quick"] else ""
    return f"{note}\n\n{table(head, rows, 3)}"


def where(run: dict) -> str:
    """Makes the table of machine, versions and ceilings."""
    machine, rates = run["machine"], run["ceilings"][0]["ceilings"]
    rows = [["date", machine["date"]]]
    if not on_gpu(run):
        rows.append(["CPU", f"{machine['cores']} cores, ISA {machine['isa']}"])
        rows.append(["memory", memory_of_results(machine)])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())])
    products = f"{max(rates['gemm'], rates['gemm_layer']) / 1e9:.4g} GFLOP/s"
    products += f", in bfloat16 {rates['gemm_bfloat16'] / 1e9:.4g} GFLOP/s" if rates["gemm_bfloat16"] else ""
    copies = ", ".join(f"{name} {rate / 1e9:.3g} GB/s" for name, rate in rates["copy"].items())
    rows.append(["ceiling of matrix products", products])
    rows.append(["ceiling of copies, bytes read and written", copies])
    rows.append(["ceiling of exponentials", f"{rates['exp'] / 1e9:.3g} G/s"])
    return table(["measured on", machine["name"]], rows, 2)


def due(run: dict) -> list[dict]:
    """Selects the verdicts for one thread and the default sizes."""
    return [v for v in verdicts(run) if v["default"] and v["threads"] == 1]


def targets(run: dict) -> list[str]:
    """Counts the met targets, and lists the missed targets. Numbers refer to the list of the known reasons."""
    found = due(run)
    missed = sorted((v for v in found if v["factor"] < 1), key=lambda v: v["factor"])
    if not found:
        return []
    reasons = list(dict.fromkeys(filter(None, map(reason, missed))))
    rows = [
        [
            f"{v['title']}, {v['direction']}" + (f" ({v['size']})" if on_gpu(run) else ""),
            v["against"],
            f"{v['target']:.3g}",
            f"{v['ratio']:.4g}" + unstable(v),
            str(reasons.index(reason(v)) + 1) if reason(v) else "",
        ]
        for v in missed
    ]
    if not rows:
        return [f"### Targets: all {len(found)} met"]
    head = f"### Targets: {len(found) - len(rows)} met, {len(rows)} missed"
    note = (
        "A target is a speedup or a ratio of peak memory, the other variant's over ours. The *best peer* is "
        "the fastest variant, other than ours, that computes the same function."
    )
    parts = [head, note, table(["missed", "against", "target", "reached", "reason"], rows, 2)]
    return parts + ["\n".join(f"{number}. {text}" for number, text in enumerate(reasons, 1))] * bool(reasons)


def overhead(run: dict) -> list[str]:
    """Makes the table of the call times of the ops on tiny input."""
    rows = []
    for direction in (FORWARD, RECORDED, BACKWARD):
        found = [r for r in run["results"] if r["op"] == "overhead" and r["direction"] == direction]
        times = [1e6 * r["variants"][0]["seconds"] for r in found if r["title"].startswith("call of ")]
        if times:
            rows.append([direction, *(f"{us:.3g} us" for us in (min(times), statistics.median(times), max(times)))])
    if not rows:
        return []
    note = "The table has the times of our ops on tiny input, where only the call takes time."
    add = [1e6 * v["seconds"] for r in run["results"] for v in r["variants"] if v["name"] == "torch.add"]
    note += f" The cheapest call of torch, `torch.add`, takes at least {min(add):.2g} us." if add else ""
    head = ["direction", "fastest op", "median op", "slowest op"]
    return ["### Call overhead", note, table(head, rows)]


def slope(curve: dict) -> str:
    """Formats the slope with one thread and the exponent of the algorithm."""
    text = f"{curve['slope']['1']:.2f} ({curve['expected']:g})"
    steep = curve["slope"]["1"] > curve["expected"] + SLACK
    return (f"**{text}**" if steep else text) + unstable(curve)


def growth(scaling: dict, picture: str) -> list[str]:
    """Makes the table of slopes and of speedups by a second thread, a row per op."""
    slopes = {(c["op"], c["axis"]): c for c in scaling["curves"]}
    axes = list(dict.fromkeys(axis for _, axis in slopes))
    rows = []
    for op in dict.fromkeys(c["op"] for c in scaling["curves"]):
        row = [op]
        for axis in axes:
            row.append(slope(slopes[op, axis]) if (op, axis) in slopes else "")
        gains = [g["gain"]["median"] for g in scaling["gains"] if g["op"] == op]
        row.append(" to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(gains), max(gains)))) if gains else "")
        rows.append(row)
    missed = [g for g in scaling["gains"] if is_compute_bound(g) and g["gain"]["median"] < GAIN]
    below = "; ".join(f"{g['title']}: {g['gain']['median']:.2f}{unstable(g)}" for g in missed)
    return [
        "### Scaling",
        f"![Time against tokens, experts and groups]({picture})",
        f"The columns *{'*, *'.join(axes)}* have the slope of the forward time against the size, in log-log scale. "
        "The slope is for one thread, and is fitted to the larger half of the sizes. The slope of the algorithm is in "
        f"parentheses. A **bold** slope is larger than the slope of the algorithm by more than {SLACK}.",
        "The column *two threads* has the speedup of two threads over one at the default sizes, from the worst case of "
        f"the op to the best. If arithmetic sets the floor of a case, the target is a speedup of {GAIN}. "
        + (f"Cases below the target: {below}." if below else "Every case meets the target."),
        table(["op", *axes, "two threads"], rows),
    ]


def section(name: str, run: dict, others: list[dict], scaling: dict | None) -> str:
    """Makes the section of one device."""
    form = "" if on_gpu(run) else f", ISA {run['machine']['isa']}, one thread, float32"
    parts = ["## " + run["machine"]["name"] + form, where(run)]
    if on_gpu(run):
        parts.append(GPU_TIMES)
    elif run["quick"]:
        parts.append("**A quick run: smaller sizes than the targets are for.**")
    parts += [ratios(run, others), f"![Times of all variants over ours](benchmarks/{name}-ratios.png)"]
    parts += targets(run) + overhead(run)
    if scaling:
        parts += growth(scaling, f"benchmarks/{name}-scaling.png")
    return "\n\n".join(parts)


class Kept:
    """The kept runs.

    Attributes:
        main: Runs with a section, by name: a full run on a CPU first, then runs on GPUs.
        others: Further runs on a CPU, which get a column in the table of ratios.
        scaling: Results of `benchmarks.scaling`, by name.
    """

    def __init__(self, results: Path):
        paths = [path for path in sorted(results.glob("*.csv")) if not path.stem.endswith("-scaling")]
        runs = {path.stem: read_run(path) for path in paths}
        on_cpus = sorted((name for name in runs if not on_gpu(runs[name])), key=lambda name: runs[name]["quick"])
        self.main = {name: runs[name] for name in [*on_cpus[:1], *(name for name in runs if on_gpu(runs[name]))]}
        self.others = [runs[name] for name in on_cpus[1:]]
        scalings = {name: results / f"{name}-scaling.csv" for name in self.main}
        self.scaling = {name: read_scaling(path) for name, path in scalings.items() if path.exists()}

    def others_of(self, run: dict) -> list[dict]:
        return [] if on_gpu(run) else self.others


def document(kept: Kept) -> str:
    """Makes the page."""
    parts = [HEAD.strip()]
    if not any(map(on_gpu, kept.main.values())):
        parts.append(NO_GPU if kept.main else NONE)
    parts += [section(name, run, kept.others_of(run), kept.scaling.get(name)) for name, run in kept.main.items()]
    return "\n\n".join([*parts, TAIL])


def summary(run: dict) -> str:
    """Makes the lines of README on one device."""
    machine, found = run["machine"], due(run)
    what = f"{machine['name']} ({machine['date']}, torch {machine['versions']['torch']})"
    if not on_gpu(run):
        form = ", a quick run on small sizes" if run["quick"] else ""
        what = f"One thread of {what[:-1]}, ISA {machine['isa']}), float32{form}"
    met = sum(v["factor"] >= 1 for v in found)
    page = "docs/benchmarks.md"
    line = f"{what}; {met} of {len(found)} targets met. All cases, scaling and missed targets: [{page}]({page})."
    return f"{line}\n\n{ratios(run, [], README_CASES)}"


def with_summary(readme: str, kept: Kept) -> str:
    """Replaces the lines of README between the marks."""
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{chr(10).join(map(summary, kept.main.values())) or NONE}\n{MARKS[1]}{after}"


def pages(root: Path, kept: Kept) -> dict[Path, str]:
    """Makes the new content of every file that is written."""
    readme = root / "README.md"
    return {root / "docs" / "benchmarks.md": document(kept), readme: with_summary(readme.read_text(), kept)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.docs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    root = parser.parse_args(arguments).root
    kept = Kept(root / "benchmarks" / "results")
    for path, text in pages(root, kept).items():
        path.write_text(text)
    from benchmarks.report.plots import save_figures

    for name, run in kept.main.items():
        save_figures(run, kept.scaling.get(name), root / "docs" / "benchmarks" / name)


if __name__ == "__main__":
    main()
