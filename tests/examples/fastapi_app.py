"""A FastAPI app: upload a recording, get the voice when the vendor calls back.

    pip install fastapi uvicorn python-multipart 'kling-voice[storage]'
    PUBLIC_URL=https://app.example.com SAMPLE_HOST=s3://bucket/samples \
        KLING_API_KEY=… KLING_WEBHOOK_SECRET=… uvicorn --factory fastapi_app:make_app

    curl -F name=Ada -F recording=@ada.mp3 https://app.example.com/voices
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Form, HTTPException, UploadFile
from starlette.routing import Route

from kling_voice import (
    CallbackReceiver,
    KlingError,
    KlingVoiceClient,
    ObjectStoreHost,
    SampleError,
)


def make_app() -> FastAPI:
    public_url = os.environ["PUBLIC_URL"].rstrip("/")
    receiver = CallbackReceiver(public_url=f"{public_url}/kling")  # KLING_WEBHOOK_SECRET
    host = ObjectStoreHost(os.environ["SAMPLE_HOST"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with KlingVoiceClient(callbacks=receiver, sample_host=host) as kling:
            app.state.kling = kling
            yield

    app = FastAPI(lifespan=lifespan)
    app.routes.append(Route("/kling", receiver.asgi_app, methods=["POST"]))

    @app.post("/voices")
    async def clone(name: Annotated[str, Form()], recording: UploadFile) -> dict[str, str | None]:
        with tempfile.TemporaryDirectory() as folder:
            upload = Path(folder, "upload").with_suffix(Path(recording.filename or "").suffix)
            upload.write_bytes(await recording.read())
            try:
                voice = await app.state.kling.clone_voice(name, voice_file=upload)
            except (SampleError, ValueError) as error:  # the caller's recording or name
                raise HTTPException(400, str(error)) from None
            except KlingError as error:
                raise HTTPException(502, str(error)) from None
        return {"voice_id": voice.voice_id, "trial_url": voice.trial_url}

    return app
