"""`trifold recipes`."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the preset recipes, or print one as YAML."""
    from trifold.compress.presets import preset_names
    from trifold.compress.recipe import Recipe

    if name:
        click.echo(Recipe.load(name).to_yaml(), nl=False)
        return
    for preset in preset_names():
        recipe = Recipe.load(preset)
        text = "no calibration text" if recipe.data_free else "calibration text"
        click.echo(f"{preset:20} {' + '.join(step.method for step in recipe.steps):12} {text}")
