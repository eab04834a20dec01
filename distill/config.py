"""Every option of a training recipe, with its unit. A YAML file names only what differs from these
defaults.

A recipe is one file with all stages of a world: `load_recipe("configs/blocks/cpu.yaml",
["dmd.lr=2e-5"])`. Folders are relative to the working directory. Where an option names the weights
of a network (`init`, `real`, `fake_score`), the bare name of a stage means that stage's export in
the same run folder; anything else is read as `worldmodel.worlds.checkpoint` reads it.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from worldmodel.config import Amount, Count, Positive, Range, Share, Whole, build, parse_yaml
from worldmodel.errors import UserError
from worldmodel.files import find_config

# Former names of sections and options -> their names today. Recipes, overrides and the checkpoints
# of a run folder may use either.
RENAMED = {
    "optimiser": "optimizer",
    "data.first_share": "data.first_frame_prob",
    "bidirectional.optimiser": "bidirectional.optimizer",
    "teacher_forcing.optimiser": "teacher_forcing.optimizer",
    "consistency.optimiser": "consistency.optimizer",
    "dmd.optimiser": "dmd.optimizer",
    "dmd.critic": "dmd.fake_score",
    "dmd.critic_lr": "dmd.fake_score_lr",
    "dmd.critic_updates": "dmd.fake_score_updates",
    "dmd.shared": "dmd.reuse_rollouts",
    "dmd.judged": "dmd.score_window",
    "dmd.skew": "dmd.length_exponent",
    "dmd.start_share": "dmd.gt_first_chunk_prob",
    "dmd.truth": "dmd.ground_truth_weight",
    "dmd.truth_scale": "dmd.ground_truth_scale",
    "dmd.truth_coarse": "dmd.ground_truth_low_pass_weight",
    "dmd.score_shift": "dmd.score_timestep_shift",
}
# Removed options -> the one value that the program still implements.
RETIRED = {
    "consistency.sigma_lookup": "exact",
    "dmd.sigma_lookup": "exact",
    "dmd.cache_gradient": "detached",
}


@dataclass(frozen=True)
class Run:
    """Where and how a recipe runs."""

    folder: str = "runs/blocks"  # one sub-folder per stage
    seed: Annotated[int, Range(0, 2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # of the matrix products; weights and sigmas stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    # compile the transformer's blocks (in dmd those of the scores): slow to start, then steps are
    # a fifth shorter on a CPU
    compile: bool = False
    log_every: Count = 10  # optimizer steps
    sample_every: Whole = 500  # optimizer steps between pictures, 0 = none
    checkpoint_every: Whole = 0  # optimizer steps, 0 = by time alone
    checkpoint_minutes: Amount = 10.0  # 0 = by steps alone


@dataclass(frozen=True)
class Data:
    """The encoded clips that the transformer stages learn from."""

    root: str = ""  # folder of clips: index.jsonl and one sub-folder per clip
    # folder of clips of places, with conditions (`distill condition`); stage `places` alone
    places: str = ""
    frames: Count = 10  # latents in a training window
    first_frame_prob: Share = 0.3  # probability that a window starts at its clip's first latent
    # prompts.safetensors (caption -> [L, D]); empty = random embeddings seeded by the captions
    prompts: str = ""
    # exported autoencoder that decodes the sample pictures; empty = no pictures
    autoencoder: str = ""


@dataclass(frozen=True)
class Model:
    """Shape of the transformer when it starts from random weights (`init` empty)."""

    layers: Count = 8
    heads: Count = 4
    head_dim: Count = 64  # channels per head, a multiple of 4 (PRoPE)
    ffn_dim: Count = 1024
    freq_dim: Count = 256  # width of the sinusoidal time embedding
    patch: tuple[Count, Count, Count] = (1, 2, 2)  # latent frames, cells, cells
    channels: Count = 16  # of a latent
    text_dim: Count = 64
    text_length: Count = 4  # rows of one prompt's embedding
    camera: bool = True  # PRoPE path


@dataclass(frozen=True)
class Optimizer:
    """AdamW of the transformer stages; the autoencoder uses `grad_clip` only."""

    betas: tuple[Share, Share] = (0.9, 0.99)
    eps: Amount = 1e-8
    weight_decay: Amount = 0.01  # on matrices; vectors and modulation tables have none
    grad_clip: Positive = 1.0  # global norm


@dataclass(frozen=True)
class StageConfig:
    """Options of every stage."""

    steps: Count = 1000  # optimizer steps of the network that is exported
    batch: Count = 6  # samples per optimizer step
    lr: Positive = 1e-4
    warmup: Whole = 100  # steps of linear rise
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: Share = 0.0  # share of the run after which the decay begins, 0..1
    lr_end: Amount = 0.05  # learning rate at the end of the decay, as a share of `lr`
    ema: Annotated[float, Range(0, 0.999999)] = 0.99  # decay of the moving average per step
    ema_start: Whole = 0  # step before which the average is a plain copy


@dataclass(frozen=True)
class TransformerConfig(StageConfig):
    """Options of the stages that train the transformer."""

    # source of the weights: a stage's name, or any published form (file, folder, hub id); empty =
    # random weights
    init: str = ""
    # muon: for the matrices inside the blocks, adamw for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    caption_dropout: Share = 0.1  # probability that a caption becomes the unconditional embedding
    shift: Positive = 5.0  # of the sigma schedule


@dataclass(frozen=True)
class BidirectionalConfig(TransformerConfig):
    """Flow matching, one sigma per clip; every frame attends to every frame."""

    weighting: bool = True  # weight the loss by the reference's bell over the time steps
    sample_steps: Count = 12  # denoising steps of the sample pictures


@dataclass(frozen=True)
class TeacherForcingConfig(TransformerConfig):
    """Flow matching, one sigma per chunk; a noisy chunk attends to itself and to the clean chunks
    before it.
    """

    chunk: Count = 1  # latents denoised together
    weighting: bool = True  # weight the loss by the reference's bell over the time steps
    sample_steps: Count = 12  # denoising steps of the sample pictures
    # the clean context is noised by a sigma uniform in [0, this]; 0 = clean
    context_sigma_max: Share = 0.0
    # latents of a window that are remembered ones, chosen by view overlap; 0 = none
    recall_frames: Whole = 0
    recall_share: Share = 0.7  # probability that a window has them
    recall_unit: Positive = 1.0  # `recall_unit` of world.yaml, in units of the clips' poses


@dataclass(frozen=True)
class ConsistencyConfig(TransformerConfig):
    """Causal consistency distillation of the teacher-forced model `init` (teacher, student and
    average start there).
    """

    chunk: Count = 1  # latents denoised together
    grid: Annotated[int, Range(2)] = 48  # points of the sigma grid that the teacher steps along
    guidance: Amount = 3.0  # u + guidance (c - u); 1 skips the unconditional pass
    sample_steps: Count = 4  # denoising steps of the sample pictures


@dataclass(frozen=True)
class DmdConfig(TransformerConfig):
    """Asymmetric distribution matching distillation with self-rollout of the student `init`."""

    chunk: Count = 1  # latents denoised together
    real: str = "bidirectional"  # export of the network that scores real data
    fake_score: str = ""  # export that the fake score starts from; empty = `real`
    fake_score_lr: Positive = 1e-4
    fake_score_updates: Count = 5  # for every update of the student
    # all updates of a step learn from one batch of rollouts; false = each from a batch of its own,
    # as published
    reuse_rollouts: bool = False
    denoise: tuple[int, ...] = (1000, 500)  # student's time steps before the shift, 0..1000
    first_denoise: tuple[int, ...] = (1000, 750, 500, 250)  # of the first chunk
    # latents of the longest self-rollout, of which the last data.frames are scored; 0 = data.frames
    rollout: Whole = 0
    # latents that the scores see together: data.frames in equal parts of this length; 0 = all
    score_window: Whole = 0
    # a rollout's length is uniform to this power: 1 = every length is as likely, more = most
    # rollouts are short
    length_exponent: Annotated[float, Range(1, 100)] = 1.0
    window: Count = 12  # latents that a chunk attends to, itself included
    sinks: Whole = 0  # first latents that never leave the window
    recall: Whole = 0  # latents of the window that are chosen by view overlap among older ones
    recall_unit: Positive = 1.0  # `recall_unit` of world.yaml, in units of the clips' poses
    # sigma of the noise on a generated chunk before its clean pass (0.005 in Causal-Forcing)
    context_sigma: Share = 0.0
    # probability that a rollout starts from the ground truth's first chunk
    gt_first_chunk_prob: Share = 0.5
    # weight of the square error to the clip in rollouts from its first chunk; 0 = none, as
    # published
    ground_truth_weight: Amount = 0.0
    # square error of a latent cell beyond which that term saturates (a latent's variance is 1); 0 =
    # never
    ground_truth_scale: Amount = 0.0
    # weight of the same error on means of 2x2 latent cells, which never saturates: layout, not
    # edges
    ground_truth_low_pass_weight: Amount = 0.0
    guidance: Amount = 3.0  # c + guidance (c - u) of the real score; 0 skips the unconditional pass
    # shift of the sigma at which the scores are compared: 1 = uniform, which favours detail; 0 =
    # `shift`
    score_timestep_shift: Amount = 0.0
    clamp: tuple[Share, Share] = (0.02, 0.98)  # range of the sigma at which the scores are compared

    def __post_init__(self) -> None:
        if not self.clamp[0] < self.clamp[1]:
            raise UserError(f"clamp must rise, got {list(self.clamp)}")


@dataclass(frozen=True)
class PlacesConfig(TransformerConfig):
    """Flow matching in places, with what is known of them as a condition; elsewhere the student
    keeps to `init`.
    """

    chunk: Count = 1  # latents denoised together
    place_share: Share = 0.75  # probability that a window is one of a place
    condition_dropout: Share = 0.05  # probability that a latent frame has no condition
    # most passes, uniform from 0, that make the context again from the student's own frames
    own_past: Whole = 3
    # without such a pass a place's clean context is noised by a sigma uniform in [0, this]
    context_sigma_max: Share = 0.8
    denoise: tuple[int, ...] = (1000, 500)  # time steps of play before the shift, 0..1000
    first_denoise: tuple[int, ...] = (1000, 750, 500, 250)  # of the first chunk


@dataclass(frozen=True)
class AutoencoderConfig(StageConfig):
    """The tiny autoencoder; the sizes are `TinyAutoencoder`'s arguments."""

    batch: Count = 4
    lr: Positive = 6e-4  # 1.5e-3 diverges
    weight_decay: Amount = 0.0
    encoder_widths: tuple[Count, ...] = (32, 32, 64, 128)  # channels
    encoder_blocks: tuple[Whole, ...] = (1, 2, 2)  # per level
    decoder_widths: tuple[Count, ...] = (160, 96, 48, 48)  # channels
    decoder_blocks: tuple[Whole, ...] = (3, 2, 1)  # per level
    strides: tuple[int, ...] = (1, 2, 2)  # of the encoder's levels
    patch_size: Count = 2  # pixels of a side folded into channels
    upscale: Count = 1  # resolution of pictures / resolution of the encoder, which averages them
    latent_channels: Count = 16
    # folder of a trained autoencoder of these sizes or smaller ones to start from; empty = random
    # weights
    start: str = ""
    freeze_encoder: bool = False  # train the decoder alone: existing latents stay valid
    window: Count = 3  # latents (4 * window - 3 frames) of a training clip
    # height and width in pixels of the crops to train on; empty = whole frames
    crop: tuple[Count, ...] = ()
    edge_weight: Amount = 0.5  # of the L1 between neighbouring-pixel differences: crisp edges
    # of the distance between local edge energies: crisp even where the place of an edge is unknown
    detail_weight: Amount = 0.0
    square_weight: Amount = 2.0  # of the mean square error: leaves grey quickly at the start
    coarse_weight: Amount = 0.5  # of the L1 between pictures reduced 4x: colours of large areas
    latent_weight: Amount = 1e-3  # of the latents' mean square: bounds them against the noise
    # noise added to the latents, as a share of each channel's deviation: smooth space, robust
    # decoder
    latent_noise: Amount = 0.05


@dataclass(frozen=True)
class Recipe:
    """All stages of one world."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    bidirectional: BidirectionalConfig = field(default_factory=BidirectionalConfig)
    teacher_forcing: TeacherForcingConfig = field(default_factory=TeacherForcingConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)
    places: PlacesConfig = field(default_factory=PlacesConfig)

    def __post_init__(self) -> None:
        frames = self.data.frames
        for name in ("teacher_forcing", "consistency", "dmd", "places"):
            chunk = getattr(self, name).chunk
            if chunk < 1 or frames % chunk:
                raise UserError(
                    f"data.frames is {frames}, not a multiple of {name}.chunk = {chunk}: change one"
                )
        recalled = self.teacher_forcing.recall_frames
        chunk = self.teacher_forcing.chunk
        if recalled and (recalled >= frames or recalled % chunk):
            raise UserError(
                "teacher_forcing.recall_frames must be 0, or a multiple of teacher_forcing.chunk = "
                f"{chunk} below data.frames = {frames}, got {recalled}: change one"
            )
        room = max(0, self.dmd.window - self.dmd.sinks - 2 * self.dmd.chunk)
        if self.dmd.recall > room:
            raise UserError(
                f"dmd.recall must be at most dmd.window - dmd.sinks - 2 dmd.chunk = {room}, got "
                f"{self.dmd.recall}: change one"
            )
        rollout = self.dmd.rollout
        if rollout and (rollout < frames or rollout % self.dmd.chunk):
            raise UserError(
                f"dmd.rollout must be 0, or at least data.frames = {frames} and a multiple of "
                f"dmd.chunk = {self.dmd.chunk}, got {rollout}: change one"
            )
        if self.dmd.score_window and frames % self.dmd.score_window:
            raise UserError(
                f"dmd.score_window must be 0 or a divisor of data.frames = {frames}, got "
                f"{self.dmd.score_window}: change one"
            )

    def export_folder(self, source: str) -> Path:
        """Folder of exported weights: a stage's name means that stage's export in this run
        folder.
        """
        stages = {
            f.name
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), StageConfig)
        }
        return Path(self.run.folder) / source / "export" if source in stages else Path(source)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe; every override is `section.key=value` with the value as YAML.

    Raises UserError for a missing file, broken YAML, an unknown key (naming the nearest known one)
    or a value of the wrong kind.
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
    """Build a recipe from a file's values and from overrides as in `load_recipe`; `where` begins
    the error messages.
    """
    values = current_names(values, where)
    for override in overrides:
        _override(values, override)
    return build(Recipe, values, where)


def current_names(values: dict, where: str) -> dict:
    """Sections of a recipe, or of the config in a checkpoint, under today's names.

    A removed option is dropped at the value that the program still implements. Raises UserError for
    another value, and where an option is given under both its names.
    """
    current: dict = {}
    for section, options in values.items():
        if isinstance(options, dict):
            options = _current_options(section, options, where)
        _add(current, RENAMED.get(section, section), options, section, where)
    return current


def _current_options(section: str, options: dict, where: str) -> dict:
    current: dict = {}
    for key, value in options.items():
        path = f"{section}.{key}"
        if path not in RETIRED:
            name = RENAMED.get(path, path).removeprefix(f"{section}.")
            _add(current, name, value, path, where)
        elif value != RETIRED[path]:
            raise UserError(
                f"{where}: {path} = {value!r} is no longer supported, only {RETIRED[path]!r} is: "
                "remove the option"
            )
    return current


def _add(values: dict, name: str, value: object, given: str, where: str) -> None:
    if name in values:
        raise UserError(
            f"{where}: {given} is given under its present and its former name: keep {name!r}"
        )
    values[name] = value


def _override(values: dict, text: str) -> None:
    path, equals, value = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and section and dot and key):
        raise UserError(f"expected section.key=value after --set, got {text!r}")
    try:
        parsed = parse_yaml(value) if value.strip() else ""
    except UserError:
        raise UserError(f"expected a value in YAML after --set {path}=, got {value!r}") from None
    for name, options in current_names({section: {key: parsed}}, "--set").items():
        known = values.setdefault(name, {})
        if not isinstance(known, dict):
            raise UserError(f"--set {text}: {name} is not a section")
        known.update(options)
