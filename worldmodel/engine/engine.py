"""How a world's transformer is fitted to its device: what is remembered, how weights are stored,
what attends, what is compiled.

The memory of a GPU is what a dream runs out of: a latent frame of Wan2.1-1.3B at 480x832 is 290 MB
of keys and values, and three times as much while it stands in the window. So there are tiers. The
first one whose demand fits into what is free is taken and said aloud; when memory runs out all the
same, the session goes down one tier, says so, and does it again (`Session.step`).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from worldmodel.engine.compile import CompiledBlocks
from worldmodel.engine.quantize import has_torchao, linear_layers, quantize
from worldmodel.errors import UserError
from worldmodel.graphs import CudaRecorder, Graphs
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import RolloutConfig

WEIGHTS = ("full", "int8", "fp8")
HISTORY = 64  # latents that can be taken back, where memory allows
# share of the free memory that may be planned with: allocators round up, and the ring, which is the
# most, never moves
_SPARE = 0.95
_GIB = 2**30


@dataclass(frozen=True)
class Tier:
    """A way to live in so much memory."""

    name: str
    weights: str = (
        "full"  # of the blocks' linear layers: "full" (the networks' type), "int8" or "fp8"
    )
    window: int | None = None  # latents of the window at most; None = the world's
    history: int | None = None  # latents kept for rewinding at most; None = as many as are wanted
    missed: str = ""  # the weights that it would have with torchao, which is not installed

    def rollout(self, config: RolloutConfig, history: int) -> RolloutConfig:
        """`config` within this tier, where `history` latents to rewind are wanted. A chunk and the
        sinks always fit.
        """
        window = (
            config.window
            if self.window is None
            else min(config.window, max(self.window, config.sinks + 2 * config.chunk))
        )
        return replace(
            config,
            window=window,
            history=history if self.history is None else min(history, self.history),
        )


TIERS = (
    Tier("40 GB and up"),
    Tier("24 GB", history=16),
    Tier("16 GB", history=1),
    Tier("12 GB", weights="int8", window=8, history=1),
    Tier("8 GB", weights="int8", window=4, history=1),
)


@dataclass(frozen=True)
class EngineOptions:
    """What the player may decide; "auto": what the device allows."""

    memory: str = "auto"  # "40", "24", "16", "12" or "8": plan for a device with so many GB
    weights: str = "auto"  # "auto" (as the tier says), "full", "int8" or "fp8"
    # "on" (on CUDA with passes recorded as CUDA graphs), "off"; "auto" = blocks alone, on CUDA
    compile: str = "auto"
    # "torch" (scaled_dot_product_attention as it is), "fa3" (FlashAttention 3 inside it); "auto" =
    # fa3 where it is
    attention: str = "auto"

    def __post_init__(self):
        choices = {
            "memory": ("auto", *(tier.name.split()[0] for tier in TIERS)),
            "weights": ("auto", *WEIGHTS),
            "compile": ("auto", "on", "off"),
            "attention": ("auto", "torch", "fa3"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    def compiles(self, device: torch.device) -> bool:
        """Whether blocks are compiled on `device`."""
        return self.compile == "on" or self.compile == "auto" and device.type == "cuda"

    def records(self, device: torch.device) -> bool:
        """Whether passes are recorded as CUDA graphs."""
        return self.compile == "on" and device.type == "cuda"


@dataclass(frozen=True)
class Demand:
    """Bytes that a world needs, by part."""

    blocks: int  # the blocks' linear layers at 16 bits or more
    quantised: int  # the same at 8 bits
    rest: int  # everything else that is there all the time: other weights, decoder, working memory
    stored: int  # a latent in the store
    shown: int  # a latent in the window, besides
    rewound: int  # a latent that can be taken back, besides
    # whether passes are recorded: what one leaves stays where it is, and others come beside it
    recorded: bool = False

    def of(self, tier: Tier, config: RolloutConfig, history: int) -> int:
        """Bytes in this tier."""
        rollout = tier.rollout(config, history)
        weights = self.blocks if tier.weights == "full" else self.quantised
        fresh = (
            2 + rollout.merge_clean + self.recorded
        ) * rollout.chunk  # latents that a pass leaves, and a chunk of them put together
        remembered = (
            rollout.window + rollout.history + fresh
        ) * self.stored + rollout.window * self.shown
        rows = 1 if rollout.guidance == 1 else 2  # the dream without prompt remembers as much
        return weights + self.rest + rows * remembered + rollout.history * self.rewound


def demand(
    model: CausalWanTransformer,
    rows: int,
    columns: int,
    chunk: int,
    rest: int,
    rewound: int,
    recorded: int = 0,
) -> Demand:
    """What dreaming `chunk` latents of `rows` x `columns` cells at a time with `model` needs.

    rest: bytes of the autoencoder and what it works with. rewound: bytes of its memory, kept for
    each latent that can be taken back.
    recorded: rows of a prompt where passes are recorded (which keep its keys and values once more,
    and work in memory of their own), or 0.
    """
    config = model.config
    size = model.patch_embedding.weight.dtype.itemsize
    _, patch_h, patch_w = config.patch_size
    width = config.num_attention_heads * config.attention_head_dim
    tokens = (rows // patch_h) * (columns // patch_w)
    stored = 2 * len(model.blocks) * tokens * width * size
    linear = sum(layer.weight.numel() for layer in linear_layers(model.blocks))
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    work = chunk * tokens * (2 * config.ffn_dim * size + width * (8 * 4 + 12 * size))
    if recorded:
        work += work + 2 * len(model.blocks) * recorded * width * size
    paths = 2 if config.camera else 1
    return Demand(
        linear * size,
        linear,
        weights - linear * size + work + rest,
        stored,
        paths * stored,
        rewound,
        recorded > 0,
    )


def fitting(
    tiers: tuple[Tier, ...], need: Demand, config: RolloutConfig, history: int, free: int
) -> tuple[Tier, ...]:
    """`tiers` from the first on that `free` bytes can hold; ValueError when none fits."""
    for place, tier in enumerate(tiers):
        if need.of(tier, config, history) <= _SPARE * free:
            return tiers[place:]
    least = need.of(tiers[-1], config, history) / _SPARE / _GIB
    install = (
        f"install torchao ({tiers[-1].missed} weights need less), " if tiers[-1].missed else ""
    )
    raise UserError(
        f"This world needs {least:.1f} GiB of free memory on the device at least, "
        f"{free / _GIB:.1f} GiB are free: close other programs that use it, {install}or play a "
        "smaller world."
    )


def tiers_from(options: EngineOptions) -> tuple[Tier, ...]:
    """The tiers that may be used, from the largest that is allowed down, with the weights that were
    asked for.

    Where nothing was asked for and torchao is not installed, all have full weights: nobody should
    learn that in the middle of play.
    """
    first = next((i for i, tier in enumerate(TIERS) if tier.name.split()[0] == options.memory), 0)
    if options.weights != "auto":
        return tuple(replace(tier, weights=options.weights) for tier in TIERS[first:])
    if has_torchao():
        return TIERS[first:]
    return tuple(
        tier if tier.weights == "full" else replace(tier, weights="full", missed=tier.weights)
        for tier in TIERS[first:]
    )


@dataclass
class Engine:
    """The state of these choices for one opened world; a session goes down with `step_down`, nobody
    goes up.
    """

    tiers: tuple[Tier, ...] = TIERS  # the present one and those below it
    compiled: CompiledBlocks | None = None
    attention: str = "torch"
    graphs: Graphs | None = None  # of all rollouts of the world

    @property
    def tier(self) -> Tier:
        return self.tiers[0]

    def describe(self, config: RolloutConfig) -> str:
        """One line for the player, who would have `config`."""
        rollout = self.tier.rollout(config, HISTORY)
        compiled = "compiled while playing" if self.compiled else "not compiled"
        missed = (
            f" ({self.tier.missed} with torchao, which is not installed)"
            if self.tier.missed
            else ""
        )
        return (
            f"Memory as with {self.tier.name}: window {rollout.window} latents, {rollout.history} "
            f"to rewind, weights {self.tier.weights}{missed}; attention {self.attention}, blocks "
            f"{compiled}{', passes recorded as CUDA graphs' if self.graphs else ''}"
        )

    def news(self) -> str:
        """What the player should know when the compiler or the recorder gave up, a sentence each,
        once.
        """
        faults = []
        if self.compiled and self.compiled.fault:
            faults.append(self.compiled.fault)
            self.compiled = None
        if self.graphs and self.graphs.fault:
            faults.append(self.graphs.fault)
            self.graphs = None
        return " ".join(faults)

    def code(self) -> tuple | None:
        """What the blocks run at present, as `Graphs.code` wants it; None while the compiler is
        behind.
        """
        return (
            None if self.compiled and self.compiled.behind else (self.tier.weights, self.compiled)
        )

    def step_down(self) -> str:
        """Takes the next smaller tier; returns a sentence for the player. MemoryError when there is
        none. `refit` makes it so.
        """
        if len(self.tiers) == 1:
            raise MemoryError(
                f"The device's memory is full in the smallest tier ({self.tier.name}): close "
                "other programs that use it, or play a smaller world."
            )
        self.tiers = self.tiers[1:]
        return f"Memory is full: going on as with {self.tier.name}"

    def refit(self, model: CausalWanTransformer) -> None:
        """Gives unused memory back to the device and stores the model's weights as the tier says;
        can be called again when it failed.
        """
        if model.device.type != "cpu":
            getattr(torch, model.device.type).empty_cache()
        if self.tier.weights == "full" or not linear_layers(model.blocks):
            return
        if self.compiled:
            # its code is for other weights: the playing thread would wait for new one
            self.compiled.stop()
        quantize(model, self.tier.weights, model.device)
        if self.compiled:
            self.compiled = CompiledBlocks(model.blocks)


def start_engine(
    options: EngineOptions,
    tiers: tuple[Tier, ...],
    model: CausalWanTransformer,
    device: torch.device,
) -> Engine:
    """Makes it so, for a model that is on its device and stored as the first tier says."""
    kernel = choose_attention(options.attention, device)
    engine = Engine(
        tiers, CompiledBlocks(model.blocks) if options.compiles(device) else None, kernel
    )
    if options.records(device):
        engine.graphs = Graphs(partial(CudaRecorder, device), engine.code)
    return engine


def choose_attention(name: str, device: torch.device) -> str:
    """Turns FlashAttention 3 on inside torch's attention where it can be; "fa3" or "torch".
    ValueError when "fa3" was asked for in vain.
    """
    if name == "torch":
        return name
    can = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    try:
        if not can or activate is None:
            raise RuntimeError("it runs on Hopper GPUs with torch 2.10 or newer")
        activate("FA3")
    except (RuntimeError, ImportError, ValueError) as error:
        if name == "fa3":
            raise UserError(
                f"FlashAttention 3 cannot be used here ({error}): choose attention auto or torch."
            ) from None
        return "torch"
    return "fa3"
