"""Edits a card's YAML block in place: every byte that this tool did not write stays as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from convert.errors import ConvertError

_LARGEST = 100_000  # characters of a block; PyYAML reads some 300,000 a second
_BLOCK = re.compile(r"\A(\s*---[ \t]*(?:\r\n|\n))(.*?)(^---[ \t]*(?:\r\n|\n|\Z))", re.DOTALL | re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Reads plain data without aliases, which can stand for more than memory holds, and cannot be edited one by one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", None)
        return super().compose_node(parent, index)


class Block:
    """The text of a YAML block, and what it means.

    Args:
        text: the block without its `---` lines.
        newline: the card's line ending.
    """

    def __init__(self, text: str, newline: str = "\n") -> None:
        self.text = text
        self.newline = newline
        self._parse()

    def _parse(self) -> None:
        if len(self.text) > _LARGEST:
            raise _cannot(f"its metadata has {len(self.text)} characters")
        try:
            root = yaml.compose(self.text, Loader=_Loader)
            self.value: dict[str, Any] = yaml.load(self.text, Loader=_Loader) or {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 2}" if mark else ""
            raise _cannot(f"its metadata is not YAML{line}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # of tags and dates
            raise _cannot(f"its metadata holds a value that cannot be read ({type(error).__name__})") from None
        if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
            raise _cannot("its metadata is not a block of keys, one a line")
        self.nodes = {key.value: (key, value) for key, value in root.value} if root is not None else {}

    def _splice(self, start: int, end: int, text: str) -> None:
        self.text = self.text[:start] + text + self.text[end:]
        self._parse()

    def _insert(self, place: int, text: str) -> None:
        self._splice(place, place, text)

    def add(self, key: str, value: Any) -> None:
        """Add a key at the end."""
        glue = "" if not self.text or self.text.endswith("\n") else self.newline
        self._splice(len(self.text), len(self.text), glue + self.dump({key: value}))

    def replace(self, key: str, value: Any) -> None:
        """Write another value for a key."""
        start = self.nodes[key][0].start_mark.index
        self._splice(start, self._end(self.nodes[key][1]), self.dump({key: value}).rstrip("\r\n"))

    def extend(self, key: str, items: Sequence[Any]) -> None:
        """Append items to a list; a single value becomes a list."""
        node = self.nodes[key][1]
        if isinstance(node, yaml.SequenceNode) and node.value:
            last = node.value[-1]
            if not node.flow_style:
                self._insert(self._end(node), self.newline + self._items(node, items))
                return
            if all(isinstance(item, str) for item in items):
                text = "".join(f", {_scalar(item)}" for item in items)
                self._insert(last.end_mark.index, text)
                return
        value = self.value[key]
        self.replace(key, [*(value if isinstance(value, list) else [] if value is None else [value]), *items])

    def remove(self, key: str, item: str) -> None:
        """Take a text out of a list; a list that becomes empty stays as one."""
        node = self.nodes[key][1]
        found = [child for child in getattr(node, "value", ()) if getattr(child, "value", None) == item]
        rest = [value for value in self.value[key] if value != item]
        if not found or not rest or node.flow_style:
            self.replace(key, rest)
            return
        start = self.text.rfind("\n", 0, found[0].start_mark.index) + 1
        end = self.text.find("\n", found[0].end_mark.index) + 1 or len(self.text)
        self._splice(start, end, "")

    def replace_item(self, node: Any, index: int, item: Any) -> None:
        """Write another item into a block list."""
        child = node.value[index]
        start = self.text.rfind("\n", 0, child.start_mark.index) + 1
        self._splice(start, self._end(child), self._items(node, [item]))

    def append_item(self, node: Any, item: Any) -> None:
        """Append an item to a block list that has at least one."""
        self._insert(self._end(node), self.newline + self._items(node, [item]))

    def dump(self, value: Any) -> str:
        """Write YAML in the card's line ending."""
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=False)
        return str(text).replace("\n", self.newline)

    def _items(self, node: Any, items: Sequence[Any]) -> str:
        line = self.text.rfind("\n", 0, node.value[0].start_mark.index) + 1
        indent = self.text[line : node.value[0].start_mark.index].split("-")[0]
        lines = self.dump(list(items)).rstrip("\r\n").split(self.newline)
        return self.newline.join(indent + text for text in lines)

    def _end(self, node: Any) -> int:
        """The end of a value's last line with content; PyYAML's mark lies behind the comments that follow it."""
        end: int = node.end_mark.index
        text = self.text[node.start_mark.index : end]
        if not isinstance(node, yaml.ScalarNode):
            lines = text.split("\n")
            while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
                lines.pop()
            text = "\n".join(lines)
        return int(node.start_mark.index) + len(text.rstrip())


def split(card: str) -> tuple[str, str, str]:
    """Split a card into what stands before its YAML, the YAML, and the rest with the closing line; all join to the card.

    Example:
        >>> split("---\\nlicense: mit\\n---\\n# Title\\n")
        ('---\\n', 'license: mit\\n', '---\\n# Title\\n')
        >>> split("# Title\\n")
        ('', '', '# Title\\n')
    """
    found = _BLOCK.match(card)
    return (found[1], found[2], card[found.start(3) :]) if found else ("", "", card)


def _scalar(item: str) -> str:
    return str(yaml.safe_dump([item], default_flow_style=True, allow_unicode=True, width=10**6)).strip()[1:-1]


def _cannot(reason: str) -> ConvertError:
    return ConvertError(
        f"README.md: {reason}; the card was left as it is",
        code="card",
        key="README.md",
        status=1,
        hint="correct the block between the two --- lines by hand, and publish again",
    )
