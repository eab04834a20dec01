"""Which encoder made the latents and conditions of clips."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from worldmodel.errors import UserError


def encoder_of(path: Path) -> str | None:
    """Fingerprint of the encoder that made a file of latents or conditions; None when there is no
    complete file, or it names none.
    """
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("encoder")
    except (OSError, SafetensorError):
        return None


def check_encoders(where, files: Iterable[Path], expected: str | None = None) -> None:
    """UserError, beginning with `where`, when files of latents and conditions come from different
    encoders, or from another than `expected`. Files that name none count as right.
    """
    for file in files:
        found = encoder_of(file)
        expected = expected or found
        if found and found != expected:
            raise UserError(
                f"{where}: expected latents and conditions of one encoder ({expected}), {file} is "
                f"of another ({found}); run `python -m distill encode` or `condition` again with "
                "that autoencoder"
            )
