"""Turns of the loop: who is about to compute has one that nobody else of the stores has."""

from __future__ import annotations

import asyncio

from asyncxfer.store._turns import next_turn


async def test_who_asks_has_a_turn_of_their_own_in_order() -> None:
    loop = asyncio.get_running_loop()
    turn = 0
    counting: asyncio.Handle | None = None
    given: dict[int, int] = {}

    def count() -> None:
        nonlocal turn, counting
        turn += 1
        counting = loop.call_soon(count)

    async def ask(number: int) -> None:
        await next_turn()
        given[number] = turn

    count()
    tasks = [asyncio.create_task(ask(number)) for number in range(6)]
    await asyncio.sleep(0)
    tasks[2].cancel()  # its turn goes to the next
    await asyncio.wait(tasks)
    await next_turn()
    assert counting is not None
    counting.cancel()
    assert list(given) == [0, 1, 3, 4, 5]
    assert len(set(given.values())) == 5
