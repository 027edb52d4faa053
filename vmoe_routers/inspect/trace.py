"""Trace: recorded routings, their statistics by layer, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vmoe_routers.inspect.layer import LayerTrace
from vmoe_routers.ops._checks import Check
from vmoe_routers.routers import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

HEADERS = {
    "utilisation": "slots\nused",
    "dropped": "dropped",
    "dropped_requests": "requests\ndropped",
    "dead_experts": "dead\nexperts",
    "load_cv": "load\ncv",
    "entropy": "entropy",
    "agreement": "agree-\nment",
    "slot_similarity": "slots\nalike",
    "token_error": "token\nerror",
    "expert_error": "expert\nerror",
}
"""Statistics of `LayerTrace` that are one number, or None, with their headers in tables."""


class Trace:
    """Routings that `record` collected.

    The methods `plot_...` need matplotlib and return a figure, which they do not show. Their argument `index` counts
    the recorded images from 0. Their arguments `layer` and `layers` are positions in `Trace.layers`.

    Attributes:
        routings: Routings of the forwards of every MoE layer in order, by the name of the layer. In eval, a batch that
            `group_size` does not divide adds two routings.
    """

    def __init__(self, routers: Mapping[str, nn.Module]):
        self.routings: dict[str, list[Routing]] = {name: [] for name in routers}
        self._routers = routers
        self._tokens: dict[str, list[int]] = {name: [] for name in routers}

    def add(self, name: str, tokens: int, routing: Routing) -> None:
        """Adds a routing of the layer `name`, from images of `tokens` tokens. With 0, every group is one image."""
        size = routing.num_tokens
        self.routings[name].append(routing)
        self._tokens[name].append(tokens if tokens and size % tokens == 0 else size)

    @property
    def layers(self) -> list[LayerTrace]:
        """The layers that recorded a routing, in the order of the model, with all routings so far."""
        found: list[LayerTrace] = []
        for name, routings in self.routings.items():
            if routings:
                previous = found[-1] if found else None
                found.append(LayerTrace(name, self._routers[name], routings, self._tokens[name], previous))
        return found

    def to_dict(self) -> dict[str, list[Any]]:
        """Computes all statistics: columns with one value per layer, for ``pandas.DataFrame(trace.to_dict())``."""
        layers = self.layers
        columns: dict[str, list[Any]] = {"layer": [layer.name for layer in layers]}
        columns["router"] = [layer.title for layer in layers]
        for name in HEADERS:
            columns[name] = [getattr(layer, name) for layer in layers]
        columns["load"] = [layer.load.tolist() for layer in layers]
        return columns

    def summary(self) -> Table:
        """Makes a table of the layers for ``rich.print``. Statistics that no layer has are left out."""
        from rich.table import Table

        columns, titles = self.columns(), {layer.title for layer in self.layers}
        table = Table(box=None, header_style="", padding=(0, 1), pad_edge=False)
        table.title = titles.pop() if len(titles) == 1 else None
        for header in columns:
            table.add_column(header, justify="right" if table.columns else "left", vertical="bottom", overflow="fold")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(as_text, row))
        return table

    def columns(self) -> dict[str, list[Any]]:
        """Computes the columns of `summary` by header."""
        found = self.to_dict()
        if found["dropped_requests"] == found["dropped"]:  # tokens make one request each
            found["dropped_requests"] = [None]
        shown = {HEADERS[name]: found[name] for name in HEADERS if any(value is not None for value in found[name])}
        return {"MoE layer": found["layer"], **shown}

    def write_tensorboard(self, writer: Any, step: int) -> None:
        """Writes the statistics of every layer as scalars, ``routing/<layer>/<statistic>``.

        Args:
            writer: A ``SummaryWriter``, or another object with ``add_scalar(tag, value, step)``.
            step: The step of the training.
        """
        for layer in self.layers:
            for name in HEADERS:
                value = getattr(layer, name)
                if value is not None:
                    writer.add_scalar(f"routing/{layer.name or 'layer'}/{name}", value, step)

    def plot_tokens(self, image: Any, index: int = 0, layers: Iterable[int] | None = None, grid: Any = None) -> Figure:
        """Draws the image, and for every layer the image with its patches in the colours of their experts.

        A patch has the colour of the expert with the largest weight. A stronger colour means a larger weight. Dropped
        patches and padding are marked. For more than eight experts and at most 256 patches, each patch also has the
        number of its expert.

        Args:
            image: The image as the model saw it: a picture, an array [H, W, 3], or a tensor [channels, H, W]. Values
                outside [0, 1] are rescaled.
            index: The position of the image among the recorded images.
            layers: The layers, by default all.
            grid: Rows and columns of patches. None: from the number of tokens and the sides of the image. Tokens
                before the patches, such as a class token, are not drawn.
        """
        from vmoe_routers.inspect import plots

        return plots.tokens(self._chosen("plot_tokens", layers), image, index, grid)

    def plot_slots(self, image: Any, index: int = 0, layer: int = -1, grid: Any = None) -> Figure:
        """Draws slots of Soft MoE as maps of their weights over the image, for the first 15 slots at most.

        The arguments are as in `plot_tokens`.

        Raises:
            ValueError: The layer is not Soft MoE.
        """
        from vmoe_routers.inspect import plots

        (chosen,) = self._chosen("plot_slots", [layer])
        return plots.slots(chosen, image, index, grid)

    def plot_load(self, layers: Iterable[int] | None = None) -> Figure:
        """Draws the tokens per image of every expert, and lines for an even load and for the capacity."""
        from vmoe_routers.inspect import plots

        return plots.load(self._chosen("plot_load", layers))

    def plot_plan(self, layer: int = -1, group: int = 0) -> Figure:
        """Draws the gates that selected in a group, tokens by experts, with their sums.

        With transport, these gates are the plan.

        Tokens are sorted by the expert of their largest gate. Tokens without a gate are last. Dots mark the tokens that
        got a slot. Dashed lines are the sums that a transport plan should have.

        Raises:
            ValueError: The layer has no gates, such as Soft MoE.
        """
        from vmoe_routers.inspect import plots

        (chosen,) = self._chosen("plot_plan", [layer])
        return plots.plan(chosen, group)

    def plot_specialisation(
        self, labels: Tensor | Sequence[int], names: Sequence[str] | None = None, layers: Iterable[int] | None = None
    ) -> Figure:
        """Draws for every layer which share of the tokens of a class every expert gets.

        Args:
            labels: The class of every recorded image.
            names: Names of the classes.
            layers: The layers, by default all.
        """
        from vmoe_routers.inspect import plots

        return plots.specialisation(self._chosen("plot_specialisation", layers), labels, names)

    def _chosen(self, method: str, layers: Iterable[int] | None) -> list[LayerTrace]:
        check, found = Check(f"Trace.{method}"), self.layers
        if not found:
            raise ValueError(f"{check.where}: no routing is recorded; run the model within the context of record")
        if layers is None:
            return found
        chosen = list(layers)
        for number in chosen:
            if not isinstance(number, int) or not -len(found) <= number < len(found):
                raise ValueError(f"{check.where}: layer must be in [{-len(found)}, {len(found) - 1}], got {number!r}")
        return [found[number] for number in chosen]


def as_text(value: Any) -> str:
    """Returns a statistic as text: three decimals, or nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
