"""A walk through a world: poses in, frames out; it can be rewound, forked, saved and continued
exactly.
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from worldmodel.camera import check_poses, invert
from worldmodel.chunks import FrameChunk, StreamStates, draw_noise
from worldmodel.device import cores, float64_device, is_out_of_memory, to_device_async
from worldmodel.errors import UserError
from worldmodel.files import replacing_folder
from worldmodel.images import to_frames, to_unit_range
from worldmodel.models.streaming import StreamState
from worldmodel.overlap import as_here, second_thread, to_pinned_memory
from worldmodel.rollout import RECALL, Rollout, RolloutConfig, UncommittedChunk
from worldmodel.saved_session import (
    FILES,
    FORMAT,
    PENDING,
    cache_tensors,
    place_values,
    read_tensors,
    read_values,
    restore_cache,
    saved_place,
)
from worldmodel.worlds.place import Place
from worldmodel.worlds.world import World


class Session:
    """One player's walk through a world.

    world: an opened bundle. prompt: a stored name, or any text in a world with a text encoder; None
    = the place's, else the world's default.
    image: what latent 0 shows: a start image's name, a picture file or uint8 [H,W,3] (resized and
    cropped to fit); None = the place's start picture, or the first chunk is generated too.
    seed: 0 <= seed < 2^63; same seed, poses and prompt = same frames, whatever the timing and
    however often rewound.
    steps: denoising steps of later chunks, None = the world's. history: latents that `rewind` can
    take back at most; None = the world's, as far as memory allows.
    rest: whether `at_rest` follows the world's rule; False = never at rest.
    place: the place of the world whose remembered frames the network sees, and in whose
    coordinates the identity is `place.start`; None = everything is imagined.
    c2w: see `reset`.
    """

    def __init__(
        self,
        world: World,
        prompt: str | None = None,
        image=None,
        seed: int = 0,
        steps: int | None = None,
        history: int | None = None,
        c2w=None,
        rest: bool = True,
        place: Place | None = None,
    ):
        self._open(world, steps, history, rest, place)
        self.reset(seed, prompt, image, c2w)

    def _open(
        self,
        world: World,
        steps: int | None,
        history: int | None,
        rest: bool = True,
        place: Place | None = None,
    ) -> None:
        self.world = world
        self.place = place
        self.steps = steps
        self.history = world.history if history is None else history
        self._rest = rest and world.config.still
        self._decoder_stream = None
        if world.device.type == "cuda":
            self._decoder_stream = torch.cuda.Stream(world.device, priority=-1)
        intrinsics = torch.tensor([world.config.intrinsics], dtype=torch.float64)
        self._intrinsics = to_device_async(intrinsics, float64_device(world.device))
        self.first: FrameChunk | None = None  # what `reset` returned; None in a loaded session

    @torch.no_grad()
    def reset(self, seed: int = 0, prompt: str | None = None, image=None, c2w=None) -> FrameChunk:
        """Starts over, with the arguments of the constructor, and returns the first chunk; when an
        argument is wrong, the session stays as it was.

        With a start image the first chunk is its one frame, whose pose is the identity. Otherwise
        it is generated as seen from `c2w`, [4,4] or [chunk,4,4]; None = from the
        identity. In a place with a start picture `image` None stands for that, unless `c2w` is
        given.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}.")
        if prompt is None:
            prompt = (self.place and self.place.prompt) or self.world.config.prompts.default
        if image is None and c2w is None and self.place:
            image = self.place.picture
        embedding = self.world.prompt_encoder.embed(prompt)
        picture = None if image is None else self.world.picture(image)
        chunk = self.world.rollout(self.steps, self.history).chunk
        if picture is not None and c2w is not None:
            raise ValueError("a start image has the identity as its pose: leave c2w out")
        poses = np.eye(4) if c2w is None else c2w
        if picture is None and np.ndim(poses) == 2:
            poses = np.stack([poses] * chunk)
        if picture is None:
            poses = _checked_poses(poses, chunk, "Session.reset")
        else:
            poses = np.eye(4)[None]
        self._begin(seed, prompt, picture, embedding)
        if picture is None:
            self.first = self._generate(poses)
        else:
            self.first = self._show_picture(picture, poses)
        compiled = self.world.engine.compiled
        if compiled and compiled.before_play:
            ahead = self.fork()
            ahead._generate(np.stack([poses[-1]] * chunk))
            ahead.commit_pending()
        return self.first

    @property
    def frames(self) -> int:
        """Latents so far; the index of the next one."""
        return len(self._poses)

    @property
    def rewindable(self) -> int:
        """Latents that `rewind` can take back now."""
        return self.frames - next(iter(self._states))

    @property
    def poses(self) -> np.ndarray:
        """c2w [F,4,4] of all latents so far, in the session's frame."""
        return np.stack(self._poses) if self._poses else np.zeros((0, 4, 4))

    @property
    def chunk(self) -> int:
        """Latents that a `step` generates; as many poses are needed."""
        return self.config.chunk

    @property
    def config(self) -> RolloutConfig:
        """How the world is generated in this session."""
        return self.rollout.config

    @torch.no_grad()
    def step(self, c2w, early: Callable[[np.ndarray], object] | None = None) -> FrameChunk:
        """Generates the next chunk as seen from `c2w` [4,4] (one latent) or [chunk,4,4], absolute
        in the session's frame.

        `early` is called with the first frames, uint8 [n,H,W,3], as soon as they are decoded. When
        the device's memory is full, the world goes down a tier (`engine/engine.py`), `notice` of
        the result reports it, and the chunk is generated in that tier; MemoryError when there is no
        smaller one. The same goes for `reset` and `set_prompt`, whose notice comes with the next
        chunk.
        """
        poses = _checked_poses(c2w, self.chunk, "Session.step")
        self._notice = self.world.engine.pop_warnings() or self._notice
        return self._generate(poses, early)

    def at_rest(self, c2w) -> bool:
        """Whether a `step` to `c2w` has nothing new to show: the world is still, every pose is
        exactly the last latent's, and the prompt has not changed since.

        The caller then keeps the last picture instead of calling `step`, which always generates.
        A loaded session is not at rest before its first step.
        """
        return (
            self._rest
            and self.frames > self._prompt_since
            and bool(np.all(np.asarray(c2w) == self._poses[-1]))
        )

    def commit_pending(self) -> None:
        """Commits the last chunk to memory: worth calling once it is shown; otherwise the next step
        does it first.
        """
        try:
            self.rollout.commit_pending()
        except RuntimeError as error:  # the next step meets it again, and makes room
            if not is_out_of_memory(error):
                raise

    @torch.no_grad()
    def set_prompt(self, prompt: str) -> None:
        """Sets the prompt (as in the constructor) from the next chunk on."""
        embedding = self.world.prompt_encoder.embed(prompt)
        self._in_memory(lambda: self.rollout.set_text(embedding[None]))
        if prompt != self.prompt:
            self._prompt_since = self.frames
        self.prompt = prompt

    def rewind(self, latents: int) -> None:
        """Takes back the last `latents` latents (whole chunks). Raises UserError, and nothing
        changes, when that is too many.
        """
        target = self.frames - latents
        if latents < 0 or target not in self._states:
            raise UserError(
                f"Cannot take back {latents} latents: whole chunks of {self.chunk}, at most "
                f"{self.rewindable} latents now (the last {self.config.history} are kept)."
            )
        self.rollout.rewind(target)
        self._restore_streams(self._states[target])
        for index in [index for index in self._states if index > target]:
            del self._states[index]
        del self._poses[target:]
        self._prompt_since = min(self._prompt_since, target)

    def fork(self) -> "Session":
        """An independent session with the same past; with the same inputs it has the same
        future.
        """
        twin = copy.copy(self)
        twin.rollout = self.rollout.fork()
        twin._decoder = self.world.autoencoder.streaming_decoder()
        twin._conditions = self.world.conditions(self.place)
        twin._restore_streams(self._stream_states())
        twin._states = self._states.copy()
        twin._poses = list(self._poses)
        return twin

    # -------------------- save, load

    def save(self, path) -> None:
        """Writes the folder `path` from which `load` continues exactly. What `rewind` could
        take back is not kept.
        """
        path = Path(path)
        if path.exists() and not (path / FILES[0]).is_file():
            raise UserError(f"{path} exists and is not a saved session; choose another name.")
        tensors, decoder = self._state_tensors()
        values = {
            "format": FORMAT,
            "world": self.world.config.name,
            "fingerprint": self.world.fingerprint,
            "dtype": str(self.world.dtype),
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "history": self.history,
            "frames": self.frames,
            "decoder": decoder,
            **place_values(self.world, self.place),
            **{name: getattr(self.world.config.rollout, name) for name in RECALL},
        }
        with replacing_folder(path) as folder:
            save_file(tensors, folder / FILES[1])
            text = yaml.safe_dump(values, sort_keys=False)
            (folder / FILES[0]).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path, world: World) -> "Session":
        """Continues a saved session. Raises UserError when the save is damaged or belongs to other
        weights or number types.
        """
        path = Path(path)
        try:
            values = read_values(path / FILES[0])
            tensors = read_tensors(path / FILES[1], values, float64_device(world.device))
        except (OSError, SafetensorError, UnicodeError, UserError) as error:
            raise UserError(f"{path} is not a complete saved session ({error}).") from None
        for key, ours in (("fingerprint", world.fingerprints), ("dtype", (str(world.dtype),))):
            if values[key] not in ours:
                raise UserError(
                    f"{path} was saved in the world {values['world']!r} with {key} {values[key]}, "
                    f"the opened world {world.config.name!r} has {ours[0]}; open the same world in "
                    "the same way."
                )
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 and not name.startswith("stored."):
                tensors[name] = tensor.to(world.device)
        world = world.with_recall({"recall": 0, **values})  # an older save knew none
        session = cls.__new__(cls)
        place = saved_place(path, values, world)
        session._open(world, values["steps"], values["history"], place=place)
        embedding = world.prompt_encoder.embed(values["prompt"])
        with torch.no_grad():
            session._begin(values["seed"], values["prompt"], None, embedding)
        session._restore(tensors, values)
        return session

    def _state_tensors(self) -> tuple[dict[str, Tensor], dict]:
        """Everything the future depends on, and which decoder memories exist."""
        tensors = {"poses": torch.from_numpy(self.poses)}
        if self.image is not None:
            tensors["image"] = torch.from_numpy(self.image)
        tensors |= cache_tensors(self.rollout.cache)
        if self.rollout.pending is not None:
            for position, name in enumerate(PENDING):
                tensors[f"pending.{position}"] = getattr(self.rollout.pending, name)
            if self.rollout.pending.condition is not None:
                tensors["pending.condition"] = self.rollout.pending.condition
        state = self._decoder.state()
        tensors |= state.named("decoder")
        if self._conditions:
            tensors |= self._conditions.state()[0].named("encoder")
        # clones: views of one storage cannot be stored as they are
        plain = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        return plain, {"started": state.started, "memories": len(state.memories)}

    def _restore(self, tensors: dict[str, Tensor], values: dict) -> None:
        committed = values["frames"]
        if "pending.0" in tensors:
            pending = UncommittedChunk(
                *(tensors[f"pending.{i}"] for i in range(len(PENDING))),
                condition=tensors.get("pending.condition"),
            )
            self.rollout.pending = pending
            committed -= pending.latents.shape[2]
        restore_cache(self.rollout.cache, tensors, committed)
        self.image = tensors["image"].cpu().numpy() if "image" in tensors else None
        self._poses = list(tensors["poses"].cpu().numpy())
        self._prompt_since = self.frames
        memories = tuple(tensors.get(f"decoder.{i}") for i in range(values["decoder"]["memories"]))
        self._decoder.restore(StreamState(values["decoder"]["started"], memories))
        if self._conditions and self._poses:
            count = len(self._conditions.state()[0].memories)
            memories = tuple(tensors.get(f"encoder.{i}") for i in range(count))
            pose = self.place.start @ self._poses[-1]
            self._conditions.restore((StreamState(True, memories), pose))
        self._states.clear()
        self._keep_state()

    # -------------------- inside

    def _begin(self, seed: int, prompt: str, picture: np.ndarray | None, embedding: Tensor) -> None:
        """Forgets everything and makes a rollout without a past."""
        self.seed = seed
        self.prompt = prompt
        self._prompt_since = 0  # latents that there were when the prompt last changed
        self.image = picture
        self._decoder = self.world.autoencoder.streaming_decoder()
        self._conditions = self.world.conditions(self.place)
        # after so many latents
        self._states: OrderedDict[int, StreamStates] = OrderedDict()
        self._poses: list[np.ndarray] = []
        self._notice = ""  # for the next chunk
        self.rollout: Rollout | None = None  # frees the old cache before a new one is made
        self.rollout = self._in_memory(partial(self._new_rollout, embedding[None]))
        if picture is None:
            self._keep_state()

    def _new_rollout(self, text: Tensor) -> Rollout:
        rows, columns = self.world.latent_size
        return Rollout(
            self.world.transformer,
            text,
            self.world.rollout(self.steps, self.history),
            height=rows,
            width=columns,
            device=self.world.device,
            unconditional=self.world.prompts.unconditional,
        )

    def _in_memory(self, work: Callable, **first):
        """What `work` returns. When the device's memory is full, the world goes down a tier and
        `work` is called again, without the arguments in `first`.

        `work` must find the rollout through the session: one that it held would keep the old cache
        alive.
        """
        full = False
        while True:
            try:
                # not in the `except`: the error's traceback holds the pass that failed, and its
                # memory
                if full:
                    self._step_down()
                return work(**({} if full else first))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            full = True

    def _step_down(self) -> None:
        """Continue with the same past in less memory, without a ring until the next pass makes
        one.
        """
        self._notice = self.world.engine.step_down()
        if self.frames:
            self._decoder.restore(self._states[self.frames].decoder)
        else:
            self._decoder.reset()
        if self.rollout is not None:
            self.rollout = self.rollout.fork(self.world.rollout(self.steps, self.history))
        self._drop_old_states()
        # in the memory that the old ring has left
        self.world.engine.apply_tier(self.world.transformer)

    def _generate(
        self, poses: np.ndarray, early: Callable[[np.ndarray], object] | None = None
    ) -> FrameChunk:
        condition = self._condition(poses)
        latents = self._in_memory(partial(self._next_latents, poses, condition))
        timings = dict(self.rollout.timings)
        return self._in_memory(partial(self._decoded, latents, poses, timings), early=early)

    def _next_latents(self, poses: np.ndarray, condition: Tensor | None) -> Tensor:
        """Clean latents of the next chunk."""
        noise, renoise = self._noise(self.frames)
        return self.rollout.step(
            self._viewmats(poses),
            self._intrinsics,
            condition=condition,
            noise=noise,
            renoise=renoise,
            defer_commit=True,
        )

    def _show_picture(self, picture: np.ndarray, pose: np.ndarray) -> FrameChunk:
        started = time.perf_counter()
        latents = self._in_memory(partial(self._encoded, picture))
        condition = self._condition(pose)
        self.rollout.defer_commit(latents, self._viewmats(pose), self._intrinsics, condition)
        self._in_memory(lambda: self.rollout.commit_pending())
        timings = {"network": 0.0, "clean": (time.perf_counter() - started) * 1e3}
        return self._in_memory(partial(self._decoded, latents, pose, timings))

    def _encoded(self, picture: np.ndarray) -> Tensor:
        """A picture, uint8 [H,W,3], as latent 0."""
        pixels = to_device_async(torch.from_numpy(picture), self.world.device)
        video = to_unit_range(pixels.permute(2, 0, 1)[None, :, None])
        return self.world.autoencoder.streaming_encoder().step(video).float()

    def _decoded(
        self,
        latents: Tensor,
        poses: np.ndarray,
        timings: dict[str, float],
        early: Callable[[np.ndarray], object] | None = None,
    ) -> FrameChunk:
        """Decodes a generated chunk and counts it as shown."""
        started = time.perf_counter()
        pieces = []
        for frames in self._pictures(latents):
            pieces.append(frames)
            if early is not None and len(pieces) == 1:
                early(frames)
        timings["decode"] = (time.perf_counter() - started) * 1e3
        index = self.frames
        notice = self._notice
        self._notice = ""
        self._poses.extend(poses)
        self._keep_state()
        return FrameChunk(np.concatenate(pieces), index, len(poses), self.prompt, timings, notice)

    def _pictures(self, latents: Tensor) -> Iterator[np.ndarray]:
        """The frames of a chunk, uint8 [n,H,W,3] at a time, as the decoder makes them.

        The chunk's clean pass runs at the same time where there is room: on CUDA the decoder has a
        stream of its own, and its copies go to pinned memory; on a CPU with as many cores left over
        as torch uses, the clean pass has a thread of its own.
        """
        if self._decoder_stream is None:
            with self._committing():
                yield from (to_frames(video)[0] for video in self._decoder.frames(latents))
            return
        self._decoder_stream.wait_stream(torch.cuda.current_stream(self.world.device))
        with torch.cuda.stream(self._decoder_stream):
            latents.record_stream(self._decoder_stream)
            copies = [to_pinned_memory(video) for video in self._decoder.frames(latents)]
        self.commit_pending()
        for pixels, arrived in copies:
            arrived.synchronize()
            yield pixels.numpy()[0]

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """Commits the pending chunk while the block runs, on a CPU with cores to spare; elsewhere
        that is left to the caller of `step`.
        """
        threads = torch.get_num_threads()
        if self.world.device.type != "cpu" or 2 * threads > cores():
            yield
            return
        committed = second_thread().submit(as_here(self.commit_pending, threads))
        try:
            yield
        finally:
            committed.result()

    def _keep_state(self) -> None:
        self._states[self.frames] = self._stream_states()
        self._drop_old_states()

    def _stream_states(self) -> StreamStates:
        conditions = self._conditions.state() if self._conditions else None
        return StreamStates(self._decoder.state(), conditions)

    def _restore_streams(self, states: StreamStates) -> None:
        self._decoder.restore(states.decoder)
        if self._conditions:
            self._conditions.restore(states.conditions)

    def _condition(self, poses: np.ndarray) -> Tensor | None:
        """What is known of the next chunk; the stream goes on."""
        if self._conditions is None:
            return None
        return self._conditions.step(self.place.start @ poses)

    def _drop_old_states(self) -> None:
        while self._states and next(iter(self._states)) < self.frames - self.config.history:
            self._states.popitem(last=False)

    def _viewmats(self, c2w: np.ndarray) -> Tensor:
        """c2w [F,4,4] -> w2c [1,F,4,4] float64 on `device.float64_device`."""
        viewmats = torch.from_numpy(invert(c2w))[None]
        return to_device_async(viewmats, float64_device(self.world.device))

    def _noise(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Start noise and re-noise of the chunk at latent `index`."""
        steps = len(self.config.first_steps if index == 0 else self.config.steps)
        shape = (steps, self.world.transformer.config.out_channels, *self.world.latent_size)
        noise = draw_noise(self.seed, range(index, index + self.chunk), shape)
        first, *later = to_device_async(noise, self.world.device)
        return first, later


def _checked_poses(c2w, chunk: int, source: str) -> np.ndarray:
    poses = check_poses(c2w, chunk, source)
    if len(poses) != chunk:
        raise UserError(
            f"{source}: {chunk} poses are needed (the world's chunk), got {len(poses)}."
        )
    return poses
