"""The training loop of all stages. A stage defines its losses; this does the rest: batches,
precision, clipping, learning rate, averages, checkpoints, metrics, pictures. A killed run resumes
from its last checkpoint and then computes exactly what it would have computed.
"""

import argparse
import importlib.util
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from distill.config import Recipe, Run, StageConfig, TransformerConfig, load_recipe
from distill.parallel import Processes
from distill.run_folder import RunFolder
from distill.stages import STAGES, build_stage
from distill.stages.stage import Stage
from worldmodel.config import as_dict
from worldmodel.errors import Stopped, UserError
from worldmodel.files import check_output_folder

# Options that a resumed run may change.
FREE = {"steps", "sample_steps", "autoencoder", "root"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="recipe, a YAML file such as configs/blocks/cpu.yaml")
    parser.add_argument(
        "--stage", required=True, choices=list(STAGES), help="stage of the recipe to train"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. dmd.lr=2e-5; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the newest checkpoint, if there is one"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="write the newest checkpoint's export/ and stop"
    )


def run(args: argparse.Namespace) -> None:
    train(
        load_recipe(args.config, args.set),
        args.stage,
        resume=args.resume,
        export_only=args.export_only,
    )


def train(recipe: Recipe, name: str, *, resume: bool = False, export_only: bool = False) -> Path:
    """Train stage `name` of a recipe to its end and return the folder of the exported result.

    SIGTERM and Ctrl-C leave a checkpoint, export nothing and raise `Stopped`. Raises UserError for
    a run folder that is in use without `resume`, that another process trains in, or that belongs to
    another config, and for a loss that is not finite.
    """
    config: StageConfig = getattr(recipe, name)
    folder = RunFolder(
        Path(recipe.run.folder) / name, _identity(recipe, name), _identity(Recipe(), name)
    )
    if folder.newest() and not (resume or export_only):
        raise UserError(
            f"{folder.root} holds a run already ({folder.newest().name}): add --resume, or choose "
            "another run.folder"
        )
    if export_only and not folder.newest():
        raise UserError(f"{folder.root} has no checkpoint to export: train the stage first")
    check_output_folder(folder.root)
    accelerator = Accelerator(
        cpu=recipe.run.device == "cpu", log_with=_trackers(), project_dir=folder.root
    )
    if recipe.run.device == "cuda" and accelerator.device.type != "cuda":
        raise UserError("run.device is cuda, but torch sees no such device: set it to auto or cpu")
    torch.manual_seed(recipe.run.seed)
    processes = Processes.of(accelerator)
    stage = build_stage(name, recipe, accelerator.device)
    for optimizer in stage.optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    with folder.held() if processes.is_main and not export_only else nullcontext():
        step, drawn = folder.restore(stage)
        if not export_only:
            if processes.is_main:
                folder.drop_metrics_after(step)
            accelerator.init_trackers("tensorboard")
            stopped = _loop(recipe, config, stage, folder, processes, accelerator, step, drawn)
            accelerator.end_training()
            if stopped:
                raise stopped  # the next stage must not start from half-trained weights
        if processes.is_main:
            folder.export(stage)
    return folder.root / "export"


def _loop(
    recipe: Recipe,
    config: StageConfig,
    stage: Stage,
    folder: RunFolder,
    processes: Processes,
    accelerator: Accelerator,
    step: int,
    drawn: int,
) -> Stopped | None:
    """Run the steps from `step` to `config.steps`, or until a signal asks to stop."""
    device = accelerator.device
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=recipe.run.precision == "bfloat16"
    )
    count = config.batch * stage.batches
    saved = time.monotonic()
    stopping = False
    meter = Meter(step)
    generator = torch.Generator(device)
    grad_clip = recipe.optimizer.grad_clip
    with (
        StopRequest() as stop,
        Batches(stage, count, processes, recipe.run.seed, drawn) as batches,
        tqdm(total=config.steps, initial=step, unit="step", disable=not processes.is_main) as bar,
    ):
        while step < config.steps and not stopping:
            _set_learning_rate(stage, config, step)
            generator.manual_seed(processes.seed(recipe.run.seed, step))
            batch = next(batches)
            for update in train_step(stage, batch, step, generator, autocast, grad_clip, processes):
                meter.add(*update)
            step = step + 1
            drawn = drawn + count
            bar.update()
            stopping = processes.any(stop.number > 0, device)
            if not processes.is_main:
                continue
            save = _due(step, config, recipe.run, saved, stopping)
            if save or step % recipe.run.log_every == 0:
                _log(meter.line(step, count, stage.optimizers), folder, accelerator, bar)
            if recipe.run.sample_every and step % recipe.run.sample_every == 0:
                _picture(stage, folder, step, recipe.run.seed, autocast, device)
            if save:
                folder.save(step, stage, drawn)
                saved = time.monotonic()
    processes.wait()
    if step == config.steps:
        return None
    sentence = (
        f"stopped at step {step} of {config.steps}, export/ is unchanged; --resume continues from "
        "there."
    )
    return Stopped(stop.number or signal.SIGTERM, sentence if processes.is_main else "")


def _log(line: dict[str, float], folder: RunFolder, accelerator: Accelerator, bar: tqdm) -> None:
    """Write one line of metrics to metrics.jsonl, TensorBoard and the progress bar."""
    folder.log(line)
    step = line["step"]
    accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)
    losses = {key: f"{value:.4f}" for key, value in line.items() if key.startswith("loss/")}
    bar.set_postfix(losses)


def train_step(
    stage: Stage,
    batch: dict,
    step: int,
    generator: torch.Generator,
    autocast,
    grad_clip: float,
    processes: Processes,
) -> Iterator[tuple[str, Tensor, Tensor, dict]]:
    """Run one step of a stage; yield after each update the optimizer's name, the loss, the
    gradient's norm and the metrics.
    """
    for name, loss, metrics in _under(autocast, stage.losses(batch, step, generator)):
        yield name, loss, _update(stage, name, loss, step, grad_clip, processes), metrics


def _update(
    stage: Stage, name: str, loss: Tensor, step: int, grad_clip: float, processes: Processes
) -> Tensor:
    """Run one backward pass and optimizer step; return the gradient's global norm before
    clipping.
    """
    optimizer = stage.optimizers[name]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    processes.average([p.grad for p in parameters if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    if name in stage.averages:
        stage.averages[name].update(step)
    return norm


def _under(autocast, losses: Iterator) -> Iterator:
    """The losses, each computed under autocast; the caller's code between them is not."""
    while True:
        with autocast:
            item = next(losses, None)
        if item is None:
            return
        yield item


def learning_rate_factor(config: StageConfig, step: int) -> float:
    """Factor on the peak learning rate at a step: linear rise, plateau, decay from `decay_from` to
    `lr_end`.
    """
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant" or config.decay_from >= 1.0:
        return rise
    progress = max(0.0, (step / config.steps - config.decay_from) / (1.0 - config.decay_from))
    fall = 1.0 - progress if config.decay == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return rise * (config.lr_end + (1.0 - config.lr_end) * fall)


def _set_learning_rate(stage: Stage, config: StageConfig, step: int) -> None:
    factor = learning_rate_factor(config, step)
    for optimizer in stage.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _due(step: int, config: StageConfig, options: Run, saved: float, stopping: bool) -> bool:
    """Whether to write a checkpoint after this step."""
    by_steps = options.checkpoint_every and step % options.checkpoint_every == 0
    by_time = (
        options.checkpoint_minutes and time.monotonic() - saved >= 60 * options.checkpoint_minutes
    )
    return bool(by_steps or by_time or stopping or step == config.steps)


def _picture(stage: Stage, folder: RunFolder, step: int, seed: int, autocast, device) -> None:
    """Write a sample picture; its own generator keeps pictures from changing the training."""
    with autocast:
        image = stage.sample(torch.Generator(device).manual_seed(seed))
    if image is not None:
        folder.picture(step, image)


class Meter:
    """Means of losses, gradient norms and metrics since the last line. The sums stay on the device
    until then.
    """

    def __init__(self, step: int):
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._step = step
        self._since = time.monotonic()

    def add(
        self, name: str, loss: Tensor, norm: Tensor, metrics: dict[str, float | Tensor]
    ) -> None:
        values = {
            f"loss/{name}": loss.detach(),
            f"grad_norm/{name}": norm.detach(),
            **{f"{name}/{key}": v for key, v in metrics.items()},
        }
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value
            self._counts[key] += 1

    def line(
        self, step: int, samples: int, optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """One line of metrics.jsonl; `samples` per step.

        Raises UserError when a loss or gradient is not finite: such weights are not saved.
        """
        means = {key: float(total) / self._counts[key] for key, total in self._sums.items()}
        for key, value in means.items():
            if key.startswith(("loss/", "grad_norm/")) and not math.isfinite(value):
                raise UserError(
                    f"{key} became {value} before step {step}: lower the learning rate and train "
                    "in a new run.folder"
                )
        seconds = time.monotonic() - self._since
        steps = step - self._step
        self._sums.clear()
        self._counts.clear()
        self._step = step
        self._since = time.monotonic()
        rates = {f"lr/{name}": o.param_groups[0]["lr"] for name, o in optimizers.items()}
        return {
            "step": step,
            **means,
            **rates,
            "seconds": seconds,
            "samples_per_second": steps * samples / max(seconds, 1e-9),
        }


class Batches:
    """Endless collated batches (this process's share) of a stage's dataset; the next is loaded
    while the current one trains.
    """

    def __init__(self, stage: Stage, count: int, processes: Processes, seed: int, drawn: int):
        self._stage = stage
        self._count = count
        self._seed = seed
        self._drawn = drawn
        share = processes.share(count)
        self._own = slice(processes.rank * share, (processes.rank + 1) * share)
        self._dataset = stage.dataset()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Batches":
        self._next = self._pool.submit(self._load, self._drawn)
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> dict:
        batch = self._next.result()
        self._drawn += self._count
        self._next = self._pool.submit(self._load, self._drawn)
        return batch

    def _load(self, drawn: int) -> dict:
        indices = self._stage.indices(drawn, self._count, self._seed)[self._own]
        return default_collate([self._dataset[index] for index in indices])


class StopRequest:
    """SIGTERM and the first Ctrl-C ask the loop to stop after the current step; a second Ctrl-C
    stops at once.
    """

    def __init__(self):
        self.number = 0  # of the signal; 0 = none

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _identity(recipe: Recipe, name: str) -> dict:
    """The options that a checkpoint must agree with, by section."""
    config = getattr(recipe, name)
    sections = {"data": recipe.data, "optimizer": recipe.optimizer, name: config}
    if isinstance(config, TransformerConfig):
        sections["model"] = recipe.model
    kept = {
        section: {k: v for k, v in as_dict(values).items() if k not in FREE}
        for section, values in sections.items()
    }
    return {**kept, "run": {"seed": recipe.run.seed, "precision": recipe.run.precision}}


def _trackers() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
