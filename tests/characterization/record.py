"""`python -m tests.characterization.record`: rewrite `recorded/` with the current program.

Do this only for an intended change of recorded values, and mention it in the commit. `recorded/checkpoints` is kept: it
is a checkpoint with version 1 of the manifest, which this program reads but no longer writes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.characterization import observe

RECORDED = Path(__file__).parent / "recorded"


def write(name: str, content: Any) -> None:
    (RECORDED / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write("configurations", observe.printed_configurations())
        write("plan_70b", observe.plan_of_the_70b())
        write("tokens", observe.make_tokens(folder))
        write("converted", observe.converted(folder / "conversion"))
        runs: dict[str, Any] = {"machine": observe.machine()}
        for layout in observe.LAYOUTS:
            shutil.rmtree(folder / "logs", ignore_errors=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            runs[layout] = observe.train(folder, layout)
            runs[layout]["weights"] = observe.weight_hashes(folder / f"checkpoints/global_step{observe.STEPS}")
        write("runs", runs)
        halfway = folder / f"checkpoints/global_step{observe.FIRST_HALF}"  # of the last layout
        write("checkpoint_keys", {"manifest": observe.manifest_keys(halfway), "meta": observe.meta_keys(halfway)})


if __name__ == "__main__":
    main()
