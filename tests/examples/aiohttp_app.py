"""An aiohttp app: upload a recording, get the voice when the vendor calls back.

    PUBLIC_URL=https://app.example.com KLING_API_KEY=… KLING_WEBHOOK_SECRET=… \
        python aiohttp_app.py

    curl -F name=Ada -F recording=@ada.mp3 https://app.example.com/voices

The app serves the recordings itself, under names that cannot be guessed, so it needs no object
store: it is its own sample host.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from kling_voice import CallbackReceiver, KlingError, KlingVoiceClient, SampleError

KLING = web.AppKey("kling", KlingVoiceClient)


class OwnPages:
    """A sample host: the app's own folder, served at /samples/."""

    def __init__(self, folder: Path, public_url: str) -> None:
        self.folder = folder
        self.public_url = public_url

    async def publish(self, path: Path, name: str) -> str:
        published = f"{secrets.token_urlsafe(24)}{path.suffix}"
        shutil.copy(path, self.folder / published)
        return f"{self.public_url}/samples/{published}"

    async def discard(self, url: str) -> None:
        (self.folder / url.rpartition("/")[2]).unlink(missing_ok=True)


async def clone(request: web.Request) -> web.Response:
    form = await request.post()
    name, recording = form.get("name"), form.get("recording")
    if not isinstance(name, str) or not isinstance(recording, web.FileField):
        return web.json_response({"error": "give a name and a recording"}, status=400)
    with tempfile.TemporaryDirectory() as folder:
        upload = Path(folder, "upload").with_suffix(Path(recording.filename).suffix)
        upload.write_bytes(recording.file.read())
        try:
            voice = await request.app[KLING].clone_voice(name, voice_file=upload)
        except (SampleError, ValueError) as error:  # the caller's recording or name
            return web.json_response({"error": str(error)}, status=400)
        except KlingError as error:
            return web.json_response({"error": str(error)}, status=502)
    return web.json_response({"voice_id": voice.voice_id, "trial_url": voice.trial_url})


def make_app(public_url: str) -> web.Application:
    receiver = CallbackReceiver(public_url=f"{public_url}/kling")  # KLING_WEBHOOK_SECRET

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory() as folder:
            app.router.add_static("/samples", folder)
            host = OwnPages(Path(folder), public_url)
            async with KlingVoiceClient(callbacks=receiver, sample_host=host) as kling:
                app[KLING] = kling
                yield

    app = web.Application(client_max_size=20 * 1024**2)
    app.router.add_post("/voices", clone)
    app.router.add_post("/kling", receiver.aiohttp_handler)
    app.cleanup_ctx.append(lifespan)
    return app


if __name__ == "__main__":
    web.run_app(
        make_app(os.environ["PUBLIC_URL"].rstrip("/")), port=int(os.environ.get("PORT", 8080))
    )
