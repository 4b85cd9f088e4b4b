"""The life of a task, by a clock that a test drives; and the slots it holds."""

import asyncio

import pytest

from kling_voice.emulator import Emulator

from .support import Api, serving


async def status(api: Api, task_id: str) -> str:
    """The status that a query shows."""
    word = (await api.get(task_id)).data["task_status"]
    assert isinstance(word, str)
    return word


async def test_a_task_succeeds_in_its_time() -> None:
    """A task is submitted, then processing, then succeeds; the list agrees at each step."""
    async with serving(task_seconds=9) as api:
        task_id = (await api.create()).data["task_id"]
        for seconds, word in [(1.3, "submitted"), (0.1, "processing"), (7.5, "processing")]:
            api.emu.advance(seconds)
            assert await status(api, task_id) == word
            assert (await api.page())[0]["task_status"] == word
        assert not api.emu.tasks[0].ended
        api.emu.advance(0.2)
        task = (await api.get(task_id)).data
        assert task["task_status"] == "succeed"
        assert (await api.page()) == [task]
        assert api.emu.tasks[0].ended


async def test_a_success_bears_its_voice_and_its_price() -> None:
    """A succeeded task shows its voice, the units deducted, and when it ended."""
    async with serving(task_seconds=9) as api:
        task = await api.voice(voice_name="Ada", external_task_id="mine")
        (voice,) = task["task_result"]["voices"]
        assert voice["voice_name"] == "Ada"
        assert voice["voice_id"] == api.emu.tasks[0].voice_id
        assert voice["owned_by"] not in ("", "kling")
        assert task["final_unit_deduction"] == "0.05"
        assert set(task["final_balance_deduction"]) == {"quota", "list_price"}
        assert task["task_status_msg"] == ""
        assert task["updated_at"] - task["created_at"] == pytest.approx(9000, abs=5)
        other = await api.voice(voice_name="Bob")
        assert other["task_result"]["voices"][0]["voice_id"] != voice["voice_id"]


async def test_the_trial_plays_a_recording() -> None:
    """trial_url plays sound to anyone, from the end of the task until 30 days later."""
    async with serving() as api:
        await api.create()
        early = f"{api.emu.base_url}/media/trials/{api.emu.tasks[0].task_id}.mp3"
        async with api.session.get(early) as trial:
            assert trial.status == 404
        api.emu.advance(9)
        (task,) = await api.page()
        url = task["task_result"]["voices"][0]["trial_url"]
        assert url == early
        async with api.session.get(url) as trial:
            assert (trial.status, trial.content_type) == (200, "audio/mpeg")
            assert len(await trial.read()) > 10_000
        async with api.session.head(url) as trial:
            assert trial.status == 200
        api.emu.advance(30 * 86400)
        async with api.session.get(url) as trial:
            assert trial.status == 404


async def test_a_task_may_fail_for_a_reason() -> None:
    """What fail_when answers ends the task as failed, and nothing is deducted."""
    async with serving(fail_when=lambda body: body.get("why")) as api:
        task = await api.voice(why="two people speak")
        assert task["task_status"] == "failed"
        assert task["task_status_msg"] == "two people speak"
        assert "task_result" not in task
        assert task["final_unit_deduction"] == "0"
        assert (await api.voice())["task_status"] == "succeed"
        assert [task.failure for task in api.emu.tasks] == ["two people speak", None]
        assert (await api.delete(api.emu.tasks[0].voice_id)).verdict == (404, 1203)
        api.emu.fail_when = None
        assert (await api.voice(why="whatever"))["task_status"] == "succeed"


async def test_each_task_may_take_its_own_time() -> None:
    """task_seconds may be a function of the number of the create."""
    async with serving(task_seconds=lambda number: 10.0 / number) as api:
        for _ in range(3):
            await api.create()
        assert [task.ends - task.created for task in api.emu.tasks] == [10.0, 5.0, 10.0 / 3]
        api.emu.advance(5)
        assert [task.status for task in api.emu.tasks] == ["processing", "succeed", "succeed"]


async def test_a_task_may_be_over_at_once() -> None:
    """A life of no seconds is a success at the first query, and still submitted at the create."""
    async with serving(task_seconds=0) as api:
        task = (await api.create()).data
        assert task["task_status"] == "submitted"
        assert await status(api, task["task_id"]) == "succeed"


async def test_the_good_end_may_be_spelled_otherwise() -> None:
    """Answers may say succeeded, as the vendor's newer endpoints do."""
    async with serving(succeed_word="succeeded") as api:
        assert (await api.voice())["task_status"] == "succeeded"
        assert api.emu.tasks[0].status == "succeed"


async def test_time_may_run_faster() -> None:
    """With a time scale the tasks live faster while the wall clock stays right."""
    async with serving(task_seconds=60, time_scale=1000) as api:
        task_id = (await api.create()).data["task_id"]
        await asyncio.sleep(0.08)
        task = (await api.get(task_id)).data
        assert task["task_status"] == "succeed"
        assert task["updated_at"] - task["created_at"] == pytest.approx(60, abs=2)
        assert api.emu.now() > 60


async def test_time_never_goes_back() -> None:
    """advance takes no negative step."""
    with pytest.raises(ValueError, match="forward"):
        Emulator().advance(-1)


async def test_over_the_limit_a_create_is_1303() -> None:
    """Tasks in flight fill the slots until they end; a refused create makes nothing."""
    async with serving(concurrency_limit=2, task_seconds=lambda number: 5.0 * number) as api:
        await api.create()
        await api.create()
        refused = await api.create()
        assert refused.verdict == (429, 1303)
        assert refused.message == "parallel task over resource pack limit"
        assert "data" not in refused.envelope
        api.emu.advance(5)
        assert (await api.create()).verdict == (200, 0)
        assert (await api.create()).verdict == (429, 1303)
        assert (api.emu.created, api.emu.in_flight, api.emu.max_in_flight) == (3, 2, 2)
        assert api.emu.refused == {1303: 2}


async def test_the_limit_may_change() -> None:
    """The account can be upgraded, cut down, and shared with another process."""
    async with serving(concurrency_limit=1) as api:
        await api.create()
        api.emu.concurrency_limit = 3
        assert (await api.create()).verdict == (200, 0)
        api.emu.occupied = 1
        assert (await api.create()).verdict == (429, 1303)
        api.emu.occupied = 0
        assert (await api.create()).verdict == (200, 0)
        api.emu.concurrency_limit = 1
        assert (await api.create()).verdict == (429, 1303)
        api.emu.concurrency_limit = None
        assert (await api.create()).verdict == (200, 0)
        assert (api.emu.in_flight, api.emu.concurrency_limit, api.emu.occupied) == (4, None, 0)


async def test_a_duplicate_is_told_before_the_limit() -> None:
    """Invalid and duplicate creates are refused as such though no slot is free."""
    async with serving(concurrency_limit=1) as api:
        await api.create(external_task_id="mine")
        assert (await api.create(external_task_id="mine")).verdict == (400, 1201)
        assert (await api.create("")).verdict == (400, 1201)
        assert (await api.create(external_task_id="other")).verdict == (429, 1303)
        assert (await api.get("other")).verdict == (404, 1203)
