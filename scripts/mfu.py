"""Speed of a run, and its share of the GPU's published peak: python scripts/mfu.py RUN_DIR."""

import sys
from pathlib import Path
from statistics import median

from gptcli.config.load import load_config
from gptcli.device import Device
from gptcli.errors import GptError
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.flops import flops_per_token, peak_flops


def main(run_dir: Path) -> str:
    """A line of figures; the first third of the run, in which it compiles, is left out."""
    about = read_run_json(run_dir)
    machine, choices = about["machine"], about["choices"]
    lines = [line for line in read_metrics(run_dir) if line["event"] == "train"]
    speed = median(line["tokens_per_second"] for line in lines[len(lines) // 3 :])
    model = load_config(str(run_dir / "config.yaml")).config.model
    flops = speed * flops_per_token(model, about["model"]["vocab_size"])
    bf16 = choices["precision"] == "bf16"
    device = Device(machine["device"], 0, machine["device_name"], machine["threads"], bf16)
    peak = peak_flops(device, choices["precision"])
    share = "no published peak known" if peak is None else f"MFU {flops / peak:.1%}"
    return (
        f"{device.name}, {choices['precision']}, compile {choices['compile']},"
        f" {choices['micro_batch_size']} rows at once: {speed:,.0f} tokens/s,"
        f" {flops / 1e12:.2f} TFLOP/s, {share}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/mfu.py RUN_DIR")
    try:
        print(main(Path(sys.argv[1])))
    except (GptError, OSError, KeyError, ValueError) as error:
        sys.exit(f"error: {sys.argv[1]}: {error!r}")
