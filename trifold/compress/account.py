"""What a compression says of itself: what it depends on, what goes into config.json, and its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trifold.compress.card import Card
from trifold.compress.checkpoint import QUANT_METHOD
from trifold.compress.compressed import Compressed
from trifold.compress.experts import tokens_of_experts
from trifold.compress.job import Job
from trifold.compress.memory import resident_bytes
from trifold.core.native import library
from trifold.core.version import versions


def fingerprint_of(job: Job) -> dict[str, Any]:
    """Everything that the bytes of a result depend on, as JSON: a run goes on only if it is the same."""
    return {
        "recipe": job.recipe.to_dict(),
        "source": job.source.fingerprint(),
        "dtype": job.dtype_name,
        "device": str(job.source.device),
        "calibration": job.windows.digest if job.observed else None,
        "more text": job.more.digest if job.more else None,
        "batch_size": job.batch_size,
        "threads": torch.get_num_threads(),
        "processes": job.processes.size,
        "compiled": library("columns") is not None,
        "max_shard_size": job.options.max_shard_size,
        "versions": versions(),
    }


def stamp(fingerprint: Mapping[str, Any]) -> str:
    """The SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def quantization_of(job: Job, everything: Compressed) -> dict[str, Any]:
    """How the weights are to be read, for config.json."""
    found = {"recipe": job.recipe.to_dict(), "base_model": job.source.name, "modules": everything.modules}
    return found | ({"slices": everything.slices} if everything.slices else {})


def report_of(
    job: Job, everything: Compressed, sizes: Mapping[str, Any], proof: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The contents of report.json. sizes: of the whole (`summary.py`). seconds: of this run."""
    return {
        "recipe": job.recipe.to_dict(),
        "base_model": job.source.name,
        "calibration": {
            "source": job.windows.source,
            "digest": job.windows.digest,
            "windows": len(job.windows.ids),
            "seqlen": job.windows.seqlen,
            "tokens": job.windows.total_tokens,
            "more_tokens": job.more.total_tokens if job.more else 0,
            "bos": job.windows.bos,
            "notices": list(job.windows.notices),
        }
        if job.observed
        else None,
        "seed": job.recipe.seed,
        "batch_size": job.batch_size,
        "dtype": job.dtype_name,
        "versions": versions(),
        "notices": [*job.source.notices, *job.plan.notices],
        "layers": everything.report,
        "tokens_of_experts": tokens_of_experts(everything.report),
        "mean_error": sum(e["error"] for e in everything.report.values()) / len(everything.report),
        **sizes,
        "proof": dict(proof),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": resident_bytes(),
    }


def card_of(job: Job, report: Mapping[str, Any], front: Mapping[str, Any]) -> str:
    """The model card of a result. front: what the dense model's own says at its head."""
    rows = {
        "layers compressed": str(len(report["layers"])),
        "bits per compressed weight": f"{report['bits_per_weight']:.3f}",
        "bits per weight of the whole model": f"{report['model_bits_per_weight']:.3f}",
        "size": f"{report['total_bytes'] / 1e6:.2f} MB (dense: {report['dense_bytes'] / 1e6:.2f} MB)",
    }
    if (text := report["calibration"]) is not None:
        source = Path(text["source"])
        named = source.name if source.is_file() else text["source"]
        rows["calibration"] = f"{named}, {text['windows']} windows of {text['seqlen']} tokens"
    return Card(job.repository, job.source.name, QUANT_METHOD, (), rows, job.recipe.to_dict(), front).text()
