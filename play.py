"""Walk through a dreamed world: `python play.py`, or `python play.py --help`."""

import os
import sys
from functools import partial


def main(arguments: list[str]) -> int:
    """Reads the command line, plays, returns the exit status: 0 well, 1 failed, 2 asked for what
    cannot be.
    """
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # torch's threads must not spin while the window draws
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    from worldmodel.cli import run

    return run("play.py", partial(play, arguments))


def play(arguments: list[str]) -> int:
    """In a window where there is a display, else into a film."""
    from worldmodel.cli import print_progress
    from worldmodel.client.options import parse_options

    options = parse_options(arguments)
    if options.verify or options.headless:
        return without_window(options)
    from worldmodel.client.window import open_display

    if open_display():
        return in_window(options)
    print_progress(
        "There is no display here, so nobody can steer: walking a scripted path into a film."
    )
    return without_window(options)


def in_window(options) -> int:
    """The window comes first; torch and the world are loaded behind it."""
    from worldmodel.client.loop import Loop, LoopOptions
    from worldmodel.client.options import image_files, world_labels
    from worldmodel.client.paths import written_path
    from worldmodel.client.scenes import Scene, open_scenes
    from worldmodel.client.window import Window, WindowOptions

    scene = Scene(options.prompt, options.image, options.seed)
    path = partial(written_path, options.trajectory) if options.trajectory else None
    taken = {} if options.record is None else {"recordings": options.record.parent}
    loop_options = LoopOptions(scene, path, options.replay, options.record, **taken)
    loop = Loop(partial(open_scenes, options), loop_options)
    backdrop = next(
        (options.world / "images" / name for name in image_files(options.world, options.prompt)),
        None,
    )
    window = WindowOptions(
        title=options.world.resolve().name,
        backdrop=backdrop,
        labels=world_labels(options.world),
        screenshots=loop_options.recordings,
    )
    return Window(loop, window).run()


def without_window(options) -> int:
    """A walk into a film, or the check of a recording."""
    from worldmodel.client.headless import verify_recording, walk

    return verify_recording(options) if options.verify else walk(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
