"""What is drawn over the world: key hints, figures, receipts, the start and error screens. Draws,
decides nothing.
"""

import math
from dataclasses import dataclass

import pygame

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

# rows of the help panel: caps (label, motion that lights it up) and what they do
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
        ((("R", ""),), "restart"),
        ((("N", ""),), "next mood"),
        ((("M", ""),), "mood here"),
        ((("T", ""),), "town"),
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
    """Draws on `screen`; every size follows the window's height."""

    def __init__(self, screen: pygame.Surface):
        self.screen = screen
        self.unit = min(max(min(screen.get_height() / 576, screen.get_width() / 900), 0.8), 3.0)
        self._fonts: dict[int, pygame.font.Font] = {}

    def px(self, size: float) -> int:
        """A length of the 960x576 design -> pixels of this window."""
        return max(1, round(size * self.unit))

    def text(self, words: str, size: float, colour=WHITE) -> pygame.Surface:
        """One line of text in pygame's own font, as a surface."""
        pixels = self.px(size)
        if pixels not in self._fonts:
            self._fonts[pixels] = pygame.font.Font(None, pixels)
        return self._fonts[pixels].render(words, True, colour)

    def panel(
        self, rect: pygame.Rect, colour=PANEL, radius: float = 8, onto: pygame.Surface | None = None
    ) -> None:
        """A translucent rounded box."""
        box = pygame.Surface(rect.size, pygame.SRCALPHA)
        pygame.draw.rect(box, colour, box.get_rect(), border_radius=self.px(radius))
        (onto or self.screen).blit(box, rect)

    # -------------------- in play

    def help(self, held: frozenset[str], locked: frozenset[str], opacity: float) -> None:
        """The two rows of keys at the bottom; held keys are lit, what the world does not know wears
        a padlock.
        """
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
        """Key caps and what they do, side by side."""
        locked = all(motion in unknown for _, motion in caps)
        parts = [self._cap(name, motion in held and not locked, locked) for name, motion in caps]
        words = self.text(label, 20, DIM if locked else MUTED)
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
            centre = cap.get_rect().center
            reach = height * 0.24
            pygame.draw.polygon(
                cap,
                colour,
                [(centre[0] + reach * x, centre[1] + reach * y) for x, y in ARROWS[name]],
            )
        else:
            cap.blit(words, words.get_rect(center=cap.get_rect().center).move(0, self.px(1)))
        return cap

    def _padlock(self, onto: pygame.Surface, x: int, y: int) -> None:
        body = pygame.Rect(0, 0, self.px(9), self.px(7))
        body.midtop = (x, y - self.px(1))
        pygame.draw.rect(onto, DIM, body, border_radius=self.px(1.5))
        pygame.draw.circle(onto, DIM, (x, y - self.px(1)), self.px(3.5), self.px(1.5), True, True)

    def figures(self, lines: list[Figure]) -> None:
        """The F1 overlay, top left."""
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
        """The red dot, top right."""
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
        """Receipts (text, opacity 0..1), top right under the red dot, newest last."""
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

    def paused(self) -> None:
        """A veil and two bars."""
        self.panel(self.screen.get_rect(), (8, 10, 16, 120), 0)
        centre = self.screen.get_rect().center
        for side in (-1, 1):
            bar = pygame.Rect(0, 0, self.px(14), self.px(52))
            bar.center = (centre[0] + side * self.px(14), centre[1] - self.px(20))
            pygame.draw.rect(self.screen, WHITE, bar, border_radius=self.px(4))
        words = self.text("paused   -   P goes on", 24, MUTED)
        self.screen.blit(words, words.get_rect(center=(centre[0], centre[1] + self.px(34))))

    # -------------------- other screens

    def start(self, world: str, stage: str, progress: float, seconds: float) -> None:
        """The start screen, over whatever backdrop is there."""
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
        """One sentence, wrapped, and when the window closes by itself (seconds)."""
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
        words = self.text(f"Esc closes the window (by itself in {math.ceil(closing)} s)", 20, MUTED)
        self.screen.blit(words, words.get_rect(center=(x, y + self.px(24))))

    def _wrap(self, sentence: str, size: float, width: float) -> list[str]:
        lines = [""]
        for word in sentence.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.text(longer, size).get_width() > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines


# outlines of the arrow caps, in units of their reach
ARROWS = {
    "<": ((-1.1, 0), (0.7, -1), (0.7, 1)),
    ">": ((1.1, 0), (-0.7, -1), (-0.7, 1)),
    "^": ((0, -1.1), (-1, 0.7), (1, 0.7)),
    "v": ((0, 1.1), (-1, -0.7), (1, -0.7)),
}
