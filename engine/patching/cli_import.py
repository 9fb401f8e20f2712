"""`python -m scripts.patch import`: flags, and what is printed. The work is upstream.py's."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.patching.artefact_files import write
from engine.patching.upstream import import_upstream, recover_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `import`."""
    parser.add_argument("upstream", type=Path, metavar="DIR", help="directory of pickles that upstream's code saved")
    parser.add_argument("--base", type=Path, metavar="DIR",
                        help="the base tokenizer's folder (default: the one inside, written to OUT)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT",
                        help="where to write: the artefact, or without --base a tokenizer with it in OUT/patch")


def run(args: argparse.Namespace) -> int:
    """Import. With --base: the artefact alone, in OUT. Without: a tokenizer folder, the artefact in OUT/patch."""
    base = args.base if args.base is not None else recover_base(args.upstream, args.out)
    artefact = import_upstream(args.upstream, base)
    place = args.out if args.base is not None else args.out / "patch"
    write(artefact, place)
    print(f"{place}: {artefact.vocab_size} ids, {len(artefact.removed)} removed, {len(artefact.ngrams)} n-grams; "
          f"sha256 {artefact.sha256}")
    return 0
