"""`worldmodel play`: walk in a window where there is a display, else into a film."""

import argparse
import os
from functools import partial

from worldmodel.cli import print_progress
from worldmodel.client.options import (
    PlayOptions,
    add_arguments,
    first_picture,
    read_options,
    world_labels,
)

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Play, and return the exit status."""
    # torch and pygame read these when they are imported, which happens below
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # no spinning while the window draws
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    options = read_options(args)
    if options.verify:
        from worldmodel.client.headless import verify_recording

        return verify_recording(options)
    if not options.headless:
        from worldmodel.client.window import open_display

        if open_display():
            return _in_window(options)
        print_progress(
            "There is no display here, so nobody can steer: walking a scripted path into a film."
        )
    from worldmodel.client.headless import walk

    return walk(options)


def _in_window(options: PlayOptions) -> int:
    """The window comes first; torch and the world are loaded behind it."""
    from worldmodel.client.loop import Loop, LoopOptions
    from worldmodel.client.paths import written_path
    from worldmodel.client.scenes import Scene, open_scenes
    from worldmodel.client.window import Window, WindowOptions

    scene = Scene(options.prompt, options.image, options.seed, options.place)
    path = partial(written_path, options.trajectory) if options.trajectory else None
    taken = {} if options.record is None else {"recordings": options.record.parent}
    loop_options = LoopOptions(scene, path, options.replay, options.record, **taken)
    loop = Loop(partial(open_scenes, options), loop_options)
    window = WindowOptions(
        title=options.world.resolve().name,
        backdrop=first_picture(options),
        labels=world_labels(options.world),
        screenshots=loop_options.recordings,
    )
    return Window(loop, window).run()
