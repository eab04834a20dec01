"""The stages of a recipe, by name, in the order in which they build on each other."""

import importlib

# Each stage is the class named here. Only the chosen one is imported.
STAGES = {
    "autoencoder": "distill.stages.autoencoder:AutoencoderStage",
    "bidirectional": "distill.stages.bidirectional:BidirectionalStage",
    "teacher_forcing": "distill.stages.teacher_forcing:TeacherForcingStage",
    "consistency": "distill.stages.consistency:ConsistencyStage",
    "dmd": "distill.stages.dmd:DmdStage",
}


def build_stage(name: str, recipe, device):
    """The stage `name` (a key of STAGES) of a recipe."""
    module, kind = STAGES[name].split(":")
    stage = getattr(importlib.import_module(module), kind)
    if name == "autoencoder":
        return stage(recipe.autoencoder, recipe.data.root, device)
    return stage(recipe, device)
