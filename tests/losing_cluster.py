"""A Ray cluster that loses a node in the middle of a run: `losing_cluster.py OUT COMMAND...`; it exits as that does.

The command, `dfpir restore` over many pictures, gets the cluster's address from RAY_ADDRESS.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def main(out: Path, command: list[str]) -> int:
    """Starts a head without CPUs and two nodes with one each; ends one of them once both work."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # beside other tests, workers that are nice hardly get to run
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    run = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"})
    try:
        while run.poll() is None and not _both_work(out):
            time.sleep(0.02)
        if run.poll() is not None:
            print("the run ended before a node was lost", file=sys.stderr)
            return 99
        cluster.remove_node(nodes[1], allow_graceful=False)
        return run.wait(timeout=300)
    finally:
        run.kill()
        cluster.shutdown()


def _both_work(out: Path) -> bool:
    """Whether two workers have shards in hand, and images are there."""
    in_hand = list((out / "logs" / "journal").glob("*.lock"))
    return len(in_hand) >= 2 and len(list((out / "images").glob("*.png"))) >= 10


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
