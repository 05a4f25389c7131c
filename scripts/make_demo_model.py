"""Pack the shipped model: a float checkpoint of novelist-9m -> mlx_pare/demo/model, MLX affine 8-bit, group 64.

    python scripts/make_demo_model.py PATH/TO/novelist-9m

Uses mlx-lm's own conversion; tokenizer and model card go along.
"""

import argparse
import shutil
from pathlib import Path

from mlx_lm.convert import convert

TARGET = Path(__file__).resolve().parents[1] / "mlx_pare" / "demo" / "model"
KEPT = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source
    shutil.rmtree(TARGET, ignore_errors=True)
    convert(str(source), mlx_path=str(TARGET), quantize=True, q_bits=8, q_group_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, TARGET / name)
    for file in TARGET.iterdir():
        if file.name not in KEPT:
            file.unlink()
    card = (source / "README.md").read_text()
    (TARGET / "README.md").write_text(
        card.replace("stored as float16", "stored as MLX affine 8-bit, group 64 (float16 scales)")
    )
    for file in sorted(TARGET.iterdir()):
        print(f"{file.stat().st_size:>10,}  {file.name}")


if __name__ == "__main__":
    main()
