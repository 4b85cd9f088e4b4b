"""Tracing without any code of ours: what OpenTelemetry and aiohttp's own traces show."""

from collections.abc import Iterator
from types import SimpleNamespace

import aiohttp
import pytest

from kling_voice import KlingVoiceClient, PollingPolicy
from kling_voice.emulator import Emulator

QUICK = PollingPolicy(initial=0.01, maximum=0.02)


@pytest.fixture
def spans() -> Iterator[list[tuple[str, str]]]:
    """Method and URL of every span that OpenTelemetry's instrumentation of aiohttp records."""
    pytest.importorskip("opentelemetry.instrumentation.aiohttp_client")
    from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = AioHttpClientInstrumentor()
    instrumentor.instrument(tracer_provider=provider)

    def told(span: ReadableSpan) -> tuple[str, str]:
        attributes = span.attributes or {}
        return str(attributes.get("http.method")), str(attributes.get("http.url"))

    class Spans(list[tuple[str, str]]):
        def __iter__(self) -> Iterator[tuple[str, str]]:
            return (told(span) for span in exporter.get_finished_spans())

    yield Spans()
    instrumentor.uninstrument()


async def test_opentelemetry_sees_each_request(spans: list[tuple[str, str]]) -> None:
    """With aiohttp's client instrumented, each of our requests is a span."""
    async with (
        Emulator(task_seconds=0.01) as emulator,
        KlingVoiceClient(emulator.credentials, base_url=emulator.base_url, polling=QUICK) as kling,
    ):
        await kling.clone_voice("Ada", voice_url="https://example.com/ada.mp3")
        seen = list(spans)
        assert len(seen) == sum(emulator.requests.values())
        assert seen[0] == ("POST", f"{emulator.base_url}/v1/general/custom-voices")
        assert {method for method, _ in seen[1:]} == {"GET"}


async def test_the_traces_of_a_borrowed_session_see_each_request() -> None:
    """A session with ``trace_configs`` is all that a user needs for traces of their own."""
    seen: list[str] = []

    async def on_start(
        session: aiohttp.ClientSession,
        context: SimpleNamespace,
        params: aiohttp.TraceRequestStartParams,
    ) -> None:
        seen.append(f"{params.method} {params.url.path}")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(on_start)
    async with (
        Emulator(task_seconds=0.01) as emulator,
        aiohttp.ClientSession(trace_configs=[trace]) as session,
        KlingVoiceClient(
            emulator.credentials, base_url=emulator.base_url, session=session
        ) as kling,
    ):
        task = await kling.create_voice("Ada", voice_url="https://example.com/ada.mp3")
        await kling.get_task(task.task_id)
    assert seen == [
        "POST /v1/general/custom-voices",
        f"GET /v1/general/custom-voices/{task.task_id}",
    ]
