"""Trains the embedded model from scratch: `python -m trifold.demo.train`.

A Llama of 2.0 M parameters (hidden 256, three layers, tied embeddings) on text that the little world's generator
writes while it is trained: windows of 256 tokens, AdamW, a cosine schedule, bfloat16 autocast. On the same machine
with the same number of threads and the same library versions, the same seed gives the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from trifold.api import evaluate
from trifold.core.embedded import NAME
from trifold.demo.texts import floor
from trifold.demo.tokenizer import train_tokenizer
from trifold.demo.world import documents

VOCAB_SIZE = 768
TOKENIZER_DOCUMENTS = 10_000
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Schedule:
    """`learning_rate` is the peak, reached after `warmup` steps and followed by a cosine down to nothing.

    Each step sees `batch` windows of `seqlen` tokens.
    """

    steps: int = 2400
    batch: int = 16
    seqlen: int = 256
    learning_rate: float = 2e-3
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = (step + 1) / self.warmup if step < self.warmup else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * factor


def token_stream(tokenizer: Any, chunk: int = 500) -> Iterator[Tensor]:
    """The training split without end, as pieces of token ids [n], every document after its `<s>`."""
    start = 0
    while True:
        texts = [each.text for each in documents("train", chunk, start)]
        for ids in tokenizer(texts)["input_ids"]:
            yield torch.tensor(ids)
        start += chunk


def training_batches(tokenizer: Any, batch: int, seqlen: int) -> Iterator[Tensor]:
    """`[batch, seqlen]` int64 ids, consecutive windows of the packed stream."""
    held: list[Tensor] = []
    need = batch * seqlen
    for piece in token_stream(tokenizer):
        held.append(piece)
        if sum(map(len, held)) >= need:
            stream = torch.cat(held)
            yield stream[:need].view(batch, seqlen)
            held = [stream[need:]]


def new_model(tokenizer: Any, seed: int, **changes: Any) -> Any:
    """An untrained float32 model for the tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **{**ARCHITECTURE, **changes}))


def train(model: nn.Module, batches: Iterator[Tensor], schedule: Schedule, told: Callable[[int, float], None]) -> None:
    """Train in place; after each step, `told` is given its number, from 1, and its loss in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told(step + 1, loss.item())
    model.eval()


@click.command()
@click.option("--steps", default=Schedule.steps, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-model"), show_default=True)
def main(steps: int, seed: int, output: Path) -> None:
    """Train the embedded model from scratch and save it in bfloat16."""
    schedule = Schedule(steps=steps)
    tokenizer = train_tokenizer((each.text for each in documents("train", TOKENIZER_DOCUMENTS)), VOCAB_SIZE)
    model = new_model(tokenizer, seed)
    started = time.perf_counter()

    def told(step: int, loss: float) -> None:
        if step % 25 == 0 or step == steps:
            click.echo(f"step {step}/{steps}  loss {loss:.4f}  {time.perf_counter() - started:.0f} s", err=True)

    train(model, training_batches(tokenizer, schedule.batch, schedule.seqlen), schedule, told)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    scores = evaluate(model, NAME, tokenizer=tokenizer, seqlen=schedule.seqlen, batch_size=8, speed=False)
    click.echo(f"held-out perplexity {scores.perplexity:.4f}; no model can be below {floor(tokenizer):.4f}", err=True)


if __name__ == "__main__":
    main()
