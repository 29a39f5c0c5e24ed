"""Make the pictures of the README and of docs/: a sweep on a terminal, and its report.

python tools/pictures.py

Runs the README's first command on the flights in a temporary folder, and writes docs/images/.
Needs `pip install -c constraints.txt -e '.[dev,pictures]'`: the report is shown by the browser that
comes with Qt, off screen.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
SWEEP = "gmm-dist sweep ./flights --k 2..24 --output ./flights-model"
COLUMNS = 118  # what the widest line of the table takes
WIDTH, HEIGHT = 1200, 3600  # pixels of the report that are shown
PARTS = ("report.png", "clusters.png")  # down to the table of clusters; the picture of the rows
_EDGES = """
const many = document.querySelector("[aria-labelledby=how-many] .scroll").getBoundingClientRect();
const rows = document.querySelector("figure.picture").closest(".beside").getBoundingClientRect();
[document.documentElement.clientWidth, 0, many.bottom + 8, rows.top, rows.bottom]
"""
# As the script gmm-dist does, whether or not it is installed.
_COMMAND = """
import sys
from gmm_dist.commands.early import main
del sys.argv[0]
main()
"""
_SECONDS = 600  # for a sweep, at most


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        place = Path(folder)
        datasets = ROOT / "benchmarks" / "datasets.py"
        subprocess.run([sys.executable, datasets, "flights", "./flights"], cwd=place, check=True)
        (IMAGES / "sweep.svg").write_text(terminal(swept(place), SWEEP))
        photograph(place / "flights-model" / "report.html", IMAGES)


def swept(place: Path) -> str:
    """Run the sweep, and return what it writes to a terminal, with its escapes."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *shlex.split(SWEEP)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_SECONDS,
        check=True,
    )
    return done.stdout


def terminal(output: str, command: str) -> str:
    """Draw a terminal as SVG; it names no font that a browser would have to fetch."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.assemble(("$ ", "dim"), command))
    console.print(Text.from_ansi(output))
    svg = console.export_svg(title="gmm_dist", unique_id="sweep")
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


def photograph(page: Path, folder: Path) -> None:
    """Show the report off screen, and save two parts of it as small PNGs."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    flags = "--disable-gpu --hide-scrollbars"
    if os.geteuid() == 0:  # Chromium's sandbox is not for root
        flags += " --no-sandbox"
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", flags)
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    app = QApplication([sys.argv[0]])
    view = QWebEngineView()
    view.resize(WIDTH, HEIGHT)

    def save(found: list[float]) -> None:
        whole = view.grab().toImage()
        width, *edges = map(int, found)
        for name, top, bottom in zip(PARTS, edges[::2], edges[1::2], strict=True):
            part = whole.copy(0, top, width, bottom - top)
            part.save(str(folder / name))
            _shrink(folder / name)
        app.exit(0)

    def measure() -> None:
        page = view.page()
        assert page is not None
        page.runJavaScript(_EDGES, save)

    # A moment after the page is there, it is drawn.
    view.loadFinished.connect(lambda ok: QTimer.singleShot(1000, measure) if ok else app.exit(1))
    QTimer.singleShot(60_000, lambda: app.exit(1))
    view.load(QUrl.fromLocalFile(str(page)))
    view.show()
    if app.exec():
        raise SystemExit(f"error: {page} could not be shown")


def _shrink(picture: Path) -> None:
    """Take 256 colours for all that there are: a third of the bytes, and nobody sees it."""
    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    main()
