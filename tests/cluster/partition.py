"""The driver of tests/cluster/test_network.py: rounds over two hosts while the link between them is cut or slow; prints what happened as JSON.

Run inside the first host's network namespace: `partition.py CLUSTER.yaml MODE SECONDS`.
"""

import json
import subprocess
import sys
import threading
import time

import numpy as np

from pavi_scale.config import load_cluster
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.runtime.clusters import open_cluster


class Slow:
    """Tasks that take a tenth of a second, and answers of which every bit counts."""

    threads = 1

    def build(self):
        return self

    def compute(self, kind, state, task):
        time.sleep(task["sleep"])
        return {"y": state["w"] * np.random.default_rng(task["seed"]).standard_normal(state["w"].shape)}


def main(file, mode, seconds):
    found = {"rounds": 0, "left": [], "joined": []}
    cut = threading.Event()

    def disturb():
        if mode == "slow":
            subprocess.run("ip netns exec pv-b tc qdisc add dev pv0 root tbf rate 1mbit burst 16kbit latency 400ms".split(), check=True)
        else:
            subprocess.run("ip -n pv-b link set pv0 down".split(), check=True)
        found["cut"] = time.monotonic()
        time.sleep(seconds)
        if mode == "slow":
            subprocess.run("ip netns exec pv-b tc qdisc del dev pv0 root".split(), check=True)
        else:
            subprocess.run("ip -n pv-b link set pv0 up".split(), check=True)
        found["healed"] = time.monotonic()
        cut.set()

    def look():
        for event in engine.meter.news():
            if event["event"] == "worker left":
                found["left"].append(time.monotonic() - found.get("cut", float("inf")))
            elif event["event"] == "worker joined":
                found["joined"].append(time.monotonic() - found.get("healed", float("inf")))

    oracle = LocalEngine(Slow())
    with open_cluster(load_cluster(file)) as client, DaskEngine(client, Slow()) as engine:
        client.wait_for_workers(2, timeout=120)
        thread, until, sizes = threading.Thread(target=disturb, daemon=True), None, []
        while until is None or time.monotonic() < until:
            if not thread.is_alive() and until is None and len(engine.meter.snapshot(time.monotonic()).get("waiting_of", {})) == 2 and "cut" not in found:
                thread.start()
            if cut.is_set() and until is None and len(engine.meter.snapshot(time.monotonic()).get("waiting_of", {})) == 2:
                until = time.monotonic() + 2.0  # both are back: a little more, so that late messages arrive
            if "healed" in found and time.monotonic() - found["healed"] > 150:
                break
            state = {"w": np.arange(4000.0) + found["rounds"]}
            tasks = [{"seed": found["rounds"] * 10 + i, "sleep": 0.1} for i in range(6)]
            answers = engine.round("slow", state, tasks)
            truth = oracle.round("slow", state, [t | {"sleep": 0.0} for t in tasks])
            if [a["y"].tobytes() for a in answers] != [a["y"].tobytes() for a in truth]:
                raise SystemExit("other bits")
            found["rounds"] += 1
            sizes.append(len(tasks))
            look()
        found |= {"asked": sum(sizes), "taken": engine.meter.tasks, "ignored": engine.ignored, "workers": engine.meter.snapshot(time.monotonic())["workers"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
