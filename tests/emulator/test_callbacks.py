"""Callbacks: when they come, in which shape, how they are signed, and how they go astray."""

import asyncio
import time
from itertools import count

from standardwebhooks import Webhook

from kling_voice.emulator.callbacks import sign

from .support import inbox, serving, until

SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="


def test_the_vendors_published_vector() -> None:
    """The signature of the vendor's own example is the one it published."""
    body = (
        b'{"id":"1234567890","status":"succeeded","message":"",'
        b'"create_time":1781080778802,"update_time":1781080794151}'
    )
    signature = sign(SECRET, "9876543210", 1781080794, body)
    assert signature == "v1,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ4="


async def test_each_change_of_status_is_told() -> None:
    """The task object itself is posted as it is submitted, processing and done, when it is so."""
    async with inbox() as box, serving(task_seconds=9) as api:
        task_id = (await api.create(callback_url=box.url, external_task_id="mine")).data["task_id"]
        await box.until(1)
        api.emu.advance(2)
        await box.until(2)
        api.emu.advance(7)
        await box.until(3)
        assert [body["task_status"] for body in box.bodies] == [
            "submitted",
            "processing",
            "succeed",
        ]
        assert box.bodies[-1] == (await api.get(task_id)).data
        assert all(body["task_info"] == {"external_task_id": "mine"} for body in box.bodies)
        headers = box.received[0][0]
        assert headers["Content-Type"] == "application/json"
        assert not any(name.lower().startswith("webhook-") for name in headers)
        await until(lambda: api.emu.callbacks["delivered"] == 3)
        assert api.emu.callbacks["sent"] == 3


async def test_without_a_callback_url_nothing_is_sent() -> None:
    """Only those who ask are told."""
    async with serving() as api:
        await api.voice()
        await asyncio.sleep(0.02)
        assert api.emu.callbacks == {}


async def test_a_failure_is_told_with_its_reason() -> None:
    """The last callback of a failed task says failed and why, in both shapes."""
    for shape, status, message in [
        ("legacy", "task_status", "task_status_msg"),
        ("new", "status", "message"),
    ]:
        async with (
            inbox() as box,
            serving(fail_when=lambda body: "noisy", callback_shape=shape) as api,
        ):
            await api.voice(callback_url=box.url)
            await box.until(3)
            last = box.bodies[-1]
            assert (last[status], last[message]) == ("failed", "noisy")


async def test_the_new_shape() -> None:
    """The newer shape has other names, spells the end succeeded, and lists outputs."""
    async with inbox() as box, serving(callback_shape="new") as api:
        task = await api.voice(callback_url=box.url, external_task_id="mine")
        await box.until(3)
        first, _, last = box.bodies
        (voice,) = task["task_result"]["voices"]
        assert first["status"] == "submitted"
        assert (first["outputs"], first["billing"]) == ([], [])
        assert last["id"] == task["task_id"]
        assert last["status"] == "succeeded"
        assert last["external_id"] == "mine"
        assert (last["create_time"], last["update_time"]) == (
            task["created_at"],
            task["updated_at"],
        )
        assert last["outputs"] == [
            {
                "type": "voice",
                "id": voice["voice_id"],
                "name": voice["voice_name"],
                "url": voice["trial_url"],
                "owned_by": voice["owned_by"],
                "status": "succeeded",
            }
        ]
        assert last["billing"]


async def test_with_a_secret_callbacks_are_signed() -> None:
    """The signature is good by the standardwebhooks library; each event has an id of its own."""
    async with inbox() as box, serving(webhook_secret=SECRET) as api:
        await api.voice(callback_url=box.url)
        await box.until(3)
        for headers, body in box.received:
            lowered = {name.lower(): value for name, value in headers.items()}
            Webhook(SECRET).verify(body, lowered)
            assert abs(int(lowered["webhook-timestamp"]) - time.time()) < 5
        assert len({headers["webhook-id"] for headers, _ in box.received}) == 3


async def test_a_refused_callback_is_tried_again() -> None:
    """Without a 2xx the same event is sent again, newly signed, and given up at last."""
    async with (
        inbox(lambda number: 500 if number < 3 else 204) as box,
        serving(webhook_secret=SECRET) as api,
    ):
        await api.create(callback_url=box.url)
        await until(lambda: api.emu.callbacks["delivered"] == 1)
        assert len({headers["webhook-id"] for headers, _ in box.received}) == 1
        assert api.emu.callbacks["sent"] == 3
    async with inbox(lambda number: 302) as box, serving() as api:
        await api.create(callback_url=box.url)
        await until(lambda: api.emu.callbacks["failed"] == 1)
        assert len(box.received) == 3


async def test_a_receiver_that_is_not_there_is_given_up() -> None:
    """Nobody listens at the callback_url: the task lives on all the same."""
    async with serving(time_scale=1.0) as api:
        await api.voice(callback_url="http://127.0.0.1:1/hook")
        await until(lambda: api.emu.callbacks["failed"] == 3)
        assert api.emu.callbacks["sent"] == 9


async def test_callbacks_may_repeat() -> None:
    """A repeated callback has the same webhook-id and the same body."""
    async with inbox() as box, serving(callback_repeat=1.0, webhook_secret=SECRET) as api:
        await api.voice(callback_url=box.url)
        await box.until(6)
        ids = [headers["webhook-id"] for headers, _ in box.received]
        assert len(set(ids)) == 3
        assert ids[0] == ids[1]
        assert box.received[0][1] == box.received[1][1]
        assert api.emu.callbacks["repeated"] == 3


async def test_callbacks_may_be_lost() -> None:
    """A dropped callback never comes."""
    async with inbox() as box, serving(callback_drop=1.0) as api:
        await api.voice(callback_url=box.url)
        await asyncio.sleep(0.02)
        assert box.received == []
        assert api.emu.callbacks == {"dropped": 3}


async def test_callbacks_may_overtake_each_other() -> None:
    """A reordered callback comes after the task's next one; the end has none after it."""
    async with inbox() as box, serving(callback_reorder=1.0, task_seconds=9) as api:
        await api.voice(callback_url=box.url)
        await box.until(3)
        statuses = [body["task_status"] for body in box.bodies]
        assert statuses.index("processing") > statuses.index("succeed")
        assert api.emu.callbacks["reordered"] == 2


async def test_astray_is_seeded() -> None:
    """What is lost and repeated is the same in every run."""

    async def run() -> dict[str, int]:
        options = {"callback_repeat": 0.3, "callback_drop": 0.3, "callback_reorder": 0.3}
        async with inbox() as box, serving(**options) as api:
            for _ in range(20):
                await api.create(callback_url=box.url)
            counts = api.emu.callbacks
            return {name: counts[name] for name in ("dropped", "repeated", "reordered")}

    first = await run()
    assert await run() == first
    assert all(first.values())


async def test_callbacks_come_by_the_clock() -> None:
    """With a running clock they come by themselves, each task's in order, many at a time."""
    async with inbox() as box, serving(task_seconds=5, time_scale=50) as api:
        for _ in range(50):
            await api.create(callback_url=box.url)
        await box.until(150)
        seen: dict[str, list[str]] = {}
        for body in box.bodies:
            seen.setdefault(body["task_id"], []).append(body["task_status"])
        assert all(words == ["submitted", "processing", "succeed"] for words in seen.values())


async def test_an_earlier_callback_is_not_kept_waiting_by_a_later_one() -> None:
    """The timer looks again when a task is created that ends before all others."""
    lives = count(1)

    def life(number: int) -> float:
        return 100.0 if next(lives) == 1 else 0.05

    async with inbox() as box, serving(task_seconds=life, time_scale=1.0) as api:
        await api.create(callback_url=box.url)
        await box.until(1)
        await api.create(callback_url=box.url)
        await box.until(4)
        assert box.bodies[-1]["task_status"] == "succeed"


async def test_a_deaf_receiver_delays_no_other() -> None:
    """However many callbacks hang at one server, those of another one come on time."""
    hangs = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hangs.wait()
        writer.close()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with inbox() as box, serving(task_seconds=0.0) as api:
        for number in range(60):
            await api.create(callback_url=url if number < 40 else box.url)
        await box.until(60)
        await until(lambda: api.emu.callbacks["delivered"] == 60)
        assert api.emu.callbacks["failed"] == 0  # those at the other one still hang
    hangs.set()
    server.close()
