"""Clone every recording of a folder, each named after its file; run it again to go on.

KLING_API_KEY=… python clone_folder.py recordings/ s3://bucket/samples
"""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from kling_voice import KlingVoiceClient, ObjectStoreHost, VoiceRequest

SUFFIXES = {".mp3", ".wav", ".mp4", ".mov"}


def requests_for(folder: Path) -> list[VoiceRequest]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [VoiceRequest(path.stem[:20], voice_file=path) for path in paths]


async def clone(requests: list[VoiceRequest], batch_id: str, sample_host: str) -> int:
    failures = 0
    async with (
        KlingVoiceClient(sample_host=ObjectStoreHost(sample_host)) as kling,
        aclosing(kling.clone_voices(requests, batch_id=batch_id)) as results,
    ):
        async for result in results:
            if result.voice is not None:
                print(f"{result.request.voice_name}: {result.voice.voice_id}")
            else:
                failures += 1
                print(f"{result.request.voice_name}: {result.error}", file=sys.stderr)
    return failures


if __name__ == "__main__":
    folder, host = Path(sys.argv[1]), sys.argv[2]
    sys.exit(min(1, asyncio.run(clone(requests_for(folder), f"folder {folder.name}", host))))
