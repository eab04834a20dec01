"""`python -m distill evaluate`: dreams of a world against the truth of its town; JSON, tables,
contact sheets.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from distill.evaluate import cases as protocol
from distill.evaluate import scores
from distill.evaluate.generate import Variant, dream, load_transformer, parse_variant, reconstruct
from distill.evaluate.report import contact_sheet, markdown
from worldmodel.bench.machine import describe_commit, describe_machine
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.cli import print_line
from worldmodel.config import as_dict
from worldmodel.errors import UserError
from worldmodel.files import check_output, write_file
from worldmodel.images import write_png
from worldmodel.worlds.world import World, check_fit

FROZEN = "first frame frozen"
CEILING = "autoencoder of the true frame"
TRUTH = "truth"
HORIZONS = (1, 4, 8, 16, 32)  # latents after the first frame
SHEET_CASES = 2  # of each kind on its contact sheet
HELP = {  # of the numbers in EvaluateOptions
    "cases": "paths compared with the truth",
    "latents": "length of a path",
    "returns": "cases of each leave-and-return path",
    "flows": "cases of each direction of motion",
    "drift_cases": "long walks",
    "drift_latents": "their length, 0 = none",
    "late": "latent whose picture is compared with that of a tenth of the way, for --windows",
    "batch": "cases dreamed at once",
    "workers": "processes that render the truth",
    "seed": "of towns, paths and noise",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """How much is asked."""

    cases: int = 24  # paths compared with the truth
    latents: int = 32  # of each path, after the given first one
    returns: int = 8  # cases of each leave-and-return path
    flows: int = 4  # cases of each direction
    drift_cases: int = 4
    drift_latents: int = 240  # 60 s at 16 frames a second; 0 = no drift
    late: int = 200  # for --windows
    batch: int = 24  # cases dreamed at once
    workers: int = 2  # processes that render the truth
    seed: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = {"drift_latents": 0, "seed": 0, "late": 20}.get(name, 1)
            if value < least:
                raise UserError(f"expected {name} of at least {least}, got {value}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    parser.add_argument(
        "--world",
        type=Path,
        required=True,
        help="bundle whose autoencoder, prompts and picture size are used",
    )
    parser.add_argument(
        "--transformer",
        nargs="+",
        default=[],
        metavar="[NAME=]FOLDER[@STEPS,...]",
        help="transformers to "
        "compare, "
        "each with counts of "
        "steps; e behind a "
        "count means the "
        "Euler solver "
        "(diffusion): "
        "'stage 1=runs/blocks/teacher_forcing/export@16e,2' (default: the world's own)",
    )
    parser.add_argument(
        "--windows",
        nargs="+",
        default=[],
        metavar="WINDOW[+SINKS]",
        help="also dream long "
        "walks with the "
        "last transformer's "
        "first row under "
        "these windows "
        "(latents), for "
        "example "
        "12 12+1 6: "
        "what the picture at latent --late has of the one at a tenth of it",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="file.json; file.md and file-*.png go beside it"
    )
    parser.add_argument(
        "--reference", help="row that every other one must beat, for example 'stage 1, 2 steps'"
    )
    for name, text in HELP.items():
        default = getattr(EvaluateOptions(), name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--device", default="cpu", help="where to dream: cpu, cuda, ... (default: cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the networks (default: float32)",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates and writes; everything is checked before the first dream."""
    if args.output.suffix != ".json":
        raise UserError(f"expected --output as a file ending in .json, got {args.output}")
    check_output(args.output)
    check_output(args.output.with_suffix(".md"))
    options = EvaluateOptions(**{name: getattr(args, name) for name in HELP})
    world = World.from_pretrained(args.world, args.device, getattr(torch, args.dtype))
    texts = args.transformer or [f"{world.config.name}={args.world / 'transformer'}"]
    variants = [variant for text in texts for variant in parse_variant(text, world.config.rollout)]
    for variant in variants:
        check_fit(
            replace(
                world, transformer=load_transformer(variant.transformer, world.device, world.dtype)
            )
        )
    last = next(variant for variant in variants if variant.transformer == variants[-1].transformer)
    windows = [parse_window(text, last) for text in args.windows]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results, sheets = evaluate(world, variants, options, args.reference, windows)
    page = markdown(results)
    print_line(page)
    for name, sheet in sheets.items():
        write_png(args.output.with_name(f"{args.output.stem}-{name}.png"), sheet)
    write_file(args.output.with_suffix(".md"), page)
    write_file(args.output, json.dumps(results, indent=1) + "\n")


def parse_window(text: str, variant: Variant) -> Variant:
    """`WINDOW[+SINKS]` -> the variant under that window, named by the text."""
    window, _, sinks = text.partition("+")
    if not window.isdecimal() or not (sinks or "0").isdecimal():
        raise UserError(
            f"expected --windows like 12 or 12+1 (latents, sinks among them), got {text!r}"
        )
    return replace(
        variant,
        name=text,
        rollout=replace(variant.rollout, window=int(window), sinks=int(sinks or 0)),
    )


def evaluate(
    world: World,
    variants: list[Variant],
    options: EvaluateOptions,
    reference: str | None = None,
    windows: Sequence[Variant] = (),
) -> tuple[dict, dict[str, np.ndarray]]:
    """All questions to all variants, and long walks under `windows` -> (results for JSON, contact
    sheets by name).

    Raises ValueError for a world that is no town, variants of one name, or a reference that is no
    variant.
    """
    protocol.check_prompts(world.prompts.names)
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise UserError(
            f"expected different names for the rows, got {', '.join(names)}: write NAME=FOLDER"
        )
    if reference is not None and reference not in names:
        raise UserError(f"expected --reference to be one of {', '.join(names)}, got {reference!r}")
    started = time.monotonic()
    results = {"about": _about(world, variants, options)}
    with protocol.renderers(options.workers) as spread:
        studio = Studio(world, options, spread)
        results["rows"], sheets = _compare(studio, variants)
        results["returns"], sheets["returns"] = _returns(studio, variants)
        results["flow"] = _flow(studio, variants)
        results["drift"] = _drift(studio, variants) if options.drift_latents else []
        results["windows"] = _windows(studio, windows) if windows else []
    results["bars"] = scores.bars(results["rows"], FROZEN, reference)
    results["about"]["seconds"] = round(time.monotonic() - started, 1)
    return results, sheets


class Studio:
    """Makes the films of one world: true ones, and dreams of a variant along the same cameras."""

    def __init__(self, world: World, options: EvaluateOptions, spread: Callable = map):
        self.world = world
        self.options = options
        self.spread = spread

    def truth(self, cases: list[protocol.Case], every: int = 1) -> np.ndarray:
        """uint8 [B, T, H, W, 3]."""
        config = self.world.config
        return protocol.truth(
            cases, config.intrinsics, config.height, config.width, every, self.spread
        )

    def dream(
        self, variant: Variant, cases: list[protocol.Case], first: np.ndarray, whole: bool = False
    ) -> np.ndarray:
        """Dreams on from the first frames [B, H, W, 3] -> uint8 [B, T, H, W, 3].

        whole: all video frames instead of the last one of every latent.
        """
        world = replace(
            self.world,
            transformer=load_transformer(variant.transformer, self.world.device, self.world.dtype),
        )
        parts = []
        for start in range(0, len(cases), self.options.batch):
            batch = cases[start : start + self.options.batch]
            path = np.stack([case.latents for case in batch])
            film = dream(
                world,
                variant.rollout,
                first[start : start + len(batch)],
                path,
                protocol.moods(batch),
                seed=self.options.seed + start,
                label=variant.name,
            )
            parts.append(
                np.concatenate([frames if whole else frames[:, -1:] for frames in film], 1)
            )
        return np.concatenate(parts)


def _compare(studio: Studio, variants: list[Variant]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Fidelity rows of the baselines and the variants, and one contact sheet a kind of path."""
    options = studio.options
    cases = protocol.fidelity_cases(options.cases, options.latents, options.seed)
    horizons = [horizon for horizon in HORIZONS if horizon <= options.latents]
    film = studio.truth(cases)
    true = film[:, ::FRAMES_PER_LATENT]
    films = {
        FROZEN: np.repeat(true[:, :1], true.shape[1], 1),
        CEILING: reconstruct(studio.world.autoencoder, film),
    }
    films |= {variant.name: studio.dream(variant, cases, true[:, 0]) for variant in variants}
    dreamed = {variant.name for variant in variants}
    rows = [
        {
            "name": name,
            "dreamed": name in dreamed,
            "horizons": scores.fidelity(frames, true, cases, horizons),
        }
        for name, frames in films.items()
    ]
    shown = {TRUTH: true, **{name: frames for name, frames in films.items() if name != FROZEN}}
    sheets = {}
    for kind in dict.fromkeys(case.kind for case in cases):
        chosen = [index for index, case in enumerate(cases) if case.kind == kind][:SHEET_CASES]
        lines = [
            (name, frames[index, [0, *horizons]])
            for index in chosen
            for name, frames in shown.items()
        ]
        sheets[kind] = contact_sheet(lines, [f"latent {horizon}" for horizon in (0, *horizons)])
    return rows, sheets


def _returns(studio: Studio, variants: list[Variant]) -> tuple[list[dict], np.ndarray]:
    cases = protocol.return_cases(studio.options.returns, studio.options.seed)
    true = studio.truth(cases, every=FRAMES_PER_LATENT)
    films = {TRUTH: true} | {
        variant.name: studio.dream(variant, cases, true[:, 0]) for variant in variants
    }
    rows = [
        {"name": name, **entry}
        for name, frames in films.items()
        for entry in scores.leave_and_return(frames, true, cases)
    ]
    firsts = {case.kind: index for index, case in reversed(list(enumerate(cases)))}
    lines = [
        (name, frames[index, [0, cases[index].away, cases[index].back]])
        for index in sorted(firsts.values())
        for name, frames in films.items()
    ]
    return rows, contact_sheet(lines, ["start", "away", "return"])


def _flow(studio: Studio, variants: list[Variant]) -> list[dict]:
    cases = protocol.flow_cases(studio.options.flows, studio.options.seed)
    true = studio.truth(cases)
    films = {TRUTH: true} | {
        variant.name: studio.dream(variant, cases, true[:, 0], whole=True) for variant in variants
    }
    return [
        {"name": name, **scores.flow_directions(frames, cases)} for name, frames in films.items()
    ]


def _drift(studio: Studio, variants: list[Variant]) -> list[dict]:
    options = studio.options
    cases = protocol.drift_cases(options.drift_cases, options.drift_latents, options.seed)
    true = studio.truth(cases, every=FRAMES_PER_LATENT)
    fps = studio.world.config.fps
    return [
        {"name": variant.name, **scores.drift(studio.dream(variant, cases, true[:, 0]), true, fps)}
        for variant in variants
    ]


def _windows(studio: Studio, variants: Sequence[Variant]) -> list[dict]:
    """What late frames have of early ones, of the truth and under every window; two latents
    each.
    """
    options = studio.options
    cases = protocol.drift_cases(options.drift_cases, options.late, options.seed)
    spans = [
        slice(FRAMES_PER_LATENT * (latent - 2) + 1, FRAMES_PER_LATENT * latent + 1)
        for latent in (options.late // 10, options.late)
    ]
    true = [studio.truth([replace(case, c2w=case.c2w[span]) for case in cases]) for span in spans]
    first = studio.truth([replace(case, c2w=case.c2w[:1]) for case in cases])[:, 0]
    rows = [{"name": TRUTH, **scores.lateness(*true)}]
    for variant in variants:
        film = studio.dream(variant, cases, first, whole=True)
        rows.append({"name": variant.name, **scores.lateness(*(film[:, span] for span in spans))})
    return rows


def _about(world: World, variants: list[Variant], options: EvaluateOptions) -> dict:
    return {
        "command": f"python -m distill {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "hardware": describe_machine(world.device),
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "world": world.config.name,
        **asdict(options),
        "variants": [
            {
                "name": variant.name,
                "transformer": str(variant.transformer),
                "rollout": as_dict(variant.rollout),
            }
            for variant in variants
        ],
        "seconds": 0.0,
    }
