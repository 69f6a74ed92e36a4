"""What `sensitivity.json` says, as a figure and tables of the report: losses, the bits chosen."""

from typing import Any

from quantempo.report import plots
from quantempo.report.plots import ACCENT, FLOAT, INDIGO, INK, INT8, OCHRE

__all__ = ["budget_facts", "draw", "layer_cells", "options_of", "standalone"]

_COLOURS = (INT8, ACCENT, INDIGO, OCHRE, FLOAT, INK)


def options_of(table: dict[str, Any]) -> list[str]:
    """Return every option that some layer was measured at, fewest bits first."""
    return sorted({option for row in table["layers"] for option in row["losses"]})


def draw(table: dict[str, Any]) -> str:
    """Draw one dot a layer and option, loss > 0 on a log axis; rings mark the chosen options."""
    layers, bits = table["layers"], (table["choice"] or {}).get("bits", {})
    with plots.new_figure(1, 1, 2.9) as (figure, axes):
        axis = axes[0, 0]
        for place, option in enumerate(options_of(table)):
            losses = [(i, row["losses"].get(option, 0)) for i, row in enumerate(layers)]
            points = [(i, loss) for i, loss in losses if loss > 0]
            if not points:
                continue
            colour = _COLOURS[place % len(_COLOURS)]
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=colour, marker=".", markersize=5, linewidth=0.7, label=option)
            ringed = [(i, v) for i, v in points if bits.get(layers[i]["name"]) == option]
            if ringed:
                x, y = zip(*ringed, strict=True)
                axis.plot(x, y, color=colour, marker="o", markersize=8, fillstyle="none",
                          linestyle="none", markeredgewidth=0.9)  # fmt: skip
        axis.set_yscale("log")
        axis.minorticks_off()
        title = "mean squared error of the last latent with this layer alone quantized"
        plots.layer_axis(axis, len(layers), title)
    return figure.svg


def standalone(svg: str) -> str:
    """Return a figure as a file of its own: colours in place of the page's variables."""
    for colour, variable in plots.VARIABLES.items():
        svg = svg.replace(f"var(--{variable})", colour)
    # Readable where the page behind is dark.
    end = svg.index(">") + 1
    return svg[:end] + '<rect width="100%" height="100%" fill="#ffffff"/>' + svg[end:]


def budget_facts(table: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return groups of facts on the chosen bits: budgets, what is spent, how many layers."""
    choice = table["choice"]
    units = {"bytes": "bytes of integer weights", "bops": "bit operations an image and step"}
    spent = []
    for name, value in choice["spent"].items():
        limit = choice["budgets"].get(name)
        of = f" of {limit:,} ({100 * value / limit:.1f} %)" if limit else ", no budget"
        spent.append((units[name], f"{value:,}{of}"))
    spent.append(("bits a weight, with scales", f"{choice['effective_bits']:.2f}"))
    chosen = list(choice["bits"].values())
    counts = [(option, f"{chosen.count(option)} layers") for option in choice["options"]]
    names = ("loss", "sum of losses"), ("bound", "no choice has less than")
    loss = [(text, f"{choice[key]:.3g}") for key, text in names]
    return [("Budget", spent), ("Layers", counts), ("Loss", loss)]


def layer_cells(table: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table, the largest loss first."""
    options, bits = options_of(table), (table["choice"] or {}).get("bits", {})
    total = sum(row["macs"] for row in table["layers"]) or 1
    rows = sorted(table["layers"], key=lambda row: -max(row["losses"].values(), default=0.0))
    cells = []
    for row in rows:
        shape = " × ".join(map(str, row["weight_shape"]))
        share = f"{100 * row['macs'] / total:.2f} %"
        losses = (row["losses"].get(option) for option in options)
        shown = ("–" if loss is None else f"{loss:.2e}" for loss in losses)
        cells.append((row["name"], row["role"], shape, share, bits.get(row["name"], "–"), *shown))
    return ("layer", "role", "weight", "MACs", "bits chosen", *options), cells
