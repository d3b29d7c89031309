"""A bad cable for TCP: every connection redirected to it is passed on late, with segments lost, or broken off.

What a user program can do to a stream: it holds a chunk back as long as TCP would until a lost segment has come again
(200 ms, doubled as long as it is lost again), or it resets the connection. Drawn from the seed, the number of the
connection and the number of the chunk, so the same traffic meets the same losses.

    slow_link.py PORT DELAY_MS LOSS CUT SEED
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import struct
import sys
from collections.abc import Iterator

SO_ORIGINAL_DST = 80
RETRANSMISSION_SECONDS = 0.2


def waiting_time(seed: str, loss: float, delay: float) -> float:
    """How late a chunk is."""
    dice = random.Random(seed)  # noqa: S311 - to be had again, not secret
    late, timeout = delay, RETRANSMISSION_SECONDS
    while dice.random() < loss and timeout < 30:
        late += timeout
        timeout *= 2
    return late


def breaks_after(seed: str, cut: float) -> int | None:
    """The number of the chunk at which a connection breaks, if it does."""
    dice = random.Random(seed)  # noqa: S311
    return dice.randrange(1, 20) if dice.random() < cut else None


class Cable:
    def __init__(self, delay: float, loss: float, cut: float, seed: int) -> None:
        self.delay, self.loss, self.cut, self.seed = delay, loss, cut, seed
        self.numbers = itertools.count()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self.numbers)
        there = address_before_redirect(writer.get_extra_info("socket"))
        try:
            # From the loopback: a service that listens to some addresses alone listens to its own machine.
            far_reader, far_writer = await asyncio.open_connection(*there, local_addr=("127.0.0.1", 0))
        except OSError:
            reset(writer)
            return
        chunks = itertools.count()
        end = breaks_after(f"{self.seed}/{number}", self.cut)
        ways = [
            asyncio.ensure_future(self.carry(reader, far_writer, f"{self.seed}/{number}/in", chunks, end)),
            asyncio.ensure_future(self.carry(far_reader, writer, f"{self.seed}/{number}/out", chunks, end)),
        ]
        broken = False
        waiting = set(ways)
        while waiting and not broken:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            broken = any(way.exception() is not None or way.result() for way in done)
        for way in waiting:
            way.cancel()
        for side in (writer, far_writer):
            if broken:
                reset(side)
            else:
                side.close()

    async def carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        seed: str,
        chunks: Iterator[int],
        end: int | None,
    ) -> bool:
        """Whether the connection broke."""
        # Late, not slow: what is on its way does not keep the next from setting out.
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def arrive() -> None:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        arriving = asyncio.ensure_future(arrive())
        try:
            for number in itertools.count():
                data = await reader.read(1460 * 16)
                if end is not None and next(chunks) >= end:
                    return True
                late = waiting_time(f"{seed}/{number}", self.loss, self.delay)
                on_the_way.put_nowait((loop.time() + late, data))
                if not data:
                    break
            await arriving
        finally:
            arriving.cancel()
        return False


def address_before_redirect(connection: socket.socket) -> tuple[str, int]:
    found = connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
    port, address = struct.unpack("!2xH4s8x", found)
    return socket.inet_ntoa(address), port


def reset(writer: asyncio.StreamWriter) -> None:
    """The end of a connection that broke: no goodbye."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main(words: list[str]) -> None:
    port, delay, loss, cut, seed = words
    cable = Cable(int(delay) / 1000, float(loss), float(cut), int(seed))
    server = await asyncio.start_server(cable.connected, "0.0.0.0", int(port))  # noqa: S104 - redirected to
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
