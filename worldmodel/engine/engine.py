"""How a world's transformer is fitted to its device: what is remembered, how weights are stored,
which kernel attends, what is compiled.

Memory is what a GPU runs out of: a latent frame of Wan2.1-1.3B at 480x832 is 290 MB of keys and
values, and three times as much while it stands in the window. So there are tiers. The first one
whose demand fits into the free memory is chosen and printed, with as many latents to rewind as
the rest holds. When memory runs out nevertheless, the session moves to the next tier, notifies the
player and tries again (`Session.step`).
"""

from dataclasses import dataclass, replace

import torch

from worldmodel.engine.compile import CompiledBlocks
from worldmodel.engine.options import EngineOptions
from worldmodel.engine.quantize import has_torchao, linear_layers, quantize
from worldmodel.errors import UserError
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import RolloutConfig

HISTORY = 40  # latents to rewind, where a world does not say and memory allows
# share of the free memory that may be planned with: allocators round up, and the ring, which is the
# most, never moves
_SPARE = 0.95
_GIB = 2**30


@dataclass(frozen=True)
class Tier:
    """A way to run in so much memory."""

    name: str
    weights: str = "full"  # of the blocks' linear layers: "full" (the model's type), "int8", "fp8"
    window: int | None = None  # latents of the window at most; None = the world's
    history: int | None = None  # latents kept for rewinding at most; None = as many as are wanted
    # weights that the tier would have with torchao, which is not installed
    unavailable_weights: str = ""

    def rollout(self, config: RolloutConfig, history: int) -> RolloutConfig:
        """`config` within this tier, where `history` latents to rewind are wanted. A chunk and the
        sinks always fit.
        """
        window = config.window
        if self.window is not None:
            window = min(window, max(self.window, config.sinks + 2 * config.chunk))
        history = history if self.history is None else min(history, self.history)
        recall = min(config.recall, max(0, window - config.sinks - 2 * config.chunk))
        return replace(config, window=window, history=history, recall=recall)


TIERS = (
    Tier("40 GB and up"),
    Tier("24 GB", history=16),
    Tier("16 GB", history=1),
    Tier("12 GB", weights="int8", window=8, history=1),
    Tier("8 GB", weights="int8", window=4, history=1),
)


@dataclass(frozen=True)
class Demand:
    """Bytes that a world needs, by part."""

    blocks: int  # the blocks' linear layers at 16 bits or more
    quantized: int  # the same at 8 bits
    rest: int  # all else that is there all the time: other weights, decoder, working memory
    stored: int  # a latent in the store
    shown: int  # a latent in the window, in addition
    rewound: int  # a latent that can be rewound, in addition

    def of(self, tier: Tier, config: RolloutConfig, history: int) -> int:
        """Bytes in this tier."""
        rollout = tier.rollout(config, history)
        weights = self.blocks if tier.weights == "full" else self.quantized
        new = 2 * rollout.chunk  # latents that a pass leaves, and a chunk of them stacked
        kept = rollout.window + rollout.history + rollout.recall  # the recalled ones as copies
        stored = (kept + new) * self.stored
        remembered = stored + rollout.window * self.shown
        rows = 1 if rollout.guidance == 1 else 2  # the rollout without prompt remembers as much
        return weights + self.rest + rows * remembered + rollout.history * self.rewound


def demand(
    model: CausalWanTransformer, rows: int, columns: int, chunk: int, rest: int, rewound: int
) -> Demand:
    """What generating `chunk` latents of `rows` x `columns` cells at a time with `model` needs.

    rest: bytes of the autoencoder and of its working memory. rewound: bytes of its state, kept for
    each latent that can be rewound.
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
    paths = 2 if config.camera else 1
    return Demand(
        linear * size,
        linear,
        weights - linear * size + work + rest,
        stored,
        paths * stored,
        rewound,
    )


def select_tiers(
    tiers: tuple[Tier, ...], need: Demand, config: RolloutConfig, history: int, free: int
) -> tuple[Tier, ...]:
    """`tiers` from the first one on that `free` bytes can hold; it keeps as many of the `history`
    wanted latents to rewind as fit. Raises UserError when none fits.
    """
    room = _SPARE * free
    for place, tier in enumerate(tiers):
        if need.of(tier, config, history) <= room:
            least = tier.rollout(config, history).history
            wider = (replace(tier, history=kept) for kept in range(history, least, -1))
            fits = (one for one in wider if need.of(one, config, history) <= room)
            return (next(fits, tier), *tiers[place + 1 :])
    least = need.of(tiers[-1], config, history) / _SPARE / _GIB
    weights = tiers[-1].unavailable_weights
    install = f"install torchao ({weights} weights need less), " if weights else ""
    raise UserError(
        f"This world needs {least:.1f} GiB of free memory on the device at least, "
        f"{free / _GIB:.1f} GiB are free: close other programs that use it, {install}or play a "
        "smaller world."
    )


def tiers_from(options: EngineOptions) -> tuple[Tier, ...]:
    """The tiers that may be used, from the largest that is allowed down, with the weights that were
    asked for.

    Where nothing was asked for and torchao is not installed, all have full weights: the player
    should not learn that in the middle of play.
    """
    first = next((i for i, tier in enumerate(TIERS) if tier.name.split()[0] == options.memory), 0)
    allowed = TIERS[first:]
    if options.weights != "auto":
        return tuple(replace(tier, weights=options.weights) for tier in allowed)
    if has_torchao():
        return allowed
    return tuple(
        tier
        if tier.weights == "full"
        else replace(tier, weights="full", unavailable_weights=tier.weights)
        for tier in allowed
    )


@dataclass
class Engine:
    """The state of these choices for one opened world. A session goes down with `step_down`; no one
    goes up.
    """

    tiers: tuple[Tier, ...] = TIERS  # the present one and those below it
    compiled: CompiledBlocks | None = None
    attention: str = "torch"

    @property
    def tier(self) -> Tier:
        return self.tiers[0]

    def describe(self, config: RolloutConfig, history: int) -> str:
        """One line for the player, who would have `config` and `history` latents to rewind."""
        rollout = self.tier.rollout(config, history)
        compiled = self.compiled.describe() if self.compiled else "not compiled"
        absent = self.tier.unavailable_weights
        absent = f" ({absent} with torchao, which is not installed)" if absent else ""
        return (
            f"Memory as with {self.tier.name}: window {rollout.window} latents, {rollout.history} "
            f"to rewind, weights {self.tier.weights}{absent}; attention {self.attention}, blocks "
            f"{compiled}"
        )

    def pop_warnings(self) -> str:
        """What the player should know when the compiler gave up, one sentence, once."""
        if not self.compiled or not self.compiled.error:
            return ""
        error = self.compiled.error
        self.compiled = None
        return error

    def step_down(self) -> str:
        """Takes the next smaller tier; returns a sentence for the player. `apply_tier` carries it
        out. Raises MemoryError when there is none.
        """
        if len(self.tiers) == 1:
            raise MemoryError(
                f"The device's memory is full in the smallest tier ({self.tier.name}): close "
                "other programs that use it, or play a smaller world."
            )
        self.tiers = self.tiers[1:]
        return f"Memory is full: going on as with {self.tier.name}"

    def apply_tier(self, model: CausalWanTransformer) -> None:
        """Gives unused memory back to the device and stores the model's weights as the tier says;
        can be called again when it failed.
        """
        if model.device.type != "cpu":
            getattr(torch, model.device.type).empty_cache()
        if self.tier.weights == "full" or not linear_layers(model.blocks):
            return
        compiled = self.compiled
        if compiled:  # its code is for other weights: the playing thread would wait for new code
            compiled.stop()
        quantize(model, self.tier.weights, model.device)
        if compiled:
            self.compiled = CompiledBlocks(model.blocks, compiled.before_play)


def start_engine(
    options: EngineOptions,
    tiers: tuple[Tier, ...],
    model: CausalWanTransformer,
    device: torch.device,
) -> Engine:
    """The engine of a model that is on its device and stored as the first tier says."""
    kernel = choose_attention(options.attention, device)
    if not options.compiles(device):
        return Engine(tiers, None, kernel)
    return Engine(tiers, CompiledBlocks(model.blocks, options.compile == "on"), kernel)


def choose_attention(name: str, device: torch.device) -> str:
    """Turns FlashAttention 3 on inside torch's attention where it can be; "fa3" or "torch". Raises
    UserError when "fa3" was asked for and is not available.
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
