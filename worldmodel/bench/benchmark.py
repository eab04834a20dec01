"""`worldmodel benchmark`: how fast a world plays here, as JSON; several variants alternate.

Times are of `Session.step`, which is what the client calls: from the pose to the frames. The first
latents, while the window fills and the machine warms up, are not counted. The parts of a step are
timed where the work is done (`machine.PartClock`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from worldmodel import cli
from worldmodel.bench.against import PAIRS, Settings, compare
from worldmodel.bench.machine import (
    PeakMemory,
    command_line,
    describe_commit,
    describe_machine,
    matmul_rate,
)
from worldmodel.bench.random_world import AUTOENCODERS, SHAPES, Shape, random_config, random_world
from worldmodel.bench.walk import ENGINE_KEYS, PARTS, Variant, Walk
from worldmodel.device import fast_dtype, open_device, synchronize, usual_threads
from worldmodel.engine.options import EngineOptions
from worldmodel.errors import UserError
from worldmodel.files import check_output
from worldmodel.worlds.catalog import find_world
from worldmodel.worlds.world import World

ROUNDS = 8  # turns that each variant gets
MAX_REFERENCE_LATENTS = 900  # the public rotary tables end at 1,024
WORLD = "blocks"
# options that --against does not take, and their defaults
_WITHIN_ONE_PROCESS = {
    "set": [],
    "versus": [],
    "reference_loop": False,
    "rate": False,
    "memory": "auto",
    "weights": "auto",
    "compile": "auto",
    "attention": "auto",
}

# opens the world with the engine's options and the autoencoder of a random world
Opener = Callable[[EngineOptions, str | None], World]


def take_turns(walks: list[Walk], latents: int) -> None:
    """Give the warmed-up walks turns (A B A B ...) until each has generated `latents` latents."""
    goals = [-(-latents // walk.rollout.chunk) for walk in walks]
    with tqdm(total=sum(goals), desc="benchmark", unit="chunk", leave=False) as bar:
        for turn in range(ROUNDS):
            for walk, goal in zip(walks, goals, strict=True):
                with _memory_permitting(walk):
                    while not walk.error and len(walk.chunks) < -(-goal * (turn + 1) // ROUNDS):
                        walk.chunk()
                        bar.update()
                synchronize(walk.world.device)


@contextmanager
def _memory_permitting(walk: Walk) -> Iterator[None]:
    """When memory is full, end `walk`; the others continue."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        walk.give_up(error)


def measure(
    open_world: Opener,
    variants: list[Variant],
    device: torch.device,
    latents: int,
    seed: int = 0,
    reference_loop: bool = False,
    rate: bool = False,
) -> dict:
    """Measure `variants`, alternating between them, and return the report.

    It has one entry per variant, each after the first with its ratio to the first.

    Args:
        open_world: opens the world as a variant wants it.
        reference_loop: also drive the first variant's network by `ReferenceLoop`, as first entry.
        rate: add the share of the device's matmul rate that the transformer reaches.

    Raises MemoryError when no variant fits into memory.
    """
    memory = PeakMemory(device)
    machine = describe_machine(device)
    worlds = {}
    for variant in variants:
        if variant.opened not in worlds:
            before = memory.now()
            opened = open_world(*variant.opened)
            worlds[variant.opened] = opened, memory.now() - before
    world, _ = worlds[variants[0].opened]
    peak_rate = matmul_rate(device, world.dtype) if rate else None
    walks = [Walk(worlds[variant.opened][0], variant, seed) for variant in variants]
    if reference_loop:
        walks.insert(0, Walk(world, variants[0], seed, reference=True))
    with torch.inference_mode():
        for walk in tqdm(walks, desc="warming up", unit="variant", leave=False):
            with _memory_permitting(walk):
                walk.warm_up(memory, worlds[walk.variant.opened][1])
        take_turns(walks, latents)
    if all(walk.error for walk in walks):
        raise MemoryError(walks[0].error)
    report = {
        "commit": describe_commit(),
        "machine": machine,
        **_describe_world(world),
        "engine": walks[0].engine,
        "latents": latents,
        "seed": seed,
        "matmul_rate": peak_rate,
        "peak_memory_mib": round(max(memory.peak(), *(walk.peak for walk in walks)) / 2**20),
        "variants": [walk.report(peak_rate) for walk in walks],
    }
    _add_ratios(report)
    return report


def _describe_world(world: World) -> dict:
    networks = {"transformer": world.transformer, "autoencoder": world.autoencoder}
    return {
        "world": world.config.name,
        "size": [world.config.height, world.config.width],
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "parameters": {
            name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()
        },
    }


def _add_ratios(report: dict) -> None:
    """Add `ratio` to every variant after the first, and to the report where there are two."""
    first, *others = report["variants"]
    if "error" in first:
        return
    for other in others:
        if "error" not in other:
            other["ratio"] = _ratio(first, other)
    if len(others) == 1 and "ratio" in others[0]:
        report["ratio"] = others[0]["ratio"]


def _ratio(first: dict, other: dict) -> dict[str, float]:
    """Time of the first / time of the other, part by part: above 1, the other is faster."""
    ratios = {}
    for part in ("total", *PARTS):
        time = first["ms_per_latent"][part]["median"]
        other_time = other["ms_per_latent"][part]["median"]
        if min(time, other_time) > 0.1:  # ms; less is a part that one of them skips
            ratios[part] = round(time / other_time, 3)
    return ratios


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run` to `parser`."""
    _add_world(parser)
    _add_comparison(parser)
    _add_machine(parser)
    _add_checkout(parser)
    parser.add_argument(
        "--latents",
        type=cli.positive,
        default=64,
        help="latents measured per variant, or per process (default: 64)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--output", type=Path, help="also write the JSON into this file")


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--world",
        type=Path,
        help=f"folder or name of the world (default: {WORLD}); with --random-weights also a name "
        "of configs/worlds, for size, steps, window and motion",
    )
    parser.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help=f"random weights, no files needed: {', '.join(SHAPES)} or LAYERSxWIDTHxHEADS[xFFN]",
    )
    parser.add_argument(
        "--size",
        type=_size,
        help="HEIGHTxWIDTH of the random world in pixels (default: the world's, or the shape's)",
    )
    parser.add_argument(
        "--autoencoder",
        choices=AUTOENCODERS,
        help="of the random world: tiny (default), Wan2.1's own, or none: figures without decoding",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=cli.positive, help="denoising steps a chunk (default: the world's)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"rollout options, e.g. window=8, or {', '.join(ENGINE_KEYS)}, autoencoder of this "
        "variant alone",
    )
    parser.add_argument(
        "--versus",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same of another variant, may be repeated; all alternate",
    )
    parser.add_argument(
        "--reference-loop",
        "--as-published",
        action="store_true",
        help="first the same network driven as the public loops do it: the ratio is the gain",
    )
    parser.add_argument(
        "--rate",
        action="store_true",
        help="also the share of the device's matmul rate that the transformer reaches",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=cli.threads,
        help="CPU threads (default: torch's own choice; with --against as in play)",
    )
    parser.add_argument(
        "--memory",
        default="auto",
        help="auto, or plan for a GPU with 40, 24, 16, 12 or 8 GB (default: auto)",
    )
    parser.add_argument("--weights", default="auto", help="auto, full, int8 or fp8 (default: auto)")
    parser.add_argument(
        "--compile", default="auto", help="compiled blocks: auto (on CUDA), on, off (default: auto)"
    )
    parser.add_argument("--attention", default="auto", help="auto, torch or fa3 (default: auto)")
    parser.add_argument(
        "--device", default="cpu", help="where to compute: cpu, cuda, ... (default: cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the networks (default: the fast one)",
    )


def _add_checkout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="compare with another checkout of this project: processes of both alternate; --world "
        "must be one that both can open",
    )
    parser.add_argument(
        "--pairs", type=cli.positive, help=f"of processes, with --against (default: {PAIRS})"
    )


def run(args: argparse.Namespace) -> None:
    """Open the world, measure it and print the report.

    Raises UserError for options that cannot be honoured.
    """
    if args.output is not None:
        check_output(args.output)
    if args.pairs is not None and args.against is None:
        raise UserError("expected --pairs together with --against CHECKOUT")
    report = _measure(args) if args.against is None else _compare(args)
    cli.print_report({"command": command_line("worldmodel"), **report}, args.output)


def _compare(args: argparse.Namespace) -> dict:
    """Compare with the checkout `args.against`.

    Raises UserError for options that the processes cannot be given.
    """
    for name, unset in _WITHIN_ONE_PROCESS.items():
        if getattr(args, name) != unset:
            raise UserError(
                f"--against cannot be combined with --{name.replace('_', '-')}, which chooses "
                "between ways to play in one process"
            )
    open_device(args.device)
    settings = Settings(
        world=_shared_world(args),
        latents=args.latents,
        threads=args.threads or usual_threads(),
        seed=args.seed,
        steps=args.steps,
        device=args.device,
        dtype=args.dtype,
        random_weights=args.random_weights,
        size=args.size,
        autoencoder=args.autoencoder or "tiny",
    )
    return compare(args.against, settings, args.pairs or PAIRS)


def _shared_world(args: argparse.Namespace) -> str | None:
    """The world as both checkouts can find it: paths are absolute."""
    if args.random_weights is None:
        _refuse_random_options(args.size, args.autoencoder)
        return str(find_world(str(args.world or WORLD)).resolve())
    Shape.parse(args.random_weights)
    if args.world is None:
        return None
    return str(args.world.resolve() if args.world.exists() else args.world)


def _measure(args: argparse.Namespace) -> dict:
    if args.latents < ROUNDS:
        raise UserError(
            f"expected at least {ROUNDS} --latents, got {args.latents}: variants alternate "
            f"{ROUNDS} times"
        )
    if args.reference_loop and args.latents > MAX_REFERENCE_LATENTS:
        raise UserError(
            f"expected at most {MAX_REFERENCE_LATENTS} --latents, where the tables of "
            f"--reference-loop end, got {args.latents}"
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = open_device(args.device)
    engine = EngineOptions(args.memory, args.weights, args.compile, args.attention)
    steps = [f"steps={args.steps}"] if args.steps else []
    variants = [
        Variant.parse(steps + written, engine, args.autoencoder)
        for written in (args.set, *args.versus)
    ]
    opener = _opener(args, variants, device)
    return measure(
        opener, variants, device, args.latents, args.seed, args.reference_loop, args.rate
    )


def _opener(args: argparse.Namespace, variants: list[Variant], device: torch.device) -> Opener:
    """Return the function that opens the world of the options.

    Raises UserError for options of a random world without --random-weights.
    """
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(device)
    if args.random_weights:
        shape = Shape.parse(args.random_weights)
        config = random_config(shape, args.world, args.size)
        return lambda engine, autoencoder: _of_one_tier(
            random_world(shape, config, autoencoder or "tiny", device, dtype).fitted(engine)
        )
    for variant in variants:
        _refuse_random_options(args.size, variant.autoencoder)
    return lambda engine, _: _of_one_tier(
        World.from_pretrained(args.world or WORLD, device, dtype, engine)
    )


def _refuse_random_options(size: tuple[int, int] | None, autoencoder: str | None) -> None:
    if size or autoencoder:
        raise UserError(
            "expected --size and --autoencoder with --random-weights alone: a stored world has "
            "its own"
        )


def _of_one_tier(world: World) -> World:
    """Keep `world` in its memory tier when memory is full, so that what is measured is what is
    reported.
    """
    world.engine.tiers = world.engine.tiers[:1]
    return world


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"expected HEIGHTxWIDTH in pixels such as 96x160, got {text!r}"
        )
    return int(height), int(width)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status (see `cli.run`)."""
    parser = cli.Parser(prog="worldmodel benchmark", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return cli.run("benchmark", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
