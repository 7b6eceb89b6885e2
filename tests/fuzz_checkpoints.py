"""Load saved models with tampered files through every loader, and report faults.

    python tests/fuzz_checkpoints.py --cases 10000 --seed 0 --jobs 2 --report fuzz.json
    python tests/fuzz_checkpoints.py --seed 0 --only 1234            # one case again, with all loaders

A case is a small saved network (CIFAR, ConvNeXt, ResNet, ViT; whole, pruned, in training) with one to three changes to
its config.json, its weights or its directory. Seed and number determine a case. Three or four loaders read it in a
process with an audit hook. These are faults:

================================  ======================================================================================
executed, requested, written      code ran, a server was contacted, a file outside the caches of the process changed
read outside                      a file was opened that only the hostile configuration names
random, other numbers, rounded,   a loaded network has other weights than the file, of another kind, or leaves some of
other kind, left out,             the file out; or no file can be read. The classifier is exempt if the caller asked for
without a file                    a new one.
not finite, negative variance     a loaded network has such weights, or a valid network has such an output
meta, forward, structure          a loaded network has no numbers, cannot run, or has other branches closed or removed
                                  than config.json states
disagree                          two loaders give other outputs for the same images
unbound                           the digest of the loaded weights differs from the digest in config.json
memory, time, died                more than 1.5 GB, more than 20 s, a dead process
traceback                         an unintended error in a frame of this package
message                           an intended error is not one line under 300 characters that names a field or a file;
                                  up to 1 % may be so
judge                             the comparison itself failed on the loaded network
exit                              the load ended the process
================================  ======================================================================================

The exit status is 1 if there was a fault, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from fuzzing.runner import Fuzzer
from fuzzing.summary import Summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed that decides all cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone, with all loaders, and print what happened")
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at the same time")
    parser.add_argument("--minutes", type=float, help="stop after this time and report on the cases so far")
    parser.add_argument("--report", type=Path, help="JSON file for the summary")
    parser.add_argument("--workdir", type=Path, help="empty directory that keeps the cases and the logs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        workdir = options.workdir or Path(temporary)
        with Fuzzer(workdir, options.seed, keep=options.workdir is not None) as fuzzer:
            if options.only is not None:
                return _one(fuzzer, options.only)
            return _many(fuzzer, options)


def _one(fuzzer: Fuzzer, number: int) -> int:
    case = fuzzer.run_case(number, all_loaders=True)
    print(f"case {number}: {case.base}, {'; '.join(case.notes)}")
    for result in case.results:
        print(f"  {result.loader:<24}{result.outcome:<9}{result.seconds:6.2f} s {result.megabytes:6.0f} MB", end="  ")
        print(f"{result.message} at {result.place}" if result.message else "")
    for loader, kind, sentence in case.faults:
        print(f"  fault by {loader}: {kind}: {sentence}")
    return int(bool(case.faults))


def _many(fuzzer: Fuzzer, options: argparse.Namespace) -> int:
    summary, began = Summary(), time.monotonic()
    try:
        for case in fuzzer.run(range(options.first, options.first + options.cases), options.jobs):
            summary.add(case)
            if summary.cases % 100 == 0:
                seconds = time.monotonic() - began
                print(f"{summary.cases} cases, {seconds:.0f} s, {dict(summary.counts)}", file=sys.stderr)
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                break
    except KeyboardInterrupt:
        print("Interrupted; this is the report so far.", file=sys.stderr)
    finally:  # the report is written even if the fuzzer fails
        print(summary.text())
        print(f"\nseed {options.seed}, {time.monotonic() - began:.0f} s with {options.jobs} jobs")
        if options.report is not None:
            tree = {"seed": options.seed, "seconds": round(time.monotonic() - began), **summary.tree()}
            options.report.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return int(not summary.is_clean())


if __name__ == "__main__":
    sys.exit(main())
