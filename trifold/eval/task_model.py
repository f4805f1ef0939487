"""A model that is already loaded, as lm-eval sees it."""

from __future__ import annotations

import copy
import logging
from textwrap import shorten
from typing import Any

from lm_eval.models.huggingface import HFLM

from trifold.compress.calibration import TOKENS_PER_BATCH
from trifold.core.errors import InputError


class LoadedModel(HFLM):
    """lm-eval's `hf` model round a live one, with a batch size for CPUs and a count of truncated requests.

    batch_size: requests of a batch, or "auto". On a GPU that is lm-eval's search: the largest of 64, 32, ... that fits
    in memory. On a CPU, where that takes five passes of 64 full windows and ends the process if they do not fit, it is
    as many of the longest requests left as make about 1024 tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str) -> None:
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of what this class is for
        try:
            # It is given a pad token, so not the caller's own.
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal"
            )
        finally:
            logger.setLevel(level)
        self.truncated = 0  # requests that were cut on the left to fit the context
        self._batch = range(0)  # the requests of the batch that is being filled

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return int(super()._detect_batch_size(requests, pos))
        if not requests:
            return max(1, TOKENS_PER_BATCH // self.max_length)
        _, context, continuation = requests[pos]
        return max(1, TOKENS_PER_BATCH // min(len(context) + len(continuation), self.max_length))

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        if self.device.type != "cpu":
            return int(super()._batch_scheduler(pos, n_reordered_requests))
        if pos not in self._batch or pos == 0:  # asked for every request; the first is the longest
            size = self._detect_batch_size(n_reordered_requests, pos)
            self._batch = range(pos, pos + size)
            self.batch_sizes[size] = size  # what lm-eval reports
        return len(self._batch)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            wanted = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if wanted >= self.max_length:
                raise InputError(
                    f"a task wants {wanted} generated tokens, the model's context is {self.max_length}; set its "
                    "max_gen_toks lower or leave it out"
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any) -> Any:
        if left_truncate_len is not None:
            self.truncated += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"the answer {shorten(text[1], 60)!r} makes {len(continuation)} tokens after its question, of 1 to "
                    f"{self.max_length} that the model takes; mend its task or leave it out"
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
