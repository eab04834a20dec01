"""The folder of one stage's run: checkpoints that survive `kill -9`, metrics, pictures, the
exported result.

    runs/<recipe>/<stage>/
        checkpoints/step-00000500/   one safetensors file per network and optimizer, state.json
        metrics.jsonl                one line per log step
        samples/step-00000500.png
        export/                      input of the next stage and the bundle

Everything is written under a temporary name and renamed. Nothing is pickled.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.config import current_names
from distill.stages.stage import Stage
from worldmodel.errors import UserError, first_line
from worldmodel.files import exclusive, remove_leftovers, replacing_folder, write_file
from worldmodel.images import write_png

KEEP = 2  # checkpoints
FORMER_NAMES = {"fake_score": "critic"}  # of networks and their optimizers, in older checkpoints
_STEP = "step-" + 8 * "[0-9]"


class RunFolder:
    """Reads and writes one stage's run.

    config: the options, by section, that a checkpoint must agree with.
    defaults: the same of an empty recipe: the values of options that a checkpoint is too old to
    name.
    """

    def __init__(self, root: Path, config: dict, defaults: dict):
        self.root = Path(root)
        self.config = config
        self.defaults = defaults
        self.checkpoints = self.root / "checkpoints"

    def held(self) -> AbstractContextManager[None]:
        """Keep other trainings out of this run. Raises UserError while one is in it."""
        return exclusive(self.root)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return max(self.checkpoints.glob(_STEP), default=None)

    def save(self, step: int, stage: Stage, drawn: int) -> Path:
        """Write everything that the next step depends on.

        drawn: samples taken from the dataset so far. Random draws are functions of the seed and the
        step, so no generator's state is stored.
        """
        final = self.checkpoints / f"step-{step:08d}"
        remove_leftovers(self.checkpoints)
        with replacing_folder(final) as folder:
            for name, module in stage.modules.items():
                save_file(_tensors(module), folder / f"{name}.safetensors")
            for name, optimizer in stage.optimizers.items():
                save_file(_flatten(optimizer), folder / f"optimizer-{name}.safetensors")
            state = {"step": step, "drawn": drawn, "config": self.config}
            (folder / "state.json").write_text(json.dumps(state, indent=1))
        for old in sorted(self.checkpoints.glob(_STEP))[:-KEEP]:
            shutil.rmtree(old)
        return final

    def restore(self, stage: Stage) -> tuple[int, int]:
        """Load the newest checkpoint into `stage`; return (step, drawn), (0, 0) without a
        checkpoint.

        Raises UserError when the checkpoint belongs to another config or does not fit the stage.
        """
        folder = self.newest()
        if folder is None:
            return 0, 0
        try:
            state = json.loads((folder / "state.json").read_text())
            progress = int(state["step"]), int(state["drawn"])
            saved = {section: dict(values) for section, values in state["config"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(folder, error) from error
        self._check_config(current_names(saved, str(folder)), folder)
        for name, module in stage.modules.items():
            tensors = _load(folder, "", name)
            try:
                module.load_state_dict(tensors)
            except RuntimeError as error:  # of another network
                raise _unreadable(folder, error) from error
        for name, optimizer in stage.optimizers.items():
            _unflatten(optimizer, _load(folder, "optimizer-", name))
        return progress

    def log(self, line: dict) -> None:
        """Append one line to metrics.jsonl."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def picture(self, step: int, image: np.ndarray) -> None:
        """Write a sample picture, uint8 RGB [H, W, 3]."""
        write_png(self.root / "samples" / f"step-{step:08d}.png", image)

    def export(self, stage: Stage) -> Path:
        """Write the stage's result to `export/`; the previous one stays until the new one is
        complete.
        """
        final = self.root / "export"
        with replacing_folder(final) as folder:
            stage.export(folder)
        return final

    def _check_config(self, saved: dict, folder: Path) -> None:
        for section in self.config:
            for key, value in self.config[section].items():
                was = saved.get(section, {}).get(key, self.defaults[section][key])
                if was != value:
                    raise UserError(
                        f"{folder} was trained with {section}.{key} = {was}, not {value}: set it "
                        "back, or give this run another run.folder"
                    )

    def drop_metrics_after(self, step: int) -> None:
        """Remove the lines of steps that a run resumed from `step` will repeat."""
        path = self.root / "metrics.jsonl"
        if path.exists():
            lines = [
                line
                for line in path.read_text(errors="replace").splitlines(keepends=True)
                if _step_of(line) <= step
            ]
            write_file(path, "".join(lines))


def _load(folder: Path, prefix: str, name: str) -> dict[str, Tensor]:
    """Tensors of a network or optimizer in a checkpoint, which may be older than its name."""
    path = folder / f"{prefix}{name}.safetensors"
    if not path.is_file() and name in FORMER_NAMES:
        path = folder / f"{prefix}{FORMER_NAMES[name]}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be read ({first_line(error)}): remove that folder to "
        "resume from the one before"
    )


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for a line that a killed run left incomplete."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": tensor.contiguous()
        for index, values in state.items()
        for name, tensor in values.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the optimizer's state; the groups (learning rate, betas) stay those of the config.

    A tensor of a parameter's shape gets that parameter's memory layout: fused optimizers walk
    through both in step.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = (
            torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
        )
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
