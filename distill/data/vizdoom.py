"""Footage of a real game: a wanderer in Freedoom's levels (ViZDoom, extra `collect`), with the
engine's own camera.

Doom's picture differs in two ways from that of the pinhole camera that a pose file describes, and
one homography corrects both: the engine draws heights 1.2 times too tall, and it looks up and down
by shifting rows (walls stay upright) instead of tilting the camera. So levels are rendered larger
and wider than requested, and every picture is re-projected (`Lens`) to square pixels, 90 degrees
across, and a camera that tilts.

The game runs at 35 tics per second; a frame is taken every second tic, so clips have 17.5 frames
per second.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import cv2
import numpy as np

from distill.data.clips import frames_of, write_clip
from distill.data.collect import CollectConfig, clip_name, make_missing
from worldmodel.camera import FRAMES_PER_LATENT, rotation
from worldmodel.errors import UserError
from worldmodel.files import write_file

# world units; a walking player moves 66 map units per latent, so 0.13 units
UNITS_PER_MAP_UNIT = 1 / 512
TICS_PER_FRAME = 2
FPS = 35 / TICS_PER_FRAME  # 17.5
LICENCE = "BSD-3-Clause (Freedoom)"

RENDER_FOV = 120.0  # degrees across, of the engine's picture; the clip's 90 are cut out of it
# width, height in pixels, all 4:3
RENDER_SIZES = ((640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200))
HEIGHT_STRETCH = 1.2  # the engine's vertical focal length over its horizontal one
MOST_PITCH = 20.0  # degrees up or down, less where the clip's picture is tall

LEVELS = tuple(f"MAP{number:02}" for number in range(1, 33))
DEFAULT_TRAIN = ("MAP01", "MAP02", "MAP03", "MAP04", "MAP06", "MAP07", "MAP08", "MAP11")
DEFAULT_HELDOUT = ("MAP05", "MAP10")
_EPISODE_LEVEL = re.compile(r"E[1-4]M[1-9]")
_CAMERA = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "PITCH")
_HIDDEN = (
    "hud",
    "weapon",
    "crosshair",
    "messages",
    "particles",
    "decals",
    "effects_sprites",
    "screen_flashes",
)
_BUTTONS = (
    "MOVE_FORWARD_BACKWARD_DELTA",
    "MOVE_LEFT_RIGHT_DELTA",
    "TURN_LEFT_RIGHT_DELTA",
    "LOOK_UP_DOWN_DELTA",
    "USE",
)
_WALK = 25.0  # the engine's units for full walking speed
_STRAFE = 24.0
_START_TICS = 24  # at the start of a level the player cannot move for half a second
_WARM_UP_FRAMES = 12  # before the first frame of a clip, so that it begins in motion
_MOST_TRIES = 40  # starts tried for one clip
_CLOSE = 24.0  # `Game.openness` ahead below which the wanderer turns away, 100 to 200 map units
_LEAST_WAY = 0.03  # world units per latent, average over a clip: below, the wanderer was stuck


# -------------------- clips


@dataclass(frozen=True)
class VizdoomConfig(CollectConfig):
    """What to record. Train and held-out clips never share a level."""

    source: ClassVar[str] = "vizdoom"

    levels: tuple[str, ...] = ()  # maps; none = a choice of maps of the split


def collect_clips(config: VizdoomConfig) -> None:
    """Record the missing clips; see `make_missing`.

    Raises:
        UserError: ViZDoom is not installed, a level is unknown or belongs to the other split, the
        folder holds other footage.
    """
    load_engine()
    levels_of(config)
    Lens(config.height, config.width)
    make_missing(config, collect_clip, _identity)


def collect_clip(config: VizdoomConfig, index: int) -> Path:
    """Record and write clip number `index`; the same numbers give the same walk (see
    `record`).
    """
    levels = levels_of(config)
    level = levels[index % len(levels)]
    lens = Lens(config.height, config.width)
    frames, c2w = record(level, frames_of(config.latents), [config.seed, index], lens)
    return write_clip(
        config.output,
        clip_name(config, index),
        frames,
        c2w[::FRAMES_PER_LATENT],
        config.intrinsics,
        caption=f"freedoom {level.lower()}",
        fps=FPS,
        licence=LICENCE,
        **_identity(config, index),
    )


def levels_of(config: VizdoomConfig) -> tuple[str, ...]:
    """The levels to record in. Every fifth map (MAP05, E1M5, MAP10, ...) is held out from
    training.

    Raises UserError for an unknown level or one of the other split.
    """
    held_out = config.split == "heldout"
    levels = tuple(level.upper() for level in config.levels) or (
        DEFAULT_HELDOUT if held_out else DEFAULT_TRAIN
    )
    for level in levels:
        if level not in LEVELS and not _EPISODE_LEVEL.fullmatch(level):
            raise UserError(f"expected levels MAP01 to MAP32 or E1M1 to E4M9, got {level!r}")
        if (int(level[-1]) % 5 == 0) != held_out:
            raise UserError(
                f"level {level} does not belong to --split {config.split}: maps 5, 10, ... are "
                "held out"
            )
    return levels


def _identity(config: VizdoomConfig, index: int) -> dict:
    levels = levels_of(config)
    source = f"vizdoom:{levels[index % len(levels)].lower()}:{config.seed}:{index}"
    return {
        "source": source,
        "latents": config.latents,
        "height": config.height,
        "width": config.width,
    }


# -------------------- camera


def camera_pose(variables: np.ndarray) -> np.ndarray:
    """The engine's camera variables (x, y, z in map units, angle, pitch in degrees) -> c2w [4,4]
    float64.

    Doom has x east, y north, z up, angles counted left from east and pitch counted down; ours is x
    right, y down, z forward for a camera that looks east, in world units.
    """
    x, y, z, angle, pitch = np.asarray(variables[:5], np.float64)
    pose = np.eye(4)
    pose[:3, :3] = rotation(-angle, -_signed(pitch))
    pose[:3, 3] = np.array([-y, -z, x]) * UNITS_PER_MAP_UNIT
    return pose


def _signed(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0


class Lens:
    """Converts the engine's picture to that of a pinhole camera with square pixels, 90 degrees
    across.

    Args:
        height, width: of the clip, pixels.
    Raises:
        UserError: the picture is taller than the engine's field of view.
    """

    def __init__(self, height: int, width: int):
        self.size = (width, height)
        focal = width / 2  # 90 degrees across
        # Twice the clip's sampling where the engine allows, so that averaging removes the jagged
        # edges.
        self.render_size = next(
            (size for size in RENDER_SIZES if _focal(size[0]) >= 2 * focal), RENDER_SIZES[-1]
        )
        self.to_ray = np.linalg.inv(
            np.array([[2 * focal, 0, width - 0.5], [0, 2 * focal, height - 0.5], [0, 0, 1]])
        )
        self.most_pitch = next(
            (pitch for pitch in np.arange(MOST_PITCH, -0.5, -1.0) if self._fits(pitch)), None
        )
        if self.most_pitch is None:
            raise UserError(
                f"expected a clip that is wider than tall (at most 1 : 1), got {height} x {width} "
                "pixels"
            )

    def straighten(self, picture: np.ndarray, pitch: float) -> np.ndarray:
        """Engine's picture uint8 [h,w,3] taken at `pitch` degrees up -> uint8 [height,width,3]."""
        double = (2 * self.size[0], 2 * self.size[1])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        large = cv2.warpPerspective(picture, self._to_picture(pitch), double, flags=flags)
        return cv2.resize(large, self.size, interpolation=cv2.INTER_AREA)

    def _to_picture(self, pitch: float) -> np.ndarray:
        """Homography: pixel of the doubled clip -> ray -> ray of a level camera -> pixel of the
        engine's picture.
        """
        width, height = self.render_size
        focal_x = _focal(width)
        focal_y = HEIGHT_STRETCH * _focal(width)
        horizon = height / 2 - 0.5 + focal_y * np.tan(np.deg2rad(pitch))
        level_camera = np.array([[focal_x, 0, width / 2 - 0.5], [0, focal_y, horizon], [0, 0, 1]])
        return level_camera @ rotation(0, pitch) @ self.to_ray

    def _fits(self, pitch: float) -> bool:
        """Whether the engine's picture covers the clip's at this pitch, up and down."""
        right = 2 * self.size[0] - 1
        bottom = 2 * self.size[1] - 1
        corners = np.array(
            [[0, 0, 1], [right, 0, 1], [0, bottom, 1], [right, bottom, 1]], np.float64
        ).T
        for sign in (-1, 1):
            x, y, depth = self._to_picture(sign * pitch) @ corners
            x = x / depth
            y = y / depth
            inside = (
                (x >= 0)
                & (x <= self.render_size[0] - 1)
                & (y >= 0)
                & (y <= self.render_size[1] - 1)
            )
            if not (inside & (depth > 0)).all():
                return False
        return True


def _focal(width: int) -> float:
    """Focal length in pixels of the engine's picture of this width."""
    return width / 2 / np.tan(np.deg2rad(RENDER_FOV / 2))


# -------------------- engine


def load_engine():
    """The vizdoom package. Raises UserError where it is not installed."""
    try:
        import vizdoom
    except ImportError as error:
        raise UserError(
            "this source needs ViZDoom, which is not installed: run `python -m pip install vizdoom`"
        ) from error
    return vizdoom


def _write_config(folder: Path) -> str:
    """Write the engine's settings file. Without these sections the engine creates a folder
    `_vizdoom` in the working directory.
    """
    path = folder / "engine.ini"
    games = ("Doom", "Heretic", "Hexen", "Strife", "Chex")
    sections = (f"[{game}.AutoExec]\nPath={folder}/autoexec.cfg\n" for game in games)
    write_file(path, "".join(sections))
    return str(path)


class Game:
    """One level of Freedoom without monsters, weapon or display, seen through `lens`; a context
    manager.
    """

    def __init__(self, level: str, lens: Lens, seed: int = 0):
        engine = load_engine()
        self.lens = lens
        self.folder = tempfile.TemporaryDirectory()
        game = engine.DoomGame()
        self.game = game
        level = level.upper()
        wad = "freedoom2.wad" if level.startswith("MAP") else "freedoom1.wad"
        game.set_doom_game_path(str(Path(engine.__file__).parent / wad))
        game.set_doom_config_path(_write_config(Path(self.folder.name)))
        game.set_doom_map(level)
        game.set_screen_resolution(
            getattr(engine.ScreenResolution, "RES_{}X{}".format(*lens.render_size))
        )
        game.set_screen_format(engine.ScreenFormat.RGB24)
        for thing in _HIDDEN:
            getattr(game, f"set_render_{thing}")(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_depth_buffer_enabled(True)
        game.set_objects_info_enabled(True)
        game.set_available_buttons([getattr(engine.Button, key) for key in _BUTTONS])
        game.set_available_game_variables(
            [getattr(engine.GameVariable, f"CAMERA_{name}") for name in _CAMERA]
        )
        game.add_game_args(f"-nomonsters +movebob 0 +cl_showsecretmessage 0 +fov {RENDER_FOV:.0f}")
        game.set_mode(engine.Mode.PLAYER)
        game.set_doom_skill(1)
        game.set_episode_timeout(0)
        game.set_seed(seed)
        game.init()
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.game.close()
        self.folder.cleanup()

    def restart(self) -> None:
        """Start the level from its beginning, with a player who cannot be hurt."""
        self.game.new_episode()
        for command in ("god", f"fov {RENDER_FOV:.0f}"):
            self.game.send_game_command(command)
        self.act(tics=_START_TICS)

    @property
    def over(self) -> bool:
        """Whether the level has ended (the player used an exit)."""
        return self.game.is_episode_finished()

    def act(
        self, forward=0.0, right=0.0, turn=0.0, look=0.0, use=False, tics: int = TICS_PER_FRAME
    ) -> None:
        """Apply these for some tics: speeds in the engine's units, `turn` right and `look` up in
        degrees per tic.
        """
        self.game.make_action([forward, right, turn, look, float(use)], tics)
        self.state = self.game.get_state()

    def warp(self, x: float, y: float) -> None:
        """Move the player to the floor at x, y in map units."""
        self.game.send_game_command(f"warp {x:.0f} {y:.0f}")
        self.act(tics=_START_TICS)

    def places(self) -> list[tuple[float, float]]:
        """Positions of the level's things in map units: places where a player can stand."""
        things = self.state.objects
        return [
            (thing.position_x, thing.position_y) for thing in things if "Barrel" not in thing.name
        ]

    def variables(self) -> np.ndarray:
        """The camera: x, y, z in map units, angle, pitch in degrees."""
        return np.asarray(self.state.game_variables, np.float64)

    def openness(self) -> np.ndarray:
        """Free distance to the left, ahead and to the right at eye level: [3], from 0 (touching) to
        255 (far).
        """
        height, width = self.state.depth_buffer.shape
        rows = self.state.depth_buffer[
            height * 9 // 20 : height * 11 // 20 : 4, width // 5 : -(width // 5)
        ]
        return np.array([part.mean() for part in np.array_split(rows, 3, axis=1)])

    def picture(self) -> np.ndarray:
        """The camera's picture, uint8 [height,width,3]."""
        return self.lens.straighten(self.state.screen_buffer, -_signed(self.variables()[4]))


# -------------------- player


@dataclass
class Wish:
    """What the wanderer does for the next frames."""

    forward: float = 0.0  # share of walking speed, negative = backwards
    right: float = 0.0  # share of walking speed
    turn: float = 0.0  # degrees right per tic
    pitch: float = 0.0  # degrees up


class Wanderer:
    """A seeded player who walks, strafes, stops, turns and looks around, tries doors and turns away
    from walls.
    """

    def __init__(self, game: Game, rng: np.random.Generator):
        self.game = game
        self.rng = rng
        self.wish = Wish()
        self.patience = 0  # frames until the next wish
        self.turn = 0.0  # current speed, degrees per tic
        self.look = 0.0  # likewise
        self.camera = game.variables()

    def step(self) -> None:
        """Play one frame."""
        self.patience -= 1
        now = self.game.variables()
        moved = np.linalg.norm(now[:2] - self.camera[:2])
        self.camera = now
        left, ahead, right = self.game.openness()
        stuck = self.wish.forward > 0.5 and moved < 2.0 and self.turning < 0.5
        if (ahead < _CLOSE or stuck) and self.turning < 1.0:
            self._turn_away(left, ahead, right)
        elif self.patience <= 0:
            self._decide(left, right)
        self.turn += 0.25 * (self.wish.turn - self.turn)
        self.look += 0.3 * (
            np.clip(0.1 * (self.wish.pitch + _signed(now[4])), -1.0, 1.0) - self.look
        )
        use = stuck and self.rng.random() < 0.3  # the obstacle may be a door
        self.game.act(
            _WALK * self.wish.forward, _STRAFE * self.wish.right, self.turn, self.look, use
        )

    @property
    def turning(self) -> float:
        return abs(self.wish.turn)

    def _decide(self, left: float, right: float) -> None:
        rng = self.rng
        most = self.game.lens.most_pitch
        side = self._open_side(left, right) if rng.random() < 0.7 else rng.choice([-1.0, 1.0])
        self.wish = Wish(
            forward=rng.choice([1.0, 0.6, 0.0, -0.6], p=[0.66, 0.16, 0.1, 0.08]),
            right=rng.choice([0.0, -1.0, 1.0], p=[0.76, 0.12, 0.12]),
            turn=side * rng.uniform(0.3, 1.5) if rng.random() < 0.5 else 0.0,
            pitch=rng.uniform(-0.8, 0.8) * most if rng.random() < 0.4 else 0.0,
        )
        self.patience = int(rng.integers(8, 40))

    def _turn_away(self, left: float, ahead: float, right: float) -> None:
        forward = 0.5 if ahead > _CLOSE / 2 else 0.0
        self.wish = Wish(
            forward=forward, turn=self._open_side(left, right) * self.rng.uniform(1.5, 2.5)
        )
        self.patience = int(self.rng.integers(10, 24))

    @staticmethod
    def _open_side(left: float, right: float) -> float:
        return 1.0 if right > left else -1.0


def record(level: str, count: int, seed, lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    """Wander through a level from a random place.

    Args:
        count: video frames.
        seed: anything `numpy.random.default_rng` accepts; the same seed gives the same walk. (The
        engine moves animated textures by the computer's clock, so pictures with one may differ
        slightly.)
    Returns: frames uint8 [count,H,W,3] and the camera of each, c2w float64 [count,4,4].
    Raises:
        UserError: the player could not move away from any of the starts.
    """
    rng = np.random.default_rng(seed)
    with Game(level, lens, seed=int(rng.integers(2**31))) as game:
        places = game.places()
        for _ in range(_MOST_TRIES):
            game.warp(*places[rng.integers(len(places))])
            game.act(turn=rng.uniform(-180.0, 180.0), tics=1)
            clip = _wander(game, rng, count)
            if clip is not None:
                return clip
            game.restart()
    raise UserError(
        f"level {level} gave no way to walk after {_MOST_TRIES} starts: choose other --levels"
    )


def _wander(
    game: Game, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """One attempt at a clip; None when the level ended or the player was stuck."""
    wanderer = Wanderer(game, rng)
    frames = []
    c2w = []
    for index in range(-_WARM_UP_FRAMES, count):
        if index >= 0:
            frames.append(game.picture())
            c2w.append(camera_pose(game.variables()))
        wanderer.step()
        if game.over:
            return None
    way = np.linalg.norm(np.diff([pose[:3, 3] for pose in c2w], axis=0), axis=1)
    stuck = way.mean() * FRAMES_PER_LATENT < _LEAST_WAY
    teleported = way.max() > 0.2
    if stuck or teleported:
        return None
    return np.stack(frames), np.stack(c2w)
