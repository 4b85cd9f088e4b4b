"""The vendor's side on this machine: a server to test against instead of paying."""

from kling_voice.emulator.account import TaskView
from kling_voice.emulator.faults import ALL, CALLS, TRANSIENT, Fault, Faults
from kling_voice.emulator.media import recordings
from kling_voice.emulator.server import Emulator
from kling_voice.emulator.threads import running

__all__ = [
    "ALL",
    "CALLS",
    "TRANSIENT",
    "Emulator",
    "Fault",
    "Faults",
    "TaskView",
    "recordings",
    "running",
]
