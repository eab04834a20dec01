"""`python -m distill evaluate --place NAME --suites ...`: the figures of a world in a place, as one
JSON with a key per suite, tables, contact sheets and a plot.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

from distill.data.blocks.renderer import render_depth
from distill.evaluate import scores
from distill.evaluate.cases import (
    Case,
    check_prompts,
    fidelity_cases,
    ground_truth,
    moods,
    renderers,
    return_cases,
)
from distill.evaluate.generate import (
    Variant,
    describe_run,
    generate,
    load_transformer,
    parse_variant,
)
from distill.evaluate.place_cases import Ground
from distill.evaluate.place_report import place_page, plot
from distill.evaluate.place_suites import (
    SUITES,
    Bench,
    SuiteOptions,
    masked_scores,
    masks,
    merged,
    statistics,
)
from distill.evaluate.report import contact_sheet
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.cli import print_line, print_progress
from worldmodel.config import as_dict
from worldmodel.errors import UserError
from worldmodel.files import check_output, write_file
from worldmodel.images import write_png
from worldmodel.rollout import with_steps
from worldmodel.worlds.world import World, check_fit

ENDLESS = "endless"
NAMES = (*SUITES, ENDLESS)
HORIZONS = (8, 32)  # latents of the endless suite
MASKS = ("none", "knowable")


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation by suites."""
    parser.add_argument("--place", help="place of the bundle in which the suites walk")
    parser.add_argument(
        "--suites",
        help=(
            f"some of {','.join(NAMES)}: evaluate in a place instead of the tables of endless "
            "towns (default with --place: all)"
        ),
    )
    parser.add_argument(
        "--steps", type=int, help="denoising steps in suites (default: the world's)"
    )
    parser.add_argument(
        "--seconds", type=int, help="longest walk of the suites, for a quick look (default: 600)"
    )
    parser.add_argument(
        "--mask",
        choices=MASKS,
        default=MASKS[0],
        help="knowable: the suites atlas and endless score apart what an earlier frame showed",
    )


def run_suites(args: argparse.Namespace, options: SuiteOptions, workers: int) -> None:
    """Evaluate by suites and write the report; inputs are checked before the first frame."""
    names = parse_suites(args.suites, args.place)
    world = World.from_pretrained(args.world, args.device, getattr(torch, args.dtype))
    variant = _variant(world, args.transformer, args.steps)
    network = load_transformer(variant.transformer, world.device, world.dtype)
    world = replace(world, transformer=network)
    check_fit(world)
    if args.place:
        world.conditions(world.place(args.place))
    if ENDLESS in names:
        check_prompts(world.prompts.names)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for end in ("json", "md"):
        check_output(args.output.with_suffix(f".{end}"))
    with renderers(workers) as spread:
        results, sheets = evaluate_suites(world, variant, names, args.place, options, spread)
    page = place_page(results)
    print_line(page)
    for name, sheet in sheets.items():
        write_png(args.output.with_name(f"{args.output.stem}-{name}.png"), sheet)
    write_file(args.output.with_suffix(".md"), page)
    write_file(args.output, json.dumps(results, indent=1) + "\n")


def parse_suites(text: str | None, place: str | None) -> list[str]:
    """The suites of a comma-separated list; None = all. Raises UserError for an unknown one, and
    for a suite that needs a place without one.
    """
    names = list(dict.fromkeys(text.split(","))) if text is not None else list(NAMES)
    for name in names:
        if name not in NAMES:
            raise UserError(f"expected --suites some of {','.join(NAMES)}, got {name!r}")
        if name != ENDLESS and not place:
            raise UserError(f"the suite {name!r} needs a place: name one with --place")
    return names


def evaluate_suites(
    world: World,
    variant: Variant,
    names: list[str],
    place: str | None,
    options: SuiteOptions,
    spread: Callable = map,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Run the suites -> (a dict with the key `about` and one per suite, pictures by name)."""
    started = time.monotonic()
    results = {"about": _about(world, variant, place, options)}
    pictures = {}
    bench = None
    if place:
        ground = Ground(world, world.place(place), options.seed, spread)
        bench = Bench(world, variant.rollout, ground, options, spread)
        if ground.scene is None and any(name in SUITES and SUITES[name][1] for name in names):
            print_progress(_no_truth(ground))
    for name in names:
        if name == ENDLESS:
            results[name] = _endless(world, variant, options, spread)
            continue
        suite, needs_truth = SUITES[name]
        if needs_truth and bench.ground.scene is None:
            results[name] = {"skipped": _no_truth(bench.ground)}
            continue
        results[name], sheet = suite(bench)
        if sheet is not None:
            pictures[name] = contact_sheet(sheet.rows, sheet.columns)
        if results[name].get("curve"):
            pictures["plot"] = plot(results[name]["curve"])
    results["about"]["seconds"] = round(time.monotonic() - started, 1)
    return results, pictures


def _no_truth(ground: Ground) -> str:
    source = ground.place.source or "unknown"
    return (
        f"The place {ground.place.name!r} has no renderer (source {source}): only the suites rest "
        "and routes, which need no truth, are measured in it."
    )


def _variant(world: World, texts: list[str], steps: int | None) -> Variant:
    """The one network that is evaluated, and how it is sampled."""
    text = texts[0] if texts else f"{world.config.name}={world.folder / 'transformer'}"
    variants = parse_variant(text, world.config.rollout)
    if len(texts) > 1 or len(variants) > 1 or (steps is not None and "@" in text):
        raise UserError(
            "suites evaluate one transformer with one count of steps; name one FOLDER, with @STEPS "
            "or --steps"
        )
    if steps is None:
        return variants[0]
    return replace(variants[0], rollout=with_steps(variants[0].rollout, steps))


# -------------------- endless towns


def _endless(world: World, variant: Variant, options: SuiteOptions, spread: Callable) -> dict:
    """Today's figures of the world without a place: correlation in held-out towns, and what is left
    after a turn of 90 degrees and back.
    """
    longest = max(1, round(options.seconds * world.config.fps / FRAMES_PER_LATENT))
    horizons = [horizon for horizon in HORIZONS if horizon <= longest] or [longest]
    cases = fidelity_cases(options.cases, horizons[-1], options.seed)
    true, ours = _films(world, variant, cases, options, spread)
    figures = {}
    for horizon, entry in scores.fidelity(ours, true, cases, horizons).items():
        figures[horizon] = {
            "correlation": statistics(entry["correlation_by_case"]),
            "psnr": entry["psnr"],
            "sharpness": entry["sharpness"],
        }
        if options.mask:
            figures[horizon]["knowable"] = _masked(world, cases, ours, true, int(horizon))
    cases = return_cases(options.cases, options.seed)
    cases = [case for case in cases if case.kind == "turn 90 degrees"]
    true, ours = _films(world, variant, cases, options, spread)
    (entry,) = scores.leave_and_return(ours, true, cases)
    figures[entry.pop("path")] = entry
    return figures


def _films(
    world: World, variant: Variant, cases: list[Case], options: SuiteOptions, spread: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """True and generated frames of the latents, uint8 [B, F, H, W, 3] each."""
    config = world.config
    size = (config.height, config.width)
    true = ground_truth(cases, config.intrinsics, *size, FRAMES_PER_LATENT, spread)
    parts = []
    for start in range(0, len(cases), options.batch):
        batch = cases[start : start + options.batch]
        film = generate(
            world,
            variant.rollout,
            true[start : start + len(batch), 0],
            np.stack([case.latents for case in batch]),
            moods(batch),
            options.seed + start,
            ENDLESS,
        )
        parts.append(np.concatenate([frames[:, -1:] for frames in film], 1))
    return true, np.concatenate(parts)


def _masked(
    world: World, cases: list[Case], ours: np.ndarray, true: np.ndarray, horizon: int
) -> dict:
    """Scores by what the walk's earlier frames showed, see `masks`."""
    lens = world.config.intrinsics
    factor = world.autoencoder.encoder_factor
    size = tuple(cells * factor for cells in world.latent_size)
    parts = []
    for number, case in enumerate(cases):
        poses = case.latents[: horizon + 1]
        depth = render_depth(case.town, poses, lens, *size).numpy()
        found = masks(depth[-1], poses[-1], lens, poses[:-1], depth[:-1], 1)
        pair = (ours[number, horizon], true[number, horizon])
        parts.append({name: masked_scores(*pair, *mask) for name, mask in found.items()})
    return merged(parts)


def _about(world: World, variant: Variant, place: str | None, options: SuiteOptions) -> dict:
    sizes = asdict(options)
    return {
        **describe_run(world),
        "place": place,
        "longest": sizes.pop("seconds"),
        **sizes,
        "variant": variant.name,
        "transformer": str(variant.transformer),
        "rollout": as_dict(variant.rollout),
        "seconds": 0.0,
    }
