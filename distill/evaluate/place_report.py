"""The report of an evaluation in a place: a table of all figures, and the plot of the atlas."""

import cv2
import numpy as np

from distill.evaluate.report import table

SIZE = (320, 560)  # of the plot, pixels
MARGIN = 48  # pixels
INK = (0, 0, 0)
LINE = (190, 90, 30)


def place_page(results: dict) -> str:
    """The results as a Markdown page: the settings, then one line per figure."""
    about = results["about"]
    where = f"in the place {about['place']}" if about["place"] else "without a place"
    parts = [
        f"`{about['command']}`",
        f"commit {about['commit']}; {about['hardware']['gpu'] or about['hardware']['processor']}, "
        f"{about['dtype']}, {about['seconds']:.0f} s; {about['variant']} {where}, seed "
        f"{about['seed']}, {about['cases']} cases of at most {about['longest']} s",
    ]
    for name, entry in results.items():
        if name != "about":
            parts.append(f"{name}\n\n{_suite_table(entry)}")
    return "\n\n".join(parts) + "\n"


def plot(curve: list[dict]) -> np.ndarray:
    """PSNR (dB) over seconds, with one standard error to both sides: uint8 [H, W, 3]."""
    height, width = SIZE
    picture = np.full((height, width, 3), 255, np.uint8)
    seconds = np.array([point["seconds"] for point in curve], float)
    mean = np.array([point["mean"] for point in curve])
    error = np.array([point["se"] or 0.0 for point in curve])
    low = np.floor((mean - error).min()) - 1
    high = np.ceil((mean + error).max()) + 1

    def spot(second: float, value: float) -> tuple[int, int]:
        x = MARGIN + second / seconds.max() * (width - 2 * MARGIN)
        y = height - MARGIN - (value - low) / (high - low) * (height - 2 * MARGIN)
        return round(x), round(y)

    for value in np.linspace(low, high, 5):
        cv2.line(picture, spot(0, value), spot(seconds.max(), value), (220, 220, 220), 1)
        _label(picture, f"{value:.1f}", (6, spot(0, value)[1] + 4))
    for second in (0, seconds.max() / 2, seconds.max()):
        x, y = spot(second, low)
        _label(picture, f"{second:.0f} s", (x - 12, y + 18))
    _label(picture, "atlas: PSNR (dB) at the pose reached", (MARGIN, 24))
    points = [spot(*pair) for pair in zip(seconds, mean, strict=True)]
    for before, after in zip(points[:-1], points[1:], strict=True):
        cv2.line(picture, before, after, LINE, 2, cv2.LINE_AA)
    for second, value, spread, point in zip(seconds, mean, error, points, strict=True):
        cv2.line(picture, spot(second, value - spread), spot(second, value + spread), LINE, 1)
        cv2.circle(picture, point, 3, LINE, -1, cv2.LINE_AA)
    return picture


def _suite_table(entry: dict) -> str:
    """One line per figure of a suite."""
    if "skipped" in entry:
        return entry["skipped"]
    return table(["figure", "value", "standard error", "cases"], list(_lines(entry, ())))


def _lines(entry: dict, path: tuple[str, ...]):
    """Lines of a nested dict; statistics become one line."""
    if "mean" in entry:
        extras = [f"{k} {v}" for k, v in entry.items() if k not in ("mean", "se", "cases")]
        name = ", ".join(path)
        yield [
            name,
            "; ".join([_cell(entry["mean"]), *extras]),
            _cell(entry["se"]),
            _cell(entry["cases"]),
        ]
        return
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _lines(value, (*path, str(key)))
        elif not isinstance(value, list):
            yield [", ".join((*path, str(key))), _cell(value), "", ""]


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _label(picture: np.ndarray, text: str, position: tuple[int, int]) -> None:
    cv2.putText(picture, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.4, INK, 1, cv2.LINE_AA)
