"""`plan`: what a run will take, before it."""

import json
import time
from typing import Any

import pytest

from gptcli.config.load import dump_config, load_config
from gptcli.config.schema import Config
from gptcli.finetune import finetune
from gptcli.model.gpt import GPT
from gptcli.plan import Plan
from gptcli.plan import plan as whole_plan
from gptcli.pretrain import pretrain

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


@pytest.fixture(autouse=True)
def _own_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))


def plan(config: Config, **more: Any) -> Plan:
    return whole_plan(config, probe_seconds=0.1, **more)


def config(**sections: Any) -> Config:
    model = {**TINY, **sections.pop("model", {})}
    training = {"max_steps": 4, "tokens_per_step": 128, **sections.pop("training", {})}
    return Config.model_validate(
        {
            "model": model,
            "training": training,
            "tokenizer": {"kind": "bytes"},
            "data": {"train": "builtin:python"},
            "schedule": {"warmup_steps": 0},
            "eval": {"max_tokens": 512},
            "samples": {"max_new_tokens": 4},
            **sections,
        }
    )


@pytest.mark.parametrize("preset", ["gpt2", "modern"])
def test_parameters(preset: str) -> None:
    """Bug: the parts do not add up to the model, or a tied head is counted."""
    case = config(model={"preset": preset}, data={"train": "nothing.txt"})
    found = plan(case)
    parts, model = dict(found.parameters), GPT(case.model, found.vocab_size)
    total = parts.pop("total")
    assert total == sum(parts.values()) == model.parameter_count()
    assert parts["head"] == (0 if preset == "gpt2" else 32 * found.vocab_size)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert parts["norms"] == norms


def test_whole(tmp_path) -> None:
    """Bug: a plan of a run that fits finds problems, trains, or leaves a run directory behind."""
    found = plan(config(), price_per_hour=3600.0)
    assert (found.problems, found.notes) == ([], [])
    assert found.tokens == 4 * 128
    assert found.duration is not None
    assert found.cost == pytest.approx(found.duration.total_seconds)
    assert found.paces.source == "probe"
    assert found.text_tokens is not None
    assert found.text_tokens > 10_000
    assert not (tmp_path / "runs").exists()
    assert found.kv_cache_bytes == 2 * 2 * 32 * 32 * 4  # K and V, layers, tokens, width, fp32
    grouped = plan(config(model={"n_kv_head": 1}))
    assert grouped.kv_cache_bytes == found.kv_cache_bytes // 2


def test_text_elsewhere() -> None:
    """Bug: a text that is not on this machine stops a plan, which needs it only for epochs."""
    missing = config(data={"train": "nothing.txt"})
    found = plan(missing)
    assert found.text_tokens is None
    assert any("nothing.txt" in note for note in found.notes)
    assert found.tokens == 4 * 128
    training = {"max_epochs": 2.0, "max_steps": None}
    endless = plan(config(data={"train": "hub:owner/name"}, training=training), price_per_hour=1.0)
    assert (endless.tokens, endless.duration, endless.cost) == (None, None, None)
    assert len(endless.notes) == 2


def test_vocabulary() -> None:
    """Bug: a tokenizer is trained on all of a text, or needed, only to know its size."""
    bpe = config(tokenizer={"kind": "bpe", "vocab_size": 5000}, data={"train": "nothing.txt"})
    assert plan(bpe).vocab_size == 5000
    absent = config(tokenizer={"kind": "file", "path": "no/tokenizer"})
    assert plan(absent, vocab_size=700).vocab_size == 700


def test_init(tmp_path) -> None:
    """Bug: a run from a model is planned with the defaults' shape, not with that model's."""
    tiny = config(data={"train": "builtin:python"}, samples={"prompts": []})
    made = pretrain(tiny, run_dir=tmp_path / "made")
    training = {"max_steps": 2, "tokens_per_step": 64}
    again = Config.model_validate({"init": str(made.run_dir), "training": training,
                                   "schedule": {"warmup_steps": 0}})  # fmt: skip
    for where in (made.run_dir, made.run_dir / "checkpoints" / "step-00000004"):
        found = plan(again.model_copy(update={"init": str(where)}))
        assert found.parameters["total"] == GPT(tiny.model, 257).parameter_count()
        assert found.vocab_size == 257
    files = (made.run_dir / "checkpoints" / "step-00000004").glob("*.safetensors")
    assert plan(tiny).checkpoint_bytes == pytest.approx(sum(f.stat().st_size for f in files), 0.1)


def test_disk(monkeypatch, tmp_path) -> None:
    """Bug: a run whose checkpoints do not fit on the disk is said to fit, or another's is asked."""
    full = tmp_path / "full"
    monkeypatch.setattr(
        "gptcli.plan.free_bytes", lambda path: 1000 if path == full.absolute() else 10**12
    )
    assert plan(config()).problems == []
    found = plan(config(), run_dir=full)
    assert "of disk" in found.problems[0]
    assert "--run-dir" in found.advice[0]


def test_rows(tmp_path) -> None:
    """Bug: a plan of a finetuning looks for text in its rows, and knows no epochs."""
    made = pretrain(config(samples={"prompts": []}), run_dir=tmp_path / "made")
    rows = [{"question": f"{n}?", "answer": "yes" * (1 + n % 3)} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuning = {
        "init": str(made.run_dir),
        "data": {"train": str(tmp_path / "rows.jsonl"), "val_fraction": 0.1},
        "finetune": {"fields": {"prompt": "question", "response": "answer"}},
        "training": {"max_epochs": 2.0, "tokens_per_step": 128},
        "schedule": {"warmup_steps": 0},
    }
    found = plan(Config.model_validate(tuning))
    assert found.notes == ["the task's scores before and after are not in the seconds"]
    assert found.text_tokens is not None
    example = sum(2 + len(row["question"]) + len(row["answer"]) for row in rows) / 400
    assert found.text_tokens == pytest.approx(0.9 * 400 * example, rel=0.1)  # they are packed
    assert found.duration is not None
    assert found.duration.steps == pytest.approx(2 * found.text_tokens / 128, abs=1)
    tuning["finetune"] = {**tuning["finetune"], "packing": False}
    alone = plan(Config.model_validate(tuning)).text_tokens
    assert alone is not None
    assert alone % 32 == 0  # each row fills a block
    assert 0.8 * 400 < alone / 32 < 400


def test_adapters(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: adapters are planned as a training of all weights."""
    made = pretrain(config(samples={"prompts": []}), run_dir=tmp_path / "made")
    rows = [{"prompt": f"{n}?", "response": "yes" * (1 + n % 3)} for n in range(99)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuning = {
        "init": str(made.run_dir),
        "data": {"train": str(tmp_path / "rows.jsonl"), "val_fraction": 0.1},
        "finetune": {"method": "lora", "lora": {"rank": 1}, "score_rows": 1, "max_new_tokens": 1},
        "training": {"max_steps": 2, "tokens_per_step": 64, "eval_every": 2},
        "schedule": {"warmup_steps": 0},
        "samples": {"prompts": []},
    }
    case = Config.model_validate(tuning)
    found = plan(case)
    assert found.paces.source == "probe"
    with caplog.at_level("INFO", logger="gptcli"):
        run = finetune(case, run_dir=tmp_path / "tuned").run_dir
    checkpoint = run / "checkpoints" / "step-00000002"
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert found.checkpoint_bytes == pytest.approx(size, abs=8192)  # of names
    assert f"{found.learning_parameters:,} of" in caplog.text
    assert found.memory.gradients_bytes == 4 * found.learning_parameters


def test_recomputed_activations() -> None:
    """Bug: a run that keeps no activations is planned as if it did."""
    kept, again = (plan(config(training={"activation_checkpointing": how}))
                   for how in ("off", "on"))  # fmt: skip
    assert (kept.activation_checkpointing, again.activation_checkpointing) == (False, True)
    assert again.memory.activations_bytes < kept.memory.activations_bytes


def test_the_clock_is_the_works_own() -> None:
    """Bug: what the process did before the plan counts as the start of the run."""
    began = time.monotonic()
    found = plan(config())
    assert found.paces.starting_seconds <= time.monotonic() - began


def test_advice_works(monkeypatch) -> None:
    """Bug: what is said to make a run fit does not."""
    case = config(
        model={"n_layer": 4, "n_embd": 32, "block_size": 256},
        training={"tokens_per_step": 4096, "micro_batch_size": 16, "max_steps": 1},
        data={"train": "nothing.txt"},
    )
    needed = plan(case).memory
    for share in (0.5, 0.01):
        changeable = needed.total_bytes - needed.other_bytes
        limit = int(needed.total_bytes - (1 - share) * changeable)
        monkeypatch.setattr("gptcli.plan._memory_bytes", lambda device, n=limit: n)
        found = plan(case)
        assert found.problems
        assert found.paces.source == "products"
        changes = [word for word in found.advice[0].split() if "=" in word]
        values = {key.split(".")[1]: value for key, _, value in (c.partition("=") for c in changes)}
        assert "micro_batch_size" in values
        layers = int(values.pop("n_layer", case.model.n_layer))
        values = {k: int(v) if v.isdigit() else v for k, v in values.items()}
        changed = case.model_copy(
            update={
                "training": case.training.model_copy(update=values),
                "model": case.model.model_copy(update={"n_layer": layers}),
            }
        )
        assert plan(changed).problems == []


@pytest.mark.parametrize("price", ["inf", "nan"])
def test_a_price_that_is_none(price: str, gpt, tmp_path) -> None:
    """Bug: a cost that is not a number, as which --json writes what no parser reads."""
    (tmp_path / "empty.yaml").write_text("{}")
    code, out, err = gpt("plan", str(tmp_path / "empty.yaml"), f"--price-per-hour={price}")
    assert (code, out) == (2, "")
    assert "price-per-hour" in err


def test_command(gpt, tmp_path) -> None:
    """Bug: `--json` prints more than one object, or the table lacks what the plan is for."""
    text = "--set=training.max_steps=10"
    code, out, _ = gpt("plan", "tiny", text, "--json", "--price-per-hour", "2")
    assert code == 0
    said = json.loads(out)
    assert said["fits"] is True
    assert said["seconds"] > 0
    assert said["cost"] == pytest.approx(said["seconds"] / 3600 * 2)
    assert said["memory"]["total_bytes"] > said["memory"]["weights_bytes"]
    code, out, _ = gpt("plan", "tiny", text)
    assert code == 0
    for word in ("parameters", "activations", "KV cache", "checkpoint", "tokens per parameter"):
        assert word in out


def test_command_without_a_model_to_finetune(gpt, tmp_path) -> None:
    """Bug: a finetuning is planned as training from nothing, on text that its rows lack."""
    path = tmp_path / "tune.yaml"
    path.write_text(
        "data: {train: rows.jsonl}\nfinetune: {score_rows: 10}\ntraining: {max_epochs: 2}\n"
    )
    code, out, err = gpt("plan", str(path))
    assert (code, out) == (2, "")
    assert "finetuning starts from a model" in err
    assert "--model MODEL" in err


def test_the_config_of_a_run(tmp_path) -> None:
    """Bug: config.yaml of a run names every section: a pretraining is taken for a finetuning."""
    book, path = tmp_path / "book.txt", tmp_path / "tiny.yaml"
    book.write_text("the sun and the moon sing of a river\n" * 99)
    path.write_text(
        f"tokenizer: {{kind: bytes}}\ndata: {{train: {book}}}\nsamples: {{prompts: []}}\n"
        "model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}\n"
        "training: {max_steps: 2, tokens_per_step: 64, device: cpu, compile: off}\n"
        "schedule: {warmup_steps: 0}\n"
    )
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(load_config(str(path), []).config, loadable=True))
    found = plan(load_config(str(resolved), []).config)
    assert found.text_tokens is not None
    assert found.notes == []


def test_command_misfit(gpt, tmp_path) -> None:
    """Bug: a run that is far too large ends as if it fitted, or says nothing of what to change."""
    path = tmp_path / "large.yaml"
    path.write_text(
        "model: {preset: gpt3-175b}\ndata: {train: nothing.txt}\ntraining: {max_steps: 100}\n"
    )
    code, out, err = gpt("plan", str(path))
    assert code == 6
    assert "175" in out.splitlines()[0] or "174" in out.splitlines()[0]
    assert "error: a step takes" in err
    assert "hint: " in err
