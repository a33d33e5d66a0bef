"""Asks one path of a service again and again, as a process: `python -m benchmarks.service_prober URL SECONDS EVERY_S`.

A process of its own, because what a busy client's event loop adds to a time is not the service's. Prints one JSON line:
the seconds of each answer, and how many were not 200.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from urllib.parse import urlsplit

TIMEOUT_S = 30.0


def main() -> None:
    url, seconds, every_s = urlsplit(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
    taken: list[float] = []
    bad = 0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        connection.request("GET", url.path)
        answer = connection.getresponse()
        answer.read()
        taken.append(time.perf_counter() - start)
        bad += answer.status != http.HTTPStatus.OK
        time.sleep(every_s)
    connection.close()
    print(json.dumps({"seconds": taken, "bad": bad}))


if __name__ == "__main__":
    main()
