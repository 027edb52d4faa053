"""Computes when expert parallelism pays: the numbers and the plot of docs/distributed.md.

    python scripts/expert_parallel_cost.py

Nothing is measured. The formulas are in docs/distributed.md. The constants below are assumptions about a GPU and its
network. The layer is the MoE layer of ViT-B/16 with 32 experts, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

import vmoe_routers as vr

DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- costs: written by scripts/expert_parallel_cost.py -->", "<!-- end of costs -->"

WIDTH, HIDDEN, EXPERTS, TOKENS = 768, 3072, 32, 196
SLOTS = 192  # slots per image in Expert Choice with capacity factor 1
NODE = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # bytes per second: a GPU within its node, and to other nodes
FLOPS = 400e12  # achieved operations per second
WEIGHTS = EXPERTS * (2 * WIDTH * HIDDEN + HIDDEN + WIDTH)
GPUS, SHARED_BY, IMAGES = (8, 64, 1024), (1, 8, 32), (16, 128)
ROUTERS = {
    "Softmax and Sinkhorn Token Choice, K=1": ("softmax_token_choice", {"top_k": 1}),
    "Softmax and Sinkhorn Token Choice, K=2": ("softmax_token_choice", {"top_k": 2}),
    "Softmax, Sinkhorn and Sparsity-constrained Expert Choice": ("softmax_expert_choice", {}),
    "Soft MoE": ("soft", {"capacity_factor": 1.0}),
}


def capacity(router: str, options: dict[str, float], group_size: int) -> int:
    """Computes C, the slots of an expert, for groups of `group_size` images."""
    tokens = TOKENS * group_size
    more = {"num_tokens": tokens} if router == "soft" else {}
    return vr.create_router(router, 8, EXPERTS, **options, **more).train().slots(tokens)


def all_to_all(data: float, ranks: int) -> float:
    """Computes the seconds in which every GPU sends `data` bytes in equal parts to `ranks` GPUs of full nodes.

    A GPU keeps one part. It sends `near - 1` parts over NVLink and, at the same time, the other parts over the network.
    """
    near = min(ranks, NODE)
    return max(data * (near - 1) / ranks / NVLINK, data * (ranks - near) / ranks / NETWORK)


def exchange(images: float, ep: int, slots: float = SLOTS) -> float:
    """Computes the seconds of the four all-to-alls of a step: slots and results, forward and backward.

    Every slot is a row of WIDTH numbers of 2 bytes.
    """
    return 4 * all_to_all(images * slots * WIDTH * 2, ep)


def experts(images: float, slots: float = SLOTS) -> float:
    """Computes the seconds of the experts' products, forward and backward.

    An expert multiplies every slot by two matrices of WIDTH x HIDDEN: 2 * 2 * WIDTH * HIDDEN operations, a
    multiplication and an addition per entry. Backward computes two gradients per product, so it takes twice as long.
    """
    return 3 * images * slots * 4 * WIDTH * HIDDEN / FLOPS


def attention(images: float) -> float:
    """Computes the seconds of attention, forward and backward; backward takes twice as long.

    A token has four projections with matrices of WIDTH x WIDTH, 2 * 4 * WIDTH**2 operations. Its products with the keys
    and the values of all tokens take 2 * 2 * TOKENS * WIDTH operations.
    """
    return 3 * images * TOKENS * (8 * WIDTH**2 + 4 * TOKENS * WIDTH) / FLOPS


def gather(data: float, ranks: int, near: int) -> float:
    """Computes the seconds to gather `data` bytes from `ranks` GPUs, `near` of them per node, or to reduce and scatter.

    The algorithm is a ring: every GPU receives all data except its own part, a share of (ranks - 1) / ranks. Over the
    network, the GPUs of a node together receive the data of the other nodes once, on `near` connections. NVLink and
    network are used at the same time.
    """
    near = min(near, ranks)
    nodes = ranks // near
    within = data * (ranks - 1) / ranks / NVLINK if near > 1 else 0.0
    return max(within, data * (nodes - 1) / nodes / (NETWORK * near))


def sharding(gpus: int, ep: int) -> float:
    """Computes the seconds in which FSDP2 gathers the experts twice in bfloat16 and reduces gradients in float32.

    The two gathers, for forward and backward, have 2 bytes per number. Gradients have 4 bytes per number. With expert
    parallelism, edp = gpus / ep GPUs share 1 / ep of the experts, and NODE / ep of these GPUs are in one node.
    """
    weights, edp = WEIGHTS / ep, gpus // ep
    near = max(1, NODE // ep)
    return 2 * gather(2 * weights, edp, near) + gather(4 * weights, edp, near)


def block(gpus: int, ep: int, images: float) -> float:
    """Computes the seconds of a step in a block with experts. Only sharding overlaps with the products."""
    return max(experts(images) + attention(images), sharding(gpus, ep)) + exchange(images, ep)


def tables() -> str:
    """Makes the two tables and the constants in Markdown."""
    ratios = [2 * FLOPS / (3 * HIDDEN * speed) for speed in (NVLINK, NETWORK)]
    sizes = [f"{2 * WEIGHTS / ep / 1e6:.0f} MB with `ep={ep}`" for ep in SHARED_BY]
    constants = [
        f"Ratio of exchange to products: {ratios[0]:.0%} times `(n - 1) / n` within a node, {ratios[1]:.0%} times",
        f"`(n - 8) / n` across nodes. The experts of a layer, {WEIGHTS / 1e6:.0f} million parameters in bfloat16, have",
        f"{', '.join(sizes)}.",
    ]
    return "\n".join([*_routers(), "", *_layouts(), "", *constants])


def _routers() -> Iterator[str]:
    images = IMAGES[-1]
    yield f"| router | C | slots of an image | MB of {images} images | ms, ep=8 | ms, ep=32 | ms, experts |"
    yield "|---|---|---|---|---|---|---|"
    for label, (router, options) in ROUTERS.items():
        slots = [capacity(router, options, group) for group in (1, 8)]
        by_group = [EXPERTS * slots[0], EXPERTS * slots[1] / 8]
        megabytes = [images * s * WIDTH * 2 / 1e6 for s in by_group]
        times = [f"{1e3 * exchange(images, ep, by_group[0]):.2f}" for ep in (8, 32)]
        yield (
            f"| {label} | {slots[0]} / {slots[1]} | {by_group[0]:.0f} / {by_group[1]:.0f} | {megabytes[0]:.1f} / "
            f"{megabytes[1]:.1f} | {times[0]} | {times[1]} | {1e3 * experts(images, by_group[0]):.2f} |"
        )


def _layouts() -> Iterator[str]:
    yield "| GPUs | " + " | ".join(f"ep={ep}" for ep in SHARED_BY) + " |"
    yield "|---|" + "---|" * len(SHARED_BY)
    for gpus in GPUS:
        times = {ep: [1e3 * block(gpus, ep, images) for images in IMAGES] for ep in SHARED_BY if ep <= gpus}
        best = [min(column) for column in zip(*times.values(), strict=True)]
        cells = [
            " / ".join(f"**{t:.2f}**" if t == b else f"{t:.2f}" for t, b in zip(times[ep], best, strict=True))
            if ep in times
            else "-"
            for ep in SHARED_BY
        ]
        yield f"| {gpus:,} | " + " | ".join(cells) + " |"


def draw(path: Path) -> None:
    """Draws the time of a block over the images per GPU, for every number of GPUs and ep."""
    figure, axes = plt.subplots(1, len(GPUS), figsize=(11, 3.9), sharey=True, layout="constrained")
    images = [2 ** (i / 8) for i in range(16, 73)]  # 4 .. 512
    for ax, gpus in zip(axes, GPUS, strict=True):
        ax.plot(
            images, [1e3 * (experts(n) + attention(n)) for n in images], color="0.6", ls=":", label="products alone"
        )
        for ep, colour, width in zip(SHARED_BY, ("#0072B2", "#D55E00", "#009E73"), (4.5, 2.5, 1.5), strict=True):
            if ep <= gpus:
                label = "ep=1: FSDP2 alone" if ep == 1 else f"ep={ep}" + (", across nodes" if ep > NODE else "")
                ax.plot(images, [1e3 * block(gpus, ep, n) for n in images], color=colour, lw=width, label=label)
        ax.set(xscale="log", yscale="log", title=f"{gpus:,} GPUs", xlabel="images per GPU")
        ax.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
        ax.minorticks_off()
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms of a step in a block with experts")
    axes[0].set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes[-1].legend(frameon=False, loc="lower right")
    figure.suptitle("Computed from assumed speeds, not measured: ViT-B/16, 32 experts", fontsize=11, color="0.35")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes the plot, and writes the numbers between their marks in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to")
    folder = parser.parse_args().docs
    page = folder / "distributed.md"
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{tables()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    draw(folder / "expert_parallel_cost.png")


if __name__ == "__main__":
    main()
