"""Text that arrives in pieces, broken between words at the terminal's edge.

A word is shown when its end has come: it cannot be taken back from the line before. Scripts without spaces are shown at
once and left to the terminal. Control characters are dropped: a model must not steer the terminal.
"""

import re
import shutil

from rich.cells import cell_len

CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Wrap:
    """`push` and `flush` return what is to be printed."""

    def __init__(self, width: int | None = None):
        self.width = width
        self.column = 0
        self.word = ""  # the one whose end has not come

    def push(self, piece: str) -> str:
        *done, self.word = re.split(r"(\s)", self.word + piece.translate(CONTROL))
        shown = "".join(map(self._place, done))
        if cell_len(self.word) > len(self.word):  # wide characters
            shown += self.flush()
        return shown

    def flush(self) -> str:
        word, self.word = self.word, ""
        return self._place(word)

    def _place(self, text: str) -> str:
        width = self.width or shutil.get_terminal_size().columns
        if text == "\n":
            self.column = 0
            return text
        size = 8 - self.column % 8 if text == "\t" else cell_len(text)
        if self.column + size <= width:
            self.column += size
        elif text.isspace():  # at the edge: the next word wraps, or a line ends here
            self.column = width
            return ""
        elif size <= width or self.column == width:
            self.column = size if size <= width else size % width
            return "\n" + text
        else:  # longer than a line: the terminal breaks it
            self.column = (self.column + size) % width
        return text
