"""YAML of people as plain values: nothing is built by a tag, and a small text cannot become a large value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from yaml.nodes import Node

# a file of settings has a few hundred
_MOST_NODES = 50_000


def parse_yaml(text: str, source: str) -> tuple[Any, list[int]]:
    """The value of a text, and the lines its items begin in, counted from 1, where that is a list.

    Args:
        source: the file's name, for messages.
    Raises: UserError with file and place for anything that is not plain YAML, is nested too deeply, or repeats parts
        by ``*name`` until they are more than a file of settings can be.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        _count(node, {})
        value = loader.construct_document(node)
    except yaml.YAMLError as reason:
        mark = getattr(reason, "problem_mark", None)
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UserError(f"{place}: {getattr(reason, 'problem', None) or 'it is not valid YAML'}") from reason
    except RecursionError as reason:
        raise UserError(f"{source} is nested too deeply to be read") from reason
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as reason:
        # what PyYAML raises for a date, number or tag that is none, as 2001-99-99 and !!int ''
        raise UserError(f"{source} holds a value that cannot be read", found=reason) from reason
    lines = [item.start_mark.line + 1 for item in node.value] if isinstance(node, yaml.SequenceNode) else []
    return value, lines


def _count(node: Node, counted: dict[int, int]) -> int:
    """How many values a node stands for when every ``*name`` is written out. Raises: ValueError for too many."""
    known = counted.get(id(node))
    if known is not None:
        if not known:
            raise ValueError("a part that holds itself")
        return known
    counted[id(node)] = 0
    parts: list[Any] = [node.value] if isinstance(node.value, str) else []
    if not parts:
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    total = 1 + sum(_count(part, counted) for part in parts if not isinstance(part, str))
    if total > _MOST_NODES:
        raise ValueError(f"more than {_MOST_NODES} values, with every *name written out")
    counted[id(node)] = total
    return total
