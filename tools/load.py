"""Clients of a server on this machine: `python -m tools.load PORT NUMBER SECONDS FILE`; it imports nothing large.

The file is a JSON list of {"text": …, "scores": {label: probability}}: what is asked, and what the model answers alone.
"""
import asyncio
import json
import sys
import time
from pathlib import Path


def request(body: bytes, length: int | None = None) -> bytes:
    """A request as it is sent; the length may be that of a longer body."""
    size = len(body) if length is None else length
    head = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {size}"]
    return "\r\n".join([*head, "", ""]).encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict]:
    """The next response: status and JSON."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].partition("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def client(port: int, texts: list[dict], first: int, end: float, found: dict) -> None:
    """Ask text after text, and compare with what the model answers alone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    position = first
    while time.perf_counter() < end:
        wanted = texts[position % len(texts)]
        position += 1
        start = time.perf_counter()
        try:
            writer.write(request(json.dumps({"texts": wanted["text"]}).encode()))
            status, data = await asyncio.wait_for(answer(reader), 60)
        except (OSError, EOFError, TimeoutError):
            found["lost"] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        if status != 200: found["lost"] += 1
        else:
            found["ms"].append(1000 * (time.perf_counter() - start))
            found["mixed"] += any(abs(data["scores"][0][name] - p) > 0.05 for name, p in wanted["scores"].items())
    writer.close()


async def run_clients(port: int, number: int, seconds: float, file: str) -> None:
    """So many clients at once; prints what they found."""
    texts, found = json.loads(Path(file).read_text("utf8")), {"ms": [], "lost": 0, "mixed": 0}
    end = time.perf_counter() + seconds
    step = len(texts) // number
    start = time.perf_counter()
    await asyncio.gather(*(client(port, texts, i * step, end, found) for i in range(number)))
    print(json.dumps(found | {"rate": len(found["ms"]) / (time.perf_counter() - start)}))


if __name__ == "__main__":
    port, number, seconds, file = sys.argv[1:]
    asyncio.run(run_clients(int(port), int(number), float(seconds), file))
