"""Prompts as the network sees them: named, stored text embeddings."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldmodel.errors import UserError
from worldmodel.files import replacing_file


class PromptBook:
    """Embeddings [L, D] float32 by name, all of one shape, and the full text of each prompt.

    embeddings: name -> [L, D]; the name "" is the negative prompt of guidance and cannot be
    chosen. texts: name -> the sentence that was embedded (a name without one is its own text).
    """

    def __init__(self, embeddings: Mapping[str, Tensor], texts: Mapping[str, str] | None = None):
        self._embeddings = {
            name: tensor.detach().float().contiguous() for name, tensor in embeddings.items()
        }
        self._texts = dict(texts or {})
        shapes = {tuple(tensor.shape) for tensor in self._embeddings.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise UserError(
                "A prompt book needs embeddings [L, D] of one shape, got "
                f"{sorted(shapes) or 'none'}."
            )
        for name in self._texts:
            self._check(name)

    @classmethod
    def load(cls, path) -> "PromptBook":
        """Reads a safetensors file (name -> [L, D]; metadata "texts": JSON of name -> text)."""
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                embeddings = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                texts = (file.metadata() or {}).get("texts", "{}")
            return cls(embeddings, _read_texts(texts))
        except (OSError, SafetensorError, UserError) as error:
            reason = str(error).rstrip(".")
            raise UserError(
                f"Prompts {path} cannot be read ({reason}); fetch or export the file again."
            ) from None

    def save(self, path) -> None:
        """Writes what `load` reads, to a temporary name that is then renamed."""
        with replacing_file(path) as temporary:
            save_file(self._embeddings, temporary, {"texts": json.dumps(self._texts)})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._embeddings if name))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D) of every embedding."""
        return tuple(next(iter(self._embeddings.values())).shape)

    @property
    def unconditional(self) -> Tensor:
        """The embedding of "no prompt" [L, D]: the one stored under "", or zeros."""
        return self._embeddings.get("", torch.zeros(self.shape))

    def __getitem__(self, name: str) -> Tensor:
        """[L, D] float32; UserError for an unknown name."""
        self._check(name)
        return self._embeddings[name]

    def __contains__(self, name: object) -> bool:
        return name != "" and name in self._embeddings

    def text(self, name: str) -> str:
        """The sentence behind a name."""
        self._check(name)
        return self._texts.get(name, name)

    def _check(self, name: str) -> None:
        if name not in self:
            near = difflib.get_close_matches(str(name), self.names, 1, 0)
            hint = (
                f"did you mean {near[0]!r}? Known are {', '.join(self.names)}."
                if near
                else ("there are none.")
            )
            raise UserError(f"Unknown prompt {name!r}; {hint}")


def _read_texts(text: str) -> dict[str, str]:
    """JSON of name -> sentence. Raises UserError for anything else."""
    try:
        texts = json.loads(text)
    except ValueError as error:
        raise UserError(f"its texts are no JSON, {error}") from None
    if not isinstance(texts, dict):
        raise UserError("its texts are no table of names and sentences")
    return texts
