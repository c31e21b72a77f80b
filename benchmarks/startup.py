"""How long a user waits for an import or a command line to answer, beside an empty Python and beside peft.

    python benchmarks/startup.py [runs]

Each round runs every command once, so that a busy moment of the machine meets all of them; the first round only warms
the file cache and is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "workbench --help": ["-m", "workbench", "--help"],
    "import workbench.adapters": ["-c", "import workbench.adapters"],
    "import peft": ["-c", "import peft"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(runs: int) -> None:
    rounds = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(runs + 1)][1:]
    table = Table("command", "median s", "fastest s", "slowest s", title=f"wall time of {runs} runs each")
    for name in COMMANDS:
        times = [times[name] for times in rounds]
        table.add_row(name, *(f"{f(times):.2f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
