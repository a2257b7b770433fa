"""Escaping for the card: a value is text, and can neither be markup nor end the part that it stands in."""

from __future__ import annotations

import re

from convert.report import shown

# what Markdown or HTML would read: `_` within a word is a letter
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|^[#+\-=](?=\s|$)|^\d+(?=[.)](\s|$))")
_PLAIN_CODE = re.compile(r"[\w .,;:/()\[\]{}*+=@%?!^~\"'#$-]+", re.ASCII)
_IN_CODE = re.compile(r"[^\w .,/-]|_")


def text(value: object) -> str:
    """Write a value into a line of Markdown, or into a cell of a table.

    Example:
        >>> text("a|b_c <!-- x -->")
        'a&#124;b_c &#60;!-- x --&#62;'
    """
    return _MARKUP.sub(_reference, _line(value))


def code(value: object) -> str:
    """Write a value as code, within a line of Markdown or a cell of a table.

    Example:
        >>> code("encoder.layers.0"), code("a`b")
        ('`encoder.layers.0`', '<code>a&#96;b</code>')
    """
    line = _line(value)
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{_IN_CODE.sub(_reference, line)}</code>"


def _line(value: object) -> str:
    return " ".join(shown(value, keep="\t\n\r").split())


def _reference(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(letter)};" for letter in match[0])
