"""How much sooner a study is done than with Optuna, transformers.Trainer and peft, and what one step costs.

    python benchmarks/makespan.py                      every section, about an hour on two cores
    python benchmarks/makespan.py step tokens          some of them
    python benchmarks/makespan.py --quick              smaller sizes: whether it works, not how fast it is
    python benchmarks/makespan.py --write              put the tables into docs/performance.md

Sections: mixed (16 trials of all kinds), lora (LoRA only), step (one training step against peft), tokens (trainable
tokens in a large vocabulary), orchestration (what a trial costs besides training), linear (8 to 64 trials).

Both sides train the same trials on the same rows in the same order and measure them at the same points, each in a
process of its own, ours by the code of `workbench sweep`. Seconds run from the files to the last trial's result,
without the start of Python and the imports of the libraries. A figure is the median over the rounds of a section.
All figures are kept in benchmarks/makespan.json.
"""

from __future__ import annotations

import argparse
import os

# before the libraries read them
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "99"}

from rich.console import Console
from rich.markdown import Markdown
from speed import steps, studies
from speed.report import machine, markdown, save, write_into
from speed.work import ROOT, fetch_model
from transformers import AutoConfig
from transformers.utils import logging

PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "makespan.json"
SECTIONS = {
    "mixed": (studies.mixed, 1),
    "lora": (studies.lora_only, 3),
    "step": (steps.step, 1),
    "tokens": (steps.tokens, 1),
    "orchestration": (studies.orchestration, 1),
    "linear": (studies.linear, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--model", choices=["l6", "shipped"], default="l6", help="MiniLM-L6, or the one shipped here")
    parser.add_argument("--repeats", type=int, help="rounds of each section; its own number by default")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(unknown)}")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, model = Console(), fetch_model(arguments.model == "shipped")
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    console.print(machine(), highlight=False)
    for name in arguments.sections or SECTIONS:
        section, repeats = SECTIONS[name]
        report = section(model, layers, arguments.quick, arguments.repeats or repeats)
        save(RESULTS, name, report)
        table = markdown(report)
        console.print(Markdown(f"## {name}\n\n{table}"))
        if arguments.write:
            write_into(PAGE, name, table)


if __name__ == "__main__":
    main()
