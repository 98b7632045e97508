"""Sets the strength t of a trained head without training: t = 0 gives the original model, t < 0 the opposite.

    python examples/set_head_t.py --model runs/head --t 0.4 --output_dir runs/head-neutral

--model is the output_dir of train_po.py --trainable head, or of this script. The script writes a plain CLIPModel
directory, and copies head.safetensors into it, so that t can be set again.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.methods.head import HEAD_FILE, load_head, set_head_t, warn_of_condition
from utils.models.hub import load
from utils.models.published import save_model


@dataclass
class Settings:
    model: str = required("directory with a model and its head.safetensors", group="model", path=True)
    t: float = flag(1.0, "strength: 1 as trained, 0 the original", group="model", minimum=-10, maximum=10)
    output_dir: str = required("where the model goes", group="output", path=True)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty directory; give another one")
    head = load_head(settings.model)
    clip, processor = load(settings.model, "--model")
    set_head_t(clip, head, settings.t)
    save_model(output_dir, clip, processor, {})
    shutil.copyfile(Path(settings.model) / HEAD_FILE, output_dir / HEAD_FILE)
    if warning := warn_of_condition(head["weight"]):
        print(f"warning: {warning}")
    print(f"{output_dir}: saved with t = {settings.t:g}")


if __name__ == "__main__":
    run(main)
