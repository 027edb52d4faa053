"""docs/benchmarks.md and README's figures from the kept runs: `python -m benchmarks.report.docs`.

Runs are kept in `benchmarks/results`: `<name>.json` of `benchmarks.run`, `<name>-scaling.json` of
`benchmarks.scaling`. No figure is written by hand; a test says where the pages and the runs differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.report.console import GPU_TIMES, WAITS, mebibytes, memory_of_results, seconds
from benchmarks.report.targets import best_peer, reasons
from benchmarks.scaling import GAIN, SLACK

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("<!-- benchmarks: written by python -m benchmarks.report.docs -->", "<!-- end of benchmarks -->")
NO_GPU = "No run on a GPU is kept here: how long the CUDA kernels take is not known."
NONE = "No run is kept here yet; `make bench` measures on your machine."
HEAD = """# Benchmarks

Written by `python -m benchmarks.report.docs` from the runs in `benchmarks/results/`; `make bench` measures anew. Every
ratio is the median of paired ratios within one process, time of the variant / time of ours, with a bootstrap 95 %
interval; above 1 ours is faster.
Results are asserted equal before timing, or the row says that the function is another. The
floor is what the case must do (flops, bytes, exponentials) at the ceilings measured in the same run. UNSTABLE: the same
code measured twice came out more than 10 % apart, or may have come out 30 % apart; such a row says little.

Where memory is kept, the C library was told to use freed memory again, for ours and for theirs. Where large results are
new memory in every call, as they are unless somebody says so, the system hands them out page by page, which can take
longer than writing them: ours ask for pages of 2 MiB, and torch's do under `THP_MEM_ALLOC_ENABLE=1`.

The products of experts and of Soft MoE are ours on a CPU. torch's `mm` and `bmm`, from MKL, run AVX2 code on a CPU of
AMD's, at half the speed of its AVX-512 units; on one of Intel's they do not, and rows that are mostly products will
show a smaller lead. No run on such a machine is kept here. oneDNN, which torch has too, has no such loss: it is in the
rows "packed for oneDNN", by ops that are not public and have no gradient.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def section(run: dict, scaling: dict | None, images: list[str]) -> str:
    """One device."""
    machine, gpu = run["machine"], on_gpu(run)
    parts = ["## " + machine["name"] + ("" if gpu else f", {machine['isa']}"), where(machine), ceilings(run)]
    if gpu:
        parts.append(GPU_TIMES)
    elif run["quick"]:
        parts.append("**A quick run: smaller sizes than the targets are for.**")
    parts += [f"![{image}]({image})" for image in images]
    parts += targets(run) + losses(run["results"])
    if scaling:
        parts += growth(scaling)
    parts.append("### Cases")
    parts += [case_table(result) for result in run["results"]]
    return "\n\n".join(parts)


def on_gpu(run: dict) -> bool:
    return run["machine"]["device"] == "cuda"


def where(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    if machine["device"] == "cuda":
        return f"{machine['date']}. {versions}."
    memory = memory_of_results(machine)
    return f"{machine['cores']} cores, ISA {machine['isa']}, {machine['date']}; {memory}. {versions}."


def ceilings(run: dict) -> str:
    """The machine's rates, on a CPU a column for each number of threads."""
    columns = []
    for found in run["ceilings"]:
        rates = found["ceilings"]
        column = {
            "GEMM 2048^3, GFLOP/s": f"{rates['gemm'] / 1e9:.4g}",
            "GEMM of the layer, GFLOP/s": f"{rates['gemm_layer'] / 1e9:.4g}",
        }
        if rates["gemm_bfloat16"]:
            column["bfloat16 GEMM 8192^3, GFLOP/s"] = f"{rates['gemm_bfloat16'] / 1e9:.4g}"
        for kind in ("read", "copy"):
            column |= {f"{kind} {level}, GB/s": f"{rate / 1e9:.3g}" for level, rate in rates[kind].items()}
        columns.append({**column, "exp, G/s": f"{rates['exp'] / 1e9:.3g}"})
    head = ["ceiling", *("" if on_gpu(run) else f"{found['threads']} thread(s)" for found in run["ceilings"])]
    return table(head, [[name, *(column[name] for column in columns)] for name in columns[0]])


def targets(run: dict) -> list[str]:
    """Met and missed, the most missed first; the targets are for one thread and the default sizes."""
    due = [v for v in run["targets"] if v["default"] and v["threads"] == 1]
    if not due:
        return []
    missed = sum(v["factor"] < 1 for v in due)
    rows = [
        [
            f"{v['title']}, {v['direction']}" + (f" ({v['size']})" if on_gpu(run) else ""),
            v["against"],
            f"{v['target']:.3g}",
            f"{v['ratio']:.3g}",
            ("met" if v["factor"] >= 1 else "**missed**") + f", {v['factor']:.2f} of it" + _unstable(v),
        ]
        for v in sorted(due, key=lambda v: v["factor"])
    ]
    head = f"### Targets: {len(due) - missed} met, {missed} missed"
    note = "" if on_gpu(run) else "One thread, the default sizes. "
    note += "Of a layer against the dense MLP: the MLP's time over ours."
    parts = [head, note, table(["case", "against", "target", "reached", ""], rows)]
    why = reasons(due)
    return [*parts, "Why they are missed, where it is known:", "\n".join(f"- {line}" for line in why)] if why else parts


def losses(results: list[dict]) -> list[str]:
    """Where something that computes the same is faster than ours."""
    rows = []
    for result in results:
        best = next((v for v in result["variants"] if v["name"] == best_peer(result)), None)
        if best and best["ratio"]["median"] < 1:
            title = f"{result['title']}, {result['direction']}, {result['threads']} thr"
            rows.append([title, result["size"], best["name"], f"{best['ratio']['median']:.2f}" + _unstable(result)])
    if not rows:
        return ["### Losses", "None: nothing that computes the same was faster than ours."]
    return ["### Losses", table(["case", "size", "faster", "its time / ours"], rows)]


def growth(scaling: dict) -> list[str]:
    """Slopes of time, and what a second thread brings."""
    rows = [
        [
            f"{c['title']}, {c['axis']} {c['points'][0]['x']} to {c['points'][-1]['x']}",
            f"{c['slope']['1']:.2f}",
            f"{c['slope']['2']:.2f}",
            f"{c['expected']:g}",
            ("near it" if c["slope"]["1"] <= c["expected"] + SLACK else "**steeper**") + _unstable(c),
        ]
        for c in scaling["curves"]
    ]
    head = ["case", "slope, 1 thread", "2 threads", "the algorithm's", ""]
    parts = ["### Scaling", "Log-log slope of time through the larger half of the points.", table(head, rows)]
    rows = [
        [
            f"{g['title']} ({g['size']})",
            g["by"],
            f"{g['gain']['median']:.2f} ({g['gain']['low']:.2f}-{g['gain']['high']:.2f})",
            _gain(g) + _unstable(g),
        ]
        for g in scaling["gains"]
    ]
    note = f"Two threads over one, forward; at least {GAIN} is wanted where arithmetic sets the floor."
    return [*parts, note, table(["case", "floor by", "gain", ""], rows)]


def _gain(row: dict) -> str:
    if not row["compute_bound"]:
        return ""
    return "met" if row["gain"]["median"] >= GAIN else f"**missed**, {row['gain']['median'] / GAIN:.2f} of it"


def _unstable(row: dict) -> str:
    return " **UNSTABLE**" if row["unstable"] else ""


def case_table(result: dict) -> str:
    """One case in one direction."""
    floor, again, best = result["floor"], result["again"], best_peer(result)
    head = f"**{result['title']}, {result['direction']}** ({result['size']}, {result['threads']} thread(s))"
    memory = any(v["saved_bytes"] is not None or v["peak_bytes"] is not None for v in result["variants"])
    called = any(v["called_seconds"] for v in result["variants"])
    rows = []
    for v in result["variants"]:
        name = v["name"] + (" (best peer)" if v["name"] == best else "")
        name += f" ({WAITS})" if v["waits"] else ""
        row = [
            name + (f" (different function: {v['different']})" if v["different"] else ""),
            seconds(v["seconds"]),
            *([seconds(v["called_seconds"])] if called else []),
            f"{v['ratio']['median']:.2f} ({v['ratio']['low']:.2f}-{v['ratio']['high']:.2f})",
            f"{floor['seconds'] / v['seconds']:.1%}",
        ]
        rows.append(row + [mebibytes(v["saved_bytes"]), mebibytes(v["peak_bytes"])] * memory)
    columns = ["variant", "time", *["of a call"] * called, "time / ours", "floor / time"]
    columns += ["saved MiB", "peak MiB"] * memory
    foot = f"Floor {seconds(floor['seconds'])} ({floor['by']}); A/A {again['median']:.3f}."
    skipped = "".join(f" Skipped: {line}." for line in result["skipped"])
    return "\n\n".join([head + _unstable(result), table(columns, rows), foot + skipped])


def summary(run: dict, page: str) -> str:
    """README's lines: every case at its default size, one thread, against the best that computes the same."""
    rows: dict[str, list[str]] = {}
    for result in run["results"]:
        if result["threads"] != 1 or not (result["default"] or run["quick"]) or result["op"] == "overhead":
            continue
        title = result["title"] + (f" ({result['size']})" if on_gpu(run) else "")
        row = rows.setdefault(title, [title, "", "", "", ""])
        best = next((v for v in result["variants"] if v["name"] == best_peer(result)), None)
        ours, forward = result["variants"][0], result["direction"] == "forward"
        text = f"{best['ratio']['median']:.2g}x" + _unstable(result) if best else "-"
        row[2 if forward else 3] = text
        if forward:
            row[1], row[4] = best["name"] if best else "-", f"{result['floor']['seconds'] / ours['seconds']:.0%}"
    machine, due = run["machine"], [v for v in run["targets"] if v["default"] and v["threads"] == 1]
    met = sum(v["factor"] >= 1 for v in due)
    form = ", a quick run on small sizes" if run["quick"] and not on_gpu(run) else ""
    if on_gpu(run):
        what = f"{machine['name']} ({machine['date']}, torch {machine['versions']['torch']})"
    else:
        what = (
            f"One thread of {machine['name']} (ISA {machine['isa']}, {machine['date']}, torch "
            f"{machine['versions']['torch']}), float32{form}"
        )
    head = ["case", "best of the others, forward", "faster than it by", "with gradients", "of the floor, forward"]
    return "\n\n".join(
        [
            f"{what}; {met} of {len(due)} targets met. All variants, threads, memory, scaling and what is missed: "
            f"[{page}]({page}).",
            table(head, list(rows.values())),
        ]
    )


def kept(results: Path) -> list[Path]:
    """The runs, without those of the scaling."""
    return [path for path in sorted(results.glob("*.json")) if not path.stem.endswith("-scaling")]


def document(results: Path, docs: Path) -> str:
    """The page."""
    parts = [HEAD.strip()]
    devices = set()
    for path in kept(results):
        scaling = path.with_name(f"{path.stem}-scaling.json")
        found = json.loads(scaling.read_text()) if scaling.exists() else None
        images = [Path("..") / image.relative_to(docs.parent) for image in sorted(results.glob(f"{path.stem}-*.png"))]
        run = json.loads(path.read_text())
        devices.add(run["machine"]["device"])
        parts.append(section(run, found, [image.as_posix() for image in images]))
    if not devices:
        parts.append(NONE)
    elif "cuda" not in devices:
        parts.insert(1, NO_GPU)
    return "\n\n".join(parts) + "\n"


def with_summary(readme: str, results: Path) -> str:
    """README with its lines between the marks written anew, from the first run kept of a CPU and the first of a GPU."""
    before, rest = readme.split(MARKS[0])
    behind = rest.split(MARKS[1])[1]
    runs = [json.loads(path.read_text()) for path in kept(results)]
    first = [next((run for run in runs if on_gpu(run) == gpu), None) for gpu in (False, True)]
    lines = "\n\n".join(summary(run, "docs/benchmarks.md") for run in first if run) or NONE
    return f"{before}{MARKS[0]}\n{lines}\n{MARKS[1]}{behind}"


def pages(root: Path) -> dict[Path, str]:
    """Every file that is written, and what it is to hold."""
    results, readme = root / "benchmarks" / "results", root / "README.md"
    return {
        root / "docs" / "benchmarks.md": document(results, root / "docs"),
        readme: with_summary(readme.read_text(), results),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.docs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    for path, text in pages(parser.parse_args(arguments).root).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
