"""`python -m scripts.mini [STAGE ...]`: make the mini model, from drawings to figures. Each stage can be interrupted and goes on."""

import argparse
from pathlib import Path

from lorabooth.mini import FOLDER
from scripts.mini import base, draw, evaluate, export, text, vae

STAGES = ("draw", "vae", "tokenizers", "text", "base", "distill", "export", "evaluate")


def main() -> None:
    """Run the named stages in order; all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m scripts.mini", description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], default=list(STAGES), help=f"stages to run [default: {' '.join(STAGES)}]")
    parser.add_argument("--work", type=Path, default=Path("build/mini"), help="folder for drawings and training states [default: build/mini]")
    parser.add_argument("--target", type=Path, default=FOLDER, help="folder of the finished pipeline [default: lorabooth/mini/model]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=11_000, help="[default: 11000, 30 minutes on two cores with AVX512-BF16]")
    parser.add_argument("--text-steps", type=int, default=1200, help="[default: 1200, 5 minutes]")
    parser.add_argument("--base-steps", type=int, default=14_500, help="[default: 14500, 3 hours]")
    parser.add_argument("--picture-steps", type=int, default=1500, help="the first of the base steps, without words [default: 1500]")
    parser.add_argument("--distill-steps", type=int, default=3600, help="[default: 3600, 75 minutes]")
    parser.add_argument("--count", type=int, default=300, help="unseen descriptions to evaluate [default: 300]")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/mini.json"))
    parser.add_argument("--sheet", type=Path, help="write a picture of truths and results here")
    a = parser.parse_args()
    out = a.work / "out"
    out.mkdir(parents=True, exist_ok=True)
    run = {
        "draw": lambda: draw.draw_all(a.work / "drawings", a.seed),
        "vae": lambda: vae.train(a.work, out, a.vae_steps, a.seed),
        "tokenizers": lambda: text.build_tokenizers(out, a.seed),
        "text": lambda: text.train(a.work, out, a.text_steps, a.seed),
        "base": lambda: base.train(a.work, out, a.base_steps, a.picture_steps, a.seed),
        "distill": lambda: base.distill(a.work, out, a.distill_steps, a.seed),
        "export": lambda: export.export(out, a.work / "distill.safetensors", a.target),
        "evaluate": lambda: evaluate.evaluate(a.target, a.count, a.result, a.sheet),
    }
    for stage in STAGES:
        if stage in a.stages:
            run[stage]()


if __name__ == "__main__":
    main()
