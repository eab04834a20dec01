"""Every option of a training recipe, with its unit. A YAML file names only what differs from these
defaults.

A recipe is one file with all stages of a world: `load_recipe("configs/blocks/cpu.yaml",
["dmd.lr=2e-5"])`. Folders are relative to the working directory. Where a stage's weights are asked
for (`init`, `real`, `critic`), the bare name of a stage means that stage's export in the same run
folder; anything else is read as `worldmodel.worlds.checkpoint` reads it.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from worldmodel.config import Amount, Count, Positive, Range, Share, Whole, build, parse_yaml
from worldmodel.errors import UserError
from worldmodel.files import find_config


@dataclass(frozen=True)
class Run:
    """Where and how a recipe runs."""

    folder: str = "runs/blocks"  # one sub-folder a stage
    seed: Annotated[int, Range(0, 2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = (
        "float32"  # of the matrix products; weights and sigmas stay float32
    )
    # the transformers' blocks (in dmd the scores'): slow to start, then steps a fifth shorter on a
    # CPU
    compile: bool = False
    log_every: Count = 10  # optimiser steps
    sample_every: Whole = 500  # optimiser steps between pictures, 0 = none
    checkpoint_every: Whole = 0  # optimiser steps, 0 = by time alone
    checkpoint_minutes: Amount = 10.0  # 0 = by steps alone


@dataclass(frozen=True)
class Data:
    """The encoded clips that the transformer stages learn from."""

    root: str = ""  # folder of clips: index.jsonl and one sub-folder a clip
    frames: Count = 10  # latents in a training window
    first_share: Share = (
        0.3  # share of the windows that start at the first latent of their clip, 0..1
    )
    # prompts.safetensors (caption -> [L, D]); empty = embeddings drawn from the captions' hashes
    prompts: str = ""
    autoencoder: str = (
        ""  # exported autoencoder that decodes the sample pictures; empty = no pictures
    )


@dataclass(frozen=True)
class Model:
    """Shape of the transformer when it starts from random weights (`init` empty)."""

    layers: Count = 8
    heads: Count = 4
    head_dim: Count = 64  # channels a head, a multiple of 4 (PRoPE)
    ffn_dim: Count = 1024
    freq_dim: Count = 256  # width of the sinusoidal time embedding
    patch: tuple[Count, Count, Count] = (1, 2, 2)  # latent frames, cells, cells
    channels: Count = 16  # of a latent
    text_dim: Count = 64
    text_length: Count = 4  # rows of one prompt's embedding
    camera: bool = True  # PRoPE path


@dataclass(frozen=True)
class Optimiser:
    """AdamW of the transformer stages; the autoencoder takes `grad_clip` alone."""

    betas: tuple[Share, Share] = (0.9, 0.99)
    eps: Amount = 1e-8
    weight_decay: Amount = 0.01  # on matrices; vectors and tables are left alone
    grad_clip: Positive = 1.0  # global norm


@dataclass(frozen=True)
class StageConfig:
    """What every stage has."""

    steps: Count = 1000  # optimiser steps of the network that is exported
    batch: Count = 6  # samples an optimiser step
    lr: Positive = 1e-4
    warmup: Whole = 100  # steps of linear rise
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: Share = 0.0  # share of the run after which the decay begins, 0..1
    lr_end: Amount = 0.05  # learning rate at the end of the decay, as a share of `lr`
    ema: Annotated[float, Range(0, 0.999999)] = 0.99  # share of the average that stays at each step
    ema_start: Whole = 0  # step before which the average is a plain copy


@dataclass(frozen=True)
class TransformerConfig(StageConfig):
    """What the stages that train the transformer share."""

    # where the weights come from: a stage's name, or any published form (file, folder, hub id);
    # empty = random weights
    init: str = ""
    optimiser: Literal["adamw", "muon"] = (
        "adamw"  # muon: for the matrices inside the blocks, adamw for the rest
    )
    caption_dropout: Share = (
        0.1  # share of the captions replaced by the unconditional embedding, 0..1
    )
    shift: Positive = 5.0  # of the sigma schedule


@dataclass(frozen=True)
class BidirectionalConfig(TransformerConfig):
    """Flow matching, one sigma a clip, every frame sees every frame."""

    weighting: bool = True  # weight the loss by the reference's bell over the time steps
    sample_steps: Count = 12  # denoising steps of the sample pictures


@dataclass(frozen=True)
class TeacherForcingConfig(TransformerConfig):
    """Flow matching, one sigma a chunk; a noisy chunk sees itself and the clean chunks before
    it.
    """

    chunk: Count = 1  # latents denoised together
    weighting: bool = True
    sample_steps: Count = 12  # denoising steps of the sample pictures
    context_sigma_max: Share = (
        0.0  # the clean context is noised by a sigma uniform in [0, this]; 0 = clean
    )


@dataclass(frozen=True)
class ConsistencyConfig(TransformerConfig):
    """Causal consistency distillation of the teacher-forced model `init` (teacher, student and
    average start there).
    """

    chunk: Count = 1
    grid: Annotated[int, Range(2)] = 48  # points of the sigma grid that the teacher steps along
    guidance: Amount = 3.0  # u + guidance (c - u); 1 skips the unconditional pass
    sigma_lookup: Literal["exact", "grid"] = (
        "exact"  # grid = the reference's nearest of 1000 sigmas
    )
    sample_steps: Count = 4  # denoising steps of the sample pictures


@dataclass(frozen=True)
class DmdConfig(TransformerConfig):
    """Asymmetric distribution matching distillation with self-rollout of the student `init`."""

    chunk: Count = 1
    real: str = "bidirectional"  # export of the network that scores real data
    critic: str = ""  # export that the fake score starts from; empty = `real`
    critic_lr: Positive = 1e-4
    critic_updates: Count = 5  # of the fake score for every update of the student
    # all updates of a step learn from one batch of rollouts; false = every one from a batch of its
    # own, as published
    shared: bool = False
    denoise: tuple[int, ...] = (1000, 500)  # student's time steps before the shift, 0..1000
    first_denoise: tuple[int, ...] = (1000, 750, 500, 250)  # of the first chunk
    # latents of the longest self-rollout, of which the last data.frames are judged; 0 = data.frames
    rollout: Whole = 0
    # latents that the scores see at once: data.frames in so many equal parts; 0 = all of them
    judged: Whole = 0
    skew: Annotated[float, Range(1, 100)] = (
        1.0  # 1 = every length of a rollout is as likely, more = most are short and few are long
    )
    window: Count = 12  # latents that a chunk sees, itself included
    sinks: Whole = 0  # first latents that never leave the window
    start_share: Share = 0.5  # share of the rollouts that start from a true first chunk, 0..1
    # weight of the pull towards the clip itself in rollouts from its first chunk; 0 = none, as
    # published
    truth: Amount = 0.0
    # square error of a latent cell beyond which the pull fades (a latent's variance is 1); 0 = it
    # never does
    truth_scale: Amount = 0.0
    # weight of the same pull on means of 2x2 latent cells, which never fades: layout without edges
    truth_coarse: Amount = 0.0
    guidance: Amount = 3.0  # c + guidance (c - u) of the real score; 0 skips the unconditional pass
    # as `shift`, of the sigma at which the scores are compared: 1 = all alike, so more for detail;
    # 0 = `shift`
    score_shift: Amount = 0.0
    clamp: tuple[Share, Share] = (0.02, 0.98)  # range of the sigma at which the scores are compared
    cache_gradient: Literal["straight_through", "detached"] = (
        "detached"  # into the remembered frames
    )
    sigma_lookup: Literal["exact", "grid"] = "exact"

    def __post_init__(self) -> None:
        if not self.clamp[0] < self.clamp[1]:
            raise UserError(f"clamp must rise, got {list(self.clamp)}")


@dataclass(frozen=True)
class AutoencoderConfig(StageConfig):
    """The tiny autoencoder; the sizes are `TinyAutoencoder`'s arguments."""

    batch: Count = 4
    lr: Positive = 6e-4  # 1.5e-3 diverges
    weight_decay: Amount = 0.0
    encoder_widths: tuple[Count, ...] = (32, 32, 64, 128)  # channels
    encoder_blocks: tuple[Whole, ...] = (1, 2, 2)  # a level
    decoder_widths: tuple[Count, ...] = (160, 96, 48, 48)  # channels
    decoder_blocks: tuple[Whole, ...] = (3, 2, 1)  # a level
    strides: tuple[int, ...] = (1, 2, 2)  # of the encoder's levels
    patch_size: Count = 2  # pixels of a side folded into channels
    latent_channels: Count = 16
    # folder of a trained autoencoder to go on from, of these sizes or smaller; empty = random
    # weights
    start: str = ""
    freeze_encoder: bool = False  # train the decoder alone: latents that were made stay valid
    window: Count = 3  # latents (4 * window - 3 frames) of a training clip
    crop: tuple[
        Count, ...
        # height and width in pixels of the part of a frame that is trained on; empty = the whole
        # frame
    ] = ()
    edge_weight: Amount = 0.5  # of the L1 between neighbouring-pixel differences: crisp edges
    # of the distance between local edge energies: crisp even where the exact place of an edge is
    # unknown
    detail_weight: Amount = 0.0
    square_weight: Amount = (
        2.0  # of the mean square error: leaves the grey picture quickly at the start
    )
    coarse_weight: Amount = (
        0.5  # of the L1 between pictures reduced 4x: right colours of large areas
    )
    latent_weight: Amount = (
        1e-3  # of the latents' mean square: keeps them bounded against the noise
    )
    # added to the latents, as a share of each channel's deviation: smooth space, forgiving decoder
    latent_noise: Amount = 0.05


@dataclass(frozen=True)
class Recipe:
    """All stages of one world."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimiser: Optimiser = field(default_factory=Optimiser)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    bidirectional: BidirectionalConfig = field(default_factory=BidirectionalConfig)
    teacher_forcing: TeacherForcingConfig = field(default_factory=TeacherForcingConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)

    def __post_init__(self) -> None:
        for name in ("teacher_forcing", "consistency", "dmd"):
            chunk = getattr(self, name).chunk
            if chunk < 1 or self.data.frames % chunk:
                raise UserError(
                    f"data.frames is {self.data.frames}, not a multiple of {name}.chunk = "
                    f"{chunk}: change one"
                )
        if self.dmd.rollout and (
            self.dmd.rollout < self.data.frames or self.dmd.rollout % self.dmd.chunk
        ):
            raise UserError(
                f"dmd.rollout must be 0, or at least data.frames = {self.data.frames} and a "
                f"multiple of dmd.chunk = {self.dmd.chunk}, got {self.dmd.rollout}: change one"
            )

        if self.dmd.judged and self.data.frames % self.dmd.judged:
            raise UserError(
                f"dmd.judged must be 0 or a divisor of data.frames = {self.data.frames}, got "
                f"{self.dmd.judged}: change one"
            )

    def export_folder(self, source: str) -> Path:
        """Folder of exported weights: a stage's name means that stage's export in this run
        folder.
        """
        known = {
            f.name
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), StageConfig)
        }
        return Path(self.run.folder) / source / "export" if source in known else Path(source)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe; every override is `section.key=value` with the value as YAML.

    Raises ValueError with one sentence for a missing file, broken YAML, an unknown key (naming the
    nearest known one) or a value of the wrong kind.
    """
    path = find_config(path)
    if not path.is_file():
        raise UserError(
            f"no recipe at {path}: expected a YAML file such as configs/blocks/cpu.yaml"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as run and data, got {values!r}")
    return make_recipe(values, overrides, str(path))


def make_recipe(values: dict, overrides: typing.Sequence[str], where: str) -> Recipe:
    """A recipe of a file's values and overrides as in `load_recipe`; `where` begins the error
    messages.
    """
    for override in overrides:
        _override(values, override)
    return build(Recipe, values, where)


def _override(values: dict, text: str) -> None:
    keys, equals, value = text.partition("=")
    *sections, last = keys.strip().split(".")
    if not equals or not sections:
        raise UserError(f"expected section.key=value after --set, got {text!r}")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {section} is not a section")
    try:
        values[last] = parse_yaml(value) if value.strip() else ""
    except UserError:
        raise UserError(f"expected a value in YAML after --set {keys}=, got {value!r}") from None
