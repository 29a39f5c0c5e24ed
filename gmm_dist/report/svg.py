"""A matplotlib drawing as an SVG element that lives inside an HTML page.

Colours become CSS variables, so that one drawing serves light and dark; text stays text, in the
page's font; ids are the drawing's own; it scales, and it has a title and a description for those
who cannot see it. No pyplot, no dates, no URL; equal drawings give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

N_COLOURS = 8
"""Colours that readers tell apart; component c has colour c modulo this, and its number."""

# Colours that stand for the page's, until the drawing is done.
INK, MUTED, GRID, ACCENT = "#0a0b00", "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(N_COLOURS))
HALO = "halo"
"""The gid of text that lies on a drawing: the page draws its paper round the letters."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent"} | {
    colour: f"--c{i}" for i, colour in enumerate(SERIES)
}
_PLACEHOLDER = re.compile("#0a0[bc][0-9a-f]{2}")
_REFERENCE = re.compile(r"#([\w.-]+)")
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.id": None,
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG element, and the width in CSS pixels at which its text has its own size."""

    svg: str
    width: int


def drawn(
    name: str,
    size: tuple[float, float],
    draw: Callable[[Figure], None],
    title: str,
    description: str,
) -> Drawing:
    """Have a figure filled, and return it as SVG.

    Args:
        name: Begins the drawing's ids; unique on the page.
        size: Width and height, CSS pixels.
        draw: Fills the figure.
        title: What the picture is called.
        description: What it shows, for those who cannot see it.
    """
    written = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        # The page's font draws the letters, so glyphs that ours lacks do not matter.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(written, format="svg", metadata={"Date": None})
    return Drawing(_adapted(written.getvalue(), name, title, description), round(size[0]))


def _adapted(text: str, name: str, title: str, description: str) -> str:
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    referred = {
        match
        for element in root.iter()
        for key, value in element.attrib.items()
        if _local(key) in ("href", "clip-path", "style")
        for match in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _value(_local(key), value, name)
            for key, value in element.attrib.items()
            if _local(key) != "id" or value in referred or value == HALO
        }
        if element.attrib.get("id") == f"{name}-{HALO}":
            element.attrib = {key: v for key, v in element.attrib.items() if key != "id"}
            element.attrib["class"] = HALO
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for i, (tag, said) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = said
        root.insert(i, element)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("data:"):
        return value.replace("\n", "")
    if key in ("href", "clip-path"):
        return _REFERENCE.sub(rf"#{name}-\1", value)
    if key == "style":
        return _PLACEHOLDER.sub(lambda m: f"var({_VARIABLES[m[0]]})", _FONT.sub("", value))
    return value
