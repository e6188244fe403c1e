"""Clients that ask a service at the same time, one text a request; prints how fast they were answered, as JSON.

Each client sends its next request when the last one is answered, over a connection that stays open.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import pyarrow.parquet as pq


async def ask_all(url: str, texts: list[str], clients: int) -> dict[str, Any]:
    left, statuses, seconds = iter(texts), Counter[int](), list[float]()

    async def client() -> None:
        async with aiohttp.ClientSession() as session:
            for text in left:
                start = time.perf_counter()
                async with session.post(f"{url}/v1/translate", json={"text": text}) as answer:
                    await answer.read()
                statuses[answer.status] += 1
                if answer.status == 200:
                    seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - start
    percentiles = statistics.quantiles(seconds, n=100)
    return {
        "requests_per_s": statuses[200] / took,
        "p50_s": percentiles[49],
        "p99_s": percentiles[98],
        "statuses": dict(statuses),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    texts = pq.read_table(asked["rows"])["text"].to_pylist()[: asked["limit"]]
    found = asyncio.run(ask_all(asked["url"], texts, asked["clients"]))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
