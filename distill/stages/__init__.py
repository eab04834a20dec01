"""The stages of a recipe, by name, in the order in which they build on each other."""

import torch

from distill.config import Recipe
from distill.stages.autoencoder import AutoencoderStage
from distill.stages.bidirectional import BidirectionalStage
from distill.stages.consistency import ConsistencyStage
from distill.stages.dmd import DmdStage
from distill.stages.places import PlacesStage
from distill.stages.stage import Stage
from distill.stages.teacher_forcing import TeacherForcingStage

STAGES: dict[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "bidirectional": BidirectionalStage,
    "teacher_forcing": TeacherForcingStage,
    "consistency": ConsistencyStage,
    "dmd": DmdStage,
    "places": PlacesStage,
}


def build_stage(name: str, recipe: Recipe, device: torch.device) -> Stage:
    """The stage `name` (a key of STAGES) of a recipe."""
    if name == "autoencoder":
        return AutoencoderStage(recipe.autoencoder, recipe.data.root, device)
    return STAGES[name](recipe, device)
