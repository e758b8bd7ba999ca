"""What errors say, on a line of a screen.

one_line    an error or a text, in one line that is not too long
printable   a text without control characters
"""

from __future__ import annotations

MESSAGE_LENGTH_MAX, MESSAGE_BEGIN_LENGTH = 600, 240
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))}


def printable(text: str) -> str:
    """``text`` without the power to do anything to a terminal: control characters, new lines too, are escaped."""
    return text.translate(_CONTROLS)


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line that is not too long. What is cut is its middle: where it begins it says what is
    wrong, and where it ends, why, and what to do.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= MESSAGE_LENGTH_MAX:
        return text
    return f"{text[:MESSAGE_BEGIN_LENGTH]} ... {text[MESSAGE_BEGIN_LENGTH + 5 - MESSAGE_LENGTH_MAX :]}"
