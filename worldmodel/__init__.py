"""Walk through worlds that neural networks generate.

`World` is an opened world, `Session` a walk through it (camera poses in, frames out), `Recorder`
keeps one on disk. They are imported on first use: importing this package imports neither torch nor
pygame.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worldmodel.recording import Recorder
    from worldmodel.session import Session
    from worldmodel.worlds.world import World

__all__ = ["Recorder", "Session", "World", "__version__"]

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name == "World":
        from worldmodel.worlds.world import World

        return World
    if name == "Session":
        from worldmodel.session import Session

        return Session
    if name == "Recorder":
        from worldmodel.recording import Recorder

        return Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
