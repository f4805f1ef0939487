"""`trifold generate`."""

from __future__ import annotations

from typing import Any

import click

from trifold.cli.output import calm
from trifold.core.errors import InputError


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default=None, help="Where to run.  [default: as transformers chooses]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Continue a prompt with a checkpoint, compressed or dense."""
    import torch

    from trifold.api import load, load_tokenizer
    from trifold.compress.files import usable_device

    calm(quiet=False)
    device_map = None if device is None else {"": usable_device(device)}
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    tokenizer = load_tokenizer(checkpoint, **trust)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError(f"--prompt {prompt!r}: no tokens; give some text to continue")
    model = load(checkpoint, device_map=device_map, **trust)
    inputs = inputs.to(model.device)
    torch.manual_seed(seed)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    click.echo(tokenizer.decode(tokens[0], skip_special_tokens=True))
