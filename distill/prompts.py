"""Prompt embeddings of a recipe: stored ones, or random ones seeded by the captions, which need no
text encoder.
"""

import hashlib
from collections.abc import Iterable

import torch

from distill.config import Recipe
from worldmodel.errors import UserError
from worldmodel.models.prompts import PromptBook


def make_prompt_book(captions: Iterable[str], length: int, dim: int) -> PromptBook:
    """A random embedding `[length, dim]` of unit variance for every caption, the same on every
    machine.

    Differs: a world with a handful of captions needs names, not language; a caption's SHA-256 seeds
    its embedding.
    """
    embeddings = {}
    for caption in sorted(set(captions)):
        seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1
        embeddings[caption] = torch.randn(
            length, dim, generator=torch.Generator().manual_seed(seed)
        )
    return PromptBook(embeddings)


def open_prompts(recipe: Recipe, captions: Iterable[str]) -> PromptBook:
    """The embeddings in `data.prompts`, or random ones of the captions.

    Raises UserError when `data.prompts` lacks a caption or does not fit the model.
    """
    captions = sorted(set(captions))
    if not recipe.data.prompts:
        return make_prompt_book(captions, recipe.model.text_length, recipe.model.text_dim)
    book = PromptBook.load(recipe.data.prompts)
    missing = [caption for caption in captions if caption not in book]
    if missing:
        raise UserError(
            f"{recipe.data.prompts} has no prompt {missing[0]!r}, but clips have: add it, or "
            "leave data.prompts empty"
        )
    if book.shape[1] != recipe.model.text_dim:
        raise UserError(
            f"{recipe.data.prompts} holds embeddings of width {book.shape[1]}, but model.text_dim "
            f"is {recipe.model.text_dim}: set it to {book.shape[1]}"
        )
    return book
