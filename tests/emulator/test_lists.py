"""Lists: their order, their pages, and what they do not show yet."""

import time

import pytest

from .support import VOICES, Api, serving


async def names(api: Api, query: str = "") -> list[str]:
    """The names that a page shows."""
    ids = {task.task_id: task.voice_name for task in api.emu.tasks}
    return [ids[task["task_id"]] for task in await api.page(query)]


async def fill(api: Api, count: int) -> list[str]:
    """Create voices called 0, 1, 2 and so on."""
    for number in range(count):
        await api.create(str(number))
    return [str(number) for number in range(count)]


async def test_the_newest_come_first_in_pages() -> None:
    """Pages cut the list, newest first; beyond its end there is nothing."""
    async with serving() as api:
        made = await fill(api, 7)
        assert await names(api) == made[::-1]
        assert await names(api, "?pageNum=1&pageSize=3") == ["6", "5", "4"]
        assert await names(api, "?pageNum=3&pageSize=3") == ["0"]
        assert await names(api, "?pageNum=4&pageSize=3") == []
        assert await names(api, "?pageNum=1000&pageSize=1000") == []


async def test_the_default_page_has_thirty() -> None:
    """Without parameters a page holds 30 tasks."""
    async with serving() as api:
        api.emu.preload(31)
        assert len(await api.page()) == 30
        assert len(await api.page("?pageNum=2")) == 1


async def test_the_list_may_be_ordered_otherwise() -> None:
    """The order is not documented: the oldest may come first, or none."""
    async with serving(list_order="oldest") as api:
        made = await fill(api, 5)
        assert await names(api, "?pageSize=3") == made[:3]
    async with serving(list_order="shuffled") as api:
        made = await fill(api, 12)
        shown = await names(api, "?pageSize=6") + await names(api, "?pageSize=6&pageNum=2")
        assert sorted(shown, key=int) == made
        assert shown not in (made, made[::-1])


@pytest.mark.parametrize(
    "query",
    [
        "pageNum=0",
        "pageNum=1001",
        "pageNum=-1",
        "pageNum=x",
        "pageNum=",
        "pageSize=0",
        "pageSize=1001",
        "pageSize=1.5",
        "pageSize=%FF",
        "pageSize=99999999999",
    ],
)
async def test_a_page_out_of_bounds_is_1201(query: str) -> None:
    """Each bound is told by name."""
    async with serving() as api:
        reply = await api.call("GET", f"{VOICES}?{query}")
        assert reply.verdict == (400, 1201)
        assert "between 1 and 1000" in reply.message


async def test_a_server_may_refuse_large_pages() -> None:
    """A lower cap refuses what is over it and names itself; the default fits."""
    async with serving(page_cap=20) as api:
        api.emu.preload(40)
        reply = await api.call("GET", f"{VOICES}?pageSize=21")
        assert reply.verdict == (400, 1201)
        assert "between 1 and 20" in reply.message
        assert len(await api.page("?pageSize=20")) == 20
        assert len(await api.page()) == 20
        api.emu.page_cap = 40
        assert len(await api.page("?pageSize=40")) == 40


async def test_a_server_may_cut_large_pages() -> None:
    """With page_clamp a page over the cap is cut without a word."""
    async with serving(page_cap=10, page_clamp=True) as api:
        api.emu.preload(25)
        assert len(await api.page("?pageSize=1000")) == 10
        assert len(await api.page("?pageSize=5")) == 5
        assert len(await api.page("?pageSize=1000&pageNum=3")) == 5
        assert (await api.call("GET", f"{VOICES}?pageSize=0")).verdict == (400, 1201)


async def test_reads_may_lag_behind_writes() -> None:
    """During the lag neither query nor list shows a task, and its id is taken all the same."""
    async with serving(read_lag=2.0) as api:
        api.emu.preload(1)
        task_id = (await api.create(external_task_id="mine")).data["task_id"]
        assert (await api.get(task_id)).verdict == (404, 1203)
        assert (await api.get("mine")).verdict == (404, 1203)
        assert len(await api.page()) == 1
        assert (await api.create(external_task_id="mine")).verdict == (400, 1201)
        api.emu.advance(2)
        assert (await api.get("mine")).data["task_id"] == task_id
        assert (await api.page())[0]["task_id"] == task_id
        api.emu.read_lag = 0
        assert (await api.get((await api.create()).data["task_id"])).verdict == (200, 0)
        assert api.emu.read_lag == 0


async def test_foreign_tasks_fill_the_list() -> None:
    """Preloaded tasks are finished and listed, and are not counted as created."""
    async with serving() as api:
        api.emu.preload(3)
        await api.create()
        api.emu.preload(2)
        statuses = [task["task_status"] for task in await api.page()]
        assert statuses == ["succeed", "succeed", "submitted", "succeed", "succeed", "succeed"]
        assert (api.emu.created, api.emu.in_flight) == (1, 1)
        assert [task.number for task in api.emu.tasks] == [0, 0, 0, 1, 0, 0]


async def test_a_large_page_is_cheap() -> None:
    """A page of a thousand is rendered once and then joined: a few milliseconds."""
    async with serving() as api:
        api.emu.preload(20_000)
        await api.page("?pageSize=1000")
        started = time.process_time()
        for _ in range(10):
            reply = await api.call("GET", f"{VOICES}?pageSize=1000")
        assert (time.process_time() - started) / 10 < 0.05
        assert len(reply.data) == 1000
