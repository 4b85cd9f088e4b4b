"""The five calls: their envelope, their validation, and what they answer."""

import time
from io import BytesIO
from typing import Any

import pytest
from yarl import URL

from kling_voice.emulator import Emulator

from .support import DELETE, PRESETS, SAMPLE, VOICES, serving


async def test_every_answer_is_an_envelope_with_its_own_request_id() -> None:
    """Success or not: code, message and a fresh request_id."""
    async with serving() as api:
        replies = [await api.create(), await api.create(""), await api.get("1")]
        ids = {reply.envelope["request_id"] for reply in replies}
        assert len(ids) == 3
        assert all(reply.message for reply in replies)
        assert [reply.envelope["code"] for reply in replies] == [0, 1201, 1203]


async def test_a_create_answers_a_submitted_task() -> None:
    """A create answers the task, with the caller's id and times in milliseconds."""
    async with serving() as api:
        task = (await api.create("Ada", external_task_id="mine")).data
        assert task["task_status"] == "submitted"
        assert task["task_info"] == {"external_task_id": "mine"}
        assert task["created_at"] == task["updated_at"]
        assert task["created_at"] / 1000 == pytest.approx(time.time(), abs=5)
        assert api.emu.created == 1
        assert set(task) == {"task_id", "task_status", "task_info", "created_at", "updated_at"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
@pytest.mark.parametrize("path", [VOICES, DELETE])
async def test_a_body_that_is_no_object_is_1200(path: str, body: bytes) -> None:
    """Bytes that are not a JSON object are refused, whatever they are."""
    async with serving() as api:
        assert (await api.call("POST", path, body=body)).verdict == (400, 1200)


async def test_a_body_that_is_too_large_is_1200() -> None:
    """A body beyond all reason is refused without being kept."""
    async with serving() as api:
        assert (await api.call("POST", VOICES, body=BytesIO(b" " * (2 << 20)))).verdict == (
            400,
            1200,
        )


@pytest.mark.parametrize("path", [VOICES, DELETE])
async def test_a_missing_required_field_is_1200(path: str) -> None:
    """A body without voice_name or voice_id is refused by the name of what it lacks."""
    async with serving() as api:
        for body in [{}, {"voice_name": None, "voice_id": None}]:
            reply = await api.call("POST", path, json=body)
            assert reply.verdict == (400, 1200)
            assert "voice_" in reply.message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"voice_name": ""}, "voice_name"),
        ({"voice_name": "x" * 21}, "voice_name"),
        ({"voice_name": 7}, "voice_name"),
        ({"voice_name": "\ud800"}, "voice_name"),
        ({"voice_url": None}, "voice_url"),
        ({"voice_url": SAMPLE, "video_id": "7"}, "video_id"),
        ({"voice_url": "ftp://example.com/a.mp3"}, "voice_url"),
        ({"voice_url": "https:///a.mp3"}, "voice_url"),
        ({"voice_url": "http://[::1/a.mp3"}, "voice_url"),
        ({"voice_url": "http://h:99999/a.mp3"}, "voice_url"),
        ({"voice_url": "https://example.com/a b.mp3"}, "voice_url"),
        ({"voice_url": ["https://example.com/a.mp3"]}, "voice_url"),
        ({"video_id": 7}, "video_id"),
        ({"callback_url": "nowhere"}, "callback_url"),
        ({"external_task_id": 7}, "external_task_id"),
    ],
)
async def test_an_invalid_value_is_1201(fields: dict[str, Any], told: str) -> None:
    """Each invalid value of a create is refused by the name of its field; nothing is created."""
    async with serving() as api:
        reply = await api.create(**fields)
        assert reply.verdict == (400, 1201)
        assert told in reply.message
        assert api.emu.created == 0


async def test_the_longest_name_counts_characters() -> None:
    """Twenty characters fit, of whatever script."""
    async with serving() as api:
        assert (await api.create("声" * 20)).verdict == (200, 0)
        assert (await api.create("😀" * 20)).verdict == (200, 0)
        assert (await api.voice(voice_name="Zoë"))["task_result"]["voices"][0][
            "voice_name"
        ] == "Zoë"


async def test_empty_optional_fields_count_as_absent() -> None:
    """An empty string is as good as nothing, as it is to the vendor."""
    async with serving() as api:
        for _ in range(2):
            reply = await api.create(video_id="7", voice_url="", external_task_id="", extra=1)
            assert reply.data["task_info"] == {}


async def test_a_taken_external_id_is_1201() -> None:
    """An external id is given once: the second create is refused and makes nothing."""
    async with serving() as api:
        await api.create(external_task_id="mine")
        reply = await api.create("Bob", external_task_id="mine")
        assert reply.verdict == (400, 1201)
        assert "already exist" in reply.message
        assert api.emu.created == 1


async def test_an_external_id_can_be_held_by_something_else() -> None:
    """An id of another product is a duplicate to a create, and nothing to a query."""
    async with serving() as api:
        api.emu.reserve_external_id("a video's")
        assert (await api.create(external_task_id="a video's")).verdict == (400, 1201)
        assert (await api.get("a video's")).verdict == (404, 1203)


@pytest.mark.parametrize("external", ["plain", "a/b", "ü 声", "a%2Fb", "..", "?x#y", "a+b"])
async def test_a_query_takes_either_id(external: str) -> None:
    """A task is found by its task_id and by its external id, one encoded path segment."""
    async with serving() as api:
        task_id = (await api.create(external_task_id=external)).data["task_id"]
        if external != "..":  # no HTTP client sends it as it is
            assert (await api.get(external)).data["task_id"] == task_id
        assert (await api.get(task_id)).data["task_info"]["external_task_id"] == external


async def test_an_unknown_task_is_1203() -> None:
    """A query for nothing is told so."""
    async with serving() as api:
        assert (await api.get("nobody")).verdict == (404, 1203)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", VOICES),
        ("DELETE", f"{VOICES}/1"),
        ("GET", f"{VOICES}/"),
        ("GET", f"{VOICES}/1/2"),
        ("GET", DELETE),
        ("POST", PRESETS),
        ("GET", "/v1/general/nothing"),
    ],
)
async def test_what_there_is_not_is_1202(method: str, path: str) -> None:
    """Other methods and paths are invalid."""
    async with serving() as api:
        assert (await api.call(method, path)).verdict == (404, 1202)


async def test_the_official_library_is_listed_in_pages() -> None:
    """Presets are owned by kling and bear neither task_info nor deductions."""
    async with serving() as api:
        first = (await api.call("GET", f"{PRESETS}?pageNum=1&pageSize=7")).data
        second = (await api.call("GET", f"{PRESETS}?pageNum=2&pageSize=7")).data
        everything = (await api.call("GET", PRESETS)).data
        assert first + second == everything
        assert len(first) == 7
        for task in everything:
            assert task["task_status"] == "succeed"
            assert not {"task_info", "final_unit_deduction"} & set(task)
            (voice,) = task["task_result"]["voices"]
            assert voice["owned_by"] == "kling"
        async with api.session.get(voice["trial_url"]) as trial:
            assert (trial.status, trial.content_type) == (200, "audio/mpeg")
        assert (await api.call("GET", f"{PRESETS}?pageSize=0")).verdict == (400, 1201)


async def test_a_voice_is_deleted_once() -> None:
    """The first delete answers the task, the second one is 1201."""
    async with serving() as api:
        task = await api.voice()
        voice_id = task["task_result"]["voices"][0]["voice_id"]
        deleted = (await api.delete(voice_id)).data
        assert deleted == {"task_id": task["task_id"], "task_status": "succeed"}
        again = await api.delete(voice_id)
        assert again.verdict == (400, 1201)
        assert "already" in again.message
        assert api.emu.tasks[0].deleted


async def test_a_delete_may_answer_no_data() -> None:
    """On demand a delete answers an envelope without data, as was seen live."""
    async with serving(delete_data=False) as api:
        task = await api.voice()
        reply = await api.delete(task["task_result"]["voices"][0]["voice_id"])
        assert reply.verdict == (200, 0)
        assert "data" not in reply.envelope


async def test_what_cannot_be_deleted() -> None:
    """Official voices are refused, unknown and unfinished ones are not found."""
    async with serving() as api:
        preset = (await api.call("GET", PRESETS)).data[0]["task_result"]["voices"][0]["voice_id"]
        reply = await api.delete(preset)
        assert reply.verdict == (400, 1201)
        assert "official" in reply.message
        assert (await api.delete("nobody")).verdict == (404, 1203)
        assert (await api.delete("1")).verdict == (404, 1203)
        assert (await api.delete("9" * 5000)).verdict == (404, 1203)
        assert (await api.delete(5)).verdict == (400, 1201)
        await api.create()
        assert (await api.delete(api.emu.tasks[0].voice_id)).verdict == (404, 1203)


async def test_every_request_is_counted_by_its_route() -> None:
    """Counters tell what arrived, whatever came of it."""
    async with serving() as api:
        await api.create()
        await api.create("")
        await api.get("1")
        await api.page()
        await api.call("GET", PRESETS)
        await api.delete("1")
        await api.call("PUT", "/odd")
        assert api.emu.requests == {
            f"POST {VOICES}": 2,
            f"GET {VOICES}/{{id}}": 1,
            f"GET {VOICES}": 1,
            f"GET {PRESETS}": 1,
            f"POST {DELETE}": 1,
            "PUT /odd": 1,
        }
        assert api.emu.refused == {1201: 1, 1203: 2, 1202: 1}


async def test_a_prefix_stands_in_front_of_all_paths() -> None:
    """Behind a gateway the API has a prefix; outside of it answers the gateway."""
    async with serving(prefix="/kling/api") as api:
        assert api.emu.base_url.endswith("/kling/api")
        task = await api.voice()
        async with api.session.get(task["task_result"]["voices"][0]["trial_url"]) as trial:
            assert trial.status == 200
        outside = api.emu.base_url.removesuffix("/kling/api") + VOICES
        async with api.session.get(outside) as response:
            assert (response.status, response.content_type) == (404, "text/html")


async def test_an_unexpected_error_is_an_envelope(caplog: pytest.LogCaptureFixture) -> None:
    """A mistake in the emulator or in a given function is a logged 5000, never a traceback."""

    def broken(number: int) -> float:
        raise RuntimeError("a user's own mistake")

    async with serving(task_seconds=broken) as api:
        assert (await api.create()).verdict == (500, 5000)
        assert "a user's own mistake" in caplog.text
        api.emu.task_seconds = 1.0
        assert api.emu.task_seconds == 1.0
        assert (await api.create()).verdict == (200, 0)


@pytest.mark.parametrize(
    "path", ["/", "/.mp3", "/trials/", "/trials/.mp3", f"/trials/{'9' * 5000}.mp3", "/../x", "/a/b"]
)
async def test_media_that_there_is_not(path: str) -> None:
    """Whatever is asked for under /media/, what is not there is a plain 404."""
    async with serving() as api:
        url = URL(f"{api.emu.base_url}/media{path}", encoded=True)
        async with api.session.get(url) as response:
            assert (response.status, response.content_type) == (404, "text/plain")


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "x"},
        {"prefix": "/x/"},
        {"list_order": "random"},
        {"callback_shape": "odd"},
        {"time_scale": -1},
        {"webhook_secret": "whsec_not base64"},
    ],
)
async def test_contradictory_settings_are_refused(options: dict[str, Any]) -> None:
    """A setting that makes no sense fails where it is made."""
    with pytest.raises(ValueError, match=r"."):
        async with serving(**options):
            pass


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"faults": 0.2}, TypeError),
        ({"task_seconds": -1}, ValueError),
        ({"task_seconds": float("nan")}, ValueError),
        ({"task_seconds": "9"}, TypeError),
        ({"task_seconds": True}, TypeError),
        ({"concurrency_limit": 0}, ValueError),
        ({"concurrency_limit": 2.5}, TypeError),
        ({"concurrency_limit": True}, TypeError),
        ({"fail_when": True}, TypeError),
        ({"credentials": "x"}, TypeError),
        ({"api_key": 5}, TypeError),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(
    options: dict[str, Any], kind: type[Exception]
) -> None:
    """An argument that no request could be answered by is refused at once, by its name."""
    (name,) = options
    with pytest.raises(kind, match=f"^{name} must "):
        Emulator(**options)


def test_a_life_may_be_computed() -> None:
    """A function is as good as a number for task_seconds, and no limit as good as one."""
    assert Emulator(task_seconds=lambda number: 0.1 * number, concurrency_limit=None)
    assert Emulator(task_seconds=0, concurrency_limit=1).concurrency_limit == 1
