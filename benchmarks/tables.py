"""docs/benchmarks.md from the kept runs: `python -m benchmarks.tables`.

A run is kept with `python -m benchmarks.run --json benchmarks/results/<device>.json`. No figure is written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.report import mebibytes, seconds
from benchmarks.targets import best_peer

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Benchmarks

Made by `python -m benchmarks.tables` from the runs in `benchmarks/results/`; `make bench` measures anew. Every ratio
is the median of paired ratios within one process, time of the variant / time of ours, with a bootstrap 95 % interval:
above 1 ours is faster. Results are asserted equal before timing, or the row says that the function is another. The
floor is what the case must do (flops, bytes, exponentials) at the ceilings measured in the same run.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def section(run: dict, images: list[str]) -> str:
    """One device."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['cores']} cores, ISA {machine['isa']}, {machine['date']}"
    parts = [f"## {machine['name']}", f"{where}. {versions}."]
    for found in run["ceilings"]:
        rates = found["ceilings"]
        rows = [["GEMM 2048^3, GFLOP/s", f"{rates['gemm'] / 1e9:.4g}"]]
        rows.append(["GEMM of the layer, GFLOP/s", f"{rates['gemm_layer'] / 1e9:.4g}"])
        for kind in ("read", "copy"):
            rows += [[f"{kind} {level}, GB/s", f"{rate / 1e9:.3g}"] for level, rate in rates[kind].items()]
        rows.append(["exp, G/s", f"{rates['exp'] / 1e9:.3g}"])
        parts.append(table([f"ceiling, {found['threads']} thread(s)", ""], rows))
    parts += [f"![{image}]({image})" for image in images]
    rows = [
        [
            f"{v['title']}, {v['direction']}, {v['threads']} thr",
            v["against"],
            f"{v['target']:.3g}",
            f"{v['ratio']:.3g}",
            ("met" if v["factor"] >= 1 else "missed") + f", {v['factor']:.2f} of it" + _unstable(v),
        ]
        for v in run["targets"]
    ]
    if rows:
        parts += ["### Targets", table(["case", "against", "target", "reached", ""], rows)]
    parts.append("### Cases")
    parts += [case_table(result) for result in run["results"]]
    return "\n\n".join(parts)


def _unstable(row: dict) -> str:
    return " **UNSTABLE**" if row["unstable"] else ""


def case_table(result: dict) -> str:
    """One case in one direction."""
    floor, again, best = result["floor"], result["again"], best_peer(result)
    where = f"({result['size']}, {result['threads']} thread(s))"
    head = f"**{result['title']}, {result['direction']}** {where}{_unstable(result)}"
    rows = []
    for v in result["variants"]:
        name = v["name"] + (" (best peer)" if v["name"] == best else "")
        rows.append(
            [
                name + (f" (different function: {v['different']})" if v["different"] else ""),
                seconds(v["seconds"]),
                f"{v['ratio']['median']:.2f} ({v['ratio']['low']:.2f}-{v['ratio']['high']:.2f})",
                f"{floor['seconds'] / v['seconds']:.1%}",
                mebibytes(v["saved_bytes"]),
                mebibytes(v["peak_bytes"]),
            ]
        )
    columns = ["variant", "time", "time / ours", "floor / time", "saved MiB", "peak MiB"]
    foot = f"Floor {seconds(floor['seconds'])} ({floor['by']}); A/A {again['median']:.3f}."
    skipped = "".join(f" Skipped: {line}." for line in result["skipped"])
    return "\n\n".join([head, table(columns, rows), foot + skipped])


def document(results: Path, docs: Path) -> str | None:
    """The page, or None where no run is kept."""
    runs = sorted(results.glob("*.json"))
    if not runs:
        return None
    parts = [HEAD.strip()]
    for path in runs:
        images = [Path("..") / image.relative_to(docs.parent) for image in sorted(results.glob(f"{path.stem}-*.png"))]
        parts.append(section(json.loads(path.read_text()), [image.as_posix() for image in images]))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(arguments)
    page = document(options.results, options.out.parent)
    if page is None:
        parser.exit(
            1, f"no kept run in {options.results}: python -m benchmarks.run --json {options.results}/<device>.json\n"
        )
    options.out.write_text(page)


if __name__ == "__main__":
    main()
