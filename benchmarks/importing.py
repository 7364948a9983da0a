"""What `import asyncxfer` costs over `import numpy`, in fresh interpreters with compiled bytecode.

python benchmarks/importing.py
"""

import os
import statistics
import subprocess
import sys
import tempfile

COST = """
import time
import numpy
start = time.perf_counter()
import asyncxfer
print(time.perf_counter() - start)
"""
ROUNDS = 15


def main() -> None:
    """Print the median and the best of some rounds."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache
        runs = [
            float(subprocess.run([sys.executable, "-c", COST], env=environment, capture_output=True, check=True).stdout)
            for _ in range(ROUNDS + 1)
        ][1:]  # the first one compiles
    print(f"median {statistics.median(runs) * 1e3:.0f} ms, best {min(runs) * 1e3:.0f} ms of {ROUNDS}")


if __name__ == "__main__":
    main()
