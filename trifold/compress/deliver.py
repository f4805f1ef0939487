"""What becomes of a finished checkpoint: exported for an engine, pushed to the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.compress import checkpoint
from trifold.compress.export import check_format, export
from trifold.compress.hub import check_hub, push
from trifold.compress.job import Job, Options
from trifold.compress.preflight_export import check_export, in_words_of_compress
from trifold.core.errors import InputError, TrifoldError


@dataclass
class Delivery:
    """export_to: a format, or None for the best one of the `engine`, if there is one. push_to_hub: a repository, which
    gets the export if there is one, else the checkpoint. Each step finds out before the compression what it can."""

    export_to: str | None = None
    engine: str | None = None
    push_to_hub: str | None = None

    @property
    def exports(self) -> bool:
        return self.export_to is not None or self.engine is not None

    def __bool__(self) -> bool:
        return self.exports or self.push_to_hub is not None

    def begin(self, output: Path | None) -> None:
        """Before the model is opened. Raises InputError or ResourceError."""
        if output is None:
            raise InputError("an export, or a push to the hub, is of a checkpoint in a folder; give an output")
        if self.exports:
            with in_words_of_compress():
                check_format(self.export_to, self.engine)
        if self.export_to is not None:
            checkpoint.check_output(place_of(output, self.export_to))
        if self.push_to_hub is not None:
            check_hub(self.push_to_hub)

    def check(self, job: Job, output: Path) -> None:
        """Before anything is compressed. Raises InputError for a recipe whose result the format cannot hold."""
        if self.exports:
            self.export_to = check_export(job, self.export_to, self.engine, output)
            checkpoint.check_output(place_of(output, self.export_to))

    @property
    def repository(self) -> str | None:
        """What the checkpoint itself will be called on the hub."""
        return None if self.exports else self.push_to_hub

    def finish(self, output: Path, options: Options) -> dict[str, Any]:
        """Export and push. Returns what a report has more."""
        if self.export_to is None:
            assert self.push_to_hub is not None
            return {"pushed_to": push(output, self.push_to_hub, f"{output.name}, compressed with Trifold")}
        try:
            report = export(
                output,
                self.export_to,
                place_of(output, self.export_to),
                engine=self.engine,
                max_shard_size=options.max_shard_size,
                push_to_hub=self.push_to_hub,
                trust_remote_code=options.trust_remote_code,
            )
        except TrifoldError as error:
            raise type(error)(f"{error} ({output} itself is whole)") from error
        return {"export": report}


def place_of(output: Path, to: str) -> Path:
    """Where the export of a checkpoint goes: beside it, under its name and the format's."""
    return output.with_name(f"{output.name}-{to}")
