"""The commands that a Markdown text tells people to type."""

import re

import click

from distrobust.cli import commands


def known_commands(group: click.Group = commands, prefix: str = "") -> set[str]:
    """Of the command line: `train`; groups, `k8s`; and what is in them, `k8s render`."""
    names = set()
    for name, command in group.commands.items():
        names |= {prefix + name}
        names |= known_commands(command, f"{prefix}{name} ") if isinstance(command, click.Group) else set()
    return names


def named_commands(text: str) -> set[str]:
    """What follows `distrobust` in code blocks and between backticks; after the name of a group, two words."""
    named = set()
    for code in re.findall(r"^```.*?^```|`[^`]+`", text, re.DOTALL | re.MULTILINE):
        words = code.strip("`").split()
        for i, word in enumerate(words[:-1]):
            if word == "distrobust":
                is_group = isinstance(commands.commands.get(words[i + 1]), click.Group)
                named.add(" ".join(words[i + 1 : i + 2 + is_group]))
    return named
