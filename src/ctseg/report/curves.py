"""How a training went, as the two graphs of the model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctseg.report.canvas import FONT, new_figure, save_figure

LOSS_COLOUR = "#0072B2"
DICE_COLOUR = "#009E73"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLES = ("-", "--", ":", "-.")
DENSE_EPOCHS = 60
"""Curves with more points than this are drawn without a dot for each."""


def draw_training_curves(path: Path, epochs: Sequence[Mapping[str, float | int | None]], title: str) -> None:
    """Writes a PNG with training loss per epoch on the left and validation mean Dice per epoch on the right.

    Args:
        path: The PNG.
        epochs: One row per epoch with "epoch" (from 1), "loss" and "mean_dice" (None where not validated).
        title: Stands above both graphs.

    Raises:
        OutputError: if the file cannot be written.
    """
    figure = new_figure(9.6, 3.7, "white")
    loss_axes, dice_axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.062, right=0.975, top=0.785, bottom=0.14, wspace=0.16)
    style = {"family": FONT, "size": 13, "weight": "bold", "color": "#111111", "va": "center"}
    figure.text(0.062, 0.94, title, parse_math=False, **style)
    last = max((int(row["epoch"] or 0) for row in epochs), default=1)
    _draw_curve(loss_axes, "Training loss", epochs, "loss", last, LOSS_COLOUR)
    _draw_curve(dice_axes, "Validation mean Dice", epochs, "mean_dice", last, DICE_COLOUR)
    if all((row["loss"] or 0) >= 0 for row in epochs):
        loss_axes.set_ylim(bottom=0)
    dice_axes.set_ylim(0, 1)
    _mark_best(dice_axes, epochs, last)
    save_figure(figure, path)


def draw_click_curves(path: Path, organs: Mapping[str, Sequence[float]], mean: Sequence[float], title: str) -> None:
    """Writes a PNG with Dice after each click: a line for each organ, a thick one for their mean.

    Args:
        path: The PNG.
        organs: Dice of each organ after click 1, 2, ...
        mean: Likewise, over organs.
        title: Stands above.

    Raises:
        OutputError: if the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.2, 4.2, "white")
    axes = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.72, top=0.86, bottom=0.13)
    figure.text(0.08, 0.94, title, parse_math=False, family=FONT, size=13, weight="bold", color="#111111", va="center")
    clicks = range(1, len(mean) + 1)
    for number, (organ, values) in enumerate(organs.items()):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(clicks, values, style, color=colour, linewidth=1.2, label=_plain(organ), clip_on=False)
    axes.plot(clicks, mean, color="#111111", linewidth=2.6, label="mean", clip_on=False)
    axes.set_xlabel("Clicks", family=FONT, size=9, color="#555555")
    axes.set_ylim(0, 1)
    axes.set_xlim(*((0.5, 1.5) if len(mean) == 1 else (1, len(mean))))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=15, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, prop={"family": FONT, "size": 8})
    _plain_axes(axes)
    save_figure(figure, path)


def _plain(text: str) -> str:
    """The text as matplotlib's legend shows it letter by letter: no mathematics, not hidden by a leading underscore."""
    shown = text[:28].replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _plain_axes(axes: Any) -> None:
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.tick_params(length=0, labelsize=9, labelcolor="#555555", labelfontfamily=FONT, pad=5)


def _draw_curve(
    axes: Any, title: str, rows: Sequence[Mapping[str, float | int | None]], key: str, last_epoch: int, colour: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    x, y = [p[0] for p in points], [p[1] for p in points]
    style = {"linewidth": 1.0} if len(points) > DENSE_EPOCHS else {"linewidth": 1.8, "marker": "o", "markersize": 4}
    axes.plot(x, y, color=colour, solid_joinstyle="round", clip_on=False, zorder=3, **style)
    axes.set_title(title, family=FONT, size=10.5, color="#333333", loc="left", pad=9)
    axes.set_xlabel("Epoch", family=FONT, size=9, color="#555555")
    axes.set_xlim(*((0.5, 1.5) if last_epoch == 1 else (1 - 0.02 * last_epoch, last_epoch * 1.02)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    _plain_axes(axes)


def _mark_best(axes: Any, rows: Sequence[Mapping[str, float | int | None]], last_epoch: int) -> None:
    """Marks the first epoch with the highest mean Dice and writes its value beside it, where there is room."""
    scored = [(dice, -int(row["epoch"] or 0)) for row in rows if (dice := row.get("mean_dice")) is not None]
    if not scored:
        place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "not validated", family=FONT, size=10, color="#777777", **place)
        return
    dice, minus_epoch = max(scored)
    epoch = -minus_epoch
    dot = {"markersize": 9, "markeredgecolor": "white", "markeredgewidth": 1.5, "clip_on": False}
    axes.plot([epoch], [dice], "o", color=DICE_COLOUR, zorder=5, **dot)
    late, high = 1 < last_epoch < epoch / 0.6, dice > 0.25
    axes.annotate(
        f"best {dice:.4f}\nepoch {epoch}",
        (epoch, dice),
        xytext=(5 if late else -5, -14 if high else 14),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if high else "bottom",
        family=FONT, size=9.5, weight="bold", color="#111111", linespacing=1.35, zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip
