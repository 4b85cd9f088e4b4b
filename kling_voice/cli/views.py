"""How tasks and voices look: tables and colour for people, tab-separated lines for pipes, JSON."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from kling_voice.cli.console import clean, show, show_json, stdout
from kling_voice.models import TaskStatus, VoiceTask, make_converter

_COLOURS = {TaskStatus.SUCCEED: "green", TaskStatus.FAILED: "red"}
_PROSE = "reason"  # the one column that may be wrapped, to this width at least:
_PROSE_WIDTH = 24

_converter = cache(make_converter)


def as_json(value: Any) -> Any:
    """Give a model as JSON: its fields by the vendor's names."""
    return _converter().unstructure(value)


def show_task(task: VoiceTask, *, json: bool) -> None:
    """Print one task in full."""
    if json:
        show_json(as_json(task))
        return
    told = {
        "task_id": task.task_id,
        "external_task_id": task.external_task_id,
        "task_status": task.task_status,
        "task_status_msg": task.task_status_msg,
        "created_at": _moment(task.created_at),
        "updated_at": _moment(task.updated_at),
        "units": task.final_unit_deduction,
    }
    for voice in task.voices:
        told |= {
            "voice_name": voice.voice_name,
            "voice_id": voice.voice_id,
            "owned_by": voice.owned_by,
            "trial_url": voice.trial_url,
        }
    for name, value in told.items():
        if value not in (None, ""):
            style = _colour(task) if name == "task_status" else ""
            show(Text.assemble((f"{name:<18}", "dim"), (clean(value), style)))


def show_tasks(tasks: Sequence[VoiceTask], *, json: bool, presets: bool = False) -> None:
    """Print many tasks; of presets only what presets have."""
    if json:
        show_json([as_json(task) for task in tasks])
        return
    columns = ["voice_name", "voice_id"]
    if not presets:
        columns = ["voice_name", "task_status", "voice_id", "task_id"]
    if not stdout().is_terminal:  # where there is room
        columns += ["trial_url"] if presets else ["external_task_id", "created_at", "trial_url"]
    rows = [[_cell(task, column) for column in columns] for task in tasks]
    show_rows(columns, rows, empty="There are none.")


def show_rows(
    columns: Sequence[str], rows: Iterable[Sequence[Text]], *, empty: str = "Nothing."
) -> None:
    """Print a table on a terminal, and tab-separated lines with a header elsewhere.

    Where a table is too wide for the terminal each row is a block of lines, so that ids stay whole.
    """
    rows = list(rows)
    if not stdout().is_terminal:
        for line in [columns, *([cell.plain for cell in row] for row in rows)]:
            show("\t".join(line))
        return
    if not rows:
        show(empty)
        return
    if _width(columns, rows) > stdout().width:
        for number, row in enumerate(rows):
            if number:
                show("")
            for column, cell in zip(columns, row, strict=True):
                if cell:
                    show(Text.assemble((f"{column}: ", "dim"), cell))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, no_wrap=column != _PROSE, overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def _width(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> int:
    """Give the least width of a table that shows all cells whole, or wrapped if they are prose."""
    width = -1
    for column, *cells in zip(columns, *rows, strict=True):
        widest = max(cell_len(column), *(cell.cell_len for cell in cells))
        width += 3 + (min(widest, _PROSE_WIDTH) if column == _PROSE else widest)
    return width


def _cell(task: VoiceTask, column: str) -> Text:
    value = getattr(task, column, None) or getattr(task.voice, column, None)
    if column == "created_at":
        value = _moment(task.created_at)
    style = _colour(task) if column == "task_status" else ""
    return Text(clean("" if value is None else value), style)


def _colour(task: VoiceTask) -> str:
    return _COLOURS.get(task.task_status, "yellow")


def _moment(moment: datetime | None) -> str | None:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S%z") if moment is not None else None
