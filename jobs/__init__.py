"""Runs of all kinds, their commands, and what comes before and after them."""

import os

from jobs.cpus import available_cpus, bound_cpus

# How often a thread of GNU OpenMP looks whether the others are done before it sleeps. Left at 300,000,
# waiting threads take the core from those that they wait for as soon as another program wants one
# (docs/decisions/0036). The library reads it once, when torch loads it, in this process or in one that it starts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# torch knows nothing of a container's quota: it would have a thread for each CPU of the machine, which all wait for
# those that the kernel has stopped.
if available_cpus() < bound_cpus():
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
