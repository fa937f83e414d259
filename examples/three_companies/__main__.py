"""`python -m examples.three_companies`: play the story, embedded, or over real servers."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cli.demo.processes import Processes
from examples.three_companies.companies import assemble
from examples.three_companies.stage import Stage
from examples.three_companies.story import Story
from federation.errors import FedqueueError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.three_companies", description=__doc__)
    parser.add_argument("--out", type=Path, help="new folder for everything; default runs/<time>")
    parser.add_argument(
        "--configs",
        type=Path,
        help="folder with server.toml and <company>.toml, accounts on real servers; none: embedded",
    )
    arguments = parser.parse_args()
    folder = (arguments.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with Processes(folder / "logs") as processes:
        stage = Stage(processes)
        stage.tell(f"Three companies with cameras of their own; everything is kept in {folder}")
        try:
            cast = assemble(folder, arguments.configs)
            Story(stage, cast, real=arguments.configs is not None).play()
        except FedqueueError as exc:
            stage.console.print(f"The story broke off: {exc}", style="bold red", markup=False)
            return 1
        stage.console.print(
            f"\nThe story went as it is told, in {time.monotonic() - stage.began:.0f} s.", style="bold green"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
