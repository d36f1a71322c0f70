"""Charts and molecules as SVG for an HTML page, in the colors that the page defines.

Every chart is drawn in stand-in colors, which become CSS variables: `--ink`, `--muted`, `--rule`, `--first`, `--second`
and `--third`. So a page can show it on light and on dark ground. The same data give the same text.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any, Final
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Fewer molecules are shown one by one.
FEW: Final = 20
_MANY: Final = 400  # from here on points would hide one another
_BINS: Final = (21, 41)  # where there are fewer than a thousand molecules, and else
_WIDE: Final = (3.8, 2.7)  # inches
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_SERIES: Final = ("#040404", "#050505", "#060606")
_DASHES: Final = ("solid", (0, (4, 1.6)), (0, (1.2, 1.4)))
_MARKERS: Final = ("o", "s", "^")
_VARIABLES: Final = dict(
    zip((_INK, _MUTED, _RULE, *_SERIES), ("ink", "muted", "rule", "first", "second", "third"), strict=True)
)
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qmprop",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.6,
    "patch.linewidth": 0.0,
}


def draw_parity(references: Array, predictions: Array, *, unit: str, label: str) -> str:
    """Return predictions against references [m] as SVG: points, or a density where there are many.

    Args:
        references: Finite reference values.
        predictions: Finite predictions.
        unit: Of both, for the axes.
        label: What the chart shows, for readers who cannot see it.
    """
    with style.context([_SETTINGS], after_reset=True):
        figure, axes = _new_chart()
        both = np.concatenate([references, predictions])
        low, high = _widen(float(both.min()), float(both.max()))
        axes.plot([low, high], [low, high], color=_RULE, linewidth=0.8, zorder=0.5)
        if len(references) < _MANY:
            size = 5.0 if len(references) < FEW else 3.0
            axes.plot(references, predictions, "o", color=_SERIES[0], alpha=0.6, markersize=size, markeredgewidth=0.0)
        else:
            _draw_density(axes, references, predictions, (low, high, low, high))
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3 if max(-low, high) >= 1e4 else 4, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(_Numbers())
        axes.set_xlabel(f"reference [{unit}]")
        axes.set_ylabel(f"predicted [{unit}]")
        return _to_svg(figure, label)


def draw_errors(series: Sequence[Array], *, limit: float, unit: str, label: str) -> str:
    """Return the distribution of errors as SVG: one histogram a series, or a line a molecule where there are few.

    Args:
        series: Finite errors, predicted - reference, of up to three series.
        limit: Errors shown at most, either way.
        unit: Of the errors.
        label: What the chart shows, for readers who cannot see it.
    """
    with style.context([_SETTINGS], after_reset=True):
        figure, axes = _new_chart(left=0.5)
        axes.axvline(0.0, color=_RULE, linewidth=0.8, zorder=0.5)
        edges = np.linspace(-limit, limit, _BINS[max(map(len, series)) >= 1000] + 1)
        few = max(map(len, series)) < FEW
        for k, errors in reversed(list(enumerate(series))):
            if few:
                axes.vlines(errors, 0.3 * k, 0.3 * k + 0.26, color=_SERIES[k], linewidth=1.6)
                continue
            shares = 100.0 * np.histogram(errors, edges)[0] / max(len(errors), 1)
            if k == 0:
                axes.stairs(shares, edges, color=_SERIES[k], alpha=0.22, fill=True)
            axes.stairs(shares, edges, color=_SERIES[k], linewidth=1.2, linestyle=_DASHES[k])
        axes.set_xlim(-limit, limit)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], symmetric=True))
        axes.xaxis.set_major_formatter(_Numbers())
        axes.set_xlabel(f"predicted − reference [{unit}]")
        if few:
            axes.set(ylim=(0.0, 0.5 * len(series)), yticks=[])
            axes.spines["left"].set_visible(False)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_ylabel("molecules [%]")
        return _to_svg(figure, label)


def draw_coverage(series: Sequence[Array], ticks: Sequence[str], *, level: float, x_label: str, label: str) -> str:
    """Return the share of references inside their intervals as SVG, by group.

    Args:
        series: Shares in per cent [groups] of up to three series; NaN where there is none.
        ticks: Names of the groups.
        level: The share that the intervals promise, in per cent.
        x_label: What the groups are.
        label: What the chart shows, for readers who cannot see it.
    """
    with style.context([_SETTINGS], after_reset=True):
        figure, axes = _new_chart(*_WIDE, left=0.55)
        axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
        for k, shares in reversed(list(enumerate(series))):
            axes.plot(shares, color=_SERIES[k], linestyle=_DASHES[k], marker=_MARKERS[k])
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        known = np.concatenate([shares[np.isfinite(shares)] for shares in series])
        axes.set_ylim(min(level - 10.0, float(known.min(initial=level)) - 2.0), 100.5)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[5, 10]))
        axes.set_xlabel(x_label)
        axes.set_ylabel("inside their interval [%]")
        return _to_svg(figure, label)


def draw_calibration(levels: Sequence[Array], shares: Sequence[Array], *, label: str) -> str:
    """Return the share of references inside intervals of each level against that level as SVG.

    Args:
        levels: Shares that intervals promise, in per cent [levels], of up to three series.
        shares: Shares found, in per cent [levels].
        label: What the chart shows, for readers who cannot see it.
    """
    with style.context([_SETTINGS], after_reset=True):
        figure, axes = _new_chart(*_WIDE, left=0.55)
        low = min(float(values[np.isfinite(values)].min(initial=50.0)) for values in (*levels, *shares)) - 2.0
        axes.plot([low, 100.0], [low, 100.0], color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
        for k, (x, y) in reversed(list(enumerate(zip(levels, shares, strict=True)))):
            axes.plot(x, y, color=_SERIES[k], linestyle=_DASHES[k], marker=_MARKERS[k])
        axes.set(xlim=(48.0, 101.0), ylim=(low, 101.0))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[5, 10]))
        axes.set_xlabel("level of the intervals [%]")
        axes.set_ylabel("inside their interval [%]")
        return _to_svg(figure, label)


def draw_trend(widths: Sequence[Array], errors: Sequence[Array], *, label: str) -> str:
    """Return the error found against the half-width given as SVG, both relative to their mean.

    Args:
        widths: Mean half-width of each group [groups], of up to three series.
        errors: Mean absolute error of each group [groups].
        label: What the chart shows, for readers who cannot see it.
    """
    with style.context([_SETTINGS], after_reset=True):
        figure, axes = _new_chart(*_WIDE, left=0.55)
        high = 1.08 * max(float(values.max(initial=1.0)) for values in (*widths, *errors))
        axes.plot([0.0, high], [0.0, high], color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
        for k, (x, y) in reversed(list(enumerate(zip(widths, errors, strict=True)))):
            axes.plot(x, y, color=_SERIES[k], linestyle=_DASHES[k], marker=_MARKERS[k])
        axes.set(xlim=(0.0, high), ylim=(0.0, high))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("half-width / mean half-width")
        axes.set_ylabel("error / mean error")
        return _to_svg(figure, label)


def draw_molecule(smiles: str | None, *, label: str) -> str | None:
    """Return a structural formula as SVG, or None where the SMILES is missing or cannot be read."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.Draw import rdMolDraw2D

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles) if smiles else None
        if molecule is None or molecule.GetNumAtoms() == 0:
            return None
        drawer = rdMolDraw2D.MolDraw2DSVG(220, 150)
        options: Any = drawer.drawOptions()
        options.clearBackground = False
        options.bondLineWidth = 1.5
        options.fixedBondLength = 26.0
        options.minFontSize = options.maxFontSize = 14
        options.padding = 0.04
        colors = {7: _SERIES[0], 8: _SERIES[1], 9: _SERIES[2]}
        palette = {
            number: tuple(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)) for number, color in colors.items()
        }
        options.setAtomPalette({-1: (1 / 255, 1 / 255, 1 / 255), **palette})
        drawer.DrawMolecule(molecule)
        drawer.FinishDrawing()
        text: str = drawer.GetDrawingText()
    return _embed(text, label)


def _new_chart(width: float = 2.7, height: float = 2.35, *, left: float = 0.78) -> tuple[Figure, Axes]:
    """Return a chart of so many inches, with `left` inches for the numbers on its left."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 0.45 / height, 1 - (left + 0.12) / width, 1 - 0.55 / height))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _draw_density(axes: Axes, x: Array, y: Array, extent: tuple[float, float, float, float]) -> None:
    """Draw hexagons, the more molecules the denser on a logarithmic scale."""
    hexagons = axes.hexbin(x, y, gridsize=44, extent=extent, mincnt=1, linewidths=0.15)
    counts = np.asarray(hexagons.get_array(), dtype=np.float64)
    shades = 0.28 + 0.72 * np.log(counts) / max(float(np.log(counts.max())), 1.0)
    red, green, blue = (int(_SERIES[0][k : k + 2], 16) / 255 for k in (1, 3, 5))
    colors = [(red, green, blue, round(shade, 2)) for shade in shades]
    hexagons.set_array(None)
    hexagons.set_facecolor(colors)
    hexagons.set_edgecolor(colors)


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return a range with a margin, which is wide enough for ticks of a few digits."""
    margin = max(0.04 * (high - low), 1e-3 * max(abs(low), abs(high))) or 1.0
    return low - margin, high + margin


class _Numbers(Formatter):
    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the ticks' numbers: as many decimals as one of them needs, commas, true minus signs."""
        texts = [f"{round(value, 9):.10g}" for value in values]
        digits = max((len(text.partition(".")[2]) for text in texts if "e" not in text), default=0)
        return [f"{value:z,.{digits}f}".replace("-", "−") for value in values]

    def __call__(self, value: float, position: int | None = None) -> str:
        """Return one tick's number."""
        return self.format_ticks([value])[0]


def _to_svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(r"<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    return _embed(text, label)


def _embed(text: str, label: str) -> str:
    """Return an SVG document as an element of a page: no prolog, no fixed size, the page's colors, names of its own."""
    text = text[text.index("<svg") :].strip()
    head, body = text.split(">", 1)
    (box,) = re.findall(r"viewBox=[\"']([^\"']+)[\"']", head)
    for color, name in _VARIABLES.items():
        body = re.sub(color, f"var(--{name})", body, flags=re.IGNORECASE)
    body = _rename(re.sub(r"\s*\n\s*", " ", body))
    return f'<svg viewBox="{box}" role="img" aria-label={quoteattr(label)}><title>{escape(label)}</title>{body}'


def _rename(body: str) -> str:
    """Drop the ids that nothing refers to, and give the others names that no other drawing has."""
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", body))
    prefix = "c" + hashlib.sha256(body.encode()).hexdigest()[:8]
    names = {name: f"{prefix}-{k}" for k, name in enumerate(sorted(used))}

    def define(match: re.Match[str]) -> str:
        return f' id="{names[match[1]]}"' if match[1] in names else ""

    body = re.sub(r" id=[\"']([^\"']*)[\"']", define, body)
    body = re.sub(r"(href=\"|url\()#([\w.-]+)", lambda match: f"{match[1]}#{names[match[2]]}", body)
    return re.sub(r"\bxlink:href=", "href=", body)
