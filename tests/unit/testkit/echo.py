"""A worker that says twice what it was ordered, waits, and says that it has finished; `python -m` runs it."""

import asyncio
import sys

from testkit.workers import ordered, report


async def main() -> int:
    async with ordered() as (order, finish):
        if order == b"refuse\n":
            return 3
        report()
        report(order.strip())
        report(order.strip())
        if order == b"fail\n":
            return 4
        await finish.wait()
        report(b"finished")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
