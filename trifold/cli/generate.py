"""`trifold generate`."""

from __future__ import annotations

import click


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default=None, help="Where to run.  [default: as transformers chooses]")
def generate(
    checkpoint: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str | None
) -> None:
    """Continue a prompt with a checkpoint, compressed or dense."""
    import torch

    from trifold.api import load, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    model = load(checkpoint, device_map=device)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    click.echo(tokenizer.decode(tokens[0], skip_special_tokens=True))
