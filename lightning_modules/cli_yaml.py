"""YAML files of the command line in which no line is overruled by another one unnoticed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import ActionConfigFile


class ConfigFile(ActionConfigFile):
    """A configuration file, refused where a key stands twice: YAML would keep the last one without a word."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Reads the file.

        Raises:
            TypeError: A key stands twice in it, or it cannot be read (jsonargparse shows errors of this type).
        """
        if Path(values).is_file() and (twice := repeated_keys(Path(values).read_text(encoding="utf-8"))):
            raise TypeError(f'Parser key "{self.dest}": {values} {"; ".join(twice)}: rename one of the two, or take it away')
        super().__call__(parser, cfg, values, option_string)


def repeated_keys(text: str) -> list[str]:
    """The keys of YAML that stand twice in one mapping, with their lines, in words.

    Args:
        text: The YAML; one that is malformed has none: who reads it says so.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    return [f"has the key {key} twice, in lines {first} and {second}" for key, first, second in _repeated(node)]


def _repeated(node: yaml.Node | None) -> Iterator[tuple[str, int, int]]:
    match node:
        case yaml.MappingNode():
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                    yield key.value, lines[key.value], line
                yield from _repeated(value)
        case yaml.SequenceNode():
            for item in node.value:
                yield from _repeated(item)
