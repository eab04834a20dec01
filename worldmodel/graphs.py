"""Passes over a full window, recorded once as CUDA graphs and played from then on: one launch
instead of thousands.

A recording does the same work on the same memory. So whatever differs between two passes of a kind
is copied into tensors of its own before
it is played: latents, what the noise level makes of every block, positions and cameras, the prompt,
and the places in the ring that the pass writes to. The ring itself stays where it is (`kv_cache`),
and once it is full attention reads all of it, always.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from worldmodel.errors import first_line
from worldmodel.models.kv_cache import CacheView, Places
from worldmodel.models.transformer import (
    CausalWanTransformer,
    FramePositions,
    TextContext,
    TimeContext,
)

Result = tuple[
    Tensor | None, dict[int, tuple[Tensor, Tensor]]
]  # velocity, and as `CacheView.fresh`
Recorder = Callable[
    [Callable[[], Result]], tuple[Result, Callable[[], None]]
]  # work in fixed memory -> its result, what renews that


class CudaRecorder:
    """Records work as CUDA graphs. Those of one recorder share their memory: none may be played
    while another one is.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Does `work` twice, so that libraries set themselves up, and records it; the host waits
        for the device meanwhile.
        """
        playing = torch.cuda.current_stream(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(playing)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    work()
        finally:
            playing.wait_stream(self._stream)
        # The outer context leaves the stream, which the inner one does not when a recording fails;
        # other threads may go on meanwhile.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, graph.replay


@dataclass
class Graphs:
    """How the rollouts of a world are recorded, each by itself; shared by all of them."""

    recorder: Callable[
        [], Recorder
    ]  # makes one; the work that it is given may be done any number of times
    code: Callable[
        [], object
        # what the blocks run: recordings are good while it stays the same; None = all passes are
        # plain as yet
    ]
    fault: str = ""  # why nothing is recorded or played any more


@dataclass(frozen=True)
class PassInputs:
    """What differs between two passes of a kind, the prompt apart."""

    latents: Tensor
    time: TimeContext
    positions: FramePositions
    places: Tensor  # `[M]` in the ring
    later: (
        Tensor | None
    )  # the same of the second chunk, where the clean pass of the one before is merged in
    sinks: tuple[Tensor, ...]  # as `CacheView.sinks`


@dataclass(frozen=True)
class Recording:
    """A pass that can be played: what to write over before, and what it leaves, until the next one
    is played.
    """

    inputs: list[Tensor]
    velocity: Tensor | None
    fresh: dict[int, tuple[Tensor, Tensor]]  # for `CacheView.fresh`
    play: Callable[[], None]


class RecordedPasses:
    """The cached passes of one rollout: called as the model is in that mode, with the same result,
    which is good until the next call.

    A kind of pass is recorded when it comes for the second time with a full window: the first time
    the compiler of blocks gets to know it. Until then, with gradients, and where nothing can be
    recorded (`Graphs.fault` says why) the model itself runs. What is left in `CacheView.fresh` is
    written over by the next call too; noisy passes leave nothing there, nobody remembers them.
    """

    def __init__(self, model: CausalWanTransformer, graphs: Graphs):
        self._model = model
        self._graphs = graphs
        self._forget()

    def _forget(self, made_for: tuple | None = None, ring: dict | None = None) -> None:
        """Gives up all recordings; the next ones are made for this code, length of a prompt and
        ring.
        """
        self._made_for = made_for
        self._ring = ring
        self._record: Recorder | None = None
        self._recordings: dict[tuple, Recording | None] = {}  # None: came once
        self._text: TextContext | None = None  # what recordings read
        self._prompt: TextContext | None = None  # what stands in there

    def __call__(
        self,
        latents: Tensor,
        sigma: Tensor | TimeContext,
        text: TextContext,
        projection: Tensor,
        *,
        mode: str,
        view: CacheView,
        velocity: bool = True,
    ) -> Tensor | None:
        recording = None
        if not self._graphs.fault and not torch.is_grad_enabled() and view.full:
            kind = velocity, latents.shape, view.pending, len(view.sinks)
            if self._came_before(kind, text, view):
                inputs = self._inputs(latents, sigma, projection, view)
                recording = self._recordings[kind] or self._made(
                    kind, inputs, text, projection, view
                )
        if recording is None:
            return self._model(
                latents, sigma, text, projection, mode=mode, view=view, velocity=velocity
            )
        self._tell(text)
        _fill(recording.inputs, _tensors(inputs))
        recording.play()
        view.fresh.update(recording.fresh)
        return recording.velocity

    def _came_before(self, kind: tuple, text: TextContext, view: CacheView) -> bool:
        """Whether this kind of pass has been met since the blocks, the prompt's length and the ring
        are what they are.
        """
        code = self._graphs.code()
        ring = view.window.layers
        if code is None:
            return False
        now = code, text.layers[0][0].shape
        if now != self._made_for or ring is not self._ring:
            self._forget(now, ring)
        if kind in self._recordings:
            return True
        self._recordings[kind] = None
        return False

    def _inputs(
        self, latents: Tensor, sigma: Tensor | TimeContext, projection: Tensor, view: CacheView
    ) -> PassInputs:
        _, patch_h, patch_w = self._model.config.patch_size
        grid = (latents.shape[3] // patch_h, latents.shape[4] // patch_w)
        dtype = self._model.patch_embedding.weight.dtype
        return PassInputs(
            latents,
            self._model.encode_time(sigma) if isinstance(sigma, Tensor) else sigma,
            self._model.positions(latents.shape[2], grid, projection, "cached", view, dtype),
            view.places.numbers(latents.device),
            view.later.numbers(latents.device) if view.pending else None,
            tuple(view.sinks),
        )

    def _made(
        self,
        kind: tuple,
        inputs: PassInputs,
        text: TextContext,
        projection: Tensor,
        view: CacheView,
    ) -> Recording | None:
        """A new recording; None, and never again one, where that fails: memory can be full, a
        kernel refuse to be recorded.
        """
        try:
            self._record = self._record or self._graphs.recorder()
            self._tell(text)
            self._recordings[kind] = self._recorded(inputs, projection, view, velocity=kind[0])
        except Exception as error:
            self._graphs.fault = (
                f"Passes cannot be recorded as CUDA graphs here ({first_line(error)}); they run "
                "as they are."
            )
            self._forget()
        return self._recordings.get(kind)

    def _recorded(
        self, inputs: PassInputs, projection: Tensor, view: CacheView, velocity: bool
    ) -> Recording:
        """Records a pass. What is done meanwhile changes nothing in the ring but what the pass
        itself writes before it reads.
        """
        layers = view.window.layers
        size = view.window.size
        sinks = tuple(
            layers[i][0][:, : keys.shape[1], : keys.shape[2]] for i, keys in enumerate(inputs.sinks)
        )
        fixed = _changed(inputs, _room)
        _fill(
            _tensors(fixed),
            _tensors(replace(inputs, later=inputs.places if view.pending else None, sinks=sinks)),
        )
        still = replace(
            view,
            places=Places(fixed.places, size),
            later=Places(fixed.later, size) if view.pending else None,
            sinks=list(fixed.sinks),
            tables=(projection, fixed.positions),
        )
        model = self._model
        text = self._text

        def work() -> Result:
            seen = replace(still, fresh={})
            return model(
                fixed.latents,
                fixed.time,
                text,
                projection,
                mode="cached",
                view=seen,
                velocity=velocity,
            ), seen.fresh

        (out, fresh), play = self._record(work)
        return Recording(_tensors(fixed), out, fresh if view.pending or not velocity else {}, play)

    def _tell(self, text: TextContext) -> None:
        """Lets recordings read this prompt."""
        if self._text is None:
            self._text = _changed(text, _room)
        if text is not self._prompt:
            _fill(_tensors(self._text), _tensors(text))
            self._prompt = text


def _changed(value, change: Callable[[Tensor], Tensor]):
    """The same nest of tuples and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    if is_dataclass(value):
        return replace(
            value,
            **{part.name: _changed(getattr(value, part.name), change) for part in fields(value)},
        )
    return value


def _tensors(value) -> list[Tensor]:
    """All tensors of a nest, always in the same order."""
    found = []
    _changed(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _room(tensor: Tensor) -> Tensor:
    """Memory for a tensor of this type and layout (compiled code is made for both)."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _fill(rooms: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies tensors to their rooms, those of one type together: they are hundreds, and small."""
    for dtype in {room.dtype for room in rooms}:
        pairs = [
            (room, tensor)
            for room, tensor in zip(rooms, tensors, strict=True)
            if room.dtype == dtype
        ]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
