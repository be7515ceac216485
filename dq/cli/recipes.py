"""`dq recipes`."""

from __future__ import annotations

from dq.cli.options import AsJson, print_json

__all__ = ["recipes"]


def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    from dq.recipe import templates

    if as_json:
        print_json({name: template.help for name, template in templates.items()})
        return
    width = max(len(name) for name in templates.names())
    for name, template in templates.items():
        print(f"{name:{width}}  {template.help}")
