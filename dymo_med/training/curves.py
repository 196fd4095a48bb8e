"""Training curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dymo_med.files import write_bytes

_COLUMNS = 3  # stages side by side


def draw_curves(stages: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw training loss and validation score of every stage.

    Args:
        stages: Rows of the log by stage.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(stages), _COLUMNS)
    lines = -(-len(stages) // _COLUMNS)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, rows) in enumerate(stages.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        epochs = [r["epoch"] + 1 for r in rows]
        axes.plot(epochs, [r["loss"] for r in rows], color="0.55", label="training loss")
        axes.plot(epochs, [-r["score"] for r in rows], color="C0", label="validation loss")
        best = max(rows, key=lambda r: r["score"])
        axes.axvline(best["epoch"] + 1, color="C0", linewidth=0.8, linestyle=":")
        axes.set(title=f"{name}: best epoch {int(best['epoch']) + 1}", xlabel="epoch")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())
