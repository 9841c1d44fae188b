"""Options that would change nothing beside others: they are refused, not passed over."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def refuse_idle(
    context: typer.Context, names: Iterable[str], why: str, remedy: str = "leave it out"
) -> None:
    """Refuse options that the command line gives and that do nothing.

    Args:
        context: of the command.
        names: of the command's parameters.
        why: ends the sentence that begins with the option, and names the other one.
        remedy: what to do instead.

    Raises:
        typer.BadParameter: one of them is given; names the first.
    """
    options = {each.name: each.opts[0] for each in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        # Not by its value: who writes the default out has a wish, too.
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"{options[name]} {why}; {remedy}")
