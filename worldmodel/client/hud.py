"""What is drawn over the world: key hints, figures, notices, the start and error screens.

Draws only: the window decides what is shown when.
"""

import math
from dataclasses import dataclass

import pygame

from worldmodel.config import as_dict
from worldmodel.worlds.labels import Labels

WHITE = (238, 240, 245)
MUTED = (170, 177, 192)
DIM = (104, 110, 124)
ACCENT = (255, 199, 96)
RED = (240, 76, 76)
GREEN = (120, 214, 150)
PANEL = (12, 15, 22, 176)
CAP = (255, 255, 255, 34)
CAP_DOWN = (255, 199, 96, 255)
NIGHT = (13, 16, 24)

LOOKS = frozenset(("turn_left", "turn_right", "look_up", "look_down"))
MOUSE = "mouse"  # stands for all of LOOKS

# Rows of the help panel: caps (label, action whose key lights it up) and what they do. A name that
# is a field of Labels stands for the world's own label.
HELP = (
    (
        ((("W", "forward"), ("S", "back")), "walk"),
        ((("A", "left"), ("D", "right")), "strafe"),
        ((("<", "turn_left"), (">", "turn_right")), "turn"),
        ((("^", "look_up"), ("v", "look_down")), "look"),
        ((("Space", "rise"), ("Ctrl", "sink")), "rise, sink"),
        ((("Shift", "run"),), "run"),
        ((("click", MOUSE),), "mouse look"),
    ),
    (
        ((("Backspace", "rewind"),), "back"),
        ((("R", ""),), "restart"),
        ((("N", ""),), "next_prompt"),
        ((("M", ""),), "change_prompt"),
        ((("T", ""),), "new_seed"),
    ),
    (
        ((("P", ""),), "pause"),
        ((("F9", ""),), "record"),
        ((("F12", ""),), "picture"),
        ((("F1", ""),), "figures"),
        ((("Esc", ""),), "quit"),
    ),
)


@dataclass(frozen=True)
class Figure:
    """One line of the F1 overlay."""

    name: str
    value: str
    colour: tuple[int, int, int] = WHITE


class Hud:
    """Draw on `screen`; all sizes follow the size of the window.

    labels: what the world calls its actions.
    """

    def __init__(self, screen: pygame.Surface, labels: Labels = Labels()):
        self.screen = screen
        self._labels = as_dict(labels)
        self.unit = min(max(min(screen.get_height() / 576, screen.get_width() / 900), 0.8), 3.0)
        self._fonts: dict[int, pygame.font.Font] = {}

    def px(self, size: float) -> int:
        """Return a length of the 960x576 design in pixels of this window."""
        return max(1, round(size * self.unit))

    def text(self, words: str, size: float, colour=WHITE) -> pygame.Surface:
        """Return one line of text in pygame's own font, as a surface."""
        pixels = self.px(size)
        if pixels not in self._fonts:
            self._fonts[pixels] = pygame.font.Font(None, pixels)
        return self._fonts[pixels].render(words, True, colour)

    def panel(
        self, rect: pygame.Rect, colour=PANEL, radius: float = 8, onto: pygame.Surface | None = None
    ) -> None:
        """Draw a translucent rounded box."""
        box = pygame.Surface(rect.size, pygame.SRCALPHA)
        pygame.draw.rect(box, colour, box.get_rect(), border_radius=self.px(radius))
        (onto or self.screen).blit(box, rect)

    # -------------------- in play

    def help(self, held: frozenset[str], locked: frozenset[str], opacity: float) -> None:
        """Draw the rows of keys at the bottom: held keys are lit, locked ones wear a padlock."""
        locked |= {MOUSE} if locked >= LOOKS else frozenset()
        rows = [[self._entry(caps, label, held, locked) for caps, label in row] for row in HELP]
        gap = self.px(18)
        pad = self.px(12)
        line = self.px(30)
        widths = [sum(entry.get_width() for entry in row) + gap * (len(row) - 1) for row in rows]
        board = pygame.Surface((max(widths) + 2 * pad, len(rows) * line + pad), pygame.SRCALPHA)
        self.panel(board.get_rect(), onto=board)
        for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
            x = (board.get_width() - width) // 2
            for entry in row:
                board.blit(entry, (x, pad // 2 + number * line + (line - entry.get_height()) // 2))
                x += entry.get_width() + gap
        board.set_alpha(round(255 * opacity))
        self.screen.blit(
            board, board.get_rect(midbottom=(self.screen.get_width() // 2, self._bottom(14)))
        )

    def _bottom(self, distance: float) -> int:
        return self.screen.get_height() - self.px(distance)

    def _entry(
        self, caps, label: str, held: frozenset[str], unknown: frozenset[str]
    ) -> pygame.Surface:
        """Return key caps and what they do, side by side."""
        locked = all(motion in unknown for _, motion in caps)
        parts = [self._cap(name, motion in held and not locked, locked) for name, motion in caps]
        words = self.text(self._labels.get(label, label), 20, DIM if locked else MUTED)
        lock = self.px(14) if locked else 0
        space = self.px(4)
        width = sum(part.get_width() + space for part in parts) + space + words.get_width() + lock
        entry = pygame.Surface((width, self.px(24)), pygame.SRCALPHA)
        x = 0
        for part in parts:
            entry.blit(part, (x, 0))
            x += part.get_width() + space
        entry.blit(words, (x + space, (entry.get_height() - words.get_height()) // 2 + self.px(1)))
        if locked:
            self._padlock(entry, width - self.px(5), entry.get_height() // 2)
        return entry

    def _cap(self, name: str, down: bool, locked: bool) -> pygame.Surface:
        colour = NIGHT if down else DIM if locked else WHITE
        words = self.text(name, 20, colour)
        height = self.px(24)
        cap = pygame.Surface(
            (max(height, words.get_width() + self.px(12)), height), pygame.SRCALPHA
        )
        self.panel(cap.get_rect(), CAP_DOWN if down else CAP, 5, cap)
        if name in ARROWS:
            self._arrow(cap, name, cap.get_rect().center, height * 0.24, colour)
        else:
            cap.blit(words, words.get_rect(center=cap.get_rect().center).move(0, self.px(1)))
        return cap

    def _arrow(
        self, onto: pygame.Surface, name: str, centre: tuple[int, int], reach: float, colour
    ) -> None:
        outline = [(centre[0] + reach * x, centre[1] + reach * y) for x, y in ARROWS[name]]
        pygame.draw.polygon(onto, colour, outline)

    def _padlock(self, onto: pygame.Surface, x: int, y: int) -> None:
        body = pygame.Rect(0, 0, self.px(9), self.px(7))
        body.midtop = (x, y - self.px(1))
        pygame.draw.rect(onto, DIM, body, border_radius=self.px(1.5))
        pygame.draw.circle(onto, DIM, (x, y - self.px(1)), self.px(3.5), self.px(1.5), True, True)

    def figures(self, lines: list[Figure]) -> None:
        """Draw the F1 overlay, top left."""
        names = [self.text(line.name, 19, MUTED) for line in lines]
        values = [self.text(line.value, 19, line.colour) for line in lines]
        pad = self.px(12)
        step = self.px(20)
        column = max(name.get_width() for name in names) + self.px(16)
        width = column + max(max(value.get_width() for value in values), self.px(150))
        corner = self.px(14)
        self.panel(
            pygame.Rect(corner, corner, width + 2 * pad, len(lines) * step + 2 * pad - self.px(4))
        )
        for number, (name, value) in enumerate(zip(names, values, strict=True)):
            y = corner + pad + number * step
            self.screen.blit(name, (corner + pad, y))
            self.screen.blit(value, (corner + pad + column, y))

    def recording(self, seconds: float, blink: float) -> None:
        """Draw the red dot and the time, top right."""
        words = self.text(f"REC  {int(seconds) // 60}:{int(seconds) % 60:02d}", 20)
        box = pygame.Rect(0, 0, words.get_width() + self.px(40), self.px(28))
        box.topright = (self.screen.get_width() - self.px(14), self.px(14))
        self.panel(box, radius=14)
        shade = 0.65 + 0.35 * math.cos(blink * math.tau)
        centre = (box.left + self.px(17), box.centery)
        pygame.draw.aacircle(self.screen, [round(part * shade) for part in RED], centre, self.px(6))
        self.screen.blit(
            words, words.get_rect(midleft=(box.left + self.px(29), box.centery + self.px(1)))
        )

    def notices(self, lines: list[tuple[str, float]]) -> None:
        """Draw notices (text, opacity 0..1), top right under the red dot, newest last."""
        y = self.px(50)
        for words, opacity in lines:
            label = self.text(words, 22)
            board = pygame.Surface((label.get_width() + self.px(28), self.px(32)), pygame.SRCALPHA)
            self.panel(board.get_rect(), radius=16, onto=board)
            board.blit(label, label.get_rect(center=board.get_rect().center).move(0, self.px(1)))
            board.set_alpha(round(255 * opacity))
            self.screen.blit(
                board, board.get_rect(topright=(self.screen.get_width() - self.px(14), y))
            )
            y += self.px(38)

    def rewind(self, seconds: float) -> None:
        """Draw two arrows and the seconds that are left to go back, above the rows of keys."""
        left = f"{seconds:.1f} s left" if seconds > 0 else "as far as it goes"
        words = self.text(f"back: {left}", 24)
        reach = self.px(7)
        box = pygame.Rect(0, 0, words.get_width() + 4 * reach + self.px(40), self.px(36))
        box.midbottom = (self.screen.get_width() // 2, self._bottom(130))
        self.panel(box, radius=18)
        for number in (1, 3):
            self._arrow(
                self.screen,
                "<",
                (box.left + number * reach + self.px(12), box.centery),
                reach,
                ACCENT,
            )
        right = box.right - self.px(16)
        self.screen.blit(words, words.get_rect(midright=(right, box.centery + self.px(1))))

    def state(self, words: str) -> None:
        """Draw what the picture is, top left: at rest, remembered, imagined."""
        words = self.text(words, 20, MUTED)
        box = pygame.Rect(0, 0, words.get_width() + self.px(24), self.px(28))
        box.topleft = (self.px(14), self.px(14))
        self.panel(box, radius=14)
        self.screen.blit(words, words.get_rect(center=box.center))

    def paused(self) -> None:
        """Draw a veil and two bars."""
        self.panel(self.screen.get_rect(), (8, 10, 16, 120), 0)
        centre = self.screen.get_rect().center
        for side in (-1, 1):
            bar = pygame.Rect(0, 0, self.px(14), self.px(52))
            bar.center = (centre[0] + side * self.px(14), centre[1] - self.px(20))
            pygame.draw.rect(self.screen, WHITE, bar, border_radius=self.px(4))
        words = self.text("paused   -   P resumes", 24, MUTED)
        self.screen.blit(words, words.get_rect(center=(centre[0], centre[1] + self.px(34))))

    # -------------------- other screens

    def start(self, world: str, stage: str, progress: float, seconds: float) -> None:
        """Draw the start screen over the backdrop; progress: 0..1."""
        self.panel(self.screen.get_rect(), (*NIGHT, 150), 0)
        x, y = self.screen.get_rect().center
        title = self.text(world, 76)
        self.screen.blit(title, title.get_rect(center=(x, y - self.px(70))))
        widest = self.text("dreaming...", 34, ACCENT)
        words = self.text("dreaming" + "." * (1 + int(seconds * 2.5) % 3), 34, ACCENT)
        self.screen.blit(
            words, words.get_rect(midleft=(x - widest.get_width() // 2, y - self.px(16)))
        )
        groove = pygame.Rect(0, 0, self.px(340), self.px(6))
        groove.center = (x, y + self.px(24))
        self.panel(groove, (255, 255, 255, 40), 3)
        bar = pygame.Rect(
            groove.topleft, (max(groove.height, round(groove.width * progress)), groove.height)
        )
        self.panel(bar, ACCENT, 3)
        label = self.text(stage, 20, MUTED)
        self.screen.blit(label, label.get_rect(center=(x, y + self.px(48))))

    def error(self, sentence: str, closing: float) -> None:
        """Draw one sentence, wrapped, and the seconds until the window closes by itself."""
        self.panel(self.screen.get_rect(), (*NIGHT, 215), 0)
        x, y = self.screen.get_rect().center
        title = self.text("This did not work", 40, RED)
        lines = [
            self.text(line, 24) for line in self._wrap(sentence, 24, self.screen.get_width() * 0.8)
        ]
        y -= self.px(28) * len(lines) // 2
        self.screen.blit(title, title.get_rect(center=(x, y - self.px(44))))
        for label in lines:
            self.screen.blit(label, label.get_rect(center=(x, y)))
            y += self.px(28)
        alone = f" (by itself in {math.ceil(max(closing, 0))} s)" if math.isfinite(closing) else ""
        words = self.text(f"Esc closes the window{alone}", 20, MUTED)
        self.screen.blit(words, words.get_rect(center=(x, y + self.px(24))))

    def _wrap(self, sentence: str, size: float, width: float) -> list[str]:
        """Break a sentence into lines of at most `width` pixels, at spaces if possible."""
        lines = [""]
        for word in sentence.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.text(longer, size).get_width() <= width:
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:  # a path may be longer than a line
                if self.text(lines[-1] + letter, size).get_width() > width:
                    lines.append("")
                lines[-1] += letter
        return lines


# outlines of the arrow caps, in units of their reach
ARROWS = {
    "<": ((-1.1, 0), (0.7, -1), (0.7, 1)),
    ">": ((1.1, 0), (-0.7, -1), (-0.7, 1)),
    "^": ((0, -1.1), (-1, 0.7), (1, 0.7)),
    "v": ((0, 1.1), (-1, -0.7), (1, -0.7)),
}
