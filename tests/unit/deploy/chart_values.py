"""The table of values in the chart's README, made from what `values.yaml` says of them."""

import json
from collections.abc import Iterator

import yaml

BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"
MARK = "# -- "
LONGEST = 60
"""Characters of a default that is shown."""


def table(values: str) -> str:
    """Return the rows of all values that have a comment that begins with `# -- `."""
    root = yaml.compose(values, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    rows = [
        f"| `{path}` | {default} | {text.replace('|', chr(92) + '|')} |"
        for path, default, text in _described(root, values.splitlines())
    ]
    return "\n".join(["| value | default | |", "| --- | --- | --- |", *rows, ""])


def _described(mapping: yaml.MappingNode, lines: list[str], above: str = "") -> Iterator[tuple[str, str, str]]:
    for key, value in mapping.value:
        path = above + key.value
        if text := _comment(lines, key.start_mark.line):
            yield path, _default(value), text
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _described(value, lines, path + ".")


def _comment(lines: list[str], row: int) -> str:
    """Return what the comment above a line says."""
    said: list[str] = []
    while row and (line := lines[row - 1].strip()).startswith("# "):
        if line.startswith(MARK):
            return " ".join([line.removeprefix(MARK), *reversed(said)])
        said.append(line.removeprefix("# "))
        row -= 1
    return ""


def _default(node: yaml.Node) -> str:
    value = yaml.safe_load(yaml.serialize(node))
    shown = json.dumps(value)
    return f"`{shown}`" if len(shown) <= LONGEST else "in `values.yaml`"
