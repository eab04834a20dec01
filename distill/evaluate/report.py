"""The report of an evaluation: Markdown tables and contact sheets."""

import cv2
import numpy as np

LABEL_WIDTH = 200  # pixels
GAP = 4  # pixels


def markdown(results: dict) -> str:
    """The results of `evaluate` as a Markdown page: the settings, then one table per question."""
    about = results["about"]
    parts = [
        f"`{about['command']}`",
        f"commit {about['commit']}; {about['hardware']['gpu'] or about['hardware']['processor']}, "
        f"{about['dtype']}, {about['seconds']:.0f} s; seed {about['seed']}, {about['cases']} "
        f"cases of {about['latents']} latents in held-out towns",
        fidelity_table(results["rows"]),
        returns_table(results["returns"]),
        flow_table(results["flow"]),
    ]
    parts += [drift_table(results["drift"])] if results["drift"] else []
    parts += [windows_table(results["windows"], about["late"])] if results.get("windows") else []
    parts += [thresholds_table(results["thresholds"])] if results["thresholds"] else []
    return "\n\n".join(parts) + "\n"


def fidelity_table(rows: list[dict]) -> str:
    """One line per model and horizon."""
    head = [
        "model",
        "latent",
        "PSNR dB",
        "SSIM",
        "correlation",
        "sharpness (p10-p90)",
        "right",
        "right or neighbour",
        "of clips",
    ]
    lines = []
    for row in rows:
        for horizon, score in row["horizons"].items():
            found = score["retrieval"]
            near = found["right"] + found["neighbour"] if found["clips"] else None
            lines.append(
                [
                    row["name"],
                    horizon,
                    f"{score['psnr']:.1f}",
                    f"{score['ssim']:.3f}",
                    f"{score['correlation']:.3f}",
                    (
                        f"{score['sharpness']:.2f} "
                        f"({score['sharpness_p10']:.2f}-{score['sharpness_p90']:.2f})"
                    ),
                    _percent(found["right"]),
                    _percent(near),
                    str(found["clips"]),
                ]
            )
    return (
        "Against the ground truth (sharpness: Laplacian energy, generated / true; retrieval among "
        "the clip's true frames)\n\n"
    ) + table(head, lines)


def returns_table(rows: list[dict]) -> str:
    """Leave and return: similarity to the true first frame on return, minus that of the view away
    from it.
    """
    head = ["model", "path", "return", "away", "gain", "share of the possible gain", "PSNR gain dB"]
    lines = [
        [
            row["name"],
            row["path"],
            f"{row['return']:.3f}",
            f"{row['away']:.3f}",
            f"{row['gain']:+.3f}",
            _percent(row["share"]),
            f"{row['psnr_gain']:+.1f}",
        ]
        for row in rows
    ]
    return "Leave and return (correlation with the true first frame)\n\n" + table(head, lines)


def flow_table(rows: list[dict]) -> str:
    """Whether the picture moves the way the camera does."""
    head = [
        "model",
        "turning right moves the picture left",
        "turning left, right",
        "forward grows it",
        "back shrinks it",
    ]
    lines = [
        [row["name"], *(_percent(row[kind]) for kind in ("right", "left", "forward", "back"))]
        for row in rows
    ]
    return "Direction of the optical flow (share of the cases)\n\n" + table(head, lines)


def drift_table(rows: list[dict]) -> str:
    """Sharpness and saturation over a long walk, relative to the first frame, generated / true."""
    head = ["model", "measure", *(f"{second:.0f} s" for second in rows[0]["seconds"])]
    lines = []
    for row in rows:
        for measure in ("sharpness", "saturation"):
            pairs = zip(row[measure], row[f"{measure}_of_truth"], strict=True)
            lines.append(
                [row["name"], measure, *(f"{ours:.2f} / {true:.2f}" for ours, true in pairs)]
            )
    return (
        "Drift over a long walk (mean of the span that ends there, relative to the first frame: "
        "generated / true)\n\n"
    ) + table(head, lines)


def windows_table(rows: list[dict], late: int) -> str:
    """The picture late in a long walk relative to an early one, by window."""
    lines = [
        [row["name"], *(f"{row[measure]:.2f}" for measure in ("sharpness", "saturation", "flow"))]
        for row in rows
    ]
    return f"Long walks by window + sinks (latent {late} / latent {late // 10})\n\n" + table(
        ["window", "sharpness", "saturation", "optical flow"], lines
    )


def thresholds_table(thresholds: list[dict]) -> str:
    """The requirements on the embedded world."""
    lines = [
        [entry["name"], entry["threshold"], entry["value"], "yes" if entry["passed"] else "**no**"]
        for entry in thresholds
    ]
    return "Thresholds\n\n" + table(["model", "threshold", "measured", "passed"], lines)


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])


def contact_sheet(rows: list[tuple[str, np.ndarray]], columns: list[str]) -> np.ndarray:
    """Labelled rows of frames uint8 [n, H, W, 3] under column titles -> one picture uint8 [H', W',
    3].
    """
    height, width = rows[0][1].shape[1:3]
    picture = np.full(
        (24 + len(rows) * (height + GAP), LABEL_WIDTH + len(columns) * (width + GAP), 3),
        255,
        np.uint8,
    )
    for column, title in enumerate(columns):
        _write(picture, title, (LABEL_WIDTH + column * (width + GAP), 17))
    for line, (label, frames) in enumerate(rows):
        top = 24 + line * (height + GAP)
        _write(picture, label, (4, top + height // 2))
        for column, frame in enumerate(frames):
            left = LABEL_WIDTH + column * (width + GAP)
            picture[top : top + height, left : left + width] = frame
    return picture


def _write(picture: np.ndarray, text: str, position: tuple[int, int]) -> None:
    cv2.putText(picture, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
