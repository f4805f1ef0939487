"""One evaluation, as numbers to print, to save and to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from trifold.compress.text import Windows
from trifold.eval.divergence import evaluate_windows
from trifold.eval.forward import device_of
from trifold.eval.perplexity import PerplexityResult
from trifold.eval.speed import decode_speed, peak_memory_bytes


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation measured, and on which tokens.

    `loss`, `window_losses` and `kl`: nats per token. `tokens`: scored predictions. `windows`: how many.
    `peak_memory_bytes`: of the whole process, so with the baseline if there is one. `kl` and
    `top1_agreement` are None without a baseline, `decode_tokens_per_s` if speed was not measured.
    """

    perplexity: float
    loss: float
    tokens: int
    kl: float | None
    top1_agreement: float | None
    decode_tokens_per_s: float | None
    peak_memory_bytes: int
    windows: int
    seqlen: int
    stride: int
    bos: str
    source: str
    digest: str
    window_losses: tuple[float, ...]
    baseline: PerplexityResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite; `baseline` (perplexity and loss) only if there was one."""
        entries: dict[str, Any] = {
            "perplexity": _finite(self.perplexity),
            "tokens": self.tokens,
            "kl": _finite(self.kl),
            "top1_agreement": self.top1_agreement,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "loss": _finite(self.loss),
            "windows": self.windows,
            "seqlen": self.seqlen,
            "stride": self.stride,
            "bos": self.bos,
            "source": self.source,
            "digest": self.digest,
            "window_losses": [_finite(loss) for loss in self.window_losses],
        }
        if self.baseline is not None:
            dense = self.baseline
            entries["baseline"] = {"perplexity": _finite(dense.perplexity), "loss": _finite(dense.loss)}
        return entries


def evaluate(
    model: nn.Module,
    windows: Windows,
    baseline: nn.Module | None = None,
    speed: bool = True,
    batch_size: int = 1,
) -> EvalReport:
    """Perplexity of `model`, its divergence from `baseline` in the same pass, decoding speed and memory.

    Raises InputError if the vocabularies differ or, with `speed`, if the model has no KV cache.
    """
    tokens_per_s = decode_speed(model) if speed else None  # first, since it may refuse
    scores = evaluate_windows(model, windows, baseline, batch_size)
    divergence = scores.divergence
    return EvalReport(
        perplexity=scores.model.perplexity,
        loss=scores.model.loss,
        tokens=scores.model.tokens,
        kl=None if divergence is None else divergence.kl,
        top1_agreement=None if divergence is None else divergence.top1_agreement,
        decode_tokens_per_s=tokens_per_s,
        peak_memory_bytes=peak_memory_bytes(device_of(model)),
        windows=len(windows.ids),
        seqlen=windows.seqlen,
        stride=windows.stride,
        bos=windows.bos,
        source=windows.source,
        digest=windows.digest,
        window_losses=scores.model.window_losses,
        baseline=scores.baseline,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
