"""The same pipeline, started from Python: `USERS_API_URL=http://... python -m examples.users.producer`."""

import asyncio
from typing import Any

from examples.users.flow import flow

if __name__ == "__main__":
    shared: dict[str, Any] = {"user_ids": list(range(1, 101))}
    completed = asyncio.run(flow.run_on_fleet(shared, workers=4))
    print(f"{completed} of 100 users fetched; the first: {shared['profiles'][1]}, {shared['orders'][1]}")
