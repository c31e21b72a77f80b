"""The peer's own tests, run offline against workbench.adapters.

    python benchmarks/peer_suite/run.py                    the selection of public.txt.gz, three minutes
    python benchmarks/peer_suite/run.py --all              every test of the peer
    python benchmarks/peer_suite/run.py -k prefix          and any other argument of pytest, or a test file
    python benchmarks/peer_suite/run.py --update           write the number of known failures into docs/compatibility.md

Prints how many tests passed, failed and need a name that we lack, by method and by file, and each failure that
docs/compatibility.md does not list. The exit code is 1 if there is any, 2 if the tests did not run, else 0.

The first run sets everything up (see `prepare.py`): two minutes and 2.2 GB in .peer_suite at the repository's root.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PUBLIC = HERE / "public.txt.gz"

# before anything imports the libraries that read them
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.dont_write_bytecode = True  # or pytest writes its rewritten tests, which are read again after they changed

import pytest  # noqa: E402
from hub_server import serve  # noqa: E402
from known import Known, matching, read, write_counts  # noqa: E402
from prepare import WORK, prepare  # noqa: E402
from recorder import Recorder, Result  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

OUTCOMES = ("passed", "failed", "missing", "skipped")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those for pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--select", type=Path, default=PUBLIC, help="a file of test ids, one a line")
    what.add_argument("--all", action="store_true", help="every test")
    parser.add_argument("--peer", action="store_true", help="test the peer itself: what cannot pass here")
    parser.add_argument("--out", type=Path, help="write the results there, a JSON object a line")
    parser.add_argument("--update", action="store_true", help="write the counts of known failures into the page")
    return parser.parse_known_args()


def selection(file: Path) -> set[str]:
    """The test ids of a file, packed or not."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return set(text.decode().splitlines())


def run_tests(selected: set[str] | None, of_peer: bool, pytest_arguments: list[str]) -> Recorder | None:
    """Run the peer's tests in this process; None if pytest could not."""
    serve(WORK / "hub", WORK / "hf_home")
    sys.path[:0] = [str(ROOT)] if of_peer else [str(HERE / "shim"), str(ROOT)]
    sys.path.append(str(WORK / "site"))
    os.chdir(WORK / "suite")
    recorder = Recorder(selected)
    options = [
        # no configuration but this: the repository's own is for its own tests
        *("-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider", "-q", "--no-header", "--capture=fd"),
        *("--tb=native", "--continue-on-collection-errors"),  # other tracebacks take ten times as long
        *("-W", "ignore::UserWarning", "-W", "ignore::FutureWarning:transformers"),
        *("-W", "ignore::DeprecationWarning:transformers", "--disable-warnings"),
    ]
    code = pytest.main([*options, *(pytest_arguments or ["--no-summary", "tests"])], plugins=[recorder])
    return recorder if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else None


def table(title: str, results: Iterable[Result], rows_of: Callable[[Result], list[str]]) -> Table:
    """Outcomes by row; a test may count in several rows."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for row in rows_of(result):
            counts.setdefault(row, Counter())[result.outcome] += 1
    made = Table(title, *OUTCOMES)
    for row in sorted(counts):
        made.add_row(row, *(str(counts[row][outcome] or "-") for outcome in OUTCOMES))
    return made


def unlisted(failures: list[Result], listed: list[Known]) -> list[str]:
    """What the page does not say: tests that fail and are not listed, and patterns of which more fail than it says."""
    found = [f"{f.outcome} {f.id}\n    {f.why}" for f in failures if matching(f.id, listed) is None]
    counts = Counter(matching(f.id, listed) for f in failures)
    return found + [
        f"{counts[known]} of {known.pattern} fail; the page says {known.count}"
        for known in listed
        if counts[known] > known.count
    ]


def main() -> int:
    """Set up, run, report."""
    options, pytest_arguments = arguments()
    prepare()
    selected = None if options.all else selection(options.select.resolve())
    out = options.out.resolve() if options.out else None
    recorder = run_tests(selected, options.peer, pytest_arguments)
    if recorder is None:
        return 2
    results = list(recorder.results.values())
    if selected and not pytest_arguments:
        absent = sorted(selected - recorder.seen)
        results += [
            Result(test, "missing", why="it was not collected: its parameters depend on ours") for test in absent
        ]
    if out:
        out.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    console = Console(width=120, soft_wrap=True, highlight=False, markup=False)
    console.print(table("method (a test may count for several)", results, lambda r: r.methods or ["(none)"]))
    console.print(table("file", results, lambda r: [r.id.partition("::")[0]]))
    console.print(table("", results, lambda r: ["all"]))
    failures = [result for result in results if result.outcome in ("failed", "missing")]
    if options.update:
        write_counts(PAGE, [failure.id for failure in failures])
    surprises = unlisted(failures, read(PAGE))
    for surprise in surprises:
        console.print(surprise)
    listed = len([f for f in failures if matching(f.id, read(PAGE))])
    console.print(f"{len(failures)} of {len(results)} tests fail, {listed} of them as docs/compatibility.md says.")
    return bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
