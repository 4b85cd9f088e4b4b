"""`kling-voice batch`: check the manifest whole, go on where an earlier run stopped, report."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path
from typing import Any

from attrs import define, field
from rich.text import Text

from kling_voice.cli.connection import connected, host_url, server_url
from kling_voice.cli.console import clean, complain, say, show, show_json, stdout
from kling_voice.cli.manifest import Entry, count_others, read_manifest
from kling_voice.cli.problems import (
    DONE,
    EMULATOR_ENDED,
    FAILED,
    INTERRUPTED,
    UsageError,
    in_batch,
    reason,
    report,
)
from kling_voice.cli.progress import Progress, duration
from kling_voice.cli.results import (
    EMULATOR,
    Line,
    ResultsFile,
    alone,
    is_failed_task,
    keep,
    line_of,
    load_results,
    status_of,
    units_of,
)
from kling_voice.cli.views import show_rows
from kling_voice.errors import ConfigurationError, KlingError
from kling_voice.identity import batch_prefix
from kling_voice.protocol import concerns_account

_ROWS = 25  # of the table in the end, on a terminal
_REASONS = 10  # failures that the end repeats
_COLOURS = {"succeed": "green", "failed": "red", "not created": "red"}


@define
class Run:
    """One run of a batch, as the command line asks for it.

    Attributes:
        batch_id: What the external ids are derived from.
        entries: The manifest.
        results: Where results go.
        base_url: The server that is asked, or :data:`EMULATOR`, which is started for the run.
        concurrency: The caller's cap on tasks in flight; ``None`` for the account's limit.
        retry_failed: How often a task that ended as failed is tried again.
        timeout: Seconds from an accepted create to the task's end; ``None`` for ever.
        host: The bucket for recordings.
        before: How many voices were done before this run.
        reasons: Why requests failed, in a few words, by their ids.
    """

    batch_id: str
    entries: Sequence[Entry]
    results: ResultsFile
    base_url: str
    concurrency: int | None
    retry_failed: int
    timeout: float | None
    host: str | None
    before: int = field(init=False)
    reasons: dict[str, str] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.before = self.voices

    @property
    def emulator(self) -> bool:
        """Whether an emulator is started for the run, and ends with it."""
        return self.base_url == EMULATOR

    @property
    def voices(self) -> int:
        """How many of the manifest's requests have their voice."""
        return sum(self._line(entry).get("voice_id") is not None for entry in self.entries)

    @property
    def units(self) -> Decimal:
        """The units that were deducted for the manifest's requests, in this run or before."""
        return sum((units_of(self._line(entry)) for entry in self.entries), Decimal(0))

    @property
    def failures(self) -> list[Line]:
        """The lines of the requests that failed."""
        return [line for entry in self.entries if (line := self._line(entry)).get("error")]

    def _line(self, entry: Entry) -> Line:
        return self.results.lines.get(entry.external_task_id, {})

    async def clone(self, progress: Progress) -> None:
        """Clone what has no voice yet.

        Raises:
            KlingError: Something that concerns the whole account.
            OSError: A result could not be written.
        """
        left = {
            entry.request: entry.external_task_id for entry in self.entries if not self._line(entry)
        }
        if not left:
            return
        async with connected(emulator=self.emulator, host=self.host) as kling:
            progress.slots = kling.slots
            stream = kling.clone_voices(
                left,
                batch_id=self.batch_id,
                concurrency=self.concurrency,
                retry_failed=self.retry_failed,
                timeout=self.timeout,
            )
            async with aclosing(stream) as results:
                async for result in results:
                    external_task_id = left[result.request]
                    line = line_of(result, external_task_id, self.base_url)
                    self.results.append(external_task_id, line)
                    if result.error is not None:
                        self.reasons[external_task_id] = reason(
                            result.error, result.request, emulator=self.emulator
                        )
                    progress.result(
                        result.request.voice_name,
                        voice_id=line["voice_id"],
                        status=status_of(line),
                        why=self.reasons.get(external_task_id, ""),
                    )

    def summary(self, seconds: float) -> dict[str, Any]:
        """Give the figures of the end."""
        return {
            "batch_id": self.batch_id,
            "output": str(self.results.path),
            "requests": len(self.entries),
            "voices": self.voices,
            "done_before": self.before,
            "failures": len(self.failures),
            "units_deducted": str(self.units),
            "seconds": round(seconds, 1),
        }

    def show(self, seconds: float) -> None:
        """Tell how it ended: a table, or to people the failures of a large batch; and figures."""
        if len(self.entries) <= _ROWS or not stdout().is_terminal:
            columns = ["voice_name", "task_status", "voice_id", "reason"]
            show_rows(columns, map(self._row, self.entries))
        else:
            failed = [entry for entry in self.entries if entry.external_task_id in self.reasons]
            for entry in failed[:_REASONS]:
                why = self.reasons[entry.external_task_id]
                show(clean(f"{entry.where}, {entry.request.voice_name}: {why}"))
            if len(failed) > _REASONS:
                show(f"… and {len(failed) - _REASONS} more failures")
        before = ""
        if self.before:
            before = f" ({self.before} done before: read from the file, not asked of the vendor)"
        show(
            f"{_count(self.voices, 'voice')}{before}, {_count(len(self.failures), 'failure')},"
            f" {self.units} units deducted in all, {duration(seconds)} passed."
        )
        results = f"Results: {self.results.path}" if self.results.lines else "No results"
        show(clean(f"{results} (batch id {self.batch_id!r})"))

    def _row(self, entry: Entry) -> list[Text]:
        line = self._line(entry)
        status = status_of(line) if line else "not done"
        cells = [
            entry.request.voice_name,
            status,
            line.get("voice_id") or "",
            self.reasons.get(entry.external_task_id, ""),
        ]
        name, told, voice_id, why = [Text(clean(cell)) for cell in cells]
        told.style = _COLOURS.get(status, "yellow")
        return [name, told, voice_id, why]


def run_batch(
    manifest: Path,
    *,
    output: Path | None,
    batch_id: str | None,
    concurrency: int | None,
    retry_failed: int,
    timeout: float | None,
    host: str | None,
    emulator: bool,
    json: bool,
) -> int:
    """Run a batch from its manifest to its summary, and give the exit status.

    Raises:
        UsageError: The manifest, the output or a setting is not usable; nothing was created.
    """
    if batch_id == "":
        raise UsageError("--batch-id is empty.")
    stem = manifest.resolve().name if manifest.is_dir() else manifest.stem
    batch_id = batch_id or stem or "batch"
    entries = _read(manifest, batch_id)
    host = host_url(host, emulator=emulator)
    if host is None and not emulator and any(entry.request.voice_file for entry in entries):
        raise UsageError(
            "The vendor takes only URLs, so recordings need a bucket to be fetched from: name one"
            " by --host s3://bucket/prefix or KLING_SAMPLE_HOST."
        )
    path = output or Path(f"{stem}.emulator.jsonl" if emulator else f"{stem}.results.jsonl")
    base_url = EMULATOR if emulator else server_url()
    with alone(path):
        kept = keep(
            load_results(path),
            {entry.external_task_id: entry.request.voice_name for entry in entries},
            batch_prefix(batch_id),
            base_url,
            str(path),
        )
        # An emulator that was started for this run knows nothing of an earlier one's voices.
        with ResultsFile(path, {} if emulator else kept) as results:
            run = Run(
                batch_id=batch_id,
                entries=entries,
                results=results,
                base_url=base_url,
                concurrency=concurrency,
                retry_failed=retry_failed,
                timeout=timeout,
                host=host,
            )
            before = f", {run.before} of them done before" if run.before else ""
            requests = _count(len(entries), "request")
            say(clean(f"Batch {batch_id!r}: {requests}{before}; into {path}"))
            return _carry_out(run, json=json)


def _carry_out(run: Run, *, json: bool) -> int:
    started = time.monotonic()
    problem: Exception | None = None
    interrupted = False
    with Progress(len(run.entries), run.voices) as progress:
        try:
            asyncio.run(run.clone(progress))
        except (KlingError, OSError) as error:
            problem = error
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        done = f"{run.voices} of {len(run.entries)} voices"
        if run.emulator:
            say(f"Interrupted: {done} were done. {EMULATOR_ENDED}")
        else:
            say(
                f"Interrupted: {done} are done. Those in flight go on at the vendor. Run the same"
                " command again to go on; nothing is created twice."
            )
        return INTERRUPTED
    if isinstance(problem, ConfigurationError):
        return report(problem)
    seconds = time.monotonic() - started
    if json:
        show_json(run.summary(seconds))
    else:
        run.show(seconds)
    if problem is not None:
        status = report(problem, in_batch)
        if run.emulator:
            say(EMULATOR_ENDED)
        else:
            first = "Correct that first; then run" if concerns_account(problem) else "Run"
            say(f"{first} the same command again to go on; nothing is created twice.")
        return status
    if run.failures:
        say(EMULATOR_ENDED if run.emulator else _way_on(run))
        return FAILED
    return DONE


def _way_on(run: Run) -> str:
    """Tell what to do about the failures of a run."""
    failed = sum(map(is_failed_task, run.failures))
    parts = []
    if failed < len(run.failures):
        others = "the other" if failed else "the"
        parts.append(
            f"Run the same command again to try {others} failures again; nothing is created twice."
        )
    if failed:
        parts.append(
            f"{_count(failed, 'task')} ended as failed, for which nothing is deducted; the same"
            " command does not try them again. Mend the cause and run it with"
            f" --retry-failed {run.retry_failed + 1}."
        )
    return " ".join(parts)


def _read(manifest: Path, batch_id: str) -> list[Entry]:
    try:
        entries, problems = read_manifest(manifest, batch_id)
    except OSError as error:
        raise UsageError(f"{manifest} cannot be read: {error.strerror}.") from None
    name = str(manifest if manifest.name else manifest.resolve())
    for problem in problems:
        complain(problem.told(name))
    if problems:
        raise UsageError(f"{_count(len(problems), 'problem')} in {name}; nothing was created.")
    if manifest.is_dir() and (others := count_others(manifest)):
        skipped = f"{_count(len(entries), 'recording')}; {_count(others, 'other')} skipped"
        say(clean(f"{name}: {skipped}"))
    return entries


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
